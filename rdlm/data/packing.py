"""Documents of tokens into rows of equal length, and rows into the arrays a model trains on. Pure numpy.

A row holds up to L + 1 tokens, because the last input needs a label. A packing mode is a function from documents to
rows, like `concatenate_and_split`; everything after it (`records`, `loader`) takes any rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

IGNORED = -100
"""Label of a position that is not scored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Consecutive chunks of documents: S chunks, n tokens in all."""

    tokens: np.ndarray
    """int32 [n]."""
    chunks: np.ndarray
    """int64 [S, 3]: document index, offset of the chunk in its document, length; the lengths add up to n."""


def concatenate_and_split(documents: Iterable[tuple[int, np.ndarray]], sequence_length: int) -> Iterator[Row]:
    """Cut the stream of all documents every L tokens; a document that does not fit goes on in the next row.

    With all documents laid end to end in `stream`, row r holds stream[r*L : r*L + L + 1]. Neighbouring rows share one
    token, the last label of one and the first input of the next, so every token is an input exactly once and every
    token but the first of the stream is a label exactly once: no label is lost where a document is cut.

    Args:
      documents: (index of the document, int [n] tokens), each document wrapped in its begin and end tokens.
      sequence_length: L.

    Yields:
      Rows of L + 1 tokens; the last may have fewer, but at least two.
    """
    size = sequence_length + 1
    tokens: list[np.ndarray] = []
    chunks: list[tuple[int, int, int]] = []
    room = size
    for index, document in documents:
        offset = 0
        while offset < len(document):
            part = document[offset : offset + room]
            tokens.append(part)
            chunks.append((index, offset, len(part)))
            offset += len(part)
            room -= len(part)
            if room == 0:
                yield _row(tokens, chunks)
                tokens, chunks, room = [], [], size
                offset -= 1  # the last label is the first input of the next row
    if size - room > 1:
        yield _row(tokens, chunks)


def _row(tokens: list[np.ndarray], chunks: list[tuple[int, int, int]]) -> Row:
    return Row(np.concatenate(tokens).astype(np.int32), np.array(chunks, np.int64))


def arrays(row: Row, sequence_length: int, *, pad_id: int, epoch: int = 0) -> dict[str, np.ndarray]:
    """What a model reads of one row: int32 [L] each.

    tokens; labels (the next token of the same chunk, else IGNORED); segment_ids (1, 2, ... by chunk, 0 is padding);
    positions (from 0 in every chunk); sequence_ids (see `sequence_ids`; 0 is padding).
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
    return {
        "tokens": tokens[:-1],
        "labels": np.where(scored, tokens[1:], np.int32(IGNORED)),
        "segment_ids": segments[:-1],
        "positions": positions[:-1],
        "sequence_ids": sequences[:-1],
    }


def padding(sequence_length: int, *, pad_id: int) -> dict[str, np.ndarray]:
    """`arrays` of a row without tokens: nothing attended, nothing scored."""
    return arrays(Row(np.zeros(0, np.int32), np.zeros((0, 3), np.int64)), sequence_length, pad_id=pad_id)


def sequence_ids(document: np.ndarray, offset: np.ndarray, epoch: int) -> np.ndarray:
    """A number for each chunk of a document in an epoch, int32 in [0, 2**31): the key of its noise.

    It depends on which tokens the chunk starts with and on the epoch, never on the row that holds it or on its
    neighbours, so noise keyed by it does not change when rows are shuffled or laid out anew.
    """
    chunk = np.asarray(document).astype(np.uint64) << np.uint64(32) | np.asarray(offset).astype(np.uint64)
    return (mix(mix(chunk) ^ np.uint64(epoch)) >> np.uint64(33)).astype(np.int32)


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64: scrambles uint64 numbers one to one, so that neighbours share nothing."""
    with np.errstate(over="ignore"):  # wrapping is the point
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ x >> np.uint64(31))
