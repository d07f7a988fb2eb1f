"""Optimizers and learning-rate schedules as optax transformations (docs/model.md, Optimizer).

`optimizer` is the one of a training run: clip by global norm, then AdamW, ELLISAdam or Muon, with weight decay on
matrices and embeddings only, and optionally a moving average of the weights. `ellis_adam`, the Adam variant of the
public reference, can be used alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float32, PyTree

from rdlm.config import InputError, OptimizerConfig
from rdlm.tune import part_of

UNDECAYED = ("scale", "qk_bias", "qkv_bias", "bias", "A_log", "dt_bias", "B", "C", "low_start")
"""Last path component of parameters without weight decay: norm weights, biases, what carries the state, and a start
that is not trained."""

Count = int | float | Array
"""Steps counted from 0, as schedules take them."""


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate f32 of optimizer step `count`, counted from 0 as optax does, for a run of `steps` = M steps.

    The reference counts from 1, so this is its formula at step = count + 1: the first update already has
    learning_rate / warmup_steps. With W = warmup_steps and C = cooldown_steps:

      step < W: base * step / W, for every shape;
      trapezoid: max(base * (M - step) / C, min) for step > M - C, else base;
      cosine, linear: from base at step W down to min at step M.

    If a trapezoid's ramps do not fit (W + C > M), both shrink in proportion until they meet, so that a shortened run
    still reaches its peak. Cosine and linear runs shorter than W only warm up.

    Raises:
      InputError: steps below 1, or min_learning_rate above learning_rate.
    """
    if steps < 1:
        raise InputError(f"steps = {steps!r}: a schedule needs at least 1 step")
    base, floor = config.learning_rate, config.min_learning_rate
    if floor > base:
        raise InputError(f"optimizer.min_learning_rate = {floor!r}: must be at most learning_rate = {base!r}")
    W, C = float(config.warmup_steps), float(config.cooldown_steps)
    if config.schedule == "trapezoid" and steps < W + C:
        W, C = W * steps / (W + C), C * steps / (W + C)

    def rate(count: Count) -> Array:
        step = jnp.asarray(count, jnp.float32) + 1
        done = jnp.clip((step - W) / max(steps - W, 1.0), 0.0, 1.0)  # share of the time after the warm-up
        if config.schedule == "trapezoid":
            after = jnp.full_like(step, base)
            if C > 0:
                after = jnp.where(step > steps - C, jnp.maximum(base * (steps - step) / C, floor), base)
        elif config.schedule == "cosine":
            after = floor + 0.5 * (1 + jnp.cos(math.pi * done)) * (base - floor)
        elif config.schedule == "linear":
            after = base - done * (base - floor)
        else:
            raise InputError(f"optimizer.schedule = {config.schedule!r}: must be trapezoid, cosine or linear")
        return jnp.where(step < W, base * step / max(W, 1e-9), after)

    return rate


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: matrices and embeddings, not what is `UNDECAYED`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), norm being their joint L2 norm in f32.

    The 1e-6 is the reference's; `optax.clip_by_global_norm` does without. A norm that is not finite makes every update
    not finite, so that the training step skips it.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        factor = jnp.minimum(1.0, limit / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: PyTree) -> Float32[Array, ""]:
    """L2 norm over all leaves, in f32 for leaves of any dtype."""
    return optax.tree.norm(optax.tree.cast(tree, jnp.float32))


class EllisAdamState(NamedTuple):
    """count: int32, updates so far; mu, nu: f32 moments, shaped like the parameters.

    steps: () or, with tensor_wise_finite_check, an int32 scalar per parameter: its own updates so far.
    """

    count: Array  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    steps: PyTree


