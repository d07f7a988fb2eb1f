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
import bisect
import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling
from rdlm.decode.lanes import RECENT, Flush, Lanes, advance, empty_lanes, insert
from rdlm.decode.loop import Sizes, begin
from rdlm.decode.pages import Claim, Pages, page_sizes
from rdlm.decode.passes import CacheMemory, next_power
from rdlm.decode.preempt import resume, suspend
from rdlm.decode.program import devices_of, host
from rdlm.decode.reading import Reader, Reading, usual_chunk
from rdlm.decode.requests import (
    Constraint,
    Prompt,
    Request,
    RequestOptions,
    WarmStart,
    allowed_next,
    as_requests,
    check_constraint,
    not_finite,
    padded,
    sample_keys,
)
from rdlm.decode.served import OnToken, Served
from rdlm.exits import ExitRule
from rdlm.model import Params, check_shape, typed_key
from rdlm.model.inputs import check_callable, check_integers, check_type
from rdlm.runtime.memory import require_memory


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
      prefill_chunk: most tokens of a prompt that are read at once. A longer prompt is read in chunks, one in each
        `step`, and others get their tokens in between. No result changes; where one would, prompts are read at once:
        with a cache of fewer recurrences, `prefill_exit="together"` or `prefix`. Default: twice the lanes, at least 32
        on a CPU and 128 elsewhere.
      prompt_cache: bytes of keys and values, on all devices, that the engine keeps of prompts read in chunks. A prompt
        that begins with the same chunks, at the same depth, does not read them again. Where initial states are random,
        requests share only with those of the same `key`. No result changes.
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
        self._group, self._ticks = max(1, lanes // 4), ticks_per_step  # requests that are prefilled together
        # Row 0 stands for every idle lane; making it also checks the engine's own options.
        self._idle, _ = as_requests(config, [[0]], 1, self._options)
        if any(np.shape(leaf)[:1] != (1,) for leaf in jax.tree.leaves(self._idle.depth)):
            raise InputError(
                f"exit_rule: {exit_rule and exit_rule.kind!r} has weights without an axis of rows, so requests cannot "
                "have their own; override its by_row"
            )
        sets = cache.sets(next_power(int(np.max(self._idle.depth.num_steps)), minimum=1))
        self._sizes = Sizes(cache, sets, capacity, max_new_tokens)
        together = np.max(self._idle.depth.num_steps) == 1  # whether all lanes stop after the same tick
        self._flush = Flush(lanes if together else self._group, flush_every)
        self._serving: list[Served | None] = [None] * lanes
        self._pages = Pages(lanes, capacity, page_sizes(lanes, capacity, page_size, cache_tokens))
        prompts = f" and prompt_cache = {prompt_cache} bytes" if prompt_cache else ""
        positions, lane_positions = self._pages.sizes.number * self._pages.sizes.size, f"{lanes} lanes x {capacity}"
        memory = CacheMemory(params, config, lanes, 1, (sets, capacity), self._idle.depth, positions=positions)
        require_memory(
            f"cache: {sets} recurrences x {lane_positions if cache_tokens is None else positions} positions{prompts}",
            memory.bytes + prompt_cache // devices_of(params),
            "use fewer lanes, a smaller capacity or fewer cache_tokens, or keep fewer recurrences "
            "(cache=CachePolicy(recurrences=k))",
        )
        chunk = usual_chunk(lanes) if prefill_chunk is None else int(prefill_chunk)
        self._reader = Reader(
            params, config, self._sizes, self._options, self._idle.depth, chunk=chunk, prompt_cache=prompt_cache
        )
        self._reading: tuple[Served, int, Reading] | None = None  # a long prompt, and the lane that it will have
        self._chunk_next = False  # whose turn it is
        self._lanes = self._empty_lanes()
        self._submitted = itertools.count()
        self._queue: list[Served] = []  # by rank
        self.preempted = 0
        """How often a request gave its lane and its pages to others."""
        self._queue_lock = threading.Lock()  # requests may come while another thread runs a step
        self._running, self._inside = threading.RLock(), False
        self._behind = False  # whether the lanes may hold tokens that were not delivered
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @property
    def prompt_cache_bytes(self) -> int:
        """Bytes that the prompt cache holds now."""
        return self._reader.kept.bytes

    @property
    def cache_usage(self) -> float:
        """Share of the pages that requests in flight need. Any thread may ask."""
        claims = dict(enumerate(served._claim(0) for served in self.in_flight))
        return 1 - self._pages.spare(claims) / self._pages.sizes.number

    @property
    def in_flight(self) -> list[Served]:
        """Requests that have a lane. One whose long prompt is being read has no token yet. Any thread may ask."""
        reading = self._reading
        held = dict.fromkeys([None if reading is None else reading[0], *self._serving])  # it may just have moved
        return [served for served in held if served is not None and not served.done]

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
        theirs, ours = row.depth, self._idle.depth
        kinds: list[object] = [jax.tree.structure(depth) for depth in (theirs, ours)]
        if kinds[0] != kinds[1]:
            kind, other = (None if x.exit_rule is None else x.exit_rule.kind for x in (own, options))
            raise InputError(f"exit_rule: this engine serves {kind!r}; another kind, {other!r}, needs another engine")
        for leaf, other_leaf in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
            if (leaf.shape, leaf.dtype) != (other_leaf.shape, other_leaf.dtype):
                raise InputError(
                    f"exit_rule: weights of {leaf.dtype} {list(leaf.shape[1:])}, but this engine serves those of "
                    f"{other_leaf.dtype} {list(other_leaf.shape[1:])}"
                )
        if row.sampling.stop_tokens.shape != self._idle.sampling.stop_tokens.shape:
            width = self._idle.sampling.stop_tokens.shape[1]
            raise InputError(f"Sampling.stop_tokens: the engine serves at most {width} per request")
        if row.keys.dtype != self._idle.keys.dtype:
            raise InputError(f"key: {row.keys.dtype}, but this engine's are {self._idle.keys.dtype}")
        allowed = None
        if constraint is not None:
            check_constraint(constraint, sampling)
            allowed = allowed_next(constraint, self.config.vocab_size)
            sampling_row = row.sampling._replace(constrained=host([True]), allowed=host(allowed[None]))
            row = row._replace(sampling=sampling_row)
        fewest = int(np.max(row.depth.num_steps))
        if options.exit_rule is not None:
            fewest = min(int(np.max(row.depth.min_steps)) + 1, fewest)
        identity = row, self, (-int(priority), next(self._submitted)), fewest
        served = Served(prompt, limit, *identity, _on_token=on_token, _wants_likeliest=bool(likeliest))
        served._constraint, served._allowed = constraint, allowed
        served._in_chunks = prompt.size > self._reader.chunk and not np.any(prefix)
        with self._queue_lock:
            if sum(not s.done and not s._preempted for s in self._queue) >= self.max_queue:
                raise InputError(f"Engine: max_queue = {self.max_queue} requests are waiting; run the engine first")
            self._enqueue(served)
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
        with self._running:
            kept = suspend(self.params, self.config, self._lanes, 0, [0])
            for lanes in resume(self.params, self.config, self._with_pages({}), kept, 0, [0]):
                self._lanes = lanes

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
        with self._running:
            if self._inside:
                raise InputError("Engine: called from on_token; a listener cannot run the engine that calls it")
            self._inside = True
            try:
                return self._step(meanwhile)
            finally:
                self._inside = False

    def _step_for(self, served: Served) -> None:
        """A step for a consumer.

        Raises:
          InputError: there is nothing to do although its request is not done: it would wait for ever.
        """
        if not self.step() and not served.done:
            raise InputError("Engine: does not know this request any more; submit it again")

    def _step(self, meanwhile: Callable[[], None]) -> bool:
        if self._behind:
            self._catch_up()
        self._serving = [None if s is None or s.done else s for s in self._serving]
        if self._reading is not None and self._reading[0].done:
            self._reading = None
        for lane in (lacking := self._pages.lacking(self._claims())):  # first: then there is room for all in flight
            self._preempt(lane)
        taken = self._take_in()
        if not any(self._serving):
            return taken or bool(lacking)
        told = host([-1 if s is None else len(s.tokens) for s in self._serving], np.int32)
        # Stop as soon as the next group finds its lanes: some may be free already.
        group = self._next()
        wake = max(len(group) - len(self._free), 1) if group else len(told) + 1
        most = min(self._ticks, RECENT) if self._wanted else self._ticks
        constrained = any(s is not None and s._constraint is not None for s in self._serving)
        if self._reading is not None or constrained:  # no more than every lane needs for a token
            most = min(most, self._sizes.sets + self._flush.every)
        ticks = host(most, np.int32), host(wake, np.int32)
        self._behind = True
        try:
            if constrained:
                self._allow()
            lanes, warm_start = self._with_pages(self._claims(most)), self._options.warm_start
            given = lanes, told, *ticks, self._flush, warm_start
            self._lanes = advance(self.params, self.config, *given)
            meanwhile()
            made = _Made.read(self._lanes)
        except BaseException as error:
            in_flight = [s for s in self._serving if s is not None]
            self._fail(in_flight if isinstance(error, Exception) else [], error)  # Ctrl-C alone ends nothing
            return True
        self._deliver(made)
        self._behind = False
        return True

    def _catch_up(self) -> None:
        """Deliver the tokens of a step that was interrupted: what requests need of the cache is counted by them."""
        try:
            self._deliver(_Made.read(self._lanes))
        except Exception as error:
            self._fail([s for s in self._serving if s is not None], error)
        self._behind = False

    def _claims(self, ticks: int = 0) -> dict[int, Claim]:
        """By lane, what the requests in flight need."""
        reading = self._reading
        held = {lane: s for lane, s in enumerate(self._serving) if s is not None}
        if reading is not None:
            held[reading[1]] = reading[0]
        return {lane: s._claim(ticks) for lane, s in held.items()}

    def _with_pages(self, claims: dict[int, Claim]) -> Lanes:
        """The lanes, with pages for these claims."""
        return self._lanes._replace(pages=jnp.array(self._pages.assign(claims)))

    def _enqueue(self, served: Served) -> None:
        bisect.insort(self._queue, served, key=lambda s: s._rank)

    def _preempt(self, lane: int) -> None:
        """Let the request in a lane wait until there is room for it again."""
        if self._reading is not None and self._reading[1] == lane:  # its prompt is read again
            served, self._reading = self._reading[0], None
        else:
            held = self._serving[lane]
            assert held is not None
            served = held
            pages = self._pages.of(lane, served.prompt.size + len(served.tokens))
            try:
                served._suspended = suspend(self.params, self.config, self._lanes, lane, pages)
            except Exception as error:
                self._fail([served], error)
            self._serving[lane] = None
            if served.done:  # that failed, or it has just been cancelled
                served._suspended = None
                return
        self.preempted, served._preempted = self.preempted + 1, True
        with self._queue_lock:
            self._enqueue(served)

    def _resume(self, served: Served, lane: int) -> None:
        """Give a request that was preempted a lane again."""
        suspended, served._suspended = served._suspended, None
        assert suspended is not None
        claim = served._claim(0)
        lanes = self._with_pages(self._claims() | {lane: claim})
        try:
            pages = self._pages.of(lane, claim.least)
            for made in resume(self.params, self.config, lanes, suspended, lane, pages):
                self._lanes = made
        except Exception as error:
            self._fail([served], error)
        except BaseException as error:
            served._suspended = suspended
            with self._queue_lock:
                self._enqueue(served)
            self._fail([], error)
        else:
            self._serving[lane] = served

    def _allow(self) -> None:
        """Tell the lanes of constrained requests which tokens may come next."""
        request = self._lanes.request
        rows = np.zeros(request.sampling.allowed.shape, np.uint32)
        for lane, s in enumerate(self._serving):
            if s is not None and s._allowed is not None:
                rows[lane] = s._allowed
        # Through an operation on what is there, so that the program sees an array of the same placement.
        allowed = jnp.where(request.sampling.constrained[:, None], jnp.asarray(rows), request.sampling.allowed)
        sampling = request.sampling._replace(allowed=allowed)
        self._lanes = self._lanes._replace(request=request._replace(sampling=sampling))

    def _empty_lanes(self) -> Lanes:
        rows = _stack([self._idle] * len(self._serving))
        return empty_lanes(self.params, self.config, rows, self._sizes, self._pages.sizes)

    def _fail(self, concerned: list[Served], error: BaseException) -> None:
        """End the requests concerned with `error`, and if the lanes are lost with it, all that are in flight."""
        try:
            jax.block_until_ready(self._lanes)
        except Exception:  # donated to a program that failed, or made by it
            concerned = concerned + [s for s in self._serving if s is not None]
            self._lanes = self._empty_lanes()
        for s in concerned:
            s._end(error)
        if not isinstance(error, Exception):
            raise error

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

    @property
    def _free(self) -> list[int]:
        """Lanes that nobody has."""
        kept = None if self._reading is None else self._reading[1]
        return [lane for lane, s in enumerate(self._serving) if s is None and lane != kept]

    def _take_in(self) -> bool:
        """Prefill what is queued and read long prompts. False: there was nothing to take in.

        While others are served, one group or one chunk, so that their next tokens wait for no more; in turn, so that
        neither kind waits for ever.
        """
        if not any(self._serving):
            while self._admit():
                pass
            return self._read_chunk()
        self._chunk_next = not self._chunk_next
        turns = (self._read_chunk, self._admit) if self._chunk_next else (self._admit, self._read_chunk)
        return any(turn() for turn in turns)

    def _admit(self) -> bool:
        """Take in the next group, once there are lanes and pages enough. False: not yet."""
        group = self._next()
        if not group or not self._make_room(group):
            return False
        free = self._free
        with self._queue_lock:
            for served in group:
                self._queue.remove(served)
        if group[0]._suspended is not None:
            self._resume(group[0], free[0])
        elif _long(group[0]):
            self._begin_reading(group[0], free[0])
        else:
            self._place(group, free[: len(group)])
        return True

    def _make_room(self, group: list[Served]) -> bool:
        """Whether there are lanes and pages for all of a group; those of a lower priority give them up if that helps.

        So does a long prompt of a lower priority to one of the group: one of them is read at a time.
        """
        new = {-1 - i: s._claim(0) for i, s in enumerate(group)}
        claims = self._claims()
        stay = {lane: claim for lane, claim in claims.items() if claim.rank[0] <= group[0]._rank[0]}
        if len(self._serving) - len(stay) < len(group) or self._pages.spare(stay | new) < 0:
            return False
        if self._reading is not None and _long(group[0]):
            self._preempt(self._reading[1])
        while len(self._free) < len(group) or self._pages.spare(self._claims() | new) < 0:
            claims = self._claims()
            self._preempt(max(claims, key=lambda lane: claims[lane].rank))
        return True

    def _next(self) -> list[Served]:
        """Those whose turn it is: a group of one priority for which there may be pages, or one whose prompt is long or
        that was preempted. While a long prompt is read, others pass its like of no higher priority."""
        group: list[Served] = []
        spare = self._pages.spare(self._claims())
        with self._queue_lock:
            for served in self._queue:
                if served.done:
                    served._suspended = None
            self._queue = [s for s in self._queue if not s.done]
            for served in self._queue:
                if _long(served) and self._reading is not None and self._reading[0]._rank[0] <= served._rank[0]:
                    continue
                alone = _long(served) or served._suspended is not None
                spare -= self._pages.needed(served._claim(0).least)
                full = len(group) == self._group or spare < 0
                if group and (alone or full or served._rank[0] != group[0]._rank[0]):
                    break
                group.append(served)
                if alone:
                    break
        return group

    def _place(self, group: list[Served], lanes: list[int]) -> None:
        """Prefill requests and put them into these lanes. If several fail together, each is tried alone."""
        try:
            made, prompt_steps = self._prefill(group, lanes)
        except BaseException as error:  # such as too little memory for prompts of that length
            if len(group) == 1 or not isinstance(error, Exception):
                self._fail(group, error)
            else:
                self._fail([], error)
                for s, lane in zip(group, lanes, strict=True):
                    self._place([s], [lane])
            return
        for row, (s, lane) in enumerate(zip(group, lanes, strict=True)):
            self._serving[lane], s.prompt_steps = s, prompt_steps[row, : s.prompt.size]
        self._deliver(made)  # a request may be over after its first token

    def _prefill(self, group: list[Served], lanes: list[int]) -> tuple[_Made, np.ndarray]:
        """(What lanes hold then, recurrences of every prompt token)."""
        rest = self._group - len(group)  # rows of padding: no tokens, and a lane that does not exist
        tokens, given = padded([s.prompt for s in group] + [np.zeros(0, np.int32)] * rest, self.config.max_length)
        lengths = host(given, np.int32)
        lane = host(lanes + [len(self._serving)] * rest, np.int32)
        max_tokens = host([s.max_new_tokens for s in group] + [1] * rest, np.int32)
        request = _stack([s._row for s in group] + [self._idle] * rest)
        sizes = self._sizes._replace(capacity=tokens.shape[1], tokens=1)
        ways = self._options.prefill_exit, self._options.warm_start
        cache = sizes.sets, sizes.capacity
        CacheMemory(self.params, self.config, len(tokens), sizes.capacity, cache, self._idle.depth).require()
        progress, prompt_steps = begin(self.params, self.config, host(tokens), lengths, request, sizes, *ways)
        depth = np.asarray(prompt_steps)  # errors of the program appear here, while the lanes are untouched
        claims = self._claims() | {lane: s._claim(0) for s, lane in zip(group, lanes, strict=True)}
        paged = self._with_pages(claims)
        self._lanes = insert(self.params, self.config, paged, progress, lengths, request, max_tokens, lane)
        return _Made.read(self._lanes), depth

    def _begin_reading(self, served: Served, lane: int) -> None:
        try:
            reading = self._reader.begin(served.prompt, served._row)
        except BaseException as error:
            self._fail([served], error)
        else:
            served.cached_tokens = reading.length
            self._reading = served, lane, reading

    def _read_chunk(self) -> bool:
        """Read the next chunk of a long prompt, and after the last put it into its lane. False: there is none."""
        if self._reading is None:
            return False
        served, lane, reading = self._reading
        try:
            progress = self._reader.read(reading)
            if progress is None:
                return True
            length, limit, at = (host([n], np.int32) for n in (served.prompt.size, served.max_new_tokens, lane))
            lanes = self._with_pages(self._claims())
            self._lanes = insert(self.params, self.config, lanes, progress, length, served._row, limit, at)
            made = _Made.read(self._lanes)
        except BaseException as error:
            self._reading = None
            self._fail([served], error)
            return True
        self._reading, self._serving[lane], served.prompt_steps = None, served, np.concatenate(reading.chunks)
        self._deliver(made)
        return True

    @property
    def _wanted(self) -> bool:
        """Whether a request in flight wants the likeliest tokens."""
        return any(s is not None and s._wants_likeliest for s in self._serving)

    def _deliver(self, made: _Made) -> None:
        """Hand out new tokens, and free the lanes of requests that have ended."""
        top = jax.device_get(self._lanes.likeliest) if self._wanted else None
        for lane, served in enumerate(self._serving):
            if served is None or served.done:
                continue
            before = len(served.tokens)
            for j in range(before, made.count[lane]):
                served.tokens.append(int(made.tokens[lane, j]))
                served.steps.append(int(made.steps[lane, j]))
                served.log_probs.append(float(made.log_probs[lane, j]))
                if top is not None and served._wants_likeliest:
                    ids, scores = (x[lane, j % x.shape[1]].tolist() for x in top)
                    served.likeliest.append([(i, p) for i, p in zip(ids, scores, strict=True) if i >= 0])
                if served._on_token is not None:
                    try:
                        served._on_token(served.tokens[-1], served.steps[-1])
                    except (Exception, asyncio.CancelledError) as error:  # a listener's error is its own request's
                        served._end(error)
                if served.done:  # or it has cancelled itself
                    break
            if not made.busy[lane]:
                served._end(not_finite("request", len(served.tokens)) if made.failed[lane] else None)
                self._serving[lane] = None
            elif served._constraint is not None and len(served.tokens) > before and not served.done:
                try:
                    served._constraint.accept(served.tokens[-1])
                    served._allowed = allowed_next(served._constraint, self.config.vocab_size)
                except Exception as error:
                    served._end(error)


class _Made(NamedTuple):
    """What the host reads of lanes; the names are those of `Lanes`."""

    busy: np.ndarray
    failed: np.ndarray
    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    tokens: np.ndarray
    steps: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def read(cls, lanes: Lanes) -> _Made:
        """Wait for the program that makes them; its errors appear here."""
        return cls(*(np.asarray(getattr(lanes, name)) for name in cls._fields))


def _long(served: Served) -> bool:
    """Whether its prompt is to be read in chunks."""
    return served._in_chunks and served._suspended is None


def _stack(rows: list[Request]) -> Request:
    """Requests of one row each as one of many."""
    return jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray) else jnp).concatenate(x), *rows)
