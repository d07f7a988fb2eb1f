"""How far long work is: one line for steps, a bar for bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

import rich.console
import rich.progress

_SECONDS = 15  # between lines where there is no terminal


class Bar:
    """Progress in bytes of input. Use as a context manager."""

    def __init__(self, title: str, total: int, done: int, say: Callable[[str], None]) -> None:
        """`done` of `total` bytes were there before; `say` prints a line."""
        self._title, self._total, self._before, self._done, self._say = title, max(total, 1), done, done, say
        self._start = self._last = time.monotonic()
        self._live: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.DownloadColumn(),
                rich.progress.TransferSpeedColumn(),
                rich.progress.TextColumn("ETA"),
                rich.progress.TimeRemainingColumn(),
            )
            self._live = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
            self._task = self._live.add_task(title, total=self._total, completed=done)

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.set(self._total)
        if self._live:
            self._live.stop()

    def add(self, n: int) -> None:
        """`n` more bytes were read."""
        self.set(self._done + n)

    def set(self, done: int) -> None:
        """`done` bytes are read in all."""
        self._done = min(done, self._total)
        if self._live:
            self._live.update(self._task, completed=self._done)
        elif (now := time.monotonic()) - self._last >= _SECONDS:
            self._last = now
            rate = (self._done - self._before) / (now - self._start)
            left = f", about {(self._total - self._done) / rate:,.0f} s left" if rate > 0 else ""
            self._say(f"{self._title}: {self._done / self._total:.0%}, {rate / 1e6:.1f} MB/s{left}")


class Progress:
    """One line that rewrites itself on a terminal, and a plain line every ten seconds elsewhere."""

    def __init__(self, total: int, out: TextIO | None = None, quiet: bool = False):
        """`total`: steps in all. `quiet`: show nothing, another process does."""
        self.total, self.out, self.quiet = total, out or sys.stderr, quiet
        self.live = self.out.isatty()
        self.printed = 0.0

    def update(self, step: int, text: str, last: bool = False) -> None:
        """Show that `step` steps are done."""
        if self.quiet:
            return
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
        if self.quiet:
            return
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
