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
from jax import Array
from jaxtyping import Key, PyTree

from rdlm.config import InputError, TuneConfig

Params = dict[str, PyTree]
Path = tuple[str, ...]
T = TypeVar("T")

LORA_A, LORA_B = "_lora_a", "_lora_b"
SCALE = "_scale"
"""Ends the name of what scales a quantized matrix, see `rdlm.model.quantize`."""
NAMES = {"wte": "embedding", "ln": "norms", "C": "coda"}
"""Parts whose name differs from the prefix of their entries in the parameters."""


def part_of(entry: str) -> str:
    """The part that a top-level entry of the parameters belongs to: core_3 to core, wte to embedding."""
    first = entry.split("_")[0]
    return NAMES.get(first, first)


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


def begin(params: Params, tune: TuneConfig, key: Key[Array, ""]) -> Params:
    """What learns, before the first step of a run that begins with `params`: parts of them, and low-rank pairs.

    A is uniform in +-1/sqrt(inputs), drawn from the key and its path, and B zero, so that the model is still that of
    `params`. Both are float32.
    """

    def pair(path: Path, x: Array) -> tuple[Array, Array]:
        *stacked, rows, columns = x.shape
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        a = jax.random.uniform(own, (*stacked, rows, tune.lora_rank), jnp.float32, -1, 1) / rows**0.5
        return a, jnp.zeros((*stacked, tune.lora_rank, columns), jnp.float32)

    return join(divide(params, tune)[0], pairs(params, tune, pair))


def combine(learnt: Params, frozen: Params, tune: TuneConfig) -> Params:
    """All parameters as the model takes them: every B times alpha / rank."""

    def scaled(path: Path, x: Array) -> Array:
        return x * (tune.lora_alpha / tune.lora_rank) if path[-1].endswith(LORA_B) else x

    return join(_nested([(path, scaled(path, x)) for path, x in _leaves(learnt)]), frozen)


def merge(params: Params) -> Params:
    """`params` as `combine` returns them, with every low-rank pair added to its matrix, in the matrix's dtype.

    Raises:
      InputError: the matrix is quantized.
    """

    def one(beside: Params, name: str) -> PyTree:
        x = beside[name]
        if isinstance(x, dict):
            return merge(x)
        if name + LORA_A not in beside:
            return x
        if name + SCALE in beside:
            raise InputError(
                f"merge: {name} is quantized ({x.dtype}), and would round the pair; quantize after merging"
            )
        return _added(x, beside[name + LORA_A], beside[name + LORA_B])

    return {name: one(params, name) for name in params if name == matrix_of(name)}


@jax.jit
def _added(w: Array, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(w.dtype, jnp.float32)
    return (w.astype(wide) + jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")).astype(w.dtype)


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
