"""Steps whose loss or gradient is not finite: skipped in the compiled step, counted here. When they do not end, the run
goes back to its newest good checkpoint and on with the data behind the bad ones; when that does not help, it stops.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_BACKWARD = ("coda", "ln_f", "core", "adapter", "prelude", "wte")  # the order in which gradients reach the modules


def modules(params: Any) -> list[str]:
    """Names of the top-level modules, in the order in which the backward pass reaches them."""

    def place(name: str) -> tuple[int, int]:
        kind, _, number = re.fullmatch(r"(.+?)(_(\d+))?", name).groups()  # type: ignore[union-attr]
        return _BACKWARD.index(kind) if kind in _BACKWARD else len(_BACKWARD), -int(number or 0)

    return sorted(params, key=place)


def first_bad(grads: Any) -> Array:
    """Index in `modules` of the first one with a gradient that is not finite, -1 when there is none: int32 scalar."""
    finite = [jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(grads[name])]).all() for name in modules(grads)]
    bad = ~jnp.stack(finite)
    return jnp.where(bad.any(), jnp.argmax(bad).astype(jnp.int32), -1)


def unless(skip: Array, new: Any, old: Any) -> Any:
    """`new` where `skip` (bool scalar) is false, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(skip, o, n), new, old)


class Faults(NamedTuple):
    """What a run remembers of skipped updates. Saved with every checkpoint, so that a resumed run does the same.

    skipped: in all. streak: in a row, up to now. first: the first of them, in words. last: step of the last of them.
    shift: step s reads batch s + shift of the data. origin: step that the run went back to, -1: it never did.
    """

    skipped: int = 0
    streak: int = 0
    first: str = ""
    last: int = -1
    shift: int = 0
    origin: int = -1

    def after(self, step: int, values: dict[str, Any], limit: int, names: list[str]) -> Faults:
        """After `step` with these metrics. Once `limit` is reached nothing changes it: what follows is thrown away."""
        if self.streak >= limit:
            return self
        if not values["skipped"]:
            return self._replace(streak=0, first="")
        first = self.first if self.streak else describe(step, values, names)
        return self._replace(skipped=self.skipped + 1, streak=self.streak + 1, first=first, last=step)

    @property
    def next_batch(self) -> int:
        """Where the data go on after going back: behind the last bad batch, and the one that was under way then."""
        return self.last + 2 + self.shift

    def back_at(self, step: int) -> Faults:
        """After going back to `step`."""
        return self._replace(streak=0, first="", shift=self.next_batch - step, origin=step)


def describe(step: int, values: dict[str, Any], names: list[str]) -> str:
    """A skipped step in words."""
    bad = values["first_bad"]
    where = f"first gradient not finite (backward order): {names[bad]}" if bad >= 0 else "every gradient is finite"
    return (
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, update norm "
        f"{values['update_norm']}, depth n = {values['n']}, k = {values['k']}, {where}"
    )


def saved_faults(meta: dict[str, Any]) -> Faults:
    """What a checkpoint knows of skipped updates; those of before it was kept: nothing."""
    return Faults(**meta.get("faults", {}))
