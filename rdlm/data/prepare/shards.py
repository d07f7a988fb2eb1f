"""One part of a corpus to one shard of packed rows: a pure function, the same in a process pool and in Apache Beam."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np

from rdlm.config import InputError
from rdlm.data.manifest import (
    FORMAT_VERSION,
    INPUTS,
    FileEntry,
    Manifest,
    Reading,
    Recipe,
    ShardFile,
    Skipped,
    SourceEntry,
    SplitEntry,
    file_entry,
    write_manifest,
)
from rdlm.data.packing import Document, Row, labels_by_chunk, pack
from rdlm.data.prepare.documents import by_line
from rdlm.data.prepare.input_files import Fingerprint
from rdlm.data.prepare.parts import Conversation, Pair, Text, utf8_of
from rdlm.data.records import token_dtype, write_rows
from rdlm.tokenizer import Tokenizer

_ENCODE_BYTES, _ENCODE_DOCUMENTS = 2**20, 256  # encoded together, whichever limit is reached first
DOCUMENT_STRIDE = 0x9E3779B1
"""Distance of the first document numbers of consecutive shards, modulo 2**32: it spreads them evenly."""


@dataclasses.dataclass(frozen=True)
class ShardSplit:
    """A shard's share of one split; `file` is None when it has no rows."""

    documents: int
    bytes: int
    tokens: int
    rows: int
    file: FileEntry | None
    labels: int | None = None
    """None: made before labels were counted."""
    unscored_documents: int = 0
    unscored_rows: int = 0
    """Made before such rows were left out."""
    dropped_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """The result of one part."""

    number: int
    documents_sha256: str
    skipped: Skipped
    train: ShardSplit
    validation: ShardSplit
    roles: tuple[str, ...] = ()
    """Of the messages, sorted."""


def held_out(text: Text, fraction: float) -> bool:
    """Whether a document belongs to validation: its hash decides, with probability `fraction`."""
    return _is_held_out(digest(text), fraction)


def _is_held_out(sha256: bytes, fraction: float) -> bool:
    return int.from_bytes(sha256[:8], "big") < fraction * 2**64


def digest(text: Text) -> bytes:
    """sha256 of a document's UTF-8 bytes; a conversation counts as JSON with sorted keys."""
    return hashlib.sha256(utf8_of(text)).digest()


def build_shard(
    folder: str | Path,
    number: int,
    documents: Iterable[Text],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    duplicates: np.ndarray | None = None,
    skipped: Counter[str] | None = None,
) -> Shard:
    """Encode, split and pack the documents of a part into train-NUMBER.array_record and validation-NUMBER.

    The files are renamed to these names when they are complete. The validation documents are kept in memory, as tokens.

    Args:
      folder: local, or a URL (of a bucket).
      number: of the part in the corpus; decides the first document number.
      documents: of the part, in order; none of them empty.
      recipe: how to split and pack.
      tokenizer: encodes text, or whole conversations by its chat template.
      duplicates: int [n], ascending: positions of documents to leave out.
      skipped: the counter that `documents.read_documents` updates while `documents` is consumed.

    Raises:
      InputError: a document cannot be read or encoded.
      OSError: a file cannot be written.
    """
    skipped = Counter() if skipped is None else skipped
    everything = hashlib.sha256()
    counts = {"train": Counter[str](), "validation": Counter[str]()}
    aside: list[Document] = []
    roles: set[str] = set()
    dropped = set() if duplicates is None else set(duplicates.tolist())

    def encoded() -> Iterator[Document]:
        """Train documents; validation documents are put aside."""
        index = number * DOCUMENT_STRIDE % 2**32
        for texts in _batches(_without(documents, dropped, skipped)):
            for text, made in zip(texts, encode(texts, tokenizer, recipe.reading, skipped), strict=True):
                if made is None:
                    continue
                tokens, scored = made
                if isinstance(text, list):
                    roles.update(message["role"] for message in text)
                sha256 = digest(text)
                name = "validation" if _is_held_out(sha256, recipe.validation_fraction) else "train"
                everything.update(sha256)
                counts[name].update(documents=1, bytes=len(utf8_of(text)), tokens=len(tokens))
                document = Document(index, tokens, scored)
                index = (index + 1) % 2**32
                if name == "train":
                    yield document
                else:
                    aside.append(document)

    rows = pack(recipe.packing)
    with _scratch(folder) as local:
        entries = {}
        for name, source in (("train", encoded()), ("validation", aside)):
            path = Path(local) / f"{name}-{number:05d}.array_record"
            seen = counts[name]
            learned: set[int] = set()
            written = _counted(rows(_noted(source, masked := set[int]()), recipe.sequence_length), seen, learned)
            count = write_rows(path, written, token_dtype(tokenizer.vocab_size))
            entry = _publish(path, folder) if count else None
            sizes = seen["documents"], seen["bytes"], seen["tokens"], count
            entries[name] = ShardSplit(
                *sizes, entry, seen["labels"], len(masked - learned), dropped_rows=seen["dropped"]
            )
    left_out = Skipped(skipped["empty"], skipped["bad"], skipped["duplicate"])
    return Shard(
        number, everything.hexdigest(), left_out, entries["train"], entries["validation"], tuple(sorted(roles))
    )


