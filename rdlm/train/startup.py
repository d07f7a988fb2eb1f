"""What a run does until its first step, in seconds."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import jax

COMPILER = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compilation",
}
"""What JAX reports of every program. The last one is short where the program comes from the persistent cache."""


def process_age() -> float:
    """Seconds since this process began; 0 where Linux does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return 0.0


_IMPORTED, _IMPORTS = time.monotonic(), process_age()
_starts = itertools.count()


class StartUp:
    """Seconds of every part of a start, as long as the context lasts. No second is counted twice.

    `imports` is the time from the start of the process until this module was imported: of several processes, until all
    of them were there. Only the first start of a process has it.
    """

    def __init__(self) -> None:
        first = next(_starts) == 0
        self.begun = _IMPORTED if first else time.monotonic()
        self.seconds = defaultdict[str, float](float, imports=_IMPORTS if first else 0.0)

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in COMPILER:
            self.seconds[COMPILER[event]] += duration_secs

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, without what is counted otherwise meanwhile."""
        begun, counted = time.monotonic(), sum(self.seconds.values())
        yield
        self.seconds[name] += time.monotonic() - begun - (sum(self.seconds.values()) - counted)

    def line(self) -> str:
        """'first step after 9.8 s: imports 3.1, compilation 2.2, ...', the longest part first."""
        total = self.seconds["imports"] + time.monotonic() - self.begun
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        parts.append(("the rest", total - sum(self.seconds.values())))
        shown = [f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= 0.05]
        return f"first step after {total:.1f} s: {', '.join(shown)}"
