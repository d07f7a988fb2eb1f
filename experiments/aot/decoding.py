"""The token loop of `generate` for each exit rule, and the parallel sampler: what a token reads and writes in HBM."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.aot import GIB
from experiments.aot.options import Exit, Options
from experiments.aot.programs import bf16_shapes, chips, compiled, decoded, matrix_size, placed_model, show_memory
from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig, Parallel, RunConfig, require
from rdlm.decode.loop import Progress, decode_tokens, progress_shapes
from rdlm.decode.parallel import ONE_SET, Wave, advance, open_window, with_rule
from rdlm.decode.program import shapes_on
from rdlm.decode.requests import Request, RequestOptions
from rdlm.model import Params
from rdlm.model.split import share
from rdlm.perf import flops

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


class Work(NamedTuple):
    """What is to be counted of a token loop: its model, its cache, its tokens, and positions of each row at once."""

    params: Params
    config: ModelConfig
    policy: CachePolicy
    cache: int  # bytes on one chip
    tokens: flops.Decoding
    width: int = 1


def decoding_counts(device: Any, lowered: Any, work: Work, o: Options) -> dict[str, Any]:
    """Compile a token loop and count what a token takes on one chip of those that share the model."""
    program, memory = compiled(work.params, device, lowered, work.cache)
    chip = flops.datasheet(device.device_kind)
    config, tokens, moved = work.config, work.tokens, program.decoding_traffic()
    parts = tokens.parts(config, 2, work.policy, matrix_size(o))
    least = {part: size / o.tensor for part, size in parts.items()}
    exchanged = program.decoding_collectives()
    if tokens.checks == 1:  # coda and head run once, with the rest; looking at the state costs little
        least["token"] += least.pop("check")
        moved["recurrence"] += moved.pop("check")
        exchanged["recurrence"] += exchanged.pop("check")
    arithmetic = work.width * tokens.flops(config) / o.tensor / chip.flops
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


def check_decoding(name: str, base: RunConfig, o: Options, devices: list[Any], rule: Exit) -> dict[str, Any]:
    """Compile the token loop and count for one chip: everything that is printed."""
    config, batch = dataclasses.replace(base.model, compute_dtype="bfloat16"), o.batch or 16
    policy = CachePolicy(o.recurrences, dtype=o.cache_dtype)
    options = RequestOptions(num_steps=o.num_steps, exit_rule=exits.named(rule))
    params, placed, progress, request, number = decoding_shapes(config, options, policy, o, devices)
    lowered = decode_tokens.lower(params, placed, progress, request, number, number, False)
    depth = o.num_steps if rule == "none" or o.mean_depth is None else o.mean_depth
    tokens = flops.Decoding(batch, depth, {"kl": depth, "gated_kl": GATED_CHECKS}.get(rule, 1.0), o.capacity)
    cache = flops.cache_bytes(share(placed, o.tensor), policy, o.num_steps, batch, o.capacity, 2)
    found = decoding_counts(devices[0], lowered, Work(params, config, policy, cache, tokens), o)
    return {
        **decoded(name, o),
        "exit": rule,
        "depth": depth,
        "checks": tokens.checks,
        **found,
        "tokens_per_second": batch / found["seconds"][found["bound"]],
    }


def show_decoding(found: dict[str, Any]) -> None:
    """Print what `check_decoding` found."""
    print(
        f"{found['preset']}, decoding {found['batch']} x {found['capacity']}, {found['num_steps']} recurrences, exit "
        f"{found['exit']}, {chips(found)} of {found['topology']}"
    )
    what = f"one token of every row, full cache, {found['depth']:g} recurrences, coda and head {found['checks']:g} x"
    show_counts(found, what)
    print(f"    at most {found['tokens_per_second']:,.0f} tokens/s (from counts and datasheet, not a measurement)")


def window(o: Options) -> Parallel | None:
    """The window, if one was asked for."""
    if o.window is None:
        require(o.inner == 4, "inner", o.inner, "needs --window")
        return None
    require(o.only != "serve", "window", o.window, "is of decoding; leave it out with --only serve")
    require(o.inner <= o.num_steps, "inner", o.inner, f"must be at most num_steps = {o.num_steps}")
    require(bool(o.exit), "exit", o.exit, "--window is compared with ordinary decoding; name a rule, or none")
    return Parallel(window=o.window, inner=o.inner)


def check_window(
    name: str, base: RunConfig, o: Options, devices: list[Any], parallel: Parallel, ordinary: dict[str, Any]
) -> dict[str, Any]:
    """The same for the parallel sampler, and for a token of it against one of `ordinary` decoding."""
    config, batch = dataclasses.replace(base.model, compute_dtype="bfloat16"), o.batch or 16
    options = with_rule(config, parallel, RequestOptions(num_steps=o.num_steps))
    policy = dataclasses.replace(ONE_SET, dtype=o.cache_dtype)
    params, placed, progress, request, number = decoding_shapes(config, options, policy, o, devices)
    window = jax.eval_shape(
        lambda params, *rest: open_window(params, config, rest[0], rest[1], parallel).window, params, progress, request
    )
    wave = Wave(progress, shapes_on(params["wte"].sharding.mesh, window))
    lowered = advance.lower(params, placed, wave, request, number, number, parallel, False)
    cache = flops.cache_bytes(share(placed, o.tensor), policy, o.num_steps, batch, o.capacity, 2)
    tokens = flops.Decoding(batch, parallel.inner, 1.0, o.capacity)
    found = decoding_counts(devices[0], lowered, Work(params, config, policy, cache, tokens, parallel.window), o)
    step, token = found["moved_gib"]["in all"], ordinary["moved_gib"]["in all"]
    return {
        **decoded(name, o),
        "window": parallel.window,
        "inner": parallel.inner,
        **found,
        "tokens_per_step": [{"tokens": n, "gib": step / n, "share": step / n / token} for n in TOKENS_PER_STEP],
        "even_at": step / token,
    }


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
