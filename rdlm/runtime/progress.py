"""One progress display for all long work, counted in steps or in bytes of input."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import rich.progress
from rich.console import Console
from rich.progress import TextColumn

_SECONDS = 10.0  # between plain lines


class Progress:
    """Progress on stderr: one live line on a terminal, elsewhere a plain line every ten seconds.

    As a context manager it ends the live line, whichever way the block ends.
    """

    def __init__(
        self,
        total: int,
        title: str = "",
        *,
        done: int = 0,
        unit: Literal["steps", "bytes"] = "steps",
        say: Callable[[str], None] | None = None,
        quiet: bool = False,
    ) -> None:
        """Show nothing yet.

        Args:
          total: steps or bytes in all.
          title: of the work; shown with bytes.
          done: how many of `total` were done by an earlier process.
          unit: "bytes" adds the rate and the time left.
          say: prints a plain line where there is no terminal; None: to stderr.
          quiet: show nothing, because another process does.
        """
        self.total, self.done, self._before, self._bytes = total, done, done, unit == "bytes"
        self._title, self._say, self._quiet = title, say or to_stderr, quiet
        self._start = time.monotonic()
        self._shown = self._start if self._bytes else 0.0
        self._live: rich.progress.Progress | None = None
        if sys.stderr.isatty() and not quiet:
            console = Console(stderr=True)
            self._live = rich.progress.Progress(
                *_columns(self._bytes), console=console, auto_refresh=False, redirect_stdout=False
            )
            self._task = self._live.add_task(title, total=max(total, 1), completed=done, text="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._bytes:
            self.update(self.total)
        self._end()

    def update(self, done: int, text: str = "", last: bool = False) -> None:
        """Show that `done` steps or bytes are done, `text` beside it; `last` ends the display."""
        self.done = done
        now = time.monotonic()
        if self._quiet or (now - self._shown < (0.1 if self._live else _SECONDS) and not last):
            return
        self._shown = now
        with _without_reader():
            if self._live is None:
                self._say(self._plain(done, text))
                return
            if not self._live.live.is_started:
                self._live.start()
                atexit.register(self._live.stop)  # the cursor is hidden while it runs
            self._live.update(self._task, completed=done, text=text, refresh=True)
        if last:
            self._end()

    def advance(self, n: int) -> None:
        """`n` more are done."""
        self.update(self.done + n)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        with _without_reader():
            if self._live is None:
                self._say(text)
            else:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end(self) -> None:
        if self._live is not None and self._live.live.is_started:
            with _without_reader():
                self._live.update(self._task, completed=self.done, refresh=True)
                self._live.stop()

    def _plain(self, done: int, text: str) -> str:
        if not self._bytes:
            return f"step {done:>{len(str(self.total))}}/{self.total}  {text}"
        rate = (done - self._before) / max(time.monotonic() - self._start, 1e-9)
        left = f", about {(self.total - done) / rate:,.0f} s left" if rate > 0 else ""
        return f"{self._title}: {done / max(self.total, 1):.0%}, {rate / 1e6:.1f} MB/s{left}"


def _columns(in_bytes: bool) -> list[rich.progress.ProgressColumn]:
    text = TextColumn("{task.fields[text]}", markup=False)
    if not in_bytes:
        return [TextColumn("step {task.completed:.0f}/{task.total:.0f}"), rich.progress.BarColumn(bar_width=8), text]
    return [
        TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
    ]


def drop_lost_output() -> None:
    """Where the reader of stdout or stderr is gone, a closed terminal or a dead pipe, write to nowhere from now on."""
    for descriptor in (1, 2):
        output = select.poll()
        output.register(descriptor, select.POLLOUT)
        lost = select.POLLERR | select.POLLHUP | select.POLLNVAL
        if any(event & lost for _, event in output.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def _without_reader() -> Iterator[None]:
    """Work does not end because nobody reads how far it is."""
    try:
        yield
    except OSError:
        drop_lost_output()


def to_stderr(line: str) -> None:
    """Print a line there."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """'45s', '3m12s', '2h05m'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
