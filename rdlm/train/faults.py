"""Steps whose loss, gradient or update is not finite.

The compiled step skips them and this module counts them. After `faults.patience` in a row the run rolls back to its
newest good checkpoint and continues with the data after the bad batches; if that does not help, it stops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from rdlm.model import Params
from rdlm.tune import matrix_of

Tree = TypeVar("Tree")

_BACKWARD = ("coda", "ln_f", "C", "core", "low", "adapter", "ln_e", "prelude", "wte")
"""In the order of the backward pass."""


def modules(params: Params) -> list[str]:
    """Names of the top-level modules, in the order in which the backward pass reaches them."""

    def place(name: str) -> tuple[int, int]:
        kind, _, number = re.fullmatch(r"(.+?)(_(\d+))?", matrix_of(name)).groups()  # type: ignore[union-attr]
        return _BACKWARD.index(kind) if kind in _BACKWARD else len(_BACKWARD), -int(number or 0)

    return sorted(params, key=place)


def first_bad(grads: Params) -> Array:
    """Index in `modules` of the first one with a gradient that is not finite, -1 if there is none: int32 scalar."""
    finite = [jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(grads[name])]).all() for name in modules(grads)]
    bad = ~jnp.stack(finite)
    return jnp.where(bad.any(), jnp.argmax(bad).astype(jnp.int32), -1)


def unless(skip: Array, new: Tree, old: Tree) -> Tree:
    """`new` where `skip` (bool scalar) is false, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(skip, o, n), new, old)


class Faults(NamedTuple):
    """Skipped updates of a run. Every checkpoint holds this, so that a resumed run behaves the same.

    skipped: total. streak: in a row, up to now. first: description of the first in the row. last: step of the last one.
    shift: step s reads batch s + shift of the data. origin: step of the last rollback, -1 if there was none.
    """

    skipped: int = 0
    streak: int = 0
    first: str = ""
    last: int = -1
    shift: int = 0
    origin: int = -1

    def after(self, step: int, values: Mapping[str, float], limit: int, names: list[str]) -> Faults:
        """After `step` with these metrics. From `limit` in a row on nothing counts: those steps are thrown away."""
        if self.streak >= limit:
            return self
        if not values["skipped"]:
            return self._replace(streak=0, first="")
        first = self.first if self.streak else describe(step, values, names)
        return self._replace(skipped=self.skipped + 1, streak=self.streak + 1, first=first, last=step)

    @property
    def next_batch(self) -> int:
        """First batch after a rollback: after the last bad one, and after the one that was already running then."""
        return self.last + 2 + self.shift

    def after_rollback(self, step: int) -> Faults:
        """After a rollback to `step`."""
        return self._replace(streak=0, first="", shift=self.next_batch - step, origin=step)


def describe(step: int, values: Mapping[str, float], names: list[str]) -> str:
    """One line about a skipped step."""
    bad = int(values["first_bad"])
    where = f"first gradient not finite (backward order): {names[bad]}" if bad >= 0 else "every gradient is finite"
    return (
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, update norm "
        f"{values['update_norm']}, depth n = {values['n']}, k = {values['k']}, {where}"
    )


def saved_faults(meta: Mapping[str, Any]) -> Faults:
    """The skipped updates that a checkpoint's meta holds; none in checkpoints that are older than this count."""
    return Faults(**meta.get("faults", {}))
