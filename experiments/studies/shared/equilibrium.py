"""The fixed point of the core by a solver, with the implicit gradient (Bai, Kolter and Koltun 2019).

`equilibrium(step, s)` finds s* = step(s*) by Anderson acceleration. Its gradient follows from the implicit function
theorem: u = g + J^T u, with J the Jacobian of `step` at s*, is solved by the same method, so memory does not grow with
the number of evaluations. Functions and pytrees, no Flax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from rdlm.config import require

RIDGE = 1e-6
"""Added to the diagonal, which is 1, of the residuals' correlations before the linear system is solved."""


class Solution(NamedTuple):
    """state [B, ...]: step(x) for the x with the smallest residual.

    residual: f32 [B], |step(x) - x| / |step(x)| of each row. evaluations: int32 scalar, calls of `step` on the batch.
    """

    state: Array
    residual: Array
    evaluations: Array


Search = tuple[Array, Array, tuple[Array, Array], Array, Array]
"""Evaluations, x, (best state, its residual), the last values of f, their residuals."""
Pure = Callable[..., Array]


def anderson(
    f: Callable[[Array], Array],
    x: Float[Array | np.ndarray, "B ..."],
    *,
    max_calls: int,
    tolerance: float,
    memory: int = 5,
) -> Solution:
    """Solve f(x) = x for every row: the next x is the combination of the last values of f with the smallest residual.

    Rows (the first axis) have separate weights and stop once their residual is below the tolerance, so a row's solution
    depends on other rows only through f. With memory = 1 it is plain iteration.

    Args:
      f: [B, ...] -> the same shape and dtype.
      x: start.
      max_calls: maximum number of evaluations.
      tolerance: relative residual at which a row stops.
      memory: number of values that are combined.

    Raises:
      InputError: max_calls or memory below 1, or a negative tolerance.
    """
    require(max_calls >= 1, "max_calls", max_calls, "must be at least 1")
    require(memory >= 1, "memory", memory, "must be at least 1")
    require(tolerance >= 0, "tolerance", tolerance, "must not be negative")
    x = jnp.asarray(x)
    B, shape = x.shape[0], x.shape

    def unfinished(carry: Search) -> Array:
        i, (_, residual) = carry[0], carry[2]
        return (i < max_calls) & jnp.any(residual >= tolerance)

    def evaluate(carry: Search) -> Search:
        i, x, (state, smallest), values, residuals = carry
        value = f(x.reshape(shape).astype(dtype)).astype(jnp.float32).reshape(B, -1)
        change = value - x
        size = jnp.linalg.norm(change, axis=-1)
        residual = size / jnp.maximum(jnp.linalg.norm(value, axis=-1), 1e-30)
        better = (smallest >= tolerance) & (residual < smallest)
        best = jnp.where(better[:, None], value, state), jnp.where(better, residual, smallest)
        values, residuals = values.at[:, i % memory].set(value), residuals.at[:, i % memory].set(change)
        # Weights a with sum 1 that minimise |sum_j a_j residual_j|. Residuals shrink from one to the next; they are
        # normalised first, so that the ridge is equally large for all of them.
        lengths = jnp.linalg.norm(residuals, axis=-1)  # [B, m]
        used = lengths > 0
        scale = jnp.where(used, 1 / jnp.where(used, lengths, 1), 0)
        unit = residuals * scale[..., None]
        alike = jnp.einsum("bin,bjn->bij", unit, unit)
        alike = alike + jax.vmap(jnp.diag)(jnp.where(used, RIDGE, 1.0))
        weights = scale * jnp.linalg.solve(alike, scale[..., None])[..., 0]
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.einsum("bj,bjn->bn", weights / jnp.where(total > 0, total, 1), values)
        return i + 1, jnp.where(total > 0, mixed, value), best, values, residuals

    dtype = x.dtype
    flat = x.astype(jnp.float32).reshape(B, -1)
    nothing = jnp.zeros((B, memory, flat.shape[1]))
    start = jnp.int32(0), flat, (flat, jnp.full(B, jnp.inf)), nothing, nothing
    i, _, (state, residual), _, _ = lax.while_loop(unfinished, evaluate, start)
    return Solution(state.reshape(shape).astype(dtype), residual, i)


def equilibrium(
    step: Callable[[Array], Array],
    s: Float[Array | np.ndarray, "B ..."],
    *,
    max_calls: int,
    tolerance: float,
    max_backward: int | None = None,
) -> Solution:
    """The fixed point of `step`, with the implicit gradient for everything `step` closes over; `s` has none.

    Args:
      step: s [B, ...] -> s; a contraction near its fixed point, otherwise the solvers may not converge.
      s: start.
      max_calls, tolerance: see `anderson`. max_backward: evaluations of the gradient's solver (default: max_calls).

    Raises:
      InputError: see `anderson`.
    """
    pure, captured = jax.closure_convert(step, s)
    return _equilibrium(pure, max_calls, max_backward or max_calls, tolerance, s, *captured)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _equilibrium(
    pure: Pure, max_calls: int, max_backward: int, tolerance: float, s: Array, *captured: Array
) -> Solution:
    return anderson(lambda s: pure(s, *captured), s, max_calls=max_calls, tolerance=tolerance)


def _forward(pure: Pure, max_calls: int, max_backward: int, tolerance: float, s: Array, *captured: Array):
    found = _equilibrium(pure, max_calls, max_backward, tolerance, s, *captured)
    return found, (found.state, captured)


def _backward(
    pure: Pure,
    max_calls: int,
    max_backward: int,
    tolerance: float,
    kept: tuple[Array, tuple[Array, ...]],
    gradient: Solution,
):
    state, captured = kept
    _, pull = jax.vjp(pure, state, *captured)
    g = gradient.state
    u = anderson(lambda u: pull(u)[0] + g, g, max_calls=max_backward, tolerance=tolerance).state
    _, *to_captured = pull(u)
    return jnp.zeros_like(state), *to_captured


_equilibrium.defvjp(_forward, _backward)
