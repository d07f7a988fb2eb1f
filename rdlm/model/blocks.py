"""Linen leaves: parameters with their shapes, initialisers and logical axes, and the arithmetic of one block.

No loops and no state: keys and values come in and go out as arrays. Logical axes ("vocab", "embed", "heads", "mlp")
are what `rdlm.sharding` maps onto mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, PyTree, Shaped

from rdlm.config import ModelConfig
from rdlm.model import split
from rdlm.model.cache import KeyValue
from rdlm.model.kernels import Stored, attend, attend_cached, attend_flash, attend_in_training
from rdlm.model.rounding import from_row, to_row
from rdlm.remat import keep
from rdlm.tune import LORA_A, LORA_B, SCALE

Block = Callable[[dict[str, PyTree], Array], tuple[Array, KeyValue]]


class Context(NamedTuple):
    """What every layer of one pass needs beside activations; the same in all layers and recurrences.

    cos, sin: f32 [B or 1, L, 1, Q/2], rotary tables of the tokens of this pass.
    bias: f32 [B or 1, L, L], who sees whom among them; None where `segments` say it.
    cached_bias: f32 [B, L or 1, T], which cached tokens they see; None without a cache.
    segments: int32 [B or 1, L], for the fused kernel.
    around: around(name, run) wraps run(weights, x), the block `name`: a training step recomputes it in the backward
    pass, or gathers its weights where it runs.
    later: recurrences that follow this one in a training step; None: how far gradients go back does not depend on it.
    training: only reverse-mode gradients are asked for, so kernels whose backward pass is written out may run.
    window: for the fused kernel, tokens that a query sees; None: all before it.
    causal: no token sees a later one.
    rounded: keys and values are rounded as a cache of `CachePolicy.dtype` int8 holds them, before anybody reads them.
    full: for `full_attention_layers`, the same without a window.
    values: for layers with value embeddings, by name: gate [32, K] and the tokens' rows [B, L, K, Q] of the table.
    value: those of one layer, see `of_layer`.
    A context with `around`, `training`, `rounded` or `window`, which are no arrays, stays inside one traced function.
    """

    cos: Array
    sin: Array
    bias: Array | None
    cached_bias: Array | None = None
    segments: Array | None = None
    around: Callable[[str, Block], Block] | None = None
    training: bool = False
    later: Array | int | None = None
    window: int | None = None
    causal: bool = True
    rounded: bool = False
    full: Context | None = None
    values: dict[str, tuple[Array, Array]] | None = None
    value: tuple[Array, Array] | None = None

    def of_layer(self, config: ModelConfig, part: str, j: int) -> Context:
        """What layer j of the prelude, the core or the coda needs."""
        name, ctx = f"{part}_{j}", self
        if self.full is not None and config.layers.index(name) in config.full_attention_layers:
            ctx = self.full._replace(around=self.around, training=self.training, rounded=self.rounded)
        if name not in config.value_layers:
            return ctx
        assert self.values is not None, "network.with_values was not called"
        return ctx._replace(values=None, value=self.values[name])

    def hiding(self, own: Array | None = None, cached: Array | None = None) -> Context:
        """With biases added: `own` to those of this pass's tokens, `cached` to those of cached ones."""
        full = self.full and self.full.hiding(own, cached)
        bias = self.bias if own is None or self.bias is None else self.bias + own
        seen = self.cached_bias if cached is None or self.cached_bias is None else self.cached_bias + cached
        return self._replace(bias=bias, cached_bias=seen, full=full)


def takase_std(config: ModelConfig) -> tuple[float, float]:
    """(std, out std) = sqrt(2/(5D)), and that over sqrt(2 * effective depth) (docs/model.md, Initialisation)."""
    depth = config.prelude_layers + config.coda_layers + config.core_calls * config.mean_recurrence
    std = (2 / (5 * config.embed_dim)) ** 0.5
    return std, std / (2 * depth) ** 0.5


def output_std(config: ModelConfig) -> float:
    """Standard deviation of output projections in a new model."""
    return 0.0 if config.initial_output == "zero" else takase_std(config)[1]


