"""Convert a Hugging Face folder of the public reference to a run folder, or a run folder to a Hugging Face folder.

    python experiments/convert_huggingface.py path/to/huginn-0125 runs/huginn --verify
    python experiments/convert_huggingface.py runs/quickstart exported/quickstart --verify
    python experiments/convert_huggingface.py model.gguf models/mine

A GGUF file of Llama's type becomes a Hugging Face folder (with the extra gguf). SRC can also be the name of a model
on the hub (ORGANISATION/NAME), if huggingface_hub is installed. Tokenizer files and generation_config.json are copied
too. Values keep their dtype and bits. Exit codes: 0 done, 1 --verify found a difference, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rdlm.config import InputError, differences, local_path, require
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    import numpy as np

    from rdlm.config import ModelConfig
    from rdlm.model import Params


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert SRC to DST. The kind of folder SRC is decides the direction."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hugging Face folder, run folder, GGUF file, or name on the hub."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist, or be empty. In an earlier export the model is replaced, other files stay."""
    verify: bool = False
    """Load the result and compare its logits on random tokens with those of SRC."""
    threshold: float = 1e-4
    """--verify fails if any logit differs by more."""
    recurrences: int = 4
    """Recurrences r at which --verify compares, at least 1."""
    step: int | None = None
    """Checkpoint of the run folder to convert; None: the newest."""


def main() -> int:
    args = parse_arguments(
        Args, prog="convert_huggingface.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    require(args.recurrences >= 1, "--recurrences", args.recurrences, "must be at least 1, so that the core runs")
    require(0 <= args.threshold < math.inf, "--threshold", args.threshold, "must be a finite number, not negative")
    from rdlm.folders import (
        broken,
        check_model_folder,
        describe,
        local_folder,
        one_dtype,
        write_huggingface,
        write_run,
    )
    from rdlm.hf import is_huggingface
    from rdlm.hf.gguf import is_gguf

    if is_gguf(local_path(args.src)):
        return convert_file(args, local_path(args.src))
    source, target = local_folder(args.src), args.dst
    if source.resolve() == target.resolve():
        raise InputError(f"{target}: source and destination are the same folder")
    check_model_folder(source)
    to_run = is_huggingface(source)
    if to_run and args.step is not None:
        raise InputError(f"--step = {args.step}: SRC is a Hugging Face folder, which has no steps; leave it out")
    params, config = load(source, args.step)
    print(f"read {source}: {describe(params)}")
    for line in broken(params):
        print(line)
    notes: list[str] = []
    if to_run:
        params, config, notes = one_dtype(params, config)
    names = set(target.iterdir()) if target.is_dir() else set()
    try:
        if to_run:
            notes += write_run(target, params, config, source)
        else:
            write_huggingface(target, params, config, source)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    for path in sorted(set(target.iterdir()) - names):
        if path.suffix.startswith(".replaced"):
            notes.append(f"note: {path.stem} was there and is not of an earlier export; it is now {path.name}")
    for line in notes:
        print(line)
    print(f"wrote {'run' if to_run else 'Hugging Face'} folder {target}")
    if not args.verify:
        return 0
    before = logits(params, config, args.recurrences)
    del params  # one copy of the model in memory at a time
    return 0 if verified(before, config, target, args) else 1


def convert_file(args: Args, file: Path) -> int:
    """Write the Hugging Face folder DST from a GGUF file."""
    from rdlm.folders import broken, describe
    from rdlm.hf.gguf import convert_gguf

    for name in ("verify", "step"):
        if getattr(args, name):
            raise InputError(f"--{name}: SRC is a GGUF file; leave it out, and convert DST to a run folder with it")
    convert_gguf(file, args.dst)
    params, _ = load(args.dst)
    print(f"read {file}: {describe(params)}")
    for line in broken(params):
        print(line)
    print(f"wrote Hugging Face folder {args.dst}")
    return 0


def load(folder: Path, step: int | None = None) -> tuple[Params, ModelConfig]:
    """(params, config) of either kind of folder."""
    from rdlm.folders import read_model

    return read_model(folder, step)


def logits(params: Params, config: ModelConfig, recurrences: int) -> np.ndarray:
    """f32 [2, L, V] on fixed random tokens, from a fixed initial state."""
    import numpy as np

    from rdlm.model import bind

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(16, config.max_length)), np.int32)
    # Not jitted: in one program XLA on CPU would convert all bf16 weights to f32 at once.
    bound = bind(params, config, tokens)
    s = bound.s0
    for i in range(recurrences):
        s = bound.step(s, i)
    return np.asarray(bound.read(s)[0])


def verified(before: np.ndarray, config: ModelConfig, target: Path, args: Args) -> bool:
    """Compare the logits of the source with those of the written folder, and print the result."""
    import jax
    import numpy as np

    params, written = load(target)
    # A Hugging Face folder does not hold the compute dtype.
    written = dataclasses.replace(written, compute_dtype=config.compute_dtype)
    changed = differences(config, written)
    if changed:
        print("config differs: " + ", ".join(f"{name} {a!r} -> {b!r}" for name, (a, b) in changed.items()))
        return False
    after = logits(params, written, args.recurrences)
    p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    kl = np.asarray((np.exp(p) * (p - q)).sum(-1))
    top = np.argsort(-before)[..., :5], np.argsort(-after)[..., :5]
    top5 = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*(t.reshape(-1, t.shape[-1]) for t in top), strict=True)])
    worst = float(np.abs(before - after).max())
    print(
        f"verify: r = {args.recurrences}, {p.shape[0] * p.shape[1]} tokens: max |logit difference| {worst:.3g}, "
        f"KL mean {kl.mean():.3g} max {kl.max():.3g}, top-1 agreement {np.mean(top[0][..., 0] == top[1][..., 0]):.2%}, "
        f"top-5 agreement {top5:.2%}"
    )
    if not worst <= args.threshold:
        print(f"verify: FAILED, {worst:.3g} is more than the threshold of {args.threshold:g}")
        return False
    print("verify: passed")
    return True


if __name__ == "__main__":
    run_command(main)
