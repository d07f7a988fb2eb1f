"""Lanes: a batch in which every row is at its own position and its own recurrence, sharing one core (design, engine).

The core's weights are the same at every recurrence, so one tick advances all lanes by one recurrence, whatever their
depths. A lane whose token has stopped waits for a flush, which takes up to W such lanes through coda, sampling and the
next token's prelude. A lane computes exactly what `generate` computes for its request, whoever its neighbours are.

Nothing large passes through a branch: branches return rows, which are then scattered into the cache in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode.loop import Progress, WarmStart, token_keys
from rdlm.decode.requests import Request
from rdlm.decode.sampling import choose, known_only, stops
from rdlm.exits import Observation
from rdlm.model import Params, coda, context, core_step, embed, head, inject, noisy
from rdlm.model.cache import Cache, KeyValue, allocate, cached_bias, skip_bias, write
from rdlm.recurrence import initial_state

Rows = tuple[KeyValue, ...]


class Lanes(NamedTuple):
    """State of B lanes. Shapes [B] unless noted.

    cache: length counts finished tokens; the present one's prelude and core entries lie just behind them.
    request, most: what each lane serves, and its most new tokens. busy: serves a request at all. iterating: its
    token still runs the core; busy lanes that do not are waiting for a flush. s, injected [B, 1, D]: state and
    injected input of the present token. ran: its recurrences so far. rule: exit rule's state. tokens, steps [B, N]:
    output so far, count of it. present [B, V]: tokens seen. ticks, used: core iterations, and lanes that took part
    summed over them. flushes: so far. since: ticks since the last one.
    """

    cache: Cache
    request: Request
    most: Array
    busy: Array
    iterating: Array
    s: Array
    injected: Array
    ran: Array
    rule: Any
    tokens: Array
    steps: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    present: Array
    ticks: Array
    used: Array
    flushes: Array
    since: Array


class _Entry(NamedTuple):
    """A token that begins: position [W], state and injected input [W, 1, D], rule state, prelude rows [W, .]."""

    position: Array
    s: Array
    injected: Array
    rule: Any
    prelude: Rows


class _Exit(NamedTuple):
    """A token that ended: what it leaves in the cache (core [S, W, .], coda [W, .]) and what it said."""

    core: Rows
    coda: Rows
    depth: Array
    token: Array
    done: Array


def empty_lanes(
    config: ModelConfig, request: Request, policy: CachePolicy, sets: int, capacity: int, room: int, dtype: Any
) -> Lanes:
    """Idle lanes, as many as `request` has rows, of `capacity` positions and `room` new tokens each."""
    B, D = request.num_steps.shape[0], config.embed_dim
    s, zero, no = jnp.zeros((B, 1, D), dtype), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    rule = () if request.rule is None else exits.init(request.rule, s, config.rows)
    table, scalar = jnp.zeros((B, room), jnp.int32), jnp.int32(0)
    lanes = Lanes(
        cache=allocate(config, policy, sets, B, capacity, dtype), request=request, most=zero, busy=no, iterating=no,
        s=s, injected=s, ran=zero, rule=rule, tokens=table, steps=table, count=zero,
        present=jnp.zeros((B, config.rows), bool), ticks=scalar, used=scalar, flushes=scalar, since=scalar,
    )  # fmt: skip
    return jax.tree.map(jnp.copy, lanes)  # donated later, so no two may share a buffer


@functools.partial(jax.jit, static_argnames=("config", "width", "every", "warm_start"), donate_argnames="lanes")
def advance(
    params: Params,
    config: ModelConfig,
    lanes: Lanes,
    alive: Bool[Array, "B"],
    most_ticks: Int[Array, ""],
    wake: Int[Array, ""],
    *,
    width: int,
    every: int,
    warm_start: WarmStart,
) -> Lanes:
    """Tick until `most_ticks` have passed, `wake` requests have ended or every lane is idle.

    alive: False to give up the lane's request. width, every: a flush takes `width` waiting lanes; fewer only
    after `every` ticks, or when nobody iterates.
    """
    lanes = lanes._replace(busy=lanes.busy & alive, iterating=lanes.iterating & alive)
    start, serving = lanes.ticks, lanes.busy.sum()

    def go_on(p: Lanes) -> Array:
        return jnp.any(p.busy) & (p.ticks - start < most_ticks) & (serving - p.busy.sum() < wake)

    def body(p: Lanes) -> Lanes:
        p = _tick(params, config, p)
        waiting = (p.busy & ~p.iterating).sum()
        due = (waiting >= width) | ((waiting > 0) & ((p.since >= every) | ~jnp.any(p.iterating)))
        flush = functools.partial(_flush, params, config, width=width, warm_start=warm_start)
        nothing = jax.eval_shape(flush, p)
        lane, left, entry = lax.cond(due, flush, lambda p: (jnp.full(width, p.busy.size), *_zeros(nothing[1:])), p)
        p = _apply(p, lane, left, entry)
        return p._replace(flushes=p.flushes + due, since=jnp.where(due, 0, p.since))

    return lax.while_loop(go_on, body, lanes)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _tick(params, config: ModelConfig, p: Lanes) -> Lanes:
    """One recurrence for every iterating lane, and a look of the exit rule at those that are due."""
    cache, lane = p.cache, jnp.arange(p.busy.size)
    m = p.ran % cache.sets
    ctx = context(config, cache.length[:, None], None, cached_bias(cache.capacity, cache.length))
    mine = ctx
    if cache.policy.lookup == "skip":
        assert ctx.cached_bias is not None
        mine = ctx._replace(cached_bias=ctx.cached_bias + skip_bias(cache.depth, p.ran[:, None]))
    past = jax.tree.map(lambda x: x[0] if cache.sets == 1 else _windows(x, m, lane), cache.core)
    s = p.s
    if config.test_time_noise:
        s = jax.vmap(lambda s, i, k, at: noisy(params, config, s[None], i, k[None], at[None, None])[0])(
            s, p.ran, p.request.keys, cache.length
        )
    s, own = core_step(params, config, s, p.injected, mine, past)
    # Where to write depends on the new state, in name only: so the write comes after all reading. Left unordered, the
    # CPU's compiler copies the whole cache at every tick to be safe (and removes barriers before it looks).
    writes = p.iterating & jnp.isfinite(s[:, 0, 0])
    at = jnp.where(writes, cache.length, cache.capacity)  # beyond the end: dropped
    core = jax.tree.map(lambda x, y: write(x, y[:, 0], lane, at, m), cache.core, own)
    p = p._replace(
        cache=dataclasses.replace(cache, core=core),
        s=jnp.where(p.iterating[:, None, None], s, p.s),
        ran=p.ran + p.iterating,
        ticks=p.ticks + 1,
        used=p.used + p.iterating.sum(),
        since=p.since + 1,
    )
    stop = p.ran >= p.request.num_steps
    if p.request.rule is not None:
        rule_state, exited = _look(params, config, p, ctx)
        p, stop = p._replace(rule=rule_state), stop | exited
    return p._replace(iterating=p.iterating & ~stop)


def _windows(x: Array, m: Array, lane: Array) -> Array:
    """Set m [B] of every lane: [S, B, T, F] -> [B, T, F]."""
    return x.reshape(-1, *x.shape[2:])[m * lane.size + lane]


def _look(params, config: ModelConfig, p: Lanes, ctx) -> tuple[Any, Array]:
    """(rule state, bool [B] exits) after showing the rule every lane that is due."""
    rule = p.request.rule
    assert rule is not None
    due = p.iterating & exits.is_due(p.ran, p.request.min_steps, p.request.check_every)

    def evaluate(state: Any, due: Array) -> tuple[Any, Array]:
        logits = None
        if rule.needs_logits:
            (y, _), _ = coda(params, config, p.s, ctx, p.cache.coda)
            logits = head(params, config, y)
        new, value = exits.update(rule, state, Observation(p.s, logits, p.ran[:, None]))
        return exits.seen_only(due[:, None], new, state), exits.exits(rule, value)[:, 0] & due

    state, wanted = p.rule, due
    if rule.gated:
        new, opened = rule.open_gate(state, Observation(p.s, None, p.ran[:, None]))
        state, wanted = exits.seen_only(due[:, None], new, state), due & opened[:, 0]
    return lax.cond(jnp.any(wanted), evaluate, lambda state, due: (state, jnp.zeros_like(due)), state, wanted)


def _flush(params, config: ModelConfig, p: Lanes, *, width: int, warm_start) -> tuple[Array, _Exit, _Entry]:
    """Take up to `width` waiting lanes through coda, sampling and the next token's prelude."""
    B = p.busy.size
    first = p.ticks % B  # start looking at another lane each time, so that none waits for ever
    lane = jnp.nonzero(jnp.roll(p.busy & ~p.iterating, -first), size=width, fill_value=B)[0].astype(jnp.int32)
    lane = jnp.where(lane < B, (lane + first) % B, B)
    row = jnp.minimum(lane, B - 1)
    position, ran, s = p.cache.length[row], p.ran[row], p.s[row]
    ctx = context(config, position[:, None], None, cached_bias(p.cache.capacity, position))
    (y, z), coda_kv = coda(params, config, s, ctx, jax.tree.map(lambda x: x[row], p.cache.coda))
    logits = known_only(head(params, config, y)[:, 0], config.vocab_size)
    request, count = jax.tree.map(lambda x: x[row], p.request), p.count[row]
    token = choose(logits, p.present[row], request.sampling, token_keys(request, count))
    # Sets that the token never reached hold what it wrote last.
    wrote = jnp.minimum(jnp.arange(p.cache.sets)[:, None], ran[None] - 1)
    index = (wrote * B + row[None]) * p.cache.capacity + position[None]
    core = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[index], p.cache.core)
    done = stops(token, request.sampling) | (count + 1 >= p.most[row])
    left = _Exit(core, jax.tree.map(lambda x: x[:, 0], coda_kv), ran, token, done)
    warm = {"normalized": z, "raw": s}.get(warm_start)
    return lane, left, _enter(params, config, p.cache, row, request, token, position + 1, warm)