def truncated_normal(std: float):
    """Initialiser: normal of standard deviation `std` before it is cut at +-3 std."""

    def init(key, shape, dtype):
        return (jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32) * std).astype(dtype)

    return init


def rotary_frequencies(config: ModelConfig) -> Float32[np.ndarray, "{config.head_dim//2}"]:
    """rope_base^(-2i/Q), with the roundings of the reference's table, and stretched by `rope_scaling`.

    Made on the host, because one unit in the last place of a frequency turns position 4095 by 2.4e-4.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = (float(config.rope_base) ** exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_length * frequency / (2 * np.pi)  # within the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequency / scaling.factor + kept * frequency).astype(np.float32)


def rotary_tables(
    positions: Int[Array, "*tokens"], config: ModelConfig
) -> tuple[Float32[Array, "*tokens 1 {config.head_dim//2}"], Float32[Array, "*tokens 1 {config.head_dim//2}"]]:
    """cos and sin of position * rope_base^(-2i/Q)."""
    # A plain product: an einsum may become a matrix product, which TPUs round to bf16 by default.
    frequency = jnp.expand_dims(jnp.asarray(rotary_frequencies(config)), range(positions.ndim))
    angle = (positions.astype(jnp.float32)[..., None] * frequency)[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B L H Q"], cos: Float32[Array, "#B L 1 Q//2"], sin: Float32[Array, "#B L 1 Q//2"]
) -> Float[Array, "B L H Q"]:
    """Turn neighbouring pairs (2i, 2i+1) of x by the angles of the tables, in f32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape).astype(x.dtype)


class Quantized(NamedTuple):
    """The matrix w * scale. w [.., D, F] in 8 bits, scale f32 [.., 1, F]."""

    w: Array
    scale: Array


class LowRank(NamedTuple):
    """The matrix w + a b, whose sum is not formed. w [.., D, F], a [.., D, rank], b [.., rank, F]."""

    w: Array | Quantized
    a: Array
    b: Array


def linear(x: Float[Array, "*tokens D"], w: Float[Array, "D F"] | Quantized | LowRank) -> Float[Array, "*tokens F"]:
    """x @ w, as one product over all tokens: on CPUs the batched form takes twice as long to differentiate."""
    if isinstance(w, LowRank):
        return linear(x, w.w) + linear(linear(x, w.a), w.b)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, Quantized):
        # A TPU reads the 8 bits and widens them inside the product; every value of theirs is exact in bf16.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        out = (jnp.matmul(rows, w.w.astype(x.dtype), preferred_element_type=wide) * w.scale).astype(x.dtype)
    else:
        out = rows @ w
    return out.reshape(*x.shape[:-1], out.shape[-1])


def normalise(x: Float[Array, "*tokens D"], scale: Float[Array, "D"] | None, eps: float) -> Float[Array, "*tokens D"]:
    """scale * x / rms(x) over the last axis, statistics in f32. None: without a scale."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    normed = wide.astype(x.dtype)
    return normed if scale is None else normed * jnp.expand_dims(scale, range(x.ndim - 1))


class RMSNorm(nn.Module):
    """w * x / rms(x), with `norm_weight` 1 + w in place of w or no w; statistics in f32 (docs/model.md, Block)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """The normed rows."""
        if self.config.block.norm_weight == "none":
            return normalise(x, None, self.config.norm_eps)
        offset = self.config.block.norm_weight == "offset"
        initial = nn.initializers.zeros if offset else nn.initializers.ones
        scale: Any = self.param(  # the initialiser's box is gone by now
            "scale",
            nn.with_logical_partitioning(initial, ("norm",)),
            (x.shape[-1],),
            jnp.dtype(self.config.param_dtype),
        )
        return normalise(x, scale.astype(x.dtype) + offset if offset else scale.astype(x.dtype), self.config.norm_eps)


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    initial: float | Callable[..., Array],
    axes: tuple[str | None, ...],
    dtype=None,
):
    """Declare a parameter of `module`: shape, initialiser and logical axes in one line, cast to the compute dtype.

    initial: a function of (key, shape, dtype), or the standard deviation of normal values.
    """
    config: ModelConfig = module.config
    init = nn.with_logical_partitioning(initial if callable(initial) else truncated_normal(initial), axes)
    value: Any = module.param(name, init, shape, jnp.dtype(config.param_dtype))
    return value if dtype is None else value.astype(dtype)


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...], dtype):
    """As `weight`, with what the parameters hold beside it: scales (`quantize`), a low-rank pair (`rdlm.tune`)."""
    scale = _beside(module, name + SCALE)
    w: Any = weight(module, name, shape, std, axes, dtype if scale is None else None)
    w = w if scale is None else Quantized(w, scale)
    a, b = _beside(module, name + LORA_A), _beside(module, name + LORA_B)
    return w if a is None or b is None else LowRank(w, a.astype(dtype), b.astype(dtype))


