"""Random draws against the public reference, by distribution: depths of training steps, initialisation, states."""

import functools
import json
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN

from rdlm.config import ModelConfig, Scheme
from rdlm.hf import table
from rdlm.hf.names import to_theirs
from rdlm.model import init_params
from rdlm.recurrence import initial_state, max_gradient_steps, sample_steps

SAMPLER = json.loads((GOLDEN / "stats/sampler.json").read_text())
SCHEMES = SAMPLER["training_impl_schemes_mean32_backprop8_20k_steps"]
INIT = json.loads((GOLDEN / "stats/init.json").read_text())
FIRST = np.load(GOLDEN / "stats/train_sampler_first1024_steps.npy")
DEFAULT = "poisson-lognormal-filling"


@functools.cache
def draws(scheme=DEFAULT, mean=32, backprop=8, number=200_000):
    """(n, k), int arrays [number]."""
    keys = jax.random.split(jax.random.key(17), number)
    n, k = jax.jit(jax.vmap(lambda key: sample_steps(key, mean, backprop, scheme)))(keys)
    return np.asarray(n, np.float64), np.asarray(k, np.float64)


def same_distribution(ours, golden, samples):
    """Mean, variance and quantiles of `ours` agree with the reference's `golden` of so many samples."""
    scatter = math.sqrt(golden["var"] * (1 / samples + 1 / len(ours)))
    assert abs(ours.mean() - golden["mean"]) <= 4.5 * scatter + 1e-9
    # k is almost always 8, n has a long tail: how far a variance strays depends on the fourth moment.
    tail = np.mean((ours - ours.mean()) ** 4) / max(ours.var() ** 2, 1e-9)
    stray = 4.5 * math.sqrt(tail * (1 / samples + 1 / len(ours)))
    assert ours.var() == pytest.approx(golden["var"], rel=stray, abs=1e-9)
    for q, value in golden["quantiles"].items():
        step = max(1.0, 0.05 * value)  # integers, and few samples in the tails
        assert abs(np.quantile(ours, float(q)) - value) <= step, f"quantile {q}"


def test_filling_meets_the_specification():
    # The moments of the reference's draws (docs/model.md, Sampling the depth).
    n, k = draws()
    assert (n + k).mean() == pytest.approx(33.0, abs=0.16)
    assert (n + k).var() == pytest.approx(322.8, rel=0.05)
    assert k.mean() == pytest.approx(7.982, abs=0.002)
    assert (k == 8).mean() == pytest.approx(0.9911, abs=0.001)
    assert (n + k).min() >= 1
    # Gradient steps are filled first.
    assert not n[k < 8].any()


@pytest.mark.parametrize(
    ("name", "mean", "backprop"),
    [("hf_mean32_backprop8", 32, 8), ("hf_mean8_backprop4", 8, 4), ("hf_mean1_backprop1", 1, 1),
     ("hf_mean4_backprop8", 4, 8)],
)  # fmt: skip
def test_filling_follows_the_reference(name, mean, backprop):
    golden, (n, k) = SAMPLER[name], draws(DEFAULT, mean, backprop)
    for ours, part in ((n + k, "total"), (n, "n_no_grad"), (k, "k_grad")):
        same_distribution(ours, golden[part], golden["samples"])
    for ours, part in ((n + k, "hist_total"), (k, "hist_k")):
        reference = np.array(golden[part]) / golden["samples"]
        found = np.bincount(ours.astype(int), minlength=len(reference)) / len(ours)
        gap = np.abs(np.cumsum(found)[: len(reference)] - np.cumsum(reference)).max()
        assert gap <= 2.0 * math.sqrt(1 / golden["samples"] + 1 / len(ours)), "Kolmogorov-Smirnov"
    if not math.isnan(golden["corr_n_k"]):
        assert np.corrcoef(n, k)[0, 1] == pytest.approx(golden["corr_n_k"], abs=0.03)


@pytest.mark.parametrize("scheme", sorted(set(get_args(Scheme)) - {"poisson-truncated-full"}))  # not the reference's
def test_every_scheme_follows_the_reference(scheme):
    golden, (n, k) = SCHEMES[scheme], draws(scheme, number=100_000)
    for ours, part in ((n + k, "total"), (n, "n_no_grad"), (k, "k_grad")):
        same_distribution(ours, golden[part], 20_000)
    if not math.isnan(golden["corr_n_k"]):
        assert np.corrcoef(n, k)[0, 1] == pytest.approx(golden["corr_n_k"], abs=0.04)
    assert k.max() <= max_gradient_steps(8, scheme)
    assert (n + k).min() >= 1


