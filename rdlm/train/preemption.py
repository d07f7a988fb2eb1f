"""When a run stops early: SIGTERM, and how all processes learn of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rdlm import sharding


class Preemption:
    """SIGTERM sets a flag instead of killing; the loop polls it, saves, and exits with code 75."""

    def __init__(self):
        self.requested = False
        self.previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.requested = True

    def restore(self) -> None:
        """Put the previous handler back."""
        signal.signal(signal.SIGTERM, self.previous)


class Stop:
    """Whether to stop: SIGTERM came to any of the processes. All of them get the same answer at the same call.

    Among several processes a call asks the devices and returns the answer to the call before, which they have
    computed while the step ran: nobody waits. Alone it is the flag itself.
    """

    def __init__(self, requested: Callable[[], bool], mesh: Mesh):
        """`requested`: whether it came to this process."""
        self.requested, self.mesh = requested, mesh
        self.asked: Array | None = None
        self.any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

    def __call__(self) -> bool:
        """Call it at the same places on every process."""
        if jax.process_count() == 1:
            return self.requested()
        before = self.asked
        mine = np.full(len(self.mesh.local_devices), self.requested())
        self.asked = self.any(jax.make_array_from_process_local_data(sharding.per_device(self.mesh), mine))
        return before is not None and bool(before)
