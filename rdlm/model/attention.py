"""Softmax attention over explicit keys and values (docs/model.md, Block): masks, and the formula itself.

A bias says which keys a query sees: 0 for those it does, `HIDDEN` for the others. It is built once per pass and shared
by all layers and recurrences. What is hidden may hold any number, NaN included (`masked`, `harmless`).
`softmax_attention` serves every platform; `rdlm.model.kernels` holds faster ways to compute the same.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int

from rdlm.model.rounding import Rounded, unrounded

KeysValues = tuple[Float[Array, "B _ Hk Q"] | Rounded, Float[Array, "B _ K Q"] | Rounded, Float32[Array, "#B _ _"]]
"""k [B, T, Hk, Q], v [B, T, K, Q] and bias [B or 1, L or 1, T] of some tokens; Hk is H or K."""

Vectors = TypeVar("Vectors", bound=Array | Rounded)

HIDDEN = -1e30
"""Bias of a key that must not be seen: exp() of it is exactly 0, and differences of two such stay finite."""


def causal_bias(
    segment_ids: Int[Array, "B L"] | None,
    length: int,
    window: int | None = None,
    prefix: Int[Array, "B"] | None = None,
) -> Float32[Array, "#B {length} {length}"]:
    """A token sees itself and earlier tokens of its own segment.

    Args:
      segment_ids: None for one segment per row. 0 is padding, which is never seen, except by itself (so that its
        unused output stays finite).
      length: L.
      window: number of tokens that a token sees, itself included; None: all of them.
      prefix: number of tokens at the start of each row that also see the later ones among them.
    """
    ones = jnp.tril(jnp.ones((length, length), bool))[None]
    if window is not None:
        ones = jnp.triu(ones, 1 - window)
    if prefix is not None:
        within = jnp.arange(length)[None] < prefix[:, None]
        ones = ones | (within[:, :, None] & within[:, None])
    if segment_ids is None:
        visible = ones
    else:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] != 0)
        visible = (ones & same) | jnp.eye(length, dtype=bool)[None]
    return jnp.where(visible, 0.0, HIDDEN)


def softmax_attention(q: Float[Array, "B L H Q"], *parts: KeysValues) -> Float[Array, "B L H*Q"]:
    """softmax(q k / sqrt(Q) + bias) v in f32, over the keys of all `parts` as if they stood side by side.

    Args:
      q: its dtype is that of the result.
      parts: (k, v, bias) each. Of fewer key or value heads, each serves H/K consecutive query heads.
    """
    scores, values = [], []
    for k, v, bias in parts:
        scores.append(scaled_scores(heads_first(q), heads_first(k), bias[:, None]))
        values.append(heads_first(v))
    top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    total, mixed = jnp.zeros(()), jnp.zeros(())
    for x, v in zip(scores, values, strict=True):
        p = jnp.exp(x - top)
        total = total + p.sum(-1, keepdims=True)
        mixed = mixed + weighted_values(p, v)
    return heads_last((mixed / total).astype(q.dtype))


def scaled_scores(
    q: Float[Array, "B H L Q"], k: Float[Array, "B Hk T Q"] | Rounded, bias: Float32[Array, "#B 1 #L T"]
) -> Float32[Array, "B H L T"]:
    """q k / sqrt(Q) + bias, in f32."""
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    scores = jnp.einsum("bknq,bktq->bknt", _by_key(q * scale, k), unrounded(k), preferred_element_type=jnp.float32)
    if isinstance(k, Rounded):
        scores = scores * k.scale.swapaxes(2, 3)
    return masked(scores.reshape(*q.shape[:3], -1), bias)


def _by_key(x: Float[Array, "B H L _"], k: Float[Array, "B K T Q"] | Rounded) -> Float[Array, "B _ _ _"]:
    """`x` with the query heads that a key head serves side by side, so that no key is copied for each of them."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def masked(scores: Float32[Array, "*shape"], bias: Float32[Array, "*#shape"]) -> Float32[Array, "*shape"]:
    """scores + bias, whatever the score of a hidden key is: NaN plus HIDDEN would be NaN."""
    return jnp.where(bias < 0, bias, scores)


def harmless(
    k: Float[Array, "B T Hk Q"] | Rounded, v: Float[Array, "B T K Q"] | Rounded
) -> tuple[Float[Array, "B T Hk Q"] | Rounded, Float[Array, "B T K Q"] | Rounded]:
    """Keys and values that do no harm while hidden: a value's weight is 0 then, and 0 times NaN is NaN.

    Values that are not finite become zeros, and their keys NaN: a query that sees one still gets NaN.
    """
    if isinstance(k, Rounded) or isinstance(v, Rounded):
        assert isinstance(k, Rounded)
        assert isinstance(v, Rounded)
        k_scale, v_scale = _harmless(k.scale, v.scale)
        return Rounded(k.values, k_scale), Rounded(v.values, v_scale)
    return _harmless(k, v)


def _harmless(k: Array, v: Array) -> tuple[Array, Array]:
    broken = ~jnp.isfinite(v).all((-2, -1), keepdims=True)
    return jnp.where(broken, jnp.nan, k), jnp.where(broken, 0, v)


def weighted_values(p: Float32[Array, "B H L T"], v: Float[Array, "B K T Q"] | Rounded) -> Float32[Array, "B H L Q"]:
    """p v, in f32."""
    values, weights = unrounded(v), _by_key(p, v)
    if isinstance(v, Rounded):
        weights = weights * v.scale.swapaxes(2, 3)
    weights = weights.astype(values.dtype)
    mixed = jnp.einsum("bknt,bktq->bknq", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(*p.shape[:3], -1)


def heads_first(x: Vectors) -> Vectors:
    """`x` [B, T, H, Q] as [B, H, T, Q], as batched matrix products want it: CPUs compute them several times faster than
    `jax.nn.dot_product_attention`."""
    made: Vectors = jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), x)
    return made


def for_each_query_head(q: Float[Array, "B _ H Q"], *others: Float[Array, "B _ _ Q"]) -> list[Float[Array, "B H _ Q"]]:
    """Every array as [B, H, T, Q], key and value heads repeated to H."""
    H = q.shape[2]
    return [heads_first(jnp.repeat(x, H // x.shape[2], axis=2)) for x in (q, *others)]


def heads_last(x: Float[Array, "B H L Q"]) -> Float[Array, "B L H*Q"]:
    """Heads side by side, in the order that `proj` reads."""
    B, H, L, Q = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, L, H * Q)
