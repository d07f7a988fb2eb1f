"""Keys and values in 8 bits (docs/quantize.md): the vector of a head as integers times one scale.

A row of the cache holds the integers of all heads, then their scales in bfloat16: the low bytes of all, then the high
ones. So it stays one array, which is written, cut, moved and split over devices as one of floats is, and in which a TPU
pads no scales.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int8

SCALE_BYTES = 2
"""Of the scale of a vector."""
LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Vectors `values * scale`, in the place of an array of the shape of `values`."""

    values: Array  # int8 [..., Q]
    scale: Array  # [..., 1], in the dtype of the arithmetic; NaN where a vector was not finite

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Rounded:
        """Some of the vectors, whole ones."""
        return jax.tree.map(lambda x: x[index], self)


def rounded_width(width: int, head_dim: int) -> int:
    """Bytes of the `width` elements of a row."""
    return width + width // head_dim * SCALE_BYTES


def to_row(x: Float[Array, "*tokens H Q"]) -> Int8[Array, "*tokens H*(Q+2)"]:
    """The row that holds x. An element is off by at most half of the scale: the largest magnitude of its vector / 127.

    The scale is rounded before it divides, so its 8 bits cost nothing but a step of at most 1.004 times the size.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    finite = jnp.isfinite(wide).all(-1, keepdims=True)  # on CPUs a maximum may pass over NaN
    scale = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), 1e-30) / LARGEST
    # By a cast to bfloat16 and back, which a compiler may leave out, it would not be the one that is stored.
    scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    values = jnp.where(finite, jnp.round(wide / scale), 0).astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(jnp.where(finite, scale, jnp.nan).astype(jnp.bfloat16), jnp.uint16)
    low, high = ((bits >> shift & 255).astype(jnp.uint8) for shift in (0, 8))
    parts = values, *(jax.lax.bitcast_convert_type(byte, jnp.int8) for byte in (low, high))
    return jnp.concatenate([part.reshape(*x.shape[:-2], -1) for part in parts], -1)


def from_row(row: Int8[Array, "*tokens _"], heads: int, head_dim: int, dtype: DTypeLike) -> Rounded:
    """What a row holds, for arithmetic in `dtype`: vectors [*tokens, H, Q]."""
    width = heads * head_dim
    low, high = (row[..., width + i * heads : width + (i + 1) * heads].astype(jnp.int32) for i in range(SCALE_BYTES))
    scale = jax.lax.bitcast_convert_type(high << 24 | (low & 255) << 16, jnp.float32)
    return Rounded(row[..., :width].reshape(*row.shape[:-1], heads, head_dim), scale[..., None].astype(dtype))


def unrounded(x: Float[Array, "*shape"] | Rounded) -> Float[Array, "*shape"]:
    """The array; of rounded vectors their integers, which every dtype of arithmetic holds, without the scale."""
    return x.values.astype(x.scale.dtype) if isinstance(x, Rounded) else x