def _enter(params, config: ModelConfig, cache: Cache, row, request: Request, token, position, warm) -> _Entry:
    """The next token [W] of the lanes `row`, at its position: prelude, injected input, initial state."""
    ctx = context(config, position[:, None], None, cached_bias(cache.capacity, position))
    e, own = embed(params, config, token[:, None], ctx, jax.tree.map(lambda x: x[row], cache.prelude))
    s = warm
    if s is None:
        s = initial_state(request.keys, position[:, None], config.embed_dim, e.dtype, request.init_scale)
    rule = () if request.rule is None else exits.init(request.rule, s, config.rows)
    own = jax.tree.map(lambda x: x[:, 0], own)
    return _Entry(position, s, inject(params, config, e), rule, own)


def _apply(p: Lanes, lane: Array, left: _Exit, entry: _Entry) -> Lanes:
    """Write down what a flush found. Lane B is nobody's: its rows are dropped."""
    cache, row = p.cache, jnp.minimum(lane, p.busy.size - 1)
    at, count = cache.length[row], p.count[row]
    cache = dataclasses.replace(
        cache,
        core=jax.tree.map(lambda x, y: write(x, y, lane, at), cache.core, left.core),
        coda=jax.tree.map(lambda x, y: write(x, y, lane, at), cache.coda, left.coda),
        depth=cache.depth.at[lane, at].set(left.depth, mode="drop"),
        length=cache.length.at[lane].add(1, mode="drop"),
    )
    p = p._replace(
        cache=cache,
        tokens=p.tokens.at[lane, count].set(left.token, mode="drop"),
        steps=p.steps.at[lane, count].set(left.depth, mode="drop"),
        count=p.count.at[lane].add(1, mode="drop"),
        present=p.present.at[lane, left.token].set(True, mode="drop"),
        busy=_put(p.busy, lane, ~left.done),
    )
    return _begin(p, lane, entry)


