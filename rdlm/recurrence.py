"""How often the core runs, from which state, and with which gradient. Functions and pytrees, no Flax.

A `step` is any function `step(s, i) -> s` of a state pytree s and the index i of the recurrence (int32, from 0).
Training, evaluation, decoding and analysis differ only in which of these functions drives it:

  unroll        n recurrences without gradient, then k with (training; scoring at a fixed depth with k = 0)
  unroll_until  until every token has stopped (decoding, exact scoring with exits)
  checkpoints   one unroll that is read at several depths (a whole loss-by-depth curve)
  trajectory    every state (analysis)

`spectral_radius` says how fast a step forgets.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Float32, Int, Int32, Key, PyTree

from rdlm.config import InputError, Remat, Scheme
from rdlm.remat import STATE, recomputed
from rdlm.runtime.memory import require_memory

State = TypeVar("State")
T = TypeVar("T")
Step = Callable[[State, Array], State]


def sample_steps(
    key: Key[Array, ""],
    mean_recurrence: Int[Array, ""] | int,
    backprop_depth: Int[Array, ""] | int,
    scheme: Scheme | str = "poisson-lognormal-filling",
    progress: Float[Array, ""] | float | None = None,
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Draw (n, k): recurrences without and with gradient (docs/model.md, Sampling the depth).

    With t = max(mean_recurrence - backprop_depth, 0) and s = backprop_depth, the default draws
    rate ~ LogNormal(ln(t+s) - 1/8, 1/2), p ~ Poisson(rate) + 1, and fills those with gradient first:
    k = min(s, p), n = p - k; E[n + k] = t + s + 1.

    Args:
      key: JAX key; fold the training step into it, so that the draw is a function of (seed, step) on any host.
      mean_recurrence, backprop_depth: of the model.
      scheme: the reference's names. "-fill": n ~ PoissonLogNormal(t), k = s. "poisson-lognormal": k ~ U{1..2s}.
        "poisson-*": Poisson(t) without the log-normal. "poisson-truncated-full": as the default, with
        p = max(Poisson(t+s), 1). "simple": n ~ U{0..2t-1}, k ~ U{1..2s}. "fixed": (t, s). "non-recurrent": (0, 1).
        "full": (0, U{1..2s}).
      progress: None, or the completed share of a depth curriculum, in (0, 1]: t and s grow to ceil(progress * t) and
        max(ceil(progress * s), 1).
    """
    t: Array | int = jnp.maximum(mean_recurrence - backprop_depth, 0)
    s: Array | int = backprop_depth
    if progress is not None:
        share = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
        t = jnp.ceil(share * t).astype(jnp.int32)
        s = jnp.maximum(jnp.ceil(share * s).astype(jnp.int32), 1)
    n_key, k_key, rate_key = jax.random.split(key, 3)

    def uniform(key: Array, low: int, high: Array | int) -> Array:
        return jax.random.randint(key, (), low, jnp.maximum(jnp.asarray(high), low) + 1)

    def poisson(mean: Array | int) -> Array:
        return jax.random.poisson(n_key, jnp.asarray(mean, jnp.float32), ())

    def poisson_lognormal(mean: Array | int) -> Array:
        sigma = 0.5
        mean = jnp.asarray(mean, jnp.float32)
        rate = jnp.exp(jnp.log(jnp.maximum(mean, 1e-9)) - sigma**2 / 2 + sigma * jax.random.normal(rate_key))
        return jnp.where(mean > 0, poisson(rate), 0)

    n: Array | int
    k: Array | int
    if scheme in ("poisson-lognormal-filling", "poisson-truncated-full"):
        mean = jnp.asarray(t) + s
        p = poisson_lognormal(mean) + 1 if scheme == "poisson-lognormal-filling" else jnp.maximum(poisson(mean), 1)
        k = jnp.minimum(s, p)
        n = p - k
    elif scheme == "poisson-lognormal-fill":
        n, k = poisson_lognormal(t), s
    elif scheme == "poisson-lognormal":
        n, k = poisson_lognormal(t), uniform(k_key, 1, 2 * s)
    elif scheme in ("poisson-unbounded", "poisson-bounded", "poisson-fill"):
        n = poisson(t)
        if scheme == "poisson-bounded":
            n = jnp.minimum(n, 2 * jnp.asarray(t) - 1)
        k = s if scheme == "poisson-fill" else uniform(k_key, 1, 2 * s)
    elif scheme == "simple":
        n, k = uniform(n_key, 0, 2 * jnp.asarray(t) - 1), uniform(k_key, 1, 2 * s)
    elif scheme == "fixed":
        n, k = t, s
    elif scheme == "non-recurrent":
        n, k = 0, 1
    elif scheme == "full":
        n, k = 0, uniform(k_key, 1, 2 * s)
    else:
        raise InputError(f"recurrence.scheme = {scheme!r}: unknown sampling scheme")
    return jnp.asarray(jnp.maximum(n, 0), jnp.int32), jnp.asarray(k, jnp.int32)


