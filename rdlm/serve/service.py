"""What stands between HTTP and the worker: a bounded queue, requests and their answers, health."""

from __future__ import annotations

import asyncio
import collections
import functools
import secrets
import time
from collections.abc import Callable, Mapping

from rdlm.config import InputError, one_line
from rdlm.decode.program import on_several_hosts
from rdlm.evaluation import calibration
from rdlm.evaluation.calibration import Calibrated
from rdlm.run import Run
from rdlm.serve.depth import Depths
from rdlm.serve.errors import APIError, wrong
from rdlm.serve.grammar import Grammar, Grammars
from rdlm.serve.metrics import AnswerClock, LaneGauges, Metrics
from rdlm.serve.options import ServeOptions
from rdlm.serve.worker import Answer, Ask, End, Item, Token, Worker


class Closed(Exception):
    """Nobody waits for this request any more."""


class Call:
    """A request that is being answered: items of all its answers as they come, in the event loop's thread."""

    def __init__(self, answers: int, max_buffer: int):
        self.waiting = set(range(answers))  # answers without a token
        self.running: set[int] = set()
        self._max_buffer = max_buffer
        self._buffer: collections.deque[tuple[int, Item]] = collections.deque()
        self._fresh = asyncio.Event()
        self._error: APIError | Closed | None = None

    def put(self, index: int, items: list[Item]) -> None:
        """Items of one answer."""
        for item in items:
            if isinstance(item, Token) and index in self.waiting:
                self.waiting.discard(index)
                self.running.add(index)
            elif isinstance(item, End):
                self.waiting.discard(index)
                self.running.discard(index)
        self._buffer += [(index, item) for item in items]
        if len(self._buffer) > self._max_buffer:
            self.fail(reads_too_slowly())
        self._fresh.set()

    def fail(self, error: APIError | Closed) -> None:
        """End all answers with this error."""
        self._error = self._error or error
        self._fresh.set()

    async def take(self) -> list[tuple[int, Item]]:
        """All items that are there; waits for one.

        Raises:
          APIError: the request has failed.
          Closed: it has been closed.
        """
        await self._fresh.wait()
        if self._error is not None:
            raise self._error
        self._fresh.clear()
        items = list(self._buffer)
        self._buffer.clear()
        for _, item in items:
            if isinstance(item, End) and item.error is not None:
                raise _as_answer(item.error)
        return items


def _deliver(call: Call, index: int, clock: AnswerClock, items: list[Item]) -> None:
    """Items of one answer, from the worker to those who wait."""
    clock.count(items)
    call.put(index, items)


def _stopping(retry_after: int | None = None) -> APIError:
    return APIError(503, "the server is stopping", code="stopping", retry_after=retry_after)


def reads_too_slowly() -> APIError:
    """What a client is told that has fallen too far behind, if it reads that."""
    return APIError(503, "the client reads too slowly", code="slow_reader")


