"""manifest.json: the content of a folder of prepared data, and the proof that it is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

from rdlm.config import InputError, Packing, check_types, from_json, local_path, require, to_json

FORMAT_VERSION = 2
"""Incremented when older folders can no longer be read."""
INPUTS = "inputs.json"
"""File with the fingerprints of the files that the documents came from."""
PREPARE_AGAIN = "prepare the data again, into another folder"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents."""

    field: str = "text"
    """Field of a JSON line, a parquet row or a TFDS example; its value is text, or a list of chat messages."""
    document: Literal["file", "line", "blank_line"] = "file"
    """One document of a text file: the whole file, each line, or each paragraph between blank lines."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """Text that is not UTF-8, lines that are not JSON, a missing field: stop, or skip and count."""
    prompt_field: str = ""
    """Field of what comes before the document and is not scored; empty: nothing does."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that, with documents and tokenizer, decide the content of prepared rows."""

    sequence_length: int
    """L: rows hold up to L + 1 tokens."""
    packing: Packing = "concatenate_and_split"
    """How documents are laid into rows (see `rdlm.data.packing`)."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of their text."""
    deduplicate: bool = False
    """Only the first of several equal documents counts."""
    reading: Reading = dataclasses.field(default_factory=Reading)
    """How files became documents."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.sequence_length >= 1, "sequence_length", self.sequence_length, "must be at least 1")
        require(0 <= self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "must be in [0, 1)")

    def settings(self) -> dict[str, object]:
        """All fields as flat JSON, those of `reading` first; a prompt field only where there is one."""
        recipe = dataclasses.asdict(self)
        reading = recipe.pop("reading")
        if not reading["prompt_field"]:
            reading.pop("prompt_field")  # as older folders, which do not know it
        return {**reading, **recipe}


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """Where the documents came from."""

    name: str
    """"factbook", "files", or a TFDS dataset with version and split."""
    version: str
    """Of the dataset, or the names and number of files and bytes."""
    sha256: str
    """Over all documents, in order."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """Some rows of a split, in one array_record file."""

    file: str
    rows: int


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """Sizes of one split."""

    documents: int
    bytes: int
    """UTF-8 bytes of all texts."""
    tokens: int
    """Tokens, with begin and end of every document."""
    rows: int
    shards: tuple[ShardFile, ...]
    """Row numbers go through them in this order."""
    labels: int | None = None
    """Tokens that count as labels; None: prepared before they were counted."""
    unscored_documents: int = 0
    """Chats and pairs of which no token is a label: nothing is scored in them, or what is was cut off."""
    unscored_rows: int = 0
    """Of `rows`, those without a label; only in folders prepared before such rows were left out."""
    dropped_rows: int = 0
    """Rows left out because they had no label: a prompt filled them. Training on them would learn nothing."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Documents that are in no split."""

    empty: int = 0
    bad: int = 0
    duplicate: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of manifest.json. Equal settings give equal manifests on every machine."""

    format_version: int
    source: SourceEntry
    recipe: Recipe
    tokenizer_hash: str
    vocab_size: int
    pad_id: int
    token_dtype: str
    train: SplitEntry
    validation: SplitEntry
    skipped: Skipped
    files: tuple[FileEntry, ...]

    def split(self, name: str) -> SplitEntry:
        """The entry of "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[name]

    def identity(self) -> dict[str, object]:
        """What must be the same when a run resumes: settings, source and tokenizer, digests of documents and rows."""
        files = [dataclasses.asdict(file) for file in self.files if file.name != INPUTS]
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {
            **self.recipe.settings(),
            "source": f"{self.source.name}, {self.source.version}",
            "documents": self.source.sha256,
            "tokenizer": self.tokenizer_hash,
            "files": digest,
        }


def first_difference(old: dict[str, object], new: dict[str, object]) -> str | None:
    """'packing = "best_fit", not "document_start"' for the first field of `new` that `old` has otherwise or lacks."""
    for name, value in new.items():
        if old.get(name) != value:
            return f"{name} = {json.dumps(value)}, not {json.dumps(old.get(name))}"
    return None


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
      folder: made by `prepare_embedded` or `build`.
      checksums: also read every file and compare its sha256 (sizes are always compared).

    Raises:
      InputError: no prepared data there, another format version, or files missing, cut short or altered.
    """
    folder = local_path(folder)
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder}: not prepared data (no manifest.json); name a folder that prepare_data.py made"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    try:
        version = json.loads(text).get("format_version")
    except (ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); {PREPARE_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, this rdlm reads version {FORMAT_VERSION}; {PREPARE_AGAIN}")
    manifest = from_json(Manifest, text, str(path))
    for entry in manifest.files:
        file = folder / entry.name
        if not file.is_file():
            raise InputError(f"{file}: missing; {PREPARE_AGAIN}")
        if file.stat().st_size != entry.bytes:
            raise InputError(f"{file}: {file.stat().st_size} bytes instead of {entry.bytes}; {PREPARE_AGAIN}")
        if checksums and file_entry(folder, entry.name) != entry:
            raise InputError(f"{file}: its checksum differs from the manifest; {PREPARE_AGAIN}")
    return manifest
