"""Attention for one platform each: what `rdlm.model.attention.softmax_attention` computes, faster or in less memory.

Every function here agrees with that one, as tests check, and stays only while it gains at least 5 % of a step's time or
memory on its platform. The only file that imports Pallas.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, Int8, Shaped

from rdlm.model.attention import (
    HIDDEN,
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
from rdlm.model.rounding import Rounded, from_row, unrounded
from rdlm.model.split import AXIS
from rdlm.remat import ATTENTION, keep

# Causal attention in blocks, for CPUs and for lengths that the fused kernel does not serve.


def attend(
    q: Float[Array, "B L H Q"],
    k: Float[Array, "B L Hk Q"] | Rounded,
    v: Float[Array, "B L K Q"] | Rounded,
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
    k, v = harmless(k, v)
    return heads_last(_forward(heads_first(q), heads_first(k), heads_first(v), bias[:, None], causal)[0])


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


def _forward(q: Array, k: Array | Rounded, v: Array | Rounded, bias: Array, causal: bool = True) -> tuple[Array, Array]:
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
    q, k, v, out, lse = (keep(x, "attention") for x in (q, k, v, *_forward(q, k, v, bias)))
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
    q, k, v = (keep(x, "attention") for x in for_each_query_head(q * q.dtype.type(Q**-0.5), k, v))
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
            mask,
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            interpret=interpret,
            residual_checkpoint_name=ATTENTION,
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


class Stored(NamedTuple):
    """Keys and values of one layer in a cache, of which every row reads one set.

    k [S, B, n, >= Hk*Q], v [S, B, n, >= K*Q]: as they are stored, floats or what `rounding.to_row` makes of them, in B
    rows of n positions each. pages: int32 [R, P], the rows of the cache that each row of the batch reads, one behind
    the other; those of hidden positions may be outside of the cache. None: row r reads row r alone, and n = T. set:
    int32 scalar, or one for each row that reads pages.
    """

    k: Float[Array, "S B _ _"] | Int8[Array, "S B _ _"]
    v: Float[Array, "S B _ _"] | Int8[Array, "S B _ _"]
    set: Int[Array, ""] | Int[Array, "R"]
    pages: Int[Array, "R P"] | None = None

    def part(self, like: KeysValues, bias: Float32[Array, "#R _ T"], positions: int | None = None) -> KeysValues:
        """A copy of the first `positions` that are read, None: of all, with the heads of `like`."""
        n = bias.shape[-1] if positions is None else positions

        def one(x: Array, like: Array | Rounded) -> Array | Rounded:
            if self.pages is not None:
                rows = self._from_pages(x, n)
            elif len(x) == 1:
                rows = x[0, :, :n]
            else:
                rows = jax.lax.dynamic_slice(x, (self.set, 0, 0, 0), (1, x.shape[1], n, x.shape[-1]))[0]
            _, _, heads, width = like.shape
            if isinstance(like, Rounded):
                found = from_row(rows, heads, width, like.scale.dtype)
                # Finite even of a text that was not: it may be hidden from the next one.
                return dataclasses.replace(found, scale=jnp.where(jnp.isfinite(found.scale), found.scale, 0))
            return rows[..., : heads * width].reshape(*rows.shape[:2], heads, width)

        return one(self.k, like[0]), one(self.v, like[1]), bias[..., :n]

    def in_pages(self, size: int) -> Stored:
        """The same by pages; where there are none, of `size` positions, which T is a multiple of."""
        if self.pages is not None:
            return self
        S, B, T, _ = self.k.shape
        k, v = (x.reshape(S, B * T // size, size, -1) for x in (self.k, self.v))
        return Stored(k, v, self.set, jnp.arange(B * T // size).reshape(B, -1))

    def _from_pages(self, x: Shaped[Array, "S B _ W"], n: int) -> Shaped[Array, "R {n} W"]:
        """The first n positions of every row."""
        assert self.pages is not None
        _, B, size, W = x.shape
        pages = jnp.minimum(self.pages[:, : -(-n // size)], B - 1)
        index = jnp.broadcast_to(self.set, len(pages))[:, None] * B + pages
        rows = x.reshape(-1, size, W).at[index].get(mode="promise_in_bounds")
        return rows.reshape(len(pages), -1, W)[:, :n]


def attend_cached(
    q: Float[Array, "R L H Q"], new: KeysValues, cached: Stored, bias: Float32[Array, "#R _ T"]
) -> Float[Array, "R L H*Q"]:
    """Attention over the tokens of this pass and over cached ones, in one softmax and without joining their arrays.

    Args:
      q: as in `softmax_attention`.
      new: (k, v, bias) of the L tokens of the pass.
      cached: the T tokens in the cache, which are finite. bias: of theirs.

    For decoding: there is no reverse mode where a kernel or a loop of blocks reads the cache.
    """
    if q.shape[1] > 1:  # a token by itself hides from nobody
        new = (*harmless(new[0], new[1]), new[2])
    on_tpu = attend_stored if fits_stored(q, new[1].shape[2], cached) else attend_copied
    return jax.lax.platform_dependent(q, new, cached, bias, cpu=attend_filled, tpu=on_tpu, default=attend_copied)


def attend_copied(
    q: Float[Array, "R L H Q"], new: KeysValues, cached: Stored, bias: Float32[Array, "#R _ T"]
) -> Float[Array, "R L H*Q"]:
    """`attend_cached` from a copy of what is read."""
    attention = attend_flat if q.shape[1] <= FEW_QUERIES else softmax_attention
    return attention(q, cached.part(new, bias), new)


FILLED = 128
"""Positions of a cache up to which a CPU reads all of them, and of a block in which it reads those of a longer one."""


def attend_filled(
    q: Float[Array, "R L H Q"], new: KeysValues, cached: Stored, bias: Float32[Array, "#R _ T"]
) -> Float[Array, "R L H*Q"]:
    """`attend_cached` that reads no more of the cache than each row fills.

    A cache has room for whole conversations, which few rows use. SmolLM2-135M with 16 lanes of 1,024 positions, of
    which 84 are filled, makes 4 times the tokens per second; the model of `make quickstart`, whose cache keeps 8
    recurrences of each token, twice as many as with a copy of the one that is read.

    Several rows go block by block, each block with the rows that reach it. With 16 rows of 9 heads and 1,024 positions
    in pages of 32, this takes 0.07 of the time of reading as many positions as the longest row fills if 1 row is long,
    and 0.8 if all are. A row by itself is read at once, in a third of the time that its blocks take.
    """
    R, T = len(q), bias.shape[-1]
    sizes = [size for size in (FILLED << i for i in range(T.bit_length())) if size < T] + [T]

    def upto(size: int, q: Array, new: KeysValues, cached: Stored, bias: Array) -> Array:
        return softmax_attention(q, cached.part(new, bias, size), new)

    if len(sizes) == 1:
        return upto(T, q, new, cached, bias)
    filled = jnp.broadcast_to(_filled(bias), (R,))
    if R > 1 and (cached.pages is not None or T % FILLED == 0):
        return _in_blocks(q, new, cached, bias, filled)
    branches = [functools.partial(upto, size) for size in sizes]
    return jax.lax.switch((filled.max() > jnp.array(sizes[:-1])).sum(), branches, q, new, cached, bias)


def _in_blocks(
    q: Float[Array, "R L H Q"],
    new: KeysValues,
    cached: Stored,
    bias: Float32[Array, "#R _ T"],
    filled: Int[Array, "R"],
) -> Float[Array, "R L H*Q"]:
    """Attention that reads block i of the rows with more than i blocks filled, and of some others: their number is one
    of few."""
    R, H = len(q), q.shape[2]
    order = jnp.argsort(-filled)
    cached = cached.in_pages(FILLED)
    assert cached.pages is not None
    page = cached.k.shape[2]
    count = max(FILLED // page, 1)  # pages in a block
    size = count * page
    beyond = -cached.pages.shape[1] % count
    pages = jnp.pad(cached.pages[order], ((0, 0), (0, beyond)), mode="edge")
    hidden = ((0, 0), (0, 0), (0, pages.shape[1] * page - bias.shape[-1]))
    bias = jnp.broadcast_to(jnp.pad(bias, hidden, constant_values=HIDDEN), (R, bias.shape[1], pages.shape[1] * page))
    sets, q, bias = jnp.broadcast_to(cached.set, (R,))[order], heads_first(q[order]), bias[order]
    own_k, own_v, own_bias = new
    own = own_k[order], own_v[order], jnp.broadcast_to(own_bias, (R, *own_bias.shape[1:]))[order]

    def read(rows: int, i: Array, so_far: _Softmax) -> _Softmax:
        there = jax.lax.dynamic_slice(pages, (0, i * count), (rows, count))
        seen = jax.lax.dynamic_slice(bias, (0, 0, i * size), (rows, bias.shape[1], size))
        like = own_k[:rows], own_v[:rows], own_bias[:rows]
        part = Stored(cached.k, cached.v, sets[:rows], there).part(like, seen)
        found = jax.tree.map(lambda x: x[:rows], so_far).over(q[:rows], part)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, 0, 0), so_far, found)

    rows = sorted({max(R >> i, 1) for i in range(R.bit_length())})
    branches = [functools.partial(read, n) for n in rows]

    def block(i: Array, so_far: _Softmax) -> _Softmax:
        reach = (filled > i * size).sum()
        return jax.lax.switch((reach > jnp.array(rows[:-1])).sum(), branches, i, so_far)

    shape = (R, H, q.shape[2])
    empty = _Softmax(jnp.full((*shape, 1), HIDDEN), jnp.zeros((*shape, 1)), jnp.zeros((*shape, q.shape[3])))
    found = jax.lax.fori_loop(0, -(-filled.max() // size), block, empty.over(q, own))
    return heads_last((found.mixed / found.total).astype(q.dtype))[jnp.argsort(order)]


class _Softmax(NamedTuple):
    """Attention over some keys, to be continued over more."""

    top: Float32[Array, "R H L 1"]  # highest score
    total: Float32[Array, "R H L 1"]  # sum of exp(score - top)
    mixed: Float32[Array, "R H L Q"]  # values, weighted with these

    def over(self, q: Float[Array, "R H L Q"], part: KeysValues) -> _Softmax:
        """With the keys of `part` too."""
        k, v, bias = part
        scores = scaled_scores(q, heads_first(k), bias[:, None])
        top = jnp.maximum(self.top, scores.max(-1, keepdims=True))
        p, kept = jnp.exp(scores - top), jnp.exp(self.top - top)
        total = self.total * kept + p.sum(-1, keepdims=True)
        return _Softmax(top, total, self.mixed * kept + weighted_values(p, heads_first(v)))


def _filled(bias: Float32[Array, "R _ T"]) -> Int[Array, "R"]:
    """Positions of each row up to the last one that is seen."""
    return jnp.where(bias >= 0, jnp.arange(bias.shape[-1]) + 1, 0).max((1, 2))


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
        scores.append(masked(_scaled(flat.reshape(B, L, H, -1), k), bias[:, :, None]))
    top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    total, out = jnp.zeros(()), jnp.zeros(())
    for x, (_, v, _) in zip(scores, parts, strict=True):
        p = jnp.exp(x - top)
        total = total + p.sum(-1, keepdims=True)
        flat = _flat(v)
        weights = _scaled(p, v).astype(flat.dtype).reshape(B, L * H, -1)
        wide = jnp.einsum("bnt,btd->bnd", weights, flat, preferred_element_type=jnp.float32)
        head = _serves(H, v.shape[2], jnp.float32)[None, None, :, :, None]
        out = out + (wide.reshape(B, L, H, -1, Q) * head).sum(3)
    return (out / total).astype(q.dtype).reshape(B, L, H * Q)


def _flat(x: Float[Array, "B T K Q"] | Rounded) -> Float[Array, "B T _"]:
    x = unrounded(x)
    return row_major(x.reshape(*x.shape[:2], -1))


def _scaled(x: Float32[Array, "B L H T"], by: Float[Array, "B T K Q"] | Rounded) -> Float32[Array, "B L H T"]:
    """`x` times the scales of the vectors that it is of, or is a weight of."""
    if not isinstance(by, Rounded):
        return x
    H, K = x.shape[2], by.shape[2]
    return x * jnp.repeat(by.scale[..., 0].swapaxes(1, 2), H // K, axis=1)[:, None]


def _serves(heads: int, key_heads: int, dtype: DTypeLike) -> Float[Array, "{heads} {key_heads}"]:
    """1 where a key head serves a query head."""
    return jnp.repeat(jnp.eye(key_heads, dtype=dtype), heads // key_heads, axis=0)


STORED_TILE = 128
"""Positions of a row or page of a cache, and columns, of which the kernel of `attend_stored` reads multiples."""
STORED_BLOCK = 3 * 2**19
"""Bytes of keys, and of values, that it reads at once, or those of a tile of positions."""
STORED_MEMORY = 14 * 2**20
"""Bytes of a chip's own memory that it may take."""


