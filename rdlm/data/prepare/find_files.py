"""Which files documents are read from: paths, folders, globs and URLs, by the ends of their names."""

from __future__ import annotations

import dataclasses
import difflib
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec

from rdlm.config import InputError, one_line

Kind = Literal["text", "jsonl", "parquet", "tfds", "factbook"]

_KINDS: dict[str, Kind] = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that documents are read from."""

    path: str
    bytes: int


def find(paths: Sequence[str]) -> list[InputFile]:
    """The files behind files, folders, globs and URLs (gs://..., through fsspec), sorted within each.

    Folders are searched to the bottom for .txt, .md, .jsonl, .json, .ndjson and .parquet, the text formats also with
    .gz or .zst; hidden files are left out.

    Raises:
      InputError: nothing there, nothing of a known kind, or a URL whose library is not installed.
    """
    found: dict[str, int] = {}
    for path in paths:
        found.update(_find_remote(path) if "://" in path else _find_local(path))
    return [InputFile(path, size) for path, size in found.items()]


def _find_local(path: str) -> dict[str, int]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if not any(x.startswith(".") for x in p.relative_to(place).parts)]
        known = [p for p in files if p.is_file() and _suffix(p.name)]
        if not known:
            raise InputError(f"{path}: no file there ends in {_known()}")
    elif place.is_file():
        known = [place]
    else:
        known = [Path(p) for p in sorted(glob.glob(str(place), recursive=True)) if Path(p).is_file()]
        if not known:
            near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            close = difflib.get_close_matches(place.name, near, n=1)
            raise InputError(f"{path}: no such file or folder" + (f"; did you mean {close[0]!r}?" if close else ""))
    return {str(p): _checked(p).stat().st_size for p in known}


def _find_remote(url: str) -> dict[str, int]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if not glob.has_magic(path) and fs.isdir(path):
            names = [name for name in fs.find(path) if _suffix(name)]
        else:
            names = fs.glob(path) if glob.has_magic(path) else [path]
        sizes = {fs.unstrip_protocol(name): int(fs.size(name) or 0) for name in sorted(names)}
    except ImportError as error:
        raise InputError(f"{url}: {error}; for gs:// run: pip install 'rdlm[gcs]'") from error
    except Exception as error:  # every file system has its own
        raise InputError(f"{url}: cannot be listed ({one_line(error)})") from error
    if not sizes:
        raise InputError(f"{url}: no file there ends in {_known()}")
    return {str(_checked(name)): size for name, size in sizes.items()}


def _checked(path: Any) -> Any:
    if not _suffix(str(path)):
        raise InputError(f"{path}: not a known kind of file; known are {_known()}")
    return path


def _known() -> str:
    return ", ".join(_KINDS) + " (text and JSON also with .gz or .zst)"


def _suffix(name: str) -> str | None:
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1] in COMPRESSED and suffixes[-2:-1] != [".parquet"]:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else None


def kind_of(path: str) -> Kind:
    """The kind of a file that `find` returned."""
    suffix = _suffix(path)
    assert suffix is not None, path
    return _KINDS[suffix]
