"""The one thread that owns the engines. Answers to make go in, tokens come out; nobody else waits for the device."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from rdlm.config import CachePolicy, InputError, Sampling, one_line, require
from rdlm.decode import Engine
from rdlm.decode.hosts import hosts
from rdlm.decode.pages import page_sizes
from rdlm.decode.passes import CacheMemory, next_power
from rdlm.decode.program import copies_of, devices_of, on_several_hosts
from rdlm.decode.reading import least_prompt_cache, prompt_bytes, usual_chunk
from rdlm.decode.requests import sample_keys
from rdlm.decode.served import Served
from rdlm.exits import Depth
from rdlm.run import Run
from rdlm.runtime.memory import require_memory
from rdlm.serve.depth import DepthChoice, Depths
from rdlm.serve.errors import APIError
from rdlm.serve.grammar import Grammar
from rdlm.serve.scores import PromptScores, packed, score_prompt, unpacked
from rdlm.tokenizer import DecodeStream, Tokenizer

STOPS = 4  # stop tokens that an engine's lanes hold; more are looked for here


class Token(NamedTuple):
    """One more token of an answer."""

    text: str  # that it completes, possibly empty
    id: int
    steps: int  # recurrences
    log_prob: float
    likeliest: Sequence[tuple[int, float]] = ()  # tokens and log-probabilities, as many as are wanted


class End(NamedTuple):
    """No more tokens will come."""

    reason: Literal["stop", "length"] | None  # None: an error
    text: str = ""  # what was held back, because it could have become a stop string
    error: Exception | None = None
    cached: int = 0  # tokens of the prompt that the prompt cache held


Item = Token | End | PromptScores


@dataclasses.dataclass(frozen=True)
class Ask:
    """What all answers to a request share."""

    prompts: list[np.ndarray]  # int32 token ids
    limits: list[int]  # most new tokens for each prompt; 0: only its scores
    samples: int  # answers to each prompt
    depth: DepthChoice
    sampling: Sampling  # without stop tokens
    seed: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    likeliest: int = 0  # tokens wanted beside every one, with log-probabilities
    prefix: bool = False  # whether the tokens of a prompt see each other in both directions
    priority: int = 0  # the higher comes first
    scores: bool = False  # also of the prompts' tokens
    grammar: Grammar | None = None  # of every answer
    made: dict[int, PromptScores] = dataclasses.field(default_factory=dict)  # the worker's: scores by prompt

    @functools.cached_property
    def keys(self) -> jax.Array:
        """The key of each answer to a prompt, as `generate` draws them."""
        return sample_keys(jax.random.key(self.seed)[None], self.samples)


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer in the making. Made by the service; everything but `cancelled` is the worker's."""

    ask: Ask
    prompt: int  # which of the prompts
    sample: int  # which of its answers
    put: Callable[[list[Item]], None]  # called in the thread of the event loop
    cancelled: bool = False
    served: Served | None = None
    stream: DecodeStream | None = None
    error: Exception | None = None
    fresh: list[Item] = dataclasses.field(default_factory=list)  # not yet handed over


