"""A request to an engine, as whoever made it sees it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import numpy as np

from rdlm.decode.pages import Claim
from rdlm.decode.preempt import Suspended
from rdlm.decode.requests import Constraint, Request

OnToken = Callable[[int, int], None]


class Runs(Protocol):
    """What the consumers of a request keep going: an engine."""

    def _consumers_turn(self) -> asyncio.Lock: ...

    def _step_for(self, served: Served) -> None: ...


@dataclasses.dataclass(eq=False)
class Served:
    """A request and its output so far."""

    prompt: np.ndarray
    max_new_tokens: int
    _row: Request = dataclasses.field(repr=False)
    _engine: Runs = dataclasses.field(repr=False)
    _rank: tuple[int, int] = dataclasses.field(repr=False)  # the lowest comes first, see `Claim`
    _fewest: int = dataclasses.field(repr=False)  # recurrences of a token
    tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
    steps: list[int] = dataclasses.field(default_factory=list)  # recurrences of each, as in `generate`
    prompt_steps: np.ndarray | None = None  # int32 per prompt position, once the prompt has been read
    cached_tokens: int = 0  # of the prompt, which earlier prompts left in the engine's prompt cache
    cancelled: bool = False
    error: BaseException | None = None  # why the request ended early
    log_probs: list[float] = dataclasses.field(default_factory=list)  # of each token, as in `generate`
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    """(token, log-probability) of the likeliest at each new position, the first one first, if they were asked for."""
    _wants_likeliest: bool = dataclasses.field(default=False, repr=False)
    _in_chunks: bool = dataclasses.field(default=False, repr=False)  # whether its prompt is read so
    _on_token: OnToken | None = dataclasses.field(default=None, repr=False)
    _consumers: int = dataclasses.field(default=0, repr=False)
    _constraint: Constraint | None = dataclasses.field(default=None, repr=False)
    _allowed: np.ndarray | None = dataclasses.field(default=None, repr=False)  # next, by the constraint
    _suspended: Suspended | None = dataclasses.field(default=None, repr=False)  # while others have its lane
    _preempted: bool = dataclasses.field(default=False, repr=False)  # whether it ever gave way
    _made: int = dataclasses.field(default=0, repr=False)  # tokens that the engine has delivered
    _over: bool = dataclasses.field(default=False, repr=False)  # for the engine
    _alone: bool = dataclasses.field(default=True, repr=False)  # no other host has an engine that must know when it is

    @property
    def done(self) -> bool:
        """No more tokens will come."""
        return self._over or self.cancelled or self.error is not None

    def _claim(self, ticks: int) -> Claim:
        """The positions that it needs in its lane for another token, and before so many ticks have passed."""
        made, last = max(self._made, 1), self.prompt.size + self.max_new_tokens - 1
        least, most = (min(self.prompt.size + made + n, last) for n in (1, 1 + ticks // self._fewest))
        return Claim(self._rank, least, most)

    def _end(self, error: BaseException | None = None) -> None:
        if not self.done:
            self.error = error
        self._over = True

    def _leave(self, error: BaseException | None = None) -> None:
        """End it for whoever made it, and for the engine as soon as all hosts know."""
        if not self.done:
            self.error, self.cancelled = error, error is None
            if self._alone:
                self._over = True

    def cancel(self) -> None:
        """Give up: the lane is free for others at the next step. `tokens` keeps the output so far."""
        self._leave()

    async def __aiter__(self) -> AsyncIterator[tuple[int, int]]:
        """(token, steps) as they are made; the consumers run the engine. The last one to leave cancels the request."""
        shown = 0
        self._consumers += 1
        try:
            while True:
                while shown < len(self.tokens):
                    shown += 1
                    yield self.tokens[shown - 1], self.steps[shown - 1]
                if self.done:
                    break
                async with self._engine._consumers_turn():
                    if shown == len(self.tokens) and not self.done:
                        await asyncio.to_thread(self._engine._step_for, self)
        finally:
            self._consumers -= 1
            if self._consumers == 0:
                self.cancel()
        if self.error is not None:
            raise self.error