def ellis_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    peak_learning_rate: float | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] = None,
    update_clipping: bool = True,
    atan_adam: bool = True,
    running_init: bool = True,
    decouple_wd: bool = True,
    eps_adjustment: bool = False,
    tensor_wise_finite_check: bool = False,
    tensor_wise_gradient_normalization: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """ELLISAdam, the optimizer of the public reference, with its launch flags as defaults (docs/model.md, Optimizer).

    Per tensor, with g the gradient, t its update counted from 1 and lr the scheduled rate:

      m, v: moving averages of g and g^2;   eta = lr / (1 - b1^t)
      p <- p * decay - eta * atan2(m, sqrt(v / (1 - b2^t)))

    Moments are always f32. The reference skips a parameter that has no gradient (k = 0: prelude, adapter, core); here
    its gradient is zero and takes part, so its moments decay.

    Args:
      learning_rate: a float, or a schedule of the step counted from 0.
      peak_learning_rate: divisor of the rate with `decouple_wd`; None: learning_rate, which must then be a float.
      b1, b2, eps: as in Adam. With update_clipping, eps^2 is also the lower bound of v.
      weight_decay: with decouple_wd, the share of a weight lost per step at the peak rate; else multiplied by the rate.
      mask: where weight decay applies: a tree of bools, or a function of the parameters that returns one; None:
        everywhere.
      update_clipping: keep v >= eps^2, and divide the rate of a tensor by max(1, rms(g / sqrt(v))).
      atan_adam: atan2 as above, which needs no eps; else m / (sqrt(v / (1 - b2^t)) + eps).
      running_init: moments start at the first g and g^2 instead of at zero. (Bias correction still applies, as in the
        reference, so the first update is 2.2 lr.)
      decouple_wd: decay by 1 - lr / peak * weight_decay; else by 1 - lr * weight_decay.
      eps_adjustment: without atan_adam, m / sqrt(v / (1 - b2^t) + eps^2).
      tensor_wise_finite_check: skip the update of a tensor whose gradient is not finite.
      tensor_wise_gradient_normalization: divide each gradient by its own norm first.

    Raises:
      InputError: decouple_wd with a schedule and no peak_learning_rate.
    """
    peak = peak_learning_rate
    if peak is None and not callable(learning_rate):
        peak = learning_rate
    if peak is None and decouple_wd and weight_decay:
        raise InputError("ellis_adam: peak_learning_rate = None: decouple_wd needs it when learning_rate is a schedule")

    def init(params: PyTree) -> EllisAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        steps = jax.tree.map(lambda p: jnp.zeros((), jnp.int32), params) if tensor_wise_finite_check else ()
        return EllisAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), steps)

    def one(
        g: Array, p: Array, m: Array, v: Array, t: Array, lr: Array, decayed: bool | Array
    ) -> tuple[Array, Array, Array]:
        """(update in p's dtype, m and v in f32) of one tensor at its t-th update."""
        g, wide = g.astype(jnp.float32), p.astype(jnp.float32)
        if tensor_wise_gradient_normalization:
            g = g / jnp.sqrt(jnp.sum(g * g))
        if running_init:
            m, v = jnp.where(t == 1, g, m), jnp.where(t == 1, g * g, v)
        m, v, eta = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, lr
        if update_clipping:
            v = jnp.maximum(v, eps**2)
            eta = eta / jnp.maximum(1.0, jnp.sqrt(jnp.mean(g * g / v)))
        eta, c2 = eta / _correction(b1, t), _correction(b2, t)
        if atan_adam:
            step = jnp.arctan2(m, jnp.sqrt(v) / jnp.sqrt(c2))
        elif eps_adjustment:
            step = m / jnp.sqrt(v / c2 + eps**2)
        else:
            step = m / (jnp.sqrt(v) / jnp.sqrt(c2) + eps)
        decay = (lr / peak if decouple_wd and peak is not None else lr) * weight_decay
        return (-eta * step - jnp.where(decayed, decay, 0.0) * wide).astype(p.dtype), m, v

    def update(
        grads: PyTree, state: EllisAdamState, params: PyTree = None, **extra: object
    ) -> tuple[PyTree, EllisAdamState]:
        del extra
        if params is None:
            raise InputError("ellis_adam: update needs params, for their decay")
        lr = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate, jnp.float32)
        decayed = mask(params) if callable(mask) else mask
        if decayed is None:
            decayed = jax.tree.map(lambda p: True, params)
        count, steps = state.count + 1, state.steps
        if tensor_wise_finite_check:
            good = jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads)
            steps = jax.tree.map(lambda t, ok: t + ok, steps, good)
            grads = jax.tree.map(lambda g, ok: jnp.where(ok, g, 0), grads, good)
        own_steps = steps if tensor_wise_finite_check else jax.tree.map(lambda p: count, params)
        new = jax.tree.map(
            lambda g, p, m, v, t, d: one(g, p, m, v, t, lr, d), grads, params, state.mu, state.nu, own_steps, decayed
        )
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), new)
        if tensor_wise_finite_check:
            updates = jax.tree.map(lambda u, ok: jnp.where(ok, u, 0), updates, good)
            mu = jax.tree.map(lambda x, old, ok: jnp.where(ok, x, old), mu, state.mu, good)
            nu = jax.tree.map(lambda x, old, ok: jnp.where(ok, x, old), nu, state.nu, good)
        return updates, EllisAdamState(count, mu, nu, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _correction(b: float, t: Array) -> Array:
    # 1 - b^t without the cancellation that f32 suffers at small t.
    return -jnp.expm1(t.astype(jnp.float32) * math.log(b)) if b > 0 else jnp.ones((), jnp.float32)


MATRICES = ("qkv", "proj", "fc", "adapter")
"""Last path component of the parameters that Muon orthogonalises. Their last two axes are input and output."""


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adamw_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of blocks and adapter, AdamW for embeddings, head, norms and biases.

    A matrix moves by its Nesterov momentum (decay 0.95), orthogonalised by five Newton-Schulz iterations, times
    0.2 sqrt(max(rows, columns)). Its root mean square is then about that of an AdamW update, so one learning rate
    can serve both (arXiv 2502.16982). The two matrices stacked in `fc` and `adapter` are orthogonalised separately;
    `qkv` is one matrix, as the reference stores it.

    `optax.contrib.muon` is not used: its AdamW half has no mask for weight decay, and shares Muon's `nesterov` flag.

    Args:
      learning_rate: a float, or a schedule of the step counted from 0.
      adamw_learning_rate: the same for what AdamW moves; None: learning_rate.
      b1, b2, eps: of AdamW.
      weight_decay: multiplied by the rate, for both.
      mask: where it applies: a tree of bools, or a function of the parameters that returns one; None: everywhere.
    """

    def labels(params: PyTree) -> PyTree:
        def label(path: jax.tree_util.KeyPath, _: Array) -> str:
            return "muon" if path[-1].key in MATRICES else "adamw"

        return jax.tree_util.tree_map_with_path(label, params)

    def axes(updates: PyTree) -> PyTree:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    def scale_as_adamw(updates: PyTree, params: PyTree = None) -> PyTree:
        del params
        return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)

    matrices = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=axes),
        optax.stateless(scale_as_adamw),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = learning_rate if adamw_learning_rate is None else adamw_learning_rate
    others = optax.adamw(rest, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return optax.partition({"muon": matrices, "adamw": others}, labels)


class AverageState(NamedTuple):
    """count: int32, updates so far. average: f32, shaped like the parameters; zeros before the first update."""

    count: Array  # type: ignore[assignment]
    average: PyTree


def averaged(decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters. Must be last in the chain; updates pass unchanged.

    After update t the average is sum_i decay^(t-i) p_i / sum_i decay^(t-i), where p_i are the parameters after update
    i. The initialisation p_0 is not part of it.
    """

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def update(updates: PyTree, state: AverageState, params: PyTree = None) -> tuple[PyTree, AverageState]:
        if params is None:
            raise InputError("averaged: update needs params, to average them")
        count = state.count + 1
        share = (1 - decay) / _correction(decay, count)  # 1 at the first update, later close to 1 - decay

        def one(average: Array, p: Array, u: Array) -> Array:
            return average + share * ((p + u).astype(p.dtype).astype(jnp.float32) - average)

        return updates, AverageState(count, jax.tree.map(one, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def average_of(state: PyTree) -> PyTree:
    """The averaged parameters in an optimizer state (arrays, shapes or shardings); None without `ema_decay`."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AverageState))
    return next((x.average for x in leaves if isinstance(x, AverageState)), None)


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps: clip by global norm, then `config.name` under `schedule`.

    Weight decay follows `decay_mask`. AdamW and Muon multiply it by the rate; for ELLISAdam it is the share lost per
    step at the peak rate (decouple_wd), as in the reference's launch. With `config.ema_decay` the state also holds the
    moving average of the parameters (`average_of`).

    Raises:
      InputError: see `schedule`.
    """
    rate = schedule(config, steps)
    scale = (config.adamw_learning_rate or config.learning_rate) / config.learning_rate
    named: dict[str, Callable[..., optax.GradientTransformation]] = {
        "adamw": optax.adamw,
        "muon": functools.partial(muon, adamw_learning_rate=lambda count: scale * rate(count)),
        "ellis_adam": functools.partial(ellis_adam, peak_learning_rate=config.learning_rate),
    }
    if config.name not in named:
        raise InputError(f"optimizer.name = {config.name!r}: must be adamw, ellis_adam or muon")
    main = named[config.name](
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    keep = [averaged(config.ema_decay)] if config.ema_decay else []
    return optax.chain(clip_by_global_norm(config.clip_norm), main, *keep)


def module_norms(tree: PyTree) -> dict[str, Float32[Array, ""]]:
    """L2 norm of each part of a tree shaped like the parameters (parameters, gradients, updates).

    Parts: embedding (with an untied head), prelude, adapter, low, core, coda, all without norm weights; norms: those.
    """
    parts: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        part = "norms" if path[-1].key == "scale" else part_of(path[0].key)
        part = "embedding" if part == "head" else part
        parts.setdefault(part, []).append(leaf)
    return {part: global_norm(leaves) for part, leaves in parts.items()}
