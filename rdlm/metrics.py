"""Numbers of a run: JSONL always, TensorBoard when asked, and one live line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rdlm.config import InputError


class MetricsWriter:
    """Appends one JSON object per step to metrics.jsonl, so that a killed run has lost nothing it had printed."""

    def __init__(self, folder: Path, start_step: int, tensorboard: bool = False):
        """Open `folder`/metrics.jsonl, dropping what a lost stretch of the run wrote from `start_step` on.

        Raises:
          InputError: tensorboard without the extra `log`.
        """
        self.path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] < start_step]
        temporary = self.path.with_suffix(".jsonl.partial")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")
        self.events = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard = True: needs the extra `log` (pip install 'rdlm[log]')") from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append {"step": step, **values}."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every row of `folder`/metrics.jsonl; a line cut short by a kill is dropped."""
    return [json.loads(line) for line in _complete_lines(folder / "metrics.jsonl")]


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


class Progress:
    """One line that rewrites itself on a terminal, and a plain line every ten seconds elsewhere."""

    def __init__(self, total: int, out: TextIO | None = None):
        """`total`: steps in all."""
        self.total, self.out = total, out or sys.stderr
        self.live = self.out.isatty()
        self.printed = 0.0

    def update(self, step: int, text: str, last: bool = False) -> None:
        """Show that `step` steps are done."""
        now = time.monotonic()
        if now - self.printed < (0.1 if self.live else 10.0) and not last:
            return
        self.printed = now
        line = f"step {step:>{len(str(self.total))}}/{self.total}  {text}"
        self.out.write(f"\r\x1b[2K{line[:160]}" if self.live else line + "\n")
        if last and self.live:
            self.out.write("\n")
        self.out.flush()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.out.write(f"\r\x1b[2K{text}\n" if self.live else text + "\n")
        self.out.flush()


def duration(seconds: float) -> str:
    """'45s', '3m12s', '2h05m'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
