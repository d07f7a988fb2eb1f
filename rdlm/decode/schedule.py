"""Who comes next: requests that wait for a lane, those that have one, and who gives way to whom. Nothing runs here."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from rdlm.config import InputError
from rdlm.decode.pages import Claim, Pages
from rdlm.decode.reading import Reading
from rdlm.decode.served import Served


class Schedule:
    """Requests of an engine by the lanes that they have, and those that wait, in the order in which they come.

    Lane i belongs to copy i // each of the model.

    Args:
      each: lanes of every copy.
      pages: of every copy.
      group: most requests whose prompts a copy reads together.
    """

    def __init__(self, each: int, pages: Sequence[Pages], group: int):
        self.each, self.pages, self.group = each, pages, group
        self.serving: list[Served | None] = [None] * (each * len(pages))
        """By lane."""
        self.reading: tuple[Served, int, Reading] | None = None
        """A long prompt, and the lane that it will have."""
        self.queue: list[Served] = []
        """By rank."""
        self.coming: list[Served] | None = None
        """Those of which other hosts hear at the next step; None: there are no others."""
        self.preempted = 0
        """How often a request gave its lane and its pages to others."""
        self._submitted = itertools.count()
        self._lock = threading.Lock()  # requests may come while another thread runs a step

    def rank(self, priority: int) -> tuple[int, int]:
        """Of a new request, see `Claim`."""
        return -priority, next(self._submitted)

    def add(self, served: Served, max_queue: int) -> None:
        """Let a new request wait. Raises InputError: so many wait already, without those that gave way."""
        with self._lock:
            waiting = [*self.queue, *(self.coming or ())]
            if sum(not s.done and not s._preempted for s in waiting) >= max_queue:
                raise InputError(f"Engine: max_queue = {max_queue} requests are waiting; run the engine first")
            if self.coming is None:
                self._insert(served)
            else:
                self.coming.append(served)

    def news(self) -> tuple[list[Served], list[Served]]:
        """(Requests of which other hosts have to hear, those that they have to give up.)"""
        with self._lock:
            came, self.coming = [s for s in self.coming or () if not s.done], []
        return came, [s for s in self.known if s.done and not s._over]

    @property
    def known(self) -> list[Served]:
        """Requests that wait, or have a lane."""
        reading = [] if self.reading is None else [self.reading[0]]
        return [*self.queue, *self.served, *reading]

    def back(self, served: Served) -> None:
        """Let a request that had a lane wait for another one."""
        with self._lock:
            self._insert(served)

    def _insert(self, served: Served) -> None:
        bisect.insort(self.queue, served, key=lambda s: s._rank)

    def take(self, group: list[Served]) -> None:
        """Let these wait no longer."""
        with self._lock:
            for served in group:
                self.queue.remove(served)

    def forget(self) -> None:
        """Take lanes from requests that are done."""
        self.serving = [None if s is None or s._over else s for s in self.serving]
        if self.reading is not None and self.reading[0]._over:
            self.reading = None

    @property
    def served(self) -> list[Served]:
        """Requests that get tokens."""
        return [s for s in self.serving if s is not None]

    @property
    def in_flight(self) -> list[Served]:
        """Requests that have a lane and are not done. Any thread may ask."""
        reading = self.reading
        held = dict.fromkeys([None if reading is None else reading[0], *self.serving])  # it may just have moved
        return [s for s in held if s is not None and not s.done]

    @property
    def free(self) -> list[int]:
        """Lanes that nobody has."""
        kept = None if self.reading is None else self.reading[1]
        return [lane for lane, s in enumerate(self.serving) if s is None and lane != kept]

    def claims(self, ticks: int = 0) -> dict[int, Claim]:
        """By lane, what the requests in flight need before so many ticks have passed."""
        reading = self.reading
        held = {lane: s for lane, s in enumerate(self.serving) if s is not None}
        if reading is not None:
            held[reading[1]] = reading[0]
        return {lane: s._claim(ticks) for lane, s in held.items()}

    def _of(self, copy: int, claims: Mapping[int, Claim]) -> dict[int, Claim]:
        """Those of one copy of the model, by its own numbers of lanes."""
        return {lane % self.each: claim for lane, claim in claims.items() if lane // self.each == copy}

    @property
    def usage(self) -> float:
        """Share of the pages that requests in flight need. Any thread may ask."""
        claims = [s._claim(0) for s in self.in_flight]
        needed = sum(self.pages[0].needed(claim.least) for claim in claims)
        return needed / sum(pages.sizes.number for pages in self.pages)

    def table(self, claims: Mapping[int, Claim]) -> Int32[np.ndarray, "B P"]:
        """The pages of every lane with these claims, see `Pages.assign`."""
        return np.concatenate([pages.assign(self._of(copy, claims)) for copy, pages in enumerate(self.pages)])

    def pages_of(self, lane: int, positions: int) -> list[int]:
        """The pages that hold the first `positions` of a lane."""
        return self.pages[lane // self.each].of(lane % self.each, positions)

    def lacking(self) -> list[int]:
        """Lanes that must give way for the others to get their next token."""
        claims = self.claims()
        found = ((copy, pages.lacking(self._of(copy, claims))) for copy, pages in enumerate(self.pages))
        return [copy * self.each + lane for copy, lanes in found for lane in lanes]

    def next(self) -> list[Served]:
        """Those whose turn it is: a group of one priority for which there may be pages, or one whose prompt is long or
        that was preempted. While a long prompt is read, others pass its like of no higher priority."""
        group, claims = list[Served](), self.claims()
        spare = [pages.spare(self._of(copy, claims)) for copy, pages in enumerate(self.pages)]
        free = [[lane // self.each for lane in self.free].count(copy) for copy in range(len(self.pages))]
        taken = [0] * len(self.pages)
        with self._lock:
            for served in self.queue:
                if served._over:
                    served._suspended = None
            self.queue = [s for s in self.queue if not s._over]
            for served in self.queue:
                if is_long(served) and self.reading is not None and self.reading[0]._rank[0] <= served._rank[0]:
                    continue
                alone = is_long(served) or served._suspended is not None
                order = [(n < self.group, n < m, room) for n, m, room in zip(taken, free, spare, strict=True)]
                copy = order.index(max(order))
                spare[copy] -= self.pages[copy].needed(served._claim(0).least)
                full = taken[copy] == self.group or spare[copy] < 0
                if group and (alone or full or served._rank[0] != group[0]._rank[0]):
                    break
                taken[copy] += 1
                group.append(served)
                if alone:
                    break
        return group

    def room(self, group: list[Served]) -> tuple[list[int], list[int]] | None:
        """(Lanes for the first of a group, lanes that give way to them); None: they wait, as that would make no room.

        For all of the group, or for as many as a copy of the model takes in at once. Only those of a lower priority
        give way. So does a long prompt, to one of the group: one of them is read at a time.
        """
        claims, lanes, gone, taken = self.claims(), list[int](), list[int](), [0] * len(self.pages)
        if self.reading is not None and is_long(group[0]):
            gone.append(self.reading[1])
            del claims[self.reading[1]]
        for served in group:
            found = []
            for copy, pages in enumerate(self.pages):
                leave = self._in_the_way(served, copy, claims)
                if leave is not None and taken[copy] < self.group:
                    # Few give way, and they the last by rank.
                    ranks = [(-claims[lane].rank[0], -claims[lane].rank[1]) for lane in leave]
                    found.append((len(leave), ranks, -pages.spare(self._of(copy, claims)), copy, leave))
            if not found:
                break
            *_, copy, leave = min(found)
            for lane in leave:
                del claims[lane]
            lane = next(n for n in range(copy * self.each, (copy + 1) * self.each) if n not in claims)
            claims[lane] = served._claim(0)
            lanes.append(lane)
            gone += leave
            taken[copy] += 1
        return (lanes, gone) if len(lanes) >= min(len(group), self.group) else None

    def _in_the_way(self, served: Served, copy: int, claims: Mapping[int, Claim]) -> list[int] | None:
        """Lanes of a copy that give way to a request, the last by rank first; None: that would make no room for it."""
        pages, mine, gone = self.pages[copy], self._of(copy, claims), list[int]()
        lower = [lane for lane, claim in mine.items() if claim.rank[0] > served._rank[0]]
        lower.sort(key=lambda lane: mine[lane].rank)
        while len(mine) == self.each or pages.spare(mine | {self.each: served._claim(0)}) < 0:
            if not lower:
                return None
            del mine[lower[-1]]
            gone.append(copy * self.each + lower.pop())
        return gone


def is_long(served: Served) -> bool:
    """Whether its prompt is to be read in chunks."""
    return served._in_chunks and served._suspended is None
