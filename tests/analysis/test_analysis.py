"""rdlm.analysis on inputs whose truth is known: paths, limits, Jacobians; captured states against stepping by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm import exits
from rdlm.analysis import (
    capture,
    classify,
    contraction,
    distances,
    from_starts,
    lens,
    pca,
    rate,
    settled_after,
    spread,
)
from rdlm.analysis.contraction import dominant, power_iterations
from rdlm.config import InputError, ModelConfig
from rdlm.model import bind

R, D = 128, 6
TINY = ModelConfig(
    vocab_size=11, embed_dim=8, num_heads=2, mlp_dim=12, prelude_layers=1, core_layers=2, coda_layers=1, max_length=16,
    mean_recurrence=4, backprop_depth=2,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    # Larger than fresh ones, so that depths and layers differ by much.
    return jax.jit(lambda key: jax.tree.map(lambda x: 1.5 * x, rdlm.init_params(TINY, key)))(jax.random.key(0))


# Paths


BASE = np.random.default_rng(1).normal(size=D)
PLANE = np.linalg.qr(np.random.default_rng(2).normal(size=(D, 2)))[0]


def turning(period, factor=1.0, steps=R):
    """A spiral in a plane of D dimensions, around a point that is not the origin: an orbit where factor is 1."""
    i = np.arange(steps + 1)[:, None]
    angle = 2 * np.pi * i / period
    return BASE + factor**i * np.hstack([np.cos(angle), np.sin(angle)]) @ PLANE.T


@pytest.mark.parametrize("period", [2, 3, 5.5, 7.3, 16, 31.5])
def test_a_rotation_is_an_orbit_of_its_period(period):
    found = classify(turning(period))
    assert found.kind == "orbit"
    assert found.period == pytest.approx(period, rel=0.02)
    assert found.shrink == pytest.approx(1, abs=0.02)


def test_a_quick_turn_of_no_whole_period_is_found_as_the_turns_that_return():
    assert classify(turning(3.5)).period == pytest.approx(7, rel=0.02)


def test_an_orbit_of_fewer_than_two_turns_in_the_tail_is_not_called_one():
    assert classify(turning(45)).kind != "orbit"
    assert classify(turning(45, steps=200)).kind == "orbit"


@pytest.mark.parametrize("factor", [0.3, 0.7, 0.9, 0.95, 0.99])
def test_a_contraction_is_a_fixed_point_of_its_rate(factor):
    start = np.random.default_rng(3).normal(size=D)
    path = BASE + factor ** np.arange(R + 1)[:, None] * start
    found = classify(path)
    assert found.kind == "fixed point"
    if factor <= 0.95:  # slower ones are not near their limit after R recurrences, so its distance is not known
        assert found.rate == pytest.approx(factor, rel=0.01)
    else:
        assert found.rate is not None
        assert found.rate < factor
    # The same on the way out is none.
    assert classify(path[::-1]).kind != "fixed point" or factor < 0.95


@pytest.mark.parametrize("factor", [0.9, 0.97])
def test_a_spiral_into_a_point_is_a_fixed_point_and_not_an_orbit(factor):
    assert classify(turning(6, factor)).kind == "fixed point"


@pytest.mark.parametrize("wobble", [0.0, 1.0])
def test_a_constant_drift_is_named_so(wobble):
    drift = 0.2 * np.arange(R + 1)[:, None] * np.eye(D)[0]
    found = classify(wobble * turning(5) + drift + BASE)
    assert found.kind == "drift"
    assert found.straight > 0.8
    assert (found.period == pytest.approx(5, rel=0.02)) == bool(wobble)  # also found in what is left of it
    assert classify(turning(5) + 0.002 * drift).kind == "orbit"  # a drift that hardly shows changes nothing


def test_noise_is_none_of_these():
    assert classify(BASE + np.random.default_rng(4).normal(size=(R + 1, D))).kind == "unsettled"


def test_a_path_that_waits_before_it_converges_has_the_rate_of_its_convergence():
    waiting = np.repeat(np.array([1.0]), 20)
    assert rate(np.concatenate([waiting, 0.6 ** np.arange(80)])) == pytest.approx(0.6, rel=0.01)
    assert rate(np.ones(50)) is None


def test_distances_and_settling_of_a_contraction():
    path = np.ones(D) + 0.5 ** np.arange(41)[:, None, None] * np.ones((1, 2, D)) * np.array([1.0, 64.0])[:, None]
    far = distances(path)
    np.testing.assert_allclose(far[:, 0], 0.5 ** np.arange(41), atol=1e-10)
    # Below 1/100 from 1/128 on, and six recurrences later from a start that is 64 times as far.
    assert settled_after(far).tolist() == [7, 13]
    assert settled_after(np.ones((5, 1))).tolist() == [5]
    assert settled_after(np.zeros((5, 1))).tolist() == [0]


def test_principal_components_of_a_circle_and_of_a_line():
    path = turning(16, steps=15)
    coordinates, share = pca(path)
    np.testing.assert_allclose(share, [0.5, 0.5, 0], atol=1e-12)
    # A rotation of space: all distances stay.
    gram = lambda x: (x - x.mean(0)) @ (x - x.mean(0)).T  # noqa: E731
    np.testing.assert_allclose(gram(coordinates), gram(path), atol=1e-10)
    np.testing.assert_allclose(pca(np.arange(9.0)[:, None] * np.ones(D))[1], [1, 0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("path", "match"), [(np.zeros((16, 3)), "15 recurrences"), (np.full((40, 3), np.nan), "finite")]
)
def test_paths_that_cannot_be_classified_are_refused(path, match):
    with pytest.raises(InputError, match=match):
        classify(path)


# Captured states


def test_captured_states_are_those_of_stepping_by_hand(params):
    found = capture(params, TINY, TOKENS, 4, layers=True)
    assert found.states.shape == (5, 2, 5, 8)
    assert found.layers.shape == (4, 2, 2, 5, 8)
    of = bind(params, TINY, TOKENS)
    np.testing.assert_allclose(found.states[0], of.s0, atol=1e-6)
    s, step, forward = of.s0, jax.jit(of.step), jax.jit(lambda r: rdlm.forward(params, TINY, TOKENS, r))
    for i in range(4):
        out = forward(i + 1)
        np.testing.assert_allclose(found.states[i + 1], out.state, atol=1e-5)
        s = step(s, i)
        np.testing.assert_allclose(found.states[i + 1], s, atol=1e-5)
        np.testing.assert_allclose(of.read(found.states[i + 1])[0], out.logits, atol=1e-5)
        assert np.abs(found.states[i + 1] - found.states[i]).max() > 0.01, "states must differ to mean something"
    np.testing.assert_allclose(capture(params, TINY, TOKENS, 4).states, found.states, atol=1e-6)


def test_captured_layers_are_those_of_a_core_of_fewer_layers(params):
    found = capture(params, TINY, TOKENS, 3, layers=True)
    np.testing.assert_array_equal(found.layers[:, -1], found.states[1:])
    first = bind(params, dataclasses.replace(TINY, core_layers=1), TOKENS)  # stops behind core_0
    for i in range(3):
        np.testing.assert_allclose(found.layers[i, 0], first.step(found.states[i], i), atol=1e-5)
    assert np.abs(found.layers[:, 0] - found.layers[:, 1]).max() > 0.1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"r": 0}, "at least one recurrence"),
        ({"tokens": np.zeros((1, 17), np.int32)}, "length 17 exceeds config.max_length = 16"),
        ({"tokens": np.full((1, 3), 11)}, r"ids must be in \[0, 11\)"),
        ({"state": np.zeros((1, 5, 8))}, "state"),
    ],
)
def test_what_cannot_be_captured_is_refused(given, match, params):
    with pytest.raises(InputError, match=match):
        capture(params, TINY, **{"tokens": TOKENS, "r": 2} | given)


# Contraction


def test_products_with_a_jacobian_are_those_with_the_explicit_one(params):
    of = bind(params, TINY, TOKENS[:1])
    s = capture(params, TINY, TOKENS[:1], 3).states[-1]
    jacobian = jax.jit(jax.jacrev(lambda x: of.step(x.reshape(1, 5, 8), 0).ravel()))
    explicit = np.asarray(jacobian(s.ravel()), np.float64)

    @jax.jit
    def both(v):  # forward mode, and backward mode
        _, along = jax.jvp(lambda x: of.step(x, 0), (s,), (v,))
        return along, jax.vjp(lambda x: of.step(x, 0), s)[1](v)[0]

    v = np.random.default_rng(5).normal(size=s.shape).astype(np.float32)
    for product, matrix in zip(both(v), (explicit, explicit.T), strict=True):
        np.testing.assert_allclose(np.ravel(product), matrix @ v.ravel(), atol=1e-5)
    assert np.abs(explicit @ v.ravel() - explicit.T @ v.ravel()).max() > 0.1  # not symmetric: J is not J^T
    step = jax.jit(lambda x: of.step(x, 0))
    difference = (step(s + 1e-2 * v) - step(s - 1e-2 * v)) / 2e-2
    np.testing.assert_allclose(np.ravel(difference), explicit @ v.ravel(), atol=2e-3)
    # Causal: a token's change reaches no earlier one, so eigenvalues are those of the tokens' own blocks.
    assert np.abs(explicit[:8, 8:]).max() == 0
    found = contraction(params, TINY, TOKENS[:1], s)
    values = np.linalg.eigvals(explicit)
    assert found.norm[0] == pytest.approx(np.linalg.norm(explicit, 2), rel=1e-3)
    assert found.radius[0] == pytest.approx(np.abs(values).max(), rel=1e-2)
    own = np.concatenate([np.linalg.eigvals(explicit[i : i + 8, i : i + 8]) for i in range(0, 40, 8)])
    assert np.abs(own).max() == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert found.norm[0] > 1.2 * found.radius[0]  # two different things here


def test_rows_have_their_own_norm_radius_and_period():
    """Linear maps with a dominant pair 0.9 exp(+-2 pi i / 7), one of which also stretches by 3 on the way."""
    random = np.random.default_rng(6)
    angle = 2 * np.pi / 7
    block = np.diag([0.5, 0.4, 0.3, -0.2, 0.1, 0.05])
    block[:2, :2] = 0.9 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0]
    sheared = block.copy()
    sheared[2, 5] = 3.0
    maps = jnp.asarray(np.stack([turn @ m @ turn.T for m in (block, sheared)]), jnp.float32)
    norm, H = power_iterations(
        lambda x: jnp.einsum("bij,bj->bi", maps, x.reshape(2, 6)).reshape(2, 2, 3),
        jnp.zeros((2, 2, 3)), jax.random.key(0), 60, 6,
    )  # fmt: skip
    np.testing.assert_allclose(norm, [np.linalg.norm(m, 2) for m in (block, sheared)], rtol=1e-4)
    assert norm[1] > 3
    for h in np.asarray(H):
        value, residual = dominant(h)
        assert abs(value) == pytest.approx(0.9, rel=1e-3)
        assert abs(np.angle(value)) == pytest.approx(angle, rel=1e-3)
        assert residual < 1e-3


# Starts and lens


def test_a_contraction_forgets_its_start_and_the_identity_does_not():
    starts = np.random.default_rng(7).normal(size=(4, 3, D))
    limit = 5 * np.ones((3, D))
    factor = 0.5 ** np.arange(20)[:, None, None, None]
    found = spread(limit + factor * starts)
    length = np.linalg.norm(limit + factor * starts, axis=-1).mean(1)
    np.testing.assert_allclose(found, factor[:, 0, :, 0] * length[0] / length, rtol=1e-9)
    np.testing.assert_allclose(spread(np.broadcast_to(starts, (20, *starts.shape))), 1)


def test_paths_from_several_starts(params):
    states = from_starts(params, TINY, TOKENS[0], 3, 3)
    assert states.shape == (4, 3, 5, 8)
    assert not states[0, 2].any()  # the last start is zero
    assert np.abs(states[0, 0] - states[0, 1]).max() > 0.1
    for n in range(3):
        out = rdlm.forward(params, TINY, TOKENS[:1], 3, state=states[0, n : n + 1])
        np.testing.assert_allclose(states[3, n], out.state[0], atol=1e-5)
    with pytest.raises(InputError, match="at least two"):
        from_starts(params, TINY, TOKENS[0], 3, 1)


def test_a_lens_that_is_not_finite_is_refused(params):
    ln_f = {"scale": params["ln_f"]["scale"].at[0].set(np.nan)}
    labels = np.full_like(TOKENS, -100)
    with pytest.raises(InputError, match="lens: the logits are not finite at r = 1"):
        lens(params | {"ln_f": ln_f}, TINY, TOKENS, labels, (1, 2, 6), 2)


def test_the_lens_reads_what_forward_would_say(params):
    labels = np.where(np.arange(5) == 2, -100, TOKENS[:, ::-1])
    found = lens(params, TINY, TOKENS, labels, (1, 2, 6), 2)
    assert found.top.shape == found.probability.shape == (3, 2, 5, 2)
    run = jax.jit(lambda r: jax.nn.log_softmax(rdlm.forward(params, TINY, TOKENS, r).logits))
    log_p = [np.asarray(run(r)) for r in (1, 2, 6)]
    for i, p in enumerate(log_p):
        np.testing.assert_array_equal(found.top[i, ..., 0], p.argmax(-1))
        np.testing.assert_allclose(found.probability[i], np.sort(np.exp(p), axis=-1)[..., :-3:-1], atol=1e-5)
        nats = -np.take_along_axis(p, np.maximum(labels, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(found.nats[i], np.where(labels < 0, 0, nats), atol=1e-5)
        kl = (np.exp(log_p[-1]) * (log_p[-1] - p)).sum(-1)
        np.testing.assert_allclose(found.divergence[i], kl, atol=1e-5)
    assert found.divergence[0].max() > 1e-3
    with pytest.raises(InputError, match="labels"):
        lens(params, TINY, TOKENS, labels[:1], (1, 2), 2)


def test_looks_at_logits_are_counted(params):
    @jax.jit
    def run(rule, min_steps=0, check_every=1):
        return rdlm.forward(params, TINY, TOKENS, 12, exit_rule=rule, min_steps=min_steps, check_every=check_every)

    kl = run(exits.kl(1e-2))
    np.testing.assert_array_equal(kl.checks, kl.steps)  # a check after every recurrence
    assert kl.steps.min() < 12
    assert (run(exits.kl(0.0), 2, 3).checks == 4).all()  # after 3, 6, 9, 12
    closed, half, opened = (run(exits.gated_kl(1e-2, gate)) for gate in (0.0, 0.3, 1e9))
    assert not closed.checks.any()
    assert (closed.steps == 12).all()
    np.testing.assert_array_equal(opened.checks, kl.checks)
    assert 0 < half.checks.sum() < half.steps.sum()
