"""Reading the documents of a part: whole text files, lines, paragraphs, fields of JSON, rows of tables."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from rdlm.config import InputError
from rdlm.data.manifest import Reading
from rdlm.data.prepare.input_files import opened, suffix_of
from rdlm.data.prepare.parts import Part, Text, document_of, is_empty, utf8

_MAX_BYTES = 256 * 2**20  # of one document: preparation holds it in memory several times over
_MAX_ARRAY = 2**30  # bytes of a JSON array, which is read at once
_Located = tuple[int, bytes | InputError]  # (byte at which it starts, content or why it cannot be read)


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

        found: Iterator[Text | InputError] = tfds.read(part, reading, advance)
    elif part.kind in ("parquet", "arrow", "csv"):
        found = _rows(part, reading, advance)
    else:
        found = _text_or_json(part, reading, advance)
    for document in found:
        if isinstance(document, InputError):
            if reading.bad_documents == "refuse":
                raise InputError(by_line(str(document))) from document
            skipped["bad"] += 1
        elif is_empty(document):
            skipped["empty"] += 1
        else:
            yield document


def by_line(message: str) -> str:
    """A message that begins with 'PATH, byte N' as one that begins with 'PATH, line N'; another as it is.

    Parts of a file are read from any byte on, so lines are counted only for a message that is shown.

    Raises:
      InputError: the file is gone.
    """
    found = _PLACE.match(message)
    if not found:
        return message
    line, left = 1, int(found["at"])
    with opened(found["path"]) as raw:
        stream = _decompressed(raw, found["path"])
        while left and (block := stream.read(min(left, 2**20))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{found['path']}, line {line}{message[found.end() :]}"


_PLACE = re.compile(r"(?P<path>[^\n]+?), byte (?P<at>\d+)(?=:|$)")


def _text_or_json(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | InputError]:
    """Documents; in place of one that cannot be read, the error."""
    for path in part.paths:
        with opened(path) as raw:
            seen = 0 if part.end is None else part.start
            stream = _decompressed(raw, path)  # which closes `raw` when nothing refers to it
            for at, content in _pieces(stream, part, path, reading):
                yield _document(content, part, reading, f"{path}, byte {at}", at)
                if (now := raw.tell()) - seen >= 2**18:
                    advance(now - seen)
                    seen = now
            advance(max(raw.tell() - seen, 0))


def _pieces(stream: io.BufferedReader, part: Part, path: str, reading: Reading) -> Iterator[_Located]:
    """What holds a document each: the whole file, or the lines, paragraphs or array elements that start in the part."""
    if part.kind == "jsonl" and _NOT_BY_LINE.match(stream.peek(64)):
        return _elements(stream, path) if part.start == 0 else iter(())
    if part.kind == "text" and reading.document == "file":
        return iter([(0, _limited(stream.read(_MAX_BYTES + 1), path, 0))])
    lines = _lines(stream, part, path)
    if part.kind == "text" and reading.document == "blank_line":
        return _paragraphs(lines, part, path)
    return itertools.takewhile(lambda line: part.end is None or line[0] < part.end, lines)


def _document(content: bytes | InputError, part: Part, reading: Reading, where: str, at: int) -> Text | InputError:
    if isinstance(content, InputError):
        return content
    try:
        text = utf8(content, where).removeprefix("\ufeff" if at == 0 else "")
        return _json_field(text, reading, where) if part.kind == "jsonl" else text
    except InputError as error:
        return error


def _lines(stream: io.BufferedReader, part: Part, path: str) -> Iterator[_Located]:
    """Lines without their ends, from the first that starts in the part to the end of the file."""
    at = part.start
    if at:  # the line that holds the byte before belongs to the previous part
        stream.seek(at - 1)
        at += _skip_line(stream) - 1
    while line := stream.readline(_MAX_BYTES + 1):
        content = _limited(line, path, at)
        yield at, content if isinstance(content, InputError) else content.rstrip(b"\r\n")
        at += len(line) + (_skip_line(stream) if isinstance(content, InputError) else 0)


def _skip_line(stream: io.BufferedReader) -> int:
    """Read to the end of a line; returns its bytes."""
    size = 0
    while rest := stream.readline(2**20):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return size


def _paragraphs(lines: Iterator[_Located], part: Part, path: str) -> Iterator[_Located]:
    """The text between blank lines. A paragraph belongs to the part in which the blank line before it starts."""
    gathered: list[bytes] = []
    began = size = 0
    inside = part.start == 0  # False before the first blank line: that paragraph belongs to the previous part
    for at, line in lines:
        if isinstance(line, InputError) or line.strip():
            if inside:
                began, size = (began, size) if size else (at, 0)
                size += _MAX_BYTES + 1 if isinstance(line, InputError) else len(line)
                if size <= _MAX_BYTES and isinstance(line, bytes):
                    gathered.append(line)
            elif part.end is not None and at >= part.end:
                return
            continue
        if size:
            yield began, _limited(b"\n".join(gathered), path, began, size)
            gathered, size = [], 0
        inside = part.end is None or at < part.end
        if not inside:
            return
    if size:
        yield began, _limited(b"\n".join(gathered), path, began, size)


# How a file starts that holds no JSON lines, but an array of objects, or objects on several lines each.
_NOT_BY_LINE = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*[{\]]|\{[ \t]*\r?\n)")
_JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def _elements(stream: io.BufferedReader, path: str) -> Iterator[_Located]:
    """The elements of a JSON array, or the objects of a file that holds some one after the other."""
    content = stream.read(_MAX_ARRAY + 1).removeprefix(b"\xef\xbb\xbf")
    if len(content) > _MAX_ARRAY:
        raise InputError(f"{path}: more than {_MAX_ARRAY // 2**20} MiB of JSON; write one object per line: jq -c '.[]'")
    array = content.lstrip().startswith(b"[")
    depth = start = 0
    for mark in _JSON_MARKS.finditer(content):
        sign = mark[0]
        if array and depth == 0:
            start = mark.end()
        depth += (sign in (b"[", b"{")) - (sign in (b"]", b"}"))
        closed = depth == 0 and sign in (b"]", b"}")
        if closed or (array and depth == 1 and sign == b","):
            element = content[start : mark.start() if array else mark.end()]
            if element.strip() or not closed:
                yield start + len(element) - len(element.lstrip()), _limited(element.strip(), path, start)
            start = mark.end()
            if closed and array:
                break
    if array and depth:
        raise InputError(f"{path}: a JSON array without its end; copy it again")
    if content[start:].strip():
        if array:
            raise InputError(by_line(f"{path}, byte {start}: more than one JSON array; write one object per line"))
        yield start, _limited(content[start:].strip(), path, start)  # which is not JSON


def _json_field(line: str, reading: Reading, where: str) -> Text:
    if not line.strip():
        return ""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        if isinstance(error, json.JSONDecodeError):  # whose own line counts from this place
            reason = f"{error.msg}, {error.pos} characters on"
        raise InputError(f"{where}: not JSON ({reason}); correct the line, or pass --bad-documents skip") from error
    if not isinstance(tree, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(tree).__name__}")
    return document_of(tree, reading, where)


def _rows(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | InputError]:
    """As `_text_or_json`, of tables."""
    for path in part.paths:
        with opened(path) as raw:
            for row, where in _csv(raw, path, reading) if part.kind == "csv" else _arrow(raw, part, path, reading):
                try:
                    if isinstance(row, InputError):
                        raise row
                    tree = {
                        name: cell.as_py() if isinstance(cell, pyarrow.Scalar) else cell for name, cell in row.items()
                    }
                    document: Text | InputError = document_of(tree, reading, where)
                except UnicodeDecodeError:
                    document = InputError(f"{where}: not UTF-8; convert it, or pass --bad-documents skip")
                except InputError as error:
                    document = error
                yield document
        advance(part.size // len(part.paths))


_Row = tuple[dict[str, pyarrow.Scalar | str] | InputError, str]  # (cells by column or why there are none, where it is)


def _arrow(raw: io.BufferedReader, part: Part, path: str, reading: Reading) -> Iterator[_Row]:
    """The rows of a parquet or Arrow file, which is a file or a stream of batches."""
    where = f"{path}, row {{}}"
    if part.kind == "parquet":
        table = pyarrow.parquet.ParquetFile(raw)
        columns = _columns(table.schema_arrow.names, reading, path)
        groups = list(range(part.start, table.metadata.num_row_groups if part.end is None else part.end))
        batches = table.iter_batches(64, row_groups=groups, columns=columns)
        where = f"{path}, row {{}} from row group {part.start} on"
    elif raw.peek(6)[:6] == b"ARROW1":
        file = pyarrow.ipc.open_file(raw)
        columns = _columns(file.schema.names, reading, path)
        batches = map(file.get_batch, range(file.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(raw)
        columns = _columns(batches.schema.names, reading, path)
    for i, values in enumerate(values for batch in batches for values in zip(*map(batch.column, columns), strict=True)):
        yield dict(zip(columns, values, strict=True)), where.format(i)


def _csv(raw: io.BufferedReader, path: str, reading: Reading) -> Iterator[_Row]:
    csv.field_size_limit(_MAX_BYTES)
    text = io.TextIOWrapper(_decompressed(raw, path), "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
    names = next(rows, [])
    columns = _columns(names, reading, path)
    while True:
        where, skip = f"{path}, line {rows.line_num + 1}", "pass --bad-documents skip"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield InputError(f"{where}: not CSV ({error}); correct it, or {skip}"), where
            continue
        if len(cells) == len(names):
            yield {column: cells[names.index(column)] for column in columns}, where
        elif cells:  # no blank line
            found = f"{len(cells)} cells instead of {len(names)}; put text with commas in quotes"
            yield InputError(f"{where}: {found}, or {skip}"), where


def _columns(names: list[str], reading: Reading, path: str) -> list[str]:
    """The columns that hold the fields, which may be nested in them."""
    columns = []
    for flag, field in (("--field", reading.field), ("--prompt-field", reading.prompt_field)):
        column = field if field in names else field.partition(".")[0]
        if field and names.count(column) != 1:
            raise InputError(
                f"{path}: {'two columns' if column in names else 'no column'} {field!r}; pass {flag} with one of: "
                f"{', '.join(map(repr, names))}"
            )
        columns += [column] * bool(field and column not in columns)
    return columns


def _decompressed(raw: io.BufferedReader, path: str) -> io.BufferedReader:
    path = path.lower()
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.endswith(".bz2"):
        return io.BufferedReader(bz2.BZ2File(raw))
    if path.endswith(".xz"):
        return io.BufferedReader(lzma.LZMAFile(raw))
    if path.endswith(".zst"):
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _limited(content: bytes, path: str, at: int, size: int | None = None) -> bytes | InputError:
    """`content`, unless the document it belongs to, of `size` bytes (None: its own), is too large."""
    if (len(content) if size is None else size) <= _MAX_BYTES:
        return content
    return InputError(
        f"{path}, byte {at}: a document of more than {_MAX_BYTES // 2**20} MiB; cut it, or for text files pass "
        "--document line or blank_line"
    )
