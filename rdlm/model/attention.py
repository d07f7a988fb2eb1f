"""Attention over explicit keys and values. The one file that knows which kernel runs where.

`bias` says who sees whom: 0 where a query may look, a large negative number where it may not. It is built once per
pass (`causal_bias`, `cached_bias`) and shared by every layer and recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float, Float32, Int

from rdlm.remat import KEPT, keep

New = tuple[Float[Array, "B L Hk Q"], Float[Array, "B L K Q"], Float32[Array, "#B L L"]]
"""Keys, values and bias of the L tokens of a pass; Hk is H or K."""
Cached = tuple[Float[Array, "B T Hk Q"], Float[Array, "B T K Q"], Float32[Array, "#B #L T"]]
"""The same of the T tokens in a cache."""

HIDDEN = -1e30
"""Bias of a key that must not be seen: exp() of it is exactly 0, and differences of two such stay finite."""


def causal_bias(
    segment_ids: Int[Array, "B L"] | None, length: int, window: int | None = None
) -> Float32[Array, "#B {length} {length}"]:
    """A token sees itself and earlier tokens of its own segment.

    Args:
      segment_ids: None for one segment per row. 0 is padding: never seen, except by itself (so that its
        own, never used, output stays finite).
      length: L.
      window: tokens it sees, itself included; None: all of them.
    """
    ones = jnp.tril(jnp.ones((length, length), bool))[None]
    if window is not None:
        ones = jnp.triu(ones, 1 - window)
    if segment_ids is None:
        visible = ones
    else:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] != 0)
        visible = (ones & same) | jnp.eye(length, dtype=bool)[None]
    return jnp.where(visible, 0.0, HIDDEN)


def attend(
    q: Float[Array, "B L H Q"],
    k: Float[Array, "B L Hk Q"],
    v: Float[Array, "B L K Q"],
    bias: Float32[Array, "#B L L"],
) -> Float[Array, "B L H*Q"]:
    """Causal softmax attention of L tokens over themselves (spec section 1): scale 1/sqrt(Q), softmax in f32.

    Args:
      q: its dtype is that of the result.
      k: Hk is H or K; each of fewer key heads serves H/Hk consecutive query heads.
      v: likewise.
      bias: must hide every later token (as `causal_bias` does).
    """
    q, k, v = _heads_first(q, k, v)
    return _heads_last(_causal(q, k, v, bias[:, None]))


FLASH_TILE = 128
"""Lengths that the fused kernel serves are multiples of this."""


def fits_flash(length: int) -> bool:
    """Whether the fused kernel serves sequences of `length` tokens."""
    return length % FLASH_TILE == 0


def attend_flash(
    q: Float[Array, "B L H Q"],
    k: Float[Array, "B L Hk Q"],
    v: Float[Array, "B L K Q"],
    segments: Int[Array, "#B L"],
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H*Q"]:
    """`attend` by the fused TPU kernel (splash attention): nothing of size L x L is ever stored.

    Padding (segment 0) sees padding before it, not itself alone; its output is as finite and as unused.

    Args:
      q, k, v: as in `attend`; L is a multiple of 128. Inside `jax.shard_map`, where a mesh axis is left to the
        compiler, heads are split over it.
      segments, window: as in `causal_bias`.
      interpret: run it on a CPU, slowly, for tests.
    """
    # Imported here: a second that only TPU training needs to spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, L, _, Q = q.shape
    out_dtype = q.dtype
    q = q * q.dtype.type(Q**-0.5)
    q, k, v = (keep(x) for x in _heads_first(q, k, v))
    segments = jnp.broadcast_to(segments, (B, L))

    def kernel(q: Array, k: Array, v: Array, segments: Array) -> Array:
        size = next(size for size in (512, 256, FLASH_TILE) if L % size == 0)
        sizes = splash.BlockSizes(
            block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
            block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size,
        )  # fmt: skip
        seen = splash_mask.CausalMask((L, L)) if window is None else splash_mask.LocalMask((L, L), (window - 1, 0), 0)
        mask = splash_mask.MultiHeadMask([seen] * q.shape[1])
        run = splash.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret, residual_checkpoint_name=KEPT
        )
        return jax.vmap(run)(q, k, v, splash.SegmentIds(segments, segments))

    mesh = jax.sharding.get_abstract_mesh()
    split = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    split = [a for a in split if mesh.shape[a] > 1] if mesh.manual_axes else []
    if split:  # a kernel is opaque to the compiler, so its heads are split by hand
        heads, whole = PartitionSpec(None, tuple(split)), PartitionSpec()
        kernel = jax.shard_map(
            kernel, in_specs=(heads, heads, heads, whole), out_specs=heads, axis_names=set(split), check_vma=False
        )
    return _heads_last(kernel(q, k, v, segments).astype(out_dtype))


def attend_cached(q: Float[Array, "B L H Q"], new_kv: New, cached_kv: Cached) -> Float[Array, "B L H*Q"]:
    """Attention over this pass's tokens and over cached ones, in one softmax and without joining their arrays.

    Args:
      q: its dtype is that of the result.
      new_kv, cached_kv: (k, v, bias) as in `attend`, of the L tokens of the pass and of the T tokens in the cache.
    """
    if q.shape[1] > FEW_QUERIES:
        return _cached_by_heads(q, new_kv, cached_kv)
    return jax.lax.platform_dependent(q, new_kv, cached_kv, cpu=_cached_by_heads, default=_cached_flat)


FEW_QUERIES = 8
"""Queries per row up to which reading cached keys and values as they lie beats turning them heads first."""


def _cached_by_heads(q: Array, new_kv: New, cached_kv: Cached) -> Array:
    parts = []
    for k, v, bias in (cached_kv, new_kv):
        wide_q, k, v = _heads_first(q, k, v)
        parts.append((_scores(wide_q, k, bias[:, None]), v))

    def mix(p: Array, v: Array) -> Array:
        return jnp.einsum("bhlt,bhtq->bhlq", p.astype(v.dtype), v, preferred_element_type=jnp.float32)

    return _heads_last(_one_softmax(parts, mix).astype(q.dtype))


def _cached_flat(q: Array, new_kv: New, cached_kv: Cached) -> Array:
    """The same from keys and values [B, T, K*Q] as the cache keeps them, on a TPU.

    A query per head is spread over the width, zero outside its head, so that plain matrix products serve all heads at
    once. That is H times the arithmetic and still less time than streaming the cache takes (H operations per byte,
    where a chip does 240); splitting heads of 96 would copy every key and value into padded tiles first.
    """
    B, L, H, Q = q.shape
    parts = []
    for k, v, bias in (cached_kv, new_kv):
        spread = jnp.einsum("blhq,hk->bkqlh", q * q.dtype.type(Q**-0.5), _serves(H, k.shape[2], q.dtype))
        scores = jnp.einsum("btd,bdn->bnt", _flat(k), spread.reshape(B, -1, L * H), preferred_element_type=jnp.float32)
        parts.append((scores.reshape(B, L, H, -1) + bias[:, :, None], v))

    def mix(p: Array, v: Array) -> Array:
        p = p.astype(v.dtype).reshape(B, L * H, -1)
        wide = jnp.einsum("bnt,btd->bnd", p, _flat(v), preferred_element_type=jnp.float32)
        mine = _serves(H, v.shape[2], jnp.float32)[None, None, :, :, None]
        return (wide.reshape(B, L, H, -1, Q) * mine).sum(3)

    return _one_softmax(parts, mix).astype(q.dtype).reshape(B, L, H * Q)


def _one_softmax(parts: list[tuple[Array, Array]], mix: Callable[[Array, Array], Array]) -> Array:
    """Softmax over the scores [..., T] of both parts (scores, v) as if they stood side by side, times their values.

    mix(p, v): unnormalised probabilities [..., T] times v, f32 [..., Q].
    """
    top = jnp.maximum(parts[0][0].max(-1, keepdims=True), parts[1][0].max(-1, keepdims=True))
    total, out = jnp.zeros(()), jnp.zeros(())
    for scores, v in parts:
        p = jnp.exp(scores - top)
        total = total + p.sum(-1, keepdims=True)
        out = out + mix(p, v)
    return out / total


def _flat(x: Array) -> Array:
    # Left alone, the compiler may turn a whole cache so that positions come last when a width fills no tiles.
    return with_layout_constraint(x.reshape(*x.shape[:2], -1), Layout((0, 1, 2)))


def _serves(heads: int, key_heads: int, dtype: Any) -> Array:
    """[H, K]: 1 where key head k serves query head h."""
    return jnp.repeat(jnp.eye(key_heads, dtype=dtype), heads // key_heads, axis=0)


def _heads_first(q: Array, k: Array, v: Array) -> list[Array]:
    # [B, H, L, Q]: plain batched matmuls, several times faster on CPU than dot_product_attention.
    H = q.shape[2]
    return [jnp.repeat(x, H // x.shape[2], axis=2).transpose(0, 2, 1, 3) for x in (q, k, v)]


def _heads_last(out: Array) -> Array:
    B, H, L, Q = out.shape
    return out.transpose(0, 2, 1, 3).reshape(B, L, H * Q)


def _scores(q: Array, k: Array, bias: Array) -> Array:
    scale = q.shape[-1] ** -0.5
    return jnp.einsum("bhlq,bhtq->bhlt", q * q.dtype.type(scale), k, preferred_element_type=jnp.float32) + bias


# The causal kernel on plain matmuls, forward and backward written out. Queries go in blocks, each against the keys up
# to its own end, so most of the masked half is never computed.

Saved = tuple[Array, Array, Array, Array, Array, Array]


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(64, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@jax.custom_vjp
def _causal(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """q, k, v [B, H, L, Q], bias [B or 1, 1, L, L] -> [B, H, L, Q]."""
    return _forward(q, k, v, bias)[0]


def _forward(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Saved]:
    outs, lses = [], []
    for start, end in _blocks(q.shape[2]):
        scores = _scores(q[:, :, start:end], k[:, :, :end], bias[:, :, start:end, :end])
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        out = jnp.einsum("bhlt,bhtq->bhlq", p.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    q, k, v, out, lse = (keep(x) for x in (q, k, v, jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)))
    return out, (q, k, v, bias, out, lse)


def _backward(saved: Saved, d_out: Array) -> tuple[Array, Array, Array, None]:
    # Probabilities are recomputed from the saved log-sum-exp: nothing of size L x L is kept between the passes.
    q, k, v, bias, out, lse = saved
    L, scale = q.shape[2], q.dtype.type(q.shape[-1] ** -0.5)
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # Sums over queries want the queries last on their left side: CPU matmuls take half the time of the other way round.
    q_last, d_out_last = (q * scale).swapaxes(2, 3), d_out.swapaxes(2, 3)
    d_q, d_k, d_v = [], jnp.zeros(()), jnp.zeros(())
    for start, end in reversed(_blocks(L)):  # the first of them sees every key, the others are added to their part
        rows = (slice(None), slice(None), slice(start, end))
        p = jnp.exp(_scores(q[rows], k[:, :, :end], bias[:, :, start:end, :end]) - lse[rows])
        d_p = jnp.einsum("bhlq,bhtq->bhlt", d_out[rows], v[:, :, :end], preferred_element_type=jnp.float32)
        d_s = (p * (d_p - inner[rows])).astype(q.dtype)
        d_q.append(jnp.einsum("bhlt,bhtq->bhlq", d_s, k[:, :, :end]) * scale)
        more_k = jnp.einsum("bhql,bhlt->bhqt", q_last[..., start:end], d_s)
        more_v = jnp.einsum("bhql,bhlt->bhqt", d_out_last[..., start:end], p.astype(q.dtype))
        d_k, d_v = (more_k, more_v) if end == L else (_added(d_k, more_k), _added(d_v, more_v))
    return jnp.concatenate(d_q[::-1], axis=2), d_k.swapaxes(2, 3), d_v.swapaxes(2, 3), None


def _added(total: Array, more: Array) -> Array:
    """`total` with `more` added to the first of its last axis."""
    start = total[..., : more.shape[-1]]
    return jax.lax.dynamic_update_slice_in_dim(total, start + more, 0, axis=-1)


_causal.defvjp(_forward, _backward)
