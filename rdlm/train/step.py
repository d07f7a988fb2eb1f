"""One optimizer step: a pure function of (state, batch), compiled once for every depth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from rdlm import sharding
from rdlm.config import ModelConfig, RunConfig, TuneConfig
from rdlm.losses import IGNORED, Batch, Depths, as_batch, batch_state, token_losses
from rdlm.model import Params, init_params, logical_axes, rounded
from rdlm.optim import module_norms, schedule
from rdlm.recurrence import max_gradient_steps, sample_steps
from rdlm.sharding import SPLIT, Layout
from rdlm.train.faults import first_bad, unless
from rdlm.tune import Path, begin, combine, divide, join, pairs, pick


class TrainState(NamedTuple):
    """What a step changes. step: int32 scalar, steps done, skipped updates included. params: those that learn."""

    step: Array
    params: Params
    optimizer: optax.OptState


def step_keys(seed: int | Array, step: Array) -> tuple[Array, Array]:
    """(key of the depth draw, key of the initial states) of a step: functions of (seed, step) on every host."""
    depth, state = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return depth, state


def mean_depth(run: RunConfig, step: Array) -> tuple[Array | int, Array | int]:
    """(m, b) of training step `step` (from 0): of the model, or on their way there (`recurrence.curriculum_share`).

    With M of the model, W the share of the steps and f the shape, m = max(1, ceil(M f(min((step + 1) / W, 1)))), and
    b is at most m (arXiv 2511.07384).
    """
    rec, model = run.recurrence, run.model
    if not rec.curriculum_share:
        return model.mean_recurrence, model.backprop_depth
    u = jnp.minimum((step + 1) / (rec.curriculum_share * run.steps), 1.0)
    grown = u if rec.curriculum_shape == "linear" else 1 - jnp.sqrt(1 - u)
    m = jnp.maximum(1, jnp.ceil(model.mean_recurrence * grown - 1e-4)).astype(jnp.int32)  # not for a rounding error
    return m, jnp.minimum(model.backprop_depth, m)


def draw_depth(run: RunConfig, step: Array, part: Array | None = None) -> tuple[Array, Array]:
    """(n, k) of training step `step` (from 0), the same on all devices.

    `part`: microbatch or sequence, where each draws for itself; int [] or [B], the draws are then int [B].
    """
    rec = run.recurrence
    progress = None if not rec.curriculum_steps else (step + 1) / rec.curriculum_steps
    mean, backprop = mean_depth(run, step)
    key = step_keys(run.seed, step)[0]

    def draw(key: Array) -> tuple[Array, Array]:
        n, k = sample_steps(key, mean, backprop, rec.scheme, progress)
        return jnp.maximum(n, rec.least - k), k

    if part is None:
        return draw(key)
    if part.ndim == 0:
        return draw(jax.random.fold_in(key, part))
    return jax.vmap(lambda part: draw(jax.random.fold_in(key, part)))(part)


@functools.cache
def _mean_weight(run: RunConfig) -> float:
    """Mean of (n + k) ** loss_power over 10,000 steps, the curriculum left out."""
    rec = run.recurrence
    steady = dataclasses.replace(
        run, recurrence=dataclasses.replace(rec, curriculum_steps=0, curriculum_share=0.0, curriculum_shape="linear")
    )
    with jax.ensure_compile_time_eval():
        n, k = jax.vmap(functools.partial(draw_depth, steady))(jnp.arange(10_000))
        return float(jnp.mean((n + k) ** rec.loss_power))


def depth_weight(run: RunConfig, n: Array, k: Array) -> Array | float:
    """What the loss of a draw counts: (n + k) ** recurrence.loss_power over its expectation."""
    power = run.recurrence.loss_power
    return (n + k).astype(jnp.float32) ** power / _mean_weight(run) if power else 1.0


def gradients(
    run: RunConfig,
    params: Params,
    batch: dict[str, Array],
    step: Array,
    layout: Layout | None = None,
    frozen: Params | None = None,
) -> tuple[Array, Params, tuple[Array, Array]]:
    """(loss, its gradient, (n, k) that ran) of the whole batch. The gradient is that of `params`, which learn.

    With `optimizer.quantize` both are taken at the rounded matrices, so the gradient passes the rounding as if it were
    the identity (straight-through, arXiv 1308.3432).

    The loss is the sum of cross-entropies over scored labels, divided by their number over all devices and
    microbatches; its gradient is that of the losses weighed by depth. Where draws differ within a step, n and k are
    their means.

    Args:
      layout: how parameters and rows are split over a mesh; None: one device (or left to the compiler).
      frozen: the other parameters, if `run.tune` leaves some; no gradient of theirs is formed (`rdlm.tune.divide`).
        With `loss.teacher` = "start" its entry "teacher" holds all parameters that teach.
    """
    frozen = frozen or {}
    if run.optimizer.quantize:  # once for all microbatches and recurrences; over shards the compiler finds the maxima
        params = rounded(params, run.optimizer.quantize)
        teacher = {"teacher": frozen["teacher"]} if "teacher" in frozen else {}
        frozen = rounded(frozen, run.optimizer.quantize) | teacher
    draws = _draws(run, batch, step)
    ran: Any = tuple(x if x.ndim == 0 else x.mean() for x in draws.rows or draws[:2])
    if layout is None:
        return *_gradients(run, (params, frozen), batch, step, draws, layout=None), ran
    every, rows = PartitionSpec(), PartitionSpec(SPLIT)
    every_part = layout.parameter_parts
    inside, fixed = pick(every_part, params), pick(every_part | {"teacher": every_part}, frozen)
    placed = _Draws(every, every, rows if run.recurrence.draw == "sequence" else every)
    spread = jax.shard_map(
        functools.partial(_gradients, run, layout=layout),
        mesh=layout.mesh,
        in_specs=((inside, fixed), jax.tree.map(lambda _: rows, batch), every, placed),
        out_specs=(every, inside),
        axis_names=set(layout.manual),
        check_vma=False,
    )
    return *spread((params, frozen), batch, step, draws), ran


class _Draws(NamedTuple):
    """Depths of a step. n, k: int32 [] or, per microbatch, [M]; the deepest where every row has its own in `rows`."""

    n: Any  # `jax.shard_map` wants partition specs in these places
    k: Any
    rows: Any = None


def _draws(run: RunConfig, batch: dict[str, Array], step: Array) -> _Draws:
    kind = run.recurrence.draw
    if kind == "step":
        return _Draws(*draw_depth(run, step))
    if kind == "microbatch":
        return _Draws(*draw_depth(run, step, jnp.arange(run.data.microbatches)))
    ids = batch.get("sequence_ids")  # a row keeps its draw wherever it is worked on
    rows = draw_depth(run, step, jnp.arange(batch["tokens"].shape[0]) if ids is None else ids[:, 0])
    return _Draws(rows[0].max(), rows[1].max(), rows)


def _gradients(
    run: RunConfig,
    parts: tuple[Params, Params],
    rows: dict[str, Array],
    step: Array,
    draws: _Draws,
    *,
    layout: Layout | None,
) -> tuple[Array, Params]:
    """(loss, its gradient) of this device's rows, summed over devices. parts: what learns, and what is frozen."""
    params, frozen = parts
    config, count = run.model, run.data.microbatches
    batch = as_batch(rows)
    scored = (batch.labels != IGNORED).sum()
    scored = jnp.maximum(jax.lax.psum(scored, SPLIT) if layout else scored, 1)
    _, state_key = step_keys(run.seed, step)
    max_k = max_gradient_steps(config.backprop_depth, run.recurrence.scheme)

    def part(learnt: Params, batch: Batch, n: Array, k: Array, rows: tuple[Array, Array] | None) -> tuple[Array, Array]:
        params = combine(learnt, frozen, run.tune)
        depths = Depths(n, k, max_k, rows)
        start = batch_state(params, config, batch, None, state_key)
        losses = token_losses(
            params, config, batch, depths, start, terms=run.loss, remat=run.recurrence.remat, layout=layout
        )
        weight = depth_weight(run, *(rows or (n, k)))
        return (losses.sum(-1) * weight).sum() / scored, losses.sum() / scored

    def split(x: Array) -> Array:
        # Every count-th row, so that a microbatch holds the same rows on one device as on many.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def differentiated(*arguments: Any) -> tuple[Array, Params]:
        (_, value), grads = jax.value_and_grad(part, has_aux=True)(*arguments)
        return value, grads

    def accumulate(total: Any, inputs: Any) -> tuple[Any, None]:
        (rows_of_batch, rows), n, k = inputs
        return jax.tree.map(jnp.add, total, differentiated(params, rows_of_batch._replace(**shared), n, k, rows)), None

    if count == 1:  # without a sum beside the gradient
        value, grads = differentiated(params, batch, *(x.reshape(()) for x in draws[:2]), draws.rows)
    else:
        shared = {"positions": batch.positions} if batch.positions.ndim == 1 else {}
        gaps: dict[str, Any] = dict.fromkeys(shared)
        cut = jax.tree.map(split, (batch._replace(**gaps), draws.rows))
        depths = [jnp.broadcast_to(x, (count,)) for x in draws[:2]]
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (value, grads), _ = jax.lax.scan(accumulate, zero, (cut, *depths))
    return (jax.lax.psum(value, SPLIT), layout.summed(grads)) if layout else (value, grads)


