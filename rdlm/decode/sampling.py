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
from rdlm.decode.program import host
from rdlm.model.inputs import check_integers, check_numbers, check_shape

GREEDY = 1e-5
"""Temperatures below are greedy."""
MAX_BIASES = 320
"""Most tokens that `Sampling.logit_bias` can name."""
TOP = 20
"""How many of the likeliest tokens a request may ask for."""
_INTEGERS = ("top_k", "min_tokens")
_NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens",
)  # fmt: skip


class SamplingArrays(NamedTuple):
    """`Sampling` with one value per row, so that no value ever recompiles."""

    temperature: Array  # f32 [B]
    top_k: Array  # int32 [B]
    top_p: Array  # f32 [B]
    min_p: Array  # f32 [B]
    repetition_penalty: Array  # f32 [B]
    stop_tokens: Array  # int32 [B, S], padded with -1
    presence_penalty: Array  # f32 [B]
    frequency_penalty: Array  # f32 [B]
    min_tokens: Array  # int32 [B]
    bias_tokens: Array  # int32 [B, MAX_BIASES], padded with -1; [B, 0] where nobody has any
    biases: Array  # f32, of the same shape
    constrained: Array  # bool [B], whether only tokens of `allowed` may come next
    allowed: Array  # uint32 [B, ceil(V / 32)], see `Constraint`; [B, 0] where nobody is constrained


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


