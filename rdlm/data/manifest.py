"""manifest.json: what a folder of prepared data holds, and the proof that it is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from rdlm.config import InputError, from_json, to_json

FORMAT_VERSION = 1
"""Raised whenever folders written before must not be read any more."""
_AGAIN = "delete the folder and prepare the data again"


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """Where the documents came from."""

    name: str
    version: str
    sha256: str
    """Over the source's data."""


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """Sizes of one split; `file` lies in the folder."""

    documents: int
    bytes: int
    """UTF-8 bytes of all texts."""
    tokens: int
    """Tokens, with begin and end of every document."""
    rows: int
    file: str


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of manifest.json. Equal settings give equal manifests on every machine."""

    format_version: int
    source: SourceEntry
    packing: str
    sequence_length: int
    """L: rows hold L + 1 tokens."""
    validation_fraction: float
    tokenizer_hash: str
    vocab_size: int
    pad_id: int
    token_dtype: str
    train: SplitEntry
    validation: SplitEntry
    files: tuple[FileEntry, ...]

    def split(self, name: str) -> SplitEntry:
        """The entry of "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[name]


def file_entry(folder: Path, name: str) -> FileEntry:
    """Size and checksum of a file in `folder`."""
    path = folder / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(name=name, bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a folder."""
    (folder / "manifest.json").write_text(to_json(manifest), encoding="utf-8")


def read_manifest(folder: str | Path, *, checksums: bool = False) -> Manifest:
    """Read manifest.json and check that every file it names is there in full.

    Args:
      folder: what `prepare` returned.
      checksums: also read every file and compare its sha256 (sizes are always compared).

    Raises:
      InputError: no prepared data there, another format version, or files missing, cut short or altered.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not prepared data (no manifest.json); prepare it, or delete the folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    try:
        version = json.loads(text).get("format_version")
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, this rdlm reads version {FORMAT_VERSION}; {_AGAIN}")
    manifest = from_json(Manifest, text, str(path))
    for entry in manifest.files:
        file = folder / entry.name
        if not file.is_file():
            raise InputError(f"{file}: missing; {_AGAIN}")
        if file.stat().st_size != entry.bytes:
            raise InputError(f"{file}: {file.stat().st_size} bytes instead of {entry.bytes}; {_AGAIN}")
        if checksums and file_entry(folder, entry.name) != entry:
            raise InputError(f"{file}: its checksum differs from the manifest; {_AGAIN}")
    return manifest
