"""Deep supervision: a loss after each of the last recurrences."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from experiments.studies.shared.halting import mean, token_losses
from experiments.studies.shared.training import bind_batch
from rdlm.config import ModelConfig
from rdlm.model import Params
from rdlm.recurrence import sample_steps, unroll


def after_each(
    params: Params, model: ModelConfig, batch: dict[str, Array], depth_key: Array, state_key: Array
) -> Array:
    """The mean of the losses after each of the last k recurrences, instead of the loss after the last one."""
    bound = bind_batch(params, model, batch, state_key)
    n, _ = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    s, found = unroll(bound.step, bound.s0, n, 0), []
    for j in range(model.backprop_depth):
        s = bound.step(s, n + j)
        found.append(mean(token_losses(bound, s, batch["labels"]), batch["labels"]))
    return jnp.stack(found).mean()
