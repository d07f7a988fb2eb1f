"""Learning when to exit: halting heads and exit classifiers on the latent state, and LayerDrop.

A model with a head is {"model": parameters, "exit": head}; `rules.halting` and `rules.classifier` read the head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.studies.shared.comparison import Contestant, answers_by_depth
from experiments.studies.shared.rules import Head, unit
from experiments.studies.shared.training import bind_batch
from rdlm.config import ModelConfig
from rdlm.losses import IGNORED, cross_entropy
from rdlm.model import Bound, Params, bind, init_params
from rdlm.recurrence import Step, sample_steps, trajectory, unroll


def head(dim: int, probability: float) -> Head:
    """A head that gives `probability` for every state of width `dim`."""
    return {"w": jnp.zeros(dim), "bias": jnp.float32(math.log(probability / (1 - probability)))}


def with_head(
    model: ModelConfig, depths: tuple[int, ...], probability: float, loss: Callable[..., Array]
) -> Contestant:
    """A recurrent model with a head and the loss of a `Contestant`; answers do not use the head."""
    answers = answers_by_depth(model, depths)
    return Contestant(
        lambda key: {"model": init_params(model, key), "exit": head(model.embed_dim, probability)},
        loss,
        lambda params, tokens: answers(params["model"], tokens),
    )


# PonderNet


def halting_distribution(logits: Array, last: Array | int) -> Array:
    """Probability of halting at each of N checks, [N, ...], from logits f32 [N, ...] of halting at a reached check.

    At check number `last`, from 1, everything still running halts; later checks have probability 0.
    """
    n = jnp.arange(1, len(logits) + 1).reshape(-1, *(1,) * (logits.ndim - 1))
    survived = jnp.cumsum(-jax.nn.softplus(logits), axis=0)  # log of not having halted, after this check
    reached = jnp.concatenate([jnp.zeros_like(survived[:1]), survived[:-1]])
    return jnp.where(n > last, 0.0, jnp.exp(reached + jnp.where(n < last, -jax.nn.softplus(-logits), 0.0)))


def divergence_from_geometric(logits: Array, last: Array | int, rate: float) -> Array:
    """KL of `halting_distribution(logits, last)` from a geometric one of that `rate`, cut at the same check.

    f32 [...], in nats; 0 if and only if every check halts with probability `rate`.
    """
    n = jnp.arange(1, len(logits) + 1).reshape(-1, *(1,) * (logits.ndim - 1))
    halt, go_on = -jax.nn.softplus(-logits), -jax.nn.softplus(logits)
    survived = jnp.cumsum(go_on, axis=0)
    reached = jnp.exp(jnp.concatenate([jnp.zeros_like(survived[:1]), survived[:-1]]))
    # The chain rule of KL: a sum over checks, weighted by the probability that a check is reached.
    coin = jnp.exp(halt) * (halt - math.log(rate)) + jnp.exp(go_on) * (go_on - math.log1p(-rate))
    return jnp.where(n < last, reached * coin, 0.0).sum(0)


def ponder(model: ModelConfig, depths: tuple[int, ...], max_steps: int, rate: float, weight: float) -> Contestant:
    """PonderNet: the expected loss under every token's halting distribution, plus `weight` times its KL from the prior.

    The depth of a training step is drawn as for the plain model, at most `max_steps`. All recurrences carry gradient
    and are checked; at the last one everything still running halts. The prior is geometric with mean 1 / `rate`.
    """

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        n, k = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
        last = jnp.minimum(n + k, max_steps)
        bound = bind_batch(params["model"], model, batch, state_key)

        def check(s: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            s = bound.step(s, i)
            return s, (token_losses(bound, s, batch["labels"]), unit(params["exit"], s))

        def slot(s: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            nothing = jnp.zeros(batch["tokens"].shape)
            return jax.lax.cond(i < last, check, lambda s, i: (s, (nothing, nothing)), s, i)

        _, (losses, logits) = jax.lax.scan(slot, bound.s0, jnp.arange(max_steps, dtype=jnp.int32))
        return ponder_loss(losses, logits, batch["labels"], last, rate, weight)

    return with_head(model, depths, rate, loss)


def ponder_loss(losses: Array, logits: Array, labels: Array, last: Array | int, rate: float, weight: float) -> Array:
    """PonderNet's loss, f32 scalar: mean over scored labels int [B, L] of losses and halting logits f32 [N, B, L]."""
    expected = (halting_distribution(logits, last) * losses).sum(0)
    total = expected + weight * divergence_from_geometric(logits, last, rate)
    return mean(total, labels)


def mean(values: Array, labels: Array) -> Array:
    """Mean of values [..., B, L] over scored labels int [B, L] and all leading axes."""
    scored = jnp.broadcast_to(labels != IGNORED, values.shape)
    return jnp.where(scored, values, 0).sum() / scored.sum()


