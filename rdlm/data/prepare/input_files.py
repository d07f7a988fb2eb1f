"""The files that documents are read from: found by path, folder, glob or URL, their kind known by the suffix."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import fsspec
import pyarrow

from rdlm.config import InputError, one_line

Kind = Literal["text", "jsonl", "csv", "parquet", "arrow", "tfds", "factbook"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SETTINGS = frozenset(
    f"{name}.json"
    for name in (
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "chat_template"),
        *("config", "generation_config", "dataset_info", "dataset_infos", "dataset_dict", "state"),
    )
)
"""Of tokenizers, models and saved datasets, which lie beside data and hold none."""
_KNOWN = ", ".join(_KINDS) + " (text, JSON and CSV also with .gz, .zst, .bz2 or .xz)"


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that documents are read from."""

    path: str
    bytes: int


class Fingerprint(NamedTuple):
    """By which a file is known again."""

    name: str
    """Without its folder, so that files may move."""
    bytes: int
    digest: str
    """sha256 of the content, or of samples of it; of a remote file, what its file system calls its version."""

    def __str__(self) -> str:
        return f"{self.name} ({self.bytes} bytes, {self.digest[:8]})"


def find_files(paths: Sequence[str], left_out: Counter[str] | None = None) -> list[InputFile]:
    """The files behind files, folders, globs and URLs (gs://..., through fsspec), sorted within each, each once.

    Folders are searched recursively, through links, for files of a known kind, compressed or not. Text beside files of
    other kinds (a README) is left out there, and so are hidden files, prepared data and the settings of other programs.

    Args:
      paths: what to search.
      left_out: counts what was not taken, by reason.

    Raises:
      InputError: there is nothing, nothing of a known kind, or a URL whose library is not installed.
    """
    left_out = Counter() if left_out is None else left_out
    found: dict[object, InputFile] = {}
    for path in paths:
        for file in _find_remote(path, left_out) if "://" in path else _find_local(path, left_out):
            if not suffix_of(file.path):
                raise InputError(f"{file.path}: not a known kind of file; known are {_KNOWN}")
            identity = _identity(file.path)
            if identity in found:
                left_out["named twice"] += 1
            found.setdefault(identity, file)
    return list(found.values())


def described(files: Sequence[InputFile], left_out: Counter[str]) -> str:
    """'3 files (2 .jsonl, 1 .txt); left out: 1 hidden'."""
    kinds = Counter(suffix_of(file.path) for file in files)
    taken = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())
    left = "".join(f", {n:,} {reason}" for reason, n in left_out.items())
    return f"{len(files):,} file{'s' * (len(files) != 1)} ({taken})" + (f"; left out: {left[2:]}" if left else "")


def fingerprint(path: str, *, samples: bool = False) -> Fingerprint:
    """The fingerprint of a file.

    Args:
      path: local or a URL.
      samples: read 64 KiB in 16 places, for files too large to read whole.

    Raises:
      InputError: it cannot be read.
    """
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        if "://" in path:
            fs, place = fsspec.core.url_to_fs(path)
            return Fingerprint(Path(path).name, size, str(fs.ukey(place)))
        if samples and size > 2**20:
            content = hashlib.sha256()
            for i in range(16):
                file.seek((size - 2**16) * i // 15)
                content.update(file.read(2**16))
        else:
            file.seek(0)
            content = hashlib.file_digest(file, "sha256")
    return Fingerprint(Path(path).name, size, content.hexdigest())


def changed(before: Sequence[Fingerprint], now: Sequence[Fingerprint]) -> str | None:
    """The first file that differs, in words."""
    for old, new in itertools.zip_longest(before, now):
        if old != new:
            return f"files = {json.dumps(new and str(new))}, not {json.dumps(old and str(old))}"
    return None


def kind_of(path: str) -> Kind:
    """The kind of a file that `find_files` returned."""
    return _KINDS[suffix_of(path)]


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
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cut short or damaged ({one_line(error)}); copy it again") from error
    except OSError as error:
        if "too much memory" in str(error):
            raise InputError(
                f"{path}: compressed with a window that is too long to read; run: zstd -d --long=31, then zstd"
            ) from error
        reason = error.strerror or one_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); copy it again, or leave it out") from error


