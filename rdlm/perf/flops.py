"""Counts from the shape alone: parameters, FLOPs at any depth, cache bytes, and the peak performance of chips."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.model.blocks import VALUE_CHANNELS
from rdlm.model.cache import row_widths, stored_width


class Chip(NamedTuple):
    """Peak performance of a chip, from its datasheet.

    flops: bf16 FLOP/s. memory: HBM bytes/s. interconnect: bytes/s it receives over all its links to other chips.
    gib: GiB of HBM that a program may use, as the compiler counts them. axes: of the torus; a chip has two links each.
    """

    flops: float
    memory: float
    interconnect: float
    gib: float
    axes: int = 3


CHIPS = {
    "TPU v4": Chip(275e12, 1228e9, 300e9, 32),
    "TPU v5 lite": Chip(197e12, 819e9, 200e9, 15.75, axes=2),
    "TPU v5": Chip(459e12, 2765e9, 600e9, 95),
    "TPU v6 lite": Chip(918e12, 1638e9, 448e9, 31.25, axes=2),
    "TPU7x": Chip(2307e12, 7380e9, 1200e9, 94.75),
}
"""Chips by `device_kind`."""

ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def chip(device_kind: str) -> Chip | None:
    """The chip called `device_kind`, if it is known here."""
    return CHIPS.get(ALIASES.get(device_kind, device_kind))


def datasheet(device_kind: str) -> Chip:
    """The chip called `device_kind`.

    Raises:
      InputError: a chip that is not known here.
    """
    found = chip(device_kind)
    if found is None:
        raise InputError(f"{device_kind}: its datasheet is not known; known are {', '.join(CHIPS)}")
    return found


def links(coordinates: Sequence[Sequence[int]], axes: int) -> float:
    """The share of a chip's links that lead to others of its slice, for the chip that has fewest of them.

    coordinates: [x, y, z] of all chips. Along an axis a chip has two neighbours where the slice wraps around (16 chips
    of two axes; 4, 8, ... along all three), and one at the ends where it does not.
    """
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True)][:axes]
    ring = [n == 16 if axes == 2 else all(m % 4 == 0 for m in sizes) for n in sizes]
    return sum(min(n - 1, 2 if closed else 1) for n, closed in zip(sizes, ring, strict=True)) / (2 * axes)


def block_matrices(config: ModelConfig) -> int:
    """Elements of one block's matrices."""
    D, F, H, K, Q = config.embed_dim, config.mlp_dim, config.num_heads, config.kv_heads, config.head_dim
    gates = H * Q * config.block.output_gate
    return D * ((H + 2 * K) * Q + gates) + H * Q * D + (2 + config.block.gated) * D * F


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block: its matrices, norms and biases."""
    block, (H, K, Q) = config.block, (config.num_heads, config.kv_heads, config.head_dim)
    norms = 2 * config.embed_dim * (block.norm_input + (block.norm_output != "none"))
    qk_norms = {"head": 2 * Q, "width": (H + K) * Q}.get(block.qk_norm, 0)
    if block.norm_weight == "none":
        norms = qk_norms = 0
    biases = 2 * H * Q * config.qk_bias + (H + 2 * K) * Q * block.qkv_bias
    return block_matrices(config) + norms + qk_norms + biases


def parameters(config: ModelConfig) -> int:
    """All parameters, a tied embedding counted once (3,564,976,800 for huginn_3p5b)."""
    D = config.embed_dim
    blocks = config.prelude_layers + config.low_layers + config.core_layers + config.coda_layers
    embeddings = config.rows * D * (1 if config.tie_embeddings else 2)
    gate = (D + 1) * config.loop.gate
    norms = D * (1 + config.loop.entry_norm) * (config.block.norm_weight != "none")
    diagonals = 2 * D * (config.loop.injection == "diagonal")
    tables = len(config.value_tables) * config.rows * config.kv_heads * config.head_dim
    gates = gate + len(config.value_gates) * VALUE_CHANNELS * config.kv_heads
    parts = [embeddings, norms, diagonals, tables, gates, D * bool(config.low_layers)]
    return blocks * block_parameters(config) + 2 * _injection(config) + _once(config) + sum(parts)


def _injection(config: ModelConfig) -> int:
    """Elements of one half of the adapter."""
    return config.embed_dim**2 if config.loop.injection == "linear" else 0


def _once(config: ModelConfig) -> int:
    """Elements of the square matrices that meet a token once: B of diagonal injection, and C of a linear bridge."""
    return config.embed_dim**2 * ((config.loop.injection == "diagonal") + config.loop.linear_bridge)


def core_parameters(config: ModelConfig) -> int:
    """Parameters of the blocks of a recurrence, without the adapter (1,581,592,320 for huginn_3p5b)."""
    return (config.low_layers + config.core_layers) * block_parameters(config)


def gathered_once_bytes(config: ModelConfig, gradient_bytes: int = 2) -> int:
    """Bytes that a chip receives in a step of one microbatch when the core is gathered once, by the formula.

    Weights in bfloat16: the core's once, all others once for the forward and once for the backward pass; and the
    gradient of all once, in `gradient_bytes` per parameter. A chip's own part is counted as if it came from others.
    """
    core = core_parameters(config) + 2 * _injection(config)
    every = parameters(config)
    return 2 * (2 * every - core) + gradient_bytes * every


def materialised_parameters(config: ModelConfig, r: float) -> float:
    """Parameters of the unrolled model as the paper counts them: the core r (or r on average) times, adapter once."""
    return parameters(config) + r * config.core_calls * block_parameters(config) - core_parameters(config)


def effective_depth(config: ModelConfig, r: int) -> int:
    """Layers a token passes at r recurrences (132 for huginn_3p5b at r = 32)."""
    return config.prelude_layers + r * config.core_calls + config.coda_layers


def _layer_flops(config: ModelConfig, keys: float) -> float:
    return 2 * block_matrices(config) + 4 * keys * config.num_heads * config.head_dim


def core_flops(config: ModelConfig, keys: float) -> float:
    """Forward FLOPs of one recurrence for one token that attends to `keys` positions, the unsplit adapter included."""
    return config.core_calls * _layer_flops(config, keys) + 4 * _injection(config)


def spared_flops(config: ModelConfig, keys: float) -> tuple[float, float]:
    """Of `core_flops`, what need not be done again: (where attention's inputs and results are stored, where the
    residual sums are). A norm between a product and its sum needs the product again, as does a gate that comes of the
    same product as queries, keys and values.
    """
    D, F, H, K, Q = config.embed_dim, config.mlp_dim, config.num_heads, config.kv_heads, config.head_dim
    attention = 4 * keys * H * Q + (0 if config.block.output_gate else 2 * D * (H + 2 * K) * Q)
    into_sums = 0 if config.block.norm_output == "branch" else 2 * (H * Q + F) * D
    return config.core_calls * attention, config.core_calls * into_sums


def outer_flops(config: ModelConfig, keys: float) -> float:
    """Forward FLOPs of prelude, coda, head and what stands between for one token."""
    layers = config.prelude_layers + config.coda_layers
    return layers * _layer_flops(config, keys) + 2 * config.rows * config.embed_dim + 2 * _once(config)


def forward_flops(config: ModelConfig, r: float, keys: float) -> float:
    """Forward FLOPs per token at r recurrences over `keys` attended positions (the full length, for full attention)."""
    return outer_flops(config, keys) + r * core_flops(config, keys)


def check_flops(config: ModelConfig, keys: float) -> float:
    """FLOPs of one check of an exit rule that reads logits: coda and head for one token."""
    return config.coda_layers * _layer_flops(config, keys) + 2 * config.rows * config.embed_dim


class Cost(NamedTuple):
    """What a token costs on average.

    iterations: recurrences. flops_per_token: forward FLOPs, checks of the exit rule included. equivalent_parameters:
    of the unrolled model, as the paper counts them (the core as often as it runs).
    """

    iterations: float
    flops_per_token: float
    equivalent_parameters: float


def cost(config: ModelConfig, iterations: float, length: int, checks: float = 0.0) -> Cost:
    """Cost of a token at that many recurrences, in a sequence of `length`.

    Attention is counted in full over the length, as the paper counts it. Each check that reads logits costs coda and
    head (`check_flops`), and so does the readout at the end, although it could reuse those of the last check.
    """
    spent = forward_flops(config, iterations, length) + checks * check_flops(config, length)
    return Cost(iterations, spent, materialised_parameters(config, iterations))


def sweep_flops(config: ModelConfig, depths: tuple[int, ...], length: int) -> float:
    """FLOPs per token of a depth curve: the deepest point, and coda and head at every other."""
    return forward_flops(config, depths[-1], length) + (len(depths) - 1) * check_flops(config, length)


def check_bytes(config: ModelConfig, itemsize: int, matrices: int | None = None) -> int:
    """Bytes of weights that such a check streams; against `core_bytes`, its price when decoding waits for memory.

    matrices: bytes of an element of the blocks' matrices where these are quantized. Their scales are not counted.
    """
    head = config.rows * config.embed_dim * itemsize
    return config.coda_layers * block_matrices(config) * (matrices or itemsize) + head


def core_bytes(config: ModelConfig, itemsize: int, matrices: int | None = None) -> int:
    """Bytes of weights that one recurrence streams: core blocks and the state's half of the adapter.

    matrices: as in `check_bytes`.
    """
    return config.core_calls * block_matrices(config) * (matrices or itemsize) + _injection(config) * itemsize


class Decoding(NamedTuple):
    """What one more token costs every row of a batch.

    depth: recurrences that the batch runs. checks: how often it runs coda and head, for an exit rule or at the end.
    capacity: cached positions that a row reads.
    """

    batch: int
    depth: float
    checks: float
    capacity: int

    def parts(
        self, config: ModelConfig, itemsize: int, policy: CachePolicy = CachePolicy(), matrices: int | None = None
    ) -> dict[str, float]:
        """Least bytes read in HBM by one recurrence, by one check, and by the rest ("token").

        Weights are read at every use, by all rows together; a layer's cached keys and values at every use, by each row.
        Less is possible only where the chip's own memory keeps some of it in between. matrices: as in `check_bytes`.
        """
        cached = self.batch * self.capacity * key_value_bytes(config, itemsize, policy)
        layers = config.prelude_layers * (block_matrices(config) * (matrices or itemsize) + cached)
        return {
            "recurrence": core_bytes(config, itemsize, matrices) + config.core_calls * cached,
            "check": check_bytes(config, itemsize, matrices) + config.coda_layers * cached,
            "token": layers + (_injection(config) + _once(config)) * itemsize,
        }

    def total(self, parts: Mapping[str, float]) -> float:
        """Of the whole token: a quantity of one recurrence, one check (if they are counted apart) and the rest."""
        return parts["recurrence"] * self.depth + parts.get("check", 0.0) * self.checks + parts["token"]

    def flops(self, config: ModelConfig) -> float:
        """FLOPs of all rows."""
        once = forward_flops(config, self.depth, self.capacity) - check_flops(config, self.capacity)
        return self.batch * (once + self.checks * check_flops(config, self.capacity))


def training_flops(config: ModelConfig, n: float, k: float, length: float) -> float:
    """Model FLOPs per token of a training step: n forward recurrences, k forward and backward (3x), the rest 3x.

    Attention is counted in full (not causal) and recomputation not at all, as the paper counts its MFU: 190e9 for
    huginn_3p5b at n = 25, k = 8, length 4096.
    """
    return (n + 3 * k) * core_flops(config, length) + 3 * outer_flops(config, length)


def key_value_bytes(config: ModelConfig, itemsize: int, policy: CachePolicy = CachePolicy()) -> int:
    """Bytes of one token's keys and values in one set of one layer (21,120 for huginn_3p5b in bf16).

    itemsize: of the activations, which are stored as they are unless the policy has a dtype.
    """
    return sum(row_widths(config, policy.dtype or "float32")) * (1 if policy.dtype else itemsize)


def cache_bytes(
    config: ModelConfig, policy: CachePolicy, num_steps: int, batch: int, capacity: int, itemsize: int
) -> int:
    """Bytes of the keys and values that `rdlm.model.cache.allocate` makes (depths and lengths not counted).

    itemsize: of the activations, which are stored as they are unless the policy has a dtype.
    """
    slots = config.prelude_layers + config.core_calls * policy.sets(num_steps) + config.coda_layers
    widths = row_widths(config, policy.dtype or "float32")
    return slots * batch * capacity * sum(map(stored_width, widths)) * (1 if policy.dtype else itemsize)


def matmul_peak() -> float:
    """FLOP/s of one device at its best: the datasheet's for known TPUs, the measured ones otherwise."""
    known = chip(jax.devices()[0].device_kind)
    return known.flops if known else measured_matmul_peak()


def measured_matmul_peak(repeats: int = 20) -> float:
    """FLOP/s of a 1024^3 f32 matrix product on the default device: the fastest of `repeats`, excluding compilation."""
    return 2 * 1024**3 / min(matmul_seconds(repeats))


def matmul_seconds(repeats: int) -> list[float]:
    """Seconds of each of `repeats` 1024^3 f32 matrix products run sequentially, excluding compilation."""
    a = jnp.ones((1024, 1024))
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        found.append(time.perf_counter() - start)
    return found
