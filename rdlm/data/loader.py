"""Batches from one prepared folder, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from rdlm.config import InputError
from rdlm.data.manifest import first_difference, read_manifest
from rdlm.data.packing import Row, arrays, mix, padding
from rdlm.data.records import RowFiles

Batch = dict[str, np.ndarray]
"""tokens, labels, segment_ids, positions, sequence_ids: int32 [B, L] each (see `packing.arrays`)."""


class Example(NamedTuple):
    """A row and the number of the epoch it is seen in, which keys its noise."""

    row: Row
    epoch: int


class PackedData:
    """The rows of one split of a prepared folder, in batches.

    Nothing here remembers where it is: `batch(step)` depends on the arguments alone, so a run resumes at any step on
    any number of processes with the batches it would have seen.
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
          seed: seed of the order of rows.
          shuffle: a new order every epoch; False: the order on disk.
          process_index: which slice of B / process_count consecutive rows of each batch to return.
          process_count: slices of a batch.
          tokenizer_hash: `Tokenizer.hash` the model was trained with; None: any.

        Raises:
          InputError: the folder is not prepared data or is damaged, was prepared with another length or tokenizer,
            or the train split has fewer rows than a batch.
        """
        folder = Path(folder)
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
        self.manifest = manifest
        self.folder, self.split = folder, split
        self.sequence_length, self.batch_size, self.seed, self.shuffle = sequence_length, batch_size, seed, shuffle
        entry = manifest.split(split)
        self.len_rows = entry.rows
        """Rows of the split."""
        self._files = RowFiles([(folder / shard.file, shard.rows) for shard in entry.shards], manifest.token_dtype)
        self._mine = my_rows(batch_size, process_index, process_count)
        if split == "train":
            self._require_rows()

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen at least once: rows / B, rounded up."""
        return -(-self.len_rows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0 on: this process's rows.

        Epochs follow each other without a gap: row i of step s is number s * B + i of an endless sequence that goes
        through all rows once per epoch, so no row is dropped and batches run over the border of epochs.

        Raises:
          InputError: the split has fewer rows than a batch, or the file is damaged.
        """
        first = step_start(step, self.batch_size)
        return stack(self.rows([first + i for i in self._mine]), self.sequence_length, self.manifest.pad_id)

    def rows(self, places: Sequence[int]) -> list[Example]:
        """The rows at these places of the endless sequence of all epochs.

        Raises:
          InputError: the split has fewer rows than a batch, or a file is damaged.
        """
        self._require_rows()
        found = [divmod(place, self.len_rows) for place in places]
        indices = [i for _, i in found]
        if self.shuffle:
            seeds = {epoch: self._order_seed(epoch) for epoch in {epoch for epoch, _ in found}}
            last = self.len_rows - 1
            indices = [index_shuffle(i, max_index=last, seed=seeds[epoch], rounds=4) for epoch, i in found]
        rows = self._files.read(indices)
        return [Example(row, epoch) for row, (epoch, _) in zip(rows, found, strict=True)]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data: which they are, and how often they have been seen before `step`."""
        return {"sources": [self.manifest.identity()], "epochs": [step * self.batch_size / self.len_rows]}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Check that a run saved with `state` goes on with the same data; the position is the step itself.

        Raises:
          InputError: another packing, source, tokenizer, ... (the message says which), or other rows.
        """
        del step
        check_sources(state, [self])

    def batches(self, n: int | None = None) -> Iterator[Batch]:
        """The first `n` batches (None: all) in the order on disk, each row once; for validation.

        The last batch is filled up with padding rows (segment_ids 0, labels -100), which count for nothing.

        Raises:
          InputError: the file is damaged.
        """
        for step in range(self.steps_per_epoch if n is None else min(n, self.steps_per_epoch)):
            first = step * self.batch_size
            wanted = [first + i for i in self._mine if first + i < self.len_rows]
            examples = [Example(row, 0) for row in self._files.read(wanted)]
            yield stack(examples, self.sequence_length, self.manifest.pad_id, fill=len(self._mine))

    def _order_seed(self, epoch: int) -> int:
        return int(mix(mix(np.uint64(self.seed)) ^ np.uint64(epoch)) >> np.uint64(32))

    def _require_rows(self) -> None:
        if self.len_rows < self.batch_size:
            raise InputError(
                f"data.batch_size = {self.batch_size}: {self.folder} has only {self.len_rows} {self.split} rows; "
                "use smaller batches or more data"
            )


def my_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Which rows of a batch a process makes: B / process_count consecutive ones.

    Raises:
      InputError: they do not divide.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise InputError(f"data.batch_size = {batch_size}: must be a positive multiple of {process_count} processes")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index = {process_index}: must be in [0, {process_count})")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def step_start(step: int, batch_size: int) -> int:
    """Number of the first row of a step."""
    if step < 0:
        raise ValueError(f"step = {step}: must not be negative")
    return int(step) * batch_size


def stack(examples: Sequence[Example], sequence_length: int, pad_id: int, *, fill: int = 0) -> Batch:
    """Rows as a batch, up to `fill` rows with padding (segment_ids 0, labels -100)."""
    parts = [arrays(row, sequence_length, pad_id=pad_id, epoch=epoch) for row, epoch in examples]
    parts += [padding(sequence_length, pad_id=pad_id)] * (fill - len(parts))
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def check_sources(state: dict[str, Any], data: Sequence[PackedData]) -> None:
    """Compare what a checkpoint says of its data with the data that are there.

    Raises:
      InputError: naming the first difference.
    """
    old = state["sources"]
    if len(old) != len(data):
        raise InputError(f"data.prepared: {len(data)} folders, but this run was trained on {len(old)}")
    for before, now in zip(old, data, strict=True):
        different = first_difference(before, now.manifest.identity())
        if different:
            raise InputError(f"{now.folder}: has changed since the checkpoint: {different}; put the same data back")
