"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from rdlm.config import InputError


def write_whole(path: Path, text: str, make_folder: bool = False) -> Path:
    """Write `text` to `path`, with its folder if `make_folder`; returns the path.

    Raises:
      InputError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


@contextlib.contextmanager
def complete_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside `final` to fill; it takes the name `final` when the block ends without an error.

    So nobody ever sees a half-written `final`, and processes that build the same folder at once do not disturb each
    other: each fills its own, the first to finish gives the name, the others drop theirs. On an error the temporary
    folder is removed; a killed process leaves a hidden `.NAME.partial-*` behind, which nothing reads.

    Raises:
      InputError: the disk refuses (permissions, space, a file where a folder should be).
    """
    partial = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{final}: cannot be written ({reason}); free space, fix permissions or set data.folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
