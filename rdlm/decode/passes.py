"""prefill and decode_step: passes over new tokens that read a cache and extend it. `generate` is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.exits import ExitRule
from rdlm.model import (
    Output,
    Params,
    Pass,
    adaptive_pass,
    check_depth,
    check_rule,
    check_shape,
    check_tokens,
    compute_dtype,
    context,
    typed_key,
)
from rdlm.model.cache import Cache, allocate, append, cached_bias, grow
from rdlm.recurrence import initial_state

PREFILL_EXITS = ("per_token", "together", "never")


def next_power(n: int, least: int = 8) -> int:
    """Smallest power of two that is at least n and `least`: sizes that share one compiled program."""
    return max(least, 1 << (n - 1).bit_length())


def run_pass(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, "B L"],
    count: Int[Array, "B"],
    *,
    first: bool,
    state: Float[ArrayLike, "B L D"] | None = None,
    key: ArrayLike | None = None,
    init_scale: Any = 1.0,
    num_steps: Any,
    rule: ExitRule | None = None,
    min_steps: Any = 0,
    check_every: Any = 1,
    together: bool = False,
    last_only: bool = False,
    resume: Any = None,
) -> tuple[Pass, Cache]:
    """Process `count` of the tokens behind what `cache` holds. Traced: the body of the public functions.

    first: the cache is known to be empty, so nothing is read from it. The other arguments as in `adaptive_pass`.
    """
    L = tokens.shape[1]
    positions = cache.length[:, None] + jnp.arange(L)[None]
    valid = jnp.arange(L)[None] < count[:, None]
    dtype = compute_dtype(params, config)
    key = typed_key(key)
    if state is None:
        state = initial_state(key, positions, config.embed_dim, dtype, init_scale)
    ctx = context(
        config, positions, valid.astype(jnp.int32), None if first else cached_bias(cache.capacity, cache.length)
    )
    done = adaptive_pass(
        params, config, tokens, positions, ctx, jnp.asarray(state, dtype), valid,
        num_steps=num_steps, rule=rule, min_steps=min_steps, check_every=check_every, together=together,
        policy=cache.policy, cache=None if first else cache, sets=cache.sets, last_only=last_only,
        key=key, resume=resume,
    )  # fmt: skip
    start = jnp.int32(0) if first else cache.length
    return done, append(cache, done.own, done.steps, done.ran, start, count)


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: ArrayLike | Sequence[Sequence[int]],
    num_steps: Any = None,
    *,
    lengths: Any = None,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    init_scale: Any = 1.0,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Any = 0,
    check_every: Any = 1,
    cache: CachePolicy = CachePolicy(),
    capacity: int | None = None,
    max_steps: int | None = None,
) -> tuple[Output, Cache]:
    """Process prompts in one parallel pass and keep what later tokens need (contract, "Prefill, scoring").

    Args:
      params, config: the model.
      tokens: int [B, L], prompts padded on the right.
      num_steps: recurrences (the most of them, with an exit rule): None = config.mean_recurrence, a scalar, one per
        row [B] or one per token [B, L].
      lengths: int [B], real tokens per row; None: all.
      state: [B, L, D] initial states; wins over `key`.
      key: one key for all rows or one per row; None is `jax.random.key(0)`.
      init_scale: scale of the initial state; 0 is the zero state.
      exit_rule, min_steps, check_every: see `rdlm.forward`.
      prefill_exit: "per_token"; "together" (one exit per prompt); "never" (the rule is for later tokens).
      cache: policy. capacity: positions to allocate, default config.max_length. max_steps: with a policy that keeps
        every recurrence, sets to allocate; default num_steps (`decode_step` grows the cache when it must).

    Returns:
      (Output with logits [B, L, V], the cache).

    Raises:
      InputError: wrong shapes, ids or depths, or a prompt longer than the capacity.
    """
    tokens = check_tokens(tokens, config)
    B, L = tokens.shape
    num_steps = config.mean_recurrence if num_steps is None else num_steps
    check_depth(num_steps)
    check_rule(exit_rule, B, min_steps, check_every)
    if prefill_exit not in PREFILL_EXITS:
        raise InputError(f"prefill_exit = {prefill_exit!r}: must be one of {', '.join(PREFILL_EXITS)}")
    capacity = config.max_length if capacity is None else capacity
    if capacity < L:
        raise InputError(f"tokens: {L} positions do not fit capacity = {capacity}")
    if max_steps is None:
        max_steps = config.mean_recurrence if isinstance(num_steps, jax.core.Tracer) else int(np.max(num_steps))
    num_steps = _within(num_steps, cache, cache.sets(max_steps), f"max_steps = {max_steps}")
    check_shape("lengths", lengths, (B,))
    check_shape("state", state, (B, L, config.embed_dim))
    known = lengths is not None and not isinstance(lengths, jax.core.Tracer)
    if known and (np.min(lengths) < 1 or np.max(lengths) > L):
        raise InputError(f"lengths = {np.asarray(lengths).tolist()}: must be between 1 and {L}")
    empty = allocate(config, cache, cache.sets(max_steps), B, capacity, compute_dtype(params, config))
    count = jnp.full(B, L, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    done, full = run_pass(
        params, config, empty, tokens, count, first=True, state=state, key=key, init_scale=init_scale,
        num_steps=num_steps, rule=None if prefill_exit == "never" else exit_rule, min_steps=min_steps,
        check_every=check_every, together=prefill_exit == "together",
    )  # fmt: skip
    return Output(done.logits, done.latents, done.steps, done.state), full


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    token: Array | np.ndarray,
    num_steps: Any = None,
    *,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    init_scale: Any = 1.0,
    exit_rule: ExitRule | None = None,
    min_steps: Any = 0,
    check_every: Any = 1,
) -> tuple[Output, Cache]:
    """Process the next token of every row, each with its own depth. Donate `cache` when calling it under jit.

    Args:
      cache: from `prefill` or an earlier `decode_step`. It grows as needed outside jit; under jit it must have room:
        call `prefill` with `capacity` and `max_steps` for all that follows (a traced num_steps is cut to its sets).
      token: int [B], or [B, L] to append several at once.
      num_steps: as in `prefill`.
      state: [B, D] (or [B, L, D]) initial state; wins over `key`.
      key, init_scale, exit_rule, min_steps, check_every: as in `prefill`.

    Returns:
      (Output with logits [B, V], latents and state [B, D], steps [B]; or with an axis L when token has one, cache).

    Raises:
      InputError: wrong shapes, ids or depths; outside jit also when config.max_length is exceeded.
    """
    single = np.ndim(token) == 1
    tokens = check_tokens(token[:, None] if single else token, config, "token")
    num_steps = config.mean_recurrence if num_steps is None else num_steps
    check_depth(num_steps)
    B, D = len(tokens), config.embed_dim
    check_shape("state", state, (B, D) if single else (B, tokens.shape[1], D))
    if state is not None:
        state = jnp.asarray(state).reshape(*tokens.shape, D)
    check_rule(exit_rule, tokens.shape[0], min_steps, check_every)
    if not isinstance(cache.length, jax.core.Tracer):
        cache = _with_room(cache, config, tokens.shape[1], num_steps)
    num_steps = _within(num_steps, cache.policy, cache.sets, "max_steps of prefill")
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    done, cache = run_pass(
        params, config, cache, tokens, count, first=False, state=state, key=key, init_scale=init_scale,
        num_steps=num_steps, rule=exit_rule, min_steps=min_steps, check_every=check_every,
    )  # fmt: skip
    out = Output(done.logits, done.latents, done.steps, done.state)
    return (jax.tree.map(lambda x: x[:, 0], out) if single else out), cache


def _within(num_steps: Any, policy: CachePolicy, sets: int, room: str) -> Any:
    """`num_steps` as far as every recurrence has a set of its own: refused beyond when concrete, cut when traced."""
    if policy.recurrences is not None:
        return num_steps
    if isinstance(num_steps, jax.core.Tracer):
        return jnp.minimum(num_steps, sets)
    if int(np.max(num_steps)) > sets:
        raise InputError(f"num_steps = {num_steps!r}: exceeds {room}, the cache keeps {sets} recurrences")
    return num_steps


def _with_room(cache: Cache, config: ModelConfig, L: int, num_steps: Any) -> Cache:
    """The cache itself, or a larger copy when a concrete call needs more positions or sets than it has."""
    needed = int(jnp.max(cache.length)) + L
    if needed > config.max_length:
        raise InputError(f"token: position {needed} exceeds config.max_length = {config.max_length}")
    capacity = cache.capacity if needed <= cache.capacity else min(2 * needed, config.max_length)
    sets = cache.sets
    if not isinstance(num_steps, jax.core.Tracer):
        sets = max(sets, cache.policy.sets(int(np.max(num_steps))))
    return grow(cache, sets, capacity)
