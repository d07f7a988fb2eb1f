"""Training on a task from scratch: the run, its batches, and the loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array

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
from rdlm.model import Bound, Params, bind
from rdlm.tasks.instance import TEST_STREAM, Task, batch

State = TypeVar("State")
Batch = dict[str, np.ndarray]

SMALL: dict[str, Any] = {
    "embed_dim": 64,
    "num_heads": 4,
    "mlp_dim": 128,
    "prelude_layers": 1,
    "core_layers": 1,
    "coda_layers": 1,
    "max_length": 4096,
    "rope_base": 10_000.0,
    "mean_recurrence": 8,
    "backprop_depth": 4,
}
"""The model that tasks are learnt with: 132,736 parameters on S3."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds, equal ones, and any outside the streams of training instances. Raises InputError."""
    for seed in seeds:
        require(0 <= seed < TEST_STREAM, "--seeds", seed, f"must be in [0, {TEST_STREAM})")
    require(len(set(seeds)) == len(seeds) > 0, "--seeds", tuple(seeds), "must be different seeds")


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
    scheme: Scheme = "poisson-lognormal-filling",
    **shape: Any,
) -> RunConfig:
    """A run of `SMALL` on `tasks`; `shape` replaces fields of the ModelConfig.

    AdamW, weight decay 0.01, 100 steps of warm-up, the last fifth down to 5 % of the rate.

    Raises:
      InputError: a value that the configurations refuse.
    """
    vocab = tasks[0].vocab_size
    return RunConfig(
        model=ModelConfig(vocab_size=vocab, **SMALL | shape),
        recurrence=RecurrenceConfig(scheme=scheme),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            min_learning_rate=0.05 * learning_rate,
            weight_decay=0.01,
            warmup_steps=min(100, steps // 4),
            cooldown_steps=steps // 5,
        ),
        data=DataConfig(
            tokenizer_size=vocab,
            batch_size=batch_size,
            sequence_length=max(len(task.instance(0, 0).tokens) for task in tasks),
        ),
        preset=name,
        steps=steps,
        seed=seed,
    )


def training_batch(tasks: Sequence[Task], seed: int, step: int, size: int) -> Batch:
    """New instances for a step, each row with noise of its own. tokens, labels, sequence_ids int32 [size, L]."""
    made = batch(tasks, seed, step, size)
    rows = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], made["tokens"].shape)
    return {"tokens": made["tokens"], "labels": made["labels"], "sequence_ids": rows}


def bind_batch(params: Params, model: ModelConfig, batch: dict[str, Array], key: Array) -> Bound:
    """The model bound to a training batch, every row with the noise that `rdlm.loss` gives it."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["sequence_ids"][:, 0])
    return bind(params, model, batch["tokens"], key=keys)


def train(
    run: RunConfig,
    tasks: Sequence[Task],
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]],
    state: State,
    watch: Callable[[int, dict[str, float]], None],
) -> State:
    """The state after run.steps calls of step(state, batch) -> (state, metrics with a loss).

    watch(i, metrics) is called at every tenth step and the last one; only there does the host wait for the device.

    Raises:
      Diverged: the loss of one of those steps is not finite.
    """
    for i in range(run.steps):
        state, metrics = step(state, training_batch(tasks, run.seed, i, run.data.batch_size))
        if i + 1 == run.steps or i % 10 == 0:
            values = {name: x.item() for name, x in metrics.items()}
            if not math.isfinite(values["loss"]):
                raise Diverged(f"step {i}: loss {values['loss']}: training has diverged")
            watch(i, values)
    return state
