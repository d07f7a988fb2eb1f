"""Metrics of a run (JSONL, optionally TensorBoard) and its speed."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rdlm.config import InputError, RunConfig
from rdlm.perf import flops
from rdlm.runtime import duration, free_name, to_stderr, write_atomically


class MetricsWriter:
    """Appends one JSON object per step to metrics.jsonl, flushed at once: a killed run loses no row."""

    def __init__(
        self, folder: Path, start_step: int, tensorboard: bool = False, say: Callable[[str], None] = to_stderr
    ):
        """Open `folder`/metrics.jsonl, dropping rows from `start_step` on, which the run is about to write again.

        Of a damaged file what can be read is kept, and the file itself under another name; `say` prints the line about
        it.

        Raises:
          InputError: tensorboard without the extra `log`.
        """
        self.path = folder / "metrics.jsonl"
        rows, damaged = _rows(self.path)
        if damaged:
            aside = write_atomically(free_name(self.path, "damaged"), self.path.read_bytes())
            say(
                f"{self.path}: damaged in {len(damaged)} lines, the first is line {damaged[0]}; {len(rows)} rows are "
                f"kept, and the file as it was is now {aside.name}"
            )
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] < start_step))
        self.file = self.path.open("a")
        self.events = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard = True: needs the extra `log` (pip install 'rdlm[log]')") from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append {"step": step, **values}."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Force everything written so far to disk, or to a mounted bucket, which a flush alone does not reach."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every row of `folder`/metrics.jsonl; a line truncated by a kill is dropped.

    Raises:
      InputError: other lines are damaged.
    """
    rows, damaged = _rows(folder / "metrics.jsonl")
    if damaged:
        raise InputError(f"{folder / 'metrics.jsonl'}: line {damaged[0]} is damaged; resume the run, which mends it")
    return rows


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows that can be read, numbers of lines with damage). What follows the last line break was cut by a kill."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        text = line.strip(b"\0")  # what a power cut leaves where a block was not written
        try:
            row = json.loads(text.decode())
        except (ValueError, RecursionError):
            row = None
        whole = isinstance(row, dict) and type(row.get("step")) is int
        if whole:
            rows.append(row)
        if not whole or len(text) < len(line):
            damaged.append(number)
    return rows, damaged


def device_memory() -> dict[str, int]:
    """Bytes in use, and their peak so far, on the fullest device of this process; empty on devices without counters."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
    known = {name: key for name, key in names.items() if stats and all(key in s for s in stats)}
    return {name: max(s[key] for s in stats) for name, key in known.items()}


RECENT = 100
"""Steps over which the percentiles are taken."""


class Meter:
    """Speed of recent steps, without compilation and evaluation."""

    def __init__(self, config: RunConfig, peak: float):
        """`peak`: FLOP/s of all devices."""
        self.config, self.peak = config, peak
        self.tokens = config.data.batch_size * config.data.sequence_length
        self.start = time.monotonic()
        self.last: float | None = None
        self.step_seconds: float | None = None
        self.utilisation = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def restart(self) -> None:
        """Do not count the time since the last step."""
        self.last = None

    def measure(self, n: int, k: int) -> dict[str, float]:
        """Speed of the step that just ended, with depth (n, k); median and 95th percentile of step times; memory."""
        now = time.monotonic()
        seconds, self.last = (None if self.last is None else now - self.last), now
        if seconds is None:
            return {"seconds": round(now - self.start, 3)}
        work = flops.training_flops(self.config.model, n, k, self.config.data.sequence_length) * self.tokens
        mfu = work / seconds / self.peak
        keep = 0.0 if self.step_seconds is None else 0.95
        self.step_seconds = keep * (self.step_seconds or 0.0) + (1 - keep) * seconds
        self.utilisation = keep * self.utilisation + (1 - keep) * mfu
        self.recent.append(seconds)
        p50, p95 = np.percentile(self.recent, (50, 95)).tolist()
        return {
            "tokens_per_second": self.tokens / seconds,
            "mfu": mfu,
            "step_seconds_p50": p50,
            "step_seconds_p95": p95,
            "seconds": round(now - self.start, 3),
            **device_memory(),
        }

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """Text of the progress line."""
        text = f"loss {values['loss']:.3f}  r {values['n']:g}+{values['k']:g}"
        if self.step_seconds:
            left = duration((self.config.steps - step) * self.step_seconds)
            text += f"  {self.tokens / self.step_seconds:,.0f} tok/s  MFU {self.utilisation:.0%}  ETA {left}"
        return text
