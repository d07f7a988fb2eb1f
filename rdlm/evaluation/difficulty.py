"""Accuracy on a procedural task by difficulty, at every depth and with exit rules. Counts are exact integers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import exits
from rdlm.config import InputError, ModelConfig
from rdlm.exits import ExitRule, Observation
from rdlm.losses import likeliest
from rdlm.model import Params, bind, forward, known
from rdlm.recurrence import check_depths, checkpoints
from rdlm.tasks.instance import IGNORED


@dataclasses.dataclass
class ByDifficulty:
    """Answers counted by difficulty: row d is difficulty d, and row 0 is empty.

    count int64 [N+1]: answers. right int64 [N+1, R]: right answers at each of R depths. steps int64 [N+1]: their
    recurrences, with exits.
    """

    count: np.ndarray
    right: np.ndarray
    steps: np.ndarray

    def accuracy(self, first: int = 1, last: int | None = None) -> np.ndarray:
        """Share of right answers at each depth, [R], over difficulties first .. last (both included)."""
        rows = slice(first, None if last is None else last + 1)
        return self.right[rows].sum(0) / self.count[rows].sum()

    def mean_steps(self, first: int = 1, last: int | None = None) -> float:
        """Recurrences per answer over those difficulties."""
        rows = slice(first, None if last is None else last + 1)
        return float(self.steps[rows].sum() / self.count[rows].sum())


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def logits_by_depth(params: Params, config: ModelConfig, tokens: Array, depths: tuple[int, ...], key: Array) -> Array:
    """Logits f32 [R, B, L, V] of tokens int [B, L] after each of the R increasing `depths`, from one unroll."""
    bound = bind(params, config, tokens, key=key)
    return checkpoints(bound.step, bound.s0, depths, lambda s: known(config, bound.read(s)[0]))


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def _answers(params: Params, config: ModelConfig, tokens: Array, depths: tuple[int, ...], key: Array) -> Array:
    return likeliest(logits_by_depth(params, config, tokens, depths, key))


@functools.partial(jax.jit, static_argnames=("config", "max_steps"))
def _per_token(
    params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, max_steps: int, key: Array
) -> tuple[Array, Array]:
    """Answers [1, B, L] and recurrences [B, L] when every token stops on its own."""
    out = forward(params, config, tokens, max_steps, exit_rule=rule, key=key)
    return likeliest(known(config, out.logits))[None], out.steps


@functools.partial(jax.jit, static_argnames=("config", "max_steps"))
def _per_sequence(
    params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, max_steps: int, key: Array
) -> tuple[Array, Array]:
    """The same when the largest value over the tokens so far decides."""
    logits = logits_by_depth(params, config, tokens, tuple(range(1, max_steps + 1)), key)
    state = exits.init(rule, jnp.zeros((*tokens.shape, 1)), logits.shape[-1])

    def check(carry: tuple[Any, Array], seen: tuple[Array, Array]) -> tuple[tuple[Any, Array], None]:
        state, steps = carry
        r, at_r = seen
        state, value = exits.update(rule, state, Observation(jnp.zeros(()), at_r, r))
        # The model is causal, so the maximum up to a position is that of the sequence that ends there.
        value = jax.lax.cummax(value[:, 1:], axis=1)
        stop = (steps == max_steps) & jnp.pad(exits.exits(rule, value), ((0, 0), (1, 0)))
        return (state, jnp.where(stop, r, steps)), None

    start = state, jnp.full(tokens.shape, max_steps, jnp.int32)
    (_, steps), _ = jax.lax.scan(check, start, (jnp.arange(1, max_steps + 1, dtype=jnp.int32), logits))
    answers = jnp.take_along_axis(likeliest(logits), steps[None] - 1, axis=0)
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
    max_steps: int,
    key: Array | None = None,
    *,
    per_sequence: bool = False,
) -> ByDifficulty:
    """Right answers (R = 1) and recurrences with an exit rule, after at most `max_steps` recurrences.

    Every token stops on its own or, with `per_sequence`, all tokens run until the rule's largest value over them is
    below its threshold. Then an answer counts with the steps of the sequence that ends with it, and the first token
    (BOS), which has no answer and is not trained, is left out of the maximum.

    Raises:
      InputError: nothing to score; `per_sequence` with a rule that does not compare predictions with a threshold.
    """
    if per_sequence and (not rule.needs_logits or rule.kind == "argmax_stability"):
        raise InputError(f"sequence exits: rule {rule.kind!r} must compare predictions, such as rdlm.exits.kl()")
    key = jax.random.key(0) if key is None else key
    run = _per_sequence if per_sequence else _per_token
    return counted((b, *run(params, config, jnp.asarray(b["tokens"]), rule, max_steps, key)) for b in batches)


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
