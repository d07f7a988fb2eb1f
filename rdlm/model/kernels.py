"""Attention for one platform each: what `rdlm.model.attention.softmax_attention` computes, faster or in less memory.

Every function here agrees with that one, as tests check, and stays only while it gains at least 5 % of a step's time or
memory on its platform. The only file that imports Pallas.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, Shaped

from rdlm.model.attention import (
    KeysValues,
    for_each_query_head,
    harmless,
    heads_first,
    heads_last,
    masked,
    scaled_scores,
    softmax_attention,
    weighted_values,
)
from rdlm.remat import KEPT, keep

# Causal attention in blocks, for CPUs and for lengths that the fused kernel does not serve.


def attend(
    q: Float[Array, "B L H Q"],
    k: Float[Array, "B L Hk Q"],
    v: Float[Array, "B L K Q"],
    bias: Float32[Array, "#B L L"],
    causal: bool = True,
) -> Float[Array, "B L H*Q"]:
    """`softmax_attention` of L tokens over themselves, without most of the masked half.

    Queries go in blocks, each against the keys up to its own end. The plain formula makes a training step 18 % longer
    on a CPU (processor time, D = 256, 256 tokens, one thread).

    Args:
      q, k, v: as in `softmax_attention`.
      bias: must hide every later token (as `causal_bias` does without a prefix), unless `causal` is False.
    """
    q, k, v = (heads_first(x) for x in (q, *harmless(k, v)))
    return heads_last(_forward(q, k, v, bias[:, None], causal)[0])


def attend_in_training(
    q: Float[Array, "B L H Q"],
    k: Float[Array, "B L Hk Q"],
    v: Float[Array, "B L K Q"],
    bias: Float32[Array, "#B L L"],
) -> Float[Array, "B L H*Q"]:
    """`attend` with its backward pass written out, for reverse mode alone; the bias gets no gradient.

    Without it a CPU multiplies with transposed sides, and the step of `bench/train.py` takes 11 % longer.
    """
    q, k, v = for_each_query_head(q, k, v)
    return heads_last(_causal(q, k, v, bias[:, None]))


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(64, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _forward(q: Array, k: Array, v: Array, bias: Array, causal: bool = True) -> tuple[Array, Array]:
    """q, k, v [B, H, L, Q], bias [B or 1, 1, L, L] -> (output, log-sum-exp of the scores f32 [B, H, L, 1])."""
    outs, lses = [], []
    for start, end in _blocks(q.shape[2]):
        seen = end if causal else k.shape[2]
        scores = scaled_scores(q[:, :, start:end], k[:, :, :seen], bias[:, :, start:end, :seen])
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        outs.append((weighted_values(p, v[:, :, :seen]) / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


@jax.custom_vjp
def _causal(q: Array, k: Array, v: Array, bias: Array) -> Array:
    return _forward(q, k, v, bias)[0]


def _kept(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    q, k, v, out, lse = (keep(x) for x in (q, k, v, *_forward(q, k, v, bias)))
    return out, (q, k, v, bias, out, lse)


def _backward(kept: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    # Probabilities are recomputed from the kept log-sum-exp, so that nothing of size L x L is stored.
    q, k, v, bias, out, lse = kept
    L, scale = q.shape[2], q.dtype.type(q.shape[-1] ** -0.5)
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # Sums over queries have the queries last on their left side: the other way round takes CPUs twice the time.
    q_last, d_out_last = (q * scale).swapaxes(2, 3), d_out.swapaxes(2, 3)
    d_q = []
    d_k = d_v = jnp.zeros(q_last.shape, q.dtype)
    for start, end in _blocks(L):
        rows = (slice(None), slice(None), slice(start, end))
        p = jnp.exp(scaled_scores(q[rows], k[:, :, :end], bias[:, :, start:end, :end]) - lse[rows])
        d_p = jnp.einsum("bhlq,bhtq->bhlt", d_out[rows], v[:, :, :end], preferred_element_type=jnp.float32)
        d_s = (p * (d_p - inner[rows])).astype(q.dtype)
        d_q.append(jnp.einsum("bhlt,bhtq->bhlq", d_s, k[:, :, :end]) * scale)
        d_k = d_k.at[..., :end].add(jnp.einsum("bhql,bhlt->bhqt", q_last[..., start:end], d_s))
        d_v = d_v.at[..., :end].add(jnp.einsum("bhql,bhlt->bhqt", d_out_last[..., start:end], p.astype(q.dtype)))
    return jnp.concatenate(d_q, axis=2), d_k.swapaxes(2, 3), d_v.swapaxes(2, 3), None


_causal.defvjp(_kept, _backward)


# The fused kernel, for training on TPUs.

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
    """`softmax_attention` under `causal_bias` by the fused TPU kernel (splash attention).

    Nothing of size L x L is stored: at 4096 tokens and 55 heads of 96, forward and backward take 675 MiB of
    temporaries, the plain formula 7,056 MiB (compiled for v5e). Padding (segment 0) sees padding before it, not itself
    alone; its output is as finite and as unused.

    Args:
      q, k, v: as in `softmax_attention`; L is a multiple of 128. Inside `jax.shard_map`, where a mesh axis is left to
        the compiler, heads are split over it.
      segments, window: as in `causal_bias`.
      interpret: run it on a CPU, slowly, for tests.
    """
    # Imported here: only training on TPUs needs it, and it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, L, _, Q = q.shape
    out_dtype = q.dtype
    q, k, v = (keep(x) for x in for_each_query_head(q * q.dtype.type(Q**-0.5), k, v))
    segments = jnp.broadcast_to(segments, (B, L))

    def kernel(q: Array, k: Array, v: Array, segments: Array) -> Array:
        size = next(size for size in (512, 256, FLASH_TILE) if L % size == 0)
        sizes = splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_kv_compute=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        )
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
        heads, everywhere = PartitionSpec(None, tuple(split)), PartitionSpec()
        kernel = jax.shard_map(
            kernel, in_specs=(heads, heads, heads, everywhere), out_specs=heads, axis_names=set(split), check_vma=False
        )
    return heads_last(kernel(q, k, v, segments).astype(out_dtype))


# A few queries over a cache, for decoding on TPUs.

FEW_QUERIES = 8
"""Queries per row up to which a TPU reads cached keys and values where they lie instead of splitting their heads."""


def attend_cached(q: Float[Array, "B L H Q"], new: KeysValues, cached: KeysValues) -> Float[Array, "B L H*Q"]:
    """Attention over the tokens of this pass and over cached ones, in one softmax and without joining their arrays.

    Args:
      q: as in `softmax_attention`.
      new, cached: (k, v, bias) of the L tokens of the pass and of the T tokens in the cache, which are finite.
    """
    if q.shape[1] > 1:  # a token by itself hides from nobody
        new = (*harmless(new[0], new[1]), new[2])
    elsewhere = attend_flat if q.shape[1] <= FEW_QUERIES else softmax_attention
    return jax.lax.platform_dependent(q, cached, new, cpu=attend_filled, default=elsewhere)


FILLED = 128
"""Positions of a cache up to which a CPU reads all of them; of a longer one it reads as many as the longest row fills,
rounded up to a power of two."""


def attend_filled(q: Float[Array, "B L H Q"], cached: KeysValues, new: KeysValues) -> Float[Array, "B L H*Q"]:
    """`softmax_attention` that reads no more of the cache than its longest row fills.

    A cache has room for whole conversations, which few rows use. SmolLM2-135M with 16 lanes of 1,024 positions, of
    which 84 are filled, makes 4 times the tokens per second. Where a cache keeps several recurrences, the one that is
    read is copied first, all of it.
    """
    k, v, bias = cached
    T = k.shape[1]
    sizes = [size for size in (FILLED << i for i in range(T.bit_length())) if size < T] + [T]
    if len(sizes) == 1:
        return softmax_attention(q, cached, new)
    filled = jnp.where(bias >= 0, jnp.arange(T) + 1, 0).max()

    def upto(size: int, q: Array, k: Array, v: Array, bias: Array, new: KeysValues) -> Array:
        return softmax_attention(q, (k[:, :size], v[:, :size], bias[..., :size]), new)

    branches = [functools.partial(upto, size) for size in sizes]
    return jax.lax.switch((filled > jnp.array(sizes[:-1])).sum(), branches, q, k, v, bias, new)


def attend_flat(q: Float[Array, "B L H Q"], *parts: KeysValues) -> Float[Array, "B L H*Q"]:
    """`softmax_attention` from keys and values [B, T, K*Q] as the cache keeps them, on a TPU.

    A query per head is spread over the width, zero outside its head, so that plain matrix products serve all heads at
    once. That is H times the arithmetic and still less time than streaming the cache takes (H operations per byte,
    where a chip does 240). Splitting heads of 96 would first copy every key and value into padded tiles: four copies of
    the whole cache in each loop of the 3.5B model, compiled for v5e.
    """
    B, L, H, Q = q.shape
    scores = []
    for k, _, bias in parts:
        spread = jnp.einsum("blhq,hk->bkqlh", q * q.dtype.type(Q**-0.5), _serves(H, k.shape[2], q.dtype))
        flat = jnp.einsum("btd,bdn->bnt", _flat(k), spread.reshape(B, -1, L * H), preferred_element_type=jnp.float32)
        scores.append(masked(flat.reshape(B, L, H, -1), bias[:, :, None]))
    top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    total, out = jnp.zeros(()), jnp.zeros(())
    for x, (_, v, _) in zip(scores, parts, strict=True):
        p = jnp.exp(x - top)
        total = total + p.sum(-1, keepdims=True)
        weights = p.astype(v.dtype).reshape(B, L * H, -1)
        wide = jnp.einsum("bnt,btd->bnd", weights, _flat(v), preferred_element_type=jnp.float32)
        head = _serves(H, v.shape[2], jnp.float32)[None, None, :, :, None]
        out = out + (wide.reshape(B, L, H, -1, Q) * head).sum(3)
    return (out / total).astype(q.dtype).reshape(B, L, H * Q)


def _flat(x: Float[Array, "B T K Q"]) -> Float[Array, "B T K*Q"]:
    return row_major(x.reshape(*x.shape[:2], -1))


def _serves(heads: int, key_heads: int, dtype: DTypeLike) -> Float[Array, "{heads} {key_heads}"]:
    """1 where a key head serves a query head."""
    return jnp.repeat(jnp.eye(key_heads, dtype=dtype), heads // key_heads, axis=0)


def row_major(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, with its last axis contiguous in memory.

    Without it a TPU compiler may store a cache transposed, positions last, where a width does not fill whole tiles, and
    copy all of it into and out of every program.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def updated_in_place(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, an update of a donated array, laid out so that it can take that array's place.

    Where an axis has one element a compiler may choose another order of axes and copy between the two. The barrier: the
    result of a program must not carry a layout constraint of its own, or it cannot take the place of a donated array.
    """
    return jax.lax.optimization_barrier(row_major(x))


def after(reads: Float[Array, "B ..."], mask: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """`mask`, where `reads` is finite: a data dependency that orders a write with this mask after those reads.

    Without it the CPU compiler copies a whole cache that is read and then updated in one loop; it removes optimization
    barriers before it decides that.
    """
    return mask & jnp.isfinite(reads.reshape(len(mask), -1)[:, 0])
