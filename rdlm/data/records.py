"""Rows on disk: array_record files, one record per row, any row readable by its number.

A record is little-endian: uint32 S, then S times uint32 (document, offset, length), then the tokens, as uint16 if the
vocabulary fits and int32 otherwise. If the highest bit of S is set (it does not belong to the number), n bits follow,
padded to bytes, most significant bit first: which tokens count as labels.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from rdlm.config import InputError, one_line
from rdlm.data.manifest import PREPARE_AGAIN
from rdlm.data.packing import Row

_MASKED = 2**31


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype records offer for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def to_bytes(row: Row, dtype: str) -> bytes:
    """The record of a row."""
    header = np.uint32(len(row.chunks) | (0 if row.scored is None else _MASKED)).astype("<u4")
    tail = b"" if row.scored is None else np.packbits(row.scored).tobytes()
    return header.tobytes() + row.chunks.astype("<u4").tobytes() + row.tokens.astype(_on_disk(dtype)).tobytes() + tail


def from_bytes(record: bytes, dtype: str) -> Row:
    """The row of a record."""
    header = int(np.frombuffer(record, "<u4", 1)[0])
    count = header & ~_MASKED
    chunks = np.frombuffer(record, "<u4", 3 * count, offset=4).reshape(-1, 3).astype(np.int64)
    start, n = 4 + 12 * count, int(chunks[:, 2].sum())
    tokens = np.frombuffer(record, _on_disk(dtype), n, offset=start)
    scored = None
    if header & _MASKED:
        bits = np.frombuffer(record, np.uint8, offset=start + tokens.nbytes)
        scored = np.unpackbits(bits, count=n).astype(bool)
    return Row(tokens.astype(np.int32), chunks, scored)


def write_rows(path: Path, rows: Iterable[Row], dtype: str) -> int:
    """Write `rows` to a new file and return their number.

    Raises:
      OSError: the file cannot be written.
    """
    count = 0
    try:
        # One record per chunk of the file, so that reading a row reads nothing else. Tokens hardly compress.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for row in rows:
            writer.write(to_bytes(row, dtype))
            count += 1
        writer.close()
    except RuntimeError as error:  # array_record's error when the disk is full
        raise OSError(str(error)) from error
    if not path.exists():  # array_record raises nothing if it cannot open the file
        raise FileNotFoundError(f"{path} could not be created")
    return count


class RowFiles:
    """Random access to the rows of several files, numbered from file to file; safe to share between threads.

    Files are opened when first needed, 256 at most at once. (grain's `ArrayRecordDataSource` keeps every file open, and
    its errors do not name the damaged one.)
    """

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: str) -> None:
        """`files`: each with its number of rows."""
        self._files, self._dtype = files, dtype
        self._ends = list(itertools.accumulate(count for _, count in files))
        self._reader = functools.lru_cache(256)(_reader)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Row:
        """Row `index`.

        Raises:
          InputError: its file is not an array_record file, holds another number of rows, or is damaged there (every
            record has a checksum).
        """
        i = bisect.bisect_right(self._ends, index)
        path, count = self._files[i]
        try:
            [record] = self._reader(path, count).read([index - self._ends[i] + count])
        except RuntimeError as error:
            raise InputError(f"{path}: damaged ({one_line(error)}); {PREPARE_AGAIN}") from error
        return from_bytes(record, self._dtype)


def _reader(path: Path, count: int) -> array_record_module.ArrayRecordReader:
    # No read-ahead and a small buffer: shuffled rows are read one by one.
    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = array_record_module.ArrayRecordReader(str(path), options=options, file_reader_buffer_size=2**15)
    if reader.num_records() != count:
        raise RuntimeError(f"{reader.num_records()} rows instead of {count}")
    return reader


def _on_disk(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")
