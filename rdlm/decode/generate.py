"""generate: prompts in, tokens out, every token with as many recurrences as it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rdlm.cache import Cache, allocate
from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling
from rdlm.decode.passes import PREFILL_EXITS, next_power, run_pass
from rdlm.decode.sampling import SamplingArrays, as_arrays, choose, per_row, stops
from rdlm.exits import ExitRule
from rdlm.model import Params, check_depth, compute_dtype, typed_key

_STREAM = 0x746F6B65  # keeps the randomness of tokens apart from that of states


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: np.int32 [n] per prompt, the stop token included. steps: np.int32 [n], recurrences of the pass whose logits
    gave each token. prompt_steps: np.int32 per prompt position. core_passes: sequential core iterations spent.
    """

    tokens: list[np.ndarray]
    steps: list[np.ndarray]
    prompt_steps: list[np.ndarray]
    core_passes: int


class Request(NamedTuple):
    """What a batch of prompts asks for, as arrays: no value recompiles. Shapes [B] unless noted."""

    num_steps: Array
    min_steps: Array
    check_every: Array  # scalar
    init_scale: Array  # scalar
    keys: Array
    sampling: SamplingArrays
    rule: ExitRule | None


class Progress(NamedTuple):
    """State of the token loop.

    token [B]: last chosen, not yet processed. warm [B, 1, D]: state it starts from, if any. tokens, steps [B, N]: made
    so far. count [B]: how many. done [B]. present [B, V]: tokens seen. passes: core iterations so far.
    """

    cache: Cache
    token: Array
    warm: Array | None
    tokens: Array
    steps: Array
    count: Array
    done: Array
    present: Array
    passes: Array


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_steps: Any = None,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Any = 0,
    check_every: int = 1,
    cache: CachePolicy = CachePolicy(),
    sampling: Sampling = Sampling(),
    warm_start: Literal[False, "normalized", "raw"] = False,
    speculative: Any = None,
    init_scale: float = 1.0,
    key: Array | None = None,
    on_token: Callable[[int, int, int], None] | None = None,
) -> Generation:
    """Continue prompts of any lengths (contract, "Generate"). A request's tokens and steps do not depend on its batch.

    One program is compiled per (batch size, length bucket, kind of rule), none per value.

    Args:
      params, config: the model.
      prompts: 1-D integer sequences.
      max_new_tokens: most tokens to make per prompt.
      num_steps: recurrences per token (the most of them, with an exit rule): None = config.mean_recurrence, a number,
        or one per prompt.
      exit_rule: lets every token stop on its own; thresholds may be one per prompt.
      prefill_exit: "per_token" (each prompt token on its own), "together" (one exit per prompt, as the reference) or
        "never".
      min_steps, check_every: the rule is asked after min_steps + 1 recurrences, then every check_every.
      cache: which keys and values are kept and read.
      sampling: how tokens are chosen; default greedy.
      warm_start: start a new token's state from its predecessor's last one, after ln_f ("normalized", as the
        reference's plain decoding) or before ("raw", as its adaptive decoding).
      speculative: None, or Speculative(draft_steps, lookahead, threshold).
      init_scale: scale of the initial state; 0.0 is the zero state.
      key: one key for all prompts (equal prompts, equal samples) or one per prompt.
      on_token: called with (prompt index, token, recurrences) as tokens are made.

    Raises:
      InputError (a ValueError): empty prompts, ids out of range, too long, a depth below 1, sampling without a key.
    """
    request, tokens, lengths = _check(
        config, prompts, max_new_tokens, num_steps, exit_rule, prefill_exit, min_steps, check_every, sampling,
        warm_start, init_scale, key,
    )  # fmt: skip
    if speculative is not None:
        raise InputError("speculative: not available yet")
    B = len(prompts)
    room = next_power(max_new_tokens, 16)
    capacity = min(next_power(max(lengths) + max_new_tokens, 64), config.max_length)
    sets = cache.sets(next_power(int(np.max(request.num_steps))))
    progress, prompt_steps = _begin(
        params, config, jnp.asarray(tokens), jnp.asarray(lengths), request, cache, sets, capacity, room,
        prefill_exit, warm_start,
    )  # fmt: skip
    shown = 0
    while True:
        limit = min(shown + 1, max_new_tokens) if on_token else max_new_tokens
        progress = _continue(params, config, progress, request, jnp.int32(limit), jnp.int32(max_new_tokens), warm_start)
        if on_token is None:
            break
        made, now, depth = (np.asarray(x) for x in (progress.count, progress.tokens, progress.steps))
        for b in range(B):
            if made[b] > shown:
                on_token(b, int(now[b, shown]), int(depth[b, shown]))
        shown += 1
        if shown >= max_new_tokens or bool(np.all(progress.done)):
            break
    made, now, depth, prompt_depth = (
        np.asarray(x) for x in (progress.count, progress.tokens, progress.steps, prompt_steps)
    )
    return Generation(
        [now[b, : made[b]] for b in range(B)],
        [depth[b, : made[b]] for b in range(B)],
        [prompt_depth[b, : lengths[b]] for b in range(B)],
        int(progress.passes),
    )


