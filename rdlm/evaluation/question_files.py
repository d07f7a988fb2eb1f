"""Files of questions: JSON lines, one question per line, all of one kind.

    {"question": "How many legs has a spider?", "choices": ["6", "8"], "answer": 1, "category": "animals"}
    {"prompt": "A spider has eight", "answer": " legs", "category": "animals"}

Multiple choice: `answer` is the index of the right choice, from 0, or its letter ("B"). Cloze: `answer` is the text
that follows the prompt, with its leading space. `category` is optional; other fields are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rdlm.config import InputError, local_path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Style = Literal["text", "letters"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A multiple-choice question; `answer` is the index of the right one of `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int
    category: str = ""
    where: str = dataclasses.field(default="", compare=False, repr=False)
    """File and line, for messages."""

    def texts(self, style: Style) -> tuple[str, list[str]]:
        """(context, continuations).

        "text": each choice after "Question: ... Answer:", as in lm-eval's ARC. "letters": the choices are listed, and
        the continuations are their letters, as in its MMLU.
        """
        if style == "text":
            return f"Question: {self.question}\nAnswer:", [f" {choice}" for choice in self.choices]
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question.strip(), *listed, "Answer:"]), [f" {x}" for x in LETTERS[: len(self.choices)]]


@dataclasses.dataclass(frozen=True)
class Cloze:
    """A text and its only right continuation."""

    prompt: str
    answer: str
    category: str = ""
    where: str = dataclasses.field(default="", compare=False, repr=False)
    """File and line, for messages."""


Questions = list[Choice] | list[Cloze]


def read_questions(path: str | Path) -> list[Choice] | list[Cloze]:
    """All questions of a file.

    Raises:
      InputError: no such file, no questions, or a line that is not one: named with its number.
    """
    path = local_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except OSError as error:
        raise InputError(f"questions {path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"questions {path}: not UTF-8 text ({error.reason})") from error
    choices, clozes = [], []
    for where, row in _objects(path, text):
        if "choices" in row or "question" in row:
            choices.append(_choice(row, where))
        else:
            clozes.append(_cloze(row, where))
        if choices and clozes:
            raise InputError(f"{where}: multiple choice and cloze in one file; give each a file of its own")
    if not choices and not clozes:
        raise InputError(f"questions {path}: holds no questions; one JSON object per line is expected")
    return choices or clozes


def write_questions(path: Path, questions: Sequence[Choice]) -> None:
    """Write what `read_questions` reads."""
    rows = [{name: x for name, x in dataclasses.asdict(q).items() if name != "where"} for q in questions]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _objects(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"questions {path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, found {type(row).__name__}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: not valid Unicode, it holds half of a surrogate pair; correct it") from error
        yield where, row


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        known = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where}: column {column!r} is missing (there: {known})")
    if not isinstance(row[column], str) or not row[column]:
        raise InputError(f"{where}: {column} = {row[column]!r}: must be text, and not empty")
    return row[column]


def _category(row: dict[str, Any], where: str) -> str:
    category = row.get("category", "")
    if not isinstance(category, str):
        raise InputError(f"{where}: category = {category!r}: must be text")
    return category


def _choice(row: dict[str, Any], where: str) -> Choice:
    question = _text(row, "question", where)
    for column in ("choices", "answer"):
        if column not in row:
            raise InputError(f"{where}: column {column!r} is missing (there: {', '.join(map(repr, row))})")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{where}: choices = {choices!r}: must be a list of at least two texts, none empty")
    if len(choices) > len(LETTERS):
        raise InputError(f"{where}: {len(choices)} choices; at most {len(LETTERS)} are supported")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        last, letter = len(choices) - 1, LETTERS[len(choices) - 1]
        raise InputError(
            f"{where}: answer = {row['answer']!r}: must be an index in [0, {last}] or a letter from A to {letter}"
        )
    return Choice(question, tuple(choices), answer, _category(row, where), where)


def _cloze(row: dict[str, Any], where: str) -> Cloze:
    return Cloze(_text(row, "prompt", where), _text(row, "answer", where), _category(row, where), where)
