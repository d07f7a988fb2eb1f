"""Train a recurrent-depth language model from a preset; run the same command again to resume.

    python experiments/train.py quickstart
    python experiments/train.py nano --steps 50 --seed 1 --optimizer.learning-rate 1e-3 --run-dir runs/try

Everything goes to the run folder (runs/PRESET): config.json, metrics.jsonl, checkpoints/, tokenizer/ and, at the end,
loss_by_depth.json. Exit codes: 0 done, 75 preempted (SIGTERM) and saved, 3 stopped by an alarm and saved
(--alarms.action stop), 2 wrong input or diverged, 1 another process is missing or was lost, or the disk is full: the
same command goes on once that is mended.

On a Cloud TPU slice run it on every worker: tpu_setup/run.sh does. Elsewhere several processes find each other by
RDLM_COORDINATOR=HOST:PORT RDLM_PROCESSES=2 RDLM_PROCESS_ID=0 (and 1), in a run folder that they share.
"""

from __future__ import annotations

import sys

import tyro

from rdlm.config import PRESETS, InputError, RunConfig, preset, to_json
from rdlm.runtime import leaving_on_sigterm, on_tpu, parse_arguments, run_command, start


def main() -> int:
    args = sys.argv[1:]
    names = ", ".join(PRESETS)
    if not args:
        raise InputError(f"which preset? Known: {names}; for example: python experiments/train.py quickstart")
    if args[0] in ("-h", "--help"):
        print(__doc__.strip() + f"\n\npresets: {names}\nall fields: python experiments/train.py PRESET --help")
        return 0
    if args[0].startswith("-"):
        raise InputError(f"the first argument must be a preset, not {args[0]!r}; known: {names}")
    base = preset(args[0])
    config = parse_arguments(
        RunConfig, default=base, args=args[1:], prog=f"train.py {args[0]}", description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip
    from rdlm.runtime.allocator import (
        reuse_freed_memory,  # after the arguments are known to be right: importing JAX takes seconds
    )
    from rdlm.train import train

    if not on_tpu():
        reuse_freed_memory()
    start(agree_on=to_json(config))
    return train(config)


def preemptible() -> int:
    with leaving_on_sigterm():  # until training takes the signal over, and saves
        return main()


if __name__ == "__main__":
    run_command(preemptible)