def _beside(module: nn.Module, name: str) -> Array | None:
    return module.get_variable("params", name)


class SelfAttention(nn.Module):
    """Causal self-attention (docs/model.md, Block), over cached tokens too when given."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        ctx: Context,
        cached_kv: Stored | None,
        frozen_kv: KeyValue | None,
        active: Bool[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], KeyValue]:
        """(What attention adds, keys and values [B, L, .] of these tokens).

        Args:
          x: normed input.
          ctx: rotary tables and biases.
          cached_kv: keys and values of cached tokens, seen as far as ctx.cached_bias allows.
          frozen_kv, active: where active is False, a token's keys and values are those of `frozen_kv`, not new ones.
        """
        cfg, dtype = self.config, x.dtype
        B, L, D = x.shape
        H, K, Q = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        G = H // K
        parts = (G, 1, 1, G) if cfg.block.output_gate else (G, 1, 1)
        std = takase_std(cfg)[0]
        # Columns are grouped by key head: G query heads, then their key, their value and their gates. So the one matrix
        # the reference calls Wqkv (its optimizer scales updates per tensor) still splits over devices by whole heads.
        columns = K * sum(parts) * Q
        qkv = linear(x, matrix(self, "qkv", (D, columns), std, ("embed", "heads"), dtype))
        if cfg.block.qkv_bias:
            qkv = qkv + weight(self, "qkv_bias", (columns,), 0.0, ("heads",), dtype)[None, None]
        if cached_kv is not None:
            qkv = jax.lax.optimization_barrier(qkv)  # or a TPU compiler splits the matrix by heads: a padded copy of it
        q, k, v, *gates = jax.lax.split(qkv.reshape(B, L, K, sum(parts), Q), parts, axis=3)
        q, k, v = q.reshape(B, L, H, Q), k[..., 0, :], v[..., 0, :]
        if ctx.value is not None:
            gate, rows = ctx.value
            share = jax.nn.sigmoid(linear(x[..., :VALUE_CHANNELS], gate))
            v = v + 2 * share[..., None] * rows
        if cfg.block.qk_norm in ("head", "width"):
            q, k = self.normed("q_norm", q), self.normed("k_norm", k)
        if cfg.qk_bias:
            bias = weight(self, "qk_bias", (2, H, Q), 0.0, (None, "head", None), dtype)
            q, k = q + bias[None, None, 0], jnp.repeat(k, G, axis=2) + bias[None, None, 1]
        cos, sin = jax.lax.stop_gradient((ctx.cos, ctx.sin))  # or a loop's backward pass works out theirs
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cfg.block.qk_norm == "rotated":
            q, k = (normalise(x, None, float(np.finfo(np.float32).eps)) for x in (q, k))
        if cfg.block.attention_scale is not None:  # attention itself divides by sqrt(Q)
            q = q * jnp.asarray(cfg.block.attention_scale * Q**0.5, dtype)
        Hk = k.shape[2]
        new_kv = KeyValue(*(to_row(x) if ctx.rounded else x.reshape(B, L, -1) for x in (k, v)))
        if frozen_kv is not None and active is not None:
            new_kv = jax.tree.map(lambda new, old: jnp.where(active[..., None], new, old), new_kv, frozen_kv)
        new_k: Any = from_row(new_kv.k, Hk, Q, dtype) if ctx.rounded else new_kv.k.reshape(B, L, Hk, Q)
        new_v: Any = from_row(new_kv.v, K, Q, dtype) if ctx.rounded else new_kv.v.reshape(B, L, K, Q)
        if ctx.bias is None:
            assert ctx.segments is not None
            mixed = attend_flash(q, new_k, new_v, ctx.segments, ctx.window)
        elif cached_kv is None or ctx.cached_bias is None:
            own = q, new_k, new_v, ctx.bias
            mixed = attend_in_training(*own) if ctx.training else attend(*own, ctx.causal)
        else:
            mixed = attend_cached(q, (new_k, new_v, ctx.bias), cached_kv, ctx.cached_bias)
        for gate in gates:
            mixed = mixed * jax.nn.sigmoid(gate.reshape(B, L, H * Q))
        proj = matrix(self, "proj", (H * Q, D), output_std(cfg), ("heads", "embed"), dtype)
        return split.summed(linear(mixed, proj)), new_kv

    def normed(self, name: str, x: Float[Array, "B L H Q"]) -> Float[Array, "B L H Q"]:
        """Queries or keys after their norm."""
        norm = RMSNorm(self.config, name=name)
        if self.config.block.qk_norm == "head":
            return norm(x)
        return split.own(norm(split.gathered(x.reshape(*x.shape[:2], -1)))).reshape(x.shape)


def halves(w: Shaped[Array, "2 D F"] | Quantized | LowRank) -> list[Shaped[Array, "D F"] | Quantized | LowRank]:
    """The two matrices of one parameter. Not indexed: gradients of indexing are padded and added up."""
    if isinstance(w, (Quantized, LowRank)):
        return [type(w)(*half) for half in zip(*map(halves, w), strict=True)]
    return [half[0] for half in jax.lax.split(w, (1, 1))]


VALUE_CHANNELS = 32
"""Channels of a layer's input that the gate of its value embeddings reads."""

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu, "relu2": lambda x: 0.5 * jnp.square(jax.nn.relu(x))}


