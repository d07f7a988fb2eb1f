"""How much one recurrence changes distances near a state: its Jacobian's norm and eigenvalues, from products with it.

J = ds_{i+1} / ds_i, for all tokens of a text at once: L*D by L*D, never formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Key

from rdlm.config import InputError, ModelConfig
from rdlm.model import Params, bind


class Contraction(NamedTuple):
    """What one recurrence does to small differences, per row; float64 [B] each.

    norm: largest singular value of J, the maximum amplification of a difference. radius: largest
    |eigenvalue|, the factor per recurrence in the long run; below 1 differences die out. period: recurrences per turn
    of that eigenvalue, 2 pi / |angle|; infinite where it is real and positive. residual: ||J v - lambda v|| of the unit
    vector behind radius; near 0 means converged.
    """

    norm: np.ndarray
    radius: np.ndarray
    period: np.ndarray
    residual: np.ndarray


def _unit(v: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], Float[Array, "B"]]:
    """Rows of v at length 1, and their lengths."""
    length = jnp.sqrt((v * v).sum((1, 2)))
    return v / jnp.maximum(length, 1e-30)[:, None, None], length


def power_iterations(
    f: Callable[[Array], Array], x: Float[Array, "B L D"], key: Key[Array, ""], rounds: int, basis: int
) -> tuple[Float32[Array, "B"], Float32[Array, "B {basis+1} {basis}"]]:
    """Largest singular value, and J restricted to a Krylov space, of a map f of x whose rows do not mix.

    `rounds` products with J^T J, then `rounds` with J, then a Krylov basis of `basis` vectors from where these end:
    the power iteration lets small eigenvalues die out, the basis tells apart those of nearly equal size, pairs of
    complex ones included.

    Returns:
      (norm, H of J Q = Q H).
    """
    x = x.astype(jnp.float32)
    _, J = jax.linearize(f, x)
    JT = jax.linear_transpose(J, x)
    start, _ = _unit(jax.random.normal(key, x.shape))

    def both(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return _unit(JT(J(carry[0]))[0])

    _, squared = jax.lax.fori_loop(0, rounds, both, (start, jnp.zeros(x.shape[0])))
    v = jax.lax.fori_loop(0, rounds, lambda _, v: _unit(J(v))[0], start)
    Q = jnp.zeros((basis + 1, *x.shape)).at[0].set(v)
    H = jnp.zeros((basis, basis + 1, x.shape[0]))

    def grow(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        Q, H = carry
        w, h = J(Q[j]), jnp.zeros((basis + 1, x.shape[0]))
        for _ in range(2):  # once is not enough in f32
            part = jnp.einsum("mbld,bld->mb", Q, w)
            w, h = w - jnp.einsum("mbld,mb->bld", Q, part), h + part
        w, length = _unit(w)
        return Q.at[j + 1].set(w), H.at[j].set(h.at[j + 1].set(length))

    _, H = jax.lax.fori_loop(0, basis, grow, (Q, H))
    return jnp.sqrt(squared), H.transpose(2, 1, 0)


def dominant(H: Float[np.ndarray, "_ M"]) -> tuple[complex, float]:
    """(dominant eigenvalue, residual) of the map behind H [M + 1, M], see `power_iterations`."""
    H = np.asarray(H, np.float64)
    below = np.flatnonzero(np.diagonal(H, -1) <= 1e-6 * np.abs(H).max())
    m = int(below[0]) + 1 if len(below) else H.shape[1]  # the space is exhausted: what follows is noise
    values, vectors = np.linalg.eig(H[:m, :m])
    first = int(np.abs(values).argmax())
    return complex(values[first]), float(abs(H[m, m - 1] * vectors[-1, first]))


@functools.partial(jax.jit, static_argnames=("config", "rounds", "basis"))
def _iterate(params: Params, config: ModelConfig, tokens: Array, s: Array, key: Array, rounds: int, basis: int):
    of = bind(params, config, tokens, state=s)
    return power_iterations(lambda s: of.step(s, 0), s, key, rounds, basis)


def contraction(
    params: Params,
    config: ModelConfig,
    tokens: Array | np.ndarray,
    s: Float[Array | np.ndarray, "B L D"],
    *,
    rounds: int = 50,
    basis: int = 24,
) -> Contraction:
    """What a recurrence does to small differences around states s of tokens int [B, L], in f32.

    Args:
      params, config: the model; test-time noise must be off.
      tokens, s: the text and where to look, for example the deepest captured state.
      rounds: power iterations.
      basis: size of the Krylov space after them.

    Raises:
      InputError: wrong shapes, test-time noise, rounds or basis below 1.
    """
    if rounds < 1 or basis < 1:
        raise InputError(f"rounds = {rounds}, basis = {basis}: must be at least 1")
    if config.test_time_noise:
        raise InputError(f"config.test_time_noise = {config.test_time_noise}: contraction needs a model without noise")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    basis = min(basis, s.shape[1] * s.shape[2])
    norm, H = _iterate(params, config, tokens, s, jax.random.key(0), rounds, basis)
    found = [dominant(h) for h in np.asarray(H)]
    angle = [abs(math.atan2(value.imag, value.real)) for value, _ in found]
    return Contraction(
        np.asarray(norm, np.float64),
        np.array([abs(value) for value, _ in found]),
        np.array([2 * math.pi / a if a > 1e-6 else math.inf for a in angle]),
        np.array([residual for _, residual in found]),
    )
