"""Path independence: do different initial states lead a token to the same limit?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Float64

from rdlm.analysis.capture import capture
from rdlm.config import InputError, ModelConfig
from rdlm.model import Params, check_tokens, compute_dtype
from rdlm.recurrence import initial_state


def from_starts(
    params: Params, config: ModelConfig, tokens: Array | np.ndarray, r: int, starts: int = 5
) -> Float32[np.ndarray, "{r+1} {starts} L D"]:
    """States of one text int [L] from N = `starts` initial states: noise of N - 1 keys, and zero.

    Raises:
      InputError: fewer than 2 starts, tokens of another rank, or as `capture`.
    """
    if starts < 2:
        raise InputError(f"starts = {starts}: at least two are needed to compare")
    if np.ndim(tokens) != 1:
        raise InputError(f"tokens: expected integers [L], got shape {list(np.shape(tokens))}")
    rows = check_tokens(np.broadcast_to(np.asarray(tokens), (starts, np.shape(tokens)[0])), config)
    keys, positions = jax.random.split(jax.random.key(0), starts - 1), jnp.arange(rows.shape[1])
    noise = initial_state(keys, positions, config.state_dim, compute_dtype(params, config))
    state = jnp.concatenate([noise, jnp.zeros_like(noise[:1])])
    return np.asarray(capture(params, config, rows, r, state=state).states.astype(jnp.float32))


def spread(states: Float[Array | np.ndarray, "depths N L D"]) -> Float64[np.ndarray, "depths L"]:
    """Mean distance between all pairs of N states, over that of the starts.

    1 at r = 0. The value at the end is the share of the initial difference that the limit keeps. Distances at each r
    are relative to the mean length of the states there.
    """
    states = np.asarray(states, np.float64)
    N = states.shape[1]
    if N < 2:
        raise InputError(f"states: {N} start: at least two are needed to compare")
    a, b = np.triu_indices(N, 1)
    pairs = zip(a.tolist(), b.tolist(), strict=True)  # one by one: all differences at once take ten times the memory
    apart = np.mean([np.linalg.norm(states[:, i] - states[:, j], axis=-1) for i, j in pairs], axis=0)
    apart = apart / np.maximum(np.linalg.norm(states, axis=-1).mean(1), 1e-30)
    return apart / np.maximum(apart[:1], 1e-30)