def train_step(
    run: RunConfig,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, Array],
    layout: Layout | None = None,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step: (new state, metrics of it as scalars). `layout`, `frozen`: see `gradients`."""
    value, grads, (n, k) = gradients(run, state.params, batch, state.step, layout, frozen)
    state, metrics = apply_gradients(run, tx, state, value, grads)
    return state, {"loss": value, "n": n, "k": k} | metrics


def apply_gradients(
    run: RunConfig, tx: optax.GradientTransformation, state: TrainState, value: Array, grads: Params
) -> tuple[TrainState, dict[str, Array]]:
    """The second half of a step, after any loss `value` and its gradient: (new state, metrics of the update).

    If loss, gradient norm or update norm is not finite, parameters and optimizer state stay as they were: `skipped` is
    1, and `first_bad` is the index of the module in `faults.modules`.
    """
    updates, opt = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
    skip = ~(jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(update_norm))
    params, opt = unless(skip, (params, opt), (state.params, state.optimizer))
    metrics = {
        "grad_norm": norm,
        "update_norm": update_norm,
        "learning_rate": schedule(run.optimizer, run.steps)(updates_done(state.optimizer)),
        "skipped": skip.astype(jnp.int32),
        "first_bad": jax.lax.cond(skip, first_bad, lambda _: jnp.int32(-1), grads),
    }
    for name, tree in (("grad_norm", grads), ("update_norm", updates)):
        metrics |= {f"{name}_{part}": norm for part, norm in module_norms(tree).items()}
    return TrainState(state.step + 1, params, opt), metrics


def updates_done(optimizer: optax.OptState) -> Array:
    """The optimizer's own count of its updates, int32: the step, less those that were skipped."""
    return optax.tree.get_all_with_path(optimizer, "count")[0][1]


