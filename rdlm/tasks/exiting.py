"""What exit rules do on a task's instances: as tokens decode, and as if stopping changed nothing for the others."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import exits
from rdlm.config import ModelConfig
from rdlm.exits import ExitRule, Observation
from rdlm.model import Params, forward, readout
from rdlm.recurrence import trajectory
from rdlm.tasks.depth import setup
from rdlm.tasks.instance import IGNORED


@functools.partial(jax.jit, static_argnames="config")
def stopped(
    params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, most: Any
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(answers, recurrences, looks at logits), int [B, L] each, of tokens int [B, L] that stop by `rule`.

    As `rdlm.forward` does it: what a token held when it stopped is what later tokens see of it from then on.
    """
    out = forward(params, config, tokens, most, exit_rule=rule)
    assert out.looks is not None  # a rule's looks are counted
    return jnp.argmax(out.logits, axis=-1), out.steps, out.looks


class Watched(NamedTuple):
    """An unroll that nobody leaves: s0 [B, L, D], states [R, B, L, D] and logits f32 [R, B, L, V] at depths 1 .. R."""

    s0: Array
    states: Array
    logits: Array


@functools.partial(jax.jit, static_argnames=("config", "most"))
def watched(params: Params, config: ModelConfig, tokens: Array, most: int) -> Watched:
    """`most` recurrences of tokens int [B, L], from the initial states of `stopped`."""
    step, s0, ctx = setup(params, config, tokens, jax.random.key(0))
    states = trajectory(step, s0, most)[1:]
    return Watched(s0, states, jax.lax.map(lambda s: readout(params, config, s, ctx)[0], states))


@jax.jit
def alone(rule: ExitRule, seen: Watched) -> tuple[Array, Array]:
    """(answers, recurrences), int [B, L], where `rule` would first have stopped a token while all others go on.

    Never stopped is read at the end. A rule's gate is left out.
    """
    most = len(seen.states)

    def look(carry: tuple[Any, Array], at: tuple[Array, Array, Array]) -> tuple[tuple[Any, Array], None]:
        state, steps = carry
        r, s, logits = at
        state, value = exits.update(rule, state, Observation(s, logits, r))
        return (state, jnp.where((steps == most) & exits.exits(rule, value), r, steps)), None

    start = exits.init(rule, seen.s0, seen.logits.shape[-1]), jnp.full(seen.s0.shape[:-1], most, jnp.int32)
    depths = jnp.arange(1, most + 1, dtype=jnp.int32)
    (_, steps), _ = jax.lax.scan(look, start, (depths, seen.states, seen.logits))
    return jnp.take_along_axis(jnp.argmax(seen.logits, axis=-1), steps[None] - 1, axis=0)[0], steps


def oracle(batches: Iterable[dict[str, np.ndarray]], seen: Iterable[Watched]) -> tuple[float, float]:
    """(accuracy, mean recurrences) of who stops where an answer is right for good, and at once if it never is."""
    accuracy, steps = [], []
    for b, of in zip(batches, seen, strict=True):
        asked = b["labels"] != IGNORED
        wrong = (np.asarray(of.logits).argmax(-1) != b["labels"])[:, asked]
        last_wrong = len(wrong) - np.argmax(wrong[::-1], axis=0)  # its depth, where there is one
        accuracy.append(~wrong[-1])
        steps.append(np.where(wrong[-1] | ~wrong.any(0), 1, last_wrong + 1))
    return float(np.concatenate(accuracy).mean()), float(np.concatenate(steps).mean())
