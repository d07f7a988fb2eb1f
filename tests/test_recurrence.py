"""The recurrence against plain Python loops, and its random draws as functions of (seed, step, position) alone."""

import functools
import math
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.lax import stop_gradient

from rdlm.config import InputError, Scheme
from rdlm.recurrence import (
    checkpoints,
    initial_state,
    max_gradient_steps,
    sample_steps,
    spectral_radius,
    trajectory,
    unroll,
    unroll_until,
)
from rdlm.remat import keep

K, D = 4, 6  # most gradient steps; width
TOLERANCE = 1e-5


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# A core in small: contracting weights, an input injected in every step, and a bias of its own for every recurrence.
WEIGHTS = {"w": random(0, D, D) / D**0.5, "e": random(1, 3, D), "bias": random(2, 16, D)}
S0, READ = random(3, 3, D), random(4, 3, D)


def core(weights):
    def step(s, i):
        return jnp.tanh(keep(jnp.matmul(s, weights["w"]), "sum") + weights["e"] + jnp.asarray(weights["bias"])[i][None])

    return step


WAYS = {"stored": unroll, "recomputed": functools.partial(unroll, remat="iteration")}


def loop(step, s, n, k):
    """Truncated backpropagation as one writes it down."""
    for i in range(n):
        s = step(stop_gradient(s), i)
    s = stop_gradient(s)
    for i in range(n, n + k):
        s = step(s, i)
    return s


def value_and_gradients(run):
    """run(step, s0) -> the final state, and the gradients of a projection of it to the weights and to s0."""

    def projected(weights, s0):
        s = run(core(weights), s0)
        return jnp.sum(s * READ), s

    return jax.jit(jax.grad(projected, argnums=(0, 1), has_aux=True))(WEIGHTS, S0)


def expected(n, k):
    def run(step, s0):
        # What `core` closes over must not carry gradient in the first n steps either.
        s = loop(lambda s, i: stop_gradient(step(s, i)), s0, n, 0)
        return loop(lambda s, i: step(s, n + i), s, 0, k)

    return value_and_gradients(run)


@pytest.fixture(scope="module")
def traced():
    """Gradients by one of `WAYS` with traced n and k: one program for all of them."""

    def gradients(n, k, way):
        def projected(weights, s0):
            s = WAYS[way](core(weights), s0, n, k, max_k=K)
            return jnp.sum(s * READ), s

        return jax.grad(projected, argnums=(0, 1), has_aux=True)(WEIGHTS, S0)

    return jax.jit(gradients, static_argnums=2)


def distance(a, b):
    """Largest difference of two trees, relative to the largest entry of each array."""
    return max(
        float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-9))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("n", [0, 3, 9])
@pytest.mark.parametrize("k", range(1, K + 1))
def test_unroll_is_the_python_loop_with_its_gradients(n, k, traced):
    reference = expected(n, k)
    for way, run in WAYS.items():
        assert distance(traced(jnp.int32(n), jnp.int32(k), way), reference) < TOLERANCE
        static = value_and_gradients(lambda step, s0, run=run: run(step, s0, n, k))
        assert distance(static, reference) < TOLERANCE


@pytest.mark.parametrize("off", [(1, 0), (0, 1), (0, -1), (-1, 1), (1, -1)])
def test_control_off_by_one_shows(off, traced):
    # The last two run the same depth: only the gradient can tell them apart.
    reference, _ = expected(3, 2)
    for way in WAYS:
        gradients, _ = traced(jnp.int32(3 + off[0]), jnp.int32(2 + off[1]), way)
        assert distance(gradients, reference) > 1000 * TOLERANCE


