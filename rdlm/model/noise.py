"""Test-time noise on the latent state (docs/model.md, Test-time noise)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from rdlm.config import ModelConfig
from rdlm.model.network import Params, renorm

# Keeps the noise of a recurrence apart from the initial state, which uses the same (key, position).
_STREAM = 0x6E6F6973


def noisy(
    params: Params,
    config: ModelConfig,
    s: Float[Array, "B L D"],
    i: Int[Array, ""] | int,
    key: Key[Array, ""] | Key[Array, "#B"],
    positions: Int[Array, "L"] | Int[Array, "#B L"],
) -> Float[Array, "B L D"]:
    """The state as it enters recurrence i (from 0): mixed with noise and renormalised; unchanged when noise is off.

    x(1-n) + xi n with n = t sqrt(0.4), scaled by schedule: geom n/(i+1); sqrt n/sqrt(i+1); line max(n, (R-i)/R);
    chi 2Un with one U per recurrence. xi is a function of (key, recurrence, position).
    """
    if not config.test_time_noise:
        return s
    n: Array | float = config.test_time_noise * 0.4**0.5 * config.start_scale
    keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, _STREAM), i))(key.reshape(-1))
    key = keys.reshape(key.shape)
    kind, R = config.test_time_noise_type, config.mean_recurrence
    if kind == "geom":
        n = n / (i + 1)
    elif kind == "sqrt":
        n = n / jnp.sqrt(i + 1.0)
    elif kind == "line":
        n = jnp.maximum(n, (R - i) / R)
    elif kind == "chi":
        uniform = jax.vmap(jax.random.uniform)(key.reshape(-1)).reshape(*key.shape, *(1,) * (s.ndim - key.ndim))
        n = 2 * n * uniform
    rows = jnp.broadcast_to(key.reshape(-1), (s.shape[0],))
    index = jnp.broadcast_to(positions, s.shape[:2])
    xi = jax.vmap(jax.vmap(lambda k, p: jax.random.normal(jax.random.fold_in(k, p), s.shape[2:]), (None, 0)))(
        rows, index
    )
    mixed = s.astype(jnp.float32) * (1 - n) + xi * n
    return renorm(params, config, mixed.astype(s.dtype))
