"""Documents of tokens into rows of equal length, and rows into the arrays a model trains on. Pure numpy.

A row holds up to L + 1 tokens, because the last input needs a label. A packing mode is a function from documents to
rows; the code that follows it (`records`, `loader`) takes rows of any mode.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rdlm.config import IGNORED, Packing

_OPEN_ROWS = 256  # rows that `best_fit` keeps open: more fill hardly better


class Document(NamedTuple):
    """Tokens of one document, wrapped in its begin and end tokens."""

    number: int
    """Below 2**32: the key of its noise, with the offset of a chunk."""
    tokens: np.ndarray
    """int [n]."""
    scored: np.ndarray | None = None
    """bool [n]: which tokens count as labels (the assistant's, in chats); None: all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Consecutive chunks of documents: S chunks, n tokens in all."""

    tokens: np.ndarray
    """int32 [n]."""
    chunks: np.ndarray
    """int64 [S, 3]: document index, offset of the chunk in its document, length; the lengths add up to n."""
    scored: np.ndarray | None = None
    """bool [n]: which tokens count as labels; None: all."""


EMPTY = Row(np.zeros(0, np.int32), np.zeros((0, 3), np.int64))
"""A row of padding alone: nothing attended, nothing scored."""
Piece = tuple[Document, int, int]
"""Document, offset, length."""


def concatenate_and_split(documents: Iterable[Document], sequence_length: int) -> Iterator[Row]:
    """Cut the stream of all documents every L tokens; a document that does not fit continues in the next row.

    With all documents laid end to end in `stream`, row r holds stream[r*L : r*L + L + 1]. Neighbouring rows share one
    token, the last label of one and the first input of the next, so every token is an input exactly once and every
    token but the first of the stream is a label exactly once: no label is lost where a document is cut.

    Args:
      documents: in the order in which they are laid out.
      sequence_length: L.

    Yields:
      Rows of L + 1 tokens; the last may have fewer, but at least two.
    """
    size = sequence_length + 1
    pieces: list[Piece] = []
    capacity = size
    for document in documents:
        offset = 0
        while offset < len(document.tokens):
            length = min(capacity, len(document.tokens) - offset)
            pieces.append((document, offset, length))
            offset += length
            capacity -= length
            if capacity == 0:
                yield row_of(pieces)
                pieces, capacity = [], size
                offset -= 1  # the last label is the first input of the next row
    if size - capacity > 1:
        yield row_of(pieces)


def best_fit(documents: Iterable[Document], sequence_length: int) -> Iterator[Row]:
    """Put whole documents into the open row that they fill best; only documents longer than a row are cut.

    These are cut every L tokens; neighbouring pieces share one token as in `concatenate_and_split`, so no label is
    lost. At most 256 rows are open at a time; the fullest is closed first. Rows end in padding where nothing fits.

    Args and rows: as `concatenate_and_split`.
    """
    size = sequence_length + 1
    capacities: list[tuple[int, int]] = []  # (tokens that still fit, number of the row), ascending
    rows: dict[int, list[Piece]] = {}
    begun = 0
    for document in documents:
        n = len(document.tokens)
        for offset in range(0, max(n - 1, 1), sequence_length):
            length = min(size, n - offset)
            place = bisect.bisect_left(capacities, (length, -1))
            if place < len(capacities):
                capacity, row = capacities.pop(place)
            else:
                capacity, row = size, begun
                rows[row], begun = [], begun + 1
            rows[row].append((document, offset, length))
            if capacity - length < 2:  # no document is shorter than its begin and end tokens
                yield row_of(rows.pop(row))
            else:
                bisect.insort(capacities, (capacity - length, row))
            if len(capacities) > _OPEN_ROWS:
                yield row_of(rows.pop(capacities.pop(0)[1]))
    yield from (row_of(pieces) for pieces in rows.values() if sum(length for *_, length in pieces) > 1)


def document_start(documents: Iterable[Document], sequence_length: int) -> Iterator[Row]:
    """The reference's rows: each starts with a document, and tokens that do not fit are dropped (arXiv 2502.05171).

    Documents are joined until they reach L + 1 tokens. The first L + 1 are the row; the rest of the last document is
    dropped. So are the documents left at the end, too few for a row.

    Args and rows: as `concatenate_and_split`; every row is full.
    """
    pieces: list[Piece] = []
    capacity = sequence_length + 1
    for document in documents:
        length = min(capacity, len(document.tokens))
        pieces.append((document, 0, length))
        capacity -= length
        if capacity == 0:
            yield row_of(pieces)
            pieces, capacity = [], sequence_length + 1


def pack(packing: Packing) -> Callable[[Iterable[Document], int], Iterator[Row]]:
    """The function of a packing mode."""
    modes = {"concatenate_and_split": concatenate_and_split, "best_fit": best_fit, "document_start": document_start}
    return modes[packing]


def row_of(pieces: Sequence[Piece]) -> Row:
    """Pieces of documents concatenated into a row."""
    tokens = np.concatenate([d.tokens[offset : offset + length] for d, offset, length in pieces]).astype(np.int32)
    scored = None
    if any(d.scored is not None for d, *_ in pieces):
        scored = np.concatenate(
            [np.ones(n, bool) if d.scored is None else d.scored[offset : offset + n] for d, offset, n in pieces]
        )
    return Row(tokens, np.array([(d.number, offset, length) for d, offset, length in pieces], np.int64), scored)


def arrays(row: Row, sequence_length: int, *, pad_id: int, epoch: int = 0) -> dict[str, np.ndarray]:
    """The model's input for one row: int32 [L] each.

    tokens; labels (the next token of the same chunk if it counts, else IGNORED); segment_ids (1, 2, ... by chunk,
    0 is padding); positions (from 0 in every chunk); sequence_ids (see `sequence_ids`; 0 is padding).
    """
    document, offset, length = row.chunks.T
    size, n = sequence_length + 1, len(row.tokens)
    tokens = np.full(size, pad_id, np.int32)
    tokens[:n] = row.tokens
    segments = np.zeros(size, np.int32)
    segments[:n] = np.repeat(np.arange(1, len(length) + 1), length)
    positions = np.zeros(size, np.int32)
    positions[:n] = np.arange(n) - np.repeat(np.cumsum(length) - length, length)
    sequences = np.zeros(size, np.int32)
    sequences[:n] = np.repeat(sequence_ids(document, offset, epoch), length)
    scored = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    if row.scored is not None:
        scored[: n - 1] &= row.scored[1:]
    return {
        "tokens": tokens[:-1],
        "labels": np.where(scored, tokens[1:], np.int32(IGNORED)),
        "segment_ids": segments[:-1],
        "positions": positions[:-1],
        "sequence_ids": sequences[:-1],
    }


def labels_in(row: Row) -> int:
    """How many labels of `arrays(row, ...)` count: the scored tokens but the first of every chunk."""
    return int(labels_by_chunk(row).sum())


def labels_by_chunk(row: Row) -> np.ndarray:
    """`labels_in` of every chunk, int64 [S]."""
    if row.scored is None or not len(row.chunks):
        return row.chunks[:, 2] - 1
    first = np.cumsum(row.chunks[:, 2]) - row.chunks[:, 2]
    return np.add.reduceat(row.scored.astype(np.int64), first) - row.scored[first]


def sequence_ids(document: np.ndarray, offset: np.ndarray, epoch: int) -> np.ndarray:
    """A number for each chunk of a document in an epoch, int32 in [0, 2**31): the key of its noise.

    It depends on the document, the offset and the epoch, never on the row that holds the chunk or on its neighbours.
    So noise keyed by it does not change when rows are shuffled or documents packed in another way.
    """
    chunk = np.asarray(document).astype(np.uint64) << np.uint64(32) | np.asarray(offset).astype(np.uint64)
    return (mix(mix(chunk) ^ np.uint64(epoch)) >> np.uint64(33)).astype(np.int32)


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64: a bijection of uint64 numbers that scatters neighbours."""
    with np.errstate(over="ignore"):  # wrapping is intended
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ x >> np.uint64(31))
