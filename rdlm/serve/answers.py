"""Answers as OpenAI writes them: whole, or in pieces. `steps`, `usage.mean_steps` and token ids are additions."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rdlm.serve.protocol import Wanted
from rdlm.serve.scores import PromptScores
from rdlm.serve.worker import Ask, End, Item, Token
from rdlm.tokenizer import DecodeStream, Tokenizer

Json = dict[str, Any]


class _Scored(NamedTuple):
    """A token with its log-probability and those of the likeliest; None for the first of a prompt."""

    id: int
    log_prob: float | None
    likeliest: Sequence[tuple[int, float]] | None


@dataclasses.dataclass
class _Choice:
    """One answer so far, and what of it has not been written down."""

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    prompt: list[_Scored] = dataclasses.field(default_factory=list)  # its tokens, if they are wanted
    reason: str | None = None
    count: int = 0
    plain: DecodeStream | None = None  # the text as it is without stop strings, if log-probabilities are wanted
    length: int = 0  # of that text
    offsets: list[int] = dataclasses.field(default_factory=list)  # where in it those of `prompt` and `tokens` begin
    written: int = 0  # characters
    opened: bool = False


class Writer:
    """Turns the items of a request into what a client gets.

    Args:
      ask: what was asked for.
      wanted: how to write it.
      model: its name.
      tokenizer: of the model.
    """

    def __init__(self, ask: Ask, wanted: Wanted, model: str, tokenizer: Tokenizer):
        self._ask, self._wanted, self._tokenizer = ask, wanted, tokenizer
        kind = "chat.completion" if wanted.chat else "text_completion"
        self._head: Json = {
            "id": ("chatcmpl-" if wanted.chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [_Choice() for _ in range(len(ask.prompts) * ask.samples)]
        if wanted.echo:
            for i, choice in enumerate(self._choices):
                choice.text = tokenizer.decode(ask.prompts[i // ask.samples])
                choice.length = len(choice.text)
        if wanted.log_probs and not wanted.chat:
            for i, choice in enumerate(self._choices):
                choice.plain = tokenizer.decode_stream(after=ask.prompts[i // ask.samples].tolist())
        self.steps_total = self.completion_tokens = self.cached_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self._ask.prompts))

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.reason is not None for choice in self._choices)

    def add(self, index: int, item: Item) -> None:
        """One more item of an answer."""
        choice = self._choices[index]
        if isinstance(item, PromptScores):
            ids, most = self._ask.prompts[index // self._ask.samples].tolist(), self._ask.likeliest
            scores = zip(ids[1:], item.log_probs, (top[:most] for top in item.likeliest), strict=True)
            choice.prompt = [_Scored(ids[0], None, None), *(_Scored(*score) for score in scores)]
            stream, length = self._tokenizer.decode_stream(), 0
            for token in ids:
                choice.offsets.append(length)
                length += len(stream.push(token))
            return
        choice.text += item.text
        if isinstance(item, End):
            choice.reason = item.reason
            if index % self._ask.samples == 0:  # a prompt counts once, whatever the number of its answers
                self.cached_tokens += item.cached
            return
        choice.tokens.append(item)
        if choice.plain is not None:
            choice.offsets.append(choice.length)
            choice.length += len(choice.plain.push(item.id))
        choice.count += 1
        self.completion_tokens += 1
        self.steps_total += item.steps

    def whole(self) -> Json:
        """The answer in one piece."""
        choices = [self._choice(i, choice, "message") for i, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int) -> Json | None:
        """What has come of one answer since its last chunk; None: nothing to show yet."""
        choice = self._choices[index]
        if not choice.text and choice.reason is None:
            return None
        body = self._choice(index, choice, "delta")
        choice.written += len(choice.text)
        choice.offsets = []
        choice.text, choice.tokens, choice.prompt = "", [], []
        return self._chunk([body])

    def openings(self) -> list[Json]:
        """The first chunks of a chat: who speaks."""
        if not self._wanted.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
            for i in range(len(self._choices))
        ]

    def closing(self) -> Json | None:
        """The last chunk: the usage, if it is wanted."""
        return {**self._chunk([]), "usage": self.usage()} if self._wanted.usage else None

    def _chunk(self, choices: list[Json]) -> Json:
        head = {**self._head, "object": "chat.completion.chunk"} if self._wanted.chat else self._head
        usage = {"usage": None} if self._wanted.usage else {}
        return {**head, "choices": choices, **usage}

    def usage(self) -> Json:
        """Tokens, and recurrences per new token in the mean."""
        new, prompt = self.completion_tokens, self.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "mean_steps": round(self.steps_total / new, 4) if new else None,
        }

    def _choice(self, index: int, choice: _Choice, form: str) -> Json:
        body: Json = {"index": index}
        if not self._wanted.chat:
            body["text"] = choice.text
        elif form == "message":
            body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            body["delta"] = {"content": choice.text} if choice.text else {}
        body["logprobs"] = self._log_probs(choice) if self._wanted.log_probs else None
        body["finish_reason"] = choice.reason
        body["steps"] = [token.steps for token in choice.tokens]
        if self._wanted.token_ids:
            body["token_ids"] = [token.id for token in choice.tokens]
            if form == "message" or not choice.opened:
                body["prompt_token_ids"] = self._ask.prompts[index // self._ask.samples].tolist()
            choice.opened = True
        return body

    def _log_probs(self, choice: _Choice) -> Json:
        tokens = choice.tokens
        if self._wanted.chat:
            content = [
                {
                    **self._chat_entry(token.id, token.log_prob),
                    "top_logprobs": [self._chat_entry(*other) for other in token.likeliest],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        every = [*choice.prompt, *(_Scored(token.id, token.log_prob, token.likeliest) for token in tokens)]
        # Tokens of a stop string, which the text does not have, are at its end.
        end = choice.length if choice.reason is None else choice.written + len(choice.text)
        return {
            "tokens": [self._name(scored.id) for scored in every],
            "token_logprobs": [scored.log_prob for scored in every],
            "top_logprobs": [self._top(scored) for scored in every],
            "text_offset": [min(offset, end) for offset in choice.offsets],
        }

    def _top(self, scored: _Scored) -> dict[str, float] | None:
        """The likeliest tokens at a position, and the one that is there."""
        if scored.likeliest is None or scored.log_prob is None:
            return None
        pairs = (*scored.likeliest, (scored.id, scored.log_prob)) if scored.likeliest else ()
        return {self._name(i): p for i, p in pairs}

    def _chat_entry(self, token: int, log_prob: float) -> Json:
        return {"token": self._name(token), "logprob": log_prob, "bytes": list(self._tokenizer.bytes_of(token))}

    def _name(self, token: int) -> str:
        """A token by itself: its text, or its bytes where they are no text, as OpenAI writes them."""
        data = self._tokenizer.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