def test_first_steps_of_a_run_look_like_the_references():
    # The reference's own generators are not reproduced, their distribution is.
    n, k = draws()
    grid = np.arange(150)
    for ours, theirs in ((n + k, FIRST.sum(1)), (n, FIRST[:, 0])):
        gap = np.abs((ours[:, None] <= grid).mean(0) - (theirs[:, None] <= grid).mean(0)).max()
        assert gap <= 2.0 / math.sqrt(len(FIRST))
    assert (FIRST[:, 1] == 8).mean() == pytest.approx((k == 8).mean(), abs=0.02)


def test_control_a_shifted_count_is_noticed():
    n, _ = draws()
    with pytest.raises(AssertionError):
        same_distribution(n + 1, SAMPLER["hf_mean32_backprop8"]["n_no_grad"], 200_000)


def test_curriculum_grows_both_counts():
    # Reference: t and s become ceil(step/N * t) and max(ceil(step/N * s), 1) while step <= N.
    N, seen = 100, []
    key = jax.random.key(0)
    for step in range(1, N + 1):
        n, k = sample_steps(key, 32, 8, "fixed", progress=jnp.float32(step) / N)
        assert (int(n), int(k)) == (math.ceil(step / N * 24), max(math.ceil(step / N * 8), 1))
        seen.append(int(n + k))
    assert seen == sorted(seen)
    assert seen[-1] == 32


def test_a_draw_depends_on_its_key_only():
    first = sample_steps(jax.random.key(3), 32, 8)
    again = jax.jit(lambda key: sample_steps(key, 32, 8))(jax.random.key(3))
    assert [int(x) for x in first] == [int(x) for x in again]


def halves(name, x):
    """The parts of a tensor that init.json lists separately, by its names."""
    if name.endswith("Wqkv.weight"):
        return {f"{name}[{part}]": y for part, y in zip("qkv", np.split(x, 3), strict=True)}
    if name.endswith("fc.weight"):
        return {f"{name}[{part}]": y for part, y in zip(("gate", "up"), np.split(x, 2), strict=True)}
    return {name: x}


def test_initialisation_is_the_training_implementations():
    c = INIT["config"]
    config = ModelConfig(
        vocab_size=c["vocab_size"], embed_dim=c["n_embd"], num_heads=4, mlp_dim=c["intermediate_size"],
        mean_recurrence=c["mean_recurrence"],
    )  # fmt: skip
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(5))
    flat = {tuple(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    ours = {}
    for name, entry in table(config).items():
        ours |= halves(name, to_theirs(flat[entry.path], entry))
    golden = INIT["training_implementation"]
    assert golden.keys() <= ours.keys()
    for name, expected in golden.items():
        x = ours[name]
        assert list(x.shape) == expected["shape"], name
        if expected["std"] == 0:
            assert np.all(x == expected["mean"]), name
            continue
        assert x.std() == pytest.approx(expected["std"], rel=0.02), name
        assert abs(x.mean()) <= 5 * x.std() / math.sqrt(x.size), name
        # Cut at three standard deviations of the uncut normal.
        bound = 3 * x.std() / INIT["formula"]["realised_std_factor"]
        assert 0.97 * bound <= np.abs(x).max() <= 1.02 * bound, name
        assert np.abs(x).max() == pytest.approx(expected["absmax"], rel=0.03), name


@pytest.mark.parametrize(("dim", "scale"), [(256, 1.0), (40, 1.0), (256, 0.5), (256, 0.0)])
def test_initial_state(dim, scale):
    s = np.asarray(initial_state(jax.random.key(6), jnp.arange(4000), dim, scale=scale))
    expected = INIT["state_init"]
    assert s.std() == pytest.approx(scale * expected["expected_std"], rel=0.01)
    assert np.abs(s).max() <= scale * expected["expected_absmax"] * (1 + 1e-6)
    assert np.abs(s).max() == pytest.approx(scale * expected["absmax"], rel=0.01)
    assert abs(s.mean()) <= 0.005
