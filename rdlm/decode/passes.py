"""prefill and decode_step: passes over new tokens that read a cache and extend it. `generate` is made of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int

from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.decode.program import local_config, on_several_hosts
from rdlm.exits import Counts, Depth, ExitRule
from rdlm.model import (
    Output,
    Params,
    Pass,
    Start,
    Text,
    adaptive_pass,
    check_depth,
    check_shape,
    check_tokens,
    compute_dtype,
    context,
    start_from,
)
from rdlm.model.cache import Cache, allocate, append, cache_bytes, cached_bias, grow, stored_dtype
from rdlm.model.inputs import Tokens, as_array, check_integers, check_numbers, check_type, depth_from, prefix_from
from rdlm.runtime.memory import require_memory


def next_power(n: int, minimum: int = 8) -> int:
    """Smallest power of two that is at least n and `minimum`: sizes that share one compiled program."""
    return max(minimum, 1 << (n - 1).bit_length())


def check_prefill_exit(prefill_exit: str) -> None:
    """Validate prefill_exit."""
    if prefill_exit not in ("per_token", "together", "never"):
        raise InputError(f"prefill_exit = {prefill_exit!r}: must be one of per_token, together, never")


def continuation(
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, "B L"],
    count: Int[Array, "B"],
    first: bool = False,
    prefix: Int[Array, "B"] | None = None,
) -> Text:
    """The first `count` of a row's `tokens`, behind those in the cache.

    first: the cache is empty and is not read. prefix: as in `context`, then.
    """
    L = tokens.shape[1]
    positions = cache.length[:, None] + jnp.arange(L)[None]
    valid = jnp.arange(L)[None] < count[:, None]
    bias = None if first else cached_bias(cache.capacity, cache.length)
    ctx = context(config, positions, valid.astype(jnp.int32), bias, prefix=prefix)
    return Text(tokens, positions, valid, ctx._replace(rounded=cache.policy.dtype is not None))


def run_pass(
    params: Params,
    config: ModelConfig,
    text: Text,
    start: Start,
    depth: Depth,
    cache: Cache,
    together: bool = False,
    last_only: bool = False,
) -> tuple[Pass, Cache]:
    """Process a text from `continuation` and append it to the cache. Arguments as in `adaptive_pass`."""
    done = adaptive_pass(params, config, text, start, depth, cache, together, last_only)
    at = jnp.int32(0) if text.context.cached_bias is None else cache.length
    return done, append(cache, done.new_kv, done.steps, done.ran, at, text.valid.sum(-1))


@dataclasses.dataclass(frozen=True, eq=False)
class CacheMemory:
    """What a cache and the passes that fill it need on each device."""

    params: Params
    config: ModelConfig
    batch: int  # rows
    length: int  # tokens of the longest pass, padding included
    sizes: tuple[int, int]  # core sets and positions of the cache
    depth: Depth  # its rule may read the logits of all tokens
    all_logits: bool = False  # the pass returns them
    coda_sets: bool = False  # the cache has them
    positions: int | None = None  # of the cache, which the rows share; None: `sizes` says those of each
    policy: CachePolicy = CachePolicy()  # says what dtype the cache has

    @property
    def bytes(self) -> int:
        """Bytes of both."""
        (sets, capacity), batch, length = self.sizes, self.batch, self.length
        config, rule = local_config(self.params, self.config), self.depth.rule
        dtype, D, H = compute_dtype(self.params, config), config.embed_dim, config.num_heads
        stored = stored_dtype(self.policy, dtype)
        for_rule = rule is not None and rule.needs_logits
        logits = 4 * batch * config.rows * (3 * length if for_rule else length if self.all_logits else 3)
        scores = batch * H * min(length, max(64, length // 8)) * length * 8
        activations = batch * length * (6 * D + 3 * config.mlp_dim) * dtype.itemsize
        first = cache_bytes(config, sets, batch, length, stored) + scores + activations + logits
        later = batch * capacity * (2 * D * dtype.itemsize + 32 * H)  # a layer's keys and values with their heads split
        cache = cache_bytes(config, sets, 1, self.positions or batch * capacity, stored, self.coda_sets)
        cache += 4 * batch * capacity if self.positions else 0  # the depth of each row's tokens
        return int(1.05 * (cache + max(first, later)))

    def require(self) -> None:
        """Refuse a cache that cannot fit, before it is asked for.

        Raises:
          InputError: it needs more memory than is free.
        """
        require_memory(
            f"cache: {self.sizes[0]} recurrences x {self.batch} prompts x {self.sizes[1]} positions",
            self.bytes,
            "keep fewer recurrences (cache=CachePolicy(recurrences=k)), or in 8 bits (dtype='int8'), run fewer "
            "(num_steps), or give fewer or shorter prompts",
            hosts=on_several_hosts(self.params),
        )


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Tokens,
    num_steps: Counts | None = None,
    *,
    lengths: ArrayLike | None = None,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    init_scale: ArrayLike = 1.0,
    prefix: ArrayLike | None = None,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Counts = 0,
    check_every: Counts = 1,
    cache: CachePolicy = CachePolicy(),
    capacity: int | None = None,
    max_steps: int | None = None,
) -> tuple[Output, Cache]:
    """Process prompts in one parallel pass and keep what later tokens need (docs/semantics.md, Prefill and exactness).

    Args:
      params, config: the model.
      tokens: int [B, L], prompts padded on the right.
      num_steps: recurrences (the maximum, with an exit rule): None = config.mean_recurrence, a scalar, one per
        row [B] or one per token [B, L].
      lengths: int [B], real tokens per row; None: all.
      state: [B, L, config.state_dim] initial states; wins over `key`.
      key: one key for all rows or one per row; None is `jax.random.key(0)`.
      init_scale: scale of the initial state; 0 is the zero state.
      prefix: as in `rdlm.forward`.
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
    check_prefill_exit(prefill_exit)
    check_type("cache", cache, CachePolicy)
    for name, value in (("capacity", capacity), ("max_steps", max_steps)):
        if value is not None:
            check_shape(name, value, ())
            check_integers(name, value, 1)
    capacity = config.max_length if capacity is None else capacity
    check_numbers("init_scale", init_scale)
    check_shape("init_scale", init_scale, (), (B,))
    if capacity < L:
        raise InputError(f"tokens: {L} positions do not fit capacity = {capacity}")
    if max_steps is None:
        max_steps = config.mean_recurrence if isinstance(num_steps, jax.core.Tracer) else _largest(num_steps)
    num_steps = _within(num_steps, cache, cache.sets(max_steps), f"max_steps = {max_steps}")
    depth = depth_from((B, L), num_steps, exit_rule, min_steps, check_every)
    if prefill_exit == "never":
        depth = depth._replace(rule=None)
    check_shape("lengths", lengths, (B,))
    if lengths is not None and not isinstance(lengths, jax.core.Tracer):
        check_integers("lengths", lengths)
        known = np.asarray(lengths)
        if known.min() < 1 or known.max() > L:
            raise InputError(f"lengths = {known.tolist()}: must be between 1 and {L}")
    if not isinstance(tokens, jax.core.Tracer):
        sizes = cache.sets(max_steps), capacity
        CacheMemory(params, config, B, L, sizes, depth, all_logits=True, policy=cache).require()
    empty = allocate(config, cache, cache.sets(max_steps), B, capacity, compute_dtype(params, config))
    count = jnp.full(B, L, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    text = continuation(config, empty, tokens, count, first=True, prefix=prefix_from(config, prefix, (B, L)))
    start = start_from(params, config, text, key, state, init_scale)
    done, full = run_pass(params, config, text, start, depth, empty, prefill_exit == "together")
    return Output(done.logits, done.latents, done.steps, done.state), full


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    token: Array | np.ndarray,
    num_steps: Counts | None = None,
    *,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    init_scale: ArrayLike = 1.0,
    exit_rule: ExitRule | None = None,
    min_steps: Counts = 0,
    check_every: Counts = 1,
) -> tuple[Output, Cache]:
    """Process the next token of every row, each with its own depth. Donate `cache` when calling it under jit.

    Args:
      cache: from `prefill` or an earlier `decode_step`. It grows as needed outside jit; under jit it must have room:
        call `prefill` with `capacity` and `max_steps` for all that follows (a traced num_steps is cut to its sets).
      token: int [B], or [B, L] to append several at once.
      num_steps: as in `prefill`.
      state: [B, D] (or [B, L, D]) initial state, D = config.state_dim; wins over `key`.
      key, init_scale, exit_rule, min_steps, check_every: as in `prefill`.

    Returns:
      (Output with logits [B, V], latents and state [B, D], steps [B]; or with an axis L when token has one, cache).

    Raises:
      InputError: wrong shapes, ids or depths; outside jit also when config.max_length is exceeded.
    """
    check_type("cache", cache, Cache)
    array = as_array(token)
    single = array.ndim == 1
    tokens = check_tokens(array[:, None] if single else array, config, "token")
    if len(tokens) != len(cache.length):
        raise InputError(f"token: {len(tokens)} rows, but the cache holds {len(cache.length)}")
    num_steps = config.mean_recurrence if num_steps is None else num_steps
    check_depth(num_steps)
    B, D = len(tokens), config.state_dim
    check_shape("state", state, (B, D) if single else (B, tokens.shape[1], D))
    if state is not None:
        state = jnp.asarray(state).reshape(*tokens.shape, D)
    if not isinstance(cache.length, jax.core.Tracer):
        cache = _large_enough(params, cache, config, tokens.shape[1], num_steps)
    num_steps = _within(num_steps, cache.policy, cache.sets, "max_steps of prefill")
    depth = depth_from((B, tokens.shape[1]), num_steps, exit_rule, min_steps, check_every)
    check_numbers("init_scale", init_scale)
    check_shape("init_scale", init_scale, (), (B,))
    text = continuation(config, cache, tokens, jnp.full(B, tokens.shape[1], jnp.int32))
    start = start_from(params, config, text, key, state, init_scale)
    done, cache = run_pass(params, config, text, start, depth, cache)
    out = Output(done.logits, done.latents, done.steps, done.state)
    return (jax.tree.map(lambda x: x[:, 0], out) if single else out), cache


