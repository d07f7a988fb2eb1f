"""Engine: requests come and go while lanes of a running batch, each at its own depth, share the core.

    engine = Engine(params, config, lanes=16, max_new_tokens=256, exit_rule=exits.kl())
    requests = [engine.submit(prompt, max_new_tokens=100) for prompt in prompts]
    engine.run()                               # or engine.step() in a loop of your own
    requests[0].tokens, requests[0].steps

    async for token, steps in engine.submit(prompt, max_new_tokens=100): ...

A request gets the tokens and steps that `generate` gives, regardless of other requests.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling
from rdlm.decode.lanes import Flush, advance, empty_lanes, insert
from rdlm.decode.loop import Sizes, begin
from rdlm.decode.passes import next_power
from rdlm.decode.requests import Prompt, Request, RequestOptions, WarmStart, as_requests, padded
from rdlm.exits import ExitRule
from rdlm.model import Params, compute_dtype

OnToken = Callable[[int, int], None]


@dataclasses.dataclass(eq=False)
class Served:
    """A request and its output so far."""

    prompt: np.ndarray
    max_new_tokens: int
    _row: Request = dataclasses.field(repr=False)
    _engine: Engine = dataclasses.field(repr=False)
    tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
    steps: list[int] = dataclasses.field(default_factory=list)  # recurrences of each, as in `generate`
    prompt_steps: np.ndarray | None = None  # int32 per prompt position, once the prompt has been read
    done: bool = False  # no more tokens will come
    cancelled: bool = False
    error: Exception | None = None  # why the request ended early
    _on_token: OnToken | None = dataclasses.field(default=None, repr=False)

    def cancel(self) -> None:
        """Give up: the lane is free for others at the next step. `tokens` keeps the output so far."""
        if not self.done:
            self.done = self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[tuple[int, int]]:
        """(token, steps) as they are made; the consumers run the engine."""
        shown = 0
        while True:
            while shown < len(self.tokens):
                shown += 1
                yield self.tokens[shown - 1], self.steps[shown - 1]
            if self.done:
                break
            async with self._engine._consumers_turn():
                if shown == len(self.tokens) and not self.done:
                    await asyncio.to_thread(self._engine.step)
        if self.error is not None:
            raise self.error


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counters of an engine."""

    ticks: int  # recurrences, of all lanes together
    utilisation: float  # mean share of lanes that took part
    flushes: int


