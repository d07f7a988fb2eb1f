"""A request that gives its lane and its pages to others: copied, kept on the host, and put back bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int, PyTree

from rdlm.config import ModelConfig
from rdlm.decode.lanes import Lanes
from rdlm.decode.program import program
from rdlm.model import Params
from rdlm.model.cache import Cache
from rdlm.model.kernels import updated_in_place

_SHARED = ("cache", "pages", "ticks", "used", "flushes", "since")  # by all lanes
Layers = dict[str, PyTree]  # keys and values by the fields of `Cache`


class Suspended(NamedTuple):
    """What a lane held."""

    row: dict[str, PyTree]  # of everything that has one for each lane; small, and left on the device
    pages: list[Layers]  # on the host, in the order of positions


def suspend(params: Params, config: ModelConfig, lanes: Lanes, lane: int, pages: Sequence[int]) -> Suspended:
    """A copy of what `lane` holds, whose keys and values lie in these pages."""
    # One page after the other: the device may have no memory for all of them.
    copies = [jax.device_get(_page(params, config, lanes, jnp.int32(page))) for page in pages]
    return Suspended(_row(params, config, lanes, jnp.int32(lane)), copies)


def resume(
    params: Params, config: ModelConfig, lanes: Lanes, suspended: Suspended, lane: int, pages: Sequence[int]
) -> Iterator[Lanes]:
    """The lanes, more and more of what was suspended in `lane`, whose pages are these, and more if they are more.

    lanes: donated, as are those that are given before the last.
    """
    yield (lanes := _with_row(params, config, lanes, suspended.row, jnp.int32(lane)))
    for copy, page in zip(suspended.pages, pages, strict=False):
        yield (lanes := _with_page(params, config, lanes, copy, jnp.int32(page)))


def _layers(cache: Cache) -> Layers:
    return {"prelude": cache.prelude, "core": cache.core, "coda": cache.coda}


def _rows(lanes: Lanes) -> dict[str, PyTree]:
    rows = {name: x for name, x in lanes._asdict().items() if name not in _SHARED}
    return rows | {"length": lanes.cache.length, "depth": lanes.cache.depth}


@program("config")
def _row(params: Params, config: ModelConfig, lanes: Lanes, lane: Int[Array, ""]) -> dict[str, PyTree]:
    return jax.tree.map(lambda x: x[lane], _rows(lanes))


@program("config")
def _page(params: Params, config: ModelConfig, lanes: Lanes, page: Int[Array, ""]) -> Layers:
    """[S, size, .] per core layer and [size, .] per other one."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, page, -3, keepdims=False), _layers(lanes.cache))


@program("config", donate="lanes")
def _with_row(params: Params, config: ModelConfig, lanes: Lanes, row: dict[str, PyTree], lane: Int[Array, ""]) -> Lanes:
    made = jax.tree.map(lambda x, y: x.at[lane].set(y), _rows(lanes), row)
    cache = dataclasses.replace(lanes.cache, length=made.pop("length"), depth=made.pop("depth"))
    return lanes._replace(cache=cache, **made)


@program("config", donate="lanes")
def _with_page(params: Params, config: ModelConfig, lanes: Lanes, copy: Layers, page: Int[Array, ""]) -> Lanes:
    def put(x: Array, y: Array) -> Array:
        return updated_in_place(lax.dynamic_update_index_in_dim(x, y, page, x.ndim - 3))

    return lanes._replace(cache=dataclasses.replace(lanes.cache, **jax.tree.map(put, _layers(lanes.cache), copy)))
