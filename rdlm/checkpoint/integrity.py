"""Checks that a checkpoint is read as it was saved: a checksum of all arrays, and one line for every error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from jaxtyping import PyTree

from rdlm.config import InputError, one_line

Meta = dict[str, Any]
"""JSON beside the arrays: config, tokenizer (its hash), step, data, faults, sums, source."""


@contextlib.contextmanager
def naming(path: Path, way_out: str) -> Iterator[None]:
    """Turn every error of the block into one line with the checkpoint's `path` and the `way_out`."""
    try:
        with reading():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {path}: damaged or of another shape ({one_line(error)}); {way_out}") from error


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """After a failure, do not print the errors of Orbax's other reads, whose event loop is closed by then."""
    previous = sys.unraisablehook
    sys.unraisablehook = lambda late: None if "Event loop is closed" in str(late.exc_value) else previous(late)
    yield
    sys.unraisablehook = previous  # only on success: after an exception those errors come later


def as_mapping(meta: PyTree) -> Meta:
    """`meta`, checked to be a JSON object."""
    if not isinstance(meta, dict):
        raise ValueError(f"meta must be a JSON object, not a {type(meta).__name__}")
    return meta


@jax.jit
def bit_sum(tree: PyTree) -> Array:
    """Checksum: the bits of all arrays as unsigned words, added modulo 2^32. The mesh makes no difference."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    sums = [
        jnp.sum(jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]), dtype=jnp.uint32)
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sum(jnp.stack(sums), dtype=jnp.uint32)


def wrong_sum(meta: Meta, **trees: PyTree) -> str:
    """Names the tree that differs from what was saved; "" if none does, or if `meta` has no checksums (old runs)."""
    for name, tree in trees.items():
        if "sums" in meta and int(bit_sum(tree)) != meta["sums"][name]:
            return f"damaged (the bits of {name} differ from those saved)"
    return ""


def reader_alone(handler: Callable[..., ocp.CheckpointHandler]) -> ocp.Checkpointer:
    """Reads this process's part of a checkpoint. Does not wait for others, which may have found it damaged."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def as_abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of `tree` with `shardings`: what to restore into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, shardings)
