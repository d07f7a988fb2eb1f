"""A request that gives its lane and its pages to others: copied, kept on the host, and put back bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int, PyTree

from rdlm.config import ModelConfig
from rdlm.decode.lanes import Lanes
from rdlm.decode.program import copies_of, fetched, for_copy, program
from rdlm.model import Params
from rdlm.model.cache import Cache
from rdlm.model.kernels import updated_in_place

_SHARED = ("cache", "pages", "ticks", "used", "flushes", "since")  # by all lanes
Layers = dict[str, PyTree]  # keys and values by the fields of `Cache`


class Suspended(NamedTuple):
    """What a lane held."""

    row: dict[str, PyTree]  # of everything that has one for each lane; small, and left on the devices of all copies
    pages: list[Layers]  # on the host, in the order of positions


def suspend(params: Params, config: ModelConfig, lanes: Lanes, lane: int, pages: Sequence[int]) -> Suspended:
    """A copy of what `lane` holds, whose keys and values lie in these pages."""
    copy, lane = divmod(lane, lanes.busy.size // copies_of(params))

    def its_own(page: int) -> Layers:
        held = fetched(_page(params, config, lanes, jnp.int32(page)))
        return jax.tree.map(lambda x: np.ascontiguousarray(x[..., copy : copy + 1, :, :]), held)

    # One page after the other: the device may have no memory for all of them.
    kept = [its_own(page) for page in pages]
    return Suspended(_everywhere(_row(params, config, lanes, jnp.int32(lane)), jnp.int32(copy)), kept)


def resume(
    params: Params, config: ModelConfig, lanes: Lanes, suspended: Suspended, lane: int, pages: Sequence[int]
) -> Iterator[Lanes]:
    """The lanes, more and more of what was suspended in `lane`, whose pages are these, and more if they are more.

    lanes: donated, as are those that are given before the last.
    """
    count = copies_of(params)
    number, (copy, lane) = lanes.page_sizes.number // count, divmod(lane, lanes.busy.size // count)
    yield (lanes := _with_row(params, config, lanes, suspended.row, for_copy(params, lane, copy, lanes.busy.size)))
    for kept, page in zip(suspended.pages, pages, strict=False):
        held = jax.tree.map(lambda x: np.repeat(x, count, axis=-3), kept)
        yield (lanes := _with_page(params, config, lanes, held, for_copy(params, page, copy, number)))


def _layers(cache: Cache) -> Layers:
    return {"prelude": cache.prelude, "core": cache.core, "coda": cache.coda}


def _rows(lanes: Lanes) -> dict[str, PyTree]:
    rows = {name: x for name, x in lanes._asdict().items() if name not in _SHARED}
    return rows | {"length": lanes.cache.length, "depth": lanes.cache.depth}


@program("config")
def _row(params: Params, config: ModelConfig, lanes: Lanes, lane: Int[Array, ""]) -> dict[str, PyTree]:
    return jax.tree.map(lambda x: x[lane][None], _rows(lanes))


@jax.jit
def _everywhere(rows: dict[str, PyTree], copy: Int[Array, ""]) -> dict[str, PyTree]:
    """The row of one copy of the model for all of them."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[copy][None], x.shape), rows)


@program("config")
def _page(params: Params, config: ModelConfig, lanes: Lanes, page: Int[Array, ""]) -> Layers:
    """[S, 1, size, .] per core layer and [1, size, .] per other one."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, page, -3), _layers(lanes.cache))


@program("config", donate="lanes")
def _with_row(
    params: Params, config: ModelConfig, lanes: Lanes, row: dict[str, PyTree], lane: Int[Array, "1"]
) -> Lanes:
    made = jax.tree.map(lambda x, y: x.at[lane].set(y, mode="drop"), _rows(lanes), row)
    cache = dataclasses.replace(lanes.cache, length=made.pop("length"), depth=made.pop("depth"))
    return lanes._replace(cache=cache, **made)


@program("config", donate="lanes")
def _with_page(params: Params, config: ModelConfig, lanes: Lanes, kept: Layers, page: Int[Array, "1"]) -> Lanes:
    number, _ = lanes.page_sizes
    at = jnp.minimum(page[0], number - 1)

    def put(x: Array, y: Array) -> Array:
        y = jnp.where(page[0] < number, y, lax.dynamic_index_in_dim(x, at, -3))
        return updated_in_place(lax.dynamic_update_index_in_dim(x, y, at, x.ndim - 3))

    return lanes._replace(cache=dataclasses.replace(lanes.cache, **jax.tree.map(put, _layers(lanes.cache), kept)))
