"""Reports training steps: metrics.jsonl, the progress line, and skipped updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jax import Array

from rdlm.config import RunConfig
from rdlm.perf.flops import matmul_peak
from rdlm.runtime import Progress
from rdlm.train.faults import Faults, describe
from rdlm.train.metrics import Meter, MetricsWriter


class Reporter:
    """Reports every step while the next one runs: reading the metrics of a step waits until the device has made them.

    `faults` counts the skipped updates of the steps reported so far.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        devices: int,
        modules: list[str],
        faults: Faults,
        progress: Progress,
        say: Callable[[str], None],
    ):
        """`devices`: how many train. `modules`: names for `first_bad` (`faults.modules`)."""
        self.config, self.modules, self.faults = config, modules, faults
        self.progress, self.say = progress, say
        self.writer: MetricsWriter | None = None
        self.meter = Meter(config, matmul_peak() * devices)
        self.pending: tuple[int, Mapping[str, Array]] | None = None

    def report(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Report the step before; keep this one, whose metrics may still be computing."""
        self.flush()
        self.pending = step, metrics

    def flush(self) -> None:
        """Report the step that is kept, if any."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: x.item() for name, x in metrics.items()}
        values |= self.meter.measure(values["n"], values["k"])
        streak = self.faults.streak
        self.faults = self.faults.after(step, values, self.config.faults.patience, self.modules)
        if self.faults.streak > streak:
            self.say(f"update skipped, {self.faults.streak} in a row: {describe(step, values, self.modules)}")
        values = {name: x for name, x in values.items() if name != "first_bad"} | {"skipped": self.faults.skipped}
        self.write(step, {name: x if math.isfinite(x) else None for name, x in values.items()})
        done = step + 1
        self.progress.update(done, self.meter.line(done, values), last=done == self.config.steps)

    @property
    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that the run must roll back."""
        return self.faults.streak >= self.config.faults.patience

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append a row to metrics.jsonl, on the first process."""
        if self.writer:
            self.writer.write(step, values)

    def sync(self) -> None:
        """Force everything written so far to disk."""
        if self.writer:
            self.writer.sync()

    def close(self) -> None:
        """Close the metrics file; a step that is kept is dropped."""
        self.pending = None
        if self.writer:
            self.writer.close()
