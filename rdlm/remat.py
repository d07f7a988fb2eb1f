"""What is stored between the forward and the backward pass, and what is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rdlm.config import InputError, Remat

SUM, ATTENTION, MLP, STATE = "sum", "attention", "mlp", "state"
LADDER: tuple[Remat, ...] = ("none", "attention", "sums", "iteration", "layer")
"""From the most memory to the most recomputation."""

P = ParamSpec("P")
T = TypeVar("T")


def keep(x: Array, name: Literal["sum", "attention", "mlp"]) -> Array:
    """Mark an activation that is expensive to recompute: a residual sum, which norms read; what attention reads or
    returns; or the first product of an MLP.
    """
    return checkpoint_name(x, name)


def recomputed(step: Callable[P, T], remat: Remat = "none") -> Callable[P, T]:
    """`step` with a backward pass that recomputes what it does not store.

    remat: "none" stores what `keep` marked and recomputes norms, rotations and gates; "attention" and "sums" store a
    part of it; "offload" stores what is named `STATE`, in host memory (TPU); the others store the inputs alone. Weights
    that `step` closes over are not copied for every recurrence of a `scan`.

    Raises:
      InputError: "auto", which only a whole run can decide, or an unknown name.
    """
    if remat not in (*LADDER, "offload"):
        raise InputError(f"remat = {remat!r}: must be one of {', '.join(LADDER)}, offload")
    policies = jax.checkpoint_policies
    policy = {
        "none": policies.save_only_these_names(SUM, ATTENTION, MLP),
        "attention": policies.save_only_these_names(SUM, ATTENTION),
        "sums": policies.save_only_these_names(SUM),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[STATE],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }.get(remat)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)
