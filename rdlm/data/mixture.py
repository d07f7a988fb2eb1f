"""Several prepared folders mixed by weight; still a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rdlm.config import InputError
from rdlm.data.loader import Batch, Example, PackedData, check_sources, my_rows, stack, step_start

_CYCLE = 10_000  # rows after which the pattern of sources repeats; weights are met to 1 / 10,000


class Mixture:
    """Rows of several `PackedData`, each source in its own shuffled order and with its own epochs.

    Sources follow each other in a fixed pattern of 10,000 rows that holds each in proportion to its weight, spread
    evenly. So the source of any row, and which of the source's rows it is, follow from the row's number alone.
    """

    def __init__(
        self,
        sources: Sequence[PackedData],
        weights: Sequence[float] = (),
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Mix `sources` (opened with any batch size) by `weights`; empty: by their rows, so that all end together.

        Raises:
          InputError: another number of weights than sources, weights that are not positive or below 1 in 10,000,
            sources with different tokenizers or lengths, or a batch that does not divide over the processes.
        """
        weights = list(weights) or [float(source.len_rows) for source in sources]
        if len(weights) != len(sources) or min(weights) <= 0:
            raise InputError(
                f"data.weights = {tuple(weights)}: must be one positive number for each of {len(sources)} folders"
            )
        first = sources[0]
        for source in sources[1:]:
            if source.manifest.tokenizer_hash != first.manifest.tokenizer_hash:
                raise InputError(
                    f"data.prepared: {source.folder} has another tokenizer ({source.manifest.tokenizer_hash[:8]}) than "
                    f"{first.folder} ({first.manifest.tokenizer_hash[:8]}); prepare both with one"
                )
            if source.sequence_length != first.sequence_length:
                raise InputError(f"data.prepared: {source.folder} has rows of {source.sequence_length} tokens")
        self.sources, self.batch_size, self.sequence_length = list(sources), batch_size, first.sequence_length
        self._mine = my_rows(batch_size, process_index, process_count)
        self._counts = _shares(weights)
        if min(self._counts) == 0:
            raise InputError(f"data.weights = {tuple(weights)}: the smallest is below 1 in {_CYCLE:,} of their sum")
        # Row j of a source stands at (j + 1/2) / count of the cycle: evenly, and ties go to the earlier source.
        at = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        owner = np.repeat(np.arange(len(sources)), self._counts)
        self._pattern = owner[np.argsort(at, kind="stable")]
        self._before = np.stack([np.cumsum(self._pattern == m) - (self._pattern == m) for m in range(len(sources))])

    @property
    def len_rows(self) -> int:
        """Rows of all sources."""
        return sum(source.len_rows for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which as many rows were seen as there are; sources of large weight have repeated by then."""
        return -(-self.len_rows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0 on: this process's rows (see `PackedData.batch`).

        Raises:
          InputError: a file is damaged.
        """
        first = step_start(step, self.batch_size)
        places = [self.place(first + i) for i in self._mine]
        found: list[Example | None] = [None] * len(places)
        for m, source in enumerate(self.sources):
            mine = [i for i, (owner, _) in enumerate(places) if owner == m]
            for i, (row, epoch) in zip(mine, source.rows([places[i][1] for i in mine]), strict=True):
                # Documents of several sources may have equal numbers: their noise must differ all the same.
                found[i] = Example(row, epoch + (m << 32))
        examples = [example for example in found if example is not None]
        return stack(examples, self.sequence_length, self.sources[0].manifest.pad_id)

    def place(self, number: int) -> tuple[int, int]:
        """(source, place in the source's endless sequence of epochs) of a row."""
        cycle, i = divmod(number, _CYCLE)
        m = int(self._pattern[i])
        return m, cycle * self._counts[m] + int(self._before[m, i])

    def seen(self, step: int) -> list[float]:
        """How many epochs of each source the steps before `step` have seen."""
        cycle, i = divmod(step_start(step, self.batch_size), _CYCLE)
        counts = zip(self._counts, self._before[:, i], self.sources, strict=True)
        return [(cycle * count + int(before)) / source.len_rows for count, before, source in counts]

    def state(self, step: int) -> dict[str, Any]:
        """See `PackedData.state`."""
        return {
            "sources": [source.manifest.identity() for source in self.sources],
            "pattern": self._counts,
            "epochs": self.seen(step),
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """See `PackedData.restore`.

        Raises:
          InputError: other data, or other weights.
        """
        del step
        check_sources(state, self.sources)
        if state["pattern"] != self._counts:
            raise InputError(
                f"data.weights: in {_CYCLE:,} rows {self._counts} of each, not {state['pattern']} as before"
            )


class Chain:
    """Validation batches of several folders, one folder after the other."""

    def __init__(self, sources: Sequence[PackedData]) -> None:
        self.sources = list(sources)

    @property
    def len_rows(self) -> int:
        """Rows of all folders."""
        return sum(source.len_rows for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in all."""
        return sum(source.steps_per_epoch for source in self.sources)

    def batches(self, n: int | None = None) -> Iterator[Batch]:
        """The first `n` batches (None: all), taken from every folder in turn (see `PackedData.batches`).

        Raises:
          InputError: a file is damaged.
        """
        left = self.steps_per_epoch if n is None else n
        running = [source.batches() for source in self.sources]
        while running and left:
            for batches in list(running):
                batch = next(batches, None)
                if batch is None:
                    running.remove(batches)
                elif left:
                    left -= 1
                    yield batch


def _shares(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a cycle: proportional, whole, adding up; the largest remainders are rounded up."""
    exact = np.array(weights, np.float64) / sum(weights) * _CYCLE
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: _CYCLE - int(counts.sum())]:
        counts[i] += 1
    return [int(count) for count in counts]