def layout_of(run: RunConfig, mesh: Mesh) -> Layout | None:
    """How the parameters of a run are split over `mesh`; None where there is one device.

    Raises:
      InputError: a dimension that the mesh does not divide.
    """
    if mesh.size == 1:
        return None
    sharding.check_heads(mesh, run.model)
    dtype = jnp.dtype(run.model.compute_dtype or run.model.param_dtype)
    return Layout(mesh, _specs(run.model, run.tune, mesh), dtype, run.mesh.gradient_dtype, run.mesh.gather, run.tune)


@functools.cache
def _shapes(model: ModelConfig) -> Params:
    """Shapes and dtypes of all parameters."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.cache  # a run asks twice, and each time the model would be traced
def _specs(model: ModelConfig, tune: TuneConfig, mesh: Mesh) -> dict[str, PyTree[PartitionSpec]]:
    """Where every parameter is split; raises as `sharding.parameter_specs`.

    A low-rank pair is split as its matrix is: A along the inputs, B along the outputs.
    """
    shapes = _shapes(model)
    specs = sharding.parameter_specs(mesh, logical_axes(model), shapes)

    def pair(_: Path, spec: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
        *stacked, rows, columns = spec
        return PartitionSpec(*stacked, rows, None), PartitionSpec(*stacked, None, columns)

    return join(specs, pairs(specs, tune, pair))


def init_state(run: RunConfig, tx: optax.GradientTransformation, params: Params | None = None) -> TrainState:
    """The state before the first step of a run that begins with `params`; None: fresh ones, a function of the seed."""
    key = jax.random.key(run.seed)
    learnt = begin(init_params(run.model, key) if params is None else params, run.tune, key)
    return TrainState(jnp.int32(0), learnt, tx.init(learnt))


def parameter_shardings(run: RunConfig, mesh: Mesh) -> tuple[Params, Params]:
    """(shapes, shardings) of all parameters of the model, without low-rank pairs."""
    shapes = _shapes(run.model)
    return shapes, sharding.named(mesh, pick(_specs(run.model, run.tune, mesh), shapes))


def frozen_shardings(run: RunConfig, mesh: Mesh) -> tuple[Params, Params]:
    """(shapes, shardings) of the parameters that are frozen, those of a teacher too; {} where all learn."""
    every = parameter_shardings(run, mesh)
    teaches = run.loss.teacher == "start"
    shapes, shardings = (divide(x, run.tune)[1] | ({"teacher": x} if teaches else {}) for x in every)
    return shapes, shardings


def state_shardings(run: RunConfig, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the train state: optimizer moments live where their parameters do."""
    shapes = jax.eval_shape(functools.partial(init_state, run, tx), _shapes(run.model))
    params = sharding.named(mesh, pick(_specs(run.model, run.tune, mesh), shapes.params))
    everywhere: Any = sharding.replicated(mesh)

    def gap(x: object) -> bool:
        return isinstance(x, optax.MaskedNode)  # in a part of the state that only some of the parameters have

    opt = optax.tree.map_params(
        tx,
        lambda x, s: x if gap(x) else s,
        shapes.optimizer,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=gap,
    )
    return shapes, TrainState(everywhere, params, opt)