def _begin(p: Lanes, lane: Array, entry: _Entry) -> Lanes:
    """Put new tokens into their lanes."""
    prelude = jax.tree.map(lambda x, y: write(x, y, lane, entry.position), p.cache.prelude, entry.prelude)
    return p._replace(
        cache=dataclasses.replace(p.cache, prelude=prelude),
        s=_put(p.s, lane, entry.s),
        injected=_put(p.injected, lane, entry.injected),
        rule=_put(p.rule, lane, entry.rule),
        ran=_put(p.ran, lane, jnp.zeros_like(lane)),
        iterating=_put(p.iterating, lane, jnp.ones_like(lane, bool)) & p.busy,
    )


def _put(target: Any, lane: Array, rows: Any) -> Any:
    """`target` [B, ...] with `rows` [W, ...] in place of those of `lane`; lane B drops a row."""
    return jax.tree.map(lambda x, y: x.at[lane].set(y, mode="drop"), target, rows)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="lanes")
def insert(
    params: Params,
    config: ModelConfig,
    lanes: Lanes,
    progress: Progress,
    lengths: Int[Array, "W"],
    request: Request,
    most: Int[Array, "W"],
    lane: Int[Array, "W"],
) -> Lanes:
    """Put prefilled requests (rows of `progress`, from `rdlm.decode.loop.begin`) into lanes; lane B drops a row."""
    held, cache = progress.cache, lanes.cache
    columns = jnp.arange(held.capacity)[None]

    def put(target: Any, rows: Any) -> Any:
        return jax.tree.map(lambda x, y: write(x, y, lane[:, None], columns), target, rows)

    cache = dataclasses.replace(
        cache,
        prelude=put(cache.prelude, held.prelude),
        core=put(cache.core, held.core),
        coda=put(cache.coda, held.coda),
        depth=put(cache.depth[..., None], held.depth[..., None])[..., 0],
        length=_put(cache.length, lane, lengths),
    )
    lanes = lanes._replace(
        cache=cache,
        request=_put(lanes.request, lane, request),
        most=_put(lanes.most, lane, most),
        busy=_put(lanes.busy, lane, ~progress.done & (most > 1)),
        tokens=lanes.tokens.at[lane, 0].set(progress.tokens[:, 0], mode="drop"),
        steps=lanes.steps.at[lane, 0].set(progress.steps[:, 0], mode="drop"),
        count=_put(lanes.count, lane, jnp.ones_like(most)),
        present=_put(lanes.present, lane, progress.present),
    )
    index = jnp.minimum(lane, lanes.busy.size - 1)
    entry = _enter(params, config, cache, index, request, progress.token, lengths, progress.warm)
    return _begin(lanes, lane, entry)
