"""Several prepared folders mixed by weight, still as a pure function of the step; or chained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from rdlm.config import InputError
from rdlm.data.loader import ENDLESS, Batch, DataState, Example, PackedData, Share, check_sources, checked, in_batches

_CYCLE = 10_000  # rows after which the pattern of sources repeats; weights are met to 1 / 10,000


class Mixture:
    """Rows of several `PackedData`, each source in its own shuffled order and with its own epochs."""

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
        self._pattern = _Pattern(list(weights) or [float(source.len_rows) for source in sources], len(sources))
        examples = [source.examples.map(_fresh_noise(m)) for m, source in enumerate(sources)]
        mixed = grain.MapDataset.select_from_datasets(examples, self._pattern)
        self._batches = in_batches(mixed, first.manifest, Share.of(batch_size, process_index, process_count))

    @property
    def len_rows(self) -> int:
        """Rows of all sources."""
        return sum(source.len_rows for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Total rows / batch size, rounded up; sources of large weight have repeated by then."""
        return -(-self.len_rows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0 on: the rows of this process (see `PackedData.batch`).

        Raises:
          InputError: a file is damaged.
        """
        return self._batches[checked(step)]

    def place(self, number: int) -> tuple[int, int]:
        """(source, place in the source's endless sequence of epochs) of a row."""
        return self._pattern[number]

    def seen(self, step: int) -> list[float]:
        """How many epochs of each source the steps before `step` have seen."""
        counts = self._pattern.before(checked(step) * self.batch_size)
        return [count / source.len_rows for count, source in zip(counts, self.sources, strict=True)]

    def state(self, step: int) -> DataState:
        """See `PackedData.state`."""
        return {
            "sources": [source.manifest.identity() for source in self.sources],
            "pattern": self._pattern.counts,
            "epochs": self.seen(step),
        }

    def restore(self, step: int, state: DataState) -> None:
        """See `PackedData.restore`."""
        del step
        self.check(state)

    def check(self, state: DataState) -> None:
        """See `PackedData.check`.

        Raises:
          InputError: other data, or other weights.
        """
        check_sources(state, [(source.folder, source.manifest) for source in self.sources])
        counts = self._pattern.counts
        if state["pattern"] != counts:
            raise InputError(f"data.weights: in {_CYCLE:,} rows {counts} of each, not {state['pattern']} as before")


class _Pattern(grain.transforms.DatasetSelectionMap):
    """Which source each row comes from, and which of the source's rows it is.

    Sources follow each other in a fixed cycle of 10,000 rows, which holds each in proportion to its weight, spread
    evenly: so the proportions hold at every prefix.
    """

    def __init__(self, weights: Sequence[float], sources: int) -> None:
        if len(weights) != sources or not all(x > 0 for x in weights) or sum(weights) == math.inf:
            raise InputError(
                f"data.weights = {tuple(weights)}: must be one positive finite number for each of {sources} folders"
            )
        exact = np.array(weights, np.float64) / sum(weights) * _CYCLE
        counts = np.floor(exact).astype(int)
        # Largest remainders are rounded up, until the counts add up to a cycle.
        counts[np.argsort(counts - exact, kind="stable")[: _CYCLE - counts.sum()]] += 1
        if counts.min() == 0:
            raise InputError(f"data.weights = {tuple(weights)}: the smallest is below 1 in {_CYCLE:,} of their sum")
        self.counts: list[int] = counts.tolist()
        """Rows of each source in a cycle."""
        # Row j of a source stands at (j + 1/2) / count of the cycle, ties in the order of the sources.
        at = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        self._owner = np.repeat(np.arange(sources), counts)[np.argsort(at, kind="stable")]
        owned = self._owner == np.arange(sources)[:, None]
        self._before = np.cumsum(owned, axis=1) - owned

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        m = int(self._owner[index % _CYCLE])
        return m, self.before(index)[m]

    def before(self, number: int) -> list[int]:
        """How many of the rows before this one come from each source."""
        cycle, i = divmod(number, _CYCLE)
        return [cycle * count + int(before) for count, before in zip(self.counts, self._before[:, i], strict=True)]


def _fresh_noise(m: int) -> Callable[[Example], Example]:
    """Documents of several sources may have equal numbers: key the noise of source m by other epochs."""
    return lambda example: example._replace(epoch=example.epoch + (m << 32))


class Chain:
    """Validation batches of several folders."""

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
        running = [source.batches() for source in self.sources]
        turns = sorted((i, m) for m, source in enumerate(self.sources) for i in range(source.steps_per_epoch))
        for _, m in turns[:n]:
            yield next(running[m])
