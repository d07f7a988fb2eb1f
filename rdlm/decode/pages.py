"""Pages of an engine's cache: how many each lane gets, and which; and who gives way when there are too few.

Every copy of the model has lanes and pages of its own, numbered from 0.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from rdlm.config import InputError
from rdlm.decode.lanes import PageSizes


def page_sizes(
    lanes: int,
    capacity: int,
    size: int | None = None,
    tokens: int | None = None,
    platform: str | None = None,
    copies: int = 1,
) -> PageSizes:
    """The pages of one copy of the model.

    Args:
      lanes, capacity: its lanes, and the positions that each may have.
      size: positions of a page; None: 128 on accelerators, as many as a kernel reads at once, and fewer on a CPU.
      tokens: positions of all pages of all copies, rounded up to whole ones; no more than all lanes need, which None
        stands for.
      platform: that it runs on; None: the one in use.
      copies: of the model.

    Raises:
      InputError: too few for one lane, so that a request might never end.
    """
    if size is None:
        size = 32 if (platform or jax.default_backend()) == "cpu" else 128
    most = lanes * -(-capacity // size)
    if tokens is None:
        return PageSizes(most, size)
    if tokens < copies * capacity:
        each = f", for each of {copies} copies of the model" if copies > 1 else ""
        raise InputError(f"cache_tokens = {tokens}: must be at least the capacity of one lane, {capacity}{each}")
    return PageSizes(min(-(-tokens // (copies * size)), most), size)


class Claim(NamedTuple):
    """What a request in a lane needs."""

    rank: tuple[int, int]  # the lowest comes first: minus the priority, then the order in which requests came
    least: int  # positions, to make its next token
    most: int  # positions that it may use before pages are shared out again


class Pages:
    """The pages of `lanes` lanes of `capacity` positions."""

    def __init__(self, lanes: int, capacity: int, sizes: PageSizes):
        self.sizes, self._lanes, self._each = sizes, lanes, -(-capacity // sizes.size)
        # Lists of all pages and lanes would take longer than to say that they don't fit into memory.
        self._unused, self._free = iter(range(sizes.number)), list[int]()
        self._held = collections.defaultdict[int, list[int]](list)

    def needed(self, positions: int) -> int:
        """Pages for so many positions."""
        return -(-positions // self.sizes.size)

    def spare(self, claims: Mapping[int, Claim]) -> int:
        """Pages that are left once every lane has the least it claims; below 0: so many are missing."""
        return self.sizes.number - sum(self.needed(claim.least) for claim in claims.values())

    def lacking(self, claims: Mapping[int, Claim]) -> list[int]:
        """Lanes that must give way for the others to get the least they claim, the last by rank first."""
        spare, gone = self.spare(claims), list[int]()
        for lane in sorted(claims, key=lambda lane: claims[lane].rank, reverse=True):
            if spare >= 0:
                break
            spare += self.needed(claims[lane].least)
            gone.append(lane)
        return gone

    def of(self, lane: int, positions: int) -> list[int]:
        """The pages that hold the first `positions` of a lane."""
        return self._held[lane][: self.needed(positions)]

    def assign(self, claims: Mapping[int, Claim]) -> Int32[np.ndarray, "B P"]:
        """The table of pages by lane, see `Lanes`: the least for every claim, and what is spare in order of rank.

        claims: there are pages for the least of all.

        A lane keeps the pages it has as far as it claims them; one without a claim loses them.
        """
        spare = self.spare(claims)
        assert spare >= 0
        counts = [0] * self._lanes
        for lane, claim in sorted(claims.items(), key=lambda item: item[1].rank):
            least = self.needed(claim.least)
            more = min(self.needed(claim.most) - least, spare)
            counts[lane], spare = least + more, spare - more
        for lane, held in self._held.items():
            self._free += held[counts[lane] :]
            del held[counts[lane] :]
        table = np.full((self._lanes, self._each), self.sizes.number, np.int32)
        for lane, (row, count) in enumerate(zip(table, counts, strict=True)):
            held = self._held[lane]
            held += [self._free.pop() if self._free else next(self._unused) for _ in range(count - len(held))]
            row[:count] = held
        return table