def fits_stored(q: Float[Array, "R L H Q"], key_value_heads: int, cached: Stored) -> bool:
    """Whether `attend_stored` serves so many queries and a cache of this shape, in a program of one device."""
    mesh = jax.sharding.get_abstract_mesh()  # the compiler cannot split a kernel over devices
    one_device = AXIS in mesh.manual_axes or set(mesh.axis_sizes) == {1}
    whole = all(n % STORED_TILE == 0 for x in (cached.k, cached.v) for n in x.shape[2:])
    L, H = q.shape[1:3]
    if not one_device or not whole or L > FEW_QUERIES or cached.k.dtype == jnp.int8:
        return False
    width, wide, itemsize = cached.k.shape[-1], cached.v.shape[-1], cached.k.dtype.itemsize
    size, N = _block(cached), L * (H // key_value_heads) * _padded(key_value_heads)
    queries = N * (width * itemsize + 2 * wide * 4 + 3 * size * 4)
    return queries + 2 * size * (width + wide) * itemsize <= STORED_MEMORY


def _block(cached: Stored) -> int:
    """Positions that the kernel reads at once, of one row of the cache."""
    page, width = cached.k.shape[2:]
    most = max(STORED_BLOCK // (width * cached.k.dtype.itemsize), STORED_TILE)
    return next(n for n in (1024, 512, 256, STORED_TILE) if page % n == 0 and n <= most)


def _padded(heads: int) -> int:
    """Rows of whole tiles."""
    return -(-heads // 16) * 16


def attend_stored(
    q: Float[Array, "R L H Q"],
    new: KeysValues,
    cached: Stored,
    bias: Float32[Array, "#R _ T"],
    interpret: bool = False,
) -> Float[Array, "R L H*Q"]:
    """`attend_cached` on a TPU, which reads of the cache the sets and the positions that are seen, where they lie:
    the rows, or pages, of each row of the batch are looked up before their blocks are fetched.

    Without it the set that is read is copied first: in lanes always, elsewhere if the compiler cannot fuse the slice
    with what reads it. For the 3.5B preset `aot_check.py --only decode` then counts 7.0 GiB per recurrence, with the
    kernel 4.3. Of each row it also reads no more blocks than hold tokens.

    As in `attend_flat`, a query per head is spread over the width, so that no head is split. interpret: run it on a
    CPU, slowly, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    R, L, H, Q = q.shape
    own_k, own_v, _ = new
    key_heads, K = own_k.shape[2], own_v.shape[2]
    G = H // K
    B, page, W = cached.k.shape[1:]
    wide = cached.v.shape[-1]
    size = _block(cached)
    rows = _padded(K)  # of the queries at one place in their groups
    N = L * G * rows
    pages = jnp.arange(R)[:, None] if cached.pages is None else jnp.minimum(cached.pages, B - 1)
    P, blocks = pages.shape[1], page // size
    pages, T = pages.astype(jnp.int32).reshape(-1), P * page
    beyond = ((0, 0), (0, 0), (0, T - bias.shape[-1]))  # of the last page
    bias = jnp.broadcast_to(jnp.pad(bias, beyond, constant_values=HIDDEN), (R, bias.shape[1], T))
    chosen = jnp.broadcast_to(cached.set.astype(jnp.int32), (R,))
    last = jnp.maximum(-(-_filled(bias) // size) - 1, 0).astype(jnp.int32)  # block of each row

    # Queries by their place in a group of key heads, each where its own key head lies in the width.
    grouped = (q * q.dtype.type(Q**-0.5)).reshape(R, L, K, G, Q).transpose(0, 1, 3, 2, 4)
    if key_heads == H:  # a key for every query head
        own = jnp.eye(G, dtype=q.dtype)[None, None, :, None, :, None]
        grouped = grouped[:, :, :, :, None] * own
    grouped = jnp.pad(grouped.reshape(R, L * G, -1), ((0, 0), (0, 0), (0, W - key_heads * Q)))

    def owner(width: int, heads: int) -> Array:
        """The key head (of K) that a column belongs to."""
        column = jnp.arange(width)
        return jnp.where(column < heads * Q, column // (Q * heads // K), -1)[None].astype(jnp.int32)

    def kernel(*refs: Any) -> None:
        _, _, last, q, of_k, of_v, bias, k, v, out, statistics, spread, mixed, top, total = refs
        t = pl.program_id(1)

        @pl.when(t == 0)
        def begin() -> None:
            head = jax.lax.broadcasted_iota(jnp.int32, (rows, W), 0)
            for i in range(L * G):
                values = jnp.where(head == of_k[...], q[0, i : i + 1, :].astype(jnp.float32), 0.0)
                spread[i * rows : (i + 1) * rows, :] = values.astype(spread.dtype)
            mixed[...] = jnp.zeros(mixed.shape, mixed.dtype)
            top[...] = jnp.full(top.shape, HIDDEN, top.dtype)
            total[...] = jnp.zeros(total.shape, total.dtype)

        @pl.when(t <= last[pl.program_id(0)])
        def add() -> None:
            contract = (((1,), (1,)), ((), ()))
            scores = jax.lax.dot_general(spread[...], k[0, 0], contract, preferred_element_type=jnp.float32)
            hidden = bias[0][:, None]  # [L or 1, 1, size]
            scores = scores.reshape(L, G * rows, size)
            scores = jnp.where(hidden < 0, hidden, scores)
            highest = jnp.maximum(top[...], scores.max(2).reshape(N, 1))
            p = jnp.where(hidden < 0, 0.0, jnp.exp(scores - highest.reshape(L, G * rows, 1))).reshape(N, size)
            kept = jnp.exp(top[...] - highest)
            total[...] = total[...] * kept + p.sum(1, keepdims=True)
            step = jnp.dot(p.astype(v.dtype), v[0, 0], preferred_element_type=jnp.float32)
            mixed[...] = mixed[...] * kept + step
            top[...] = highest

        @pl.when(t == pl.num_programs(1) - 1)
        def end() -> None:
            head = jax.lax.broadcasted_iota(jnp.int32, (rows, wide), 0)
            for i in range(L * G):
                mine = jnp.where(head == of_v[...], mixed[i * rows : (i + 1) * rows, :], 0.0)
                out[0, i : i + 1, :] = mine.sum(0, keepdims=True)
            statistics[0, :, :STORED_TILE] = jnp.broadcast_to(top[...], (N, STORED_TILE))
            statistics[0, :, STORED_TILE:] = jnp.broadcast_to(total[...], (N, STORED_TILE))

    def block(width: int) -> Any:
        def place(r: Any, t: Any, chosen: Any, pages: Any, last: Any) -> tuple[Any, ...]:
            t = jnp.minimum(t, last[r])
            return chosen[r], pages[r * P + t // blocks], t % blocks, 0

        return pl.BlockSpec((1, 1, size, width), place)

    def whole(*shape: int) -> Any:
        return pl.BlockSpec((1, *shape), lambda r, *_: (r, *(0 for _ in shape)))

    read = R * T * (W + wide) * cached.k.dtype.itemsize
    out, statistics = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(R, T // size),
            in_specs=[
                whole(L * G, W),
                pl.BlockSpec((1, W), lambda *_: (0, 0)),
                pl.BlockSpec((1, wide), lambda *_: (0, 0)),
                pl.BlockSpec(
                    (1, bias.shape[1], size), lambda r, t, chosen, pages, last: (r, 0, jnp.minimum(t, last[r]))
                ),
                block(W),
                block(wide),
            ],
            out_specs=[whole(L * G, wide), whole(N, 2 * STORED_TILE)],
            scratch_shapes=[
                pltpu.VMEM((N, W), q.dtype),
                pltpu.VMEM((N, wide), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((R, L * G, wide), jnp.float32),
            jax.ShapeDtypeStruct((R, N, 2 * STORED_TILE), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(flops=2 * N * R * T * (W + wide), transcendentals=N * R * T, bytes_accessed=read),
        interpret=interpret,
    )(chosen, pages, last, grouped, owner(W, key_heads), owner(wide, K), bias, row_major(cached.k), row_major(cached.v))

    def by_head(x: Array) -> Array:
        """[R, L, G, K, ...] -> [R, H, L, ...]."""
        return x.swapaxes(2, 3).reshape(R, L, H, -1).swapaxes(1, 2)

    mixed = by_head(out[..., : K * Q].reshape(R, L, G, K, Q))
    both = statistics.reshape(R, L, G, rows, 2, STORED_TILE)[:, :, :, :K, :, 0]
    old_top, old_total = jnp.split(by_head(both), 2, axis=-1)
    found = _Softmax(old_top, old_total, mixed).over(heads_first(q), new)
    return heads_last((found.mixed / found.total).astype(q.dtype))


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