def test_one_program_serves_every_depth():
    chex.clear_trace_counter()  # it counts by name, over tests
    program = jax.jit(chex.assert_max_traces(lambda n, k: unroll(core(WEIGHTS), S0, n, k, max_k=K), n=1))
    for n, k in [(0, 1), (3, 4), (9, 2), (1, 0)]:
        np.testing.assert_allclose(program(jnp.int32(n), jnp.int32(k)), loop(core(WEIGHTS), S0, n, k), atol=1e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_gradient_stays_out_of_the_first_steps_and_the_initial_state(k, traced):
    for n in (0, 5):
        static = value_and_gradients(lambda step, s0, n=n: unroll(step, s0, n, k))
        for (weights, s0), _ in (static, *(traced(jnp.int32(n), jnp.int32(k), way) for way in WAYS)):
            assert not np.any(s0)
            live = np.any(np.asarray(weights["bias"]), axis=1)
            assert live.tolist() == [n <= i < n + k for i in range(16)]
            if k == 0:
                assert not np.any(weights["w"])
                assert not np.any(weights["e"])


def test_a_k_beyond_the_slots_is_cut_to_them():
    """The depth stays; a gradient of slots that were written twice would be another."""
    k, slots = 4, 2
    beyond = value_and_gradients(lambda step, s0: unroll(step, s0, jnp.int32(1), jnp.int32(k), slots))
    assert distance(beyond, expected(1 + k - slots, slots)) < TOLERANCE
    assert distance(beyond, expected(1, k)) > 1000 * TOLERANCE


@pytest.mark.parametrize("changes", [False, True])
def test_only_what_changes_is_kept_for_every_step(changes):
    """Neither weights nor constants, which the backward pass reads too; the control makes the constant change."""

    def final(weights, constant):
        def step(s, i):
            given = keep(constant + i, "sum") if changes else constant
            return jnp.tanh(keep(s @ weights["w"], "sum") * given) + weights["e"]

        return unroll(step, jnp.asarray(S0), 2, 3, K).sum()

    constant = jnp.linspace(0.1, 0.9, 3)[:, None]  # of a shape that nothing else has
    program = str(jax.make_jaxpr(jax.grad(final))({name: WEIGHTS[name] for name in ("w", "e")}, constant))
    assert f"f32[3,3,{D}]" in program  # what is kept, of 3 recurrences
    assert f"f32[3,{D},{D}]" not in program
    assert ("f32[3,3,1]" in program) == changes


def test_traced_k_needs_to_know_its_most():
    with pytest.raises(InputError, match="max_k"):
        unroll(core(WEIGHTS), S0, 1, jnp.int32(2))


def test_states_may_be_pytrees():
    def step(s, i):
        return {"a": jnp.sin(s["a"]) + s["b"], "b": s["b"] * 0.9 + i}

    s0 = {"a": S0, "b": jnp.ones((1, 1))}
    assert distance(unroll(step, s0, 2, 3), loop(step, s0, 2, 3)) < 1e-6


# The other drivers


def test_checkpoints_are_separate_unrolls():
    depths, step = (0, 1, 4, 5, 11), core(WEIGHTS)
    read = checkpoints(step, S0, depths, jnp.cos)
    assert len(read) == len(depths)
    for r, value in zip(depths, read, strict=True):
        np.testing.assert_allclose(value, jnp.cos(unroll(step, S0, r, 0)), atol=1e-6)
        np.testing.assert_allclose(value, jnp.cos(loop(step, S0, r, 0)), atol=1e-6)


def test_checkpoints_carry_no_gradient():
    gradient = jax.grad(lambda w: jnp.sum(checkpoints(core(w), S0, (1, 3), lambda s: s)[1]))(WEIGHTS)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("depths", [(), (4, 2), (1, 1), (-1, 3)])
def test_checkpoints_refuse_depths_that_do_not_increase(depths):
    with pytest.raises(InputError, match="increasing"):
        checkpoints(core(WEIGHTS), S0, depths, lambda s: s)


def test_trajectory_keeps_every_state():
    step, states = core(WEIGHTS), trajectory(core(WEIGHTS), S0, 7)
    assert states.shape == (8, *S0.shape)
    for r in range(8):
        np.testing.assert_allclose(states[r], loop(step, S0, r, 0), atol=1e-6)


@pytest.mark.parametrize(("stop", "most", "expected"), [(3, 9, 3), (0, 9, 0), (7, 4, 4), (99, 0, 0)])
def test_unroll_until(stop, most, expected):
    # `finished` is asked before every step with the number done, so a state that is finished already is not touched.
    for limit in (most, jnp.int32(most)):
        s, ran = unroll_until(core(WEIGHTS), lambda s, i: i >= stop, S0, limit)
        assert ran == expected
        np.testing.assert_allclose(s, loop(core(WEIGHTS), S0, expected, 0), atol=1e-6)


def test_unroll_until_goes_on_where_it_stopped():
    halfway, _ = unroll_until(core(WEIGHTS), lambda s, i: i >= 3, S0, 8)
    s, ran = unroll_until(core(WEIGHTS), lambda s, i: i < 0, halfway, 8, done=3)
    assert ran == 8
    np.testing.assert_allclose(s, loop(core(WEIGHTS), S0, 8, 0), atol=1e-6)


# Initial states


state_of = jax.jit(initial_state, static_argnums=2)
POSITIONS = st.lists(st.integers(0, 4095), min_size=4, max_size=4)


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1), POSITIONS, st.permutations(range(3)))
def test_state_is_a_function_of_key_and_position(seed, positions, order):
    keys, order = jax.random.split(jax.random.key(seed), 3), np.array(order)
    alone = np.array([[state_of(key, np.array([p]), D)[0] for p in positions] for key in keys])
    # Any order of rows: keys per row, with positions shared or of its own.
    assert np.array_equal(state_of(keys[order], np.array(positions), D), alone[order])
    assert np.array_equal(state_of(keys[order], np.array([positions] * 3), D), alone[order])
    # Any neighbours: a key for every token, as in rows packed from several documents.
    rows = np.array([order, order[::-1]])
    packed = state_of(keys[rows], np.array([positions[:3], positions[1:]]), D)
    assert np.array_equal(packed[0], [alone[r, t] for t, r in enumerate(rows[0])])
    assert np.array_equal(packed[1], [alone[r, t + 1] for t, r in enumerate(rows[1])])


