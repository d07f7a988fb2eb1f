"""Text for studies: small language models by the house's trainer, kept on disk; and rows of text as a task."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.config import (
    IGNORED,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RecurrenceConfig,
    RunConfig,
    preset,
)
from rdlm.data import PackedData
from rdlm.runtime import EXIT_DONE
from rdlm.tasks.instance import TEST_STREAM, Instance
from rdlm.train import train


def text_data(folder: Path, quick: bool = False) -> DataConfig:
    """The World Factbook, 8 rows of 128 tokens a step; quick: of 64 tokens, and a smaller vocabulary."""
    data = preset("nano" if quick else "quickstart").data
    return dataclasses.replace(data, batch_size=8, folder=str(folder))


@functools.cache
def _packed(folder: str, split: str, length: int, seed: int) -> PackedData:
    return PackedData(folder, split, sequence_length=length, batch_size=1, seed=seed, shuffle=split == "train")


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Prepared text as a `rdlm.tasks.Task`: every row an instance, read as one text, all answers of difficulty 1.

    Streams from TEST_STREAM on hold the held-out rows, in the order on disk; others the training rows, shuffled.
    """

    folder: str
    vocab_size: int
    length: int = 128

    def instance(self, seed: int, index: int) -> Instance:
        """Row `index` of stream `seed`: int32 [length]. Raises InputError: the folder holds other rows, or none."""
        split = "validation" if seed >= TEST_STREAM else "train"
        found = _packed(self.folder, split, self.length, seed % TEST_STREAM).batch(index)
        tokens, labels = (np.asarray(found[name][0], np.int32) for name in ("tokens", "labels"))
        return Instance(tokens, labels, (labels != IGNORED).astype(np.int32))


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
