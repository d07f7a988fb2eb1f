"""The files that documents are read from: found by path, folder, glob or URL, their kind known by the suffix."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import fsspec
import pyarrow

from rdlm.config import InputError, one_line

Kind = Literal["text", "jsonl", "parquet", "tfds", "factbook"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
_KNOWN = ", ".join(_KINDS) + " (text and JSON also with .gz or .zst)"


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that documents are read from."""

    path: str
    bytes: int


def find_files(paths: Sequence[str]) -> list[InputFile]:
    """The files behind files, folders, globs and URLs (gs://..., through fsspec), sorted within each.

    Folders are searched recursively for files of a known kind, compressed or not; hidden files are left out.

    Raises:
      InputError: there is nothing, nothing of a known kind, or a URL whose library is not installed.
    """
    found: dict[str, int] = {}
    for path in paths:
        found.update(_find_remote(path) if "://" in path else _find_local(path))
    for path in found:
        if not _suffix(path):
            raise InputError(f"{path}: not a known kind of file; known are {_KNOWN}")
    return [InputFile(path, size) for path, size in found.items()]


def kind_of(path: str) -> Kind:
    """The kind of a file that `find_files` returned."""
    return _KINDS[_suffix(path)]


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedReader]:
    """A local or remote file, open for reading; errors while the block reads it name the file.

    Raises:
      InputError: the file cannot be read, or is cut short or damaged.
    """
    try:
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            yield io.BufferedReader(file) if "://" in path else file
    except GeneratorExit:  # at interpreter exit, the names below may be gone
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cut short or damaged ({one_line(error)}); copy it again") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); copy it again, or leave it out") from error


def _find_local(path: str) -> dict[str, int]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if not any(x.startswith(".") for x in p.relative_to(place).parts)]
        known = [p for p in files if p.is_file() and _suffix(p.name)]
        if not known:
            raise InputError(f"{path}: no file there ends in {_KNOWN}")
    elif place.is_file():
        known = [place]
    else:
        known = [Path(p) for p in sorted(glob.glob(str(place), recursive=True)) if Path(p).is_file()]
        if not known:
            near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            close = difflib.get_close_matches(place.name, near, n=1)
            raise InputError(f"{path}: no such file or folder" + (f"; did you mean {close[0]!r}?" if close else ""))
    return {str(p): p.stat().st_size for p in known}


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
    except Exception as error:  # each file system raises its own
        raise InputError(f"{url}: cannot be listed ({one_line(error)})") from error
    if not sizes:
        raise InputError(f"{url}: no file there ends in {_KNOWN}")
    return sizes


def _suffix(name: str) -> str:
    """The suffix that decides the kind of a file, "" if it is not of a known kind."""
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1] in COMPRESSED and suffixes[-2:-1] != [".parquet"]:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else ""
