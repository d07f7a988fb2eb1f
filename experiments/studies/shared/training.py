"""Training on a task from scratch: the run, the batches and the loop that all experiments on tasks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdlm.config import (
    DataConfig,
    InputError,
    ModelConfig,
    OptimizerConfig,
    RecurrenceConfig,
    RunConfig,
    Scheme,
    require,
)
from rdlm.tasks.instance import TEST_STREAM, Task, batch

if TYPE_CHECKING:
    from jax import Array


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds of training that are none, negative, repeated or meet the test stream. Raises InputError."""
    for seed in seeds:
        require(0 <= seed < TEST_STREAM, "--seeds", seed, f"must be in [0, {TEST_STREAM})")
    require(len(set(seeds)) == len(seeds) > 0, "--seeds", tuple(seeds), "must be different seeds")


def check_comparison(args: Any) -> tuple[Path, Path]:
    """(where runs are remembered, where results go) by a comparison's methods, seeds, runs, results and quick.

    Raises:
      InputError: no method or one twice, or seeds that `check_seeds` refuses.
    """
    require(len(set(args.methods)) == len(args.methods) > 0, "--methods", args.methods, "must be different methods")
    check_seeds(args.seeds)
    return (args.runs / "quick", args.runs / "quick") if args.quick else (args.runs, args.results)


class Diverged(InputError):
    """A loss that is not a finite number."""


def small_run(
    name: str,
    tasks: Sequence[Task],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    run_dir: str = "",
    scheme: Scheme = "poisson-lognormal-filling",
    **shape: Any,
) -> RunConfig:
    """The run that tasks are learnt with: D = 64, one layer each of prelude, core and coda, mean r 8, k 4.

    AdamW, decay .01, 100 steps of warm-up, the last fifth down to 5 %. `shape` replaces fields of the ModelConfig.
    Raises InputError for what the configurations refuse.
    """
    vocab = tasks[0].vocab_size
    standard: dict[str, Any] = {
        "embed_dim": 64, "num_heads": 4, "mlp_dim": 128, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1,
        "max_length": 4096, "rope_base": 10_000.0, "mean_recurrence": 8, "backprop_depth": 4,
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(vocab_size=vocab, **standard | shape),
        recurrence=RecurrenceConfig(scheme=scheme),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, min_learning_rate=0.05 * learning_rate, weight_decay=0.01,
            warmup_steps=min(100, steps // 4), cooldown_steps=steps // 5,
        ),
        data=DataConfig(
            tokenizer_size=vocab, batch_size=batch_size,
            sequence_length=max(len(task.instance(0, 0).tokens) for task in tasks),
        ),
        preset=name, steps=steps, seed=seed, run_dir=run_dir,
    )  # fmt: skip


def training_batch(tasks: Sequence[Task], seed: int, step: int, size: int) -> dict[str, np.ndarray]:
    """Batch of a step: new instances, each row with noise of its own. tokens, labels, sequence_ids int32 [size, L]."""
    made = batch(tasks, seed, step, size)
    rows = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], made["tokens"].shape)
    return {"tokens": made["tokens"], "labels": made["labels"], "sequence_ids": rows}


def train(
    run: RunConfig,
    tasks: Sequence[Task],
    step: Callable[[Any, dict[str, np.ndarray]], tuple[Any, dict[str, Array]]],
    state: Any,
    watch: Callable[[int, dict[str, float]], None],
) -> Any:
    """The state after run.steps calls of step(state, batch) -> (state, metrics with a loss); batches are f(seed, i).

    watch(i, metrics as numbers) is called at every tenth step and the last.

    Raises:
      Diverged: at one of those steps, the loss is not finite.
    """
    for i in range(run.steps):
        state, metrics = step(state, training_batch(tasks, run.seed, i, run.data.batch_size))
        if i + 1 == run.steps or i % 10 == 0:
            values = {name: x.item() for name, x in metrics.items()}
            if not math.isfinite(values["loss"]):
                raise Diverged(f"step {i}: loss {values['loss']}: training has diverged")
            watch(i, values)
    return state
