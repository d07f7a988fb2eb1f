"""Engine: requests come and go while lanes of a running batch, each at its own depth, share the core.

    engine = Engine(params, config, lanes=16, max_new_tokens=256, exit_rule=exits.kl())
    requests = [engine.submit(prompt, max_new_tokens=100) for prompt in prompts]
    engine.run()                               # or engine.step() in a loop of your own
    requests[0].tokens, requests[0].steps

    async for token, steps in engine.submit(prompt, max_new_tokens=100): ...

A request gets the tokens and steps that `generate` gives, regardless of other requests.

A model may be on several hosts (docs/decoding.md). Then all processes make the same engine, process 0 uses it, and the
others call `follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling
from rdlm.decode.hosts import Hosts, News, hosts, require_same
from rdlm.decode.lanes import Flush
from rdlm.decode.loop import Sizes
from rdlm.decode.pages import Pages, page_sizes
from rdlm.decode.passes import CacheMemory, next_power
from rdlm.decode.program import copies_of, devices_of, fetched, on_several_hosts
from rdlm.decode.reading import Reader, Setup, usual_chunk
from rdlm.decode.requests import (
    Constraint,
    Constraints,
    Prompt,
    Request,
    RequestOptions,
    WarmStart,
    as_requests,
    check_alike,
    check_rows,
    sample_keys,
)
from rdlm.decode.running import Running
from rdlm.decode.schedule import Schedule
from rdlm.decode.served import OnToken, Served
from rdlm.exits import ExitRule
from rdlm.model import Params, check_shape, typed_key
from rdlm.model.inputs import check_callable, check_integers, check_type
from rdlm.runtime import together
from rdlm.runtime.memory import require_memory


class _Everywhere(NamedTuple):
    """What an engine does on all hosts, if there are several."""

    step: Callable[..., bool]
    compile: Callable[..., None]
    counters: Callable[..., tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counters of an engine."""

    ticks: int  # recurrences, of all lanes together; of several copies of the model, the most that one ran
    utilisation: float  # mean share of lanes that took part
    flushes: int


