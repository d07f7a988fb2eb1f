"""Documents from files people have: text, JSON lines, parquet, plain or compressed, local or in a bucket.

Work is cut into parts, each read front to back on its own: a few small files, one large file, or a byte range of one.
Which parts there are depends on the files alone, never on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import fsspec
import pyarrow
import pyarrow.parquet

from rdlm.config import InputError, one_line
from rdlm.data.prepare.find_files import COMPRESSED, InputFile, Kind, kind_of

Text = str | list[dict[str, Any]]
"""A document before it is encoded: plain text, or the messages of a conversation."""
_LARGEST = 256 * 2**20  # bytes of one document; more would not fit in memory several times over


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents."""

    field: str = "text"
    """Field of a JSON line, a parquet row or a TFDS example; its value is text, or a list of chat messages."""
    document: Literal["file", "line", "blank_line"] = "file"
    """What is one document in a text file: the file, each line, or what stands between blank lines."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """Text that is not UTF-8, lines that are not JSON, a missing field: stop, or leave out and count."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work. `start` and `end`: of bytes (text, jsonl), row groups (parquet) or examples (tfds)."""

    kind: Kind
    paths: tuple[str, ...]
    size: int
    """Bytes of input, for progress."""
    start: int = 0
    end: int | None = None
    """None: to the end."""
    split: str = ""
    """Of a TFDS dataset."""


