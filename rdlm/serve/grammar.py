"""Answers that are JSON, or JSON of a schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rdlm.config import InputError
from rdlm.serve.errors import wrong
from rdlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

FIELD = "response_format"
MAX_SCHEMA = 2**16
"""Most bytes of a schema."""
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


class Progress:
    """How far one answer is in its grammar: a `Constraint` of the engine."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def allowed(self) -> np.ndarray:
        """See `Constraint`. Once the text is complete, only tokens that end it."""
        bits = self._matcher.compute_bitmask()  # one more than there are tokens
        self._check()
        return np.frombuffer(bits, "<u4")[: self._words]

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{FIELD}: the answer cannot go on ({_short(self._matcher.get_error())})")


class Grammar:
    """What the answers to a request must look like."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def start(self) -> Progress:
        """For one answer, at its beginning."""
        return Progress(self._matcher.deep_copy(), self._words)


class Grammars:
    """Compiles schemas for a tokenizer, away from the event loop's thread.

    Args:
      tokenizer: of the model.
      vocab_size: the model's, which may be larger.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._model, self._vocab_size = tokenizer, vocab_size
        self._threads = concurrent.futures.ThreadPoolExecutor(1, "grammar")  # slow schemas wait for each other alone
        self._known = functools.lru_cache(16)(self._compile)

    def prepare(self) -> None:
        """Read the tokens now: of a large vocabulary that takes a second, in which no other thread runs."""

        def read() -> None:
            with contextlib.suppress(ModuleNotFoundError):
                if self._model.pieces is not None:
                    _ = self._tokenizer

        self._threads.submit(read)

    async def of(self, schema: Mapping[str, object]) -> Grammar:
        """The grammar of JSON that a schema describes.

        Raises:
          APIError: llguidance is not there, does not know the tokenizer's kind, or cannot compile the schema.
        """
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._of, schema)
        if isinstance(found, str):
            raise wrong(FIELD, found)
        return found

    def _of(self, schema: Mapping[str, object]) -> Grammar | str:
        """The grammar, or what is wrong."""
        try:
            import llguidance  # noqa: F401
        except ModuleNotFoundError:
            return "needs llguidance, which is not installed on the server (pip install llguidance)"
        if self._model.pieces is None:
            return "this model's tokenizer does not say what the bytes of its tokens are; leave it out"
        given = schema.get("x-guidance")  # llguidance's own options
        style = {**(given if isinstance(given, dict) else {}), **_STYLE}
        try:
            text = json.dumps({**schema, "x-guidance": style}, allow_nan=False)
        except (ValueError, RecursionError):
            return "the schema is nested too deeply, or holds numbers that are not finite"
        if len(text) > MAX_SCHEMA:
            return f"a schema of {len(text)} bytes; at most {MAX_SCHEMA} are served"
        return self._known(f"{_ANY_TOKENS}\nstart: %json {text}")

    def _compile(self, text: str) -> Grammar | str:
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
        return self._tokenizer.encode(
            text.decode(errors="replace"), bos=False
        ).tolist()  # for nothing that is used here


def _tried(grammar: str) -> str | None:
    """Compile a grammar in a process of its own; what is wrong with it, if anything is."""
    said = ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-I", "-c", _TRIAL]
        said = subprocess.run(command, input=grammar, capture_output=True, text=True, timeout=_TRIAL_SECONDS).stdout
    if said.startswith("error: "):
        return f"the schema cannot be compiled ({_short(said.removeprefix('error: '))})"
    return None if said == "good" else "the schema is too complex: it takes more than 2 seconds or 256 MiB to compile"


def _short(text: str) -> str:
    """An error of llguidance in one line; it may quote the schema, which is the client's own."""
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= 200 else f"{line[:200]}..."
