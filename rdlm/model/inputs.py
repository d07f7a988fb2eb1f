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
from rdlm.exits import Counts, Depth, ExitRule
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

    s: Array | None  # [B, L, state_dim]; None: what the prelude's output makes
    key: Array | None = None  # of the test-time noise, one or [B]; None: without noise
    ran: Array | int = 0  # recurrences behind these states
    core_kv: Layers = ()  # [S, B, L, .] per core layer: keys and values of those recurrences, if ran > 0


def text_from(
    config: ModelConfig,
    tokens: Tokens,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    prefix: ArrayLike | None = None,
) -> Text:
    """Check the arguments of `forward` that describe a text, and fill in defaults.

    Raises:
      InputError: wrong shapes, or ids out of range.
    """
    tokens = check_tokens(tokens, config)
    B, L = tokens.shape
    check_shape("segment_ids", segment_ids, (B, L))
    check_shape("positions", positions, (L,), (B, L))
    for name, value in (("segment_ids", segment_ids), ("positions", positions)):
        if isinstance(value, np.ndarray) and value.dtype.itemsize > 4:  # JAX would cut them to 32 bits
            check_integers(name, value)
    segments = None if segment_ids is None else jnp.asarray(segment_ids)
    places = positions_of(tokens, segments) if positions is None else jnp.asarray(positions)
    valid = jnp.ones((B, L), bool) if segments is None else segments != 0
    if prefix is not None and segments is not None:
        raise InputError("prefix: cannot be had with segment_ids; give one text a row")
    return Text(tokens, places, valid, context(config, places, segments, prefix=prefix_from(config, prefix, (B, L))))


def prefix_from(config: ModelConfig, prefix: ArrayLike | None, shape: tuple[int, int]) -> Int32[Array, "B"] | None:
    """How many tokens of each row of `shape` [B, L] see each other: one number, or one for each row.

    Raises:
      InputError: a model that has no such attention, or counts outside [0, L].
    """
    if prefix is None:
        return None
    if not config.prefix_attention:
        raise InputError("prefix: every token of this model sees only those before it (prefix_attention is false)")
    B, L = shape
    check_shape("prefix", prefix, (), (B,))
    check_integers("prefix", prefix, 0)
    if not isinstance(prefix, jax.core.Tracer) and np.max(np.asarray(prefix)) > L:
        raise InputError(f"prefix = {shown(prefix)}: must be at most the length {L}")
    return jnp.broadcast_to(jnp.asarray(prefix, jnp.int32), (B,))


def start_from(
    params: Params,
    config: ModelConfig,
    text: Text,
    key: ArrayLike | None,
    state: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
) -> Start:
    """States to begin with: `state` [B, L, state_dim], or as `config.loop.start` says; `scale` multiplies noise.

    Raises:
      InputError: wrong shapes.
    """
    B, L = text.tokens.shape
    shape = (B, L, config.state_dim)
    key = typed_key(key)
    check_shape("state", state, shape)
    check_shape("key", key, (), (B,))
    dtype = compute_dtype(params, config)
    if state is None and config.loop.start == "embedding":
        return Start(None, key)
    scale = scale * config.start_scale
    s = initial_state(key, text.positions, config.state_dim, dtype, scale) if state is None else state
    return Start(jnp.broadcast_to(jnp.asarray(s, dtype), shape), key)


def typed_key(key: ArrayLike | None) -> Key[Array, "..."]:
    """A typed key array: None is key 0, old-style uint32 keys are wrapped."""
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    data = as_array(key)
    wrong = not jnp.issubdtype(data.dtype, jnp.integer) or data.ndim == 0 or data.shape[-1] != 2
    if wrong or (isinstance(data, np.ndarray) and not np.all((data >= 0) & (data < 2**32))):
        raise InputError(f"key = {shown(key)}: expected a key such as jax.random.key(0), or an array of them")
    return jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32))


def check_tokens(tokens: Tokens, config: ModelConfig, name: str = "tokens") -> Int32[Array, "B L"]:
    """`tokens` as int32; a clear error for wrong ranks, lengths, dtypes and (outside jit) ids."""
    check_type("config", config, ModelConfig)
    array = as_array(tokens)
    if array.ndim != 2 or array.shape[1] == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name}: expected integers [B, L] with L >= 1, got {array.dtype} {tuple(array.shape)}")
    if array.shape[1] > config.max_length:
        raise InputError(f"{name}: length {array.shape[1]} exceeds config.max_length = {config.max_length}")
    check_ids(name, array, config)
    return jnp.asarray(array, jnp.int32)


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse an argument that is not one of this project's objects, such as a config in the place of parameters."""
    if not isinstance(value, kind):
        raise InputError(f"{name} = {shown(value)}: must be a rdlm.{kind.__name__}")


def check_callable(name: str, value: object) -> None:
    """Refuse what is neither None nor a function."""
    if value is not None and not callable(value):
        raise InputError(f"{name} = {shown(value)}: must be a function")