def _largest(counts: Counts) -> int:
    return int(np.max(np.asarray(counts)))


def _within(num_steps: Counts, policy: CachePolicy, sets: int, limit: str) -> Counts:
    """`num_steps` as far as every recurrence has a set of its own: refused beyond when concrete, cut when traced."""
    if policy.recurrences is not None:
        return num_steps
    if isinstance(num_steps, jax.core.Tracer):
        return jnp.minimum(num_steps, sets)
    if _largest(num_steps) > sets:
        raise InputError(f"num_steps = {num_steps!r}: exceeds {limit}, the cache keeps {sets} recurrences")
    return num_steps


def _large_enough(params: Params, cache: Cache, config: ModelConfig, L: int, num_steps: Counts) -> Cache:
    """The cache itself, or a larger copy when a concrete call needs more positions or sets than it has."""
    needed = int(jnp.max(cache.length)) + L
    if needed > config.max_length:
        raise InputError(f"token: position {needed} exceeds config.max_length = {config.max_length}")
    capacity = cache.capacity if needed <= cache.capacity else min(2 * needed, config.max_length)
    sets = cache.sets
    if not isinstance(num_steps, jax.core.Tracer):
        sets = max(sets, cache.policy.sets(_largest(num_steps)))
    if (sets, capacity) != (cache.sets, cache.capacity):
        CacheMemory(params, config, len(cache.length), L, (sets, capacity), Depth(1), policy=cache.policy).require()
    return grow(cache, sets, capacity)
