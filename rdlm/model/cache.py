"""Keys and values of past tokens: an explicit pytree, passed in and returned, donated and updated in place.

A token writes one set of core keys and values per recurrence, at index i mod S (docs/semantics.md, Cache policy). Under
"latest" a stopped token is read at its deepest set. So when it stops, that set is copied once into the sets above, and
every later read is a plain slice. Under "skip" a query hides tokens that did not run its recurrence.

During a pass the cache is only read; the pass keeps its new sets (`NewKV`) and writes them once, at its end.

A cache is read as finite numbers only, so that a hidden entry times its weight 0 is 0: a row of the batch may be left
by one text and taken by the next. A text whose keys or values overflow has NaN for logits, by which callers end it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float32, Int, Shaped

from rdlm.config import CachePolicy, ModelConfig
from rdlm.model.attention import HIDDEN
from rdlm.model.kernels import Stored, updated_in_place
from rdlm.model.rounding import rounded_width


def stored_width(width: int) -> int:
    """Columns of the cache for keys or values of `width` elements: from 512 on padded to a multiple of 128.

    A TPU stores tiles of 128 columns anyway (5280 become 5376). Without the padding XLA stores the cache transposed and
    copies it on entry to and exit from every program.
    """
    return width if width < 512 else -(-width // 128) * 128


class KeyValue(NamedTuple):
    """Keys and values of one layer, heads flattened: k [..., T, Hk*Q] (after bias and rotary), v [..., T, K*Q].

    Hk = H when `qk_bias` is on (the bias on keys is per query head, docs/model.md, Block), else K. In int8 a row is one
    of `rounding.to_row`: [..., T, Hk*(Q+2)] and [..., T, K*(Q+2)].
    """

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What later tokens need of earlier ones. The last axis of keys and values may be padded, see `stored_width`."""

    prelude: tuple[KeyValue, ...]  # [B, T, .] per layer
    core: tuple[KeyValue, ...]  # [S, B, T, .] per block that a recurrence runs
    coda: tuple[KeyValue, ...]  # [B, T, .] per layer
    length: Array  # int32 [B], tokens in each row
    depth: Array  # int32 [B, T], recurrences each of them ran
    policy: CachePolicy = dataclasses.field(metadata={"static": True})
    coda_sets: tuple[KeyValue, ...] = ()  # [S, B, T, .] per coda layer or none: the coda as of every recurrence

    @property
    def capacity(self) -> int:
        """Positions T."""
        return self.depth.shape[1]

    @property
    def sets(self) -> int:
        """Sets S per core layer."""
        return self.core[0].k.shape[0]


class NewKV(NamedTuple):
    """Keys and values of one pass over L tokens: as in `Cache`, with L in place of T."""

    prelude: tuple[KeyValue, ...]
    core: tuple[KeyValue, ...]
    coda: tuple[KeyValue, ...]
    coda_sets: tuple[KeyValue, ...] = ()


def row_widths(config: ModelConfig, dtype: DTypeLike) -> tuple[int, int]:
    """Elements of one token's keys and of its values in one layer, in a cache of `dtype`."""
    keys, values = config.key_value_widths
    if jnp.dtype(dtype) != jnp.int8:
        return keys, values
    return rounded_width(keys, config.head_dim), rounded_width(values, config.head_dim)


def stored_dtype(policy: CachePolicy, dtype: DTypeLike) -> jnp.dtype:
    """That of keys and values in the cache of a model which computes in `dtype`."""
    return jnp.dtype(policy.dtype or dtype)


def zeros(config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> KeyValue:
    """Empty keys and values of one layer in a cache of `dtype`, with leading axes `shape`."""
    return KeyValue(*(jnp.zeros((*shape, width), dtype) for width in row_widths(config, dtype)))


def allocate(
    config: ModelConfig,
    policy: CachePolicy,
    sets: int,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    coda_sets: bool = False,
) -> Cache:
    """An empty cache of `capacity` positions and `sets` core sets per layer, for a model that computes in `dtype`.

    coda_sets: also keep what a rule that reads logits needs when a later pass continues the same prompt.
    """
    dtype = stored_dtype(policy, dtype)
    widths = [stored_width(width) for width in row_widths(config, dtype)]

    def layers(count: int, *lead: int) -> tuple[KeyValue, ...]:
        shape = (*lead, batch, capacity)
        return tuple(KeyValue(*(jnp.zeros((*shape, width), dtype) for width in widths)) for _ in range(count))

    return Cache(
        layers(config.prelude_layers),
        layers(config.core_calls, sets),
        layers(config.coda_layers),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, capacity), jnp.int32),
        policy,
        layers(config.coda_layers if coda_sets else 0, sets),
    )


