"""Will it fit, and what will it wait for? Training and decoding compiled for TPUs on a machine that has none.

    python experiments/aot_check.py huginn_3p5b --topology v5e:16x16
    python experiments/aot_check.py huginn_3p5b --topology v5p:4x4x4 --gather each --search
    python experiments/aot_check.py huginn_3p5b --topology v5e:16x16 --only train --remat auto
    python experiments/aot_check.py huginn_3p5b --topology v5e:2x2 --only train --tune.lora-rank 16
    python experiments/aot_check.py huginn_3p5b --topology v5e:2x2 --only decode --batch 16 --capacity 1024
    python experiments/aot_check.py small --only decode --exit none latent_diff gated_kl --mean-depth 12
    python experiments/aot_check.py huginn_3p5b --only decode --batch 1 --recurrences 1 --exit none --window 128
    python experiments/aot_check.py huginn_3p5b --topology v5e:2x2 --only decode --batch 32 --exit none --tensor 4
    python experiments/aot_check.py huginn_3p5b --topology v5e:2x2 --only serve --batch 64 --exit none --tensor 4

Training: compiles one optimizer step of the preset for the whole topology (all chips share the parameters unless
--data says otherwise) and prints bytes per chip against the limit; the collectives inside each of the
three loops of the recurrence and outside, with a check that nothing in the program was overlooked; FLOPs; and an
ESTIMATE of the time of a step from these counts and the chip's datasheet. --search: the largest microbatch that fits.

Decoding: compiles the token loop of `generate` (adaptive, every row at its own depth) for one chip of the topology, or
for --tensor chips that share the model, for each exit rule. Prints the bytes that a token reads and writes in HBM
beside the least possible, what bounds it, and the tokens/s that this allows. --window: also the parallel sampler
(docs/parallel.md), and what an outer step reads and writes against a token of ordinary decoding.

Serving: compiles the program in which the engine advances its lanes, and prints what a tick (a recurrence of every
lane) and a flush (stopped lanes through coda, sampling and the next prelude) read and write and exchange.

Exits with 2 when something does not fit, saying what to change. Needs the extra `aot`. Two CPU cores take two to four
minutes for each program of the 3.5B model. It proves memory, collectives and copies; never numbers or speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from experiments.aot.decoding import check_decoding, check_window, show_decoding, show_window, window
from experiments.aot.options import Options
from experiments.aot.serving import check_serving, show_serving
from experiments.aot.training import plan_report, train_report
from rdlm.config import InputError, Parallel, RunConfig, preset
from rdlm.perf import hlo
from rdlm.runtime import parse_arguments, run_command


def decode_report(name: str, base: RunConfig, o: Options, devices: list[Any], parallel: Parallel | None) -> None:
    """Check decoding, or the engine, with every exit rule, and decoding in a window."""

    def report(found: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        if o.json:
            print(json.dumps(found), flush=True)
        else:
            show(found)
        if found["peak_gib"] > found["limit_gib"]:
            raise hlo.DoesNotFit(round(found["peak_gib"], 2), found["limit_gib"])

    found: dict[str, Any] = {}
    for rule in o.exit:
        if o.only == "serve":
            report(check_serving(name, base, o, devices, rule), show_serving)
            continue
        found = check_decoding(name, base, o, devices, rule)
        report(found, show_decoding)
    if parallel is not None:
        report(check_window(name, base, o, devices, parallel, found), show_window)


def main() -> int:
    o = parse_arguments(Options, prog="aot_check.py", description=__doc__)
    base = preset(o.preset)
    for field in ("batch", "data", "tensor", "microbatches", "sequence_length"):
        value = getattr(o, field)
        if value is not None and value < 1:
            raise InputError(f"{field} = {value}: must be at least 1")
    if o.only != "train" and not 2 <= o.capacity <= base.model.max_length:
        raise InputError(f"capacity = {o.capacity}: must be 2 .. {base.model.max_length}")
    if o.mean_depth is not None and not 0 < o.mean_depth <= o.num_steps:
        raise InputError(f"mean_depth = {o.mean_depth:g}: must be above 0 and at most num_steps = {o.num_steps}")
    parallel = window(o)
    devices = hlo.tpu_devices(o.topology)
    if o.only in (None, "train"):
        (plan_report if o.remat == "auto" else train_report)(o.preset, base, o, devices, o.batch or 1)
    if o.only != "train":
        decode_report(o.preset, base, o, devices, parallel)
    return 0


if __name__ == "__main__":
    run_command(main)