class Engine:
    """Serves requests on `lanes` lanes. One compile per prompt-length bucket, none per request or value.

    Args:
      params, config: the model.
      lanes: requests in flight.
      max_new_tokens: maximum per request.
      capacity: positions per lane, prompt and new tokens together; default config.max_length.
      num_steps: recurrences per token; None = config.mean_recurrence. A request may ask for fewer, or for as many as
        the cache then keeps (the next power of two).
      exit_rule: kind of rule for all requests, and its default thresholds.
      prefill_exit, check_every, cache, warm_start, init_scale: as in `generate`.
      max_queue: requests that may be queued; `submit` refuses more.
      flush_every: a lane whose token has stopped runs the coda after at most this many ticks, with others if possible.
      ticks_per_step: recurrences of one `step`, after which tokens are delivered.

    Raises:
      InputError: impossible sizes.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        lanes: int = 16,
        max_new_tokens: int = 256,
        capacity: int | None = None,
        num_steps: int | None = None,
        exit_rule: ExitRule | None = None,
        prefill_exit: str = "per_token",
        check_every: int = 1,
        cache: CachePolicy = CachePolicy(),
        warm_start: WarmStart = False,
        init_scale: float = 1.0,
        max_queue: int = 1024,
        flush_every: int = 4,
        ticks_per_step: int = 64,
    ):
        numbers = {
            "lanes": lanes,
            "max_new_tokens": max_new_tokens,
            "max_queue": max_queue,
            "flush_every": flush_every,
            "ticks_per_step": ticks_per_step,
        }
        for name, value in numbers.items():
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"Engine: {name} = {value!r}: must be at least 1")
        lanes, max_new_tokens = int(lanes), int(max_new_tokens)
        capacity = config.max_length if capacity is None else capacity
        if not 2 <= capacity <= config.max_length:
            raise InputError(f"Engine: capacity = {capacity}: must be in [2, config.max_length = {config.max_length}]")
        self.params, self.config, self.max_queue = params, config, max_queue
        self._options = RequestOptions(
            num_steps=config.mean_recurrence if num_steps is None else num_steps,
            exit_rule=exit_rule,
            prefill_exit=prefill_exit,
            check_every=check_every,
            warm_start=warm_start,
            init_scale=init_scale,
        )
        self._group = max(1, lanes // 4)  # requests that are prefilled together, lanes that are flushed together
        self._flush, self._ticks = Flush(self._group, flush_every), ticks_per_step
        # Row 0 stands for every idle lane; making it also checks the engine's own options.
        self._idle, _ = as_requests(config, [[0]], 1, self._options)
        sets = cache.sets(next_power(int(np.max(self._idle.depth.num_steps))))
        self._sizes = Sizes(cache, sets, capacity, max_new_tokens)
        self._lanes = empty_lanes(config, _stack([self._idle] * lanes), self._sizes, compute_dtype(params, config))
        self._queue: collections.deque[Served] = collections.deque()
        self._serving: list[Served | None] = [None] * lanes
        self._queue_lock = threading.Lock()  # requests may come while another thread runs a step
        self._running, self._inside = threading.RLock(), False
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        num_steps: int | None = None,
        exit_rule: ExitRule | None = None,
        min_steps: int = 0,
        sampling: Sampling = Sampling(),
        key: ArrayLike | None = None,
        on_token: OnToken | None = None,
    ) -> Served:
        """Queue a request. Arguments as in `generate`; exit_rule: the engine's kind with thresholds of its own.

        on_token(token, steps) is called as tokens are made; if it raises, the request ends with that `error` and the
        others continue.

        Raises:
          InputError: what `generate` refuses, more than the engine has room for, or a full queue; nothing is queued.
        """
        size = self._sizes
        limit = size.tokens if max_new_tokens is None else max_new_tokens
        own = self._options
        options = dataclasses.replace(
            own,
            num_steps=own.num_steps if num_steps is None else num_steps,
            exit_rule=own.exit_rule if exit_rule is None else exit_rule,
            min_steps=min_steps,
            sampling=sampling,
            key=key,
        )
        row, (prompt,) = as_requests(self.config, [prompt], limit, options)
        if limit > size.tokens:
            raise InputError(f"max_new_tokens = {limit}: the engine was made for at most {size.tokens}")
        if prompt.size + limit > size.capacity:
            raise InputError(
                f"prompt: {prompt.size} tokens + max_new_tokens = {limit} exceed the engine's "
                f"capacity = {size.capacity}"
            )
        if size.policy.sets(int(np.max(row.depth.num_steps))) > size.sets:
            raise InputError(f"num_steps = {num_steps}: the engine's cache keeps {size.sets} recurrences")
        kinds: list[object] = [jax.tree.structure(depth) for depth in (row.depth, self._idle.depth)]
        if kinds[0] != kinds[1]:
            kind, other = (None if x.exit_rule is None else x.exit_rule.kind for x in (own, options))
            raise InputError(f"exit_rule: this engine serves {kind!r}; another kind, {other!r}, needs another engine")
        if row.sampling.stop_tokens.shape != self._idle.sampling.stop_tokens.shape:
            width = self._idle.sampling.stop_tokens.shape[1]
            raise InputError(f"Sampling.stop_tokens: the engine serves at most {width} per request")
        if row.keys.dtype != self._idle.keys.dtype:
            raise InputError(f"key: {row.keys.dtype}, but this engine's are {self._idle.keys.dtype}")
        served = Served(prompt, limit, row, self, _on_token=on_token)
        with self._queue_lock:
            if sum(not s.done for s in self._queue) >= self.max_queue:
                raise InputError(f"Engine: max_queue = {self.max_queue} requests are waiting; run the engine first")
            self._queue.append(served)
        return served

    def run(self) -> None:
        """Serve until nothing is queued or in flight."""
        while self.step():
            pass

    def step(self) -> bool:
        """Admit what fits, run some ticks, deliver tokens. False when there was nothing to do.

        Threads take turns. A listener may submit and cancel, but not run the engine that calls it.
        """
        with self._running:
            if self._inside:
                raise InputError("Engine: called from on_token; a listener cannot run the engine that calls it")
            self._inside = True
            try:
                return self._step()
            finally:
                self._inside = False

    def _step(self) -> bool:
        alive = np.asarray([s is not None and not s.done for s in self._serving])
        self._serving = [s if a else None for s, a in zip(self._serving, alive, strict=True)]
        while self._admit():
            pass
        if not any(self._serving):
            return False
        alive = np.asarray([s is not None for s in self._serving])
        # Stop as soon as the next group finds its lanes: some may be free already.
        queued = min(len(self._queue), self._group)
        wake = max(queued - int((~alive).sum()), 1) if queued else len(alive) + 1
        ticks = jnp.int32(self._ticks), jnp.int32(wake)
        self._lanes = advance(
            self.params, self.config, self._lanes, jnp.asarray(alive), *ticks, self._flush, self._options.warm_start
        )
        self._deliver()
        return True

    def _consumers_turn(self) -> asyncio.Lock:
        """Lets one consumer at a time keep the engine going. Such locks belong to an event loop; engines do not."""
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn[0] is not loop:
            self._turn = loop, asyncio.Lock()
        return self._turn[1]

    @property
    def usage(self) -> Usage:
        """Counters since the engine was made."""
        ticks, used, flushes = (int(x) for x in (self._lanes.ticks, self._lanes.used, self._lanes.flushes))
        return Usage(ticks, used / max(ticks * len(self._serving), 1), flushes)

    def _admit(self) -> bool:
        """Prefill a group and give it lanes, once as many lanes are free as the group needs."""
        free = [lane for lane, s in enumerate(self._serving) if s is None]
        with self._queue_lock:
            self._queue = collections.deque(s for s in self._queue if not s.done)
            size = min(len(self._queue), self._group)
            if size == 0 or len(free) < size:
                return False
            group = [self._queue.popleft() for _ in range(size)]
        rest = self._group - size  # rows of padding: no tokens, and a lane that does not exist
        tokens, given = padded([s.prompt for s in group] + [np.zeros(0, np.int32)] * rest, self.config.max_length)
        lengths = jnp.asarray(given, jnp.int32)
        lane = jnp.asarray(free[:size] + [len(self._serving)] * rest, jnp.int32)
        max_tokens = jnp.asarray([s.max_new_tokens for s in group] + [1] * rest, jnp.int32)
        request = _stack([s._row for s in group] + [self._idle] * rest)
        sizes = self._sizes._replace(capacity=tokens.shape[1], tokens=1)
        ways = self._options.prefill_exit, self._options.warm_start
        try:
            progress, prompt_steps = begin(
                self.params, self.config, jnp.asarray(tokens), lengths, request, sizes, *ways
            )
            depth = np.asarray(prompt_steps)
        except Exception as error:  # such as too little memory for prompts of that length: the lanes are untouched
            for s in group:
                s.error, s.done = error, True
            return True
        for i, s in enumerate(group):
            self._serving[free[i]], s.prompt_steps = s, depth[i, : s.prompt.size]
        self._lanes = insert(self.params, self.config, self._lanes, progress, lengths, request, max_tokens, lane)
        self._deliver()  # a request may be over after its first token
        return True

    def _deliver(self) -> None:
        """Hand out new tokens, and free the lanes of requests that have ended."""
        p = self._lanes
        busy, count, tokens, steps = (np.asarray(x) for x in (p.busy, p.count, p.tokens, p.steps))
        for lane, served in enumerate(self._serving):
            if served is None or served.done:
                continue
            for j in range(len(served.tokens), count[lane]):
                served.tokens.append(int(tokens[lane, j]))
                served.steps.append(int(steps[lane, j]))
                if served._on_token is not None:
                    try:
                        served._on_token(served.tokens[-1], served.steps[-1])
                    except Exception as error:  # a listener's error ends its own request alone
                        served.error, served.done = error, True
                if served.done:  # or it has cancelled itself
                    break
            if not busy[lane]:
                served.done, self._serving[lane] = True, None


def _stack(rows: list[Request]) -> Request:
    """Requests of one row each as one of many."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