def shown(value: object) -> str:
    """A value in one line of a message, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_integers(name: str, value: object, minimum: int | None = None) -> None:
    """Refuse what is not integers in [minimum, 2**31), before a cast would make others of them; traced ones pass."""
    if isinstance(value, jax.core.Tracer):
        return
    array = as_array(value)
    if not array.size or not jnp.issubdtype(array.dtype, jnp.integer) or np.max(array) >= 2**31:
        raise InputError(f"{name} = {shown(value)}: must be an integer below 2**31")
    if np.min(array) < (-(2**31) if minimum is None else minimum):
        raise InputError(f"{name} = {shown(value)}: must be at least {-(2**31) if minimum is None else minimum}")


def check_numbers(name: str, value: object) -> None:
    """Refuse what is not numbers that are finite in float32; traced ones pass."""
    if isinstance(value, jax.core.Tracer):
        return
    array = as_array(value)
    real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not array.size or not real:
        raise InputError(f"{name} = {shown(value)}: must be a number")
    with np.errstate(over="ignore"):
        if not np.all(np.isfinite(array.astype(np.float32))):
            raise InputError(f"{name} = {shown(value)}: must be finite")


def as_array(value: object) -> Array | np.ndarray:
    """A value as an array; one of objects where it is none, such as lists of different lengths."""
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return np.asarray(None)


def check_ids(name: str, ids: ArrayLike | Sequence[int], config: ModelConfig) -> None:
    """Refuse concrete token ids outside the vocabulary; traced ones pass."""
    if not isinstance(ids, jax.core.Tracer) and np.size(ids):
        smallest, largest = int(np.min(ids)), int(np.max(ids))
        if smallest < 0 or largest >= config.rows:
            raise InputError(f"{name}: ids must be in [0, {config.rows}), found {smallest} .. {largest}")


def check_depth(num_steps: Counts, name: str = "num_steps") -> None:
    """Refuse a concrete depth below 1."""
    check_integers(name, num_steps, 1)


def check_rule(rule: object, batch: int, min_steps: Counts = 0, check_every: Counts = 1) -> None:
    """Refuse objects that are no exit rule, thresholds that are not one or one per row, and impossible schedules."""
    if rule is not None and not isinstance(rule, ExitRule):
        raise InputError(f"exit_rule = {shown(rule)}: must be a rule such as rdlm.exits.kl()")
    if rule is not None:
        if rule.every_check and not (_is(min_steps, 0) and _is(check_every, 1)):
            raise InputError(f"exit_rule: {rule.kind} needs every recurrence: min_steps = 0 and check_every = 1")
        for threshold in rule.thresholds():
            check_shape("exit_rule: threshold", threshold, (), (batch,))
    check_integers("min_steps", min_steps, 0)
    check_integers("check_every", check_every, 1)


def _is(value: Counts, number: int) -> bool:
    """Whether a count is known to be `number` in every row."""
    return not isinstance(value, jax.core.Tracer) and bool(np.all(np.asarray(value) == number))


def depth_from(
    shape: tuple[int, int],
    num_steps: Counts,
    rule: ExitRule | None,
    min_steps: Counts = 0,
    check_every: Counts = 1,
) -> Depth:
    """Check when tokens of this shape [B, L] stop, as arrays.

    Raises:
      InputError: see `check_rule`, or a depth below 1.
    """
    check_depth(num_steps)
    check_rule(rule, shape[0], min_steps, check_every)
    for name, value in (("num_steps", num_steps), ("min_steps", min_steps), ("check_every", check_every)):
        check_shape(name, value, (), shape[:1], shape)
    counts = (jnp.asarray(x, jnp.int32) for x in (num_steps, min_steps, check_every))
    max_steps, min_steps, check_every = counts
    return Depth(max_steps, rule, min_steps, check_every)


def check_shape(name: str, value: object, *allowed: tuple[int, ...]) -> None:
    """Refuse an array (None passes) whose shape is not among those `allowed`, or that holds no numbers."""
    if value is None:
        return
    array = as_array(value)
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUSMm":
        raise InputError(f"{name} = {shown(value)}: must be an array of numbers")
    if array.shape not in allowed:
        known = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError(f"{name}: expected shape {known}, got {list(array.shape)}")


def split_steps(num_steps: NumSteps, config: ModelConfig) -> tuple[Array | int, Array | int]:
    """(n, k) of a public num_steps: None, r (traced or not) or a pair.

    Raises:
      InputError: a negative count, no recurrence at all, or 2**31 of them.
    """
    given = num_steps if isinstance(num_steps, (tuple, list)) else (num_steps, 0)
    if len(given) != 2:
        raise InputError(f"num_steps = {num_steps!r}: must be a number or a pair (n, k)")
    n, k = (_concrete(config.mean_recurrence if count is None else count) for count in given)
    known = [count for count in (n, k) if isinstance(count, int)]
    if min(known, default=0) < 0 or (len(known) == 2 and sum(known) < 1):
        raise InputError(f"num_steps = {num_steps!r}: at least one recurrence is needed")
    check_integers("num_steps", sum(known))
    return n, k


def _concrete(count: Counts | Array | int) -> Array | int:
    """A count as a Python int, unless it is traced."""
    if isinstance(count, jax.core.Tracer):
        return count
    known = as_array(count)
    if known.ndim or not np.issubdtype(known.dtype, np.integer):
        raise InputError(f"num_steps: {shown(count)} is not a number of recurrences")
    return int(known)
