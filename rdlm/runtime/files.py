"""Files that appear whole or not at all."""

from __future__ import annotations

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