def _check(
    config, prompts, max_new_tokens, num_steps, rule, prefill_exit, min_steps, check_every, sampling, warm_start,
    init_scale, key,
):  # fmt: skip
    """Refuse what cannot be served, one line per request; spread the rest over rows."""
    if len(prompts) == 0:
        raise InputError("prompts: at least one is needed")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    rows = [np.asarray(p) for p in prompts]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise InputError(f"prompts[{i}]: must be a non-empty 1-D sequence of token ids, got shape {row.shape}")
        if not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompts[{i}]: token ids must be integers, got {row.dtype}")
        if row.min() < 0 or row.max() >= config.rows:
            raise InputError(f"prompts[{i}]: ids must be in [0, {config.rows}), found {row.min()} .. {row.max()}")
        if row.size + max_new_tokens > config.max_length:
            raise InputError(
                f"prompts[{i}]: {row.size} tokens + max_new_tokens = {max_new_tokens} exceed "
                f"config.max_length = {config.max_length}"
            )
    if prefill_exit not in PREFILL_EXITS:
        raise InputError(f"prefill_exit = {prefill_exit!r}: must be one of {', '.join(PREFILL_EXITS)}")
    if warm_start not in (False, "normalized", "raw"):
        raise InputError(f"warm_start = {warm_start!r}: must be False, 'normalized' or 'raw'")
    if rule is not None and not isinstance(rule, ExitRule):
        raise InputError(f"exit_rule = {rule!r}: must be a rule from rdlm.exits")
    if check_every < 1:
        raise InputError(f"check_every = {check_every}: must be at least 1")
    B = len(rows)
    depth = per_row(config.mean_recurrence if num_steps is None else num_steps, B, "num_steps", np.int32)
    check_depth(depth)
    least = per_row(min_steps, B, "min_steps", np.int32)
    if np.any(least < 0):
        raise InputError(f"min_steps = {min_steps!r}: must not be negative")
    arrays = as_arrays(sampling, B)
    if key is None and np.any(np.asarray(arrays.temperature) > 0):
        raise InputError("Sampling.temperature > 0 needs key=jax.random.key(seed)")
    keys = typed_key(key)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != B):
        raise InputError(f"key: expected one key or {B}, got shape {keys.shape}")
    if rule is not None and np.ndim(rule.threshold) == 0:
        rule = dataclasses.replace(rule, threshold=np.float32(rule.threshold))
    request = Request(
        jnp.asarray(depth), jnp.asarray(least), jnp.int32(check_every), jnp.float32(init_scale),
        jnp.broadcast_to(keys, (B,)), arrays, rule,
    )  # fmt: skip
    lengths = [row.size for row in rows]
    width = min(next_power(max(lengths), 16), config.max_length)
    tokens = np.zeros((B, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return request, tokens, lengths


def _first(x: Array) -> Array:
    return x[:, 0]


@functools.partial(
    jax.jit, static_argnames=("config", "policy", "sets", "capacity", "room", "prefill_exit", "warm_start")
)
def _begin(params, config, tokens, lengths, request, policy, sets, capacity, room, prefill_exit, warm_start):
    """Prefill, and choose the first token."""
    B, L = tokens.shape
    empty = allocate(config, policy, sets, B, capacity, compute_dtype(params, config))
    done, cache = run_pass(
        params, config, empty, tokens, lengths, first=True, key=request.keys, init_scale=request.init_scale,
        num_steps=request.num_steps, rule=None if prefill_exit == "never" else request.rule,
        min_steps=request.min_steps, check_every=request.check_every, together=prefill_exit == "together",
        last_only=True,
    )  # fmt: skip
    real = jnp.arange(L)[None] < lengths[:, None]
    present = jnp.zeros((B, config.rows), bool)
    present = present.at[jnp.arange(B)[:, None], jnp.where(real, tokens, config.rows)].set(True, mode="drop")
    last = (lengths - 1)[:, None]
    start = Progress(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        warm=None if not warm_start else _warm(done, last, warm_start),
        tokens=jnp.zeros((B, room), jnp.int32),
        steps=jnp.zeros((B, room), jnp.int32),
        count=jnp.zeros(B, jnp.int32),
        done=jnp.zeros(B, bool),
        present=present,
        passes=done.ran,
    )
    steps = jnp.take_along_axis(done.steps, last, axis=1)[:, 0]
    return _emit(start, request, done.logits[:, 0], steps), done.steps


def _warm(done, index: Array, kind: str) -> Array:
    states = done.latents if kind == "normalized" else done.state
    return jnp.take_along_axis(states, index[..., None], axis=1)


def _emit(p: Progress, request: Request, logits: Array, steps: Array) -> Progress:
    """Choose a token for every row that is not done, and write it down."""
    keys = jax.vmap(lambda k, j: jax.random.fold_in(jax.random.fold_in(k, _STREAM), j))(request.keys, p.count)
    token = choose(logits, p.present, request.sampling, keys)
    rows = jnp.arange(len(token))
    where = jnp.where(p.done, p.tokens.shape[1], p.count)
    return p._replace(
        token=token,
        tokens=p.tokens.at[rows, where].set(token, mode="drop"),
        steps=p.steps.at[rows, where].set(steps, mode="drop"),
        count=p.count + ~p.done,
        present=p.present.at[rows, token].set(True),
        done=p.done | stops(token, request.sampling),
    )


@functools.partial(jax.jit, static_argnames=("config", "warm_start"), donate_argnames="progress")
def _continue(params, config, progress, request, limit, most, warm_start) -> Progress:
    """Make tokens until every row is done or has `limit` of them."""

    def go_on(p: Progress) -> Array:
        return jnp.any(~p.done & (p.count < limit))

    def one(p: Progress) -> Progress:
        count = jnp.where(p.done, 0, 1)
        done, cache = run_pass(
            params, config, p.cache, p.token[:, None], count, first=False, state=p.warm, key=request.keys,
            init_scale=request.init_scale, num_steps=request.num_steps, rule=request.rule,
            min_steps=request.min_steps, check_every=request.check_every,
        )  # fmt: skip
        p = p._replace(cache=cache, passes=p.passes + done.ran)
        if warm_start:
            p = p._replace(warm=_warm(done, jnp.zeros((len(count), 1), jnp.int32), warm_start))
        p = _emit(p, request, done.logits[:, 0], done.steps[:, 0])
        return p._replace(done=p.done | (p.count >= most))

    return lax.while_loop(go_on, one, progress)
