"""Parts, the units of work of preparation, and what a document is before it is encoded.

A part is a few small files, one large file, or a range of one. It is read from front to back, independently of the
others. How files are cut depends on the files alone, never on the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet

from rdlm.config import InputError
from rdlm.data.manifest import Reading
from rdlm.data.prepare.input_files import COMPRESSED, InputFile, Kind, kind_of, opened

Message = dict[str, Any]
"""One message of a conversation: role, content and other fields that a chat template may read."""
Text = str | list[Message]
"""A document before it is encoded: plain text, or the messages of a conversation."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work. `start` and `end` count bytes (text, jsonl), row groups (parquet) or examples (tfds)."""

    kind: Kind
    paths: tuple[str, ...]
    size: int
    """Bytes of input, for progress."""
    start: int = 0
    end: int | None = None
    """None: to the end."""
    split: str = ""
    """Of a TFDS dataset."""


def cut_files(files: Sequence[InputFile], reading: Reading, part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes`; compressed files are never cut.

    Raises:
      InputError: a parquet file is damaged.
    """
    result: list[Part] = []
    small: list[InputFile] = []  # consecutive files of one kind that share a part

    def flush() -> None:
        if small:
            result.append(Part(kind_of(small[0].path), tuple(f.path for f in small), sum(f.bytes for f in small)))
            small.clear()

    for file in files:
        kind = kind_of(file.path)
        by_line = kind == "jsonl" or (kind == "text" and reading.document != "file")
        if file.bytes > part_bytes and kind == "parquet":
            flush()
            result += _row_group_parts(file, part_bytes)
        elif file.bytes > part_bytes and by_line and not file.path.endswith(COMPRESSED):
            flush()
            count = -(-file.bytes // part_bytes)
            edges = itertools.pairwise(file.bytes * i // count for i in range(count + 1))
            result += [Part(kind, (file.path,), end - start, start, end) for start, end in edges]
        else:
            if small and (sum(f.bytes for f in small) + file.bytes > part_bytes or kind != kind_of(small[0].path)):
                flush()
            small.append(file)
    flush()
    return result


def text_of(value: Any, field: str, where: str) -> Text:
    """The value of a field as a document.

    Raises:
      InputError: it is neither text nor a list of messages.
    """
    if isinstance(value, bytes):
        return utf8(value, where)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    raise InputError(f"{where}: field {field!r} is {type(value).__name__}, neither text nor a list of messages")


def utf8(content: bytes, where: str) -> str:
    """Bytes as text.

    Raises:
      InputError: they are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} {error.start} bytes on); convert it, or pass --bad-documents skip"
        ) from error


def _row_group_parts(file: InputFile, part_bytes: int) -> list[Part]:
    with opened(file.path) as raw:
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
    return [Part("parquet", (file.path,), share, start, end) for start, end in itertools.pairwise(edges)]
