"""How right a model is as a function of depth: by difficulty and r, and with exits. Counts are exact integers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import exits, losses
from rdlm.config import InputError, ModelConfig
from rdlm.exits import ExitRule, Observation
from rdlm.losses import as_batch
from rdlm.model import Params, forward, readout
from rdlm.model.blocks import Context
from rdlm.recurrence import Step, check_depths, checkpoints
from rdlm.tasks.instance import IGNORED


@dataclasses.dataclass
class ByDifficulty:
    """Answers counted by difficulty. count int64 [N+1]: answers; right int64 [N+1, R]: right ones, at each of R depths.

    steps int64 [N+1]: recurrences spent, for exits. Row d is difficulty d; row 0 stays empty.
    """

    count: np.ndarray
    right: np.ndarray
    steps: np.ndarray

    def accuracy(self, least: int = 1, most: int | None = None) -> np.ndarray:
        """Share of right answers at each depth, [R], over difficulties least .. most (both included)."""
        rows = slice(least, None if most is None else most + 1)
        return self.right[rows].sum(0) / self.count[rows].sum()

    def mean_steps(self, least: int = 1, most: int | None = None) -> float:
        """Recurrences per answer over those difficulties."""
        rows = slice(least, None if most is None else most + 1)
        return float(self.steps[rows].sum() / self.count[rows].sum())


def setup(params: Params, config: ModelConfig, tokens: Array, key: Array) -> tuple[Step, Array, Context]:
    """What every way of running the core starts from: (step(s, i) -> s, the initial state s0 [B, L, D], the context).

    tokens: int [B, L]. key: one, for the same noise in every row, or one per row [B].
    """
    return losses.setup(params, config, as_batch({"tokens": tokens, "labels": tokens}), None, key)


def started(params: Params, config: ModelConfig, batch: dict[str, Array], key: Array) -> tuple[Step, Array, Context]:
    """`setup` of a training batch (with sequence_ids), every row with the noise that `rdlm.loss` gives it."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["sequence_ids"][:, 0])
    return setup(params, config, batch["tokens"], keys)


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def logits_by_depth(
    params: Params, config: ModelConfig, tokens: Array, depths: tuple[int, ...], key: Array
) -> Array:  # fmt: skip
    """Logits f32 [R, B, L, V] of tokens int [B, L] after each of the R increasing `depths`, from one unroll."""
    step, s, ctx = setup(params, config, tokens, key)
    return checkpoints(step, s, depths, lambda s: readout(params, config, s, ctx)[0])


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def _answers(params: Params, config: ModelConfig, tokens: Array, depths: tuple[int, ...], key: Array) -> Array:
    return jnp.argmax(logits_by_depth(params, config, tokens, depths, key), axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "most"))
def _adaptive(params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, most: int, key: Array):
    out = forward(params, config, tokens, most, exit_rule=rule, key=key)
    return jnp.argmax(out.logits, axis=-1)[None], out.steps


@functools.partial(jax.jit, static_argnames=("config", "most"))
def _together(params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, most: int, key: Array):
    logits = logits_by_depth(params, config, tokens, tuple(range(1, most + 1)), key)
    state = exits.init(rule, jnp.zeros((*tokens.shape, 1)), logits.shape[-1])

    def look(carry: Any, seen: tuple[Array, Array]) -> tuple[Any, None]:
        state, steps = carry
        r, at_r = seen
        state, value = exits.update(rule, state, Observation(jnp.zeros(()), at_r, r))
        # As if the sequence ended at each of its positions: the largest value so far decides. The model is causal.
        value = jax.lax.cummax(value[:, 1:], axis=1)
        stop = (steps == most) & jnp.pad(exits.exits(rule, value), ((0, 0), (1, 0)))
        return (state, jnp.where(stop, r, steps)), None

    start = state, jnp.full(tokens.shape, most, jnp.int32)
    (_, steps), _ = jax.lax.scan(look, start, (jnp.arange(1, most + 1, dtype=jnp.int32), logits))
    answers = jnp.take_along_axis(jnp.argmax(logits, axis=-1), steps[None] - 1, axis=0)
    return answers, steps


def by_depth(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    depths: tuple[int, ...],
    key: Array | None = None,
) -> ByDifficulty:
    """Right answers at each of the increasing `depths`, by difficulty; `batches` as `rdlm.tasks.batch` makes them.

    Raises:
      InputError: nothing to score, or depths that are not increasing.
    """
    depths = check_depths(depths)
    key = jax.random.key(0) if key is None else key
    return counted((b, _answers(params, config, jnp.asarray(b["tokens"]), depths, key), None) for b in batches)


def with_exits(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    rule: ExitRule,
    most: int,
    key: Array | None = None,
) -> ByDifficulty:
    """Right answers (R = 1) and recurrences when every token stops on its own, after at most `most`."""
    key = jax.random.key(0) if key is None else key
    return counted((b, *_adaptive(params, config, jnp.asarray(b["tokens"]), rule, most, key)) for b in batches)


def with_sequence_exits(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    rule: ExitRule,
    most: int,
    key: Array | None = None,
) -> ByDifficulty:
    """As `with_exits`, but all tokens run until the rule's largest value over them is below its threshold.

    An answer counts with the steps of the sequence that ends with it. The first token (BOS) has no answer, is never
    trained, and is left out of the largest value.

    Raises:
      InputError: a rule that looks at states, or that is not of the kind "value < threshold".
    """
    if not rule.needs_logits or rule.kind == "argmax_stability":
        raise InputError(f"sequence exits: rule {rule.kind!r} must compare predictions, such as rdlm.exits.kl()")
    key = jax.random.key(0) if key is None else key
    return counted((b, *_together(params, config, jnp.asarray(b["tokens"]), rule, most, key)) for b in batches)


def counted(results: Iterable[Any]) -> ByDifficulty:
    """Sums over (batch, answers int [R, B, L], steps int [B, L] or None), batches as `rdlm.tasks.batch` makes them.

    Raises:
      InputError: nothing to score.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch, answers, steps in results:
        asked = batch["labels"] != IGNORED
        right = (np.asarray(answers) == batch["labels"][None])[:, asked]
        spent = np.zeros(right.shape[1], np.int64) if steps is None else np.asarray(steps)[asked]
        found.append((batch["difficulty"][asked], right, spent))
    if not found or not sum(len(d) for d, _, _ in found):
        raise InputError("tasks: there is no answer to score")
    difficulty = np.concatenate([d for d, _, _ in found])
    right, steps = (np.concatenate([f[i] for f in found], axis=-1) for i in (1, 2))
    size = int(difficulty.max()) + 1
    return ByDifficulty(
        np.bincount(difficulty, minlength=size),
        np.stack([np.bincount(difficulty, weights=row, minlength=size) for row in right], axis=1).astype(np.int64),
        np.bincount(difficulty, weights=steps, minlength=size).astype(np.int64),
    )
