"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from rdlm.config import InputError, local_path


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` so that the file is complete, or as it was before; returns the path.

    A link is followed: the file it leads to is written, and it stays a link.

    Raises:
      OSError: it cannot be written.
    """
    real = Path(os.path.realpath(path))
    partial = _partial(real)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # the name must not outlive the content
        partial.replace(real)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_output(path: Path, content: str | bytes) -> Path:
    """Write a file that the user asked for, atomically and with its folder; returns the path.

    Raises:
      InputError: it cannot be written, or is a folder.
    """
    path = local_path(path)
    if path.is_dir():
        raise InputError(f"{path}: cannot be written, it is a folder; give the name of a file")
    try:
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def require_empty(folder: Path) -> None:
    """Raise InputError if `folder` exists, unless it is an empty folder."""
    folder = local_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; choose another")


@contextlib.contextmanager
def complete_folder(final: Path, field: str = "", alike: bool = True) -> Iterator[Path]:
    """Yield a new folder beside `final` to fill; it is renamed to `final` when the block ends without an error.

    So `final` is never seen half-written. Several processes may build the same folder at once: each fills its own, the
    first to finish renames it, the others delete theirs. On an error the temporary folder is deleted; that of a killed
    process, `.NAME.partial-*`, when the same folder is built again.

    Args:
      final: the folder.
      field: of the configuration that says where it lies; named in the message.
      alike: whoever else builds this folder fills it with the same; False: only the first to finish may.

    Raises:
      InputError: the disk refuses (permissions, space, a file where a folder should be), or another process that may
        have filled it otherwise was first.
    """
    final = Path(os.path.realpath(local_path(final, field)))  # a link is followed, not replaced
    try:
        with scratch_folder(final.parent, final.name) as scratch:
            partial = scratch / "new"  # a run folder that is written here has its own lock
            partial.mkdir()
            yield partial
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
                if not alike:
                    raise InputError(f"{final}: another process made it meanwhile; choose another folder") from None
    except OSError as error:
        where = f"set {field}" if field else "choose another folder"
        raise InputError(
            f"{final}: cannot be written ({error.strerror or error}); free space, fix permissions or {where}"
        ) from error


@contextlib.contextmanager
def scratch_folder(place: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder in `place` to write NAME in. At the end it is deleted, unless it has been renamed.

    Those that killed processes of this machine left for the same name are deleted first. A lock, which ends with its
    process, tells them from those that are being written.

    Raises:
      OSError: it cannot be made.
    """
    place.mkdir(parents=True, exist_ok=True)
    mine = f".{name}.partial-{_machine()}-"
    for left in place.iterdir():
        if re.fullmatch(re.escape(mine) + "[0-9a-f]{12}", left.name) and not left.is_symlink():
            with _locked(left) as dead:
                if dead:
                    shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = place / f"{mine}{uuid.uuid4().hex[:12]}"
        folder.mkdir()
        with _locked(folder) as locked:
            if locked is False:  # another process took it for one that was left, before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def is_scratch(path: Path, name: str) -> bool:
    """Whether `scratch_folder` made this path for NAME."""
    return bool(re.fullmatch(re.escape(f".{name}.partial-") + "[0-9a-f]{8}-[0-9a-f]{12}", path.name))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder; yields False if another process has locked or deleted it, None if it cannot be locked here."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked: bool | None = folder.exists() and os.path.samestat(folder.stat(), os.fstat(handle))
        except BlockingIOError:
            locked = False
        except OSError:  # this file system has no locks
            locked = None
        yield locked
    finally:
        os.close(handle)


def _machine() -> str:
    """Of 8 hexadecimal digits: locks of other machines may not be seen here."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def set_aside(path: Path) -> Path:
    """Rename a file that this project did not write, so that its name is free: X becomes X.replaced, X.replaced2, ...

    Raises:
      OSError: it cannot be renamed.
    """
    return path.rename(free_name(path, "replaced"))


def free_name(path: Path, word: str) -> Path:
    """X.WORD beside X, or X.WORD2, X.WORD3, ..., whichever is free."""
    number, name = 1, path.with_name(f"{path.name}.{word}")
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.name}.{word}{number}")
    return name


def _partial(final: Path) -> Path:
    """A new hidden name beside `final`."""
    return final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:12]}"
