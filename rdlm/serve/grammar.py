"""Answers that are JSON, or JSON of a schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rdlm.serve.errors import APIError, wrong
from rdlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_LOG = logging.getLogger("rdlm.serve")
FIELD = "response_format"
ANY_OBJECT = {"type": "object"}
MAX_SCHEMA = 2**16
"""Most bytes of a schema, written in ASCII."""
MAX_WAITING = 8
"""Most schemas that may wait to be compiled, the one that is being compiled included."""
_REMEMBERED = 16  # schemas
_OPTIONS = "x-guidance"  # of llguidance, at the top of a schema
_STYLE = {
    "whitespace_flexible": False,  # or a small model may write white space for ever
    "item_separator": ", ",
    "key_separator": ": ",
}
_ANY_TOKENS = '%llguidance {"no_forcing": true}'  # where only one text is possible, the model still chooses its tokens
# Some small schemas take hours or all memory to compile, and a thread cannot be stopped.
_TRIAL = """
import resource, sys
for what, most in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 2**28)):
    try:
        resource.setrlimit(what, (most, most))
    except (OSError, ValueError):  # macOS
        pass
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

print("begin", flush=True)

class Bytes:
    eos_token_id = bos_token_id = 256
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]
    special_token_ids = [256]

    def __call__(self, text):
        return list(text)

limits = LLParserLimits(verbose_errors=False)
matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0, limits=limits)
matcher.compute_bitmask()
sys.stdout.write("error: " + matcher.get_error() if matcher.is_error() else "good")
"""
_TRIAL_SECONDS = 60.0  # by the clock; its processor time is limited too
_LIMITS = (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV)  # ends by too much time, memory or stack


class InGrammar:
    """How far one answer is in its grammar: a `Constraint` of the engine."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def allowed(self) -> np.ndarray:
        """See `Constraint`. Once the text is complete, only tokens that end it."""
        bits = self._matcher.compute_bitmask()  # one for each token, and one more
        self._check()
        return np.frombuffer(bits, "<u4")[: self._words]

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _short(self._matcher.get_error())
            raise wrong(FIELD, f"the schema is too complex, the answer cannot go on ({why})")


class Grammar:
    """What the answers to a request must look like."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def start(self) -> InGrammar:
        """For one answer, at its beginning."""
        return InGrammar(self._matcher.deep_copy(), self._words)


class Grammars:
    """Compiles schemas for a tokenizer, away from the event loop's thread.

    Args:
      tokenizer: of the model.
      vocab_size: the model's, which may be larger.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._model, self._vocab_size = tokenizer, vocab_size
        # One thread, so that clients with many schemas leave the other cores to the engine.
        self._threads = concurrent.futures.ThreadPoolExecutor(1, "grammar", initializer=_hold_back_sigterm)
        self._known: collections.OrderedDict[str, Grammar | str] = collections.OrderedDict()  # the latest used last
        self._coming: dict[str, asyncio.Task[Grammar | str]] = {}
        self._any_object = _written(ANY_OBJECT)  # always remembered

    def prepare(self) -> None:
        """Read the tokens now: of a large vocabulary that takes a second, in which no other thread runs."""

        def read() -> None:
            with contextlib.suppress(ModuleNotFoundError):
                if self._model.pieces is not None:
                    _ = self._tokenizer

        self._threads.submit(read)

    async def of(self, schema: Mapping[str, object]) -> Grammar:
        """The grammar of JSON that a schema describes; at once, if it is remembered.

        Raises:
          APIError: llguidance is not there, does not know the tokenizer's kind, or cannot compile the schema; or too
            many other schemas wait.
        """
        text = self._as_text(schema)
        if text in self._known:
            self._known.move_to_end(text)
            found = self._known[text]
        else:
            found = await asyncio.shield(self._task(text))  # others may wait for the same schema
        if isinstance(found, str):
            raise wrong(FIELD, found)
        return found

    def _as_text(self, schema: Mapping[str, object]) -> str:
        """A schema for llguidance. Raises what is wrong with it, as `of`."""
        if importlib.util.find_spec("llguidance") is None:
            raise wrong(FIELD, "needs llguidance, which is not installed on the server (pip install llguidance)")
        if self._model.pieces is None:
            raise wrong(FIELD, "this model's tokenizer does not say what the bytes of its tokens are; leave it out")
        if _OPTIONS in schema:  # such as one that ignores what cannot be compiled
            raise wrong(FIELD, f"the schema holds {_OPTIONS!r}, but how schemas are compiled is fixed; leave it out")
        try:
            text, number = _written(schema), _inexact(schema)
        except (ValueError, RecursionError) as error:
            raise wrong(FIELD, "the schema is nested too deeply, or holds numbers that are not finite") from error
        if number is not None:
            raise wrong(FIELD, f"the schema holds {number}; integers beyond 2^53 would not be kept, use strings")
        if len(text) > MAX_SCHEMA:
            raise wrong(FIELD, f"a schema of {len(text)} bytes; at most {MAX_SCHEMA} are served")
        return text

    def _task(self, text: str) -> asyncio.Task[Grammar | str]:
        """What compiles a schema, and remembers the grammar or what is wrong."""
        if text not in self._coming:
            if len(self._coming) >= MAX_WAITING:
                message = f"{FIELD}: too many schemas are waiting to be compiled; try again later"
                raise APIError(429, message, FIELD, "queue_full", retry_after=1)
            self._coming[text] = asyncio.create_task(self._remember(text))
        return self._coming[text]

    async def _remember(self, text: str) -> Grammar | str:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._compile, text)
        finally:
            del self._coming[text]
        self._known[text] = found
        if len(self._known) > _REMEMBERED:
            del self._known[next(key for key in self._known if key != self._any_object)]
        return found

    def _compile(self, text: str) -> Grammar | str:
        """The grammar, or what is wrong. Raises what is wrong with the server."""
        import llguidance

        if (said := _tried(text)) is not None:
            return said
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if not any(matcher.compute_bitmask()) or matcher.is_error():  # for other tokens than bytes it did compile
            return "no token of this model can begin such an answer; leave it out"
        return Grammar(matcher, self._vocab_size)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(self._model, self._vocab_size)),
            n_vocab=self._vocab_size,
            eos_token=list(self._model.end_ids),
        )


