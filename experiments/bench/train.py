"""How fast is a training step, against the machine's peak in the same run?

    python experiments/bench/train.py                 # the D=256 shape: 2/4/2 layers, batch 8 x 256, n = k = 8, f32
    python experiments/bench/train.py --remat iteration --batch-size 4

Prints tokens/s, model GFLOP/s (analytic: full attention, unsplit adapter, no recomputation) and their ratio to the
fastest 1024^3 f32 matrix product before and after in the same process, and to what such products reach for a second on
end; the cost of one more free recurrence (n) and of one more with gradient (k), from which step times at other depths
follow, beside a recurrence measured by itself; how far a step half-way lies from the line (1: on it); and what a warm
persistent cache leaves of the time to compile. One program serves every n. Each k is compiled on its own, because a
program for a traced k computes all of its slots.
Hardware: any; 2 CPU cores take about two minutes. Expected there: a ratio of 0.55 or more, see docs/training.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rdlm.config import InputError, ModelConfig, Remat
from rdlm.losses import loss
from rdlm.model import context, core_step, embed, init_params, inject, with_values
from rdlm.perf import flops
from rdlm.perf.flops import matmul_seconds, measured_matmul_peak
from rdlm.runtime import parse_arguments, run_command
from rdlm.runtime.allocator import reuse_freed_memory


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape and depth of the measured step."""

    embed_dim: int = 256
    num_heads: int = 8
    mlp_dim: int = 704
    vocab_size: int = 4096
    layers: tuple[int, int, int] = (2, 4, 2)
    """Prelude, core, coda."""
    batch_size: int = 8
    sequence_length: int = 256
    n: int = 8
    """Recurrences without gradient."""
    k: int = 8
    """Recurrences with gradient."""
    remat: Remat = "none"
    devices: int | None = None
    """CPU devices the batch is split over; None: one per core, as far as they divide it."""
    repeats: int = 5
    """Timed steps at each depth; the fastest counts."""
    json: bool = False
    """Print one JSON object instead of a table."""


MORE = 16
"""Free recurrences added to see what they cost."""


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def sustained_matmul(repeats: int = 150) -> float:
    """FLOP/s of so many 1024^3 f32 matrix products run sequentially; about a second on two CPU cores."""
    return 2 * 1024**3 * repeats / sum(matmul_seconds(repeats))


def core_seconds(config: ModelConfig, params: Any, tokens: jax.Array, repeats: int) -> dict[str, float]:
    """One recurrence by itself, forward, and forward and backward: what the two slopes of a step should be."""
    ctx = context(config, jnp.arange(tokens.shape[1]), None)._replace(training=True)
    ctx = with_values(params, config, tokens, ctx)
    injected = inject(params, config, embed(params, config, tokens, ctx)[0])

    def core(params: Any, injected: jax.Array, s: jax.Array) -> jax.Array:
        return core_step(params, config, s, injected, ctx)[0]

    def pulled(params: Any, injected: jax.Array, s: jax.Array) -> Any:
        out, pull = jax.vjp(core, params, injected, s)
        return pull(out)

    only = {name: x for name, x in params.items() if name.startswith(("core", "adapter"))}
    forward, both = (jax.jit(f) for f in (core, pulled))
    return {
        "seconds_core_forward": fastest(lambda: forward(only, injected, injected), repeats),
        "seconds_core_forward_backward": fastest(lambda: both(only, injected, injected), repeats),
    }


def compile_seconds(lower: Callable[[], Any]) -> tuple[float, float]:
    """Seconds to compile what `lower` returns with an empty persistent cache, and with one that holds it."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        found = []
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()
            lowered = lower()
            start = time.perf_counter()
            lowered.compile()
            found.append(time.perf_counter() - start)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    return found[0], found[1]


def measure(options: Options) -> dict[str, float]:
    """All figures of one run."""
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
        mean_recurrence=max(options.n + options.k, 1),
        backprop_depth=max(options.k, 1),
    )
    params = init_params(config, jax.random.key(0))
    rows = jax.random.randint(
        jax.random.key(1), (options.batch_size, options.sequence_length + 1), 0, options.vocab_size
    )
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    # Rows are an argument: captured, they would lose their split, and every device would work on all of them.
    step: Any = jax.jit(  # its cache size is not part of its type
        jax.value_and_grad(lambda p, rows, n, k: loss(p, config, rows, steps=(n, k), remat=options.remat)),
        static_argnums=3,
    )

    def seconds(n: int, k: int) -> float:
        return fastest(lambda: step(params, rows, jnp.int32(n), k), options.repeats)

    cold, warm = compile_seconds(lambda: step.lower(params, rows, jnp.int32(options.n), options.k))
    before, sustained = measured_matmul_peak(), sustained_matmul()
    full = seconds(options.n, options.k)
    sustained = max(sustained, sustained_matmul())
    more_n, most_n = (seconds(options.n + more, options.k) for more in (MORE // 2, MORE))
    half_k, no_k = seconds(options.n, options.k // 2), seconds(options.n, 0)
    best = max(before, measured_matmul_peak())
    tokens = options.batch_size * options.sequence_length
    work = tokens * flops.training_flops(config, options.n, options.k, options.sequence_length)
    return {
        "seconds_per_step": full,
        "tokens_per_second": tokens / full,
        "model_gflops": work / full / 1e9,
        "matmul_gflops": best / 1e9,
        "ratio": work / full / best,
        "matmul_gflops_sustained": sustained / 1e9,
        "ratio_sustained": work / full / sustained,
        "seconds_per_free_recurrence": (most_n - full) / MORE,
        "seconds_per_gradient_recurrence": (full - no_k) / options.k if options.k else 0.0,
        "half_way_in_n": 2 * more_n / (full + most_n),
        "half_way_in_k": half_k / (no_k + (full - no_k) * (options.k // 2) / options.k) if options.k else 1.0,
        **core_seconds(config, params, rows[:, :-1], options.repeats),
        "compiled_programs": step._cache_size(),
        "compile_seconds_cold": cold,
        "compile_seconds_warm_share": warm / cold,
    }


def main() -> None:
    reuse_freed_memory()
    options = parse_arguments(Options, prog="bench_train.py", description=__doc__)
    for field, minimum in {"n": 0, "k": 0, "batch_size": 1, "sequence_length": 1, "repeats": 1}.items():
        if (value := getattr(options, field)) < minimum:
            raise InputError(f"{field} = {value}: must be at least {minimum}")
    if options.devices is not None and (options.devices < 1 or options.batch_size % options.devices):
        raise InputError(f"devices = {options.devices}: must divide batch_size = {options.batch_size}")
    devices = options.devices or math.gcd(os.cpu_count() or 1, options.batch_size)
    jax.config.update("jax_num_cpu_devices", devices)
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{jax.devices()[0].device_kind}, {options.batch_size} x {options.sequence_length} tokens,", end=" ")
    print(f"n = {options.n}, k = {options.k}, remat {options.remat}, {devices} devices")
    for name, value in found.items():
        print(f"  {name:34} {value:12,.3f}")


if __name__ == "__main__":
    run_command(main)
