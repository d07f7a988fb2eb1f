"""What changes from one chip to 4,096? Depth draws, bytes between chips, checkpoints, failures: simulated.

    python experiments/bench/scale.py huginn_3p5b

Everything here is arithmetic or simulation from the preset's shape, datasheets and the assumptions in the options,
which are not measurements: what a compiled program really holds and sends, experiments/aot_check.py says.
One core takes a few seconds. What it printed, and what follows from it, is in docs/scale.md.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rdlm.config import InputError, RunConfig, preset
from rdlm.perf import flops
from rdlm.recurrence import max_gradient_steps
from rdlm.runtime import parse_arguments, run_command
from rdlm.train import draw_depth

CHIPS = (1, 8, 16, 64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Options:
    """Assumptions."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Such as huginn_3p5b."""
    chip: str = "TPU v5 lite"
    """`device_kind` of the datasheet."""
    chips_per_host: int = 4
    days_between_failures: float = 180.0
    """Of one host: mean time until it takes the run down."""
    restart_seconds: float = 300.0
    """From a failure to the first new step: noticing, starting, restoring, compiling from the cache."""
    write_megabytes: float = 300.0
    """MB/s that one host writes to the bucket."""
    copy_gigabytes: float = 10.0
    """GB/s from the chips of one host into its memory, while training waits."""


def depth_draws(run: RunConfig, steps: int = 20_000) -> None:
    """Cost of a step when all devices share one draw of (n, k), and when every row has its own."""
    n, k = (np.asarray(x, float) for x in jax.vmap(lambda i: draw_depth(run, i))(jnp.arange(steps)))
    length = run.data.sequence_length
    core, outer = flops.core_flops(run.model, length), flops.outer_flops(run.model, length)
    slots = max_gradient_steps(run.model.backprop_depth, run.recurrence.scheme)  # all are computed, for any k
    costs = (n + 3 * slots) * core + 3 * outer
    mean = costs.mean()
    print(
        f"depth draws, {steps:,} steps: n + k = {np.mean(n + k):.1f} on average, 5 % to 95 %: "
        f"{np.percentile(n + k, 5):.0f} to {np.percentile(n + k, 95):.0f}, largest {np.max(n + k):.0f}"
    )
    print(f"  a step costs {np.percentile(costs, 5) / mean:.2f} to {np.percentile(costs, 95) / mean:.2f} of its mean")
    window = costs[: steps // 100 * 100].reshape(-1, 100).mean(1)
    print(f"  mean of 100 steps: within {np.abs(window / mean - 1).max():.1%} of the mean")
    for rows in (256, 4096):
        deepest = np.array([(n + k)[i : i + rows].max() for i in range(0, steps - rows + 1, rows)])
        print(
            f"  own draw per row, {rows} rows: the deepest runs {deepest.mean():.0f}, so a step runs "
            f"{deepest.mean() / np.mean(n + k):.1f} times the mean depth"
        )


def interconnect(run: RunConfig, chip: flops.Chip, sequences: int = 1) -> None:
    """Bytes each chip receives in a step and the time of it, against the arithmetic, by the formula."""
    model = run.model
    length, k = run.data.sequence_length, model.backprop_depth
    n = model.mean_recurrence + 1 - k
    core = 2 * (flops.core_parameters(model) + 2 * model.embed_dim**2)
    rest = 2 * flops.parameters(model) - core
    dense = 2 * flops.materialised_parameters(model, n + k)
    work = sequences * length * flops.training_flops(model, n, k, length) / chip.flops
    # Gathered for the forward and the backward pass, and a gradient returned: three times the weights.
    ways = {
        "gather once": flops.gathered_once_bytes(model),
        "plain FSDP": (n + 2 * k) * core + k * core + 3 * rest,
        "dense, equal FLOPs": 3 * dense,
    }
    print(
        f"bytes between chips, {sequences} x {length} tokens per chip, n = {n}, k = {k}, bf16; "
        f"arithmetic takes {work:.2f} s"
    )
    for name, size in ways.items():
        seconds = size / chip.interconnect
        print(f"  {name:20} {size / 2**30:8.1f} GiB  {seconds:6.2f} s, {seconds / work:6.1%} of the arithmetic")


def checkpoints(run: RunConfig, o: Options) -> None:
    """Size of a checkpoint, how long training waits for it, and how long it is written behind."""
    size = 12 * flops.parameters(run.model)  # parameters and two moments, f32
    print(f"checkpoint: {size / 1e9:.1f} GB")
    for chips in CHIPS:
        hosts = max(chips // o.chips_per_host, 1)
        wait, write = size / hosts / (o.copy_gigabytes * 1e9), size / hosts / (o.write_megabytes * 1e6)
        print(
            f"  {chips:5} chips: {size / hosts / 1e9:7.2f} GB per host, waits {wait:6.2f} s, written in {write:7.1f} s"
        )


def goodput(hosts: int, interval: float, stall: float, o: Options, days: float = 60.0, seed: int = 0) -> float:
    """Share of `days` spent on steps that count, simulated: failures at random, work since the last save is lost."""
    rng = np.random.default_rng(seed)
    rate = hosts / (o.days_between_failures * 86400)
    time, useful, end = 0.0, 0.0, days * 86400
    while time < end:
        alive = rng.exponential(1 / rate)
        saves = int(alive // (interval + stall))
        useful += saves * interval
        time += alive + o.restart_seconds
    return useful / time


def goodput_formula(hosts: int, interval: float, stall: float, o: Options) -> float:
    """The same in expectation, exactly: a save every interval + stall, failures without memory."""
    rate = hosts / (o.days_between_failures * 86400)
    turn = interval + stall
    saves = 1 / np.expm1(rate * turn)  # expected whole turns before a failure
    return float(saves * interval / (1 / rate + o.restart_seconds))


def failures(run: RunConfig, o: Options) -> None:
    """Goodput by the interval between checkpoints."""
    size = 12 * flops.parameters(run.model)
    print(
        f"goodput with a failure per host every {o.days_between_failures:g} days and {o.restart_seconds:g} s to "
        "restart: simulated over 60 days, 50 times (formula)"
    )
    intervals = (60, 300, 900, 3600, 4 * 3600)
    print("   chips  best interval  " + "  ".join(f"{i / 60:>8g} min" for i in intervals))
    for chips in CHIPS:
        hosts = max(chips // o.chips_per_host, 1)
        stall = size / hosts / (o.copy_gigabytes * 1e9)
        best = (2 * stall * o.days_between_failures * 86400 / hosts) ** 0.5  # Young
        cells = []
        for interval in intervals:
            found = np.mean([goodput(hosts, interval, stall, o, seed=seed) for seed in range(50)])
            cells.append(f"{found:.3f} ({goodput_formula(hosts, interval, stall, o):.3f})")
        print(f"  {chips:6} {best / 60:9.1f} min  " + "  ".join(cells))


def main() -> int:
    o = parse_arguments(Options, prog="scale.py", description=__doc__)
    run = preset(o.preset)
    for field in ("chips_per_host", "days_between_failures", "restart_seconds", "write_megabytes", "copy_gigabytes"):
        if getattr(o, field) <= 0:
            raise InputError(f"{field} = {getattr(o, field)}: must be positive")
    depth_draws(run)
    interconnect(run, flops.datasheet(o.chip))
    checkpoints(run, o)
    failures(run, o)
    return 0


if __name__ == "__main__":
    run_command(main)
