"""Peak memory and time of converting a model of the published shape (3.56 B parameters, bf16) with random weights.

    python experiments/bench/convert.py [--preset huginn_3p5b] [--folder /tmp/bench-convert] [--verify] [--keep]

Makes a synthetic Hugging Face folder and converts it to a run folder and back. Each step is a process of its own,
whose peak resident size is printed. Needs three times the model's size on disk (21.4 GB).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro

from rdlm.config import InputError, preset
from rdlm.runtime import parse_arguments, run_command

CONVERT = Path(__file__).parents[1] / "convert_huggingface.py"


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the measurement."""

    preset: str = "huginn_3p5b"
    """Shape of the model."""
    folder: Path = Path("/tmp/bench-convert")
    """Folder for the files; must not exist."""
    verify: bool = False
    """Also run the converter with --verify, which computes logits."""
    keep: bool = False
    """Keep the folders afterwards."""


def synthetic(folder: Path, args: Args) -> None:
    """Write a bf16 folder of the preset's shape, with weights of the initial deviation and norms near one."""
    from rdlm.hf.config import reference_fields
    from rdlm.hf.files import Planned, write_tensors
    from rdlm.hf.names import ROTARY, rotary_buffer, table

    config = preset(args.preset).model
    rng = np.random.default_rng(0)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    # Repeating a block of random numbers is much faster than drawing billions.
    tile = (rng.standard_normal(1_000_003) * (2 / (5 * config.embed_dim)) ** 0.5).astype(bf16).view(np.uint16)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        start = int(rng.integers(tile.size))
        drawn = np.resize(np.roll(tile, start), shape)
        return (drawn.view(bf16) + bf16.type(1)).view(np.uint16) if "norm" in name or "ln_f" in name else drawn

    planned = {
        name: Planned(bf16, entry.shape, functools.partial(values, name, entry.shape))
        for name, entry in table(config).items()
    }
    buffer = rotary_buffer(config)
    planned[ROTARY] = Planned(buffer.dtype, buffer.shape, lambda: buffer)
    folder.mkdir(parents=True)
    write_tensors(folder, dict(sorted(planned.items())), 5_000_000_000)
    (folder / "config.json").write_text(json.dumps(reference_fields(config, "bfloat16"), indent=2))


def measured(what: str, command: list[str]) -> None:
    """Run a command and print its time and peak resident size."""
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = _wait(child.pid)
    if status:
        raise InputError(f"{what}: failed, see above")
    print(f"{what}: {time.monotonic() - start:.0f} s, peak resident {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)


def _wait(pid: int) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(pid, 0)  # rusage of this child alone; RUSAGE_CHILDREN would keep the largest so far


def main() -> None:
    args = parse_arguments(Args, prog="bench_convert.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if args.folder.exists():
        raise InputError(f"{args.folder}: exists; choose a new folder")
    source, run, back = (args.folder / name for name in ("source", "run", "back"))
    try:
        synthetic(source, args)
        size = sum(f.stat().st_size for f in source.iterdir())
        print(
            f"synthetic folder: {size / 2**30:.2f} GiB in {len(list(source.glob('*.safetensors')))} files", flush=True
        )
        load = f"import rdlm; rdlm.load_huggingface({str(source)!r})"
        measured("load_huggingface alone", [sys.executable, "-c", load])
        more = ["--verify"] if args.verify else []
        measured("Hugging Face -> run folder", [sys.executable, str(CONVERT), str(source), str(run), *more])
        measured("run folder -> Hugging Face", [sys.executable, str(CONVERT), str(run), str(back), *more])
        for file in sorted(source.glob("*.safetensors")):
            measured(f"{file.name} byte-identical", ["cmp", str(file), str(back / file.name)])
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
