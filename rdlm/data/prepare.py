"""Corpus to a folder of packed rows: split by document, tokenizer, packing, manifest. Done once, then reused."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import rich.console
import rich.text

from rdlm.config import DataConfig, InputError
from rdlm.data import factbook
from rdlm.data.folders import complete_folder
from rdlm.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    SourceEntry,
    SplitEntry,
    file_entry,
    read_manifest,
    write_manifest,
)
from rdlm.data.packing import concatenate_and_split
from rdlm.data.records import token_dtype, write_rows
from rdlm.tokenizer import Tokenizer

_PACKING = "concatenate_and_split"
_ENCODE_AT_ONCE = 32  # documents handed to the tokenizer together


def prepare(data: DataConfig, *, tokenizer: Tokenizer | None = None) -> Path:
    """Make the folder of packed rows that `data` describes, or return at once if it is there.

    The folder holds train.array_record and validation.array_record (see `records`), tokenizer/ and manifest.json. It
    lies under `data.folder`, named by what decides its content; it appears complete or not at all, so several
    processes may call this at once. Documents are split by a hash of their text: the same document is on the same
    side whatever else the corpus holds. Equal settings give equal bytes on every machine.

    Args:
      data: corpus and sizes.
      tokenizer: use this one; None: train one of `data.tokenizer_size` entries on the train documents alone.

    Returns:
      The folder, for `PackedData`; its tokenizer is `Tokenizer.load(folder / "tokenizer")`.

    Raises:
      InputError: the corpus is not installed, too small for the tokenizer or the split, the tokenizer has another
        size, `data.folder` cannot be written, or a folder of that name holds something else or is damaged.
    """
    folder = prepared_folder(data, tokenizer)
    if not folder.exists():
        with _progress() as say, complete_folder(folder) as partial:
            _write(partial, data, tokenizer, say)
    manifest = read_manifest(folder)
    expected = {
        "sequence_length": data.sequence_length,
        "vocab_size": data.tokenizer_size,
        "validation_fraction": data.validation_fraction,
        "source": _source(data),
        "packing": _PACKING,
    }
    for name, value in expected.items():
        if getattr(manifest, name) != value:
            raise InputError(f"{folder}: prepared with {name} = {getattr(manifest, name)}, not {value}; delete it")
    return folder


def prepared_folder(data: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """Where `prepare` puts its result: data.folder/SOURCE-VOCABULARY-LENGTH, plus what differs from the defaults."""
    if "://" in data.folder:
        raise InputError(f"data.folder = {data.folder!r}: must be a local folder; every host prepares its own copy")
    name = f"{data.source}-{data.tokenizer_size}-{data.sequence_length}"
    if data.validation_fraction != DataConfig.validation_fraction:
        name += f"-v{data.validation_fraction:g}"
    if tokenizer is not None:
        if tokenizer.vocab_size != data.tokenizer_size:
            raise InputError(
                f"data.tokenizer_size = {data.tokenizer_size}: the tokenizer given has {tokenizer.vocab_size} entries"
            )
        name += f"-{tokenizer.hash[:8]}"
    return Path(data.folder).expanduser() / name


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: its own hash decides, with probability `fraction`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


class _Say(Protocol):
    def __call__(self, text: str, *, fleeting: bool = False) -> None: ...


def _write(folder: Path, data: DataConfig, tokenizer: Tokenizer | None, say: _Say) -> None:
    say(f"Reading {data.source}")
    texts = _documents(data)
    # A document keeps its number in the whole corpus: the noise keyed by it differs between the splits.
    held = [held_out(text, data.validation_fraction) for text in texts]
    splits = {
        "train": [i for i, out in enumerate(held) if not out],
        "validation": [i for i, out in enumerate(held) if out],
    }
    for name, indices in splits.items():
        if not indices:
            raise InputError(
                f"data.validation_fraction = {data.validation_fraction}: leaves no {name} document of {len(texts)}"
            )
    if tokenizer is None:
        say(f"Training a tokenizer of {data.tokenizer_size} entries on {len(splits['train'])} documents")
        tokenizer = Tokenizer.train([texts[i] for i in splits["train"]], data.tokenizer_size)
    tokenizer.save(folder / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    entries = {}
    for name, indices in splits.items():
        say(f"Packing {len(indices)} {name} documents into rows of {data.sequence_length}")
        entries[name] = _write_split(folder, name, indices, texts, tokenizer, data.sequence_length, dtype, say)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=_source(data),
        packing=_PACKING,
        sequence_length=data.sequence_length,
        validation_fraction=data.validation_fraction,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        token_dtype=dtype,
        train=entries["train"],
        validation=entries["validation"],
        files=tuple(file_entry(folder, name) for name in names),
    )
    write_manifest(folder, manifest)


def _write_split(
    folder: Path,
    name: str,
    indices: Sequence[int],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    sequence_length: int,
    dtype: str,
    say: _Say,
) -> SplitEntry:
    tokens = 0

    def encoded() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal tokens
        for start in range(0, len(indices), _ENCODE_AT_ONCE):
            batch = indices[start : start + _ENCODE_AT_ONCE]
            say(f"Packing {name}: document {start} of {len(indices)}", fleeting=True)
            for i, ids in zip(batch, tokenizer.encode_batch([texts[i] for i in batch], eos=True), strict=True):
                tokens += len(ids)
                yield i, ids

    file = f"{name}.array_record"
    rows = write_rows(folder / file, concatenate_and_split(encoded(), sequence_length), dtype)
    size = sum(len(texts[i].encode()) for i in indices)
    return SplitEntry(documents=len(indices), bytes=size, tokens=tokens, rows=rows, file=file)


def _source(data: DataConfig) -> SourceEntry:
    version = f"{factbook.PACKAGE} {factbook.PACKAGE_VERSION}, text {factbook.CiaWorldFactbook.VERSION}"
    return SourceEntry(name=data.source, version=version, sha256=factbook.PACKAGE_SHA256)


def _documents(data: DataConfig) -> list[str]:
    return factbook.documents(Path(data.folder).expanduser() / "tfds")


@contextlib.contextmanager
def _progress() -> Iterator[_Say]:
    """One line that changes on a terminal; elsewhere a plain line per stage, without the fleeting ones."""
    console = rich.console.Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if not console.is_terminal:

        def say(text: str, *, fleeting: bool = False) -> None:
            if not fleeting:
                console.print(text)

        yield say
        return
    with console.status("Preparing data") as status:

        def update(text: str, *, fleeting: bool = False) -> None:
            del fleeting
            status.update(rich.text.Text(text))

        yield update
