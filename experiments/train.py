"""Train a recurrent-depth language model from a preset; the same command resumes it.

    python experiments/train.py quickstart
    python experiments/train.py nano --steps 50 --seed 1 --optimizer.learning-rate 1e-3 --run-dir runs/try
    python experiments/train.py finetune --init models/smollm2 --data.prepared data/mine --run-dir runs/mine

--init FOLDER starts with the parameters of a run folder or a Hugging Face folder, whose model and tokenizer replace the
preset's; --init-ema True takes the moving average of a run. Once a checkpoint is saved, FOLDER is only needed
with --tune.* or --loss.teacher start.

The run folder (runs/PRESET) gets config.json, metrics.jsonl, checkpoints/, tokenizer/ and, at the end,
loss_by_depth.json. Exit codes: 0 done; 75 stopped by a signal (SIGTERM, Ctrl-C, a hang-up) and saved; 3 stopped by an
alarm and saved (--alarms.action stop); 2 wrong input, or diverged; 1 another process is missing or lost, or the run
cannot be saved: fix that and run the same command again.

On a Cloud TPU slice run it on every worker, with tpu_setup/run.sh. Elsewhere several processes find each other by
RDLM_COORDINATOR=HOST:PORT RDLM_PROCESSES=2 RDLM_PROCESS_ID=0 (and 1), with a run folder that they share.
"""

from __future__ import annotations

import dataclasses
import sys

import tyro

from rdlm.config import PRESETS, InputError, RunConfig, preset, require, to_json
from rdlm.config.presets import FINETUNE
from rdlm.runtime import leaving_on_signals, on_tpu, parse_arguments, reuse_freed_memory, run_command, start

NAMES = ", ".join(PRESETS)


def main() -> int:
    words = sys.argv[1:]
    if words and words[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\npresets: {NAMES}\nall fields: python experiments/train.py PRESET --help")
        return 0
    config = configured(words)
    if not on_tpu():
        reuse_freed_memory()
    start(agree_on=to_json(config))

    from rdlm.train import train  # imports JAX, which takes seconds: not for a command line with a mistake

    return train(config)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """As in `DataConfig`."""

    prepared: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Depth:
    """As in `ModelConfig`."""

    mean_recurrence: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """As in `TuneConfig`."""

    only: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """The flags that decide the defaults of all others."""

    init: str = ""
    init_ema: bool = False
    run_dir: str = ""
    data: Prepared = Prepared()
    model: Depth = Depth()
    tune: Parts = Parts()


def configured(words: list[str]) -> RunConfig:
    """The preset that the first word names, with the overrides of the others."""
    if not words:
        raise InputError(f"which preset? Known: {NAMES}; for example: python experiments/train.py quickstart")
    name, *overrides = words
    if name.startswith("-"):
        raise InputError(f"the first argument must be a preset, not {name!r}; known: {NAMES}")
    prog, options = f"train.py {name}", (tyro.conf.FlagConversionOff,)
    start, _ = tyro.cli(Start, prog=prog, args=overrides, return_unknown_args=True, add_help=False, config=options)
    require(start.tune.only != (), "--tune.only", (), "name the parts that learn, or leave it out")
    base = preset(name)
    if start.init:
        from rdlm.weights import begin_from

        data = dataclasses.replace(base.data, prepared=start.data.prepared)
        begun = dataclasses.replace(base, init=start.init, init_ema=start.init_ema, run_dir=start.run_dir, data=data)
        base = begin_from(begun, start.model.mean_recurrence or None)
    elif start.init_ema:
        raise InputError("--init-ema: only with --init FOLDER")
    elif name == FINETUNE.preset and not {"-h", "--help"} & set(overrides):
        raise InputError(f"{name}: which model? Give its folder with --init FOLDER")
    return parse_arguments(RunConfig, default=base, args=overrides, prog=prog, description=__doc__, config=options)


def preemptible() -> int:
    with leaving_on_signals():  # until the trainer installs its own handlers, which save
        return main()


if __name__ == "__main__":
    run_command(preemptible)
