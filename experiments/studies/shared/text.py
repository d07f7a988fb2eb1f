"""Small language models on text: their runs, trained by the house's trainer and kept on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdlm.config import DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig, RecurrenceConfig, RunConfig, preset
from rdlm.runtime import EXIT_DONE
from rdlm.train import train


def text_data(folder: Path, quick: bool = False) -> DataConfig:
    """The World Factbook, 8 rows of 128 tokens a step; quick: of 64 tokens, and a smaller vocabulary."""
    data = preset("nano" if quick else "quickstart").data
    return dataclasses.replace(data, batch_size=8, folder=str(folder))


def text_run(name: str, data: DataConfig, folder: Path, steps: int, shape: Mapping[str, Any]) -> RunConfig:
    """A run of a model without a prelude; `shape` holds fields of ModelConfig.

    At a mean of one recurrence the depth is fixed. AdamW at 3e-3, 50 steps of warm-up, the last quarter a cooldown.
    """
    base = preset("quickstart")
    filled: dict[str, Any] = {"embed_dim": 64, "prelude_layers": 0, "core_layers": 1, "coda_layers": 1, **shape}
    filled = {"mlp_dim": 3 * filled["embed_dim"], "mean_recurrence": 8, "backprop_depth": 4} | filled
    model = ModelConfig(vocab_size=data.tokenizer_size, num_heads=4, max_length=data.sequence_length, **filled)
    scheme = "non-recurrent" if model.mean_recurrence == 1 else base.recurrence.scheme
    return dataclasses.replace(
        base,
        preset=name,
        model=model,
        recurrence=RecurrenceConfig(scheme=scheme),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=min(50, steps // 4), cooldown_steps=steps // 4),
        data=data,
        checkpoint=dataclasses.replace(base.checkpoint, every=steps),
        evaluation=EvaluationConfig(every=steps, depths=(model.mean_recurrence,)),
        steps=steps,
        run_dir=str(folder),
    )


def trained(run: RunConfig) -> Path:
    """The folder of a run, trained now if it is not finished.

    Raises:
      SystemExit: with the trainer's exit code, if it was stopped.
    """
    code = train(run)
    if code != EXIT_DONE:
        raise SystemExit(code)
    return Path(run.folder)