def token_losses(bound: Bound, s: Array, labels: Array) -> Array:
    """Cross-entropy f32 [B, L] of states s [B, L, D], 0 at ignored labels."""
    return cross_entropy(bound.read(s)[0], labels)


# The depth-adaptive exit classifier


def stays(good: Array) -> Array:
    """Whether `good`, bool [N, ...], holds at a check and at all later ones, bool [N, ...].

    The first true check of a token is where its oracle exits.
    """
    return jnp.flip(jax.lax.cummin(jnp.flip(good, 0).astype(jnp.int32), axis=0), 0).astype(bool)


def classified(model: ModelConfig, depths: tuple[int, ...], weight: float) -> Contestant:
    """The recurrent model trained to answer at every depth and to tell whether it can (Elbayad et al., 2020).

    Depths are drawn as for the plain model. The loss is the mean over the recurrences with gradient of the answer's
    cross-entropy plus `weight` times that of the classifier: is the answer correct there and at all later recurrences?
    """

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        labels = batch["labels"]
        n, _ = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
        bound = bind_batch(params["model"], model, batch, state_key)
        s = unroll(bound.step, bound.s0, n, 0)
        losses, correct, logits = [], [], []
        for j in range(model.backprop_depth):
            s = bound.step(s, n + j)
            found, _ = bound.read(s)
            losses.append(cross_entropy(found, labels))
            correct.append(jnp.argmax(found, -1) == labels)
            logits.append(unit(params["exit"], s))
        stop = stays(jnp.stack(correct)).astype(jnp.float32)
        classifier = optax.sigmoid_binary_cross_entropy(jnp.stack(logits), stop)
        return mean(jnp.stack(losses) + weight * classifier, labels)

    return with_head(model, depths, 0.5, loss)


@functools.partial(jax.jit, static_argnames=("model", "max_steps"))
def states_and_oracle(
    params: Params, model: ModelConfig, tokens: Array, max_steps: int, key: Array
) -> tuple[Array, Array]:
    """(states f32 [N, B, L, D], whether the answer is from there on that of N = `max_steps`, bool [N, B, L])."""
    bound = bind(params, model, tokens, key=key)
    states = trajectory(bound.step, bound.s0, max_steps)[1:]
    answers = jax.lax.map(lambda s: jnp.argmax(bound.read(s)[0], -1), states)
    return states, stays(answers == answers[-1:])


@functools.partial(jax.jit, static_argnames=("updates",))
def fitted(states: Array, stop: Array, updates: int = 20, ridge: float = 1e-5) -> tuple[Head, Array]:
    """(head, its loss in nats) of a logistic regression of stop bool [M] on states f32 [M, D], by Newton's method.

    ridge: the loss has a term ridge |w|^2 / 2, so that separable states have a solution too.
    """
    x = jnp.pad(states, ((0, 0), (0, 1)), constant_values=1.0)  # the last weight is the bias
    penalty = ridge * jnp.ones(x.shape[1]).at[-1].set(0.0)

    def update(_: Array, w: Array) -> Array:
        p = jax.nn.sigmoid(x @ w)
        gradient = x.T @ (p - stop) / len(x) + penalty * w
        curvature = (x.T * (p * (1 - p))[None]) @ x / len(x) + jnp.diag(penalty) + 1e-8 * jnp.eye(len(w))
        return w - jnp.linalg.solve(curvature, gradient)

    w = jax.lax.fori_loop(0, updates, update, jnp.zeros(x.shape[1]))
    loss = optax.sigmoid_binary_cross_entropy(x @ w, stop.astype(jnp.float32)).mean()
    return {"w": w[:-1], "bias": w[-1]}, loss


# LayerDrop


def skipping(step: Step, key: Array, probability: float, shape: tuple[int, ...]) -> Step:
    """`step`, skipped with `probability`: for the whole state (shape ()), or independently for parts of that shape."""

    def dropping(s: Array, i: Array) -> Array:
        drop = jax.random.bernoulli(jax.random.fold_in(key, i), probability, shape)
        if shape:
            return jnp.where(drop, s, step(s, i))
        return jax.lax.cond(drop, lambda s: s, lambda s: step(s, i), s)

    return dropping


def layer_drop(model: ModelConfig, depths: tuple[int, ...], probability: float, per_token: bool) -> Contestant:
    """The plain model, trained with every recurrence skipped with `probability` (LayerDrop, Fan et al., 2020).

    A recurrence is skipped for the whole batch, or for each token independently (`per_token`): the token keeps its
    state while others continue, as after an exit.
    """

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        steps = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
        bound = bind_batch(params, model, batch, state_key)
        shape = (*batch["tokens"].shape, 1) if per_token else ()
        step = skipping(bound.step, jax.random.fold_in(depth_key, 1), probability, shape)
        s = unroll(step, bound.s0, *steps, max_k=model.backprop_depth)
        return mean(token_losses(bound, s, batch["labels"]), batch["labels"])

    return Contestant(lambda key: init_params(model, key), loss, answers_by_depth(model, depths))
