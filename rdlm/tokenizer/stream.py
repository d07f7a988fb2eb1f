"""Ids that arrive one at a time to text."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdlm.tokenizer.core import Tokenizer


class DecodeStream:
    """Turns ids into text as they arrive; a character split over tokens comes out whole, with its last token.

    What `push` and the final `end` return, joined, is exactly `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # only for tokenizers that are not byte-level
        self._sent = ""

    def push(self, token: int) -> str:
        """Text completed by this token, possibly empty."""
        if not self._tokenizer._is_text(token, self._skip_special):
            return ""
        if self._tokenizer._pieces is not None:
            return self._utf8.decode(self._tokenizer._pieces[token])
        self._ids.append(token)
        return self._fresh(hold="\ufffd")

    def end(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed, or nothing."""
        return self._utf8.decode(b"", final=True) + (self._fresh() if self._ids else "")

    def _fresh(self, hold: str | None = None) -> str:
        # Other decoders look at neighbouring tokens, so decode all of them and return what is new.
        text = self._tokenizer.decode(self._ids, skip_special=False)
        if hold and text.endswith(hold):
            return ""
        fresh, self._sent = text[len(self._sent) :], text
        return fresh
