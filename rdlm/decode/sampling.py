"""From logits to the next token, with its filters in the reference's order (`probabilities`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, Int32, Key, Shaped

from rdlm.config import InputError, Sampling
from rdlm.model.inputs import check_integers, check_numbers, check_shape

GREEDY = 1e-5
"""Temperatures below are greedy."""


class SamplingArrays(NamedTuple):
    """`Sampling` with one value per row, so that no value ever recompiles."""

    temperature: Array  # f32 [B]
    top_k: Array  # int32 [B]
    top_p: Array  # f32 [B]
    min_p: Array  # f32 [B]
    repetition_penalty: Array  # f32 [B]
    stop_tokens: Array  # int32 [B, S], padded with -1


def per_row(value: object, rows: int, name: str, dtype: DTypeLike) -> Shaped[np.ndarray, "{rows}"]:
    """A scalar or one value per prompt, as an array.

    Raises:
      InputError: another number of values, or such as `dtype` cannot hold.
    """
    if np.issubdtype(dtype, np.integer):
        check_integers(name, value)
    else:
        check_numbers(name, value)
    array = np.asarray(value).astype(dtype)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
        raise InputError(f"{name}: expected one value or {rows}, got shape {array.shape}")
    return np.broadcast_to(array, (rows,))


def as_arrays(sampling: Sampling, rows: int) -> SamplingArrays:
    """Spread `sampling` over `rows` prompts.

    Raises:
      InputError: a field out of its range, or with the wrong number of values.
    """
    fields = {
        name: per_row(getattr(sampling, name), rows, f"Sampling.{name}", np.int32 if name == "top_k" else np.float32)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    allowed = {
        "temperature": (fields["temperature"] >= 0, "must not be negative"),
        "top_k": (fields["top_k"] >= 0, "must not be negative (0 is off)"),
        "top_p": ((fields["top_p"] > 0) & (fields["top_p"] <= 1), "must be in (0, 1] (1.0 is off)"),
        "min_p": ((fields["min_p"] >= 0) & (fields["min_p"] <= 1), "must be in [0, 1] (0.0 is off)"),
        "repetition_penalty": (
            (fields["repetition_penalty"] > 1e-6) & (fields["repetition_penalty"] < 1e6),
            "must be positive, from 1e-6 to 1e6 (1.0 is off)",
        ),
    }
    for name, (good, fix) in allowed.items():
        if not np.all(good):
            raise InputError(f"Sampling.{name} = {getattr(sampling, name)!r}: {fix}")
    # Next to 0 the likeliest token has all the probability, and f32 cannot say how small the others' is.
    fields["temperature"] = np.where(fields["temperature"] < GREEDY, 0.0, fields["temperature"]).astype(np.float32)
    each = _stop_rows(sampling.stop_tokens, rows)
    width = max(4, *(len(s) for s in each))
    table = np.asarray([s + [-1] * (width - len(s)) for s in each], np.int32).reshape(rows, width)
    return SamplingArrays(**{k: jnp.asarray(v) for k, v in fields.items()}, stop_tokens=jnp.asarray(table))


def _stop_rows(given: object, rows: int) -> list[list[int]]:
    """Stop tokens of every row, from a sequence of ids or one per row."""
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, (str, bytes)):
        raise InputError(f"Sampling.stop_tokens = {given!r}: must be a tuple of ids, such as (2,)")
    nested = any(isinstance(x, (tuple, list, np.ndarray)) for x in given)
    if nested and len(given) != rows:
        raise InputError(f"Sampling.stop_tokens: expected one tuple or {rows}, got {len(given)}")
    each = []
    for ids in given if nested else [given] * rows:
        if not isinstance(ids, (Sequence, np.ndarray)) or len(ids):
            check_integers("Sampling.stop_tokens", ids, 0)
            check_shape("Sampling.stop_tokens", ids, (np.size(ids),))
        each.append([int(x) for x in ids])
    return each


def penalise(
    logits: Float[Array, "B V"], present: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of tokens that are `present` by the row's penalty."""
    factor = jnp.where(present, penalty[:, None], 1.0)
    return jnp.where(logits >= 0, logits / factor, logits * factor)


def probabilities(logits: Float[Array, "B V"], present: Bool[Array, "B V"], s: SamplingArrays) -> Float32[Array, "B V"]:
    """The distribution a token is drawn from, for rows with temperature > 0.

    Repetition penalty, temperature, softmax, top-k (ties kept, not renormalised), top-p (on those probabilities; the
    token that crosses the threshold is dropped, the first always kept), min-p, renormalisation.
    """
    logits = penalise(logits, present, s.repetition_penalty)
    # The maximum goes first: divided by a tiny temperature, a rounding of the difference would be large.
    logits = logits - logits.max(-1, keepdims=True)
    p = jax.nn.softmax(logits / jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None], axis=-1)

    def cut(p: Array) -> Array:
        V = p.shape[-1]
        order = jnp.argsort(-p, axis=-1)
        ranked = jnp.take_along_axis(p, order, axis=-1)
        k = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, V), V)
        kth = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
        ranked = jnp.where(ranked >= kth, ranked, 0.0)
        crosses = (jnp.cumsum(ranked, axis=-1) > s.top_p[:, None]) & (s.top_p < 1)[:, None]
        ranked = jnp.where(crosses & (jnp.arange(V) > 0)[None], 0.0, ranked)
        return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)

    # Sorting the vocabulary is the one expensive part: only when some row needs it.
    p = jax.lax.cond(jnp.any((s.top_k > 0) | (s.top_p < 1)), cut, lambda p: p, p)
    p = jnp.where(p < s.min_p[:, None] * p.max(-1, keepdims=True), 0.0, p)
    return p / p.sum(-1, keepdims=True)


def choose(
    logits: Float[Array, "B V"], present: Bool[Array, "B V"], s: SamplingArrays, keys: Key[Array, "B"]
) -> Int32[Array, "B"]:
    """Next token: the argmax where temperature is 0 (first index on ties), else a draw with the row's key."""
    greedy = jnp.argmax(penalise(logits, present, s.repetition_penalty), axis=-1)

    def draw() -> Array:
        return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities(logits, present, s)))

    drawn = jax.lax.cond(jnp.any(s.temperature > 0), draw, lambda: greedy)
    return jnp.where(s.temperature > 0, drawn, greedy).astype(jnp.int32)


def finite(logits: Float[Array, "*tokens V"]) -> Bool[Array, "*tokens"]:
    """Whether a choice among these means anything: the argmax of NaN is 0."""
    return jnp.isfinite(logits).all(-1)


def log_probability(logits: Float[Array, "*tokens V"], token: Int[Array, "*tokens"]) -> Float32[Array, "*tokens"]:
    """ln p(token) by the model itself: without penalty, temperature or filters."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def stops(token: Int[Array, "B"], s: SamplingArrays) -> Bool[Array, "B"]:
    """Whether the token is one of its row's stop tokens."""
    return jnp.any(token[:, None] == s.stop_tokens, axis=-1)