class Engine:
    """Serves requests on `lanes` lanes. One compile per prompt-length bucket, none per request or value.

    Args:
      params, config: the model.
      lanes: requests in flight. Copies of the model (`tensor_parallel`) divide them, and have pages of their own.
      max_new_tokens: maximum per request.
      capacity: positions per lane, prompt and new tokens together; default config.max_length.
      num_steps: recurrences per token; None = config.mean_recurrence. A request may ask for fewer, or for as many as
        the cache then keeps (the next power of two).
      exit_rule: kind of rule for all requests, and its default thresholds.
      prefill_exit, check_every, cache, warm_start, init_scale: as in `generate`.
      max_queue: requests that may be queued; `submit` refuses more.
      flush_every: a lane whose token has stopped runs the coda after at most this many ticks, with others if possible.
      ticks_per_step: recurrences of one `step`, after which tokens are delivered.
      prefill_chunk: most tokens of a prompt that are read at once. A longer prompt is read in chunks, one in each
        `step`, and others get their tokens in between. No result changes; where one would, prompts are read at once:
        with a cache of fewer recurrences, `prefill_exit="together"` or `prefix`. Default: twice the lanes, at least 32
        on a CPU and 128 elsewhere.
      prompt_cache: bytes of keys and values, on all devices, that the engine keeps of prompts read in chunks. A prompt
        that begins with the same chunks, at the same depth, does not read them again. Where initial states are random,
        requests share only with those of the same `key`. Every copy of the model keeps all of them. No result changes.
      page_size: positions of a page of the cache. A request takes pages as its tokens come. Default: 128, and 32 on a
        CPU.
      cache_tokens: positions of all pages, which the lanes share. Default: enough for every lane's `capacity`. With
        fewer, more requests are served in the same memory; where pages run out, the youngest request of the lowest
        priority gives its pages and its lane to others and goes on later. No result changes.

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
        prefill_chunk: int | None = None,
        prompt_cache: int = 0,
        page_size: int | None = None,
        cache_tokens: int | None = None,
    ):
        numbers = {
            "lanes": lanes,
            "max_new_tokens": max_new_tokens,
            "max_queue": max_queue,
            "flush_every": flush_every,
            "ticks_per_step": ticks_per_step,
        }
        check_type("config", config, ModelConfig)
        check_type("cache", cache, CachePolicy)
        capacity = config.max_length if capacity is None else capacity
        optional = {"prefill_chunk": prefill_chunk, "page_size": page_size, "cache_tokens": cache_tokens}
        numbers |= {name: value for name, value in optional.items() if value is not None}
        for name, value in (numbers | {"capacity": capacity}).items():
            check_shape(f"Engine: {name}", value, ())
            check_integers(f"Engine: {name}", value, 1)
        if not isinstance(prompt_cache, int) or prompt_cache < 0:
            raise InputError(f"Engine: prompt_cache = {prompt_cache!r}: must be a number of bytes, at least 0")
        lanes, max_new_tokens, capacity = int(lanes), int(max_new_tokens), int(capacity)
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
            any_shape=True,
        )
        copies = copies_of(params)
        if lanes % copies:
            raise InputError(f"Engine: lanes = {lanes}: must be a multiple of the {copies} copies of the model (data)")
        each = lanes // copies
        group = max(1, each // 4)  # requests that are prefilled together
        several, asked = on_several_hosts(params), functools.partial(as_requests, config, [[0]], 1, self._options)
        # Row 0 stands for every idle lane; making it also checks the engine's own options.
        self._idle, _ = together(asked) if several else asked()
        check_rows(self._idle.depth, 1)
        if several:
            given = numbers | {"capacity": capacity, "prompt_cache": prompt_cache}
            kinds = {"config": repr(config), "cache": repr(cache), "options": (self._idle, prefill_exit, warm_start)}
            require_same({f"Engine: {name}": value for name, value in (given | kinds).items()})
        sets = cache.sets(next_power(int(np.max(self._idle.depth.num_steps)), minimum=1))
        self._sizes = Sizes(cache, sets, capacity, max_new_tokens)
        alike = np.max(self._idle.depth.num_steps) == 1  # all lanes stop after the same tick
        flush = Flush(each if alike else group, flush_every)
        sizes = page_sizes(each, capacity, page_size, cache_tokens, copies=copies)
        prompts = f" and prompt_cache = {prompt_cache} bytes" if prompt_cache else ""
        positions, lane_positions = sizes.number * sizes.size, f"{lanes} lanes x {capacity}"
        kept = sets, capacity
        memory = CacheMemory(params, config, each, 1, kept, self._idle.depth, positions=positions, policy=cache)
        shown = lane_positions if cache_tokens is None else copies * positions
        require_memory(
            f"cache: {sets} recurrences x {shown} positions{prompts}",
            memory.bytes + prompt_cache // devices_of(params),
            "use fewer lanes, a smaller capacity or fewer cache_tokens, or keep fewer recurrences "
            "(cache=CachePolicy(recurrences=k))",
            hosts=several,
        )
        chunk = usual_chunk(each) if prefill_chunk is None else int(prefill_chunk)
        setup = Setup(params, config, self._options, self._idle, self._sizes)
        self._reader = Reader(setup, chunk=chunk, prompt_cache=prompt_cache)
        self._schedule = Schedule(each, [Pages(each, capacity, sizes) for _ in range(copies)], group)
        self._running = Running(setup, self._schedule, self._reader, flush, ticks_per_step)
        self._hosts: Hosts | None = None
        self._mine = dict[tuple[int, int], Served]()  # that come with the next step
        self._everywhere: _Everywhere | None = None
        if several:
            self._hosts, self._schedule.coming = hosts(), []
            everywhere = self._hosts.everywhere
            self._everywhere = _Everywhere(
                everywhere(self._step_here), everywhere(self._compile_here), everywhere(self._count_here)
            )
        self._one_thread, self._inside = threading.RLock(), False
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @property
    def preempted(self) -> int:
        """How often a request gave its lane and its pages to others."""
        return self._schedule.preempted

    @property
    def prompt_cache_bytes(self) -> int:
        """Bytes that the prompt cache holds now."""
        return self._reader.kept.bytes

    @property
    def cache_usage(self) -> float:
        """Share of the pages that requests in flight need. Any thread may ask."""
        return self._schedule.usage

    @property
    def in_flight(self) -> list[Served]:
        """Requests that have a lane. One whose long prompt is being read has no token yet. Any thread may ask."""
        return self._schedule.in_flight

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        num_steps: int | None = None,
        exit_rule: ExitRule | None = None,
        min_steps: int = 0,
        sampling: Sampling = Sampling(),
        prefix: bool = False,
        key: ArrayLike | None = None,
        on_token: OnToken | None = None,
        likeliest: bool = False,
        constraint: Constraint | None = None,
        priority: int = 0,
    ) -> Served:
        """Queue a request. Arguments as in `generate`; exit_rule: the engine's kind with thresholds of its own.

        likeliest: also find the 20 likeliest tokens at every new position.

        constraint: says which tokens may come next; others have no probability, as if `Sampling.logit_bias` said minus
        infinity. Such a request gets at most one token in each `step`, beside the one that comes with its prompt.

        priority: requests of a higher one come first, and take lanes and pages of those of a lower one; those of one
        priority come in the order of their submission.

        on_token(token, steps) is called as tokens are made; if it raises, the request ends with that `error` and the
        others continue.

        Raises:
          InputError: what `generate` refuses, more than the engine has room for, or a full queue; nothing is queued.
        """
        if self._hosts is not None:
            self._hosts.require_first("submit requests")
            if constraint is not None:
                raise InputError("constraint: an engine on several hosts serves none; use a model on one host")
        check_callable("on_token", on_token)
        check_shape("priority", priority, ())
        check_integers("priority", priority)
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
            prefix=prefix,
            likeliest=likeliest,
        )
        row, (prompt,) = as_requests(self.config, [prompt], limit, options)
        limit = int(limit)
        if limit > size.tokens:
            raise InputError(f"max_new_tokens = {limit}: the engine was made for at most {size.tokens}")
        if prompt.size + limit > size.capacity:
            raise InputError(
                f"prompt: {prompt.size} tokens + max_new_tokens = {limit} exceed the engine's "
                f"capacity = {size.capacity}"
            )
        if size.policy.sets(int(np.max(row.depth.num_steps))) > size.sets:
            raise InputError(f"num_steps = {num_steps}: the engine's cache keeps {size.sets} recurrences")
        check_alike(row, self._idle)
        allowed = None
        if constraint is not None:
            row = Constraints([constraint], 1, options).restrict(row, [0], self.config.vocab_size)
            allowed = np.asarray(row.sampling.allowed)[0]
        rank = self._schedule.rank(int(priority))
        served = self._new(rank, limit, prompt, row, on_token)
        served._constraint, served._allowed = constraint, allowed
        self._schedule.add(served, self.max_queue)
        return served

    def _new(
        self, rank: tuple[int, int], limit: int, prompt: np.ndarray, row: Request, on_token: OnToken | None = None
    ) -> Served:
        depth = row.depth
        fewest = int(np.max(depth.num_steps))
        if depth.rule is not None:
            fewest = min(int(np.max(depth.min_steps)) + 1, fewest)
        likeliest = bool(np.any(row.likeliest))
        served = Served(prompt, limit, row, self, rank, fewest, _on_token=on_token, _wants_likeliest=likeliest)
        served._in_chunks = prompt.size > self._reader.chunk and not np.any(row.prefix)
        served._alone = self._hosts is None
        return served

    def prompt_lengths(self, prefix: bool = False) -> list[int]:
        """Requests for one token after prompts of these lengths compile all that prompts with such a `prefix` need."""
        longest = self._sizes.capacity - 1
        at_once = longest if prefix else min(self._reader.chunk, longest)
        buckets = [16 << i for i in range(at_once.bit_length()) if 16 << i < at_once]
        chunked = [] if at_once == longest else [at_once + 1] * 2  # for the second, the prompt cache holds a chunk
        return [*buckets, at_once, *chunked]

    def compile_preemption(self) -> None:
        """Compile what the first preemption needs, so that nobody waits for it then. For an engine that is idle."""
        with self._my_turn():
            self._everywhere.compile() if self._everywhere else self._compile_here()

    def _compile_here(self, _: bytes = b"") -> None:
        self._running.compile_preemption()

    def samples(self, prompt: Prompt, count: int, key: ArrayLike, **options: Any) -> list[Served]:
        """Queue `count` requests for different continuations of one prompt: those of `generate(samples=count)`.

        options: other arguments of `submit`.

        Raises:
          InputError: as `submit`; nothing is queued.
        """
        if "constraint" in options:
            raise InputError("constraint: every request needs one of its own; call submit for each, with its own key")
        check_shape("count", count, ())
        check_integers("count", count, 1)
        check_shape("key", key := typed_key(key), ())
        served: list[Served] = []
        try:
            for k in sample_keys(key[None], int(count)):
                served.append(self.submit(prompt, key=k, **options))
        except InputError:
            for s in served:
                s.cancel()
            raise
        return served

    def run(self) -> None:
        """Serve until nothing is queued or in flight."""
        while self.step():
            pass

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Admit what fits, run some ticks, deliver tokens. False when there was nothing to do.

        Threads take turns. A listener may submit and cancel, but not run the engine that calls it.

        meanwhile: called once the device computes the ticks, before the wait for it; not if there are none to compute.
        """
        with self._my_turn():
            return self._everywhere.step(self._news, meanwhile) if self._everywhere else self._step_here(b"", meanwhile)

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        if self._hosts is not None:
            self._hosts.require_outside()
        with self._one_thread:
            if self._inside:
                raise InputError("Engine: called from on_token; a listener cannot run the engine that calls it")
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def _news(self) -> bytes:
        """What other hosts must hear before the next step."""
        came, left = self._schedule.news()
        self._mine = {s._rank: s for s in came}
        return News([(s._rank, s.max_new_tokens, s.prompt, s._row) for s in came], [s._rank[1] for s in left]).packed()

    def _step_here(self, news: bytes, meanwhile: Callable[[], None] = lambda: None) -> bool:
        if news:
            came, left = News.of(news, self._idle)
            for s in self._schedule.known:
                s._over = s._over or s._rank[1] in left
            for rank, limit, prompt, row in came:
                served = self._mine.pop(rank, None) or self._new(rank, limit, prompt, row)
                served._row = row
                self._schedule.back(served)
        return self._running.step(meanwhile)

    def follow(self) -> None:
        """On several hosts, on others than process 0: do what it does with its engines, until it calls `close`.

        If process 0 is lost, or this one fails, all end with one line and exit code 1.

        Raises:
          InputError: this is process 0, or the model is on one host.
        """
        if self._hosts is None:
            raise InputError("Engine: the model is on one host, so there is nobody to follow; use tensor and data")
        self._hosts.follow()

    def close(self) -> None:
        """On several hosts, on process 0: let the others stop following. No engine there can be used any more."""
        if self._hosts is not None:
            self._hosts.close()

    def _step_for(self, served: Served) -> None:
        """A step for a consumer.

        Raises:
          InputError: there is nothing to do although its request is not done: it would wait for ever.
        """
        if not self.step() and not served.done:
            raise InputError("Engine: does not know this request any more; submit it again")

    def _consumers_turn(self) -> asyncio.Lock:
        """Lets one consumer at a time keep the engine going. Such locks belong to an event loop; engines do not."""
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn[0] is not loop:
            self._turn = loop, asyncio.Lock()
        return self._turn[1]

    @property
    def usage(self) -> Usage:
        """Counters since the engine was made. On several hosts process 0 alone reads them, between steps."""
        if self._everywhere:
            with self._my_turn():
                ticks, used, flushes = self._everywhere.counters()
        else:
            ticks, used, flushes = self._count_here()
        share = int(used.sum()) / max(int(ticks.sum()) * self._schedule.each, 1)
        return Usage(int(ticks.max()), share, int(flushes.sum()))

    def _count_here(self, _: bytes = b"") -> tuple[np.ndarray, ...]:
        lanes = self._running.lanes
        return fetched((lanes.ticks, lanes.used, lanes.flushes))