def max_gradient_steps(backprop_depth: int, scheme: Scheme) -> int:
    """Largest k that `sample_steps` can draw: the number of gradient slots a training step compiles."""
    wide = ("poisson-lognormal", "poisson-unbounded", "poisson-bounded", "simple", "full")
    return 2 * backprop_depth if scheme in wide else (1 if scheme == "non-recurrent" else backprop_depth)


def initial_state(
    key: Key[Array, ""] | Key[Array, "#B"] | Key[Array, "B L"],
    positions: Int[Array, "L"] | Int[Array, "#B L"],
    dim: int,
    dtype: DTypeLike = jnp.float32,
    scale: ArrayLike = 1.0,
) -> Float[Array, "L {dim}"] | Float[Array, "B L {dim}"]:
    """s0 as a function of (key, position): batching, packing or resuming never changes a token's noise.

    Each element is sqrt(D) times a normal of variance 2/(5D) cut at +-3 standard deviations (docs/model.md, Initial
    state), so its deviation is 0.6240 at any width.

    Args:
      key: one key (the same noise in every row), one per row, or one per token (for rows that hold several documents).
      positions: each token's position in its own sequence.
      dim: D.
      dtype: of the result, which has an axis B if `key` or `positions` has.
      scale: multiplies deviation and bounds; a number or one per row [B]; 0 gives the zero state.
    """
    if key.ndim and positions.ndim == 1:
        positions = positions[None]  # the same in every row
    key = key.reshape(key.shape + (1,) * (positions.ndim - key.ndim))
    keys = jnp.broadcast_to(key, jnp.broadcast_shapes(key.shape, positions.shape))

    def one(key: Array, position: Array) -> Array:
        return jax.random.truncated_normal(jax.random.fold_in(key, position), -3.0, 3.0, (dim,), jnp.float32)

    noise = jax.vmap(one)(keys.ravel(), jnp.broadcast_to(positions, keys.shape).ravel())
    scale = jnp.asarray(scale, jnp.float32).reshape(-1, *(1,) * keys.ndim) if jnp.ndim(scale) else scale
    return (noise.reshape(*keys.shape, dim) * (scale * math.sqrt(0.4))).astype(dtype)


def unroll(
    step: Step[State],
    s: State,
    n: Int[Array, ""] | int,
    k: Int[Array, ""] | int,
    max_k: int | None = None,
    remat: Remat = "none",
    learnt_start: bool = False,
) -> State:
    """n recurrences under `stop_gradient`, then k with gradient: truncated backpropagation (arXiv 2502.05171, 3.3).

    Gradients reach what `step` closes over through the last k recurrences only. They never reach `s`, unless it is a
    learnt start and n = 0.

    Args:
      step: step(s, i); may close over anything, traced values included.
      s: initial state.
      n: recurrences without gradient; a traced scalar does not recompile.
      k: recurrences with gradient. A Python int compiles exactly k slots. A traced k needs `max_k` and computes all
        slots, those beyond k without effect, so that one program serves every (n, k). Of a k above `max_k` only the
        last `max_k` recurrences are differentiated.
      max_k: number of gradient slots for a traced k.
      remat: what each slot stores for the backward pass, see `rdlm.remat.recomputed`.
      learnt_start: `s` depends on parameters, such as the embedding: with n = 0 it gets a gradient too.

    Returns:
      The state after n + k recurrences.
    """
    slots = k if isinstance(k, int) else max_k
    if slots is None:
        raise InputError("unroll: a traced k needs max_k, the number of gradient slots to compile")
    live = None if isinstance(k, int) else jnp.minimum(k, slots)
    n = n if live is None else n + k - live
    frozen = _without_gradient(step, s)
    start = s
    with jax.named_scope("recurrence_free"):
        s = lax.fori_loop(0, n, lambda i, s: frozen(s, i), jax.tree.map(lax.stop_gradient, s))
    s = jax.tree.map(lax.stop_gradient, s)
    if learnt_start:
        s = jax.tree.map(lambda first, x: jnp.where(n == 0, first, x), start, s)
    if slots == 0:
        return s

    def slot(s: State, j: Array) -> tuple[State, None]:
        new = step(jax.tree.map(lambda x: checkpoint_name(x, STATE), s), n + j)
        if live is not None:
            new = jax.tree.map(lambda x, old: jnp.where(j < live, x, old), new, s)
        return new, None

    with jax.named_scope("recurrence_gradient"):
        return lax.scan(recomputed(slot, remat), s, jnp.arange(slots, dtype=jnp.int32))[0]


