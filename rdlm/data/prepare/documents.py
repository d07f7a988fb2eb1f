"""Reading the documents of a part: whole text files, lines, paragraphs, JSON fields or parquet rows."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator

import pyarrow
import pyarrow.parquet

from rdlm.config import InputError
from rdlm.data.manifest import Reading
from rdlm.data.prepare.input_files import opened
from rdlm.data.prepare.parts import Part, Text, text_of, utf8

_MAX_BYTES = 256 * 2**20  # of one document: preparation holds it in memory several times over
_Located = tuple[int, bytes]  # (byte at which it starts, content)


def read_documents(
    part: Part,
    reading: Reading,
    *,
    advance: Callable[[int], None] = lambda _: None,
    skipped: Counter[str] | None = None,
) -> Generator[Text, None, None]:
    """The documents of a part, in order.

    Args:
      part: what to read.
      reading: how.
      advance: called from time to time with the number of input bytes read since the last call.
      skipped: counts documents left out, as "empty" and "bad".

    Raises:
      InputError: a file is missing, cut short or damaged, or a document cannot be read (see `Reading.bad_documents`).
    """
    skipped = Counter() if skipped is None else skipped
    if part.kind in ("tfds", "factbook"):
        from rdlm.data.prepare import tfds  # TFDS takes seconds to import

        found: Iterator[Text | InputError] = tfds.read(part, reading.field, advance)
    elif part.kind == "parquet":
        found = _parquet(part, reading, advance)
    else:
        found = _text_or_json(part, reading, advance)
    for document in found:
        if isinstance(document, InputError):
            if reading.bad_documents == "refuse":
                raise document
            skipped["bad"] += 1
        elif not document or (isinstance(document, str) and document.isspace()):
            skipped["empty"] += 1
        else:
            yield document


def _text_or_json(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | InputError]:
    """Documents; in place of one that cannot be read, the error."""
    for path in part.paths:
        with opened(path) as raw:
            stream = _decompressed(raw, path)
            if part.kind == "text" and reading.document == "file":
                pieces: Iterator[_Located] = iter([(0, _limited(stream.read(_MAX_BYTES + 1), path, 0))])
            elif part.kind == "text" and reading.document == "blank_line":
                pieces = _paragraphs(_lines(stream, part, path), part, path)
            else:
                lines = _lines(stream, part, path)
                pieces = itertools.takewhile(lambda line: part.end is None or line[0] < part.end, lines)
            seen = 0 if part.end is None else part.start
            for at, content in pieces:
                where = f"{path}, byte {at}"
                try:
                    document: Text | InputError = utf8(content, where).removeprefix("\ufeff" if at == 0 else "")
                    if part.kind == "jsonl":
                        document = _json_field(str(document), reading.field, where)
                except InputError as error:
                    document = error
                yield document
                if (now := raw.tell()) - seen >= 2**18:
                    advance(now - seen)
                    seen = now
            advance(max(raw.tell() - seen, 0))


def _lines(stream: io.BufferedReader, part: Part, path: str) -> Iterator[_Located]:
    """Lines without their ends, from the first that starts in the part to the end of the file."""
    at = part.start
    if at:  # the line that holds the byte before belongs to the previous part
        stream.seek(at - 1)
        at -= 1
        while rest := stream.readline(2**20):
            at += len(rest)
            if rest.endswith(b"\n"):
                break
    while line := stream.readline(_MAX_BYTES + 1):
        yield at, _limited(line, path, at).rstrip(b"\r\n")
        at += len(line)


def _paragraphs(lines: Iterator[_Located], part: Part, path: str) -> Iterator[_Located]:
    """The text between blank lines. A paragraph belongs to the part in which the blank line before it starts."""
    gathered: list[bytes] = []
    began = size = 0
    inside = part.start == 0  # False before the first blank line: that paragraph belongs to the previous part
    for at, line in lines:
        if line.strip():
            if inside:
                began, size = (began, size + len(line)) if gathered else (at, len(line))
                gathered.append(_limited(line, path, began, size))
            elif part.end is not None and at >= part.end:
                return
            continue
        if gathered:
            yield began, b"\n".join(gathered)
            gathered = []
        inside = part.end is None or at < part.end
        if not inside:
            return
    if gathered:
        yield began, b"\n".join(gathered)


def _json_field(line: str, field: str, where: str) -> Text:
    if not line.strip():
        return ""
    try:
        tree = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); correct the line, or pass --bad-documents skip") from error
    if not isinstance(tree, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(tree).__name__}")
    if field not in tree:
        raise InputError(f"{where}: no field {field!r}; pass --field with one of: {', '.join(map(repr, tree))}")
    return text_of(tree[field], field, where)


def _parquet(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | InputError]:
    """As `_text_or_json`."""
    field = reading.field
    for path in part.paths:
        with opened(path) as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(
                    f"{path}: no column {field!r}; pass --field with one of: {', '.join(map(repr, names))}"
                )
            groups = list(range(part.start, file.metadata.num_row_groups if part.end is None else part.end))
            values = (value for b in file.iter_batches(64, row_groups=groups, columns=[field]) for value in b.column(0))
            for i, value in enumerate(values):
                where = f"{path}, row {i} from row group {part.start} on"
                try:
                    document: Text | InputError = text_of(value.as_py(), field, where)
                except UnicodeDecodeError:
                    document = InputError(f"{where}: not UTF-8; convert it, or pass --bad-documents skip")
                except InputError as error:
                    document = error
                yield document
        advance(part.size // len(part.paths))


def _decompressed(raw: io.BufferedReader, path: str) -> io.BufferedReader:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _limited(content: bytes, path: str, at: int, size: int | None = None) -> bytes:
    """`content`, unless the document it belongs to, of `size` bytes (None: its own), is too large."""
    if (len(content) if size is None else size) > _MAX_BYTES:
        raise InputError(
            f"{path}, byte {at}: a document of more than {_MAX_BYTES // 2**20} MiB; cut it, or for text files pass "
            "--document line or blank_line"
        )
    return content