def as_arrays(sampling: Sampling, rows: int, vocab_size: int | None = None) -> SamplingArrays:
    """Spread `sampling` over `rows` prompts, on the host.

    vocab_size: makes room for biases and a constraint though there are none, so that all requests of an engine have the
      same shapes.

    Raises:
      InputError: a field out of its range, or with the wrong number of values.
    """
    fields = {
        name: per_row(getattr(sampling, name), rows, f"Sampling.{name}", np.int32 if name in _INTEGERS else np.float32)
        for name in _NUMBERS
    }
    ranges = {
        "temperature": (fields["temperature"] >= 0, "must not be negative"),
        "top_k": (fields["top_k"] >= 0, "must not be negative (0 is off)"),
        "top_p": ((fields["top_p"] > 0) & (fields["top_p"] <= 1), "must be in (0, 1] (1.0 is off)"),
        "min_p": ((fields["min_p"] >= 0) & (fields["min_p"] <= 1), "must be in [0, 1] (0.0 is off)"),
        "repetition_penalty": (
            (fields["repetition_penalty"] > 1e-6) & (fields["repetition_penalty"] < 1e6),
            "must be positive, from 1e-6 to 1e6 (1.0 is off)",
        ),
        "presence_penalty": (np.abs(fields["presence_penalty"]) < 1e6, "must be a number between -1e6 and 1e6"),
        "frequency_penalty": (np.abs(fields["frequency_penalty"]) < 1e6, "must be a number between -1e6 and 1e6"),
        "min_tokens": (fields["min_tokens"] >= 0, "must not be negative (0 is off)"),
    }
    for name, (good, fix) in ranges.items():
        if not np.all(good):
            raise InputError(f"Sampling.{name} = {getattr(sampling, name)!r}: {fix}")
    # Next to 0 the likeliest token has all the probability, and f32 cannot say how small the others' is.
    fields["temperature"] = np.where(fields["temperature"] < GREEDY, 0.0, fields["temperature"]).astype(np.float32)
    each = _stop_rows(sampling.stop_tokens, rows)
    width = max(4, *(len(s) for s in each))
    table = np.asarray([s + [-1] * (width - len(s)) for s in each], np.int32).reshape(rows, width)
    biased, biases = _bias_rows(sampling.logit_bias, rows, vocab_size is not None)
    return SamplingArrays(
        **{k: host(v) for k, v in fields.items()},
        stop_tokens=host(table),
        bias_tokens=host(biased),
        biases=host(biases),
        constrained=host(np.zeros(rows, bool)),
        allowed=host(np.zeros((rows, -(-(vocab_size or 0) // 32)), np.uint32)),
    )


def _bias_rows(given: object, rows: int, any_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens int32, what is added to their logits f32) [rows, .], from pairs or one tuple of pairs per row.

    Raises:
      InputError: neither of these, an id twice, or too many.
    """
    name, form = "Sampling.logit_bias", "must be a tuple of pairs of an id and a number, such as ((2, -100.0),)"
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, (str, bytes)):
        raise InputError(f"{name} = {given!r}: {form}")
    try:
        pairs = len(given) > 0 and all(np.shape(x) == (2,) for x in given)
    except ValueError as error:  # pairs of other things than numbers
        raise InputError(f"{name}: {form}") from error
    if len(given) and not pairs and len(given) != rows:
        raise InputError(f"{name}: expected one tuple of pairs or {rows}, got {len(given)}; it {form}")
    width = MAX_BIASES if any_bias or any(np.size(x) for x in given) else 0
    tokens, biases = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32)
    for row, each in enumerate([given] * rows if pairs or not len(given) else given):
        if np.size(each) == 0:
            continue
        if np.shape(each) != (len(each), 2) or len(each) > MAX_BIASES:
            raise InputError(f"{name}: {form}, at most {MAX_BIASES} of them")
        ids, added = zip(*each, strict=True)
        check_integers(f"{name}: ids", ids, 0)
        check_numbers(name, added)
        if len(set(ids)) < len(ids) or not np.all(np.abs(np.asarray(added, float)) < 1e6):
            raise InputError(f"{name}: an id may be named once, with a number between -1e6 and 1e6")
        tokens[row, : len(ids)], biases[row, : len(ids)] = ids, added
    return tokens, biases


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


def adjusted(
    logits: Float[Array, "B V"], made: Int[Array, "B N"], count: Int[Array, "B"], s: SamplingArrays
) -> Float[Array, "B V"]:
    """Logits with the row's biases and penalties for its new tokens, made[:, :count].

    No stop token comes too early, and no token that the row's constraint forbids.
    """
    used = (s.presence_penalty != 0) | (s.frequency_penalty != 0) | (s.bias_tokens >= 0).any(-1) | s.constrained

    def adjust(logits: Array) -> Array:
        V, rows = logits.shape[1], jnp.arange(len(logits))[:, None]
        new = jnp.where(jnp.arange(made.shape[1])[None] < count[:, None], made, V)
        times = jnp.zeros_like(logits).at[rows, new].add(1, mode="drop")
        logits = logits - s.frequency_penalty[:, None] * times - s.presence_penalty[:, None] * (times > 0)
        logits = logits.at[rows, jnp.where(s.bias_tokens < 0, V, s.bias_tokens)].add(s.biases, mode="drop")
        early = (count < s.min_tokens)[:, None] & (s.stop_tokens >= 0)
        logits = logits.at[rows, jnp.where(early, s.stop_tokens, V)].set(-jnp.inf, mode="drop")
        if s.allowed.shape[1] == 0:
            return logits
        bits = (s.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
        allowed = (bits == 1).reshape(len(logits), -1)[:, :V]
        return jnp.where(allowed | ~s.constrained[:, None], logits, -jnp.inf)

    # Most requests use none of it, and a pass over the vocabulary is not free.
    return jax.lax.cond(jnp.any(used | (count < s.min_tokens)), adjust, lambda x: x, logits)


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


class Likeliest(NamedTuple):
    """The likeliest tokens at a position, by the model itself."""

    tokens: Array  # int32 [..., TOP]; -1 where the vocabulary has no more
    log_probs: Array  # f32 [..., TOP]


def no_likeliest(*shape: int) -> Likeliest:
    """Places for those of `shape` positions."""
    return Likeliest(jnp.full((*shape, TOP), -1, jnp.int32), jnp.zeros((*shape, TOP), jnp.float32))


def likeliest(logits: Float[Array, "B V"], wanted: Bool[Array, "B"]) -> Likeliest:
    """Of every row, if any is `wanted`: sorting the vocabulary is not free."""

    def find(logits: Array) -> Likeliest:
        values, tokens = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
        values = (values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).astype(jnp.float32)
        missing = ((0, 0), (0, TOP - values.shape[-1]))
        return Likeliest(jnp.pad(tokens.astype(jnp.int32), missing, constant_values=-1), jnp.pad(values, missing))

    return jax.lax.cond(jnp.any(wanted), find, lambda logits: no_likeliest(len(logits)), logits)


def stops(token: Int[Array, "B"], s: SamplingArrays) -> Bool[Array, "B"]:
    """Whether the token is one of its row's stop tokens."""
    return jnp.any(token[:, None] == s.stop_tokens, axis=-1)
