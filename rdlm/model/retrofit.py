"""Recurrent-depth models from the layers of plain transformers (arXiv 2511.07384; docs/retrofit.md)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from rdlm.config import InputError, Loop, ModelConfig, require
from rdlm.model.inputs import check_type, typed_key
from rdlm.model.network import Params
from rdlm.model.quantize import check_float

Adapter = Literal["identity", "random"]

ONCE = Loop(injection="none", start="embedding", bridge=False)
"""Of a plain transformer: all that `mean_recurrence = 1` leaves of it is its layers, one after the other."""

START_STD = (2 / (5 * 5280)) ** 0.5
"""Standard deviation of the initial state in published retrofits of every width: that of the model of width 5,280."""


class Cut(NamedTuple):
    """Which layers of a plain model become which part; `dropped` lie between prelude and core."""

    prelude: range
    dropped: range
    core: range
    coda: range


def cut(layers: int, prelude: int, core: int, coda: int, drop: bool = False) -> Cut:
    """The first `prelude` and the last `core` + `coda` of `layers` layers; those between are dropped.

    Raises:
      InputError: a part of the wrong size, more layers than there are, or some left over without `drop`.
    """
    for name, value, least in (("prelude", prelude, 0), ("core", core, 1), ("coda", coda, 0)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        require(whole, name, value, f"must be an integer of at least {least}")
    total, asked = prelude + core + coda, f"{prelude} + {core} + {coda} layers"
    if total > layers:
        raise InputError(f"{asked}: the model has only {layers}; ask for fewer")
    if total < layers and not drop:
        raise InputError(f"{asked}: the model has {layers}; use all of them, or drop the {layers - total} others")
    first, second = layers - core - coda, layers - coda
    return Cut(range(prelude), range(prelude, first), range(first, second), range(second, layers))


def retrofit(
    params: Params,
    config: ModelConfig,
    *,
    prelude: int,
    core: int,
    coda: int,
    adapter: Adapter = "identity",
    drop: bool = False,
    key: Key[jax.Array, ""] | None = None,
) -> tuple[Params, ModelConfig]:
    """Cut a plain transformer into prelude, core and coda, with a new adapter in front of the core.

    With the adapter [0 I] the core reads e alone. With all layers kept the logits are then the source's at every depth.
    The head is untied, mean_recurrence and backprop_depth are the paper's 32 and 8, and the initial state has the
    standard deviation of the published retrofits.

    Args:
      params, config: a model whose layers run once, with any cut.
      prelude, core, coda: layers of each part.
      adapter: "identity", [0 I]; or "random", uniform within +-1/sqrt(2D), as published.
      drop: leave out the layers between the first `prelude` and the last `core` + `coda`.
      key: of the random adapter; None: key 0.

    Returns:
      (params, config) of the recurrent model. Its layers are the source's arrays, not copies.

    Raises:
      InputError: a model that is recurrent or quantized already, an unknown adapter, or a cut that does not fit.
    """
    check_type("config", config, ModelConfig)
    check_float(params, "retrofit")
    if config.loop != ONCE or config.mean_recurrence != 1:
        raise InputError("config: the model is recurrent already; only a plain one, whose layers run once, can be cut")
    if config.value_tables or config.value_gates:
        raise InputError(
            "config: the model embeds values by token, which belong to its cut; it cannot be cut otherwise"
        )
    require(adapter in ("identity", "random"), "adapter", adapter, "must be 'identity' or 'random'")
    parts = cut(len(config.layers), prelude, core, coda, drop)
    new = {"prelude": parts.prelude, "core": parts.core, "coda": parts.coda}
    kept = {f"{part}_{i}": layer for part, layers in new.items() for i, layer in enumerate(layers)}
    D, wte = config.embed_dim, params["wte"]
    if adapter == "identity":
        weights = jnp.stack([jnp.zeros((D, D), wte.dtype), jnp.eye(D, dtype=wte.dtype)])
    else:
        bound = (2 * D) ** -0.5
        weights = jax.random.uniform(typed_key(key), (2, D, D), jnp.float32, -bound, bound).astype(wte.dtype)
    made = {
        "wte": wte,
        "head": jnp.array(wte) if config.tie_embeddings else params["head"],
        "ln_f": params["ln_f"],
        "adapter": weights,
        **{name: params[config.layers[layer]] for name, layer in kept.items()},
    }
    full = set(config.full_attention_layers)
    return made, dataclasses.replace(
        config,
        prelude_layers=prelude,
        core_layers=core,
        coda_layers=coda,
        full_attention_layers=tuple(i for i, layer in enumerate(kept.values()) if layer in full),
        tie_embeddings=False,
        loop=Loop(bridge=False, start_std=START_STD),
        mean_recurrence=32,
        backprop_depth=8,
    )
