"""Our models as a language model of lm-eval, which answers its three kinds of requests at a chosen depth.

Likelihoods are computed at all depths in one unroll and cached, so another depth costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rdlm.config import InputError, ModelConfig, Sampling, require
from rdlm.decode import Engine
from rdlm.decode.served import Served
from rdlm.evaluation import Pair, cut_left, cut_pair, is_cut, score, split
from rdlm.exits import ExitRule
from rdlm.model import Params
from rdlm.recurrence import check_depths
from rdlm.tokenizer import Tokenizer

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's order of precedence
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass
class Effort:
    """Number of tokens that the model read, and sums over them of recurrences, checks and context lengths."""

    tokens: int = 0
    recurrences: float = 0.0
    checks: float = 0.0
    lengths: float = 0.0

    def add(self, other: Effort) -> None:
        """Add `other` to this."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class DepthLM(LM):
    """A model for lm-eval. `row` chooses how requests are answered: at one of `depths`, or with the exit rule.

    Args:
      params, config, tokenizer: the model.
      depths: increasing recurrences; the likelihoods at all of them come from one unroll.
      exit_rule: adds a last row, in which every token stops on its own, after at most `max_steps` recurrences.
      max_steps: None is the deepest of `depths`.
      bos: whether contexts begin with the begin token. Chats begin as their template says.
      lanes: number of texts that are generated at once.
      tokens_per_batch: of likelihoods.
      init_scale: of the initial states; 0.0 is the zero state.
      seed: of sampling, if a task samples.
      progress: called with (kind of request, finished requests, total).

    Raises:
      InputError: depths that are not increasing, or below 1.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        depths: Sequence[int],
        *,
        exit_rule: ExitRule | None = None,
        max_steps: int | None = None,
        bos: bool = True,
        lanes: int = 16,
        tokens_per_batch: int = 4096,
        init_scale: float = 1.0,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    ):
        super().__init__()
        self.params, self.config, self._tokens = params, config, tokenizer
        self.depths, self.exit_rule = check_depths(depths), exit_rule
        self.max_steps = check_depths([self.depths[-1] if max_steps is None else max_steps])[0]
        self.bos, self.lanes, self.tokens_per_batch, self.init_scale = bos, lanes, tokens_per_batch, init_scale
        self.seed, self._progress = seed, progress
        self.row = 0
        self._written: set[str] = set()  # contexts made by a chat template
        self._cut: dict[tuple[str | int, ...], bool] = {}  # by request: whether its context was too long
        # By request and row: (log-likelihood, greedy), and their cost.
        self._known: dict[tuple[str | int, ...], tuple[tuple[float, bool], Effort]] = {}

    @property
    def rows(self) -> list[tuple[int, ExitRule | None]]:
        """(maximum recurrences, exit rule) of every row."""
        last = [] if self.exit_rule is None else [(self.max_steps, self.exit_rule)]
        return [*((r, None) for r in self.depths), *last]

    def effort(self, requests: Sequence[Instance]) -> Effort:
        """The cost of these requests in the current row."""
        total = Effort()
        for request in requests:
            total.add(self._known[self._name(request)][1])
        return total

    @property
    def cut(self) -> tuple[int, int]:
        """(requests whose context was cut on the left, all requests), whatever their number of rows and repeats."""
        return sum(self._cut.values()), len(self._cut)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) per request."""
        new = self._unknown(requests)
        pairs = [self._pair(*request.args) for request in new]
        scored = self._score([cut_pair(pair, self.config, self._tokens.bos_id) for pair in pairs], "likelihoods")
        for request, pair, answer in zip(new, pairs, scored, strict=True):
            self._cut[request.request_type, *map(str, request.args)] = is_cut(pair, self.config)
            self._learn(request, answer)
        return [self._answer(request) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of whole texts: every token is scored once, the first one after the begin token.

        A text longer than config.max_length is split into windows; the last window has a full context.
        """
        new = self._unknown(requests)
        windows = [self._windows(request.args[0]) for request in new]
        found = self._score([pair for pairs in windows for pair in pairs], "texts")
        for request, pairs in zip(new, windows, strict=True):
            parts = [next(found) for _ in pairs]
            whole = []
            for row in range(len(self.rows)):
                effort = Effort()
                for part in parts:
                    effort.add(part[row][1])
                whole.append(((sum(part[row][0][0] for part in parts), False), effort))
            self._learn(request, whole)
        return [self._answer(request)[0] for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Continuations up to the first stop string; greedy unless the task samples.

        A request that stands several times in the list is sampled anew each time; greedy texts are equal.
        """
        if not requests:
            return []
        wanted = [self._wanted(request) for request in requests]
        longest = max(w.tokens.size + w.max_tokens for w in wanted)
        max_steps, rule = self.rows[self.row]
        engine = Engine(
            self.params,
            self.config,
            lanes=min(self.lanes, len(wanted)),
            max_new_tokens=max(w.max_tokens for w in wanted),
            capacity=min(1 << max(longest - 1, 1).bit_length(), self.config.max_length),
            prefill_chunk=self.config.max_length,  # nobody waits for single tokens
            num_steps=max_steps,
            exit_rule=rule,
            init_scale=self.init_scale,
            max_queue=len(wanted),
        )
        key, copies = jax.random.key(self.seed), Counter[tuple[str | int, ...]]()
        for request, w in zip(requests, wanted, strict=True):
            # Folded in is how often the same request came before, so no answer depends on the order of the others.
            copy = copies[self._name(request)]
            copies[self._name(request)] += 1
            w.request = engine.submit(
                w.tokens,
                max_new_tokens=w.max_tokens,
                sampling=w.sampling,
                on_token=w.token,
                key=jax.random.fold_in(key, copy) if copy and w.sampled else key,
            )
        served = [w.request for w in wanted]
        while engine.step():
            self._progress("generated texts", sum(s.done for s in served), len(served))
        efforts: dict[tuple[str | int, ...], Effort] = {}
        for request, s in zip(requests, served, strict=True):
            if s.error is not None:
                raise s.error
            efforts.setdefault(self._name(request), Effort()).add(_generated(s, rule))
        self._known |= {name: ((0.0, False), effort) for name, effort in efforts.items()}
        return [w.text for w in wanted]

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's chat template, up to the point where the assistant continues.

        Without `add_generation_prompt` the last message is the beginning of the assistant's reply.
        """
        messages = list(chat_history)
        opened = "" if add_generation_prompt else messages.pop()["content"]
        text = self._tokens.write_chat(messages, reply=True) + opened
        self._written.add(text)
        return text

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, which lm-eval uses in names of caches."""
        return self._tokens.hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Name of the template, for lm-eval's records."""
        return f"of tokenizer {self._tokens.hash[:8]}" if chat_template else ""

    def _name(self, request: Instance) -> tuple[str | int, ...]:
        return request.request_type, self.row, *(str(x) for x in request.args)

    def _unknown(self, requests: Sequence[Instance]) -> list[Instance]:
        """The requests without an answer, each once."""
        return list({self._name(r): r for r in requests if self._name(r) not in self._known}.values())

    def _learn(self, request: Instance, answers: Sequence[tuple[tuple[float, bool], Effort]]) -> None:
        kind, _, *args = self._name(request)
        for row, answer in enumerate(answers):
            self._known[kind, row, *args] = answer

    def _answer(self, request: Instance) -> tuple[float, bool]:
        return self._known[self._name(request)][0]

    def _encode(self, text: str) -> np.ndarray:
        return self._tokens.encode(text, bos=self.bos)

    def _pair(self, before: str, after: str) -> Pair:
        encode = self._encode
        if before in self._written:
            encode = self._encode_written
        return split(encode, self._tokens.bos_id, before, after)

    def _encode_written(self, text: str) -> np.ndarray:
        return self._tokens.encode_written(text)[0]

    def _windows(self, text: str) -> list[Pair]:
        ids = self._tokens.encode(text, bos=False).tolist()
        windows = get_rolling_token_windows(ids, self._tokens.bos_id, self.config.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _score(self, pairs: list[Pair], what: str) -> Iterator[list[tuple[tuple[float, bool], Effort]]]:
        """For every pair in order: its answer in every row."""
        if not pairs:
            return
        passes: list[tuple[Sequence[int], ExitRule | None]] = [(self.depths, None)]
        if self.exit_rule is not None:
            passes.append(([self.max_steps], self.exit_rule))
        found = []
        for i, (depths, rule) in enumerate(passes):

            def progress(done: int, before: int = i * len(pairs)) -> None:
                self._progress(what, before + done, len(passes) * len(pairs))

            scores = score(
                self.params,
                self.config,
                pairs,
                depths,
                exit_rule=rule,
                init_scale=self.init_scale,
                tokens_per_batch=self.tokens_per_batch,
                progress=progress,
            )
            found.append(scores)
        for i in range(len(pairs)):
            answers = []
            for scores in found:
                n = int(scores.length[i])
                for row in range(len(scores.log_likelihood)):
                    effort = Effort(n, n * scores.recurrences[row, i], n * scores.checks[i], float(n) * n)
                    answer = float(scores.log_likelihood[row, i]), bool(scores.greedy[row, i])
                    answers.append((answer, effort))
            yield answers

    def _wanted(self, request: Instance) -> _Wanted:
        before, given = request.args
        options = dict(given)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        texts = isinstance(until, (list, tuple)) and all(isinstance(u, str) for u in until)
        require(texts, "generation_kwargs: until", until, "must be a text or a list of texts")
        limits = [x for name in _LIMITS if (x := options.pop(name, None)) is not None]
        max_tokens = limits[0] if limits else 256
        require(_whole(max_tokens), "generation_kwargs: max_gen_toks", max_tokens, "must be a whole number")
        sampled = _sampled(options)
        chosen = {name: x for name in _SAMPLING if (x := options.pop(name, None)) is not None}
        if options:
            raise InputError(f"generation_kwargs: {next(iter(options))!r} is not supported")
        max_prompt = self.config.max_length - max_tokens
        if max_tokens < 1 or max_prompt < 1:
            raise InputError(
                f"generation_kwargs: max_gen_toks = {max_tokens}: must be in [1, {self.config.max_length - 1}], since "
                f"the model reads {self.config.max_length} tokens, prompt included"
            )
        special = self._tokens.special_ids
        ends = {*self._tokens.end_ids, self._tokens.bos_id} | {special[s] for s in until if s in special}
        if not sampled:  # as lm-eval's own models, which drop the rest too
            chosen = {name: value for name, value in chosen.items() if name == "repetition_penalty"}
        tokens = self._encode_written(before) if before in self._written else self._encode(before)
        if not len(tokens):
            tokens = np.array([self._tokens.bos_id], np.int32)
        sampling = Sampling(stop_tokens=tuple(sorted(ends)), **chosen)
        strings = [u for u in until if u and u not in special]
        self._cut[request.request_type, *map(str, request.args)] = len(tokens) > max_prompt
        tokens = cut_left(tokens, max_prompt, self._tokens.bos_id)
        return _Wanted(tokens, max_tokens, strings, sampling, sampled, self._tokens)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sampled(options: dict[str, Any]) -> bool:
    """Whether to sample, by lm-eval's rule: do_sample, or a temperature above 0 without it. Takes do_sample out.

    Raises:
      InputError: do_sample is no bool, or asks for samples without a temperature to draw them at.
    """
    temperature, sampled = options.get("temperature"), options.pop("do_sample", None)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    require(temperature is None or number, "generation_kwargs: temperature", temperature, "must be a number")
    known = sampled is None or isinstance(sampled, bool)
    require(known, "generation_kwargs: do_sample", sampled, "must be true or false")
    hot = temperature is not None and not temperature <= 0
    require(
        hot or not sampled, "generation_kwargs: do_sample", sampled, f"needs a temperature above 0, not {temperature}"
    )
    return hot if sampled is None else bool(sampled)


@dataclasses.dataclass
class _Wanted:
    """A text in generation; it ends at its first stop string."""

    tokens: np.ndarray
    max_tokens: int
    until: list[str]
    sampling: Sampling
    sampled: bool
    tokenizer: Tokenizer
    request: Served = dataclasses.field(init=False)  # set when it is submitted

    def __post_init__(self) -> None:
        self.stream, self.so_far = self.tokenizer.decode_stream(after=self.tokens.tolist()), ""

    def token(self, token: int, steps: int) -> None:
        """Take a token; cancel the request once a stop string has appeared."""
        del steps
        self.so_far += self.stream.push(token)
        if any(u in self.so_far for u in self.until):
            self.request.cancel()

    @property
    def text(self) -> str:
        """The text before the first stop string, without special tokens."""
        whole = self.so_far + self.stream.end()
        return whole[: min((whole.find(u) for u in self.until if u in whole), default=len(whole))]


def _generated(served: Served, rule: ExitRule | None) -> Effort:
    """The cost of a text: its prompt, and every new token but the last, which the model does not read."""
    assert served.prompt_steps is not None  # it is done
    steps = [*served.prompt_steps.tolist(), *served.steps[1:]]
    n, recurrences = len(steps), float(sum(steps))
    # A rule without a gate is checked after every recurrence; the checks of a gated rule are not counted in decoding.
    checks = recurrences if rule is not None and rule.needs_logits and not rule.gated else 0.0
    return Effort(n, recurrences, checks, float(n) * n)
