"""What is stored between the forward and the backward pass, and what is recomputed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rdlm.config import Gather, Remat

KEPT = "kept"


def keep(x: Array) -> Array:
    """Mark an activation that is dear to recompute: matrix products, attention, sums that norms read."""
    return checkpoint_name(x, KEPT)


def recomputed(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` with a backward pass that recomputes what `keep` did not mark: norms, rotations and gates.

    In a `scan`, the weights it closes over are not copied for every step either.
    """
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)


def _as_is(name: str, x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a training step holds activations, and weights that are split over devices.

    remat: what the backward pass recomputes. gather: "once" fetches the core's weights once for all recurrences and
    sums their gradient once; "weights_once" sums it after every recurrence, which needs no unsharded sum;
    "each" fetches block by block at every use, forward and backward (plain FSDP).
    fetch(name, stored): the stored parameters of the top-level entry `name` as the computation wants them: whole, in
    the compute dtype, differentiable. give_back(name, gradient): its derivative.
    sum_dtype: of the gradient's sum over recurrences; None: the compute dtype.
    """

    remat: Remat = "none"
    gather: Gather = "once"
    fetch: Callable[[str, Any], Any] = _as_is
    give_back: Callable[[str, Any], Any] = _as_is
    sum_dtype: Any = None

    def layer(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """`block`, which the backward pass recomputes from its input, weights fetched again, where the plan says so."""
        return jax.checkpoint(block) if self.remat in ("layer", "offload") else block

    def fetched(self) -> Plan:
        """The same for parameters that `fetch` has been applied to."""
        return dataclasses.replace(self, fetch=_as_is)


PLAIN = Plan()
