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

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from rdlm import exits
from rdlm.config import (
    CachePolicy,
    Gather,
    InputError,
    MeshConfig,
    ModelConfig,
    Parallel,
    Remat,
    RunConfig,
    TuneConfig,
    preset,
    require,
)
from rdlm.decode.lanes import Flush, empty_lanes
from rdlm.decode.lanes import advance as engine_step
from rdlm.decode.loop import Progress, Sizes, decode_tokens, progress_shapes
from rdlm.decode.pages import page_sizes
from rdlm.decode.parallel import ONE_SET, Wave, advance, open_window, with_rule
from rdlm.decode.program import shapes_on
from rdlm.decode.requests import Request, RequestOptions, as_requests
from rdlm.model import Params, cast, init_params
from rdlm.model.split import share
from rdlm.model.tensor_parallel import placement, tensor_mesh, with_heads
from rdlm.perf import flops, hlo
from rdlm.remat import LADDER
from rdlm.runtime import parse_arguments, run_command
from rdlm.train.roofline import lower_train_step, roofline, state_bytes, wire_bytes

GIB = 2**30
Exit = Literal["none", "kl", "gated_kl", "latent_diff"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Such as huginn_3p5b."""
    topology: str = "v5e:2x2"
    only: Literal["train", "decode", "serve"] | None = None
    """One of these; None: train and decode."""
    batch: int | None = None
    """Sequences: training, per chip and microbatch (None: 1); decoding, rows (None: 16); serving, lanes (None: 16)."""
    # Training
    data: int = 1
    """Copies of the parameters."""
    tensor: int = 1
    """Chips that share a sequence, also in decoding."""
    gather: Gather = "once"
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat | None = None
    """None: the preset's; auto: compiles the step with each that it may choose, and shows what a step takes."""
    microbatches: int = 1
    sequence_length: int | None = None
    """None: the preset's."""
    search: bool = False
    """Find the largest batch per chip and microbatch that fits (several programs)."""
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    """Which parameters learn."""
    json: bool = False
    """Print one JSON object per program instead of text."""
    # Decoding
    cache_tokens: int | None = None
    """Positions that all lanes share, for serving; None: as many as every lane's capacity needs."""
    capacity: int = 1024
    """Positions of the cache per row."""
    recurrences: int | None = 4
    """Recurrences whose keys and values are kept; None: all."""
    num_steps: int = 32
    """Maximum recurrences per token."""
    exit: tuple[Exit, ...] = ("kl",)
    """Exit rules; each is a program of its own."""
    mean_depth: float | None = None
    """Recurrences that the batch runs for a token, in the estimate; None: num_steps, as always with exit none."""
    window: int | None = None
    """Unfinished positions of the parallel sampler, compiled too and compared with the last exit rule; None: no."""
    inner: int = 4
    """Recurrences of its outer steps."""


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


GATED_CHECKS = 2.0
"""How often a token under a gated rule runs coda and head for it (docs/decoding.md)."""
TOKENS_PER_STEP = (0.25, 0.5, 0.75, 1.0)
"""Tokens that an outer step may make final; with one position entering per step it is one at most, in the long run."""


class Shapes(NamedTuple):
    """What a token loop needs, as shapes with a place. config: of the model as it is placed."""

    params: Params
    config: ModelConfig
    progress: Progress
    request: Request
    number: jax.ShapeDtypeStruct  # int32


def decoding_shapes(
    config: ModelConfig, options: RequestOptions, policy: CachePolicy, o: Options, devices: list[Any]
) -> Shapes:
    """Those of `batch` rows, on one chip or on the first `tensor`."""
    params, config, request, sizes = placed_model(config, options, policy, o, devices)
    local = share(config, o.tensor)
    progress = progress_shapes(bf16_shapes(local), local, request, sizes)
    return Shapes(params, config, *shapes_on(params["wte"].sharding.mesh, (progress, request, jnp.int32(0))))


def placed_model(
    config: ModelConfig, options: RequestOptions, policy: CachePolicy, o: Options, devices: list[Any]
) -> tuple[Params, ModelConfig, Request, Sizes]:
    """(Shapes of parameters with their places, config, requests of `batch` rows, sizes of their cache)."""
    mesh = tensor_mesh(o.tensor, there=devices)
    config = with_heads(config, o.tensor)
    request = as_requests(config, [[1]] * (o.batch or 16), 1, options)[0]
    params = bf16_shapes(config)
    placed = jax.tree.map(hlo.specs, params, placement(config, mesh, params))
    return placed, config, request, Sizes(policy, policy.sets(o.num_steps), o.capacity, o.capacity)


def bf16_shapes(config: ModelConfig) -> Params:
    """Shapes of parameters."""
    return jax.eval_shape(lambda: cast(init_params(config, jax.random.key(0)), jnp.bfloat16))


class Work(NamedTuple):
    """What is to be counted of a token loop: its cache on one chip, its tokens, and positions of each row at once."""

    cache: int  # bytes
    tokens: flops.Decoding
    width: int = 1


def compiled(
    config: ModelConfig, device: Any, lowered: Any, cache: int, chips: int
) -> tuple[hlo.Program, dict[str, Any]]:
    """Compile a program, and count what it takes of the memory of one of `chips`, which share the model `config`."""
    start = time.perf_counter()
    program = hlo.compile_program(lowered)
    return program, {
        "compile_seconds": time.perf_counter() - start,
        "parameters_gib": 2 * flops.parameters(config) / chips / GIB,
        "cache_gib": cache / GIB,
        "updated_in_place_gib": program.shared / GIB,
        "temporaries_gib": program.temporaries / GIB,
        "peak_gib": program.peak / GIB,
        "limit_gib": flops.datasheet(device.device_kind).gib,
        "copies": [[count, shape, looped] for (looped, shape), count in sorted(program.copies(2**23).items())],
    }


def decoding_counts(config: ModelConfig, device: Any, lowered: Any, work: Work, chips: int) -> dict[str, Any]:
    """Compile a token loop and count what a token takes on one of `chips`, which share the model `config`."""
    program, memory = compiled(config, device, lowered, work.cache, chips)
    chip = flops.datasheet(device.device_kind)
    tokens, moved = work.tokens, program.decoding_traffic()
    least = {part: size / chips for part, size in tokens.parts(config, 2).items()}
    exchanged = program.decoding_collectives()
    if tokens.checks == 1:  # coda and head run once, with the rest; looking at the state costs little
        least["token"] += least.pop("check")
        moved["recurrence"] += moved.pop("check")
        exchanged["recurrence"] += exchanged.pop("check")
    arithmetic = work.width * tokens.flops(config) / chips / chip.flops
    seconds = {"HBM": tokens.total(moved) / chip.memory, "arithmetic": arithmetic}
    return {
        **memory,
        "moved_gib": {part: size / GIB for part, size in moved.items()} | {"in all": tokens.total(moved) / GIB},
        "least_gib": {part: size / GIB for part, size in least.items()} | {"in all": tokens.total(least) / GIB},
        "collectives": {part: len(found) for part, found in exchanged.items()},
        "wire_gib": tokens.total({part: sum(x.wire for x in found) for part, found in exchanged.items()}) / GIB,
        "seconds": seconds,
        "bound": max(seconds, key=lambda what: seconds[what]),
    }


def decoded(name: str, o: Options) -> dict[str, Any]:
    """What is decoded."""
    return {
        "preset": name,
        "topology": o.topology,
        "chips": o.tensor,
        "batch": o.batch or 16,
        "capacity": o.capacity,
        "num_steps": o.num_steps,
    }


def check_decoding(name: str, base: RunConfig, o: Options, devices: list[Any], rule: Exit) -> dict[str, Any]:
    """Compile the token loop and count for one chip: everything that is printed."""
    config, batch = dataclasses.replace(base.model, compute_dtype="bfloat16"), o.batch or 16
    policy = CachePolicy(o.recurrences)
    options = RequestOptions(num_steps=o.num_steps, exit_rule=exits.named(rule))
    params, placed, progress, request, number = decoding_shapes(config, options, policy, o, devices)
    lowered = decode_tokens.lower(params, placed, progress, request, number, number, False)
    depth = o.num_steps if rule == "none" or o.mean_depth is None else o.mean_depth
    tokens = flops.Decoding(batch, depth, {"kl": depth, "gated_kl": GATED_CHECKS}.get(rule, 1.0), o.capacity)
    cache = flops.cache_bytes(share(placed, o.tensor), policy, o.num_steps, batch, o.capacity, 2)
    found = decoding_counts(config, devices[0], lowered, Work(cache, tokens), o.tensor)
    return {
        **decoded(name, o),
        "exit": rule,
        "depth": depth,
        "checks": tokens.checks,
        **found,
        "tokens_per_second": batch / found["seconds"][found["bound"]],
    }


def check_window(
    name: str, base: RunConfig, o: Options, devices: list[Any], parallel: Parallel, ordinary: dict[str, Any]
) -> dict[str, Any]:
    """The same for the parallel sampler, and for a token of it against one of `ordinary` decoding."""
    config, batch = dataclasses.replace(base.model, compute_dtype="bfloat16"), o.batch or 16
    options = with_rule(config, parallel, RequestOptions(num_steps=o.num_steps))
    params, placed, progress, request, number = decoding_shapes(config, options, ONE_SET, o, devices)
    window = jax.eval_shape(
        lambda params, *rest: open_window(params, config, rest[0], rest[1], parallel).window, params, progress, request
    )
    wave = Wave(progress, shapes_on(params["wte"].sharding.mesh, window))
    lowered = advance.lower(params, placed, wave, request, number, number, parallel, False)
    cache = flops.cache_bytes(share(placed, o.tensor), ONE_SET, o.num_steps, batch, o.capacity, 2)
    work = Work(cache, flops.Decoding(batch, parallel.inner, 1.0, o.capacity), parallel.window)
    found = decoding_counts(config, devices[0], lowered, work, o.tensor)
    step, token = found["moved_gib"]["in all"], ordinary["moved_gib"]["in all"]
    return {
        **decoded(name, o),
        "window": parallel.window,
        "inner": parallel.inner,
        **found,
        "tokens_per_step": [{"tokens": n, "gib": step / n, "share": step / n / token} for n in TOKENS_PER_STEP],
        "even_at": step / token,
    }


def chips(found: dict[str, Any]) -> str:
    """'one chip' or 'each of 4 chips'."""
    return "one chip" if found["chips"] == 1 else f"each of {found['chips']} chips"


def check_serving(name: str, base: RunConfig, o: Options, devices: list[Any], rule: Exit) -> dict[str, Any]:
    """Compile the engine's program and count for one chip: everything that is printed."""
    config, policy = dataclasses.replace(base.model, compute_dtype="bfloat16"), CachePolicy(o.recurrences)
    options = RequestOptions(num_steps=o.num_steps, exit_rule=exits.named(rule))
    params, placed, request, sizes = placed_model(config, options, policy, o, devices)
    lanes, local = o.batch or 16, share(placed, o.tensor)
    pages = page_sizes(lanes, o.capacity, tokens=o.cache_tokens, platform="tpu")
    state = jax.eval_shape(lambda p, r: empty_lanes(p, local, r, sizes, pages), bf16_shapes(local), request)
    mesh = params["wte"].sharding.mesh
    state, told, number = shapes_on(mesh, (state, jnp.zeros(lanes, jnp.int32), jnp.int32(0)))
    width = max(1, lanes // 4)
    lowered = engine_step.lower(params, placed, state, told, number, number, Flush(width, 4), False)
    cache = flops.cache_bytes(local, policy, o.num_steps, *pages, 2)
    program, memory = compiled(config, devices[0], lowered, cache, o.tensor)
    tick, flush = (flops.Decoding(n, 1, 1.0, o.capacity).parts(config, 2) for n in (lanes, width))
    moved, exchanged = program.decoding_traffic(), program.decoding_collectives()
    return {
        **decoded(name, o),
        "pages": pages.number,
        "page": pages.size,
        "exit": rule,
        **memory,
        "width": width,
        "tick_gib": moved["recurrence"] / GIB,
        "least_tick_gib": tick["recurrence"] / o.tensor / GIB,
        "check_gib": moved["check"] / GIB,
        "flush_gib": moved["token"] / GIB,
        "least_flush_gib": (flush["check"] + flush["token"]) / o.tensor / GIB,
        "collectives": {part: len(found) for part, found in exchanged.items()},
        "tick_seconds": moved["recurrence"] / flops.datasheet(devices[0].device_kind).memory,
    }


def show_serving(found: dict[str, Any]) -> None:
    """Print what `check_serving` found."""
    print(
        f"{found['preset']}, {found['batch']} lanes x {found['capacity']}, {found['num_steps']} recurrences, exit "
        f"{found['exit']}, {chips(found)} of {found['topology']}"
    )
    print(f"  cache in {found['pages']} pages of {found['page']} positions")
    show_memory(found)
    print("                               GiB in HBM   least possible")
    print(f"    a tick, full cache       {found['tick_gib']:11.3f} {found['least_tick_gib']:16.3f}")
    if found["check_gib"]:
        print(f"    a check of the rule      {found['check_gib']:11.3f}")
    flush = f"a flush of {found['width']} lanes"
    print(f"    {flush:24} {found['flush_gib']:11.3f} {found['least_flush_gib']:16.3f}")
    counts = found["collectives"]
    print(f"  collectives                {counts['recurrence']} in a tick, {counts['token']} in a flush", end="")
    print(f", {counts['check']} in a check" if counts["check"] else "")
    print(
        f"  a tick takes at least {found['tick_seconds'] * 1e3:.2f} ms (from counts and datasheet, not a measurement)"
    )


def show_decoding(found: dict[str, Any]) -> None:
    """Print what `check_decoding` found."""
    print(
        f"{found['preset']}, decoding {found['batch']} x {found['capacity']}, {found['num_steps']} recurrences, exit "
        f"{found['exit']}, {chips(found)} of {found['topology']}"
    )
    what = f"one token of every row, full cache, {found['depth']:g} recurrences, coda and head {found['checks']:g} x"
    show_counts(found, what)
    print(f"    at most {found['tokens_per_second']:,.0f} tokens/s (from counts and datasheet, not a measurement)")


def show_window(found: dict[str, Any]) -> None:
    """Print what `check_window` found."""
    print(
        f"{found['preset']}, decoding {found['batch']} x {found['capacity']}, {found['num_steps']} recurrences, window "
        f"{found['window']}, {chips(found)} of {found['topology']}"
    )
    show_counts(found, f"one outer step of every row, full cache, {found['inner']} recurrences, coda and head 1 x")
    print("  tokens that an outer step makes final    GiB in HBM per token   of ordinary decoding's")
    for row in found["tokens_per_step"]:
        print(f"    {row['tokens']:<36} {row['gib']:23.2f} {row['share']:24.0%}")
    print(f"    less than ordinary decoding from {found['even_at']:.2f} tokens on")


def show_memory(found: dict[str, Any]) -> None:
    """Print what `compiled` found."""
    print(f"  compiled in                {found['compile_seconds']:8.1f} s")
    print(f"  parameters                 {found['parameters_gib']:8.2f} GiB")
    print(f"  cache                      {found['cache_gib']:8.2f} GiB, ", end="")
    print(f"{found['updated_in_place_gib']:.2f} updated in place")
    print(f"  temporaries                {found['temporaries_gib']:8.2f} GiB")
    print(f"  peak                       {found['peak_gib']:8.2f} of {found['limit_gib']} GiB")
    print(f"  copies of 8 MiB or more    {sum(count for count, *_ in found['copies']):8d}")
    for count, shape, looped in found["copies"]:
        print(f"    {count} x {shape} {'in a loop' if looped else 'once'}")


def show_counts(found: dict[str, Any], what: str) -> None:
    """Print what `decoding_counts` found for `what`."""
    show_memory(found)
    print(f"  {what}")
    print("                               GiB in HBM   least possible")
    for part, size in found["moved_gib"].items():
        print(f"    {part:24} {size:11.3f} {found['least_gib'][part]:16.3f}")
    print(f"    {found['moved_gib']['in all'] / found['least_gib']['in all']:.2f} times the least possible")
    if found["chips"] > 1:
        counts = ", ".join(f"{count} in a {part}" for part, count in found["collectives"].items())
        print(f"  collectives                {counts}; {found['wire_gib'] * 1024:.1f} MiB received per token")
    times = found["seconds"]
    print(
        f"  bound by {found['bound']}: HBM {times['HBM'] * 1e3:.2f} ms, arithmetic {times['arithmetic'] * 1e3:.2f} ms"
    )


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


def window(o: Options) -> Parallel | None:
    """The window, if one was asked for."""
    if o.window is None:
        require(o.inner == 4, "inner", o.inner, "needs --window")
        return None
    require(o.only != "serve", "window", o.window, "is of decoding; leave it out with --only serve")
    require(o.inner <= o.num_steps, "inner", o.inner, f"must be at most num_steps = {o.num_steps}")
    require(bool(o.exit), "exit", o.exit, "--window is compared with ordinary decoding; name a rule, or none")
    return Parallel(window=o.window, inner=o.inner)


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
