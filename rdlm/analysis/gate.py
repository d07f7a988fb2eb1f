"""What a model's exit gate says: the distribution over the recurrence at which each token would stop."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float32

from rdlm.config import InputError, ModelConfig
from rdlm.exits import exit_probabilities
from rdlm.model import Params, bind, check_tokens
from rdlm.model.network import gate_logit
from rdlm.recurrence import trajectory


def exit_distribution(
    params: Params, config: ModelConfig, tokens: ArrayLike, num_steps: int
) -> Float32[Array, "{num_steps} B L"]:
    """Probability that a token stops after recurrence 1, ..., T = num_steps; the last takes what remains.

    p_t = g_t (1 - g_1) ... (1 - g_{t-1}) for t < T, with g the gate's probabilities (arXiv 2510.25741).

    Args:
      params, config: a model with an exit gate.
      tokens: int [B, L].
      num_steps: T, at least 1.

    Raises:
      InputError: no gate, T below 1, ids out of range.
    """
    if not config.loop.gate:
        raise InputError("exit_distribution: this model has no exit gate (config.loop.gate is false)")
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise InputError(f"num_steps = {num_steps!r}: must be an integer of at least 1")
    return _distribution(params, config, check_tokens(tokens, config), num_steps)


@functools.partial(jax.jit, static_argnames=("config", "num_steps"))
def _distribution(params: Params, config: ModelConfig, tokens: Array, num_steps: int) -> Array:
    bound = bind(params, config, tokens)
    logits = gate_logit(params, config, trajectory(bound.step, bound.s0, num_steps)[1:])
    assert logits is not None
    return exit_probabilities(logits)
