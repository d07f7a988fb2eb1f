"""The program in which the engine advances its lanes: what a tick and a flush read, write and exchange."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.aot import GIB
from experiments.aot.options import Exit, Options
from experiments.aot.programs import bf16_shapes, chips, compiled, decoded, placed_model, show_memory
from rdlm import exits
from rdlm.config import CachePolicy, RunConfig
from rdlm.decode.lanes import Flush, advance, empty_lanes
from rdlm.decode.pages import page_sizes
from rdlm.decode.program import shapes_on
from rdlm.decode.requests import RequestOptions
from rdlm.model.split import share
from rdlm.perf import flops


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
    lowered = advance.lower(params, placed, state, told, number, number, Flush(width, 4), False)
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
