"""What is stored between the forward and the backward pass, how wide a cache is, and what a CPU process frees."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def keep(x: Array) -> Array:
    """Mark an activation that is dear to recompute: matrix products, attention, sums that norms read."""
    return checkpoint_name(x, KEPT)


def recomputed(step: Callable[..., Any], everything: bool) -> Callable[..., Any]:
    """`step` for a `scan` whose backward pass recomputes what it did not store.

    Args:
      step: any differentiable function.
      everything: store the arguments alone; otherwise also what `keep` marked, so that only norms, rotations and
        gates are done twice. Either way the weights a step closes over are not copied for every step of the scan.
    """
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if everything else policies.save_only_these_names(KEPT)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a training step holds weights and activations.

    fetch(name, stored): the stored parameters of the top-level entry `name` as the computation wants them (whole, and
    in the compute dtype); called where they are used. layers: recompute every block from its input, and fetch its
    weights again, in the backward pass.
    """

    fetch: Callable[[str, Any], Any] = lambda name, stored: stored
    layers: bool = False

    def layer(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """`block`, recomputed in the backward pass where the plan says so."""
        return jax.checkpoint(block) if self.layers else block


PLAIN = Plan()


def stored_width(width: int) -> int:
    """Columns that keys or values of `width` elements take in the cache.

    Large ones fill whole tiles of 128 columns, as a TPU stores them anyway (5280 becomes 5376): left ragged, its
    compilers keep the cache turned around, with a copy of it on the way in and out of every program.
    """
    return width if width < 1024 else -(-width // 128) * 128


def reuse_freed_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it; Linux with glibc only.

    A CPU step frees and asks again for its activations, gigabytes at a time, and every page of them would be cleared
    by the kernel once more. Call it before JAX starts its threads. For processes that repeat one step, not for those
    whose peak memory matters.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # names of <malloc.h>, without their M_
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
