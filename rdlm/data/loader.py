"""Batches from prepared data, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from grain.experimental import index_shuffle

from rdlm.config import InputError
from rdlm.data.manifest import read_manifest
from rdlm.data.packing import Row, arrays, mix, padding
from rdlm.data.records import RowFile

Batch = dict[str, np.ndarray]
"""tokens, labels, segment_ids, positions, sequence_ids: int32 [B, L] each (see `packing.arrays`)."""


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
          folder: what `prepare` returned.
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
        if sequence_length != manifest.sequence_length:
            raise InputError(
                f"data.sequence_length = {sequence_length}: {folder} was prepared with {manifest.sequence_length}"
            )
        if tokenizer_hash is not None and tokenizer_hash != manifest.tokenizer_hash:
            raise InputError(
                f"{folder}: its tokenizer ({manifest.tokenizer_hash[:8]}) is not the model's ({tokenizer_hash[:8]}); "
                "prepare the data with the model's tokenizer"
            )
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise InputError(
                f"data.batch_size = {batch_size}: must be a positive multiple of {process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise InputError(f"process_index = {process_index}: must be in [0, {process_count})")
        self.manifest = manifest
        self.folder, self.split = folder, split
        self.sequence_length, self.batch_size, self.seed, self.shuffle = sequence_length, batch_size, seed, shuffle
        entry = manifest.split(split)
        self.len_rows = entry.rows
        """Rows of the split."""
        self._file = RowFile(folder / entry.file, manifest.token_dtype, entry.rows)
        local = batch_size // process_count
        self._mine = range(process_index * local, (process_index + 1) * local)
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
        self._require_rows()
        if step < 0:
            raise ValueError(f"step = {step}: must not be negative")
        places = [divmod(int(step) * self.batch_size + i, self.len_rows) for i in self._mine]
        epochs = [epoch for epoch, _ in places]
        seeds = {epoch: self._order_seed(epoch) for epoch in set(epochs)}
        if self.shuffle:
            rows = [index_shuffle(i, max_index=self.len_rows - 1, seed=seeds[e], rounds=4) for e, i in places]
        else:
            rows = [i for _, i in places]
        return self._stack(self._file.read(rows), epochs)

    def batches(self, n: int | None = None) -> Iterator[Batch]:
        """The first `n` batches (None: all) in the order on disk, each row once; for validation.

        The last batch is filled up with padding rows (segment_ids 0, labels -100), which count for nothing.

        Raises:
          InputError: the file is damaged.
        """
        for step in range(self.steps_per_epoch if n is None else min(n, self.steps_per_epoch)):
            first = step * self.batch_size
            wanted = [first + i for i in self._mine if first + i < self.len_rows]
            yield self._stack(self._file.read(wanted), [0] * len(wanted))

    def _order_seed(self, epoch: int) -> int:
        return int(mix(mix(np.uint64(self.seed)) ^ np.uint64(epoch)) >> np.uint64(32))

    def _stack(self, rows: Sequence[Row], epochs: Sequence[int]) -> Batch:
        pad_id, length = self.manifest.pad_id, self.sequence_length
        parts = [arrays(row, length, pad_id=pad_id, epoch=e) for row, e in zip(rows, epochs, strict=True)]
        parts += [padding(length, pad_id=pad_id)] * (len(self._mine) - len(parts))
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _require_rows(self) -> None:
        if self.len_rows < self.batch_size:
            raise InputError(
                f"data.batch_size = {self.batch_size}: {self.folder} has only {self.len_rows} {self.split} rows; "
                "use smaller batches or more data"
            )
