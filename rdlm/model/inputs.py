"""What a pass over a text is given, and the checks of arguments of the public API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int32, Key

from rdlm.config import InputError, ModelConfig
from rdlm.exits import Counts, Depth, ExitRule, Gate
from rdlm.model.blocks import Context
from rdlm.model.network import Layers, Params, compute_dtype, context, positions_of
from rdlm.recurrence import initial_state

Tokens = ArrayLike | Sequence[Sequence[int]]
NumSteps = Counts | tuple[Counts, Counts] | None
"""None (config.mean_recurrence), r, or (n, k) with gradient through the last k."""


class Text(NamedTuple):
    """The tokens of one pass and where they stand."""

    tokens: Array  # int32 [B, L]
    positions: Array  # int32 [L] or [B, L]
    valid: Array  # bool [B, L], False for padding
    context: Context  # rotary tables, and who sees whom


class Start(NamedTuple):
    """The states from which a pass begins."""

    s: Array | None  # [B, L, D]; None: what the prelude returns
    key: Array | None = None  # of the test-time noise, one or [B]; None: without noise
    ran: Array | int = 0  # recurrences behind these states
    core_kv: Layers = ()  # [S, B, L, .] per core layer: keys and values of those recurrences, if ran > 0


def text_from(
    config: ModelConfig, tokens: Tokens, segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None
) -> Text:
    """Check the arguments of `forward` that describe a text, and fill in defaults.

    Raises:
      InputError: wrong shapes, or ids out of range.
    """
    tokens = check_tokens(tokens, config)
    B, L = tokens.shape
    check_shape("segment_ids", segment_ids, (B, L))
    check_shape("positions", positions, (L,), (B, L))
    segments = None if segment_ids is None else jnp.asarray(segment_ids)
    places = positions_of(tokens, segments) if positions is None else jnp.asarray(positions)
    valid = jnp.ones((B, L), bool) if segments is None else segments != 0
    return Text(tokens, places, valid, context(config, places, segments))


def start_from(
    params: Params,
    config: ModelConfig,
    text: Text,
    key: ArrayLike | None,
    state: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
) -> Start:
    """States to begin with: `state` [B, L, D], or as `config.loop.start` says; `scale` multiplies noise.

    Raises:
      InputError: wrong shapes.
    """
    B, L = text.tokens.shape
    shape = (B, L, config.embed_dim)
    key = typed_key(key)
    check_shape("state", state, shape)
    check_shape("key", key, (), (B,))
    dtype = compute_dtype(params, config)
    if state is None and config.loop.start == "embedding":
        return Start(None, key)
    scale = scale * config.start_scale
    s = initial_state(key, text.positions, config.embed_dim, dtype, scale) if state is None else state
    return Start(jnp.broadcast_to(jnp.asarray(s, dtype), shape), key)


def typed_key(key: ArrayLike | None) -> Key[Array, "..."]:
    """A typed key array: None is key 0, old-style uint32 keys are wrapped."""
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    data = jnp.asarray(key, jnp.uint32)
    if data.ndim == 0 or data.shape[-1] != 2:
        raise InputError(f"key = {key!r}: expected a key such as jax.random.key(0), or an array of them")
    return jax.random.wrap_key_data(data)


def check_tokens(tokens: Tokens, config: ModelConfig, name: str = "tokens") -> Int32[Array, "B L"]:
    """`tokens` as int32; a clear error for wrong ranks, lengths, dtypes and (outside jit) ids."""
    array = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if array.ndim != 2 or array.shape[1] == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name}: expected integers [B, L] with L >= 1, got {array.dtype} {tuple(array.shape)}")
    if array.shape[1] > config.max_length:
        raise InputError(f"{name}: length {array.shape[1]} exceeds config.max_length = {config.max_length}")
    check_ids(name, array, config)
    return jnp.asarray(array, jnp.int32)


def check_ids(name: str, ids: ArrayLike | Sequence[int], config: ModelConfig) -> None:
    """Refuse concrete token ids outside the vocabulary; traced ones pass."""
    if not isinstance(ids, jax.core.Tracer) and np.size(ids):
        smallest, largest = int(np.min(ids)), int(np.max(ids))
        if smallest < 0 or largest >= config.rows:
            raise InputError(f"{name}: ids must be in [0, {config.rows}), found {smallest} .. {largest}")


def check_minimum(name: str, value: Counts, minimum: int) -> None:
    """Refuse concrete numbers below `minimum`; traced ones pass."""
    if not isinstance(value, jax.core.Tracer) and np.min(np.asarray(value)) < minimum:
        raise InputError(f"{name} = {value!r}: must be at least {minimum}")


def check_depth(num_steps: Counts, name: str = "num_steps") -> None:
    """Refuse a concrete depth below 1."""
    check_minimum(name, num_steps, 1)


def check_rule(rule: object, batch: int, min_steps: Counts = 0, check_every: Counts = 1) -> None:
    """Refuse objects that are no exit rule, thresholds that are not one or one per row, and impossible schedules."""
    if rule is not None and not isinstance(rule, ExitRule):
        raise InputError(f"exit_rule = {rule!r}: must be a rule such as rdlm.exits.kl()")
    if rule is not None:
        every = all(
            not isinstance(x, jax.core.Tracer) and np.all(np.asarray(x) == y)
            for x, y in ((min_steps, 0), (check_every, 1))
        )
        if isinstance(rule, Gate) and not every:
            raise InputError("exit_rule: exits.gate sums over all recurrences: it needs min_steps = 0, check_every = 1")
        for threshold in rule.thresholds():
            check_shape("exit_rule: threshold", threshold, (), (batch,))
    check_minimum("min_steps", min_steps, 0)
    check_minimum("check_every", check_every, 1)


def depth_from(
    batch: int, num_steps: Counts, rule: ExitRule | None, min_steps: Counts = 0, check_every: Counts = 1
) -> Depth:
    """Check when tokens stop, as arrays.

    Raises:
      InputError: see `check_rule`, or a depth below 1.
    """
    check_depth(num_steps)
    check_rule(rule, batch, min_steps, check_every)
    counts = (jnp.asarray(x, jnp.int32) for x in (num_steps, min_steps, check_every))
    max_steps, min_steps, check_every = counts
    return Depth(max_steps, rule, min_steps, check_every)


def check_shape(name: str, value: object, *allowed: tuple[int, ...]) -> None:
    """Refuse an array (None passes) whose shape is not among those `allowed`."""
    shape: tuple[int, ...] = value.shape if hasattr(value, "shape") else np.asarray(value).shape
    if value is not None and shape not in allowed:
        known = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError(f"{name}: expected shape {known}, got {list(shape)}")


def split_steps(num_steps: NumSteps, config: ModelConfig) -> tuple[Array | int, Array | int]:
    """(n, k) of a public num_steps: None, r (traced or not) or a pair.

    Raises:
      InputError: a negative count, or no recurrence at all.
    """
    given = num_steps if isinstance(num_steps, (tuple, list)) else (num_steps, 0)
    n, k = (_concrete(config.mean_recurrence if count is None else count) for count in given)
    known = [count for count in (n, k) if isinstance(count, int)]
    if min(known, default=0) < 0 or (len(known) == 2 and sum(known) < 1):
        raise InputError(f"num_steps = {num_steps!r}: at least one recurrence is needed")
    return n, k


def _concrete(count: Counts | Array | int) -> Array | int:
    """A count as a Python int, unless it is traced."""
    if isinstance(count, jax.core.Tracer):
        return count
    known = np.asarray(count)
    if known.ndim or not np.issubdtype(known.dtype, np.integer):
        raise InputError(f"num_steps: {count!r} is not a number of recurrences")
    return int(known)