class MLP(nn.Module):
    """proj(activation(gate) * up); gate and up are the two halves of `fc` (docs/model.md, Block). Not gated: no up."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """What the MLP adds."""
        D, F = x.shape[-1], self.config.mlp_dim
        block, std = self.config.block, takase_std(self.config)[0]
        stacked, axes = ((2,), (None,)) if block.gated else ((), ())
        fc = matrix(self, "fc", (*stacked, D, F), std, (*axes, "embed", "mlp"), x.dtype)
        proj = matrix(self, "proj", (F, D), output_std(self.config), ("mlp", "embed"), x.dtype)
        if not block.gated:
            return split.summed(linear(ACTIVATIONS[block.activation](keep(linear(x, fc), "mlp")), proj))
        into_gate, into_up = halves(fc)
        gate, up = (keep(linear(x, into), "mlp") for into in (into_gate, into_up))
        return split.summed(linear(ACTIVATIONS[block.activation](gate) * up, proj))


class TransformerBlock(nn.Module):
    """Attention and MLP with norms where `config.block` puts them (docs/model.md, Block)."""

    config: ModelConfig

    def setup(self):
        """Declare the submodules."""
        block = self.config.block
        if block.norm_input:
            self.norm_1, self.norm_3 = RMSNorm(self.config), RMSNorm(self.config)
        if block.norm_output != "none":
            self.norm_2, self.norm_4 = RMSNorm(self.config), RMSNorm(self.config)
        self.attn, self.mlp = SelfAttention(self.config), MLP(self.config)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        ctx: Context,
        cached_kv: Stored | None = None,
        frozen_kv: KeyValue | None = None,
        active: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeyValue]:
        """(The residual stream behind the block, new keys and values). Arguments as in `SelfAttention`."""
        block = self.config.block

        def added(x: Array, branch: Array, norm: str) -> Array:
            if block.norm_output == "branch":
                return keep(x + getattr(self, norm)(branch), "sum")
            total = keep(branch + x, "sum")
            return getattr(self, norm)(total) if block.norm_output == "sum" else total

        mixed, new_kv = self.attn(self.norm_1(x) if block.norm_input else x, ctx, cached_kv, frozen_kv, active)
        x = added(x, mixed, "norm_2")
        return added(x, self.mlp(self.norm_3(x) if block.norm_input else x), "norm_4"), new_kv
