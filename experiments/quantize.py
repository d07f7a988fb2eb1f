"""Write a copy of a model whose matrices take 8 bits a value, to decode and serve from less memory.

    python experiments/quantize.py runs/quickstart runs/quickstart-int8
    python experiments/quantize.py models/smollm2 runs/smollm2-int8 --embeddings

SRC is a run folder or a Hugging Face folder, DST a run folder that holds parameters only; the tokenizer, and what a run
is evaluated on, come along. The matrices of all blocks get one scale per output channel; adapter and norms keep their
dtype, and so do embeddings and head without --embeddings. --dtype bfloat16 rounds all parameters instead. What it
costs at every depth: experiments/evaluate.py on both folders. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rdlm.config import InputError, local_path
from rdlm.runtime import parse_arguments, require_empty, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Quantize the model SRC, and write the run folder DST."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Run folder or Hugging Face folder."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist, or be empty."""
    dtype: Literal["int8", "float8_e4m3fn", "bfloat16"] = "int8"
    embeddings: bool = False
    """Quantize embeddings and head too, with one scale per token."""
    step: int | None = None
    """Checkpoint of a run folder; None: the newest."""
    ema: bool = False
    """Take the moving average of the weights, if the run kept one (optimizer.ema_decay)."""


def main() -> int:
    args = parse_arguments(Args, prog="quantize.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if args.embeddings and args.dtype == "bfloat16":
        raise InputError("--embeddings: --dtype bfloat16 rounds all parameters; leave it out")
    target = local_path(args.dst)
    require_empty(target)
    import jax

    from rdlm.folders import describe, local_folder, one_dtype, write_run
    from rdlm.model import cast, check_float, quantize
    from rdlm.run import load

    run = load(local_folder(args.src), args.step, args.ema)
    check_float(run.params, str(run.folder))
    params, config, notes = one_dtype(run.params, run.config)
    if args.dtype == "bfloat16":
        small, config = cast(params, "bfloat16"), dataclasses.replace(config, param_dtype="bfloat16")
    else:
        small = quantize(params, config, args.dtype, args.embeddings)
    notes += write_run(target, small, config, run.folder, run.run_config.data if run.run_config else None)
    for line in notes:
        print(line)
    before, after = (sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20 for tree in (params, small))
    print(f"read {run.folder}: {describe(params)}, {before:,.2f} MiB")
    print(f"wrote run folder {target}: {describe(small)}, {after:,.2f} MiB ({after / before:.0%})")
    return 0


if __name__ == "__main__":
    run_command(main)
