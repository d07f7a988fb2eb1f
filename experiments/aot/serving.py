"""The program in which the engine advances its lanes: what a tick and a flush read, write and exchange."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.aot import GIB
from experiments.aot.options import Exit, Options
from experiments.aot.programs import bf16_shapes, chips, compiled, decoded, matrix_size, placed_model, show_memory
from rdlm import exits
from rdlm.config import CachePolicy, RunConfig
from rdlm.decode.lanes import Flush, advance, empty_lanes
from rdlm.decode.pages import page_sizes
from rdlm.decode.program import shapes_on
from rdlm.decode.requests import RequestOptions
from rdlm.model.split import share
from rdlm.perf import flops, hlo

SPREAD = 0.8
"""Standard deviation of the logarithm of requests' lengths, where they are counted to share pages."""


def lanes_that_fit(free: float, position: float, lane: float, capacity: int, page: int) -> tuple[int, int]:
    """(Lanes that hold their whole capacity, lanes that share pages) in `free` memory.

    Lengths of requests that share pages are log-normal, with a mean of a quarter of the capacity, which cuts them. They
    count in full, though a request grows to its length only at its end.

    Args:
      position: what the keys and values of one position take of it.
      lane: what a lane takes beside them.
      capacity, page: positions of a lane at most, and of a page.
    """
    lengths = np.random.default_rng(0).lognormal(np.log(capacity / 4) - SPREAD**2 / 2, SPREAD, 10_000)
    held = [np.ceil(np.minimum(length, capacity) / page).mean() * page for length in (capacity, lengths)]
    whole, shared = (max(0, int(free / (positions * position + lane))) for positions in held)
    return whole, shared


def copies_of_pages(program: hlo.Program, page: int) -> int:
    """Operations in loops that put the pages of lanes, of `page` positions, side by side; those of 8 MiB or more."""
    found = program.copies(2**23, ("gather",))
    return sum(count for (looped, shape), count in found.items() if looped and shape.split(",")[-2:-1] == [str(page)])


def check_serving(name: str, base: RunConfig, o: Options, devices: list[Any], rule: Exit) -> dict[str, Any]:
    """Compile the engine's program and count for one chip: everything that is printed."""
    config = dataclasses.replace(base.model, compute_dtype="bfloat16")
    policy = CachePolicy(o.recurrences, dtype=o.cache_dtype)
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
    program, memory = compiled(params, devices[0], lowered, cache)
    copied = copies_of_pages(program, pages.size)
    rest = memory["peak_gib"] - memory["parameters_gib"] - memory["cache_gib"]
    fixed, each = (0.0, rest / lanes) if copied else (rest, 0.0)  # of each lane as many pages as it may have are copied
    free = memory["limit_gib"] - memory["parameters_gib"] - fixed
    position = memory["cache_gib"] / (pages.number * pages.size)
    whole, shared = lanes_that_fit(free, position, each, o.capacity, pages.size)
    size = matrix_size(o)
    tick, flush = (flops.Decoding(n, 1, 1.0, o.capacity).parts(config, 2, policy, size) for n in (lanes, width))
    moved, exchanged = program.decoding_traffic(), program.decoding_collectives()
    return {
        **decoded(name, o),
        "pages": pages.number,
        "page": pages.size,
        "exit": rule,
        **memory,
        "lanes_that_fit": whole,
        "lanes_in_pages": shared,
        "pages_copied": copied,
        "width": width,
        "tick_gib": moved["recurrence"] / GIB,
        "least_tick_gib": tick["recurrence"] / o.tensor / GIB,
        "check_gib": moved["check"] / GIB,
        "flush_gib": moved["token"] / GIB,
        "least_flush_gib": (flush["check"] + flush["token"]) / o.tensor / GIB,
        "collectives": {part: len(found) for part, found in exchanged.items()},
        "least_collectives": (2 * config.core_calls + (config.loop.injection == "linear")) * (o.tensor > 1),
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
    print(f"  copies of pages in loops   {found['pages_copied']:8d}")
    print(f"  lanes that fit, counted    {found['lanes_that_fit']:8d} of {found['capacity']} positions each")
    print(f"    that share pages         {found['lanes_in_pages']:8d} of a quarter of that on average")
    print("                               GiB in HBM   least possible")
    print(f"    a tick, full cache       {found['tick_gib']:11.3f} {found['least_tick_gib']:16.3f}")
    if found["check_gib"]:
        print(f"    a check of the rule      {found['check_gib']:11.3f}")
    flush = f"a flush of {found['width']} lanes"
    print(f"    {flush:24} {found['flush_gib']:11.3f} {found['least_flush_gib']:16.3f}")
    counts = found["collectives"]
    print(f"  collectives                {counts['recurrence']} in a tick, {counts['token']} in a flush", end="")
    print(f", {counts['check']} in a check" if counts["check"] else "", end="")
    print(f"; least possible in a tick {found['least_collectives']}")
    print(
        f"  a tick takes at least {found['tick_seconds'] * 1e3:.2f} ms (from counts and datasheet, not a measurement)"
    )
