"""One parallel pass over L tokens in which every token stops on its own (contract, "Prefill, scoring").

Serves scoring (`forward` with an exit rule), prefill, chunked prefill, decoding (L = 1) and verification of drafts.
At recurrence i every unfinished token iterates; a query reads what each earlier token holds at that recurrence, and a
token that has stopped holds its last. When all have stopped, coda and head read every token's final state once more,
in parallel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.exits import ExitRule, Observation
from rdlm.model.attention import HIDDEN
from rdlm.model.blocks import Context
from rdlm.model.cache import Cache, Own, held_set, read_set, skip_bias, write_set, zeros
from rdlm.model.network import Layers, Params, coda, core_step, embed, head, inject
from rdlm.model.noise import noisy
from rdlm.recurrence import unroll_until


class Pass(NamedTuple):
    """What a pass leaves behind.

    logits f32 [B, L, V] (L = 1 when only the last position was asked for); latents, state [B, L, D] (after and before
    ln_f); steps int32 [B, L]; ran int32 scalar, the recurrence at which the last token stopped; own: keys and values to
    append to the cache; looks int32 [B, L], how often the rule read a token's logits.
    """

    logits: Array
    latents: Array
    state: Array
    steps: Array
    ran: Array
    own: Own
    looks: Array


class _Loop(NamedTuple):
    s: Array
    active: Array  # bool [B, L]: still iterating
    steps: Array  # int32 [B, L]
    looks: Array  # int32 [B, L]: looks at logits
    core: Any  # own core sets
    rule: Any  # rule state
    coda: Any  # own coda keys and values as of the last check
    fresh: Array  # bool [B, L]: `coda` belongs to the present state


def adaptive_pass(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "L"] | Int[Array, "B L"],
    ctx: Context,
    s0: Float[Array, "B L D"],
    valid: Bool[Array, "B L"],
    *,
    num_steps: Any,
    rule: ExitRule | None = None,
    min_steps: Any = 0,
    check_every: Any = 1,
    together: bool = False,
    policy: CachePolicy = CachePolicy(),
    cache: Cache | None = None,
    sets: int | None = None,
    last_only: bool = False,
    key: Key[Array, ""] | Key[Array, "B"] | None = None,
    resume: tuple[Int[Array, ""], Layers] | None = None,
) -> Pass:
    """Run the pass.

    Args:
      tokens, positions: the text.
      ctx: from `context`; its cached_bias shows the cached tokens.
      s0: states to begin with.
      valid: False for padding, which never iterates.
      num_steps: most recurrences: scalar, [B] or [B, L], at least 1.
      rule, min_steps, check_every: when to stop; scalars or [B].
      together: one decision per row: logit rules look at the last valid position, others average values over positions.
      policy, cache: what is read of earlier tokens; `cache` is only read.
      sets: sets of own keys and values to keep for a cache; None: as few as the pass itself needs.
      last_only: logits of each row's last valid position only.
      key: of the test-time noise.
      resume: (i, own core sets [S, B, L, .]) to go on where an earlier pass over the same tokens stopped: s0 are their
        states after i recurrences, and the sets below i are written.
    """
    B, L = tokens.shape
    most = _per_token(num_steps, tokens)
    min_steps, check_every = _per_token(min_steps, tokens), _per_token(check_every, tokens)
    if sets is None:
        # Reading a stopped token at its deepest set is all that "latest" without a limit asks for.
        sets = 1 if policy.recurrences is None else policy.recurrences
    last = jnp.maximum(valid.sum(-1) - 1, 0)  # [B]
    e, prelude = embed(params, config, tokens, ctx, None if cache is None else cache.prelude)
    injected = inject(params, config, e)
    dtype = e.dtype
    by_last = together and rule is not None and rule.needs_logits

    def at_last(x: Array) -> Array:
        return jnp.take_along_axis(x, last[:, None, None], axis=1)

    def read(s: Array, held: Any, update: Array | None, narrow: bool) -> tuple[Array, Array, Any]:
        (y, z), coda_kv = coda(params, config, s, ctx, None if cache is None else cache.coda, held, update)
        return head(params, config, at_last(y) if narrow else y), z, coda_kv

    def look(c: _Loop, i: Array, due: Array) -> _Loop:
        """Show the rule every token that is due; stop those that exit."""
        assert rule is not None  # nobody looks without one
        if not rule.gated:
            return evaluate(c, i, due)
        state, opened = rule.open_gate(c.rule, Observation(at_last(c.s) if by_last else c.s, None, i))
        c = c._replace(rule=shown_only(state, c.rule, due))
        wanted = due & opened
        return jax.lax.cond(jnp.any(wanted), lambda c: evaluate(c, i, wanted), lambda c: c, c)

    def evaluate(c: _Loop, i: Array, due: Array) -> _Loop:
        assert rule is not None
        logits, coda_kv, fresh, looks = None, c.coda, c.fresh, c.looks
        if rule.needs_logits:
            # Only rows with a token that is due: what a stopped token shows in the coda must not depend on other rows.
            asked = jnp.any(due, axis=1, keepdims=True)
            logits, _, coda_kv = read(c.s, c.coda, ~c.fresh & asked, by_last)
            fresh = c.fresh | asked
            looks = c.looks + due
        shown = Observation(at_last(c.s) if by_last else c.s, logits, i)
        state, value = exits.update(rule, c.rule, shown)
        if together and not by_last:
            value = jnp.where(valid, value, 0).sum(-1, keepdims=True) / valid.sum(-1, keepdims=True)
        stop = jnp.broadcast_to(exits.exits(rule, value), (B, L)) & due
        rule_state = shown_only(state, c.rule, due)
        return c._replace(rule=rule_state, active=c.active & ~stop, coda=coda_kv, fresh=fresh, looks=looks)

    def shown_only(new: Any, old: Any, due: Array) -> Any:
        return exits.seen_only(at_last(due[..., None])[..., 0] if by_last else due, new, old)

    def step(c: _Loop, i: Array) -> _Loop:
        mine = ctx
        if policy.lookup == "skip":
            assert mine.bias is not None  # the fused kernel serves training alone
            hide = jnp.where(c.active, 0.0, HIDDEN)[:, None]
            mine = mine._replace(bias=mine.bias + jnp.where(jnp.eye(L, dtype=bool), 0.0, hide))
            if cache is not None:
                assert mine.cached_bias is not None  # a cache comes with what it shows
                mine = mine._replace(cached_bias=mine.cached_bias + skip_bias(cache.depth, i))
        past = None if cache is None else read_set(cache.core, i % cache.sets)
        s = c.s if key is None else noisy(params, config, c.s, i, key, positions)
        s, own = core_step(params, config, s, injected, mine, past, held_set(c.core, i), c.active)
        c = c._replace(
            s=jnp.where(c.active[..., None], s, c.s),
            core=write_set(c.core, own, i),
            steps=c.steps + c.active,
            fresh=c.fresh & ~c.active,
        )
        if rule is not None:
            ran = i + 1
            due = c.active & exits.is_due(ran, min_steps, check_every)
            c = jax.lax.cond(jnp.any(due), lambda c: look(c, ran, due), lambda c: c, c)
        return c._replace(active=c.active & (c.steps < most))

    def shape(count: int, *lead: int) -> tuple:
        return tuple(zeros(config, (*lead, B, L), dtype) for _ in range(count))

    begin, core = (jnp.int32(0), shape(config.core_layers, sets)) if resume is None else resume
    start = _Loop(
        s=s0,
        active=valid & (begin < most),
        steps=jnp.where(valid, begin, 0),
        looks=jnp.zeros((B, L), jnp.int32),
        core=core,
        rule=() if rule is None else exits.init(rule, at_last(s0) if by_last else s0, config.rows),
        coda=shape(config.coda_layers) if rule is not None and rule.needs_logits else (),
        fresh=jnp.zeros((B, L), bool),
    )
    c, ran = unroll_until(step, lambda c, i: ~jnp.any(c.active), start, jnp.max(most), begin)
    logits, z, coda_kv = read(c.s, None, None, last_only)
    return Pass(logits, z, c.s, c.steps, ran, Own(prelude, c.core, coda_kv), c.looks)


def _per_token(value: Any, tokens: Array) -> Array:
    value = jnp.asarray(value, jnp.int32)
    return jnp.broadcast_to(value[:, None] if value.ndim == 1 else value, tokens.shape)