def finish(
    folder: str | Path,
    shards: Sequence[Shard],
    recipe: Recipe,
    tokenizer: Tokenizer,
    name: str,
    version: str,
    inputs: Sequence[Fingerprint] = (),
) -> Manifest:
    """Add tokenizer and manifest to a folder that holds all `shards`, which completes the prepared data.

    Args:
      folder: local, or a URL.
      shards: of every part, in order.
      recipe: as the shards were built.
      tokenizer: the same.
      name: of the source (see `SourceEntry`).
      version: of the source.
      inputs: the files of the source.

    Raises:
      InputError: there is no train row, validation was asked for and has no document, or nothing counts as a label.
      OSError: a file cannot be written.
    """
    total = sum(shard.train.documents + shard.validation.documents for shard in shards)
    skipped = Skipped(*(sum(getattr(s.skipped, n) for s in shards) for n in ("empty", "bad", "duplicate")))
    left_out = ", ".join(f"{n:,} {what}" for what, n in dataclasses.asdict(skipped).items() if n)
    if skipped.empty and not total:
        raise InputError(
            f"field = {recipe.reading.field!r}: no document is left, {left_out}; name the field or column that holds "
            "text or messages with --field, or correct the files"
        )
    for split, wanted in (("train", True), ("validation", recipe.validation_fraction > 0)):
        if wanted and not any(getattr(shard, split).rows or getattr(shard, split).dropped_rows for shard in shards):
            raise InputError(
                f"validation_fraction = {recipe.validation_fraction}, packing = {recipe.packing}: leave no {split} "
                f"row of {total} documents{f' ({left_out} left out)' * bool(left_out)}; give more (text files: "
                "--document line or blank_line), change the fraction"
            )
    everything = hashlib.sha256("".join(shard.documents_sha256 for shard in shards).encode())
    splits = {}
    for split in ("train", "validation"):
        parts: list[ShardSplit] = [getattr(shard, split) for shard in shards]
        summed = ("documents", "bytes", "tokens", "rows", "unscored_documents", "unscored_rows", "dropped_rows")
        sums = {name: sum(getattr(part, name) for part in parts) for name in summed}
        files = tuple(ShardFile(part.file.name, part.rows) for part in parts if part.file)
        counted = [part.labels for part in parts if part.labels is not None]
        labels = sum(counted) if len(counted) == len(parts) else None
        if (sums["rows"] or sums["dropped_rows"]) and labels == 0:
            roles = ", ".join(sorted({role for shard in shards for role in shard.roles})[:10])
            raise InputError(
                f"{recipe.reading.field}: none of the {sums['tokens']:,} tokens of the {sums['documents']:,} {split} "
                "documents counts as a label; of chats only what messages of role 'assistant' say counts"
                f"{f' (found roles: {roles})' * bool(roles)}, where the tokenizer's chat template has "
                "{% generation %} around it or no such tag at all, and --sequence-length does not cut it off"
            )
        splits[split] = SplitEntry(**sums, shards=files, labels=labels)
    with _scratch(folder) as scratch:
        local = Path(scratch)
        tokenizer.save(local / "tokenizer")
        entries = [
            dataclasses.replace(_publish(path, f"{folder}/tokenizer"), name=f"tokenizer/{path.name}")
            for path in sorted((local / "tokenizer").iterdir())
        ]
        entries += [part.file for shard in shards for part in (shard.train, shard.validation) if part.file]
        if inputs:
            (local / INPUTS).write_text(json.dumps(inputs), encoding="utf-8")
            entries.append(_publish(local / INPUTS, folder))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=SourceEntry(name, version, everything.hexdigest()),
            recipe=recipe,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            token_dtype=token_dtype(tokenizer.vocab_size),
            train=splits["train"],
            validation=splits["validation"],
            skipped=skipped,
            files=tuple(sorted(entries, key=lambda entry: entry.name)),
        )
        write_manifest(local, manifest)
        _publish(local / "manifest.json", folder)
    return manifest


