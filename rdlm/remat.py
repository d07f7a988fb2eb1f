"""What is stored between the forward and the backward pass, and what is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rdlm.config import Remat

KEPT, STATE = "kept", "state"
P = ParamSpec("P")
T = TypeVar("T")


def keep(x: Array) -> Array:
    """Mark an activation that is expensive to recompute: matrix products, attention, sums that norms read."""
    return checkpoint_name(x, KEPT)


def recomputed(step: Callable[P, T], remat: Remat = "none") -> Callable[P, T]:
    """`step` with a backward pass that recomputes what it does not store.

    remat: "none" stores what `keep` marked and recomputes norms, rotations and gates; "offload" stores what is named
    `STATE`, in host memory (TPU); the others store the inputs alone. Weights that `step` closes over are not copied for
    every recurrence of a `scan`.
    """
    policies = jax.checkpoint_policies
    policy = {
        "none": policies.save_only_these_names(KEPT),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[STATE],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }.get(remat)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)