def cache_bytes(
    config: ModelConfig, sets: int, batch: int, capacity: int, dtype: DTypeLike, coda_sets: bool = False
) -> int:
    """Size of what `allocate` makes, whose keys and values are of `dtype`."""
    layers = config.prelude_layers + config.core_calls * sets + config.coda_layers * (1 + sets * coda_sets)
    width = sum(stored_width(width) for width in row_widths(config, dtype))
    return batch * (capacity * (layers * width * jnp.dtype(dtype).itemsize + 4) + 4)


def cached_bias(capacity: int, length: Int[Array, "B"]) -> Float32[Array, "B 1 {capacity}"]:
    """Bias of a cache of T = capacity positions: the first `length` are visible."""
    filled = jnp.arange(capacity)[None] < length[:, None]
    return jnp.where(filled, 0.0, HIDDEN)[:, None]


def skip_bias(depth: Int[Array, "B T"], i: Int[Array, ""] | Int[Array, "B 1"]) -> Float32[Array, "B 1 T"]:
    """Bias that hides tokens of `depth` which ran no recurrence i (lookup "skip")."""
    return jnp.where(depth > i, 0.0, HIDDEN)[:, None]


def stored(
    layers: tuple[KeyValue, ...],
    m: Int[Array, ""] | Int[Array, "R"] | None = None,
    pages: Int[Array, "R P"] | None = None,
) -> tuple[Stored, ...]:
    """For attention: set m of every layer [S, B, T, .], or layers without sets [B, T, .]; in pages, see `Stored`."""
    if m is None:
        return tuple(Stored(x.k[None], x.v[None], jnp.int32(0), pages) for x in layers)
    return tuple(Stored(x.k, x.v, m, pages) for x in layers)


def frozen_set(core_kv: tuple[KeyValue, ...], i: Int[Array, ""]) -> tuple[KeyValue, ...]:
    """Keys and values of stopped tokens at recurrence i: their last write to set i mod S, else the set below it."""
    sets = core_kv[0].k.shape[0]
    m = jnp.where(i < sets, jnp.maximum(i - 1, 0), i % sets)
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, keepdims=False), core_kv)


def write_set(core_kv: tuple[KeyValue, ...], new: tuple[KeyValue, ...], i: Int[Array, ""]) -> tuple[KeyValue, ...]:
    """Put `new` [B, L, .] into set i mod S of each layer's [S, B, L, .]."""
    sets = core_kv[0].k.shape[0]
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i % sets, 0), core_kv, new)


