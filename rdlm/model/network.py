"""The network as three pure functions of (params, config): embed, core_step, readout.

The Linen modules declare parameters and do a block's arithmetic; they hold no loop. Parameters are a plain nested dict:
wte [V, D], head [V, D] (untied only), adapter [2, D, D] (state half, embedding half), ln_f, and the blocks
prelude_i, core_i, coda_i. Options of the loop add ln_e (`entry_norm`), C [D, D] (`linear_bridge`) and gate, diagonal
injection makes another adapter, and value embeddings have entries of their own, values_prelude_i, and so on.
With `loop.low_cycles` there are blocks low_i, and low_start [D], where their half of the state begins; the state
[.., 2 D] is that of the core, then theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import DictKey
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, Int32, Key, PyTree

from rdlm.config import ModelConfig
from rdlm.model import split
from rdlm.model.attention import HIDDEN, causal_bias
from rdlm.model.blocks import (
    VALUE_CHANNELS,
    Context,
    LowRank,
    RMSNorm,
    TransformerBlock,
    linear,
    rotary_tables,
    takase_std,
    weight,
)
from rdlm.model.cache import KeyValue
from rdlm.model.kernels import Stored, fits_flash
from rdlm.tune import LORA_A, LORA_B, SCALE

Params = dict[str, PyTree]
ADAPTER = ("adapter", "adapter" + LORA_A, "adapter" + LORA_B)
Layers = tuple[KeyValue, ...]


class RecurrentDepth(nn.Module):
    """Declares all parameters: shapes, initialisers, logical axes. Used by the functions below."""

    config: ModelConfig

    def setup(self):
        """Declare all parameters."""
        cfg = self.config
        std, _ = takase_std(cfg)
        D = cfg.embed_dim
        self.wte = weight(self, "wte", (cfg.rows, D), std, ("vocab", "embed"))
        if not cfg.tie_embeddings:
            self.head = weight(self, "head", (cfg.rows, D), std, ("vocab", "embed"))
        if cfg.loop.injection == "linear":
            self.adapter = weight(self, "adapter", (2, D, D), std, (None, "embed", "heads"))
        if cfg.loop.injection == "diagonal":
            self.adapter = Diagonal(cfg)
        if cfg.loop.linear_bridge:
            self.C = weight(self, "C", (D, D), std, ("embed", "heads"))
        if cfg.loop.entry_norm:
            self.ln_e = RMSNorm(cfg)
        self.values = [
            ValueEmbedding(cfg, i in cfg.value_tables, i in cfg.value_gates, name=f"values_{name}")
            for i, name in enumerate(cfg.layers)
            if i in cfg.value_tables or i in cfg.value_gates
        ]
        if cfg.loop.gate:
            self.gate = Gate(cfg)
        self.prelude = [TransformerBlock(cfg) for _ in range(cfg.prelude_layers)]
        if cfg.low_layers:
            self.low_start = weight(self, "low_start", (D,), 0.0, ("norm",))
        self.low = [TransformerBlock(cfg) for _ in range(cfg.low_layers)]
        self.core = [TransformerBlock(cfg) for _ in range(cfg.core_layers)]
        self.coda = [TransformerBlock(cfg) for _ in range(cfg.coda_layers)]
        self.ln_f = RMSNorm(cfg)

    def __call__(self, x: Float[Array, "B L D"], ctx: Context) -> Float[Array, "B L D"]:
        """Touch every parameter once; used for initialisation only."""
        for values in self.values:
            values()
        if self.config.loop.injection == "diagonal":
            self.adapter()
        if self.config.loop.entry_norm:
            self.ln_e(x)
        for block in (*self.prelude, *self.low, *self.core, *self.coda):
            x, _ = block(x, ctx)
        if self.config.loop.gate:
            self.gate(x)
        return self.ln_f(x)


class Gate(nn.Module):
    """The exit gate: a linear map of the state to one number per token."""

    config: ModelConfig

    @nn.compact
    def __call__(self, s: Float[Array, "*tokens D"]) -> Float32[Array, "*tokens"]:
        """The logit of exiting here, in f32."""
        w = weight(self, "w", (s.shape[-1],), takase_std(self.config)[0], ("norm",))
        bias = weight(self, "bias", (), 0.0, ())
        return s.astype(jnp.float32) @ w.astype(jnp.float32) + bias.astype(jnp.float32)


class Diagonal(nn.Module):
    """Parameters of diagonal injection: A_log [D], dt_bias [D], B [D, D] (arXiv 2604.12946)."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        """Declare them. A new model keeps sqrt(1/5) of the state, and B is the identity."""
        D = self.config.embed_dim
        step = math.log(5) / 2
        weight(self, "A_log", (D,), 0.0, ("norm",))
        weight(self, "dt_bias", (D,), nn.initializers.constant(math.log(math.expm1(step))), ("norm",))
        weight(self, "B", (D, D), lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype), ("embed", "heads"))


class ValueEmbedding(nn.Module):
    """Value embeddings of one layer: table [V, K*Q] and gate [32, K], if it has them."""

    config: ModelConfig
    has_table: bool
    has_gate: bool

    @nn.compact
    def __call__(self) -> None:
        """Declare them."""
        cfg = self.config
        if self.has_table:
            weight(self, "table", (cfg.rows, cfg.kv_heads * cfg.head_dim), 1.0, ("vocab", "embed"))
        if self.has_gate:
            weight(self, "gate", (VALUE_CHANNELS, cfg.kv_heads), takase_std(cfg)[0], (None, "head"))


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Fresh parameters ("takase" in docs/model.md, Initialisation), dtype param_dtype."""
    return nn.unbox(_init(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """For every parameter the names of its logical axes, as a PartitionSpec."""
    boxed = jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))
    return nn.get_partition_spec(boxed)