def _identity(path: str) -> object:
    """Equal for all names of one file."""
    place = path.removeprefix("file://")
    if "://" in place:
        return re.sub("(?<!:)//+", "/", place)
    stat = os.stat(place)
    return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else os.path.realpath(place)


def _find_local(path: str, left_out: Counter[str]) -> list[InputFile]:
    place = Path(path).expanduser()
    if place.is_dir():
        found = _select(map(str, sorted(_walk(place, left_out))), left_out)
        if not found:
            raise InputError(f"{path}: no file there ends in {_KNOWN}")
    elif place.is_file():
        found = [str(place)]
    elif place.exists():
        raise InputError(f"{path}: a pipe or device, and files are read more than once; write it to a file first")
    else:
        matches = sorted(glob.glob(str(place), recursive=True))
        found = [match for match in matches if Path(match).is_file()]
        if "**" not in path and (others := len(matches) - len(found)):
            left_out["folders that a glob matches"] += others
        if not found:
            if place.is_symlink():
                raise InputError(f"{path}: a link to {place.readlink()}, which does not exist")
            near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            close = difflib.get_close_matches(place.name, near, n=1)
            raise InputError(f"{path}: no such file or folder" + (f"; did you mean {close[0]!r}?" if close else ""))
    return [InputFile(name, os.stat(name).st_size) for name in found]


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files below a folder, through links, every real folder once."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); fix permissions, or leave it out")

    home, seen = root.resolve(), {root.resolve()}
    for base, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        for name in sorted(folders):
            folder = Path(base, name)
            real = folder.resolve()
            if name.startswith("."):
                reason = "hidden folders"
            elif real in seen or home.is_relative_to(real):
                reason = "linked folders that are there already"
            elif (folder / "manifest.json").exists() and (folder / "tokenizer").is_dir():
                reason = "folders of prepared data"
            else:
                seen.add(real)
                continue
            left_out[reason] += 1
            folders.remove(name)
        folders.sort()
        for name in names:
            file = Path(base, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif file.is_file():
                yield file
            else:
                left_out["broken links or pipes"] += 1


def _select(names: Iterable[str], left_out: Counter[str]) -> list[str]:
    """The files of a folder that hold documents."""
    known: list[str] = []
    everything = set(names := list(names))
    for name in names:
        if not suffix_of(name):
            left_out["of unknown kind"] += 1
        elif name.endswith(COMPRESSED) and name.rpartition(".")[0] in everything:
            left_out["compressed copies"] += 1
        elif Path(name).name in _SETTINGS:
            left_out["settings of a tokenizer, model or dataset"] += 1
        else:
            known.append(name)
    data = [name for name in known if kind_of(name) != "text"]
    if data and len(data) < len(known):  # text beside them describes them
        left_out["text beside other files"] += len(known) - len(data)
    return data or known


def _find_remote(url: str, left_out: Counter[str]) -> list[InputFile]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if not glob.has_magic(path) and fs.isdir(path):
            names = _select(fs.find(path), left_out)
        else:
            names = fs.glob(path) if glob.has_magic(path) else [path]
        sizes = {fs.unstrip_protocol(name): int(fs.size(name) or 0) for name in sorted(names)}
    except ImportError as error:
        fix = "; run: pip install 'rdlm[gcs]'" if url.startswith(("gs://", "gcs://")) else ""
        raise InputError(f"{url}: {one_line(error)}{fix}") from error
    except Exception as error:  # each file system raises its own
        raise InputError(f"{url}: cannot be listed ({one_line(error)})") from error
    if not sizes:
        raise InputError(f"{url}: no file there ends in {_KNOWN}")
    return [InputFile(name, size) for name, size in sizes.items()]


def suffix_of(name: str) -> str:
    """The suffix that decides the kind of a file, "" if it is not of a known kind."""
    suffixes = Path(name.lower()).suffixes
    if suffixes and suffixes[-1] in COMPRESSED and _KINDS.get("".join(suffixes[-2:-1])) in ("text", "jsonl", "csv"):
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else ""
