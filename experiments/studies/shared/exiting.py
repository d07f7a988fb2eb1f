"""Exit rules on instances of a task: as in decoding, and as if an exit changed nothing for later tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from experiments.studies.shared import rules
from rdlm import exits
from rdlm.config import ModelConfig
from rdlm.exits import ExitRule, Observation
from rdlm.model import Params, bind, forward
from rdlm.perf import flops
from rdlm.recurrence import trajectory
from rdlm.tasks.instance import IGNORED


@functools.partial(jax.jit, static_argnames="config")
def stopped(
    params: Params, config: ModelConfig, tokens: Array, rule: ExitRule, max_steps: int | Array
) -> tuple[Array, Array, Array]:
    """(answers, recurrences, checks of logits), int [B, L] each, of tokens int [B, L] that exit by `rule`.

    As in `rdlm.forward`, later tokens see the keys and values that a token held when it exited.
    """
    out = forward(params, config, tokens, max_steps, exit_rule=rule)
    assert out.checks is not None  # counted with any rule
    return jnp.argmax(out.logits, axis=-1), out.steps, out.checks


class Watched(NamedTuple):
    """An unroll without exits: s0 [B, L, D], states [R, B, L, D] and logits f32 [R, B, L, V] at depths 1 .. R."""

    s0: Array
    states: Array
    logits: Array


@functools.partial(jax.jit, static_argnames=("config", "max_steps"))
def watched(params: Params, config: ModelConfig, tokens: Array, max_steps: int) -> Watched:
    """`max_steps` recurrences of tokens int [B, L], from the initial states of `stopped`."""
    bound = bind(params, config, tokens, key=jax.random.key(0))
    states = trajectory(bound.step, bound.s0, max_steps)[1:]
    return Watched(bound.s0, states, jax.lax.map(lambda s: bound.read(s)[0], states))


@jax.jit
def alone(rule: ExitRule, seen: Watched) -> tuple[Array, Array]:
    """(answers, recurrences), int [B, L], where `rule` would first stop a token if all others continued.

    A token that never exits is read at the last depth. A rule's gate is not applied.
    """
    max_steps = len(seen.states)

    def check(carry: tuple[PyTree, Array], at: tuple[Array, Array, Array]) -> tuple[tuple[PyTree, Array], None]:
        state, steps = carry
        r, s, logits = at
        state, value = exits.update(rule, state, Observation(s, logits, r))
        return (state, jnp.where((steps == max_steps) & exits.exits(rule, value), r, steps)), None

    start = exits.init(rule, seen.s0, seen.logits.shape[-1]), jnp.full(seen.s0.shape[:-1], max_steps, jnp.int32)
    depths = jnp.arange(1, max_steps + 1, dtype=jnp.int32)
    (_, steps), _ = jax.lax.scan(check, start, (depths, seen.states, seen.logits))
    return jnp.take_along_axis(jnp.argmax(seen.logits, axis=-1), steps[None] - 1, axis=0)[0], steps


def inner(rule: str) -> str:
    """NAME of a rule called NAME, "twice NAME" or "delayed NAME"."""
    return rule.split()[-1]


LEARNT = ("classifier", "halting")
"""Rules that read a head."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Tests a model with exit rules on batches of one length; `head`: of learnt rules."""

    params: Params
    config: ModelConfig
    batches: list[dict[str, np.ndarray]]
    max_steps: int
    head: rules.Head | None = None

    def rule(self, name: str, threshold: float) -> ExitRule:
        """The rule of `rdlm.exits` or `rules` called `name`, "twice NAME" or "delayed NAME"."""
        *wrapper, name = name.split()
        if wrapper:
            wrap: Callable[[ExitRule], ExitRule] = getattr(exits, wrapper[0])
            return wrap(self.rule(name, threshold))
        make: Callable[..., ExitRule] = getattr(rules, name, None) or getattr(exits, name)
        return make(self.head, np.float32(threshold)) if name in LEARNT else make(np.float32(threshold))

    def stopped(self, rule: ExitRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As the function `stopped`, for all batches: int [N, L] each."""
        found = [stopped(self.params, self.config, b["tokens"], rule, np.int32(self.max_steps)) for b in self.batches]
        answers, steps, checks = (np.concatenate([np.asarray(part[i]) for part in found]) for i in range(3))
        return answers, steps, checks

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N, L]."""
        return np.concatenate([b["labels"] for b in self.batches])

    @functools.cached_property
    def seen(self) -> list[Watched]:
        """Every batch, without exits."""
        return [watched(self.params, self.config, b["tokens"], self.max_steps) for b in self.batches]

    def point(self, name: str, threshold: float) -> dict[str, float]:
        """accuracy, steps (recurrences per answer) and mflop (forward, per token, with checks and heads)."""
        answers, steps, checks = self.stopped(self.rule(name, threshold))
        scored = self.labels != IGNORED
        mean = float(steps[scored].mean())
        spent = flops.cost(self.config, mean, self.labels.shape[1], float(checks[scored].mean())).flops_per_token
        if inner(name) in LEARNT:
            spent += mean * 2 * self.config.embed_dim
        return {"accuracy": float((answers == self.labels)[scored].mean()), "steps": mean, "mflop": spent / 1e6}

    def alone(self, name: str, threshold: float) -> dict[str, float]:
        """accuracy and steps if an exit changed nothing for later tokens."""
        found = [alone(self.rule(name, threshold), of) for of in self.seen]
        answers, steps = (np.concatenate([np.asarray(part[i]) for part in found]) for i in range(2))
        scored = self.labels != IGNORED
        return {"accuracy": float((answers == self.labels)[scored].mean()), "steps": float(steps[scored].mean())}

    def oracle(self) -> dict[str, float]:
        """Oracle: accuracy and steps when a token exits where its answer stays correct, or at 1 if it never does."""
        answers = np.concatenate([np.asarray(of.logits).argmax(-1) for of in self.seen], axis=1)
        wrong = (answers != self.labels)[:, self.labels != IGNORED]
        last_wrong = len(wrong) - np.argmax(wrong[::-1], axis=0)  # the deepest wrong answer, if there is one
        steps = np.where(wrong[-1] | ~wrong.any(0), 1, last_wrong + 1)
        return {"oracle accuracy": float(1 - wrong[-1].mean()), "oracle steps": float(steps.mean())}