def _noted(documents: Iterable[Document], masked: set[int]) -> Iterator[Document]:
    """Documents, with the numbers of those of which only a part is scored put into `masked`."""
    for document in documents:
        if document.scored is not None:
            masked.add(document.number)
        yield document


def _counted(rows: Iterable[Row], counts: Counter[str], learned: set[int]) -> Iterator[Row]:
    """Rows with a label; labels and rows without are counted, the numbers of documents with a label go to `learned`."""
    for row in rows:
        labels = labels_by_chunk(row)
        if not labels.any():
            counts["dropped"] += 1
            continue
        counts["labels"] += int(labels.sum())
        if row.scored is not None:
            learned.update(row.chunks[labels > 0, 0].tolist())
        yield row


def _without(documents: Iterable[Text], dropped: set[int], skipped: Counter[str]) -> Iterator[Text]:
    for i, text in enumerate(documents):
        if i in dropped:
            skipped["duplicate"] += 1
        else:
            yield text


def _batches(documents: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _ENCODE_BYTES or len(batch) >= _ENCODE_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(
    texts: Sequence[Text], tokenizer: Tokenizer, reading: Reading, skipped: Counter[str]
) -> Iterator[tuple[np.ndarray, np.ndarray | None] | None]:
    """The tokens of every document, int32 [n], and which of them count as labels, bool [n]; None: all.

    In place of a document that cannot be encoded None, if `reading` skips them.

    Raises:
      InputError: a document cannot be encoded; the message says where it was read.
    """
    plain = iter(tokenizer.encode_batch([text for text in texts if isinstance(text, str)], bos=True, eos=True))
    for text in texts:
        if isinstance(text, str):
            yield next(plain), None
            continue
        try:
            if isinstance(text, Pair):
                yield tokenizer.encode_completion(*text)
            else:
                yield tokenizer.encode_conversation(text, reply=False)
        except InputError as error:
            if reading.bad_documents == "refuse":
                where = by_line(text.where) if isinstance(text, Conversation) else "conversation"
                raise InputError(f"{where}: {error}") from error
            skipped["bad"] += 1
            yield None


def _scratch(folder: str | Path) -> tempfile.TemporaryDirectory[str]:
    """A local folder to write into: a hidden one inside a local target, so that files are renamed and not copied."""
    if "://" in str(folder):
        return tempfile.TemporaryDirectory()
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True)


def _publish(path: Path, folder: str | Path) -> FileEntry:
    """Put a complete file into `folder` under its own name."""
    entry = file_entry(path.parent, path.name)
    if "://" in str(folder):
        fs, root = fsspec.core.url_to_fs(str(folder))
        fs.makedirs(root, exist_ok=True)
        fs.put_file(str(path), f"{root}/{path.name}")
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the name must not outlive the content
        Path(folder).mkdir(parents=True, exist_ok=True)
        path.replace(Path(folder) / path.name)
    return entry
