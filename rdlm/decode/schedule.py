"""Who comes next: requests that wait for a lane, those that have one, and who gives way to whom. Nothing runs here."""

from __future__ import annotations

import bisect
import itertools
import threading

from rdlm.config import InputError
from rdlm.decode.pages import Claim, Pages
from rdlm.decode.reading import Reading
from rdlm.decode.served import Served


class Schedule:
    """Requests of an engine by the lanes that they have, and those that wait, in the order in which they come.

    Args:
      lanes: requests that are served together.
      pages: of all lanes.
      group: most requests whose prompts are read together.
    """

    def __init__(self, lanes: int, pages: Pages, group: int):
        self.pages, self.group = pages, group
        self.serving: list[Served | None] = [None] * lanes
        """By lane."""
        self.reading: tuple[Served, int, Reading] | None = None
        """A long prompt, and the lane that it will have."""
        self.queue: list[Served] = []
        """By rank."""
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
            if sum(not s.done and not s._preempted for s in self.queue) >= max_queue:
                raise InputError(f"Engine: max_queue = {max_queue} requests are waiting; run the engine first")
            self._insert(served)

    def back(self, served: Served) -> None:
        """Let a request that had a lane wait for another one."""
        with self._lock:
            self._insert(served)

    def _insert(self, served: Served) -> None:
        bisect.insort(self.queue, served, key=lambda s: s._rank)

    def take(self, group: list[Served]) -> list[int]:
        """The lanes of a group that waits no longer, for which there is room."""
        with self._lock:
            for served in group:
                self.queue.remove(served)
        return self.free[: len(group)]

    def forget(self) -> None:
        """Take lanes from requests that are done."""
        self.serving = [None if s is None or s.done else s for s in self.serving]
        if self.reading is not None and self.reading[0].done:
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

    def lacking(self) -> list[int]:
        """Lanes that must give way for the others to get their next token."""
        return self.pages.lacking(self.claims())

    def next(self) -> list[Served]:
        """Those whose turn it is: a group of one priority for which there may be pages, or one whose prompt is long or
        that was preempted. While a long prompt is read, others pass its like of no higher priority."""
        group: list[Served] = []
        spare = self.pages.spare(self.claims())
        with self._lock:
            for served in self.queue:
                if served.done:
                    served._suspended = None
            self.queue = [s for s in self.queue if not s.done]
            for served in self.queue:
                if is_long(served) and self.reading is not None and self.reading[0]._rank[0] <= served._rank[0]:
                    continue
                alone = is_long(served) or served._suspended is not None
                spare -= self.pages.needed(served._claim(0).least)
                full = len(group) == self.group or spare < 0
                if group and (alone or full or served._rank[0] != group[0]._rank[0]):
                    break
                group.append(served)
                if alone:
                    break
        return group

    def in_the_way(self, group: list[Served]) -> list[int] | None:
        """Lanes that give way to a group, the last by rank first; None: it waits, as that would make no room for it.

        Only those of a lower priority do. So does a long prompt, to one of the group: one of them is read at a time.
        """
        new = {-1 - i: s._claim(0) for i, s in enumerate(group)}
        claims, gone = self.claims(), list[int]()
        lower = [lane for lane, claim in claims.items() if claim.rank[0] > group[0]._rank[0]]
        lower.sort(key=lambda lane: claims[lane].rank)

        def leaves(lane: int) -> None:
            lower.remove(lane)
            del claims[lane]
            gone.append(lane)

        if self.reading is not None and is_long(group[0]):
            leaves(self.reading[1])
        while len(self.serving) - len(claims) < len(group) or self.pages.spare(claims | new) < 0:
            if not lower:
                return None
            leaves(lower[-1])
        return gone


def is_long(served: Served) -> bool:
    """Whether its prompt is to be read in chunks."""
    return served._in_chunks and served._suspended is None
