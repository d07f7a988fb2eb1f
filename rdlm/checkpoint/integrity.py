"""What is read back is what was saved: one line for whatever goes wrong, and sums of all stored bits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rdlm.config import InputError, one_line


@contextlib.contextmanager
def naming(path: Any, way_out: str) -> Iterator[None]:
    """Name the checkpoint, and the way out, in whatever goes wrong while reading it."""
    try:
        with reading():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {path}: damaged or of another shape ({one_line(error)}); {way_out}") from error


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """After the first failure, reads still under way report to an event loop that is gone: nothing to tell anyone."""
    previous = sys.unraisablehook
    sys.unraisablehook = lambda late: None if "Event loop is closed" in str(late.exc_value) else previous(late)
    yield
    sys.unraisablehook = previous  # not after an exception: they come later


def as_mapping(meta: Any) -> dict[str, Any]:
    """`meta`, which must be an object of JSON."""
    if not isinstance(meta, dict):
        raise ValueError(f"an object was saved, this is a {type(meta).__name__}")
    return meta


@jax.jit
def bit_sum(tree: Any) -> Array:
    """All bits of all arrays as unsigned words, added up modulo 2^32: the same on any mesh, in any order of adding."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    sums = [
        jnp.sum(jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]), dtype=jnp.uint32)
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sum(jnp.stack(sums), dtype=jnp.uint32)


def wrong_sum(meta: dict[str, Any], **trees: Any) -> str:
    """Which of the trees is not what was saved; "" when all are, or when it was saved before sums were kept."""
    for name, tree in trees.items():
        if "sums" in meta and int(bit_sum(tree)) != meta["sums"][name]:
            return f"damaged (other bits in {name} than were saved)"
    return ""


def as_abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with `shardings`, as restore targets."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, shardings)