class _Tokens:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        assert tokenizer.pieces is not None
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = tokenizer.pieces + [b""] * (vocab_size - len(tokenizer.pieces))
        self.special_token_ids = sorted({*tokenizer.special_ids.values(), *tokenizer.end_ids})
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        # llguidance asks for it, but with `no_forcing` never calls it, beyond one trial.
        return self._tokenizer.encode(text.decode(errors="replace"), bos=False).tolist()


def _written(schema: Mapping[str, object]) -> str:
    """A schema for llguidance."""
    return f"{_ANY_TOKENS}\nstart: %json {json.dumps({**schema, _OPTIONS: _STYLE}, allow_nan=False)}"


def _inexact(value: object) -> int | None:
    """An integer in a schema that llguidance, which computes with doubles, would change; None: there is none."""
    if isinstance(value, int):
        return value if abs(value) > 2**53 else None
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((number for x in inside if (number := _inexact(x)) is not None), None)


def _hold_back_sigterm() -> None:
    """For this thread and the processes that it starts: some send SIGTERM to all processes of a server."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _tried(grammar: str) -> str | None:
    """Compile a grammar in a process of its own; what is wrong with it, if anything is.

    Raises:
      APIError: the process does not do its work, whatever the grammar.
    """
    command = [sys.executable, "-P", "-c", _TRIAL]  # without modules of the current folder
    try:
        done = subprocess.run(
            command, input=grammar, capture_output=True, text=True, timeout=_TRIAL_SECONDS,
            start_new_session=True,  # Ctrl-C is for the server
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        message = f"{FIELD}: the server is too busy to compile the schema; try again later"
        raise APIError(503, message, code="busy", retry_after=5) from error
    begun, _, said = done.stdout.partition("\n")
    if begun and said == "good":
        return None
    if begun and said.startswith("error: "):
        return f"the schema cannot be compiled ({_short(said.removeprefix('error: '))})"
    if begun and (done.returncode in _LIMITS or "MemoryError" in done.stderr):
        return "the schema is too complex: it takes more than 2 seconds or 256 MiB to compile"
    last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    _LOG.error("%s: the process that compiles schemas fails: %s", FIELD, last)
    raise APIError(500, f"{FIELD}: the server cannot compile schemas; its log says why", code="internal_error")


def _short(text: str) -> str:
    """An error of llguidance in one line; it may quote the schema, which is the client's own."""
    line = " ".join(text.replace("<non-verbose/>", "").split())
    line = line.partition(" 1 | %llguidance")[0]  # then the schema as it was compiled
    return line if len(line) <= 200 else f"{line[:200]}..."
