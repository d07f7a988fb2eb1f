"""Does decoding fit on a TPU, and what would it copy? Compiled for the real chip on a machine that has none.

    python experiments/aot_check.py huginn_3p5b --topology v5e:2x2 --batch-size 16 --capacity 1024 --recurrences 4

Compiles the token loop of `generate` (adaptive, every row at its own depth) for one chip of the topology; prints bytes
per chip against the limit, bytes of the cache, copies of large arrays inside and outside of loops, and the seconds it
took. Exits with 2 when it does not fit, saying what to change. Needs the extra `aot`. Two CPU cores take about two
minutes for the 3.5B model. (Training steps and collectives: to come.)
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from rdlm import aot, exits, flops
from rdlm.config import CachePolicy, InputError, preset
from rdlm.decode.loop import decode_tokens, progress_shapes
from rdlm.decode.requests import as_requests
from rdlm.model import cast, init_params
from rdlm.runtime import parse_arguments, run_command


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    topology: str = "v5e:2x2"
    batch_size: int = 16
    capacity: int = 1024
    """Positions of the cache per row."""
    recurrences: int | None = 4
    """Recurrences whose keys and values are kept; None: all."""
    num_steps: int = 32
    """Most recurrences per token."""
    exit: Literal["none", "kl", "gated_kl", "latent_diff"] = "kl"


def main() -> int:
    args = sys.argv[1:]
    if not args or args[0].startswith("-"):
        if args[:1] in (["-h"], ["--help"]):
            parse_arguments(Options, prog="aot_check.py PRESET", description=__doc__, args=args)
        raise InputError("which preset? For example: python experiments/aot_check.py huginn_3p5b --topology v5e:2x2")
    config = dataclasses.replace(preset(args[0]).model, compute_dtype="bfloat16")
    o = parse_arguments(Options, prog=f"aot_check.py {args[0]}", description=__doc__, args=args[1:])
    device = aot.tpu_devices(o.topology)[0]
    place, policy, B = SingleDeviceSharding(device), CachePolicy(o.recurrences), o.batch_size
    if B < 1 or not 2 <= o.capacity <= config.max_length:
        raise InputError(f"batch_size = {B}, capacity = {o.capacity}: needs at least 1 and 2 .. {config.max_length}")
    rule = None if o.exit == "none" else getattr(exits, o.exit)()
    request = as_requests(config, [[1]] * B, 1, num_steps=o.num_steps, exit_rule=rule)[0]
    params = jax.eval_shape(lambda: cast(init_params(config, jax.random.key(0)), jnp.bfloat16))
    print(f"{args[0]}, decoding {B} x {o.capacity}, {o.num_steps} recurrences, exit {o.exit}, for {o.topology}")
    start = time.perf_counter()
    progress = progress_shapes(params, config, request, policy, policy.sets(o.num_steps), o.capacity)
    params, *rest = aot.specs((params, progress, request, jnp.int32(0), jnp.int32(0)), place)
    program = aot.compile_program(decode_tokens.lower(params, config, *rest, False))
    gib = 2**30
    print(f"  compiled in                {time.perf_counter() - start:8.1f} s")
    print(f"  parameters                 {2 * flops.parameters(config) / gib:8.2f} GiB")
    cached = flops.cache_bytes(config, policy, o.num_steps, B, o.capacity, 2)
    print(f"  cache                      {cached / gib:8.2f} GiB, {program.shared / gib:.2f} updated in place")
    print(f"  temporaries                {program.temporaries / gib:8.2f} GiB")
    limit = aot.limit(device)
    print(f"  peak                       {program.peak / gib:8.2f} of {limit} GiB")
    large = program.copies(least=2**23)
    print(f"  copies of 8 MiB or more    {sum(large.values()):8d}")
    for (looped, shape), count in sorted(large.items()):
        print(f"    {count} x {shape} {'in a loop' if looped else 'once'}")
    if program.peak > limit * gib:
        raise InputError(f"it needs {program.peak / gib:.2f} of {limit} GiB: use a smaller batch_size or capacity")
    return 0


if __name__ == "__main__":
    run_command(main)
