"""Write the weights of a run that trained low-rank pairs or parts of a model, merged with its base, as one model.

    python experiments/merge_adapter.py runs/mine models/mine
    python experiments/merge_adapter.py runs/mine models/mine-ema --ema --kind run

RUN holds only what it learnt, and says which weights are its base: these must still be there, unchanged. DST needs
neither. It is a Hugging Face folder where that can hold the model, otherwise a run folder; tokenizer and chat template
come along. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rdlm.config import InputError, local_path
from rdlm.runtime import complete_folder, parse_arguments, require_empty, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Merge what the run RUN learnt with its base, and write DST."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist, or be empty."""
    step: int | None = None
    """Checkpoint; None: the newest."""
    ema: bool = False
    """Merge the moving average of what the run learnt."""
    kind: Literal["huggingface", "run"] | None = None
    """Of folder to write; None: huggingface where that can hold the model."""


def main() -> int:
    args = parse_arguments(Args, prog="merge_adapter.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    source, target = local_path(args.run), local_path(args.dst)
    require_empty(target)
    from rdlm.checkpoint import read_config
    from rdlm.folders import describe, write_huggingface, write_run
    from rdlm.hf import is_exportable
    from rdlm.weights import read_run

    run = read_config(source)
    if not run.tune.freezes:
        raise InputError(f"{source}: the run trained all parameters, so there is nothing to merge; use it as it is")
    params, config = read_run(source, args.step, args.ema)
    if args.kind == "huggingface" and not is_exportable(config):
        raise InputError("--kind = huggingface: no format there holds this model; leave it out")
    print(f"read {source} and its base {run.init}: {describe(params)}")
    notes: list[str] = []
    kind = args.kind or ("huggingface" if is_exportable(config) else "run")
    if kind == "huggingface":
        with complete_folder(target, alike=False) as partial:
            write_huggingface(partial, params, config, source)
    else:
        notes = write_run(target, params, config, source)
    for line in notes:
        print(line)
    print(f"wrote {'Hugging Face' if kind == 'huggingface' else 'run'} folder {target}")
    return 0


if __name__ == "__main__":
    run_command(main)