class Worker:
    """Runs the engines, one for each kind of exit rule, in a thread of its own.

    Args:
      run: the model.
      depths: what requests may choose.
      call_soon: hands a function to the thread of the event loop.
    """

    def __init__(self, run: Run, depths: Depths, call_soon: Callable[[Callable[[], None]], object]):
        self._run, self._depths, self._call_soon = run, depths, call_soon
        self._tokenizer: Tokenizer = run.require_tokenizer()
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._active: list[Answer] = []
        self._handed_over = 0  # how often
        self.engines: dict[str, Engine] = {}
        """By kind of exit rule, once made. Others may run them while there is no request."""
        self._score_everywhere: Callable[..., PromptScores] | None = None  # on several hosts
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.ready = False
        """Whether everything is compiled."""
        self.failure: BaseException | None = None
        """Why there is no thread any more."""
        self.sick = False
        """Whether the engine has failed since it last made a token."""
        self.on_change: Callable[[], None] = lambda: None
        """Called in the event loop's thread after `ready` or `failure` has changed."""

    @property
    def cache_usage(self) -> float:
        """Share of all engines' pages that is in use."""
        engines = list(self.engines.values())
        return sum(engine.cache_usage for engine in engines) / max(len(engines), 1)

    @property
    def preempted(self) -> int:
        """How often a request gave its lane and its pages to others."""
        return sum(engine.preempted for engine in list(self.engines.values()))

    @property
    def busy_lanes(self) -> dict[str, list[int]]:
        """By kind of exit rule: the recurrences of each busy lane's latest token; 0: it has none yet."""
        served = {kind: engine.in_flight for kind, engine in self.engines.items()}
        return {kind: [s.steps[-1] if s.steps else 0 for s in served.get(kind, [])] for kind in self._depths.kinds}

    def start(self) -> None:
        """Compile, then serve."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in; answers that are not done stay so."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def submit(self, answer: Answer) -> None:
        """Make this answer."""
        self._inbox.put(answer)

    def _main(self) -> None:
        try:
            self._make_engines()
            for kind in self.engines:
                self._warm_up(DepthChoice(kind, kind, 1, self._depths.rule(kind)))
            self.ready = True
            self._call_soon(lambda: self.on_change())
            while not self._stopping:
                self._take()
                self._round()
            self._hand_over()
            self._any_engine.close()
        except BaseException as error:  # the engine answers for its own failures, so this one is the end
            self.failure, self.ready = error, False
            self._take(wait=False)
            for answer in self._active:
                answer.fresh.append(End(None, error=RuntimeError(one_line(error))))
            self._hand_over()
            self._call_soon(lambda: self.on_change())

    def follow(self) -> None:
        """On several hosts, on others than process 0: do what its worker does, until that is stopped."""
        self._make_engines()
        self._any_engine.follow()

    def _make_engines(self) -> None:
        self.engines = {kind: self._engine(kind) for kind in self._depths.kinds}
        if on_several_hosts(self._run.params):
            self._score_everywhere = hosts().everywhere(self._score_here)

    @property
    def _any_engine(self) -> Engine:
        return self.engines[self._depths.kinds[0]]

    def require_memory(self) -> None:
        """Refuse caches that cannot fit, and a prompt cache that would hold nothing, before anything is made.

        Raises:
          InputError: they need more memory than is free, or the prompt cache has less than a chunk needs.
        """
        options, run = self._depths.options, self._run
        steps, context = self._sizes
        sets = self._policy.sets(next_power(steps, minimum=1))
        kinds, room = self._depths.kinds, self._prompt_cache
        sizes = sets, context
        rules = map(self._depths.rule, kinds)
        least = max(
            least_prompt_cache(run.params, run.config, self._policy, sizes, self._chunk, rule) for rule in rules
        )
        if options.prompt_cache and room < least:
            shown = (least * 10**6 // 2**30 + 1) / 10**6
            fix = f"a chunk of a prompt takes more; give at least {shown:.6f} GiB, or 0"
            raise InputError(f"--prompt-cache {options.prompt_cache}: {fix}")
        copies = copies_of(run.params)
        require(options.lanes % copies == 0, "--lanes", options.lanes, f"must be a multiple of --data {copies}")
        rows = options.lanes // copies * len(kinds)
        least_tokens, tokens = copies * context, options.cache_tokens
        enough = tokens is None or tokens >= least_tokens
        require(enough, "--cache-tokens", tokens, f"must be at least {least_tokens}: --max-context for each of --data")
        pages = page_sizes(options.lanes // copies, context, tokens=options.cache_tokens, copies=copies)
        positions = len(kinds) * pages.number * pages.size
        memory = CacheMemory(run.params, run.config, rows, 1, sizes, Depth(1), positions=positions, policy=self._policy)
        needed = memory.bytes + room // devices_of(run.params) * len(kinds)
        what = f"cache: {sets} recurrences x {copies * positions} positions for {copies * rows} lanes"
        what += f" and {room * len(kinds) / 2**30:,.1f} GiB for prompts" if room else ""
        fix = "lower --lanes, --cache-tokens, --max-context, --cache-recurrences or --prompt-cache"
        fix += "" if options.cache_dtype else ", or use --cache-dtype int8"
        several = on_several_hosts(run.params)
        require_memory(f"--lanes {options.lanes}: {what}", needed, fix, hosts=several)

    @property
    def _policy(self) -> CachePolicy:
        options = self._depths.options
        return CachePolicy(options.cache_recurrences, dtype=options.cache_dtype)

    @property
    def _sizes(self) -> tuple[int, int]:
        """The most recurrences, and the context."""
        steps, context = self._depths.options.max_steps, self._depths.options.max_context
        assert steps is not None
        assert context is not None
        return steps, context

    @property
    def _chunk(self) -> int:
        """Most tokens of a prompt that are read at once."""
        options = self._depths.options
        return options.prefill_chunk or usual_chunk(options.lanes // copies_of(self._run.params))

    @property
    def _prompt_cache(self) -> int:
        """Bytes of the prompt cache of an engine."""
        options = self._depths.options
        if options.prompt_cache is not None:
            return int(options.prompt_cache * 2**30)
        if options.cache_recurrences is not None:
            return 0
        steps, context = self._sizes
        sets = next_power(steps, minimum=1)
        lane = prompt_bytes(self._run.params, self._run.config, self._policy, sets, context, coda_sets=True)
        return max(options.lanes // copies_of(self._run.params) // 8, 1) * lane

    def _engine(self, kind: str) -> Engine:
        options, (steps, context) = self._depths.options, self._sizes
        return Engine(
            self._run.params,
            self._run.config,
            prompt_cache=self._prompt_cache,
            lanes=options.lanes,
            max_new_tokens=context,
            capacity=context,
            num_steps=steps,
            exit_rule=self._depths.rule(kind),
            cache=self._policy,
            max_queue=10**6,  # the service has counted
            prefill_chunk=self._chunk,
            cache_tokens=options.cache_tokens,
            ticks_per_step=self._depths.trained,  # a token of every lane, about: then clients get theirs
        )

    def _warm_up(self, depth: DepthChoice) -> None:
        """Compile for prompts of every length, as requests will. Raises what the engine raises."""
        context, engine = self._depths.options.max_context, self.engines[depth.kind]
        assert context is not None
        lengths = [(length, False) for length in engine.prompt_lengths()]
        if self._run.config.prefix_attention:
            lengths += [(length, True) for length in engine.prompt_lengths(prefix=True)]
        for length, prefix in lengths:
            if self._stopping:
                break
            prompt, limit = np.zeros(length, np.int32), min(2, context - length)
            ask = Ask([prompt], [limit], 1, depth, Sampling(temperature=1.0), seed=0, prefix=prefix)
            answer = Answer(ask, 0, 0, lambda items: None)
            self._active = [answer]
            while self._active:
                self._round()
            if answer.error is not None:
                raise answer.error
        engine.compile_preemption()

    def _take(self, wait: bool = True) -> None:
        """Answers that have come; waits for one if there is nothing else to do."""
        wait = wait and not self._active
        while True:  # whoever sets `_stopping` puts something in
            try:
                answer = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if answer is None or answer.cancelled:
                continue
            self._active.append(answer)

    def _round(self) -> None:
        """One step of every engine that has something to do, and what comes of it to those who wait."""
        scored = False  # one prompt in each round, so that tokens of others come in between
        for answer in self._active:
            if answer.served is not None or answer.cancelled:
                continue
            if answer.ask.scores and answer.prompt not in answer.ask.made:
                if scored or self._stopping:
                    continue
                scored = True
                if not self._score(answer):
                    continue
            self._begin(answer)
        before = self._handed_over
        for engine in self.engines.values():
            engine.step(meanwhile=self._hand_over)  # so that the event loop works while the device computes
        for answer in self._active:
            if answer.served is not None and answer.served.done:
                answer.fresh.append(self._end(answer, answer.served))
        if self._handed_over == before or not any(engine.in_flight for engine in self.engines.values()):
            self._hand_over()

    def _score(self, answer: Answer) -> bool:
        """Score the prompt, for all of its answers; False: that failed, and so does this answer."""
        ask, n = answer.ask, answer.prompt
        try:
            ask.made[n] = self._scores(ask.prompts[n], ask.depth)
        except Exception as error:
            if self._score_everywhere is not None:  # the other hosts have ended
                raise
            answer.fresh.append(End(None, error=error))
            return False
        return True

    def _scores(self, prompt: np.ndarray, depth: DepthChoice) -> PromptScores:
        if self._score_everywhere is None:
            return score_prompt(self._run.params, self._run.config, prompt, depth)
        return self._score_everywhere(functools.partial(packed, prompt, depth))

    def _score_here(self, message: bytes) -> PromptScores:
        return score_prompt(self._run.params, self._run.config, *unpacked(message, self._depths))

    def _begin(self, answer: Answer) -> None:
        ask = answer.ask
        prompt, depth = ask.prompts[answer.prompt], ask.depth
        answer.stream = self._tokenizer.decode_stream(after=prompt.tolist(), stop=ask.stop)
        if ask.scores:
            answer.fresh.append(ask.made[answer.prompt])
        if ask.limits[answer.prompt] == 0:
            answer.fresh.append(End("length"))
            return
        try:
            answer.served = self.engines[depth.kind].submit(
                prompt,
                max_new_tokens=ask.limits[answer.prompt],
                num_steps=depth.num_steps,
                exit_rule=depth.rule,
                min_steps=depth.min_steps,
                sampling=dataclasses.replace(ask.sampling, stop_tokens=ask.stop_ids[:STOPS]),
                prefix=ask.prefix,
                priority=ask.priority,
                key=ask.keys[answer.sample],
                likeliest=ask.likeliest > 0,
                constraint=None if ask.grammar is None else ask.grammar.start(),
                on_token=lambda token, steps: self._heard(answer, token, steps),
            )
        except Exception as error:  # a constraint may raise anything
            answer.error = error
            answer.fresh.append(End(None, error=error))

    def _heard(self, answer: Answer, token: int, steps: int) -> None:
        """A token that the engine has just delivered."""
        assert answer.served is not None
        assert answer.stream is not None
        self.sick = False
        text = answer.stream.push(token)
        top = answer.served.likeliest[-1][: answer.ask.likeliest] if answer.ask.likeliest else ()
        answer.fresh.append(Token(text, token, steps, answer.served.log_probs[-1], top))
        if answer.stream.stopped or token in answer.ask.stop_ids[STOPS:]:
            answer.served.cancel()
        if len(answer.served.tokens) == 1 and not answer.cancelled:  # others' prompts may come first, and then a step
            items, answer.fresh = answer.fresh, []
            self._call_soon(lambda: answer.put(items))

    def _end(self, answer: Answer, served: Served) -> End:
        assert answer.stream is not None
        if served.error is not None:
            self.sick = self.sick or not isinstance(served.error, (InputError, APIError))
            answer.error = served.error if isinstance(served.error, Exception) else RuntimeError("stopped")
            return End(None, error=answer.error)
        stopped = answer.stream.stopped or served.tokens[-1] in answer.ask.stop_ids
        return End("stop" if stopped else "length", answer.stream.end(), cached=served.cached_tokens)

    def _hand_over(self) -> None:
        """Give what has come to the event loop, all at once."""
        self._handed_over += 1
        batch, going_on = [], []
        for answer in self._active:
            if answer.cancelled:
                if answer.served is not None:
                    answer.served.cancel()
                continue
            if answer.fresh:
                batch.append((answer.put, answer.fresh))
            if not answer.fresh or not isinstance(answer.fresh[-1], End):
                going_on.append(answer)
            answer.fresh = []
        self._active = going_on

        def deliver() -> None:
            for put, items in batch:
                put(items)

        if batch:
            self._call_soon(deliver)
