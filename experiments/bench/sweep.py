"""Cost of a depth curve relative to its deepest point alone: measured, and by the count of FLOPs.

    python experiments/bench/sweep.py                      # D=256, V=8192, 2/4/2 layers, depths 1 .. 64, f32
    python experiments/bench/sweep.py --depths 1 8 64 --repeats 9

The curve (one unroll, readout and loss at every depth) and the deepest depth alone alternate in one process. Prints the
best repeat of each in wall-clock and in processor time, which a busy machine disturbs less, their ratios, and the ratio
of FLOPs. Hardware: any; two quiet CPU cores take about a minute.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

from rdlm.config import ModelConfig, require
from rdlm.evaluation.depth import depth_curve
from rdlm.model import init_params
from rdlm.perf.flops import forward_flops, sweep_flops
from rdlm.runtime import parse_arguments, run_command
from rdlm.runtime.allocator import reuse_freed_memory


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape and depths."""

    embed_dim: int = 256
    num_heads: int = 8
    mlp_dim: int = 704
    vocab_size: int = 8192
    layers: tuple[int, int, int] = (2, 4, 2)
    """Prelude, core, coda."""
    batch_size: int = 1
    sequence_length: int = 256
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    repeats: int = 5
    """Repeats of each."""
    json: bool = False
    """Print one JSON object instead."""


def measure(options: Options) -> dict[str, float]:
    """Seconds, ratio, and predicted ratio."""
    prelude, core, coda = options.layers
    config = ModelConfig(
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_heads=options.num_heads,
        mlp_dim=options.mlp_dim,
        prelude_layers=prelude,
        core_layers=core,
        coda_layers=coda,
        max_length=options.sequence_length,
    )
    depths = tuple(sorted(set(options.depths)))
    params = init_params(config, jax.random.key(0))
    shape = options.batch_size, options.sequence_length + 1
    rows = np.random.default_rng(0).integers(0, options.vocab_size, shape, np.int32)
    batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    size = np.ones(options.vocab_size, np.int32)
    asked = {"curve": depths, "deepest": depths[-1:]}
    best = dict.fromkeys(asked, float("inf"))
    shortest = dict.fromkeys(asked, float("inf"))
    losses: dict[str, Any] = {}
    for turn in range(options.repeats + 1):  # the first compiles
        for name, which in asked.items():
            start, used = time.perf_counter(), time.process_time()
            losses[name] = depth_curve(params, config, [batch], which, size)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
                shortest[name] = min(shortest[name], time.process_time() - used)
    predicted = sweep_flops(config, depths, options.sequence_length) / forward_flops(
        config, depths[-1], options.sequence_length
    )
    clock, processor = (seconds["curve"] / seconds["deepest"] for seconds in (best, shortest))
    return {
        "curve_seconds": best["curve"],
        "deepest_seconds": best["deepest"],
        "curve_processor_seconds": shortest["curve"],
        "deepest_processor_seconds": shortest["deepest"],
        "predicted_ratio": predicted,
        "ratio_by_the_clock": clock,
        "ratio_of_processor_time": processor,
        "clock_over_predicted": clock / predicted,
        "processor_over_predicted": processor / predicted,
        "loss_difference_at_the_deepest": abs(losses["curve"].nats[-1] - losses["deepest"].nats[0]),
    }


def main() -> None:
    options = parse_arguments(Options, prog="bench_sweep.py", description=__doc__)
    require(bool(options.depths) and min(options.depths) >= 1, "--depths", options.depths, "must be at least 1")
    require(options.repeats >= 1, "--repeats", options.repeats, "must be at least 1")
    reuse_freed_memory()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{jax.devices()[0].device_kind}, {options.batch_size} x {options.sequence_length} tokens,", end=" ")
    print(f"depths {' '.join(map(str, sorted(set(options.depths))))}")
    for name, value in found.items():
        print(f"  {name:32} {value:10.4f}")


if __name__ == "__main__":
    run_command(main)