def _init(config: ModelConfig, key: Array) -> Params:
    x = jnp.zeros((1, 1, config.embed_dim), config.param_dtype)
    return RecurrentDepth(config).init(key, x, context(config, jnp.arange(1), None))["params"]


def compute_dtype(params: Params, config: ModelConfig) -> jnp.dtype:
    """Dtype of activations: config.compute_dtype, or that of the parameters."""
    stored = config.param_dtype if "wte" + SCALE in params else params["wte"].dtype
    return jnp.dtype(config.compute_dtype or stored)


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Every parameter in `dtype`; quantized matrices stay, and so do their scales."""

    def one(path: tuple[DictKey, ...], x: Array | np.ndarray) -> Array | np.ndarray:
        small = x.dtype.itemsize == 1 or path[-1].key.endswith(SCALE)
        return x if small else jnp.asarray(x, dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def context(
    config: ModelConfig,
    positions: Int[Array, "L"] | Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None,
    cached_bias: Float32[Array, "B 1 T"] | None = None,
    flash: bool = False,
    prefix: Int[Array, "B"] | None = None,
) -> Context:
    """What all layers of a pass share: rotary tables of positions, and who sees whom.

    cached_bias: f32 [B, 1, T], the cached tokens there are; token t of the cache has position t.
    flash: for the fused kernel, which takes the segments themselves; lengths it cannot serve get a bias all the same.
    prefix: int [B], tokens at the start of each row that see each other; without windows and the fused kernel.
    """
    if config.full_attention_layers or config.window_rope_base is not None:
        base = config.window_rope_base
        local = full = dataclasses.replace(config, full_attention_layers=(), window_rope_base=None)
        if base is not None:
            local = dataclasses.replace(local, rope_base=base, rope_scaling=None)
        full = dataclasses.replace(full, attention_window=None)
        here = context(local, positions, segment_ids, cached_bias, flash)
        if not config.full_attention_layers:
            return here
        return here._replace(full=context(full, positions, segment_ids, cached_bias, flash))
    window, by_row = config.attention_window, positions if positions.ndim == 2 else positions[None]
    if cached_bias is not None and window is not None:
        near = jnp.arange(cached_bias.shape[-1])[None, None] > by_row[..., None] - window
        cached_bias = cached_bias + jnp.where(near, 0.0, HIDDEN)
    cos, sin = rotary_tables(by_row, config)
    L = positions.shape[-1]
    if flash and fits_flash(L):
        segments = jnp.ones((1, L), jnp.int32) if segment_ids is None else segment_ids
        return Context(cos, sin, None, cached_bias, segments, window=window)
    bias = causal_bias(segment_ids, L, window, prefix)
    return Context(cos, sin, bias, cached_bias, causal=prefix is None)


def positions_of(
    tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None
) -> Int32[Array, "L"] | Int32[Array, "B L"]:
    """Positions that restart at 0 in each segment; the same for all rows without segments."""
    L = tokens.shape[-1]
    index = jnp.arange(L, dtype=jnp.int32)
    if segment_ids is None:
        return index
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    index = index[None]
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def with_values(params: Params, config: ModelConfig, tokens: Int[Array | np.ndarray, "B L"], ctx: Context) -> Context:
    """`ctx` with the value embeddings of its tokens, which are the same in all recurrences: looked up once."""
    if not config.value_layers:
        return ctx
    dtype, found = compute_dtype(params, config), {}
    for name in config.value_layers:
        values = params[f"values_{name}"]
        rows = split.own(split.rows(values["table"], tokens)).astype(dtype)
        found[name] = values["gate"].astype(dtype), rows.reshape(*tokens.shape, config.kv_heads, config.head_dim)
    return ctx._replace(values=found)


def embed(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B L"] | Float[Array, "B L {config.embed_dim}"],
    ctx: Context,
    cached_kv: tuple[Stored, ...] | None = None,
) -> tuple[Float[Array, "B L {config.embed_dim}"], Layers]:
    """Prelude: tokens -> (e, new keys and values per layer).

    Input vectors may take the place of tokens; `vectors` makes those of tokens.
    """
    x = vectors(params, config, tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else jnp.asarray(tokens)
    x, new_kv = _blocks(params, config, "prelude", x, ctx, cached_kv)
    return _norm(params, "ln_e", config, x) if config.loop.entry_norm else x, new_kv


def vectors(
    params: Params, config: ModelConfig, tokens: Int[Array | np.ndarray, "B L"]
) -> Float[Array, "B L {config.embed_dim}"]:
    """What the prelude reads of tokens: their embeddings times `embed_scale`."""
    dtype = compute_dtype(params, config)
    scale = config.embed_dim**0.5 if config.embed_scale is None else config.embed_scale
    rows = split.rows(params["wte"], tokens)
    if (scales := params.get("wte" + SCALE)) is not None:  # of a quantized embedding
        rows = rows.astype(jnp.float32) * split.rows(scales, tokens)
    return rows.astype(dtype) * jnp.asarray(scale, dtype)


def inject(params: Params, config: ModelConfig, e: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
    """What of the injection is the same in all recurrences, such as A_e e. Unused without injection."""
    if config.loop.injection == "linear":
        return split.gathered(linear(e, paired(params, "adapter", lambda x: x[1].astype(e.dtype))))
    if config.loop.injection == "diagonal":
        gain, B = diagonal(params)[1], paired(params["adapter"], "B", lambda x: x.astype(e.dtype))
        return jnp.expand_dims(gain.astype(e.dtype), range(e.ndim - 1)) * split.gathered(linear(e, B))
    return e


def diagonal(params: Params) -> tuple[Float32[Array, "D"], Float32[Array, "D"]]:
    """(decay, gain) of diagonal injection: exp(-d exp(A_log)) and d = softplus(dt_bias)."""
    gain = jax.nn.softplus(params["adapter"]["dt_bias"].astype(jnp.float32))
    return jnp.exp(-gain * jnp.exp(params["adapter"]["A_log"].astype(jnp.float32))), gain


def begin(
    params: Params, config: ModelConfig, e: Float[Array, "*tokens D"]
) -> Float[Array, "*tokens {config.state_dim}"]:
    """The initial state that the prelude's output makes (`loop.start`)."""
    if not config.low_layers:
        return e
    low = jax.lax.stop_gradient(params["low_start"].astype(e.dtype))
    return jnp.concatenate([e, jnp.broadcast_to(low, e.shape)], -1)