def _as_answer(error: Exception) -> APIError:
    """An engine's error for a client, or a grammar's."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InputError):
        return APIError(500, one_line(error), code="engine_error")
    return APIError(500, "the engine failed while it served this request", code="engine_error")


class Service:
    """A model and the requests for it. Everything here runs in the event loop's thread.

    Args:
      run: the model.
      options: of the server.

    Raises:
      InputError: options that the model cannot serve, or no tokenizer.
    """

    def __init__(self, run: Run, options: ServeOptions):
        self.run, self.tokenizer = run, run.require_tokenizer()
        self.options = options.resolved(run.config)
        self.keys = options.read_keys()
        self.name = options.model_name or run.folder.resolve().name
        self.grammars = Grammars(self.tokenizer, run.config.vocab_size)
        self.created = int(time.time())
        self.depths = depths_of(run, options)
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self._calls: dict[Call, list[Answer]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._expired: asyncio.Future[None] | None = None  # done after the grace period
        lanes, steps = self.options.lanes, self.options.max_steps or 1
        self.metrics = Metrics(
            {
                ("num_requests_running", "Answers that have a token and are not done"): lambda: self.running,
                ("num_requests_waiting", "Answers without a token"): lambda: self.waiting,
                ("kv_cache_usage_perc", "Share of the cache's pages in use"): lambda: self.worker.cache_usage,
            },
            LaneGauges(lanes, steps, lambda: self.worker.busy_lanes, lambda: self.worker.preempted),
        )
        self.worker = Worker(run, self.depths, self._call_soon)
        self.worker.on_change = self._changed

    def _call_soon(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def start(self) -> None:
        """Begin to compile; ready after that."""
        self._loop = asyncio.get_running_loop()
        self._expired = self._loop.create_future()
        self.grammars.prepare()
        self.worker.start()

    async def stop(self) -> None:
        """End the worker."""
        await asyncio.to_thread(self.worker.stop)

    def _changed(self) -> None:
        if self.worker.failure is not None:
            for call in self._calls:
                call.fail(APIError(500, "the engine has failed; the server must be restarted", code="engine_error"))
            self.on_failure()

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        assert self.options.max_context is not None
        return self.options.max_context

    @property
    def waiting(self) -> int:
        """Answers without a token."""
        return sum(len(call.waiting) for call in self._calls)

    @property
    def running(self) -> int:
        """Answers with a token that are not done."""
        return sum(len(call.running) for call in self._calls)

    def health(self) -> APIError | None:
        """What keeps the engine from serving; None: nothing."""
        if self.worker.failure is not None or self.worker.sick:
            return APIError(503, "the engine has failed", code="engine_error")
        if not self.worker.ready:
            return APIError(503, "the server is warming up", code="warming_up", retry_after=5)
        return None

    def admission(self) -> APIError | None:
        """What keeps a new request from being served; None: nothing."""
        return _stopping(retry_after=5) if self.draining else self._unready()

    def _unready(self) -> APIError | None:
        return self.health() if self.worker.failure is not None or not self.worker.ready else None

    async def grammar(self, schema: Mapping[str, object]) -> Grammar:
        """The grammar of the answers to a request that has been admitted.

        Raises:
          APIError: a model on several hosts, or the grace period ends before the schema is compiled; or as
            `Grammars.of`.
        """
        assert self._expired is not None
        if on_several_hosts(self.run.params):
            raise wrong("response_format", "a model on several hosts serves none; leave it out")
        compiling = asyncio.ensure_future(self.grammars.of(schema))
        try:
            await asyncio.wait((compiling, self._expired), return_when=asyncio.FIRST_COMPLETED)
            if self._expired.done():
                raise _stopping()
            return compiling.result()
        finally:
            compiling.cancel()

    def require_few(self, prompts: int, samples: int) -> None:
        """Refuse a request with more answers than may ever wait, before anything is done for it.

        Raises:
          APIError: it has more.
        """
        count, most = prompts * samples, self.options.max_queue
        if count > most:
            field = "n" if samples > 1 else "prompt"
            raise APIError(400, f"{field}: {count} answers in one request, at most {most} may wait", field, "too_many")

    def open(self, ask: Ask) -> Call:
        """Queue a request that passed `require_few` and has been admitted; `close` it in any case.

        Raises:
          APIError: no room, or the engine has failed.
        """
        if (refusal := self._unready()) is not None:
            raise refusal
        count = len(ask.prompts) * ask.samples
        if self._unplaced(ask.depth.kind, count) > self.options.max_queue:
            raise APIError(429, "too many requests are waiting; try again later", code="queue_full", retry_after=1)
        call = Call(count, self.options.max_buffer)
        answers = []
        for index in range(count):
            prompt, sample = divmod(index, ask.samples)
            clock = AnswerClock(self.metrics, ask.depth.name)
            answers.append(Answer(ask, prompt, sample, functools.partial(_deliver, call, index, clock)))
        self._calls[call] = answers
        for tokens in ask.prompts:
            self.metrics.prompt_sizes.observe(len(tokens))
            self.metrics.prompt_tokens.inc(len(tokens))
            self.metrics.looked_up.inc(len(tokens) * ask.samples)
        for answer in answers:
            self.worker.submit(answer)
        return call

    def _unplaced(self, kind: str, more: int) -> int:
        """Answers that have no lane because all of their kind of rule are taken, with so many more of one kind.

        Those that gave their lane to others count too: their keys and values take the host's memory.
        """
        present = collections.Counter({kind: more})
        for call, answers in self._calls.items():
            present[answers[0].ask.depth.kind] += len(call.waiting) + len(call.running)
        return sum(max(count - self.options.lanes, 0) for count in present.values())

    def close(self, call: Call) -> None:
        """Free what the request still holds, within one step of the engine. Nothing comes for it any more."""
        for answer in self._calls.pop(call, []):
            answer.cancelled = True
        call.fail(Closed())

    def drain(self) -> None:
        """Take no more requests, and end those in flight after the grace period."""
        if self.draining:
            return
        self.draining = True

        def expire() -> None:
            assert self._expired is not None
            self._expired.set_result(None)
            for call in self._calls:
                call.fail(_stopping())

        asyncio.get_running_loop().call_later(self.options.grace, expire)


def depths_of(run: Run, options: ServeOptions) -> Depths:
    """What requests may choose.

    Raises:
      InputError: options that the model cannot serve.
    """
    trained = run.config.mean_recurrence
    return Depths(options.resolved(run.config), trained, _calibrations(run), plain_steps=options.steps or trained)


def _calibrations(run: Run) -> dict[str, Calibrated]:
    """The calibrated rules of a run folder, if they are those of the weights that are served."""
    if run.run_config is None or run.ema:
        return {}
    return {rule: found for rule, found in calibration.read(run.folder).items() if found.goal.step == run.step}


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(31)
