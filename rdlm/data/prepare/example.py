"""One example of prepared chats or pairs, for the eye: which of its tokens are scored."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np

from rdlm.data.manifest import read_manifest
from rdlm.data.packing import labels_by_chunk
from rdlm.data.records import RowFiles
from rdlm.tokenizer import Tokenizer

SCORED, GIVEN = "  > ", "    "
_SEARCHED = 1000  # rows
_LINES, _WIDTH = 40, 160


def marked_example(folder: str | Path) -> list[str]:
    r"""Lines with the text of a train document, of which scored tokens begin with `SCORED` and others with `GIVEN`.

    The first document that is whole from its beginning, has a label and has tokens that are not scored; no lines if
    everything is scored. Long texts are shortened. Control characters are shown escaped; a line that does not end in
    `\n` is followed by no line break in the text.

    Raises:
      InputError: no prepared data there, or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = [(folder / shard.file, shard.rows) for shard in manifest.train.shards]
    tokenizer = None
    for row in itertools.islice(RowFiles(shards, manifest.token_dtype), _SEARCHED):
        if row.scored is None:
            continue
        ends = np.cumsum(row.chunks[:, 2])
        for (_, offset, length), end, labels in zip(row.chunks, ends, labels_by_chunk(row), strict=True):
            scored = row.scored[end - length : end]
            if offset == 0 and labels and not scored.all():
                tokenizer = tokenizer or Tokenizer.load(folder / "tokenizer")
                return _lines(tokenizer, row.tokens[end - length : end], scored)
    return []


def _lines(tokenizer: Tokenizer, tokens: np.ndarray, scored: np.ndarray) -> list[str]:
    lines = []
    edges = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1).tolist(), len(tokens)]
    for begin, end in itertools.pairwise(edges):
        text = tokenizer.decode(tokens[begin:end], skip_special=False, after=tokens[:begin])
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            shown = f"{shown[: _WIDTH // 2]} ... {shown[-_WIDTH // 2 :]}" if len(shown) > _WIDTH else shown
            lines.append((SCORED if scored[begin] else GIVEN) + shown)
    if len(lines) <= _LINES:
        return lines
    first = next(i for i, line in enumerate(lines) if line.startswith(SCORED))
    begin = max(0, min(first - _LINES // 2, len(lines) - _LINES))
    end = begin + _LINES
    before, after = [f"{GIVEN}... {begin} lines"], [f"{GIVEN}... {len(lines) - end} lines"]
    return [*before * (begin > 0), *lines[begin:end], *after * (end < len(lines))]
