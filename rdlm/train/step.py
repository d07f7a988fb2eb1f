"""One optimizer step: a pure function of (state, batch), compiled once for every depth."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from rdlm import sharding
from rdlm.config import RunConfig
from rdlm.losses import loss
from rdlm.model import Params, init_params, logical_axes
from rdlm.optim import schedule
from rdlm.recurrence import max_gradient_steps, sample_steps


class TrainState(NamedTuple):
    """What a step changes. step: int32 scalar, optimizer steps done; also the position in the data."""

    step: Array
    params: Params
    optimizer: Any


def step_keys(seed: int, step: Array) -> tuple[Array, Array]:
    """(key of the depth draw, key of the initial states) of a step: functions of (seed, step) on every host."""
    depth, state = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return depth, state


def draw_depth(run: RunConfig, step: Array) -> tuple[Array, Array]:
    """(n, k) of training step `step` (from 0), the same on all devices."""
    rec, model = run.recurrence, run.model
    progress = None if not rec.curriculum_steps else (step + 1) / rec.curriculum_steps
    return sample_steps(
        step_keys(run.seed, step)[0], model.mean_recurrence, model.backprop_depth, rec.scheme, progress
    )  # fmt: skip


def train_step(run: RunConfig, tx: optax.GradientTransformation, state: TrainState, batch: dict[str, Array]):
    """One optimizer step: (new state, metrics of it as scalars)."""
    n, k = draw_depth(run, state.step)
    _, state_key = step_keys(run.seed, state.step)
    value, grads = jax.value_and_grad(loss)(
        state.params,
        run.model,
        batch,
        steps=(n, k),
        key=state_key,
        max_k=max_gradient_steps(run.model.backprop_depth, run.recurrence.scheme),
        remat=run.recurrence.remat == "iteration",
    )
    updates, opt = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": value,
        "n": n,
        "k": k,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(run.optimizer, run.steps)(state.step),
    }
    return TrainState(state.step + 1, params, opt), metrics


def init_state(run: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """Fresh parameters and optimizer state, a function of the seed."""
    params = init_params(run.model, jax.random.key(run.seed))
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shardings(run: RunConfig, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the train state: optimizer moments live where their parameters do."""
    shapes = jax.eval_shape(lambda: init_state(run, tx))
    params = sharding.parameter_sharding(mesh, logical_axes(run.model), shapes.params)
    everywhere: Any = sharding.replicated(mesh)
    opt = optax.tree.map_params(
        tx, lambda _, s: s, shapes.optimizer, params, transform_non_params=lambda _: everywhere
    )  # fmt: skip
    return shapes, TrainState(everywhere, params, opt)
