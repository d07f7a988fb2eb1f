"""One optimizer step of a preset for a whole topology: memory, collectives, FLOPs and an estimate of its time."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax.numpy as jnp

from experiments.aot import GIB
from experiments.aot.options import Options
from rdlm.config import InputError, MeshConfig, RunConfig, TuneConfig
from rdlm.perf import flops, hlo
from rdlm.remat import LADDER
from rdlm.train.roofline import lower_train_step, roofline, state_bytes, wire_bytes


def as_run(base: RunConfig, o: Options, chips: int, batch: int) -> RunConfig:
    """The preset on `chips` chips with `batch` sequences per chip and microbatch."""
    copies = chips // o.tensor
    length = o.sequence_length or base.data.sequence_length
    data = dataclasses.replace(
        base.data, batch_size=batch * copies * o.microbatches, microbatches=o.microbatches, sequence_length=length
    )
    if chips % (o.data * o.tensor):
        raise InputError(f"data = {o.data}, tensor = {o.tensor}: their product must divide the {chips} chips")
    mesh = MeshConfig(o.data, chips // (o.data * o.tensor), o.tensor, o.gather, o.gradient_dtype)
    recurrence = dataclasses.replace(base.recurrence, remat=o.remat or base.recurrence.remat)
    model = dataclasses.replace(base.model, compute_dtype="bfloat16")
    return dataclasses.replace(base, model=model, data=data, mesh=mesh, recurrence=recurrence, tune=o.tune)


def check_training(name: str, base: RunConfig, o: Options, devices: list[Any], batch: int) -> dict[str, Any]:
    """Compile one step and count: everything that is printed."""
    run, kind = as_run(base, o, len(devices), batch), devices[0].device_kind
    start = time.perf_counter()
    program = hlo.compile_program(lower_train_step(run, devices))
    model = run.model
    k = model.backprop_depth
    n = model.mean_recurrence + 1 - k
    estimate = roofline(run, program, kind, len(devices), n, k)
    wire = wire_bytes(program, n, k, run.data.microbatches)
    formula = o.microbatches * flops.gathered_once_bytes(model, jnp.dtype(o.gradient_dtype).itemsize)
    told = o.gather == "once" and o.tensor == 1 and run.tune == TuneConfig()
    counts: dict[str, int] = dict.fromkeys((*hlo.LOOPS, "once"), 0)
    kinds: dict[str, int] = {}
    for collective in program.collectives():
        inside = [loop for loop in collective.loops if loop in hlo.LOOPS]
        counts[inside[0] if inside else "once"] += 1
        kinds[collective.kind] = kinds.get(collective.kind, 0) + 1
    return {
        "preset": name,
        "tuned": run.tune != TuneConfig(),
        "topology": o.topology,
        "chips": len(devices),
        "gather": o.gather,
        "gradient_dtype": o.gradient_dtype,
        "remat": run.recurrence.remat,
        "batch_per_chip": batch,
        "sequence_length": run.data.sequence_length,
        "n": n,
        "k": k,
        "compile_seconds": time.perf_counter() - start,
        "peak_gib": program.peak / GIB,
        "state_gib": state_bytes(run, devices) / GIB,
        "state_gib_if_all_learn": state_bytes(dataclasses.replace(run, tune=TuneConfig()), devices) / GIB,
        "limit_gib": flops.datasheet(kind).gib,
        "collectives": counts,
        "collective_kinds": kinds,
        "wire_gib": {loop: size / GIB for loop, size in wire.items()},
        "formula_gib": formula / GIB if told else None,
        "model_tflops": estimate.model_flops / 1e12,
        "recompute": estimate.recompute,
        "seconds": {name: getattr(estimate, name) for name in ("compute", "memory", "interconnect")},
        "bound": estimate.bound,
        "mfu": estimate.mfu,
        "mfu_exposed": estimate.mfu_exposed,
    }


def show_training(found: dict[str, Any]) -> None:
    """Print what `check_training` found."""
    print(
        f"{found['preset']}, training {found['batch_per_chip']} x {found['sequence_length']} tokens per chip and "
        f"microbatch on {found['chips']} chips of {found['topology']}, gather {found['gather']}, remat "
        f"{found['remat']}, gradients summed in {found['gradient_dtype']}"
    )
    print(f"  compiled in                {found['compile_seconds']:8.1f} s")
    print(f"  peak per chip              {found['peak_gib']:8.2f} of {found['limit_gib']} GiB")
    print(f"    of that, kept over steps {found['state_gib']:8.2f} GiB", end="")
    print(f" ({found['state_gib_if_all_learn']:.2f} if all parameters learnt)" if found["tuned"] else "")
    print(f"  one step, n = {found['n']}, k = {found['k']}       collectives   GiB received per chip")
    labels = dict(zip(hlo.LOOPS, ("free recurrences", "gradient, forward", "gradient, backward"), strict=True))
    for loop, count in found["collectives"].items():
        print(f"    {labels.get(loop, 'everything else'):24} {count:8d}      {found['wire_gib'][loop]:10.2f}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["collective_kinds"].items()))
    print(f"    all accounted for: {kinds or 'none'}")
    if found["formula_gib"] is not None:
        ratio = sum(found["wire_gib"].values()) / found["formula_gib"]
        print(f"    by the formula (docs/scale.md) {found['formula_gib']:.2f} GiB; the program: {ratio:.2f} times that")
    print(f"  model FLOPs per chip       {found['model_tflops']:8.1f} T; done: {found['recompute']:.2f} times that")
    times = found["seconds"]
    print("  estimate, from counts and datasheet (not a measurement):")
    print(f"    arithmetic {times['compute']:.2f} s, HBM {times['memory']:.2f} s, chip to chip", end=" ")
    print(f"{times['interconnect']:.2f} s: bound by {found['bound']}")
    print(f"    MFU at most {found['mfu']:.0%} (chip to chip hidden), {found['mfu_exposed']:.0%} (not hidden)")


def plan_report(name: str, base: RunConfig, o: Options, devices: list[Any], batch: int) -> None:
    """A line for every kind of recomputation that `--recurrence.remat auto` may choose.

    Raises:
      InputError: nothing fits.
    """
    fastest: tuple[float, str] | None = None
    if not o.json:
        print("remat      per chip  peak, GiB  arithmetic  HBM  chip to chip, s  MFU: hidden, not hidden")
    for remat in LADDER:
        try:
            found = checked(name, base, dataclasses.replace(o, remat=remat), devices, batch)
        except hlo.DoesNotFit:
            found = None
        if found is None:
            print(f"{remat:10} does not fit", file=sys.stderr if o.json else sys.stdout, flush=True)
            continue
        fastest = max(fastest or (0.0, ""), (found["mfu_exposed"], remat))
        if o.json:
            print(json.dumps(found), flush=True)
            continue
        times = " ".join(f"{found['seconds'][part]:8.2f}" for part in ("compute", "memory", "interconnect"))
        print(
            f"{remat:10} {found['batch_per_chip']:8d} {found['peak_gib']:10.2f} {times} {found['mfu']:15.0%} "
            f"{found['mfu_exposed']:.0%}",
            flush=True,
        )
    if fastest is None:
        raise InputError("the step fits with none of them: use --gather each, --gradient-dtype bfloat16, or more chips")
    if not o.json:
        print(f"the least time by this estimate: --recurrence.remat {fastest[1]}")


def checked(name: str, base: RunConfig, o: Options, devices: list[Any], batch: int) -> dict[str, Any] | None:
    """`check_training` of one batch size, or of the largest; None: not even one sequence per chip fits.

    Raises:
      DoesNotFit: the one batch size does not.
    """
    if not o.search:
        return check_training(name, base, o, devices, batch)
    found: dict[int, dict[str, Any]] = {}

    def peak(batch: int) -> float:
        print(f"  trying {batch} per chip ...", file=sys.stderr, flush=True)
        found[batch] = check_training(name, base, o, devices, batch)
        return found[batch]["peak_gib"]

    largest = hlo.largest_batch(peak, flops.datasheet(devices[0].device_kind).gib, batch)
    return found[largest] if largest else None


def train_report(name: str, base: RunConfig, o: Options, devices: list[Any], batch: int) -> None:
    """Check one batch size, or search for the largest."""
    found = checked(name, base, o, devices, batch)
    if found is None:
        raise InputError(
            "not even one sequence per chip fits: use --gather each, --gradient-dtype bfloat16, or more chips"
        )
    if o.json:
        print(json.dumps(found), flush=True)
        return
    show_training(found)
    if o.search:
        print(f"  largest batch per chip and microbatch: {found['batch_per_chip']}")