def test_state_rows_and_positions_differ():
    keys = jax.random.split(jax.random.key(0), 4)
    s = np.asarray(initial_state(keys, jnp.arange(4), D))  # as many rows as positions
    assert s.shape == (4, 4, D)
    assert len({x.tobytes() for x in s.reshape(16, D)}) == 16
    one = initial_state(keys[0], jnp.array([[0, 1], [0, 1]]), D)
    assert np.array_equal(one[0], one[1])


@pytest.mark.parametrize("dim", [8, 64, 512])
def test_state_deviation_does_not_depend_on_the_width(dim):
    s = np.asarray(initial_state(jax.random.key(5), jnp.arange(2**18 // dim), dim))
    assert s.std() == pytest.approx(0.6240, rel=0.005)
    assert np.abs(s).max() <= 1.8974
    assert np.abs(s).max() > 1.85
    half = initial_state(jax.random.key(5), jnp.arange(2**18 // dim), dim, scale=0.5)
    np.testing.assert_allclose(half, s * 0.5, rtol=1e-6)


def test_state_of_scale_zero_is_zero():
    assert not np.any(initial_state(jax.random.key(5), jnp.arange(9), 16, scale=0.0))
    assert initial_state(jax.random.key(5), jnp.arange(9), 16, dtype=jnp.bfloat16).dtype == jnp.bfloat16


# Depth draws


@pytest.mark.parametrize("scheme", typing.get_args(Scheme))
def test_draws_are_a_function_of_the_key_and_in_range(scheme):
    mean, depth = 12, 3
    draw = jax.jit(jax.vmap(lambda i: sample_steps(jax.random.fold_in(jax.random.key(7), i), mean, depth, scheme)))
    n, k = draw(jnp.arange(300))
    assert n.dtype == k.dtype == jnp.int32
    assert n.min() >= 0
    assert k.min() >= 1
    assert k.max() <= max_gradient_steps(depth, scheme)
    for again, first in zip(draw(jnp.arange(300)[::-1]), (n, k), strict=True):
        assert np.array_equal(again, first[::-1])
    if scheme not in ("fixed", "non-recurrent"):
        assert len(set(zip(n.tolist(), k.tolist(), strict=True))) > 2


def test_draws_fill_gradient_steps_first():
    n, k = jax.jit(jax.vmap(lambda key: sample_steps(key, 4, 4)))(jax.random.split(jax.random.key(3), 2000))
    assert not np.any(n[k < 4])
    assert np.any(k < 4)
    assert np.any(n > 0)


def test_truncated_poisson_draws():
    """n + k ~ max(Poisson(mean), 1), whatever the number with gradient: it only says which of them come first."""
    keys = jax.random.split(jax.random.key(3), 20_000)
    n, k = jax.jit(jax.vmap(lambda key: sample_steps(key, 4, 2, "poisson-truncated-full")))(keys)
    np.testing.assert_array_equal(k, np.minimum(n + k, 2))
    counts = np.bincount(n + k, minlength=12)[:12] / len(keys)
    expected = [math.exp(-4) * 4**i / math.factorial(i) for i in range(12)]
    expected[1], expected[0] = expected[1] + expected[0], 0.0
    assert np.abs(counts - expected).max() < 0.012
    assert np.abs(np.roll(counts, 1) - expected).max() > 0.03  # control: one recurrence more is noticed


def test_draws_of_an_unknown_scheme_are_refused():
    with pytest.raises(InputError, match="scheme"):
        sample_steps(jax.random.key(0), 4, 2, "gaussian")


def test_spectral_radius_and_its_gradient_are_those_of_linear_algebra():
    """Of a symmetric map: |largest eigenvalue|, and the outer product of its vector as gradient; rows apart."""
    random = np.random.default_rng(0)
    q, _ = np.linalg.qr(random.normal(size=(6, 6)))
    W = jnp.asarray(q * np.array([-1.7, 0.6, 0.5, 0.2, 0.1, -0.3]) @ q.T, jnp.float32)
    scales = jnp.array([1.0, 0.5])

    def radius(W):
        return spectral_radius(lambda s: scales[:, None] * (s @ W), jnp.ones((2, 6)), 30)

    np.testing.assert_allclose(radius(W), [1.7, 0.85], rtol=1e-4)
    gradient = jax.grad(lambda W: radius(W)[0])(W)
    np.testing.assert_allclose(gradient, -np.outer(q[:, 0], q[:, 0]), atol=1e-4)
    assert abs(float(spectral_radius(lambda s: s @ W, jnp.ones((1, 6)), 1)[0]) - 1.7) > 0.1, "control: one is too few"
    state = jax.grad(lambda s: spectral_radius(lambda x: x**2 @ W, s, 9).sum())(jnp.ones((1, 6)))
    assert not np.any(state)
    value, gradient = jax.value_and_grad(lambda c: spectral_radius(lambda s: c * s, jnp.ones((1, 6)))[0])(0.0)
    assert value < 1e-12
    assert gradient == 0, "a step that forgets its state has nothing to lose"
