"""Training data read, encoded and packed during training, for corpora too large to prepare.

Every process reads its own parts of the files. Unlike prepared data, the batches depend on the number of processes and
come in order only: checkpoints keep the position, a Grain iterator state. Resuming reads the current part again up to
that position, about 64 MB at most for files that can be cut.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from typing import TypedDict

import grain
from grain.experimental import WindowShuffleIterDataset

from rdlm.config import InputError
from rdlm.data.loader import Batch, DataState, Example, PackedData, Share, check_sources, shuffled, stack
from rdlm.data.manifest import Manifest
from rdlm.data.packing import Document, Piece, labels_in, row_of
from rdlm.data.prepare.documents import read_documents
from rdlm.data.prepare.input_files import Fingerprint, changed, described, find_files, fingerprint
from rdlm.data.prepare.parts import Part, cut_files
from rdlm.data.prepare.shards import DOCUMENT_STRIDE, encode, held_out
from rdlm.runtime import exchange
from rdlm.tokenizer import Tokenizer

PART_BYTES = 64_000_000
_WINDOW = 1024  # rows shuffled among each other
_ENCODED_TOGETHER = 16  # documents, on all cores
_STATES = 64  # steps whose positions are kept: more than are prefetched


class StreamedData:
    """Batches of a stream, in order from the first step or from a saved state.

    Tokenizer, length, field names and validation split are those of a prepared sample. Documents that the sample's
    validation fraction holds out are left out here, so none of them is ever trained on.
    """

    def __init__(
        self,
        paths: Sequence[str],
        sample: PackedData,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        part_bytes: int = PART_BYTES,
        window: int = _WINDOW,
    ) -> None:
        """Find the files; reading begins with the first batch.

        Args:
          paths: files, folders, globs or URLs (see `input_files.find_files`).
          sample: any split of data prepared from some of them.
          batch_size: B, rows of a step over all processes.
          seed: decides the order of parts, and of rows within a window.
          process_index: which rows of a batch to make.
          process_count: number of processes; each must get a part.
          part_bytes: approximate size of a part.
          window: rows shuffled among each other.

        Raises:
          InputError: no files, fewer parts than processes, or a sample that was deduplicated or whose packing is not
            concatenate_and_split.
        """
        manifest = sample.manifest
        if manifest.recipe.packing != "concatenate_and_split":
            raise InputError(
                f"data.stream: {sample.folder} was prepared with packing = {manifest.recipe.packing}; a stream can "
                "only be packed by concatenate_and_split"
            )
        if manifest.recipe.deduplicate:
            raise InputError(
                f"data.stream: {sample.folder} was prepared with --deduplicate, but a stream keeps duplicates; "
                "prepare the sample without"
            )
        left_out: Counter[str] = Counter()
        files = find_files(paths, left_out)
        self.files = [fingerprint(file.path, samples=True) for file in files]
        """By which a resumed run knows its files again."""
        if process_index == 0:
            print(f"Streaming {described(files, left_out)}", file=sys.stderr)
        all_parts = cut_files(files, manifest.recipe.reading, part_bytes)
        if len(all_parts) < process_count:
            raise InputError(
                f"data.stream: {len(all_parts)} parts are too few for {process_count} processes; prepare the data"
            )
        self._sample, self._process, self._processes = sample, process_index, process_count
        self.batch_size, self.sequence_length = batch_size, manifest.recipe.sequence_length
        self._count = Share.of(batch_size, process_index, process_count).rows
        tokens = sum(file.bytes for file in files) / max(manifest.train.bytes, 1) * manifest.train.tokens
        self.steps_per_epoch = max(1, round(tokens / self.sequence_length / batch_size))
        """Estimated from the size of the files and the sample's tokens per byte."""
        mine = [(number, part) for number, part in enumerate(all_parts) if number % process_count == process_index]
        rows = _Rows(mine, manifest, Tokenizer.load(sample.folder / "tokenizer"), seed)
        self._rows = iter(WindowShuffleIterDataset(rows, window_size=window, seed=seed))
        self._next = 0
        self._states: dict[int, str] = {0: self._position()}

    def batch(self, step: int) -> Batch:
        """The next batch; `step` must follow the last one, or be the restored one.

        Raises:
          ValueError: another step.
          InputError: a file cannot be read.
        """
        if step != self._next:
            raise ValueError(f"step = {step}: a stream continues at {self._next}; restore a state to move it")
        try:
            examples = [next(self._rows) for _ in range(self._count)]
        except InputError as error:
            raise InputError(str(error).partition("\n")[0]) from error  # Grain adds lines of its own to the first one
        self._next = step + 1
        self._states[self._next] = self._position()
        self._states.pop(self._next - _STATES, None)
        return stack(examples, self.sequence_length, self._sample.manifest.pad_id)

    def state(self, step: int) -> DataState:
        """The state before `step`, one of the last 64. All processes must call it together."""
        return {
            "sources": [self._sample.manifest.identity()],
            "stream": exchange(self._states[step]),
            "files": [list(file) for file in self.files],
        }

    def check(self, state: DataState) -> None:
        """See `PackedData.check`.

        Raises:
          InputError: another sample, or other files.
        """
        check_sources(state, [(self._sample.folder, self._sample.manifest)])
        before = [Fingerprint(*file) for file in state.get("files", self.files)]  # older states have none
        if different := changed(before, self.files):
            raise InputError(
                f"data.stream: the files have changed since the checkpoint: {different}; its position in them is lost: "
                "put the same files back, or begin another run"
            )

    def restore(self, step: int, state: DataState) -> None:
        """Continue at `step` from its `state`.

        Raises:
          InputError: see `check`; another number of processes, or a run that was not streamed.
        """
        self.check(state)
        saved = state.get("stream", [])
        if len(saved) != self._processes:
            raise InputError(
                f"data.stream: saved by {len(saved)} processes, not {self._processes}; resume on as many, or train on "
                "prepared data, which any number can share"
            )
        self._rows.set_state(json.loads(saved[self._process]))
        self._next, self._states = step, {step: saved[self._process]}

    def close(self) -> None:
        """Close the files."""
        self._rows.close()

    def _position(self) -> str:
        return json.dumps(self._rows.get_state())


