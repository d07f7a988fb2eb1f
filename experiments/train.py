"""Train a recurrent-depth language model from a preset; the same command resumes it.

    python experiments/train.py quickstart
    python experiments/train.py nano --steps 50 --seed 1 --optimizer.learning-rate 1e-3 --run-dir runs/try

The run folder (runs/PRESET) gets config.json, metrics.jsonl, checkpoints/, tokenizer/ and, at the end,
loss_by_depth.json. Exit codes: 0 done; 75 stopped by a signal (SIGTERM, Ctrl-C, a hang-up) and saved; 3 stopped by an
alarm and saved (--alarms.action stop); 2 wrong input, or diverged; 1 another process is missing or lost, or the run
cannot be saved: fix that and run the same command again.

On a Cloud TPU slice run it on every worker, with tpu_setup/run.sh. Elsewhere several processes find each other by
RDLM_COORDINATOR=HOST:PORT RDLM_PROCESSES=2 RDLM_PROCESS_ID=0 (and 1), with a run folder that they share.
"""

from __future__ import annotations

import sys

import tyro

from rdlm.config import PRESETS, InputError, RunConfig, preset, to_json
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


def configured(words: list[str]) -> RunConfig:
    """The preset that the first word names, with the overrides of the others."""
    if not words:
        raise InputError(f"which preset? Known: {NAMES}; for example: python experiments/train.py quickstart")
    name, *overrides = words
    if name.startswith("-"):
        raise InputError(f"the first argument must be a preset, not {name!r}; known: {NAMES}")
    return parse_arguments(
        RunConfig,
        default=preset(name),
        args=overrides,
        prog=f"train.py {name}",
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )


def preemptible() -> int:
    with leaving_on_signals():  # until the trainer installs its own handlers, which save
        return main()


if __name__ == "__main__":
    run_command(preemptible)
