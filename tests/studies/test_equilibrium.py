"""Fixed points against ones that are known, the implicit gradient against a long unroll."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.shared.equilibrium import anderson, equilibrium
from rdlm.config import InputError
from rdlm.recurrence import unroll

B, D = 3, 12


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SLOW = 0.9 * np.linalg.qr(random(0, D, D))[0]  # every direction shrinks to .9 at a step
INPUT, START, READ = random(1, B, D), random(2, B, D), random(3, B, D)


def linear(s):
    return s @ SLOW + INPUT


def test_finds_the_fixed_point_of_a_linear_map():
    known = INPUT @ np.linalg.inv(np.eye(D) - SLOW)
    found = jax.jit(lambda s: anderson(linear, s, max_calls=60, tolerance=1e-6, memory=D + 1))(START)
    np.testing.assert_allclose(found.state, known, rtol=1e-4, atol=1e-4)
    assert (found.residual < 1e-6).all()
    assert found.evaluations <= 3 * D
    # As many plain steps are nowhere near it.
    plain = jax.jit(lambda s: anderson(linear, s, max_calls=int(found.evaluations), tolerance=1e-6, memory=1))(START)
    assert plain.evaluations == found.evaluations
    assert np.abs(plain.state - known).max() > 0.01


def test_memory_of_one_iterates_and_the_best_iterate_is_returned():
    found = jax.jit(lambda s: anderson(linear, s, max_calls=7, tolerance=0.0, memory=1))(START)
    states = [START]
    for _ in range(7):
        states.append(linear(states[-1]))
    states = np.stack(states)
    residuals = np.linalg.norm(np.diff(states, axis=0), axis=-1) / np.linalg.norm(states[1:], axis=-1)  # [7, B]
    best = residuals.argmin(0)
    assert best.min() < 6 == best.max()  # there is a row whose last iterate is not its best
    np.testing.assert_allclose(found.residual, residuals.min(0), rtol=1e-4)
    np.testing.assert_allclose(found.state, states[best + 1, range(B)], rtol=1e-5, atol=1e-5)
    assert found.evaluations == 7


def test_rows_do_not_depend_on_each_other():
    solve = jax.jit(lambda s, x: anderson(lambda s: jnp.tanh(s @ SLOW + x), s, max_calls=60, tolerance=1e-4))
    # The first row starts at its fixed point and has to wait for the others.
    first = solve(START, INPUT).state[0]
    start = np.stack([first, *START[1:]])
    together, alone = solve(start, INPUT), solve(np.stack([first] * B), np.stack([INPUT[0]] * B))
    assert together.evaluations > alone.evaluations
    np.testing.assert_allclose(together.state[0], alone.state[0], rtol=1e-6, atol=1e-6)


WEIGHTS = {"w": 0.8 * SLOW, "x": INPUT}


def gradient(run):
    def loss(weights, s):
        return jnp.sum(run(lambda s: jnp.tanh(s @ weights["w"] + weights["x"]), s) * READ)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(WEIGHTS, START)


def test_implicit_gradient_equals_a_long_unroll():
    implicit, to_start = gradient(lambda f, s: equilibrium(f, s, max_calls=100, tolerance=1e-6).state)
    unrolled, _ = gradient(lambda f, s: unroll(lambda s, i: f(s), s, 0, 60))
    one_step, _ = gradient(lambda f, s: unroll(lambda s, i: f(s), s, 60, 1))  # as if J were 0
    for name in WEIGHTS:
        size = np.abs(unrolled[name]).max()
        assert np.abs(implicit[name] - unrolled[name]).max() < 1e-3 * size
        assert np.abs(one_step[name] - unrolled[name]).max() > 0.1 * size
    assert not np.any(to_start)


def test_too_few_backward_evaluations_are_seen():
    exact, _ = gradient(lambda f, s: equilibrium(f, s, max_calls=100, tolerance=1e-6).state)
    cut, _ = gradient(lambda f, s: equilibrium(f, s, max_calls=100, max_backward=1, tolerance=1e-6).state)
    assert np.abs(cut["w"] - exact["w"]).max() > 0.01 * np.abs(exact["w"]).max()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_calls": 0, "tolerance": 1e-3}, "max_calls = 0: must be at least 1"),
        ({"max_calls": 5, "tolerance": -1.0}, "tolerance = -1.0: must not be negative"),
        ({"max_calls": 5, "tolerance": 1e-3, "memory": 0}, "memory = 0: must be at least 1"),
    ],
)
def test_refusals(settings, line):
    with pytest.raises(InputError, match=line):
        anderson(linear, START, **settings)