def parts(files: Sequence[InputFile], reading: Reading, part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes`; compressed files are never cut.

    Raises:
      InputError: a parquet file is damaged.
    """
    result: list[Part] = []
    waiting: list[InputFile] = []

    def flush() -> None:
        if waiting:
            kind = kind_of(waiting[0].path)
            result.append(Part(kind, tuple(f.path for f in waiting), sum(f.bytes for f in waiting)))
            waiting.clear()

    for file in files:
        kind = kind_of(file.path)
        cut = kind == "jsonl" or (kind == "text" and reading.document != "file")
        if file.bytes > part_bytes and kind == "parquet":
            flush()
            result += _row_group_parts(file, part_bytes)
        elif file.bytes > part_bytes and cut and not file.path.endswith(COMPRESSED):
            flush()
            count = -(-file.bytes // part_bytes)
            edges = [file.bytes * i // count for i in range(count + 1)]
            pairs = itertools.pairwise(edges)
            result += [Part(kind, (file.path,), end - start, start, end) for start, end in pairs]
        else:
            full = sum(f.bytes for f in waiting) + file.bytes > part_bytes
            if waiting and (full or kind != kind_of(waiting[0].path)):
                flush()
            waiting.append(file)
    flush()
    return result


def read(
    part: Part,
    reading: Reading,
    *,
    advance: Callable[[int], None] = lambda _: None,
    skipped: Counter[str] | None = None,
) -> Iterator[Text]:
    """The documents of a part, in order.

    Args:
      part: what to read.
      reading: how.
      advance: told how many more bytes of the input were read, now and then.
      skipped: counts documents left out, as "empty" and "bad".

    Raises:
      InputError: a file is gone, cut short or damaged, or a document cannot be read (see `Reading.bad_documents`).
    """
    skipped = Counter() if skipped is None else skipped
    if part.kind in ("tfds", "factbook"):
        from rdlm.data.prepare import tfds  # TFDS takes seconds to import

        found: Iterator[Text | None] = tfds.read(part, reading.field, advance)
    elif part.kind == "parquet":
        found = _parquet(part, reading, advance)
    else:
        found = _lines_or_files(part, reading, advance)
    for document in found:
        if document is None:
            skipped["bad"] += 1
        elif not document or (isinstance(document, str) and document.isspace()):
            skipped["empty"] += 1
        else:
            yield document


def text_of(value: Any, field: str, where: str) -> Text:
    """A field's value as a document.

    Raises:
      InputError: it is neither text nor a list of messages.
    """
    if isinstance(value, bytes):
        return _decode(value, where)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    raise InputError(f"{where}: field {field!r} is {type(value).__name__}, neither text nor a list of messages")


def _row_group_parts(file: InputFile, part_bytes: int) -> list[Part]:
    with _readable(file.path), _open_raw(file.path) as raw:
        metadata = pyarrow.parquet.ParquetFile(raw).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    edges, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > part_bytes:
            edges.append(i)
            filled = 0
        filled += size
    edges.append(len(sizes))
    share = file.bytes // (len(edges) - 1)
    pairs = itertools.pairwise(edges)
    return [Part("parquet", (file.path,), share, start, end) for start, end in pairs]


# Reading


def _lines_or_files(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | None]:
    for path in part.paths:
        with _readable(path), _open_raw(path) as raw:
            stream = _decompressed(raw, path)
            if part.kind == "text" and reading.document == "file":
                pieces: Iterator[tuple[int, bytes]] = iter([(0, _limited(stream.read(_LARGEST + 1), path, 0))])
            elif part.kind == "text" and reading.document == "blank_line":
                pieces = _paragraphs(_lines(stream, part, path), part, path)
            else:
                pieces = _before(part.end, _lines(stream, part, path))
            seen = 0 if part.end is None else part.start
            for at, piece in pieces:
                with _skipping(reading) as result:
                    where = f"{path}, byte {at}"
                    text = _decode(piece, where).removeprefix("\ufeff" if at == 0 else "")
                    result.append(_json_field(text, reading.field, where) if part.kind == "jsonl" else text)
                yield result[0] if result else None
                if (now := raw.tell()) - seen >= 2**18:
                    advance(now - seen)
                    seen = now
            advance(max(raw.tell() - seen, 0))


def _lines(stream: Any, part: Part, path: str) -> Iterator[tuple[int, bytes]]:
    """(where it starts, line without its end) from the first line that starts in the part, on and on."""
    at = part.start
    if at:  # the line that the byte before belongs to is another part's
        stream.seek(at - 1)
        at -= 1
        while rest := stream.readline(2**20):
            at += len(rest)
            if rest.endswith(b"\n"):
                break
    while line := stream.readline(_LARGEST + 1):
        yield at, _limited(line, path, at).rstrip(b"\r\n")
        at += len(line)


def _before(end: int | None, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The lines that start before `end`."""
    for at, line in lines:
        if end is not None and at >= end:
            return
        yield at, line


def _paragraphs(lines: Iterator[tuple[int, bytes]], part: Part, path: str) -> Iterator[tuple[int, bytes]]:
    """What stands between blank lines. A paragraph belongs to the part in which the blank line before it starts."""
    gathered: list[bytes] = []
    began = size = 0
    ours = part.start == 0  # else: in the middle of a paragraph of the part before, or in front of one
    for at, line in lines:
        if line.strip():
            if ours:
                began, size = (began, size + len(line)) if gathered else (at, len(line))
                gathered.append(_limited(line, path, began, size))
            elif part.end is not None and at >= part.end:
                return
            continue
        if gathered:
            yield began, b"\n".join(gathered)
            gathered = []
        ours = part.end is None or at < part.end
        if not ours:
            return
    if gathered:
        yield began, b"\n".join(gathered)


def _json_field(text: str, field: str, where: str) -> Text:
    if not text.strip():
        return ""
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); mend the line, or pass --bad-documents skip") from error
    if not isinstance(tree, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(tree).__name__}")
    if field not in tree:
        raise InputError(f"{where}: no field {field!r}; pass --field with one of: {', '.join(map(repr, tree))}")
    return text_of(tree[field], field, where)


def _parquet(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | None]:
    for path in part.paths:
        with _readable(path), _open_raw(path) as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            names = file.schema_arrow.names
            if reading.field not in names:
                raise InputError(
                    f"{path}: no column {reading.field!r}; pass --field with one of: {', '.join(map(repr, names))}"
                )
            groups = range(part.start, file.metadata.num_row_groups if part.end is None else part.end)
            count = 0
            for batch in file.iter_batches(64, row_groups=list(groups), columns=[reading.field]):
                for i in range(len(batch)):
                    with _skipping(reading) as result:
                        where = f"{path}, row {count + i} of row groups {part.start} on"
                        try:
                            value = batch.column(0)[i].as_py()
                        except UnicodeDecodeError as error:
                            raise InputError(f"{where}: not UTF-8; mend it, or pass --bad-documents skip") from error
                        result.append(text_of(value, reading.field, where))
                    yield result[0] if result else None
                count += len(batch)
        advance(part.size // len(part.paths))


@contextlib.contextmanager
def _skipping(reading: Reading) -> Iterator[list[Text]]:
    result: list[Text] = []
    try:
        yield result
    except InputError:
        if reading.bad_documents == "refuse":
            raise


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while reading it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cut short or damaged ({one_line(error)}); copy it again") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); copy it again, or leave it out") from error


def _open_raw(path: str) -> Any:
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")


def _decompressed(raw: Any, path: str) -> Any:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return io.BufferedReader(raw) if "://" in path else raw


def _limited(piece: bytes, path: str, at: int, size: int | None = None) -> bytes:
    """`piece`, refused if it (or the document of `size` bytes that it belongs to) is too large."""
    if (len(piece) if size is None else size) > _LARGEST:
        raise InputError(
            f"{path}, byte {at}: a document of more than {_LARGEST // 2**20} MiB; cut it, or for text files pass "
            "--document line or blank_line"
        )
    return piece


def _decode(piece: bytes, where: str) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} {error.start} bytes on); convert it, or pass --bad-documents skip"
        ) from error
