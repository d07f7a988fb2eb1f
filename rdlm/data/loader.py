"""Batches from one prepared folder, as a pure function of the step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import grain
import numpy as np
from grain.experimental import index_shuffle

from rdlm.config import InputError, local_path
from rdlm.data.manifest import Manifest, first_difference, read_manifest
from rdlm.data.packing import EMPTY, Row, arrays, labels_in, mix
from rdlm.data.records import RowFiles

Batch = dict[str, np.ndarray]
"""tokens, labels, segment_ids, positions, sequence_ids: int32 [B, L] each (see `packing.arrays`)."""
ENDLESS = 2**62
"""Length of a dataset that goes through its rows again and again."""


class DataState(TypedDict):
    """The part of a checkpoint that describes the data, as JSON."""

    sources: list[dict[str, object]]
    """Identity of every prepared folder."""
    epochs: NotRequired[list[float]]
    """How often each has been seen."""
    pattern: NotRequired[list[int]]
    """Of a mixture: rows of each folder in a cycle."""
    stream: NotRequired[list[str]]
    """Of a stream: the position of every process."""
    files: NotRequired[list[list[str | int]]]
    """Of a stream: the fingerprints of its files."""


class Example(NamedTuple):
    """A row and the number of its epoch, which keys its noise."""

    row: Row
    epoch: int


class Share(NamedTuple):
    """The part of every batch that a process makes: `rows` consecutive rows."""

    rows: int
    process_index: int
    process_count: int

    @classmethod
    def of(cls, batch_size: int, process_index: int, process_count: int) -> Share:
        """An equal share for every process.

        Raises:
          InputError: batch and processes do not divide.
        """
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise InputError(
                f"data.batch_size = {batch_size}: must be a positive multiple of {process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index = {process_index}: must be in [0, {process_count})")
        return cls(batch_size // process_count, process_index, process_count)


class PackedData:
    """The rows of one split of a prepared folder, in batches.

    There is no position to keep: `batch(step)` depends on its argument alone, so a run resumes at any step, on any
    number of processes, with the batches it would have seen.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        tokenizer_hash: str | None = None,
    ) -> None:
        """Open a split.

        Args:
          folder: made by `prepare_embedded` or `build`.
          split: "train" or "validation".
          sequence_length: L, as prepared.
          batch_size: B, rows of a step over all processes.
          seed: decides the order of rows.
          shuffle: a new order every epoch; False: the order on disk.
          process_index: which slice of B / process_count consecutive rows of each batch to return.
          process_count: slices of a batch.
          tokenizer_hash: `Tokenizer.hash` the model was trained with; None: any.

        Raises:
          InputError: the folder is not prepared data or is damaged, was prepared with another length or tokenizer,
            the train split has fewer rows than a batch, or no token of the split counts as a label.
        """
        folder = local_path(folder)
        manifest = read_manifest(folder)
        if split not in ("train", "validation"):
            raise InputError(f"split = {split!r}: must be 'train' or 'validation'")
        if sequence_length != manifest.recipe.sequence_length:
            raise InputError(
                f"data.sequence_length = {sequence_length}: {folder} was prepared with "
                f"{manifest.recipe.sequence_length}"
            )
        if tokenizer_hash is not None and tokenizer_hash != manifest.tokenizer_hash:
            raise InputError(
                f"{folder}: its tokenizer ({manifest.tokenizer_hash[:8]}) is not the model's ({tokenizer_hash[:8]}); "
                "prepare the data with the model's tokenizer"
            )
        self.manifest, self.folder, self.split = manifest, folder, split
        self.sequence_length, self.batch_size = sequence_length, batch_size
        entry = manifest.split(split)
        self.len_rows = entry.rows
        """Rows of the split."""
        self._files = RowFiles([(folder / shard.file, shard.rows) for shard in entry.shards], manifest.token_dtype)
        self.examples = epochs(self._files, seed, shuffle)
        """Example [i] of the endless sequence of all epochs, which follow each other without a gap."""
        self._share = Share.of(batch_size, process_index, process_count)
        self._batches = in_batches(self.examples, manifest, self._share)
        if split == "train":
            self._require_rows()
        counted = entry.labels  # None in older folders: look for one
        if self.len_rows and not (any(labels_in(row) for row in self._files) if counted is None else counted):
            raise InputError(
                f"{folder}: no token of its {entry.rows} {split} rows counts as a label, so nothing can be learned or "
                "scored; prepare it again: of chats, what messages of role 'assistant' say counts"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen at least once: rows / B, rounded up."""
        return -(-self.len_rows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0 on: the rows of this process.

        Row i of step s is example s * B + i, so no row is dropped and a batch may hold rows of two epochs.

        Raises:
          InputError: the split has fewer rows than a batch, or a file is damaged.
        """
        self._require_rows()
        return self._batches[checked(step)]

    def state(self, step: int) -> DataState:
        """What the data are, and how often they have been seen before `step`."""
        return {"sources": [self.manifest.identity()], "epochs": [step * self.batch_size / self.len_rows]}

    def check(self, state: DataState) -> None:
        """Check that a run saved with `state` was trained on these data, wherever they lie.

        Raises:
          InputError: another packing, source, tokenizer, ... (the message says which), or other rows.
        """
        check_sources(state, [(self.folder, self.manifest)])

    def restore(self, step: int, state: DataState) -> None:
        """`check`; the position is the step itself."""
        del step
        self.check(state)

    def batches(self, n: int | None = None) -> Iterator[Batch]:
        """The first `n` batches (None: all) in the order on disk, each row once; for validation.

        The last batch is filled up with padding rows (segment_ids 0, labels -100), which are not scored.

        Raises:
          InputError: a file is damaged.
        """
        files, steps = self._files, self.steps_per_epoch
        padded = grain.MapDataset.range(steps * self.batch_size).map(
            lambda i: Example(files[i] if i < len(files) else EMPTY, 0)
        )
        batches = in_batches(padded, self.manifest, self._share)
        for step in range(steps if n is None else min(n, steps)):
            yield batches[step]

    def _require_rows(self) -> None:
        if self.len_rows < self.batch_size:
            raise InputError(
                f"data.batch_size = {self.batch_size}: {self.folder} has only {self.len_rows} {self.split} rows; "
                "use smaller batches or more data"
            )


def epochs(rows: RowFiles, seed: int, shuffle: bool) -> grain.MapDataset[Example]:
    """All epochs of `rows` in sequence, each shuffled by its own permutation."""

    def example(place: int) -> Example:
        epoch, i = divmod(place, len(rows))
        return Example(rows[shuffled(i, len(rows), seed, epoch) if shuffle else i], epoch)

    return grain.MapDataset.range(ENDLESS).map(example)


def shuffled(i: int, length: int, seed: int, epoch: int) -> int:
    """Where a permutation of `length` numbers, another one in every epoch, puts `i`."""
    key = int(mix(mix(np.uint64(seed)) ^ np.uint64(epoch)) >> np.uint64(32))
    return index_shuffle(i, max_index=length - 1, seed=key, rounds=4)


def in_batches(examples: grain.MapDataset[Example], manifest: Manifest, share: Share) -> grain.MapDataset[Batch]:
    """Examples as batches; at [step] the rows of one process."""
    stacked = functools.partial(stack, sequence_length=manifest.recipe.sequence_length, pad_id=manifest.pad_id)
    batches = examples.batch(share.rows, drop_remainder=True, batch_fn=stacked)
    return batches[share.process_index :: share.process_count]


def checked(step: int) -> int:
    """`step`, which must not be negative."""
    if step < 0:
        raise ValueError(f"step = {step}: must not be negative")
    return int(step)


def stack(examples: Sequence[Example], sequence_length: int, pad_id: int) -> Batch:
    """Rows as a batch."""
    rows = [arrays(row, sequence_length, pad_id=pad_id, epoch=epoch) for row, epoch in examples]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def check_sources(state: DataState, data: Sequence[tuple[Path, Manifest]]) -> None:
    """Compare the data that a checkpoint describes with the data in folders.

    Raises:
      InputError: naming the first difference.
    """
    old = state["sources"]
    if len(old) != len(data):
        raise InputError(f"data.prepared: {len(data)} folders, but this run was trained on {len(old)}")
    for before, (folder, manifest) in zip(old, data, strict=True):
        now = manifest.identity()
        del now["bad_documents"]  # the digests say whether there were any; a stream may begin to skip them
        different = first_difference(before, now)
        if different:
            raise InputError(f"{folder}: has changed since the checkpoint: {different}; put the same data back")
