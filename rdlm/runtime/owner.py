"""One process at a time in a folder: a lock of the kernel, and a file with a heartbeat where other hosts see no lock.

A lock says at once whether another process of this machine uses the folder, and ends with that process. A mounted
bucket does not pass locks on to other hosts. So the owner also writes `.owner` every few seconds: whoever finds that
file, and cannot know from the lock that its writer is dead, waits until it has changed or been silent for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rdlm.config import InputError
from rdlm.runtime.errors import RunError
from rdlm.runtime.progress import to_stderr

FILE = ".owner"
FIRST_BEAT_SECONDS = 1.0
"""Two that start at once on two hosts both write the file; the one that lost sees it this early."""
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""Without a heartbeat for this long an owner counts as dead."""
OLD_SECONDS = 600.0
"""So old a heartbeat needs no waiting, however the clocks of two hosts differ."""

Check = Callable[[], None]
"""Raises RunError when another process has taken the folder over."""


@contextlib.contextmanager
def owned(folder: Path, way_out: str, say: Callable[[str], None] | None = None) -> Iterator[Check]:
    """Make `folder`, which runs write into, and own it until the block ends.

    Args:
      folder: nobody else may own it meanwhile.
      way_out: what else to do than to wait for the owner.
      say: prints the line that says what is waited for; None: to stderr.

    Raises:
      InputError: another process owns it, or it cannot be made.
    """
    what, path = f"run folder {folder}", folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{what}: cannot be created ({error.strerror}); {way_out}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise InputError(_in_use(what, way_out, _read(path))) from error
        except OSError:  # this file system has no locks
            locked = False
        _wait_for_silence(path, locked, what, way_out, say or to_stderr)
        with _Heartbeat(path, what) as heartbeat:
            yield heartbeat.check
    finally:
        os.close(handle)


class _Heartbeat:
    """Keeps the file of the owner fresh, from a thread."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.me = {**_machine(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.beats = 0
        self.usurper: dict[str, object] | None = None
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._beat_until_the_end, name="owner", daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._beat()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()
        if _read(self.path).get("token") == self.me["token"]:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def check(self) -> None:
        """Raise RunError if another process has taken the folder over."""
        if self.usurper is not None:
            raise RunError(
                f"{self.what}: {_name(self.usurper)} has taken it over, because this one gave no sign of life for "
                f"{SILENT_SECONDS:.0f} s or started at the same time; nothing saved is lost"
            )

    def _beat(self) -> None:
        self.beats += 1
        with contextlib.suppress(OSError):  # a full disk, or a bucket that does not answer: the next beat may succeed
            self.path.write_text(json.dumps({**self.me, "beat": self.beats, "time": time.time()}), encoding="utf-8")

    def _beat_until_the_end(self) -> None:
        pause = FIRST_BEAT_SECONDS
        while not self.end.wait(pause):
            pause = BEAT_SECONDS
            found = _read(self.path)
            if found.get("token", self.me["token"]) != self.me["token"]:
                self.usurper = found
                return
            self._beat()


def _wait_for_silence(path: Path, locked: bool, what: str, way_out: str, say: Callable[[str], None]) -> None:
    """Return when the process that wrote the file, if there is one, is dead."""
    found = _read(path)
    here = {name: found.get(name) for name in _machine()} == _machine()
    written = found.get("time")
    old = isinstance(written, (int, float)) and time.time() - written > OLD_SECONDS
    if not path.exists() or (here and (locked or not _alive(found.get("pid")))) or old:
        return
    say(f"{what}: {_name(found)} was here; waiting {SILENT_SECONDS:.0f} s for a sign of life")
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        now = _read(path)
        if not path.exists():
            return
        if now != found:
            raise InputError(_in_use(what, way_out, now))
        time.sleep(min(1.0, SILENT_SECONDS / 10))


def _machine() -> dict[str, str]:
    """Names one running kernel: a process of another one, or from before a restart, holds no lock of ours."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}


def _alive(pid: object) -> bool:
    """Whether a process of this machine exists; True when that cannot be told."""
    try:
        os.kill(int(str(pid)), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        return True
    return True


def _read(path: Path) -> dict[str, object]:
    """The content of the file; {} if it is not there or half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(owner: dict[str, object]) -> str:
    return f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"


def _in_use(what: str, way_out: str, owner: dict[str, object]) -> str:
    return f"{what}: {_name(owner)} is using it; wait until that ends, or {way_out}"
