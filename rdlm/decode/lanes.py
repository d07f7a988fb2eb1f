"""Lanes: a batch in which every row is at its own position and its own recurrence, sharing one core.

The core's weights are the same at every recurrence, so one tick advances all lanes by one recurrence at any
depth. A lane whose token has stopped is flushed soon: up to W such lanes pass through coda, sampling and the next
token's prelude together. A lane computes exactly what `generate` computes for its request, regardless of other lanes.

Keys and values lie in pages, each of one lane, which a table names in the order of positions; the host hands them out
(`rdlm.decode.pages`). What a lane writes where it has no page is dropped, and a lane that needs a page waits for it.

Branches return rows, which are then scattered into the cache in place; a branch that returned the cache would copy it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int, PyTree

from rdlm import exits
from rdlm.config import ModelConfig
from rdlm.decode.loop import Progress, Sizes, token_keys
from rdlm.decode.program import program
from rdlm.decode.requests import Request, WarmStart
from rdlm.decode.sampling import Likeliest, adjusted, choose, finite, likeliest, log_probability, no_likeliest, stops
from rdlm.exits import Observation
from rdlm.model import (
    Params,
    begin,
    coda,
    compute_dtype,
    context,
    core_step,
    embed,
    head,
    inject,
    known,
    noisy,
    with_values,
)
from rdlm.model.blocks import Context
from rdlm.model.cache import Cache, allocate, cached_bias, skip_bias, stored, write
from rdlm.model.kernels import after
from rdlm.model.network import Layers, gate_logit
from rdlm.recurrence import initial_state

RECENT = 128
"""Positions of which lanes remember the likeliest tokens; they are read before as many ticks have passed."""


class Lanes(NamedTuple):
    """State of B lanes. Shapes [B] unless noted. Every copy of the model has lanes, pages and counters of its own."""

    cache: Cache  # see `empty_lanes`; the present token's prelude and core entries lie just behind the finished ones
    pages: Array  # int32 [B, P], the pages of each lane in the order of positions; a number that is none: no page
    request: Request  # that each lane serves
    max_tokens: Array  # int32, new tokens that the request may have
    busy: Array  # bool, serves a request
    failed: Array  # bool, its request ended because the logits of its next token were not finite
    iterating: Array  # bool, its token still runs the core; a busy lane that does not is due for a flush
    s: Array  # [B, 1, state_dim], state of the present token
    injected: Array  # [B, 1, D], its injected input
    ran: Array  # int32, its recurrences so far
    rule: PyTree  # state of the exit rule
    tokens: Array  # int32 [B, N], output so far
    steps: Array  # int32 [B, N], recurrences of each
    log_probs: Array  # f32 [B, N], see `log_probability`
    likeliest: Likeliest  # [B, W, .], at the last W positions: that of token j is at j modulo W
    count: Array  # type: ignore[assignment]  # int32, how many; hides tuple.count, which nobody needs
    present: Array  # bool [B, V], tokens of prompt and output; V = vocab_size
    ticks: Array  # int32 [1], recurrences of all lanes together
    used: Array  # int32 [1], lanes that took part, summed over ticks
    flushes: Array  # int32 [1]
    since: Array  # int32 [1], ticks since the last flush

    @property
    def token(self) -> Array:
        """The present token, int32 [B]: the last of the output."""
        return jnp.take_along_axis(self.tokens, jnp.maximum(self.count - 1, 0)[:, None], axis=1)[:, 0]

    @property
    def page_sizes(self) -> PageSizes:
        """Of the cache."""
        return PageSizes(*self.cache.core[0].k.shape[1:3])

    @property
    def no_room(self) -> Array:
        """bool [B]: its request has another token after the next one, but the lane no page for it."""
        number, size = self.page_sizes
        room = (self.pages < number).sum(1) * size
        return (self.cache.length + 1 >= room) & (self.count + 1 < self.max_tokens)

    def place(self, lane: Int[Array, "*#tokens"], position: Int[Array, "*#tokens"]) -> tuple[Array, Array]:
        """(Page, position in it) of positions of lanes: beyond the last page where there is none, or no such lane."""
        number, size = self.page_sizes
        return self.pages.at[lane, position // size].get(mode="fill", fill_value=number), position % size


class PageSizes(NamedTuple):
    """Sizes of the pages of a cache."""

    number: int  # of pages, shared by all lanes
    size: int  # positions of each


class Flush(NamedTuple):
    """When stopped lanes are flushed."""

    width: int  # lanes that one flush takes
    every: int  # a flush takes fewer after this many ticks, or when no lane iterates


class _Entry(NamedTuple):
    """W tokens that begin."""

    position: Array  # int32 [W]
    s: Array  # [W, 1, state_dim]
    injected: Array  # [W, 1, D]
    rule: PyTree  # state of the exit rule
    prelude_kv: Layers  # [W, .] per layer


class _Exit(NamedTuple):
    """W tokens that ended, with what they leave in the cache."""

    core_kv: Layers  # [S, W, .] per layer
    coda_kv: Layers  # [W, .] per layer
    depth: Array  # int32 [W]
    token: Array  # int32 [W], the one chosen
    log_prob: Array  # f32 [W]
    likeliest: Likeliest  # [W, .]
    done: Array  # bool [W], whether it ends the request
    failed: Array  # bool [W], whether there is none, because logits were not finite


@program("config", "sizes", "pages")
def empty_lanes(params: Params, config: ModelConfig, request: Request, sizes: Sizes, pages: PageSizes) -> Lanes:
    """Idle lanes, one per row of `request`, where the parameters are, and `pages` for those of each copy of the model.

    Keys and values are [S, pages.number, pages.size, .] per core layer and without S per other layer. `length` [B] and
    `depth` [B, T] of the cache are those of lanes.
    """
    B, dtype = len(request.keys), compute_dtype(params, config)
    s, injected = (jnp.zeros((B, 1, width), dtype) for width in (config.state_dim, config.embed_dim))
    zero, no = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    rule = request.depth.rule
    table, counter = jnp.zeros((B, sizes.tokens), jnp.int32), jnp.zeros(1, jnp.int32)
    cache = allocate(config, sizes.policy, sizes.sets, *pages, dtype)
    return Lanes(
        cache=dataclasses.replace(cache, length=zero, depth=jnp.zeros((B, sizes.capacity), jnp.int32)),
        pages=jnp.full((B, -(-sizes.capacity // pages.size)), pages.number, jnp.int32),
        request=request,
        max_tokens=zero,
        busy=no,
        failed=no,
        iterating=no,
        s=s,
        injected=injected,
        ran=zero,
        rule=() if rule is None else exits.init(rule, s, config.vocab_size),
        tokens=table,
        steps=table,
        log_probs=table.astype(jnp.float32),
        likeliest=no_likeliest(B, min(sizes.tokens, RECENT)),
        count=zero,
        present=jnp.zeros((B, config.vocab_size), bool),
        ticks=counter,
        used=counter,
        flushes=counter,
        since=counter,
    )


@program("config", "flush", "warm_start", donate="lanes")
def advance(
    params: Params,
    config: ModelConfig,
    lanes: Lanes,
    told: Int[Array, "B"],
    max_ticks: Int[Array, ""],
    wake: Int[Array, ""],
    flush: Flush,
    warm_start: WarmStart,
) -> Lanes:
    """Tick until `max_ticks` have passed, `wake` requests have ended, a lane lacks a page or all are idle or wait.

    A lane whose request is constrained gets one token at most, and waits for the next call with the following one.

    told: tokens of each lane that the host knows; -1 to give up the lane's request.
    """
    busy = lanes.busy & (told >= 0)
    # An idle lane has no tokens: a CPU reads as much of the cache as the longest lane fills.
    cache = dataclasses.replace(lanes.cache, length=jnp.where(busy, lanes.cache.length, 0))
    lanes = lanes._replace(cache=cache, busy=busy, iterating=lanes.iterating & busy)
    start, serving = lanes.ticks, busy.sum()

    def waits(p: Lanes) -> Array:
        # What a constraint allows holds for one token; the host says it for the next one before the next call.
        return ((p.request.sampling.constrained & (p.count > told)) | p.no_room) & p.busy & ~p.iterating

    def unfinished(p: Lanes) -> Array:
        ended, lacking = serving - p.busy.sum(), p.busy & ~p.iterating & p.no_room
        return jnp.any(p.busy & ~waits(p)) & (p.ticks - start < max_ticks)[0] & (ended < wake) & ~jnp.any(lacking)

    def body(p: Lanes) -> Lanes:
        with jax.named_scope("lanes_tick"):  # scopes by which `rdlm.perf.hlo` finds the parts of the program
            p = _tick(params, config, p)
        ready = p.busy & ~p.iterating & ~waits(p)
        stopped = ready.sum()
        due = (stopped >= flush.width) | ((stopped > 0) & ((p.since[0] >= flush.every) | ~jnp.any(p.iterating)))

        def nothing(p: Lanes, ready: Array) -> tuple[Array, _Exit, _Entry]:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(flushed, p, ready))
            return jnp.full(flush.width, p.busy.size), *zeros[1:]

        flushed = functools.partial(_flush, params, config, width=flush.width, warm_start=warm_start)
        with jax.named_scope("lanes_flush"):
            left = lax.cond(due, flushed, nothing, p, ready)
        p = _apply(p, *left)
        return p._replace(flushes=p.flushes + due, since=jnp.where(due, 0, p.since))

    return lax.while_loop(unfinished, body, lanes)


def _tick(params: Params, config: ModelConfig, p: Lanes) -> Lanes:
    """One recurrence for every iterating lane, and a check of the exit rule for those that are due."""
    cache, B = p.cache, p.busy.size
    m = p.ran % cache.sets
    ctx = visible = _context(params, config, cache, p.token, cache.length)
    if cache.policy.lookup == "skip":
        visible = ctx.hiding(cached=skip_bias(cache.depth, p.ran[:, None]))
    s = p.s
    if config.test_time_noise:
        s = jax.vmap(lambda s, i, k, at: noisy(params, config, s[None], i, k[None], at[None, None])[0])(
            s, p.ran, p.request.keys, cache.length
        )
    s, new_kv = core_step(params, config, s, p.injected, visible, stored(cache.core, m, p.pages))
    page, at = p.place(jnp.where(after(s, p.iterating), jnp.arange(B), B), cache.length)
    core = jax.tree.map(lambda x, y: write(x, y[:, 0], page, at, m), cache.core, new_kv)
    p = p._replace(
        cache=dataclasses.replace(cache, core=core),
        s=jnp.where(p.iterating[:, None, None], s, p.s),
        ran=p.ran + p.iterating,
        ticks=p.ticks + 1,
        used=p.used + p.iterating.sum(),
        since=p.since + 1,
    )
    stop = p.ran >= p.request.depth.num_steps
    if p.request.depth.rule is not None:
        rule_state, exited = _check(params, config, p, ctx)
        p, stop = p._replace(rule=rule_state), stop | exited
    return p._replace(iterating=p.iterating & ~stop)


def _context(params: Params, config: ModelConfig, cache: Cache, token: Array, position: Array) -> Context:
    """One token per row, at `position`, that sees the tokens before it in the cache."""
    ctx = context(config, position[:, None], None, cached_bias(cache.capacity, position))
    return with_values(params, config, token[:, None], ctx._replace(rounded=cache.policy.dtype is not None))


def _check(params: Params, config: ModelConfig, p: Lanes, ctx: Context) -> tuple[PyTree, Array]:
    """(Rule state, bool [B] exits) after showing the rule every lane that is due."""
    rule = p.request.depth.rule
    assert rule is not None
    due = p.iterating & p.request.depth.due(p.ran)

    def evaluate(state: PyTree, due: Array) -> tuple[PyTree, Array]:
        logits = None
        if rule.needs_logits:
            (y, _), _ = coda(params, config, p.s, ctx, stored(p.cache.coda, pages=p.pages))
            logits = known(config, head(params, config, y))
        seen = Observation(p.s, logits, p.ran[:, None], gate_logit(params, config, p.s))
        new, value = exits.update(rule, state, seen)
        return exits.seen_only(due[:, None], new, state), exits.exits(rule, value)[:, 0] & due

    state, wanted = p.rule, due
    if rule.gated:
        new, opened = rule.open_gate(state, Observation(p.s, None, p.ran[:, None]))
        state, wanted = exits.seen_only(due[:, None], new, state), due & opened[:, 0]
    return lax.cond(jnp.any(wanted), evaluate, lambda state, due: (state, jnp.zeros_like(due)), state, wanted)


def _flush(
    params: Params, config: ModelConfig, p: Lanes, ready: Array, *, width: int, warm_start: WarmStart
) -> tuple[Array, _Exit, _Entry]:
    """Take up to `width` of the lanes that are ready through coda, sampling and the next prelude.

    Returns:
      lanes, ends, beginnings.
    """
    B = p.busy.size
    first = p.ticks[0] % B  # begin the search at another lane each time, so that none is starved
    lane = jnp.nonzero(jnp.roll(ready, -first), size=width, fill_value=B)[0].astype(jnp.int32)
    lane = jnp.where(lane < B, (lane + first) % B, B)
    row = jnp.minimum(lane, B - 1)
    position, ran, s = p.cache.length[row], p.ran[row], p.s[row]
    ctx = _context(params, config, p.cache, p.token[row], position)
    (y, z), coda_kv = coda(params, config, s, ctx, stored(p.cache.coda, pages=p.pages[row]))
    logits = known(config, head(params, config, y)[:, 0])
    request, count = jax.tree.map(lambda x: x[row], p.request), p.count[row]
    wanted = adjusted(logits, p.tokens[row], count, request.sampling)
    token = choose(wanted, p.present[row], request.sampling, token_keys(request, count))
    # Sets that the token never reached get a copy of its last.
    wrote = jnp.minimum(jnp.arange(p.cache.sets)[:, None], ran[None] - 1)
    number, size = p.page_sizes
    page, at = p.place(row, position)
    index = (wrote * number + jnp.minimum(page, number - 1)[None]) * size + at[None]
    core_kv = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[index], p.cache.core)
    failed = ~finite(logits)
    done = failed | stops(token, request.sampling) | (count + 1 >= p.max_tokens[row])
    coda_kv = jax.tree.map(lambda x: x[:, 0], coda_kv)
    top = likeliest(logits, request.likeliest)
    left = _Exit(core_kv, coda_kv, ran, token, log_probability(logits, token), top, done, failed)
    normed = z if config.loop.bridge else s
    warm = {"normalized": normed, "raw": s}.get(warm_start or "")
    return lane, left, _enter(params, config, p, row, request, token, position + 1, warm)


def _enter(
    params: Params,
    config: ModelConfig,
    p: Lanes,
    row: Array,
    request: Request,
    token: Array,
    position: Array,
    warm: Array | None,
) -> _Entry:
    """The next token [W] of the lanes `row`, at its position: prelude, injected input, initial state."""
    ctx = _context(params, config, p.cache, token, position)
    e, new_kv = embed(params, config, token[:, None], ctx, stored(p.cache.prelude, pages=p.pages[row]))
    s = begin(params, config, e) if warm is None else warm
    if warm is None and config.loop.start == "noise":
        scale = request.init_scale * config.start_scale
        s = initial_state(request.keys, position[:, None], config.state_dim, e.dtype, scale)
    rule = () if request.depth.rule is None else exits.init(request.depth.rule, s, config.vocab_size)
    prelude_kv = jax.tree.map(lambda x: x[:, 0], new_kv)
    return _Entry(position, s, inject(params, config, e), rule, prelude_kv)


def _apply(p: Lanes, lane: Array, left: _Exit, entry: _Entry) -> Lanes:
    """Write down the result of a flush. Rows of lane B, which does not exist, are dropped."""
    cache, row = p.cache, jnp.minimum(lane, p.busy.size - 1)
    length, count = cache.length[row], p.count[row]
    page, at = p.place(lane, length)
    cache = dataclasses.replace(
        cache,
        core=jax.tree.map(lambda x, y: write(x, y, page, at), cache.core, left.core_kv),
        coda=jax.tree.map(lambda x, y: write(x, y, page, at), cache.coda, left.coda_kv),
        depth=cache.depth.at[lane, length].set(left.depth, mode="drop"),
        length=cache.length.at[lane].add(1, mode="drop"),
    )
    made = jnp.where(left.failed, p.busy.size, lane)
    p = p._replace(
        cache=cache,
        tokens=p.tokens.at[made, count].set(left.token, mode="drop"),
        steps=p.steps.at[made, count].set(left.depth, mode="drop"),
        log_probs=p.log_probs.at[made, count].set(left.log_prob, mode="drop"),
        likeliest=_recent(p.likeliest, made, count, left.likeliest),
        count=p.count.at[made].add(1, mode="drop"),
        present=p.present.at[made, left.token].set(True, mode="drop"),
        busy=_put(p.busy, lane, ~left.done),
        failed=_put(p.failed, lane, left.failed),
    )
    return _begin(p, lane, entry)


def _recent(table: Likeliest, lane: Array, count: Array, new: Likeliest) -> Likeliest:
    """Write down the likeliest tokens beside token `count` of lanes."""
    return jax.tree.map(lambda x, y: x.at[lane, count % x.shape[1]].set(y, mode="drop"), table, new)


def _begin(p: Lanes, lane: Array, entry: _Entry) -> Lanes:
    """Put new tokens into their lanes."""
    page, at = p.place(lane, entry.position)
    prelude = jax.tree.map(lambda x, y: write(x, y, page, at), p.cache.prelude, entry.prelude_kv)
    return p._replace(
        cache=dataclasses.replace(p.cache, prelude=prelude),
        s=_put(p.s, lane, entry.s),
        injected=_put(p.injected, lane, entry.injected),
        rule=_put(p.rule, lane, entry.rule),
        ran=_put(p.ran, lane, jnp.zeros_like(lane)),
        iterating=_put(p.iterating, lane, jnp.ones_like(lane, bool)) & p.busy,
    )


def _put(target: PyTree, lane: Array, rows: PyTree) -> PyTree:
    """`target` [B, ...] with `rows` [W, ...] in place of those of `lane`; lane B drops a row."""
    return jax.tree.map(lambda x, y: x.at[lane].set(y, mode="drop"), target, rows)


@program("config", donate="lanes")
def insert(
    params: Params,
    config: ModelConfig,
    lanes: Lanes,
    progress: Progress,
    lengths: Int[Array, "W"],
    request: Request,
    max_tokens: Int[Array, "W"],
    lane: Int[Array, "W"],
) -> Lanes:
    """Put prefilled requests (rows of `progress`, from `rdlm.decode.loop.begin`) into lanes; lane B drops a row."""
    prompt, cache = progress.cache, lanes.cache
    columns = jnp.arange(prompt.capacity)[None]
    page, at = lanes.place(lane[:, None], columns)

    def put(target: PyTree, rows: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: write(x, y, page, at), target, rows)

    cache = dataclasses.replace(
        cache,
        prelude=put(cache.prelude, prompt.prelude),
        core=put(cache.core, prompt.core),
        coda=put(cache.coda, prompt.coda),
        depth=write(cache.depth[..., None], prompt.depth[..., None], lane[:, None], columns)[..., 0],
        length=_put(cache.length, lane, lengths),
    )
    lanes = lanes._replace(
        cache=cache,
        request=_put(lanes.request, lane, request),
        max_tokens=_put(lanes.max_tokens, lane, max_tokens),
        busy=_put(lanes.busy, lane, ~progress.done & (max_tokens > 1)),
        failed=_put(lanes.failed, lane, progress.failed),
        tokens=lanes.tokens.at[lane, 0].set(progress.tokens[:, 0], mode="drop"),
        steps=lanes.steps.at[lane, 0].set(progress.steps[:, 0], mode="drop"),
        log_probs=lanes.log_probs.at[lane, 0].set(progress.log_probs[:, 0], mode="drop"),
        likeliest=_recent(lanes.likeliest, lane, jnp.zeros_like(lane), progress.likeliest),
        count=_put(lanes.count, lane, progress.count),
        present=_put(lanes.present, lane, progress.present),
    )
    index = jnp.minimum(lane, lanes.busy.size - 1)
    entry = _enter(params, config, lanes, index, request, progress.token, lengths, progress.warm)
    return _begin(lanes, lane, entry)