def core_step(
    params: Params,
    config: ModelConfig,
    s: Float[Array, "B L {config.state_dim}"],
    injected: Float[Array, "B L {config.embed_dim}"],
    ctx: Context,
    cached_kv: tuple[Stored, ...] | None = None,
    frozen_kv: Layers | None = None,
    active: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L {config.state_dim}"], Layers]:
    """One recurrence, injection and the core blocks: s -> (new s, new keys and values per block that runs).

    Without injection the blocks read s itself; with `loop.close` the final norm follows them. With `loop.low_cycles`
    s is (high, low): low <- low blocks(low + high) so many times, then high <- core blocks(high + low).

    `injected` is `inject(params, config, e)`; `cached_kv`, `frozen_kv`, `active`: as in `blocks.SelfAttention`.
    """
    new_kv: Layers = ()

    def stack(part: str, x: Array) -> Array:
        nonlocal new_kv
        here = slice(len(new_kv), len(new_kv) + config.core_layers)
        layers_kv = cached_kv and cached_kv[here], frozen_kv and frozen_kv[here]
        x, made = _blocks(params, config, part, x, ctx, *layers_kv, active)
        new_kv += made
        return close(params, config, x)

    if not config.low_layers:
        return stack("core", enter(params, config, s, injected)), new_kv
    high, low = jnp.split(s, 2, axis=-1)
    for left in reversed(range(config.loop.low_cycles)):
        low = _backpropagated(config, stack("low", low + high), left, ctx.later)
    return jnp.concatenate([stack("core", high + low), low], -1), new_kv


def _backpropagated(config: ModelConfig, low: Array, left: int, later: Array | int | None) -> Array:
    """What a low call returns: without gradient where more than `low_backprop` calls begin with it.

    left: calls that follow it in its recurrence. later: recurrences that follow, as in `Context`.
    """
    counts = (1, *config.loop.low_backprop)
    if later is None or len(counts) == 1 or left < min(counts):
        return low
    cut = jax.lax.stop_gradient(low)
    if left >= max(counts):
        return cut
    count = jnp.asarray(counts)[jnp.clip(len(counts) - 1 - later, 0, len(counts) - 1)]
    return jnp.where(left < count, low, cut)


def paired(params: Params, name: str, take: Callable[[Array], Array]) -> Float[Array, "D F"] | LowRank:
    """What `take` returns of a matrix, with its low-rank pair if it has one."""
    found = [take(params[beside]) for beside in (name, name + LORA_A, name + LORA_B) if beside in params]
    return found[0] if len(found) == 1 else LowRank(*found)


def enter(
    params: Params, config: ModelConfig, s: Float[Array, "*tokens D"], injected: Float[Array, "*tokens D"]
) -> Float[Array, "*tokens D"]:
    """What the first core block reads."""
    if config.loop.injection == "none":
        return s
    if config.loop.injection == "linear":
        s = split.gathered(linear(s, paired(params, "adapter", lambda x: x[0].astype(s.dtype))))
    if config.loop.injection == "diagonal":
        s = jnp.expand_dims(diagonal(params)[0].astype(s.dtype), range(s.ndim - 1)) * s
    return s + injected


def close(params: Params, config: ModelConfig, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
    """What a stack gives: the output of its last block, after the final norm with `loop.close`."""
    return _final_norm(params, config, x) if config.loop.close else x


def coda(
    params: Params,
    config: ModelConfig,
    s: Float[Array, "B L {config.state_dim}"],
    ctx: Context,
    cached_kv: tuple[Stored, ...] | None = None,
    frozen_kv: Layers | None = None,
    active: Bool[Array, "B L"] | None = None,
) -> tuple[tuple[Float[Array, "B L {config.embed_dim}"], Float[Array, "B L {config.embed_dim}"]], Layers]:
    """Coda: s -> ((y, z), new keys and values); z are the latent states that the coda reads, y goes to the head.

    z = ln_f(s) with `loop.bridge`, C s with `loop.linear_bridge`, else s, of two stacks the core's half. ln_f follows
    the coda, unless it has closed the recurrence already.
    """
    s = s[..., : config.embed_dim]
    z = _final_norm(params, config, s) if config.loop.bridge else s
    z = split.gathered(linear(s, params["C"].astype(s.dtype))) if config.loop.linear_bridge else z
    y, new_kv = _blocks(params, config, "coda", z, ctx, cached_kv, frozen_kv, active)
    return (y if config.loop.close else _final_norm(params, config, y), z), new_kv


def head(params: Params, config: ModelConfig, y: Float[Array, "*tokens D"]) -> Float32[Array, "*tokens {config.rows}"]:
    """y -> logits."""
    name = "wte" if config.tie_embeddings else "head"
    weights = params[name].astype(compute_dtype(params, config))
    out = jnp.einsum("nd,vd->nv", y.reshape(-1, config.embed_dim), weights, preferred_element_type=jnp.float32)
    if (scales := params.get(name + SCALE)) is not None:
        out = out * scales[:, 0][None]
    return split.gathered(out.reshape(*y.shape[:-1], -1))


def known(config: ModelConfig, logits: Float[Array, "*tokens {config.rows}"]) -> Float[Array, "*tokens V"]:
    """Logits of the ids there are: the padding of the vocabulary is no choice, and has no probability."""
    return logits[..., : config.vocab_size]


def readout(
    params: Params, config: ModelConfig, s: Float[Array, "B L {config.state_dim}"], ctx: Context
) -> tuple[Float32[Array, "B L {config.rows}"], Float[Array, "B L {config.embed_dim}"]]:
    """s -> (logits, latents z), without a cache."""
    (y, z), _ = coda(params, config, s, ctx)
    return head(params, config, y), z


def core_names(config: ModelConfig) -> tuple[str, ...]:
    """Entries of the parameters that a recurrence reads, where they are there."""
    adapter = ADAPTER if config.loop.injection in ("linear", "diagonal") else ()
    closing = ("ln_f",) if config.loop.close else ()
    low = (f"low_{j}" for j in range(config.low_layers))
    return (*adapter, *low, *(f"core_{j}" for j in range(config.core_layers)), *closing)


def gate_logit(params: Params, config: ModelConfig, s: Float[Array, "*tokens D"]) -> Float32[Array, "*tokens"] | None:
    """What the exit gate says of a state; None without one."""
    logit: Any = Gate(config).apply({"params": params["gate"]}, s) if config.loop.gate else None
    return logit


def renorm(params: Params, config: ModelConfig, s: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Norm that follows test-time noise: what the core ends with (docs/model.md, Test-time noise)."""
    if config.loop.close:
        halves = s.reshape(*s.shape[:-1], -1, config.embed_dim)
        return _final_norm(params, config, halves).reshape(s.shape)
    last = params[f"core_{config.core_layers - 1}"]
    return _norm(last, "norm_4", config, s) if config.block.norm_output == "sum" else s


def _final_norm(params: Params, config: ModelConfig, x: Array) -> Array:
    return _norm(params, "ln_f", config, x)


def _norm(params: Params, name: str, config: ModelConfig, x: Array) -> Array:
    # A norm without weights is absent. Linen does not know what a module returns.
    out: Any = RMSNorm(config).apply({"params": params.get(name, {})}, x)
    return out


def _blocks(
    params: Params,
    config: ModelConfig,
    part: str,
    x: Float[Array, "B L D"],
    ctx: Context,
    cached_kv: tuple[Stored, ...] | None = None,
    frozen_kv: Layers | None = None,
    active: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L D"], Layers]:
    """The blocks part_0, part_1, ... in order: x -> (x, new keys and values per block)."""
    new_kv = []
    for j in range(getattr(config, f"{part}_layers")):
        layer = ctx.of_layer(config, part, j)

        def run(weights: Params, x: Array, j: int = j, ctx: Context = layer) -> tuple[Array, KeyValue]:
            layer_kv = cached_kv and cached_kv[j], frozen_kv and frozen_kv[j]
            out: Any = TransformerBlock(config).apply({"params": weights}, x, ctx, *layer_kv, active)
            return out

        name = f"{part}_{j}"
        block = ctx.around(name, run) if ctx.around else run
        x, kv = block(params[name], x)
        new_kv.append(kv)
    return x, tuple(new_kv)