def unroll_until(
    step: Step[State],
    finished: Callable[[State, Array], Array],
    s: State,
    max_steps: Int[Array, ""] | int,
    done: Int[Array, ""] | int = 0,
) -> tuple[State, Int32[Array, ""]]:
    """Run `step` from recurrence `done` until `finished(s, i)` (bool scalar; i steps done) or i = `max_steps`.

    Returns (state, i).
    """

    def unfinished(carry: tuple[State, Array]) -> Array:
        s, i = carry
        return (i < max_steps) & ~finished(s, i)

    with jax.named_scope("recurrence_until"):
        return lax.while_loop(unfinished, lambda carry: (step(*carry), carry[1] + 1), (s, jnp.asarray(done, jnp.int32)))


def check_depths(depths: Sequence[int], min_depth: int = 1) -> tuple[int, ...]:
    """`depths` as a tuple.

    Raises:
      InputError: none, not whole numbers, not increasing, or one below `min_depth` or beyond an int32.
    """
    try:
        whole = tuple(operator.index(r) for r in depths)
    except TypeError as error:
        raise InputError(f"depths = {depths!r}: must be a list of whole numbers") from error
    if not whole or list(whole) != sorted(set(whole)) or whole[0] < min_depth or whole[-1] >= 2**31:
        raise InputError(f"depths = {whole}: must be increasing recurrences, each at least {min_depth} and below 2**31")
    return whole


def checkpoints(step: Step[State], s: State, depths: Sequence[int], read: Callable[[State], T]) -> T:
    """`read(state)` after each of the increasing `depths`, all from one unroll: the curve costs its deepest point.

    No gradient. Returns what `read` returns with a new leading axis, one entry per depth. `step` and `read` are
    compiled once, not once per depth.
    """
    frozen = _without_gradient(step, s)

    def until(carry: tuple[State, Array], depth: Array) -> tuple[tuple[State, Array], T]:
        s, done = carry
        s = lax.fori_loop(done, depth, lambda i, s: frozen(s, i), s)
        return (s, depth), read(s)

    stops = jnp.asarray(check_depths(depths, min_depth=0), jnp.int32)
    require_memory(
        f"depths: what is read at {len(stops)} of them",
        len(stops) * _bytes(jax.eval_shape(read, s)),
        "read fewer depths, or a smaller batch",
    )
    return lax.scan(until, (jax.tree.map(lax.stop_gradient, s), jnp.int32(0)), stops)[1]


def trajectory(step: Step[State], s: State, r: int) -> State:
    """All states s_0 .. s_r, stacked on a new leading axis of size r + 1."""

    def body(s: State, i: Array) -> tuple[State, State]:
        s = step(s, i)
        return s, s

    require_memory(
        f"trajectory: the states of {r} recurrences",
        2 * (r + 1) * _bytes(s),
        "take fewer, or a shorter or smaller batch",
    )
    _, states = lax.scan(body, s, jnp.arange(r, dtype=jnp.int32))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), s, states)


def spectral_radius(step: Callable[[Array], Array], s: Float[Array, "B *rest"], rounds: int = 8) -> Float32[Array, "B"]:
    """Largest |eigenvalue| of the Jacobian of `step` at s, of every row by itself, as `rounds` power iterations see it.

    Rows must not mix in `step`. All start from one fixed random direction. Where the largest eigenvalues are complex
    or close to each other, the value is that of a typical direction. Gradients reach what `step` closes over, through
    the last product alone, and not s.
    """
    s = lax.stop_gradient(s)
    frozen = _without_gradient(lambda x, _: step(x), s)
    _, product = jax.linearize(lambda x: frozen(x, jnp.int32(0)), s)

    def unit(v: Array) -> Array:
        return (v / _row_norms(v).reshape(-1, *(1,) * (v.ndim - 1))).astype(s.dtype)

    start = unit(jnp.broadcast_to(jax.random.normal(jax.random.key(0), s.shape[1:], jnp.float32), s.shape))
    v = lax.fori_loop(0, rounds - 1, lambda _, v: unit(product(v)), start)
    return _row_norms(jax.jvp(step, (s,), (lax.stop_gradient(v),))[1])


def _row_norms(v: Float[Array, "B *rest"]) -> Float32[Array, "B"]:
    squares = jnp.square(v.astype(jnp.float32)).reshape(len(v), -1).sum(-1)
    return jnp.sqrt(jnp.maximum(squares, 1e-30))  # the root has no derivative at 0, where an adapter [0 I] begins


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _without_gradient(step: Step[State], s: State) -> Step[State]:
    """`step` with stop_gradient on everything it closes over, so that a loop of dynamic length may run it."""
    pure, captured = jax.closure_convert(step, s, jnp.int32(0))
    captured = [lax.stop_gradient(c) for c in captured]
    return lambda s, i: pure(s, i, *captured)
