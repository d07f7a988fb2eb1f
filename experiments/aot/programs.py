"""What programs that make tokens share: the model's shapes on its chips, and what is said of a program's memory."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.aot import GIB
from experiments.aot.options import Options
from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode.loop import Sizes
from rdlm.decode.requests import Request, RequestOptions, as_requests
from rdlm.model import Params, cast, init_params
from rdlm.model.quantize import quantize
from rdlm.model.tensor_parallel import placement, tensor_mesh, with_heads
from rdlm.perf import flops, hlo


def placed_model(
    config: ModelConfig, options: RequestOptions, policy: CachePolicy, o: Options, devices: list[Any]
) -> tuple[Params, ModelConfig, Request, Sizes]:
    """(Shapes of parameters with their places, config, requests of `batch` rows, sizes of their cache)."""
    mesh = tensor_mesh(o.tensor, there=devices)
    config = with_heads(config, o.tensor)
    request = as_requests(config, [[1]] * (o.batch or 16), 1, options)[0]
    params = bf16_shapes(config)
    if o.weight_dtype:
        params = jax.eval_shape(functools.partial(quantize, config=config, dtype=o.weight_dtype), params)
    placed = jax.tree.map(hlo.specs, params, placement(config, mesh, params))
    return placed, config, request, Sizes(policy, policy.sets(o.num_steps), o.capacity, o.capacity)


def bf16_shapes(config: ModelConfig) -> Params:
    """Shapes of parameters."""
    return jax.eval_shape(lambda: cast(init_params(config, jax.random.key(0)), jnp.bfloat16))


def compiled(params: Params, device: Any, lowered: Any, cache: int) -> tuple[hlo.Program, dict[str, Any]]:
    """Compile a program, and count what it takes of the memory of one of the chips that share the placed `params`."""
    start = time.perf_counter()
    program = hlo.compile_program(lowered)
    return program, {
        "compile_seconds": time.perf_counter() - start,
        "parameters_gib": bytes_on_a_chip(params) / GIB,
        "cache_gib": cache / GIB,
        "updated_in_place_gib": program.shared / GIB,
        "temporaries_gib": program.temporaries / GIB,
        "peak_gib": program.peak / GIB,
        "limit_gib": flops.datasheet(device.device_kind).gib,
        "copies": [[count, shape, looped] for (looped, shape), count in sorted(program.copies(2**23).items())],
    }


def bytes_on_a_chip(params: Params) -> int:
    """Of placed parameters."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))


def matrix_size(o: Options) -> int:
    """Bytes of an element of the blocks' matrices."""
    return 1 if o.weight_dtype else 2


def decoded(name: str, o: Options) -> dict[str, Any]:
    """What is decoded."""
    return {
        "preset": name,
        "topology": o.topology,
        "chips": o.tensor,
        "batch": o.batch or 16,
        "capacity": o.capacity,
        "num_steps": o.num_steps,
        "cache_dtype": o.cache_dtype or "bfloat16",
        "weight_dtype": o.weight_dtype or "bfloat16",
    }


def chips(found: dict[str, Any]) -> str:
    """'one chip' or 'each of 4 chips'."""
    return "one chip" if found["chips"] == 1 else f"each of {found['chips']} chips"


def show_memory(found: dict[str, Any]) -> None:
    """Print what `compiled` found."""
    print(f"  compiled in                {found['compile_seconds']:8.1f} s")
    print(f"  parameters, {found['weight_dtype']:14} {found['parameters_gib']:8.2f} GiB")
    print(f"  cache, {found['cache_dtype']:19} {found['cache_gib']:8.2f} GiB, ", end="")
    print(f"{found['updated_in_place_gib']:.2f} updated in place")
    print(f"  temporaries                {found['temporaries_gib']:8.2f} GiB")
    print(f"  peak                       {found['peak_gib']:8.2f} of {found['limit_gib']} GiB")
    print(f"  copies of 8 MiB or more    {sum(count for count, *_ in found['copies']):8d}")
    for count, shape, looped in found["copies"]:
        print(f"    {count} x {shape} {'in a loop' if looped else 'once'}")
