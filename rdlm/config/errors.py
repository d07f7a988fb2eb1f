"""The error for wrong input, and the wording of its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: a field, a file, a flag. The message is one line that names field, value and fix.

    Commands print the message alone on stderr and exit with code 2 (see `rdlm.runtime.run_command`).
    """


def one_line(error: object) -> str:
    """An error's message, or a text, on one line of at most 200 characters; its type if there is none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of `known`, or their list when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def require(condition: bool, field: str, value: object, fix: str) -> None:
    """Raise InputError '`field` = `value`: `fix`' unless `condition`."""
    if not condition:
        raise InputError(f"{field} = {one_line(repr(value))}: {fix}")
