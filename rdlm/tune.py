"""Which parameters learn: parts of the tree, and low-rank pairs beside its matrices (docs/training.md).

Parameters are nested dicts, and so are the two parts of them: what learns and what is frozen. `divide` and `join` go
back and forth. The low-rank pair of a matrix NAME lies beside it as NAME_lora_a and NAME_lora_b, and the model computes
x NAME + (x NAME_lora_a) NAME_lora_b without forming their sum (`rdlm.model.blocks.linear`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key, PyTree, UInt32

from rdlm.config import TuneConfig

Params = dict[str, PyTree]
Path = tuple[str, ...]
T = TypeVar("T")

LORA_A, LORA_B = "_lora_a", "_lora_b"
NAMES = {"wte": "embedding", "ln_e": "norms", "ln_f": "norms", "C": "coda"}
"""Parts that are not called as their entry of the parameters."""


def part_of(entry: str) -> str:
    """The part that a top-level entry of the parameters belongs to: core_3 to core, wte to embedding."""
    return NAMES.get(entry, entry.split("_")[0])


def matrix_of(name: str) -> str:
    """The name of the matrix that half of a low-rank pair belongs to; other names as they are."""
    return name.removesuffix(LORA_A).removesuffix(LORA_B)


def target_of(path: Path) -> str:
    """What `tune.lora_targets` calls the parameter at `path`, if it is one."""
    return "adapter" if path in (("adapter",), ("adapter", "B")) else ".".join(path[-2:])


def learns(tune: TuneConfig, path: Path) -> bool:
    """Whether the parameter at `path` learns."""
    if path[-1] != matrix_of(path[-1]):
        return True
    if not tune.only:
        return not tune.lora_rank
    return part_of(path[0]) in tune.only or (path[-1] == "scale" and "norms" in tune.only)


def divide(params: Params, tune: TuneConfig) -> tuple[Params, Params]:
    """(what learns, what is frozen), each without the dicts that would be empty."""
    leaves = list(_leaves(params))
    learnt = [leaf for leaf in leaves if learns(tune, leaf[0])]
    return _nested(learnt), _nested([leaf for leaf in leaves if not learns(tune, leaf[0])])


def join(one: Params, other: Params) -> Params:
    """The tree of which `one` and `other` are parts; they share no leaf."""
    both = {name: join(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def pick(tree: Params, like: Params) -> Params:
    """The part of `tree` whose leaves are where `like` has some."""
    return {name: pick(tree[name], x) if isinstance(x, dict) else tree[name] for name, x in like.items()}


def pairs(params: Params, tune: TuneConfig, make: Callable[[Path, Any], tuple[T, T]]) -> Params:
    """A tree of what `make(path, matrix)` returns for the A and B of every matrix that gets a pair.

    These are the targets of `tune` in parts that do not learn in full.
    """
    made = []
    for path, x in _leaves(params):
        if tune.lora_rank and target_of(path) in tune.targets and not learns(tune, path):
            a, b = make(path, x)
            made += [((*path[:-1], path[-1] + LORA_A), a), ((*path[:-1], path[-1] + LORA_B), b)]
    return _nested(made)


def fresh_pairs(shapes: Params, tune: TuneConfig, key: Key[Array, ""]) -> Params:
    """The low-rank pairs before the first step, f32, of parameters of these shapes.

    A is uniform in +-1/sqrt(inputs), drawn from the key and its path, and B zero, so that the model is still its base.
    """

    def pair(path: Path, x: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        *stacked, rows, columns = x.shape
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        a = jax.random.uniform(own, (*stacked, rows, tune.lora_rank), jnp.float32, -1, 1) / rows**0.5
        return a, jnp.zeros((*stacked, tune.lora_rank, columns), jnp.float32)

    return pairs(shapes, tune, pair)


def combine(learnt: Params, frozen: Params, tune: TuneConfig) -> Params:
    """All parameters as the model takes them: every B times alpha / rank."""

    def scaled(path: Path, x: Array) -> Array:
        return x * (tune.lora_alpha / tune.lora_rank) if path[-1].endswith(LORA_B) else x

    return join(_nested([(path, scaled(path, x)) for path, x in _leaves(learnt)]), frozen)


def merge(params: Params) -> Params:
    """`params` as `combine` returns them, with every low-rank pair added to its matrix, in the matrix's dtype."""

    def one(beside: Params, name: str) -> PyTree:
        x = beside[name]
        if isinstance(x, dict):
            return merge(x)
        return _added(x, beside[name + LORA_A], beside[name + LORA_B]) if name + LORA_A in beside else x

    return {name: one(params, name) for name in params if name == matrix_of(name)}


@jax.jit
def _added(w: Array, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(w.dtype, jnp.float32)
    return (w.astype(wide) + jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")).astype(w.dtype)


def digest(params: Params) -> str:
    """16 hexadecimal digits that tell parameters apart by every bit, their places and names; the same on any mesh."""
    return "".join(f"{int(word):08x}" for word in np.asarray(_digest(params)))


@jax.jit
def _digest(params: Params) -> UInt32[Array, "2"]:
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    total = jnp.zeros(2, jnp.uint32)
    for path, x in _leaves(params):
        bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)  # by dimension: a flat view of a sharded array would assemble it
        for dim, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        salt = zlib.crc32(f"{'/'.join(path)} {x.shape} {x.dtype}".encode())
        for i in range(2):
            mixed = _mixed(bits + _mixed(place + jnp.uint32(zlib.crc32(bytes([i]), salt))))
            total = total.at[i].add(jnp.sum(mixed, dtype=jnp.uint32))
    return total


def _mixed(x: Array) -> Array:
    """A one-to-one map of 32-bit words whose every output bit depends on all input bits (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _leaves(tree: Params, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for name in sorted(tree):  # as JAX orders them
        here = (*path, name)
        yield from _leaves(tree[name], here) if isinstance(tree[name], dict) else ((here, tree[name]),)


def _nested(leaves: list[tuple[Path, Any]]) -> Params:
    tree: Params = {}
    for path, x in leaves:
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = x
    return tree
