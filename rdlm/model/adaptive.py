"""One parallel pass over L tokens in which every token stops on its own (docs/semantics.md, Prefill and exactness).

Serves scoring (`forward` with an exit rule), prefill, decoding (L = 1) and verification of drafts. At recurrence i
every active token runs the core; a query reads the keys and values that each earlier token has at that recurrence, and
a stopped token keeps its last. When all have stopped, coda and head read every token's final state, in parallel.

A prompt may also be read in several passes, one chunk of tokens each, and nothing changes if the cache keeps what its
tokens had at every recurrence: all core sets, and for rules that read logits `Cache.coda_sets`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from rdlm import exits
from rdlm.config import ModelConfig
from rdlm.exits import Depth, ExitRule, Observation
from rdlm.model.attention import HIDDEN
from rdlm.model.cache import Cache, NewKV, frozen_set, skip_bias, stored, stored_dtype, write_set, zeros
from rdlm.model.inputs import Start, Text
from rdlm.model.kernels import Stored
from rdlm.model.network import (
    Layers,
    Params,
    begin,
    coda,
    core_step,
    embed,
    gate_logit,
    head,
    inject,
    known,
    with_values,
)
from rdlm.model.noise import noisy
from rdlm.recurrence import unroll_until


class Pass(NamedTuple):
    """The result of a pass."""

    logits: Array  # f32 [B, L, V], or [B, 1, V] of each row's last valid position
    latents: Array  # [B, L, D], what the coda reads
    state: Array  # [B, L, D], after the last recurrence
    steps: Array  # int32 [B, L], recurrences each token ran
    ran: Array  # int32 scalar, the recurrence at which the last token stopped
    new_kv: NewKV  # to append to the cache
    checks: Array  # int32 [B, L], how often the rule read a token's logits


class _Carry(NamedTuple):
    """What a recurrence changes."""

    s: Array  # [B, L, D]
    active: Array  # bool [B, L], still running
    steps: Array  # int32 [B, L]
    checks: Array  # int32 [B, L]
    core_kv: Layers  # [S, B, L, .] per core layer
    rule: PyTree  # state of the exit rule
    coda_kv: Layers  # [B, L, .] per coda layer, as of the last check
    fresh: Array  # bool [B, L], whether `coda_kv` belongs to the present state
    coda_sets: Layers  # [S, B, L, .] per coda layer, `coda_kv` after every recurrence, if the cache keeps them


def adaptive_pass(
    params: Params,
    config: ModelConfig,
    text: Text,
    start: Start,
    depth: Depth,
    cache: Cache,
    together: bool = False,
    last_only: bool = False,
) -> Pass:
    """Run the pass.

    Args:
      params, config: the model.
      text: padding never runs. With `text.context.cached_bias` its tokens see those in the cache.
      start: initial states, or where an earlier pass over the same tokens stopped.
      depth: when tokens stop.
      cache: policy, number of core sets, and earlier tokens, which are only read.
      together: one decision per row: logit rules check the last valid position, others average values over positions.
      last_only: logits of each row's last valid position only.
    """
    depth = depth.per_token(text.tokens.shape)
    text = text._replace(context=with_values(params, config, text.tokens, text.context))
    e, prelude_kv = embed(params, config, text.tokens, text.context, _if_cached(text, stored(cache.prelude)))
    start = start._replace(s=begin(params, config, e)) if start.s is None else start
    loop = _Loop(params, config, text, depth, cache, together, inject(params, config, e), start.key)
    c, ran = unroll_until(loop.step, _all_stopped, loop.begin(start), jnp.max(depth.num_steps), start.ran)
    (y, z), coda_kv = loop.coda(c.s, stored(cache.coda))
    logits = head(params, config, loop.at_last(y) if last_only else y)
    return Pass(logits, z, c.s, c.steps, ran, NewKV(prelude_kv, c.core_kv, coda_kv, c.coda_sets), c.checks)


def _all_stopped(c: _Carry, i: Array) -> Array:
    return ~jnp.any(c.active)


def _if_cached(text: Text, layers: tuple[Stored, ...]) -> tuple[Stored, ...] | None:
    return None if text.context.cached_bias is None else layers


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What stays the same in all recurrences of a pass, and one recurrence."""

    params: Params
    config: ModelConfig
    text: Text
    depth: Depth  # per token
    cache: Cache
    together: bool
    injected: Array  # [B, L, D]
    key: Array | None

    @property
    def rule(self) -> ExitRule:
        """The rule, in functions that run only if there is one."""
        assert self.depth.rule is not None
        return self.depth.rule

    @property
    def by_last(self) -> bool:
        """Whether the rule sees only each row's last position."""
        return self.together and self.rule.needs_logits

    def begin(self, start: Start) -> _Carry:
        """The carry before the first recurrence."""
        config, rule, shape = self.config, self.depth.rule, self.text.tokens.shape
        dtype = stored_dtype(self.cache.policy, self.injected.dtype)
        ran, core_kv = jnp.int32(start.ran), start.core_kv
        assert start.s is not None
        coda_kv: Layers = ()
        coda_sets: Layers = ()
        rule_state: PyTree = ()
        if not core_kv:
            core_kv = tuple(zeros(config, (self.cache.sets, *shape), dtype) for _ in range(config.core_calls))
        if rule is not None:
            rule_state = exits.init(rule, self.observed(start.s), config.vocab_size)
        if rule is not None and rule.needs_logits:
            coda_kv = tuple(zeros(config, shape, dtype) for _ in range(config.coda_layers))
        if self.cache.coda_sets:
            coda_sets = tuple(zeros(config, (self.cache.sets, *shape), dtype) for _ in range(config.coda_layers))
        return _Carry(
            s=start.s,
            active=self.text.valid & (ran < self.depth.num_steps),
            steps=jnp.where(self.text.valid, ran, 0),
            checks=jnp.zeros(shape, jnp.int32),
            core_kv=core_kv,
            rule=rule_state,
            coda_kv=coda_kv,
            fresh=jnp.zeros(shape, bool),
            coda_sets=coda_sets,
        )

    def step(self, c: _Carry, i: Array) -> _Carry:
        """Recurrence i: the core for all active tokens, then the rule for those that are due."""
        s = c.s
        if self.key is not None:
            s = noisy(self.params, self.config, s, i, self.key, self.text.positions)
        text = self.text if self.cache.policy.lookup == "latest" else self.hide(c.active, i)
        cached_kv = _if_cached(text, stored(self.cache.core, i % self.cache.sets))
        frozen_kv = frozen_set(c.core_kv, i)
        s, new_kv = core_step(self.params, self.config, s, self.injected, text.context, cached_kv, frozen_kv, c.active)
        c = c._replace(
            s=jnp.where(c.active[..., None], s, c.s),
            core_kv=write_set(c.core_kv, new_kv, i),
            steps=c.steps + c.active,
            fresh=c.fresh & ~c.active,
        )
        if self.depth.rule is not None:
            due = c.active & self.depth.due(i + 1)
            c = jax.lax.cond(jnp.any(due), lambda c: self.check(c, i + 1, due), lambda c: c, c)
        if c.coda_sets:
            c = c._replace(coda_sets=write_set(c.coda_sets, c.coda_kv, i))
        return c._replace(active=c.active & (c.steps < self.depth.num_steps))

    def hide(self, active: Array, i: Array) -> Text:
        """The text with tokens hidden that do not run recurrence i (lookup "skip")."""
        context = self.text.context
        assert context.bias is not None  # the fused kernel serves training alone
        others = jnp.where(jnp.eye(active.shape[1], dtype=bool), 0.0, jnp.where(active, 0.0, HIDDEN)[:, None])
        cached = None if context.cached_bias is None else skip_bias(self.cache.depth, i)
        return self.text._replace(context=context.hiding(others, cached))

    def check(self, c: _Carry, ran: Array, due: Array) -> _Carry:
        """Show the rule every token that is due; stop those that exit."""
        if not self.rule.gated:
            return self.evaluate(c, ran, due)
        state, opened = self.rule.open_gate(c.rule, Observation(self.observed(c.s), None, ran))
        c = c._replace(rule=self.seen_only(due, state, c.rule))
        opened = due & opened
        # A later chunk may open the gate at a recurrence where nothing does here, and then reads the coda of these.
        wanted = due if self.cache.coda_sets else opened
        return jax.lax.cond(jnp.any(wanted), lambda c: self.evaluate(c, ran, opened), lambda c: c, c)

    def evaluate(self, c: _Carry, ran: Array, due: Array) -> _Carry:
        """The same without a gate."""
        logits = None
        if self.rule.needs_logits:
            # Only rows with a token that is due: the coda keys of a stopped token must not depend on other rows.
            row = jnp.any(due, axis=1, keepdims=True)
            cached_kv = stored(self.cache.coda)
            if self.cache.coda_sets:
                row, cached_kv = jnp.ones_like(row), stored(self.cache.coda_sets, ran - 1)
            (y, _), coda_kv = self.coda(c.s, cached_kv, c.coda_kv, ~c.fresh & row)
            logits = known(self.config, head(self.params, self.config, self.at_last(y) if self.by_last else y))
            c = c._replace(coda_kv=coda_kv, fresh=c.fresh | row, checks=c.checks + due)
        s = self.observed(c.s)
        seen = Observation(s, logits, ran, gate_logit(self.params, self.config, s))
        state, value = exits.update(self.rule, c.rule, seen)
        if self.together and not self.by_last:
            valid = self.text.valid
            value = jnp.where(valid, value, 0).sum(-1, keepdims=True) / valid.sum(-1, keepdims=True)
        stop = jnp.broadcast_to(exits.exits(self.rule, value), due.shape) & due
        return c._replace(rule=self.seen_only(due, state, c.rule), active=c.active & ~stop)

    def coda(
        self, s: Array, cached_kv: tuple[Stored, ...], frozen_kv: Layers | None = None, update: Array | None = None
    ) -> tuple[tuple[Array, Array], Layers]:
        """((y, latents), coda keys and values) of states; where `update` is False they are those of `frozen_kv`."""
        past = _if_cached(self.text, cached_kv)
        return coda(self.params, self.config, s, self.text.context, past, frozen_kv, update)

    def at_last(self, x: Array) -> Array:
        """[B, 1, .]: x [B, L, .] at each row's last valid position."""
        last = jnp.maximum(self.text.valid.sum(-1) - 1, 0)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)

    def observed(self, s: Array) -> Array:
        """The states that the rule sees."""
        return self.at_last(s) if self.by_last else s

    def seen_only(self, due: Array, new: PyTree, old: PyTree) -> PyTree:
        """The rule's state: `new` for the tokens that were due, `old` for the others."""
        return exits.seen_only(self.at_last(due[..., None])[..., 0] if self.by_last else due, new, old)