def write(
    target: Shaped[Array, "B T W"] | Shaped[Array, "S B T W"],
    new: Shaped[Array, "... F"],
    row: Int[Array, "*#tokens"],
    position: Int[Array, "*#tokens"],
    sets: Int[Array, "*tokens"] | None = None,
) -> Shaped[Array, "B T W"] | Shaped[Array, "S B T W"]:
    """Write tokens into the cache in place; those with row B or a position of T or more are dropped.

    Args:
      target: of a width W that is at least new's F.
      new: one row for each token, [*tokens, F]; for an axis S in `target` without `sets`, [S, *tokens, F].
      row, position: where each token goes.
      sets: the one set that each goes to.
    """
    # One index over the flattened leading axes: with several, TPU compilers transpose the whole cache first.
    *lead, B, T, F = target.shape
    row, position = jnp.broadcast_arrays(row, position)
    index = jnp.where((row < B) & (position < T), row * T + position, target.size // F)
    if sets is not None:
        index = index + sets * (B * T)
    elif lead:
        index = index[None] + (B * T) * jnp.arange(lead[0]).reshape(-1, *(1,) * index.ndim)
    flat = target.reshape(-1, F).at[index].set(_wide(new, target), mode="drop")
    return updated_in_place(flat.reshape(target.shape))


def _wide(new: Array, target: Array) -> Array:
    """`new` in the dtype and width of `target`, with finite numbers only."""
    new = new.astype(target.dtype)
    if jnp.issubdtype(new.dtype, jnp.floating):
        largest = float(jnp.finfo(new.dtype).max) / 2  # finite in bf16 too, as which a TPU may multiply f32
        new = jnp.nan_to_num(new, posinf=largest, neginf=-largest)
    return jnp.pad(new, [(0, 0)] * (new.ndim - 1) + [(0, target.shape[-1] - new.shape[-1])])


def append(
    cache: Cache,
    new_kv: NewKV,
    steps: Int[Array, "B L"],
    ran: Int[Array, ""],
    start: Int[Array, ""] | Int[Array, "B"],
    count: Int[Array, "B"],
) -> Cache:
    """Write a pass of L tokens behind those in the cache.

    Args:
      cache: donated by callers that loop.
      new_kv: the keys and values of the pass.
      steps: recurrences each token ran.
      ran: recurrences of the pass; sets from `ran` up were not written, and get a copy of the deepest.
      start: one position for all rows (a first pass), or one for each.
      count: how many of the L tokens are real; padding is never visible, and overwritten later.
    """
    sets = cache.sets
    source = jnp.minimum(jnp.arange(sets), jnp.maximum(ran, 1) - 1)

    def put(target: Array, new: Array, lead: int) -> Array:
        if jnp.ndim(start) == 0:
            index: list[Array | int] = [0] * target.ndim
            index[lead + 1] = start
            return lax.dynamic_update_slice(target, _wide(new, target), index)
        rows, columns = jnp.arange(new.shape[lead])[:, None], start[:, None] + jnp.arange(new.shape[lead + 1])[None]
        return write(target, new, rows, columns)

    def filled(new: Array) -> Array:
        return new if sets == 1 else jnp.take(new, source, axis=0)

    return dataclasses.replace(
        cache,
        prelude=jax.tree.map(lambda t, n: put(t, n, 0), cache.prelude, new_kv.prelude),
        core=jax.tree.map(lambda t, n: put(t, filled(n), 1), cache.core, new_kv.core),
        coda=jax.tree.map(lambda t, n: put(t, n, 0), cache.coda, new_kv.coda),
        coda_sets=jax.tree.map(lambda t, n: put(t, filled(n), 1), cache.coda_sets, new_kv.coda_sets),
        depth=put(cache.depth[..., None], steps[..., None], 0)[..., 0],
        length=start + count if jnp.ndim(start) else jnp.where(count > 0, start + count, cache.length),
    )


def entries(cache: Cache, start: Int[Array, ""], count: int) -> tuple[NewKV, Int[Array, "B {count}"]]:
    """Keys and values of `count` positions from `start`, and recurrences of their tokens, as `append` takes them."""

    def cut(x: Array, axis: int = -2) -> Array:
        return lax.dynamic_slice_in_dim(x, start, count, axis)

    new_kv = jax.tree.map(cut, NewKV(cache.prelude, cache.core, cache.coda, cache.coda_sets))
    return new_kv, cut(cache.depth, 1)


def grow(cache: Cache, sets: int, capacity: int) -> Cache:
    """A copy with at least `sets` core sets and `capacity` positions; the cache itself if it has both.

    New sets are copies of the deepest old one, as if they had been there when the tokens were written.
    """
    if sets <= cache.sets and capacity <= cache.capacity:
        return cache
    more = max(capacity - cache.capacity, 0)

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])

    def deeper(x: Array) -> Array:
        return jnp.take(longer(x, 2), jnp.minimum(jnp.arange(max(sets, cache.sets)), cache.sets - 1), axis=0)

    return dataclasses.replace(
        cache,
        prelude=jax.tree.map(lambda x: longer(x, 1), cache.prelude),
        core=jax.tree.map(deeper, cache.core),
        coda=jax.tree.map(lambda x: longer(x, 1), cache.coda),
        depth=longer(cache.depth, 1),
    )
