"""What an engine runs: prompts into lanes, ticks of all lanes, and the tokens that come of them to their requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdlm.config import InputError, one_line
from rdlm.decode.lanes import RECENT, Flush, Lanes, advance, empty_lanes, insert
from rdlm.decode.loop import begin
from rdlm.decode.pages import Claim
from rdlm.decode.passes import CacheMemory
from rdlm.decode.preempt import resume, suspend
from rdlm.decode.program import fetched, for_copy, host, on_several_hosts
from rdlm.decode.reading import Reader, Setup
from rdlm.decode.requests import allowed_next, not_finite, padded, stacked
from rdlm.decode.schedule import Schedule, is_long
from rdlm.decode.served import Served
from rdlm.runtime import RunError


class Running:
    """The lanes of an engine and what happens to them, one step after the other.

    Args:
      setup: of the engine.
      schedule: says who comes next.
      reader: of long prompts.
      flush: when stopped lanes are flushed.
      ticks: most recurrences of a step.
    """

    def __init__(self, setup: Setup, schedule: Schedule, reader: Reader, flush: Flush, ticks: int):
        self.params, self.config, self.options, self.idle, self.sizes = setup
        self.schedule, self.reader, self.flush, self.ticks = schedule, reader, flush, ticks
        self.lanes = self._empty_lanes()
        self._chunk_next = False  # whose turn it is
        self._behind = False  # whether the lanes may hold tokens that were not delivered

    def step(self, meanwhile: Callable[[], None]) -> bool:
        """As `Engine.step`."""
        schedule = self.schedule
        if self._behind:
            self._catch_up()
        schedule.forget()
        for lane in (lacking := schedule.lacking()):  # first: then there is room for all in flight
            self.preempt(lane)
        taken = self._take_in()
        if not schedule.served:
            return taken or bool(lacking)
        told = host([-1 if s is None else s._made for s in schedule.serving], np.int32)
        # Stop as soon as the next group finds its lanes: some may be free already.
        group = schedule.next()
        lacking_lanes = min(len(group), schedule.group) - len(schedule.free)  # every copy of the model counts its own
        wake = max(-(-lacking_lanes // len(schedule.pages)), 1) if group else len(told) + 1
        most = min(self.ticks, RECENT) if self._wanted else self.ticks
        constrained = any(s._constraint is not None for s in schedule.served)
        could_come = bool(group) and schedule.room(group) is not None  # but for the turn of others
        if schedule.reading is not None or constrained or could_come:  # no more than every lane needs for a token
            most = min(most, self.sizes.sets + self.flush.every)
        ticks = host(most, np.int32), host(wake, np.int32)
        self._behind = True
        try:
            if constrained:
                self._allow()
            lanes, warm_start = self._with_pages(schedule.claims(most)), self.options.warm_start
            self.lanes = advance(self.params, self.config, lanes, told, *ticks, self.flush, warm_start)
            meanwhile()
            made = _Made.read(self.lanes)
        except BaseException as error:
            self._fail(schedule.served if isinstance(error, Exception) else [], error)  # Ctrl-C alone ends nothing
            return True
        self._deliver(made)
        self._behind = False
        return True

    def _catch_up(self) -> None:
        """Deliver the tokens of a step that was interrupted: what requests need of the cache is counted by them."""
        try:
            self._deliver(_Made.read(self.lanes))
        except Exception as error:
            self._fail(self.schedule.served, error)
        self._behind = False

    def _take_in(self) -> bool:
        """Prefill what is queued and read long prompts. False: there was nothing to take in.

        While others are served, one group or one chunk, so that their next tokens wait for no more; in turn, so that
        neither kind waits for ever.
        """
        if not self.schedule.served:
            while self._admit():
                pass
            return self._read_chunk()
        self._chunk_next = not self._chunk_next
        turns = (self._read_chunk, self._admit) if self._chunk_next else (self._admit, self._read_chunk)
        return any(turn() for turn in turns)

    def _admit(self) -> bool:
        """Take in the next group, once there are lanes and pages enough. False: not yet."""
        group = self.schedule.next()
        if not group or (room := self.schedule.room(group)) is None:
            return False
        lanes, gone = room
        for lane in gone:
            self.preempt(lane)
        group = group[: len(lanes)]
        self.schedule.take(group)
        if group[0]._suspended is not None:
            self._resume(group[0], lanes[0])
        elif is_long(group[0]):
            self._begin_reading(group[0], lanes[0])
        else:
            self.place(group, lanes)
        return True

    def place(self, group: list[Served], lanes: list[int]) -> None:
        """Prefill requests and put them into these lanes. If several fail together, each is tried alone."""
        try:
            made, prompt_steps = self._prefill(group, lanes)
        except BaseException as error:  # such as too little memory for prompts of that length
            if len(group) == 1 or not isinstance(error, Exception):
                self._fail(group, error)
            else:
                self._fail([], error)
                for s, lane in zip(group, lanes, strict=True):
                    self.place([s], [lane])
            return
        for s, lane, steps in zip(group, lanes, prompt_steps, strict=True):
            self.schedule.serving[lane], s.prompt_steps = s, steps
        self._deliver(made)  # a request may be over after its first token

    def _prefill(self, group: list[Served], lanes: list[int]) -> tuple[_Made, list[np.ndarray]]:
        """(What lanes hold then, recurrences of the tokens of every prompt)."""
        schedule, copies = self.schedule, len(self.schedule.pages)
        rows: list[int] = []  # of the group: every copy of the model has some
        for lane in lanes:
            copy = lane // schedule.each
            rows.append(copy * schedule.group + sum(other // schedule.each == copy for other in lanes[: len(rows)]))
        # Rows of padding have no tokens, and a lane that does not exist.
        in_row: list[Served | None] = [None] * (copies * schedule.group)
        to = np.full(len(in_row), schedule.each, np.int32)
        for s, lane, row in zip(group, lanes, rows, strict=True):
            in_row[row], to[row] = s, lane % schedule.each
        no_prompt = np.zeros(0, np.int32)
        tokens, given = padded([no_prompt if s is None else s.prompt for s in in_row], self.config.max_length)
        lengths = host(given, np.int32)
        max_tokens = host([1 if s is None else s.max_new_tokens for s in in_row], np.int32)
        request = stacked([self.idle if s is None else s._row for s in in_row])
        sizes = self.sizes._replace(capacity=tokens.shape[1], tokens=1)
        ways = self.options.prefill_exit, self.options.warm_start
        cache = sizes.sets, sizes.capacity
        memory = CacheMemory(
            self.params, self.config, schedule.group, sizes.capacity, cache, self.idle.depth, policy=sizes.policy
        )
        memory.require()
        progress, prompt_steps = begin(self.params, self.config, host(tokens), lengths, request, sizes, *ways)
        depth = fetched(prompt_steps)  # errors of the program appear here, while the lanes are untouched
        claims = schedule.claims() | {lane: s._claim(0) for s, lane in zip(group, lanes, strict=True)}
        paged = self._with_pages(claims)
        self.lanes = insert(self.params, self.config, paged, progress, lengths, request, max_tokens, host(to))
        return _Made.read(self.lanes), [depth[row, : s.prompt.size] for s, row in zip(group, rows, strict=True)]

    def _begin_reading(self, served: Served, lane: int) -> None:
        try:
            reading = self.reader.begin(served.prompt, served._row)
        except BaseException as error:
            self._fail([served], error)
        else:
            served.cached_tokens = reading.length
            self.schedule.reading = served, lane, reading

    def _read_chunk(self) -> bool:
        """Read the next chunk of a long prompt, and after the last put it into its lane. False: there is none."""
        schedule = self.schedule
        if schedule.reading is None:
            return False
        served, lane, reading = schedule.reading
        try:
            progress = self.reader.read(reading)
            if progress is None:
                return True
            copies, (copy, at) = len(schedule.pages), divmod(lane, schedule.each)
            length, limit = (host([n] * copies, np.int32) for n in (served.prompt.size, served.max_new_tokens))
            row, to = stacked([served._row] * copies), for_copy(self.params, at, copy, schedule.each)
            lanes = self._with_pages(schedule.claims())
            self.lanes = insert(self.params, self.config, lanes, progress, length, row, limit, to)
            made = _Made.read(self.lanes)
        except BaseException as error:
            schedule.reading = None
            self._fail([served], error)
            return True
        schedule.reading, schedule.serving[lane], served.prompt_steps = None, served, np.concatenate(reading.chunks)
        self._deliver(made)
        return True

    def preempt(self, lane: int) -> None:
        """Let the request in a lane wait until there is room for it again."""
        schedule = self.schedule
        if schedule.reading is not None and schedule.reading[1] == lane:  # its prompt is read again
            served, schedule.reading = schedule.reading[0], None
        else:
            held = schedule.serving[lane]
            assert held is not None
            served = held
            pages = schedule.pages_of(lane, served.prompt.size + served._made)
            try:
                served._suspended = suspend(self.params, self.config, self.lanes, lane, pages)
            except Exception as error:
                self._fail([served], error)
            schedule.serving[lane] = None
            if served._over:  # that failed, or it has just been cancelled
                served._suspended = None
                return
        schedule.preempted, served._preempted = schedule.preempted + 1, True
        schedule.back(served)

    def _resume(self, served: Served, lane: int) -> None:
        """Give a request that was preempted a lane again."""
        suspended, served._suspended = served._suspended, None
        assert suspended is not None
        claim = served._claim(0)
        lanes = self._with_pages(self.schedule.claims() | {lane: claim})
        try:
            pages = self.schedule.pages_of(lane, claim.least)
            for made in resume(self.params, self.config, lanes, suspended, lane, pages):
                self.lanes = made
        except Exception as error:
            self._fail([served], error)
        except BaseException as error:
            served._suspended = suspended
            self.schedule.back(served)
            self._fail([], error)
        else:
            self.schedule.serving[lane] = served

    def compile_preemption(self) -> None:
        """As `Engine.compile_preemption`."""
        kept = suspend(self.params, self.config, self.lanes, 0, [0])
        for lanes in resume(self.params, self.config, self._with_pages({}), kept, 0, [0]):
            self.lanes = lanes

    def _with_pages(self, claims: dict[int, Claim]) -> Lanes:
        """The lanes, with pages for these claims."""
        return self.lanes._replace(pages=jnp.array(self.schedule.table(claims)))

    def _allow(self) -> None:
        """Tell the lanes of constrained requests which tokens may come next."""
        request = self.lanes.request
        rows = np.zeros(request.sampling.allowed.shape, np.uint32)
        for lane, s in enumerate(self.schedule.serving):
            if s is not None and s._allowed is not None:
                rows[lane] = s._allowed
        # Through an operation on what is there, so that the program sees an array of the same placement.
        allowed = jnp.where(request.sampling.constrained[:, None], jnp.asarray(rows), request.sampling.allowed)
        sampling = request.sampling._replace(allowed=allowed)
        self.lanes = self.lanes._replace(request=request._replace(sampling=sampling))

    @property
    def _wanted(self) -> bool:
        """Whether a request in flight wants the likeliest tokens."""
        return any(s._wants_likeliest for s in self.schedule.served)

    def _deliver(self, made: _Made) -> None:
        """Hand out new tokens, and free the lanes of requests that have ended."""
        top = fetched(self.lanes.likeliest) if self._wanted else None
        for lane, served in enumerate(self.schedule.serving):
            if served is None or served._over:
                continue
            before = served._made
            for j in range(before, made.count[lane]):
                served._made += 1
                if served.done:  # for its user; the engine of other hosts does not know yet
                    continue
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
                        served._leave(error)
                if served._over:  # or it has cancelled itself
                    break
            if not made.busy[lane]:
                served._end(not_finite("request", served._made) if made.failed[lane] else None)
                self.schedule.serving[lane] = None
            elif served._constraint is not None and served._made > before and not served._over:
                try:
                    served._constraint.accept(served.tokens[-1])
                    served._allowed = allowed_next(served._constraint, self.config.vocab_size)
                except Exception as error:
                    served._end(error)

    def _empty_lanes(self) -> Lanes:
        rows = stacked([self.idle] * len(self.schedule.serving))
        return empty_lanes(self.params, self.config, rows, self.sizes, self.schedule.pages[0].sizes)

    def _fail(self, concerned: list[Served], error: BaseException) -> None:
        """End the requests concerned with `error`, and if the lanes are lost with it, all that are in flight.

        Raises:
          RunError: on several hosts, of which the others may not have failed; they refuse too little memory together.
        """
        if on_several_hosts(self.params) and isinstance(error, Exception) and not isinstance(error, InputError):
            raise RunError(f"this host's engine failed, which ends that of all hosts ({one_line(error)})") from error
        try:
            jax.block_until_ready(self.lanes)
        except Exception:  # donated to a program that failed, or made by it
            concerned = concerned + self.schedule.served
            self.lanes = self._empty_lanes()
        for s in concerned:
            s._end(error)
        if not isinstance(error, Exception):
            raise error


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
        return cls(*fetched([getattr(lanes, name) for name in cls._fields]))