class _Position(TypedDict):
    """Where the documents of a process continue."""

    part: int
    """Parts done, over all epochs."""
    document: int
    """Documents done of the next part."""


class _RowPosition(TypedDict):
    """Where the rows of a process continue."""

    documents: _Position
    """Before the document in which the next row starts."""
    offset: int
    """Token of that document."""


class _Rows(grain.IterDataset):
    """The train documents of some parts as rows, epoch after epoch, the parts in another order in every epoch."""

    def __init__(self, parts: list[tuple[int, Part]], manifest: Manifest, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__()
        self.parts, self.manifest, self.tokenizer, self.seed = parts, manifest, tokenizer, seed
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> _RowIterator:
        return _RowIterator(self)

    def since(self, state: _RowPosition) -> Generator[tuple[_RowPosition, Example], None, None]:
        """Rows as by `packing.concatenate_and_split` from a position on, each with the position after it.

        Rows without a label are left out.
        """
        before, offset = state["documents"], state["offset"]
        with contextlib.closing(self._documents(before)) as documents:
            after, document, epoch = next(documents)
            while True:
                row_epoch, capacity = epoch, self.manifest.recipe.sequence_length + 1
                pieces: list[Piece] = []
                while capacity:
                    length = min(capacity, len(document.tokens) - offset)
                    pieces.append((document, offset, length))
                    offset, capacity = offset + length, capacity - length
                    if capacity:  # the document is used up
                        before, offset = after, 0
                        after, document, epoch = next(documents)
                offset -= 1  # the last label is the first input of the next row
                row = row_of(pieces)
                if labels_in(row):
                    yield _RowPosition(documents=before, offset=offset), Example(row, row_epoch)

    def _documents(self, state: _Position) -> Generator[tuple[_Position, Document, int], None, None]:
        """Documents from a position on, each with the position after it and its epoch."""
        recipe, fruitless = self.manifest.recipe, 0
        for turn in itertools.count(state["part"]):
            epoch, i = divmod(turn, len(self.parts))
            number, part = self.parts[shuffled(i, len(self.parts), self.seed, epoch)]
            start = state["document"] if turn == state["part"] else 0
            fruitless += 1
            before = self.skipped["bad"]
            with contextlib.closing(read_documents(part, recipe.reading, skipped=self.skipped)) as texts:
                numbered = itertools.islice(enumerate(texts), start, None)
                train = ((at, text) for at, text in numbered if not held_out(text, recipe.validation_fraction))
                while batch := list(itertools.islice(train, _ENCODED_TOGETHER)):
                    encoded = encode([text for _, text in batch], self.tokenizer, recipe.reading, self.skipped)
                    for (at, _), made in zip(batch, encoded, strict=True):
                        if made is not None:
                            fruitless = 0 if made[1] is None or made[1].any() else fruitless
                            index = (number * DOCUMENT_STRIDE + at) % 2**32
                            yield _Position(part=turn, document=at + 1), Document(index, *made), epoch
            if self.skipped["bad"] > before:
                print(f"data.stream: {self.skipped['bad']:,} bad documents left out so far", file=sys.stderr)
            if fruitless > len(self.parts):
                raise InputError("data.stream: the files hold no train document, or none with a label")


class _RowIterator(grain.DatasetIterator):
    """`_Rows.since` as a resumable iterator."""

    def __init__(self, data: _Rows) -> None:
        super().__init__()
        self._data, self._position = data, _RowPosition(documents=_Position(part=0, document=0), offset=0)
        self._rows = data.since(self._position)

    def __next__(self) -> Example:
        self._position, example = next(self._rows)
        return example

    def get_state(self) -> _RowPosition:
        return self._position

    def set_state(self, state: _RowPosition) -> None:
        self._rows.close()
        self._position, self._rows = state, self._data.since(state)

    def close(self) -> None:
        super().close()
        self._rows.close()
