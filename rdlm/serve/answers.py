"""Answers as OpenAI writes them: whole, or in pieces. `steps`, `usage.mean_steps` and token ids are additions."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any

from rdlm.serve.protocol import Wanted
from rdlm.serve.worker import Ask, End, Token
from rdlm.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclasses.dataclass
class _Choice:
    """One answer so far, and what of it has not been written down."""

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    reason: str | None = None
    count: int = 0
    offset: int = 0  # characters of all tokens before `tokens`
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
        self.steps_total = self.completion_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self._ask.prompts))

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.reason is not None for choice in self._choices)

    def add(self, index: int, item: Token | End) -> None:
        """One more item of an answer."""
        choice = self._choices[index]
        choice.text += item.text
        if isinstance(item, End):
            choice.reason = item.reason
            return
        choice.tokens.append(item)
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
        choice.offset += sum(self._length(token.id) for token in choice.tokens) if self._wanted.log_probs else 0
        choice.text, choice.tokens = "", []
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
        offsets, at = [], choice.offset
        for token in tokens:
            offsets.append(at)
            at += self._length(token.id)
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            # The chosen token too, where others were asked for.
            "top_logprobs": [
                {self._name(i): p for i, p in (*t.likeliest, (t.id, t.log_prob))} if t.likeliest else {} for t in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_entry(self, token: int, log_prob: float) -> Json:
        return {"token": self._name(token), "logprob": log_prob, "bytes": list(self._tokenizer.bytes_of(token))}

    def _name(self, token: int) -> str:
        """A token by itself: its text, or its bytes where they are no text, as OpenAI writes them."""
        data = self._tokenizer.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _length(self, token: int) -> int:
        """Characters of a token by itself."""
        return len(self._tokenizer.bytes_of(token).decode("utf-8", "replace"))
