"""The heart: how often the core runs, from which state, and with which gradient. Functions and pytrees, no Flax.

A `step` is any function `step(s, i) -> s` of a state pytree s and the recurrence index i (int32, from 0). Train,
evaluate, decode and analysis differ only in which of these functions drives it:

  unroll        n steps without gradient, then k with (training; fixed-depth scoring with k = 0)
  unroll_until  until every token has stopped (decoding, exact scoring with exits)
  checkpoints   one unroll that stops by at several depths (a whole loss-by-depth curve)
  trajectory    every state (analysis)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Int32, Key

from rdlm.config import InputError, Remat, Scheme
from rdlm.remat import recomputed

State = Any
Step = Callable[[State, Array], State]


def sample_steps(
    key: Key[Array, ""],
    mean_recurrence: int,
    backprop_depth: int,
    scheme: Scheme | str = "poisson-lognormal-filling",
    progress: Float[Array, ""] | float | None = None,
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Draw (n, k): core steps without and with gradient (spec section 3).

    With t = max(mean_recurrence - backprop_depth, 0) and s = backprop_depth, the default draws
    rate ~ LogNormal(ln(t+s) - 1/8, 1/2), p ~ Poisson(rate) + 1, and fills the gradient steps first:
    k = min(s, p), n = p - k; E[n + k] = t + s + 1.

    Args:
      key: JAX key; fold the training step into it, so that the draw is a function of (seed, step) on any host.
      mean_recurrence, backprop_depth: of the model.
      scheme: the reference's names. "-fill": n ~ PoissonLogNormal(t), k = s. "poisson-lognormal": k ~ U{1..2s}.
        "poisson-*": Poisson(t) without the log-normal. "simple": n ~ U{0..2t-1}, k ~ U{1..2s}. "fixed": (t, s).
        "non-recurrent": (0, 1). "full": (0, U{1..2s}).
      progress: None, or the share of a depth curriculum done, in (0, 1]: t and s grow to ceil(progress * t) and
        max(ceil(progress * s), 1).
    """
    t: Array | int = max(mean_recurrence - backprop_depth, 0)
    s: Array | int = backprop_depth
    if progress is not None:
        share = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
        t = jnp.ceil(share * t).astype(jnp.int32)
        s = jnp.maximum(jnp.ceil(share * s).astype(jnp.int32), 1)
    n_key, k_key, rate_key = jax.random.split(key, 3)

    def uniform(key: Array, least: int, most: Array | int) -> Array:
        return jax.random.randint(key, (), least, jnp.maximum(jnp.asarray(most), least) + 1)

    def poisson(mean: Array | int) -> Array:
        return jax.random.poisson(n_key, jnp.asarray(mean, jnp.float32), ())

    def poisson_lognormal(mean: Array | int) -> Array:
        sigma = 0.5
        mean = jnp.asarray(mean, jnp.float32)
        rate = jnp.exp(jnp.log(jnp.maximum(mean, 1e-9)) - sigma**2 / 2 + sigma * jax.random.normal(rate_key))
        return jnp.where(mean > 0, poisson(rate), 0)

    n: Array | int
    k: Array | int
    if scheme == "poisson-lognormal-filling":
        p = poisson_lognormal(jnp.asarray(t) + s) + 1
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
    dtype: Any = jnp.float32,
    scale: Any = 1.0,
) -> Float[Array, "L {dim}"] | Float[Array, "B L {dim}"]:
    """s0 as a function of (key, position): batching, packing or resuming never changes a token's noise.

    Each element is sqrt(D) times a normal of variance 2/(5D) cut at +-3 standard deviations (spec section 2), so its
    deviation is 0.6240 at any width.

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


def unroll(step: Step, s: State, n: Int[Array, ""] | int, k: Int[Array, ""] | int, max_k: int | None = None) -> State:
    """n steps under stop_gradient, then k steps with gradient: truncated backpropagation (spec section 3).

    Gradients reach whatever `step` closes over only through the last k steps, and never reach `s`.

    Args:
      step: step(s, i); may close over anything, traced values included.
      s: initial state.
      n: steps without gradient; a traced scalar does not recompile.
      k: steps with gradient. A traced k needs `max_k` and skips the slots beyond it, so one program serves every
        (n, k); a Python k compiles exactly k slots.
      max_k: number of gradient slots for a traced k.

    What `step` marked with `rdlm.remat.keep` is stored for the backward pass, in every slot, used or not. A training
    step runs `unroll_for_training`.

    Returns:
      The state after n + k steps.
    """
    frozen = _without_gradient(step, s)
    s = lax.fori_loop(0, n, lambda i, s: frozen(s, i), jax.tree.map(lax.stop_gradient, s))
    s = jax.tree.map(lax.stop_gradient, s)
    static = isinstance(k, int)
    slots = k if isinstance(k, int) else max_k
    if slots is None:
        raise InputError("unroll: a traced k needs max_k, the number of gradient slots to compile")
    if slots == 0:
        return s

    def slot(s: State, j: Array) -> tuple[State, None]:
        if static:
            return step(s, n + j), None
        # The k live slots come first; a skipped slot costs a branch.
        return lax.cond(j < k, lambda s: step(s, n + j), lambda s: s, s), None

    return lax.scan(recomputed(slot), s, jnp.arange(slots, dtype=jnp.int32))[0]


class Weights(NamedTuple):
    """How the weights of a step are kept while it runs n + k times, and what becomes of their gradient.

    fetch(stored): the weights as the step wants them, made once and used by every recurrence, forward and backward.
    give_back(gradient): undoes it, once, for the summed gradient of what `fetch` made: the gradient of `stored`.
    every_time: give the gradient of every recurrence back by itself, so that only stored ones are summed up.
    dtype: of the sum over recurrences; None: that of what `fetch` made.
    """

    fetch: Callable[[Any], Any] = lambda stored: stored
    give_back: Callable[[Any], Any] = lambda gradient: gradient
    every_time: bool = False
    dtype: Any = None


AS_STORED = Weights()


def unroll_for_training(
    step: Callable[[Any, Any, Any, State, Array], State],
    stored: Any,
    inputs: Any,
    constants: Any,
    s: Float[Array, "*state"],
    n: Int[Array, ""] | int,
    k: Int[Array, ""] | int,
    slots: int,
    weights: Weights = AS_STORED,
    remat: Remat = "none",
) -> Float[Array, "*state"]:
    """`unroll` with its backward pass written out: it runs exactly k gradient steps, there and back.

    It walks back over what the forward pass kept and sums the gradients itself. So weights can be fetched from other
    devices once for all recurrences and their gradient returned once, and slots that a small k leaves unused take no
    time.

    Args:
      step: step(whole, inputs, constants, s, i) -> s.
      stored: parameters, as `weights.fetch` takes them.
      inputs: what else needs a gradient, the same at every recurrence (the injected embedding).
      constants: arrays that need none (positions, segments). What `step` closes over instead may be kept k times.
      s: initial state, an array; no gradient reaches it.
      n, k: steps without and with gradient, traced or not. Of a k beyond `slots` the first steps lose their gradient.
      slots: most steps with gradient.
      weights: see `Weights`.
      remat: "none" keeps what `step` marked with `rdlm.remat.keep`. Otherwise the input of each gradient step is kept
        and the step run again; under "offload" it waits in the host's memory (TPU).
    """
    differentiated = _keeping_marked if remat == "none" else _keeping_input
    to_host = _on_host if remat == "offload" else lambda kept: kept
    to_device = _on_device if remat == "offload" else lambda kept: kept

    @jax.custom_vjp
    def run(stored: Any, inputs: Any, constants: Any, s: Array, n: Array, k: Array) -> Array:
        whole = weights.fetch(stored)
        return lax.fori_loop(0, n + k, lambda i, s: step(whole, inputs, constants, s, i), s)

    def forward(stored: Any, inputs: Any, constants: Any, s: Array, n: Array, k: Array) -> tuple[Array, Any]:
        whole = weights.fetch(stored)
        with jax.named_scope("recurrence_free"):
            s = lax.fori_loop(0, n, lambda i, s: step(whole, inputs, constants, s, i), s)
        pulls: list[Callable[..., Any]] = []  # what turns kept arrays into gradients; known once a step is traced

        def once(s: Array, i: Array) -> tuple[Array, list[Array]]:
            after, keep, pull = differentiated(step, whole, inputs, constants, s, i)
            pulls.append(pull)
            return after, keep

        kept = to_host([jnp.zeros((slots, *x.shape), x.dtype) for x in jax.eval_shape(once, s, n)[1]])

        def one(j: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            s, kept = carry
            s, keep = once(s, n + j)
            pairs = zip(kept, to_host(keep), strict=True)
            return s, [lax.dynamic_update_index_in_dim(all_of_it, x, j, 0) for all_of_it, x in pairs]

        with jax.named_scope("recurrence_forward"):
            s, kept = lax.fori_loop(0, k, one, (s, kept))
        return s, (whole, inputs, constants, kept, jax.tree_util.Partial(pulls[-1]), n, k)

    def backward(saved: Any, d_s: Array) -> tuple[Any, Any, None, None, None, None]:
        whole, inputs, constants, kept, pull, n, k = saved

        def zeros(like: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, weights.dtype or x.dtype), like)

        def one(done: Array, carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            d_s, d_whole, d_inputs = carry
            j = k - 1 - done
            at_j = to_device([lax.dynamic_index_in_dim(x, j, 0, keepdims=False) for x in kept])
            more_whole, more_inputs, d_s = pull(whole, inputs, constants, at_j, n + j, d_s)
            if weights.every_time:
                more_whole = weights.give_back(more_whole)
            add = functools.partial(jax.tree.map, lambda total, more: total + more.astype(total.dtype))
            return d_s, add(d_whole, more_whole), add(d_inputs, more_inputs)

        total = zeros(jax.eval_shape(weights.give_back, whole) if weights.every_time else whole)
        with jax.named_scope("recurrence_backward"):
            _, d_whole, d_inputs = lax.fori_loop(0, k, one, (d_s, total, zeros(inputs)))
        if not weights.every_time:
            d_whole = weights.give_back(d_whole)
        cast = functools.partial(jax.tree.map, lambda d, like: d.astype(like.dtype))
        return cast(d_whole, stored), cast(d_inputs, inputs), None, None, None, None

    run.defvjp(forward, backward)
    kept = jnp.minimum(jnp.asarray(k, jnp.int32), slots)
    return run(stored, inputs, constants, lax.stop_gradient(s), jnp.asarray(n + k, jnp.int32) - kept, kept)


def _keeping_input(
    step: Any, whole: Any, inputs: Any, constants: Any, s: Array, i: Array
) -> tuple[Array, list[Array], Callable[..., Any]]:
    """(state after the step, arrays to keep, pull(whole, inputs, constants, kept, i, d_after)).

    `pull` gives the gradients of whole, inputs and s.
    """

    def pull(whole: Any, inputs: Any, constants: Any, kept: list[Array], i: Array, d_after: Array) -> Any:
        _, back = jax.vjp(lambda whole, inputs, s: step(whole, inputs, constants, s, i), whole, inputs, *kept)
        return back(d_after)

    return step(whole, inputs, constants, s, i), [s], pull


def _keeping_marked(
    step: Any, whole: Any, inputs: Any, constants: Any, s: Array, i: Array
) -> tuple[Array, list[Array], Callable[..., Any]]:
    """As `_keeping_input`, but keeps what the backward pass reads and is dear to make again."""
    marked = recomputed(lambda whole, inputs, s: step(whole, inputs, constants, s, i))
    after, back = jax.vjp(marked, whole, inputs, s)
    needed, tree = jax.tree.flatten(back)
    always = jax.tree.leaves((whole, inputs, constants))  # there at every recurrence: not kept for each
    place = [next((at for at, x in enumerate(always) if x is y), None) for y in needed]
    known = [None if isinstance(y, jax.core.Tracer) else y for y in needed]  # masks of a kernel, made while tracing

    def pull(whole: Any, inputs: Any, constants: Any, kept: list[Array], i: Array, d_after: Array) -> Any:
        always, rest = jax.tree.leaves((whole, inputs, constants)), iter(kept)
        leaves = [
            always[at] if at is not None else next(rest) if y is None else y
            for at, y in zip(place, known, strict=True)
        ]  # fmt: skip
        return jax.tree.unflatten(tree, leaves)(d_after)

    changing = zip(needed, place, known, strict=True)
    return after, [x for x, at, y in changing if at is None and y is None], pull


def _on_host(arrays: list[Array]) -> list[Array]:
    return jax.device_put(arrays, jax.memory.Space.Host)


def _on_device(arrays: list[Array]) -> list[Array]:
    return jax.device_put(arrays, jax.memory.Space.Device)


def unroll_until(
    step: Step,
    finished: Callable[[State, Array], Array],
    s: State,
    most: Int[Array, ""] | int,
    first: Int[Array, ""] | int = 0,
) -> tuple[State, Int32[Array, ""]]:
    """Run `step` from recurrence `first` until `finished(s, i)` (bool scalar; i steps done) or i = `most`.

    Returns (state, i).
    """

    def go_on(carry: tuple[State, Array]) -> Array:
        s, i = carry
        return (i < most) & ~finished(s, i)

    return lax.while_loop(go_on, lambda carry: (step(*carry), carry[1] + 1), (s, jnp.asarray(first, jnp.int32)))


def check_depths(depths: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """`depths` as a tuple.

    Raises:
      InputError: none, not increasing, or one below `least`.
    """
    depths = tuple(int(r) for r in depths)
    if not depths or list(depths) != sorted(set(depths)) or depths[0] < least:
        raise InputError(f"depths = {depths}: must be increasing recurrences, each at least {least}")
    return depths


def checkpoints(step: Step, s: State, depths: Sequence[int], read: Callable[[State], Any]) -> Any:
    """`read(state)` after each of the increasing `depths`, all from one unroll: the curve costs its deepest point.

    No gradient. Returns what `read` returns with a new leading axis, one entry per depth. `step` and `read` are
    compiled once, not once per depth.
    """
    frozen = _without_gradient(step, s)

    def until(carry: tuple[State, Array], depth: Array) -> tuple[tuple[State, Array], Any]:
        s, done = carry
        s = lax.fori_loop(done, depth, lambda i, s: frozen(s, i), s)
        return (s, depth), read(s)

    stops = jnp.asarray(check_depths(depths, least=0), jnp.int32)
    return lax.scan(until, (jax.tree.map(lax.stop_gradient, s), jnp.int32(0)), stops)[1]


def trajectory(step: Step, s: State, r: int) -> State:
    """All states s_0 .. s_r, stacked on a new leading axis of size r + 1."""

    def body(s: State, i: Array) -> tuple[State, State]:
        s = step(s, i)
        return s, s

    _, states = lax.scan(body, s, jnp.arange(r, dtype=jnp.int32))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), s, states)


def _without_gradient(step: Step, s: State) -> Step:
    """`step` with stop_gradient on everything it closes over, so that a loop of dynamic length may run it."""
    pure, captured = jax.closure_convert(step, s, jnp.int32(0))
    captured = [lax.stop_gradient(c) for c in captured]
    return lambda s, i: pure(s, i, *captured)
