"""Preemption: a signal asks a run to stop, and all its processes agree on the step at which they do."""

from __future__ import annotations

import signal
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rdlm import sharding
from rdlm.runtime import drop_lost_output, stop_signals


class Preemption:
    """SIGTERM, Ctrl-C and a hang-up set `requested` instead of killing; the loop reads it, saves, and exits with 75.

    A second Ctrl-C interrupts as usual.
    """

    def __init__(self):
        self.requested = False
        self.previous = {number: signal.signal(number, self._note) for number in stop_signals()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGHUP:
            drop_lost_output()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Stop:
    """Whether to stop: a signal came to any process. All processes get the same answer at the same call.

    With several processes a call starts a reduction over the devices and returns the result of the previous call, which
    was computed while the step ran, so no call blocks. A single process reads the flag itself.
    """

    def __init__(self, preemption: Preemption, mesh: Mesh):
        """`preemption`: of this process."""
        self.preemption, self.mesh = preemption, mesh
        self.answer: Array | None = None
        self.any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

    def __call__(self) -> bool:
        """To be called at the same places on every process."""
        requested = self.preemption.requested
        if jax.process_count() == 1:
            return requested
        previous = self.answer
        mine = np.full(len(self.mesh.local_devices), requested)
        self.answer = self.any(jax.make_array_from_process_local_data(sharding.per_device(self.mesh), mine))
        return previous is not None and bool(previous)
