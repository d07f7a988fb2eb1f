"""The network as three pure functions of (params, config): embed, core_step, readout.

The Linen module only declares parameters and wires blocks; it holds no loop. Parameters are a plain nested dict:
wte [V, D], head [V, D] (untied only), adapter [2, D, D] (state half, embedding half), ln_f, and the blocks
prelude_i, core_i, coda_i.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rdlm.attention import causal_bias
from rdlm.cache import KeyValue
from rdlm.config import ModelConfig
from rdlm.modules import Context, RMSNorm, SandwichBlock, linear, rotary_tables, takase_std, weight

Params = Any
Layers = tuple[KeyValue, ...]


class RecurrentDepth(nn.Module):
    """Prelude, adapter, core, coda and head (spec section 1)."""

    config: ModelConfig

    def setup(self):
        """Declare all parameters."""
        cfg = self.config
        std, _ = takase_std(cfg)
        D = cfg.embed_dim
        self.wte = weight(self, "wte", (cfg.rows, D), std, ("vocab", "embed"))
        if not cfg.tie_embeddings:
            self.head = weight(self, "head", (cfg.rows, D), std, ("vocab", "embed"))
        self.adapter = weight(self, "adapter", (2, D, D), std, (None, "embed", "heads"))
        self.prelude = [SandwichBlock(cfg) for _ in range(cfg.prelude_layers)]
        self.core = [SandwichBlock(cfg) for _ in range(cfg.core_layers)]
        self.coda = [SandwichBlock(cfg) for _ in range(cfg.coda_layers)]
        self.ln_f = RMSNorm(cfg)

    def __call__(self, tokens: Array, ctx: Context) -> Array:
        """Touch every parameter once; used for initialisation only."""
        e, _ = self.embed(tokens, ctx)
        s, _ = self.core_step(e, self.inject(e), ctx)
        return self.logits(self.decode(s, ctx)[0])

    @property
    def dtype(self):
        """Dtype of activations and matrix products."""
        return jnp.dtype(self.config.compute_dtype or self.wte.dtype)

    def embed(self, tokens: Array, ctx: Context, past: Layers | None = None) -> tuple[Array, Layers]:
        """tokens [B, L] -> e [B, L, D] and the prelude's own keys and values."""
        x = self.wte[tokens].astype(self.dtype) * jnp.asarray(self.config.embed_dim**0.5, self.dtype)
        return _blocks(self.prelude, x, ctx, past)

    def inject(self, e: Array) -> Array:
        """The half of the adapter that multiplies e; the same at every recurrence, so computed once."""
        return linear(e, self.adapter[1].astype(e.dtype))

    def core_step(self, s: Array, injected: Array, ctx: Context, past=None, held=None, active=None):
        """One recurrence: A[s; e], then the core blocks."""
        x = linear(s, self.adapter[0].astype(s.dtype)) + injected
        return _blocks(self.core, x, ctx, past, held, active)

    def decode(self, s: Array, ctx: Context, past=None, held=None, active=None):
        """s -> ((y [B, L, D] before the head, z = ln_f(s)), the coda's own keys and values). ln_f serves twice."""
        z = self.ln_f(s)
        y, own = _blocks(self.coda, z, ctx, past, held, active)
        return (self.ln_f(y), z), own

    def logits(self, y_z: tuple[Array, Array]) -> Array:
        """Head: f32 [B, L, V]."""
        head = self.wte if self.config.tie_embeddings else self.head
        y = y_z[0].reshape(-1, self.config.embed_dim)
        out = jnp.einsum("nd,vd->nv", y, head.astype(self.dtype), preferred_element_type=jnp.float32)
        return out.reshape(*y_z[0].shape[:-1], -1)

    def renorm(self, s: Array) -> Array:
        """The last core block's norm_4, with which test-time noise is renormalised (spec section 2)."""
        return self.core[-1].norm_4(s)


def _blocks(blocks, x: Array, ctx: Context, past=None, held=None, active=None) -> tuple[Array, Layers]:
    own = []
    for j, block in enumerate(blocks):
        x, kv = block(x, ctx, past and past[j], held and held[j], active)
        own.append(kv)
    return x, tuple(own)


def _apply(method: str, params: Params, config: ModelConfig, *args: Any) -> Any:
    return RecurrentDepth(config).apply({"params": params}, *args, method=method)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters (spec section 4, "takase", the training implementation's variant), dtype param_dtype."""
    return nn.unbox(_init(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """For every parameter the names of its logical axes, as a PartitionSpec."""
    boxed = jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))
    return nn.get_partition_spec(boxed)


def _init(config: ModelConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return RecurrentDepth(config).init(key, tokens, context(config, jnp.arange(1), None))["params"]


def compute_dtype(params: Params, config: ModelConfig) -> Any:
    """Dtype of activations: config.compute_dtype, or that of the parameters."""
    return jnp.dtype(config.compute_dtype or params["wte"].dtype)


def cast(params: Params, dtype: Any) -> Params:
    """Every parameter in `dtype`."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def context(
    config: ModelConfig, positions: Array, segment_ids: Array | None, past_bias: Array | None = None
) -> Context:
    """What all layers of a pass share: rotary tables of positions int [L] or [B, L], and who sees whom."""
    cos, sin = rotary_tables(positions if positions.ndim == 2 else positions[None], config)
    return Context(cos, sin, causal_bias(segment_ids, positions.shape[-1]), past_bias)


def positions_of(tokens: Array, segment_ids: Array | None) -> Array:
    """Positions that restart at 0 in each segment: int32 [L], or [B, L] with segments."""
    L = tokens.shape[-1]
    index = jnp.arange(L, dtype=jnp.int32)
    if segment_ids is None:
        return index
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    index = index[None]
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def embed(params: Params, config: ModelConfig, tokens: Array, ctx: Context, past: Layers | None = None):
    """Prelude: tokens int [B, L] -> (e [B, L, D], own keys and values per layer)."""
    return _apply("embed", params, config, tokens, ctx, past)


def inject(params: Params, config: ModelConfig, e: Array) -> Array:
    """The loop-invariant half of the adapter, A_e e: [B, L, D]."""
    return _apply("inject", params, config, e)


def core_step(
    params: Params, config: ModelConfig, s: Array, injected: Array, ctx: Context, past=None, held=None, active=None
):
    """One recurrence: s [B, L, D] -> (new s, own keys and values per core layer).

    `injected` is `inject(params, config, e)`. `past`, `held` and `active` as in `rdlm.modules.SelfAttention`.
    """
    return _apply("core_step", params, config, s, injected, ctx, past, held, active)


def decode(params: Params, config: ModelConfig, s: Array, ctx: Context, past=None, held=None, active=None):
    """Coda: s -> ((y, z), own keys and values); z = ln_f(s) are the reference's latent states, y goes to the head."""
    return _apply("decode", params, config, s, ctx, past, held, active)


def head(params: Params, config: ModelConfig, y: Array) -> Array:
    """y [B, L, D] -> logits f32 [B, L, V]."""
    return _apply("logits", params, config, (y, y))


def readout(params: Params, config: ModelConfig, s: Array, ctx: Context) -> tuple[Array, Array]:
    """s [B, L, D] -> (logits f32 [B, L, V], latents z [B, L, D]), without a cache."""
    (y, z), _ = decode(params, config, s, ctx)
    return head(params, config, y), z


def renorm(params: Params, config: ModelConfig, s: Array) -> Array:
    """Norm that follows test-time noise."""
    return _apply("renorm", params, config, s)
