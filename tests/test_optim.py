"""Optimizers and schedules against runs of the public reference (tests/golden/optim, tests/golden/stats/lr.json)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from rdlm.config import PRESETS, InputError, ModelConfig, OptimizerConfig
from rdlm.model import init_params
from rdlm.optim import clip_by_global_norm, decay_mask, ellis_adam, optimizer, schedule

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = json.loads((GOLDEN / "optim/ellisadam.json").read_text())["variants"]
RATES = json.loads((GOLDEN / "stats/lr.json").read_text())
TENSORS = load_file(GOLDEN / "optim/ellisadam.safetensors")
TINY = ModelConfig(vocab_size=16, embed_dim=8, num_heads=2, mlp_dim=8, mean_recurrence=2, backprop_depth=1)


def replay(variant, **changed):
    """Run one variant; (largest parameter deviation, final state, tensors' names)."""
    tag, flags = variant["tag"], dict(variant["flags"])
    b1, b2 = flags.pop("betas")
    names = [n for group in variant["groups"] for n in group["params"]]
    decayed = {n: group["weight_decay"] > 0 for group in variant["groups"] for n in group["params"]}
    rates = jnp.asarray(variant["lrs"])
    arguments = flags | {"eps": variant["eps"], "weight_decay": variant["weight_decay"], "mask": decayed} | changed
    tx = ellis_adam(lambda t: rates[t], peak_learning_rate=variant["base_lr"], b1=b1, b2=b2, **arguments)
    params = {n: jnp.asarray(TENSORS[f"{tag}/param0/{n}"]) for n in names}
    state, worst = tx.init(params), 0.0
    update = jax.jit(tx.update)
    for t in range(1, variant["steps"] + 1):
        grads = {n: jnp.asarray(TENSORS[f"{tag}/grad{t}/{n}"]) for n in names}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        worst = max(worst, *(float(np.abs(params[n] - TENSORS[f"{tag}/param{t}/{n}"]).max()) for n in names))
    return worst, state, names


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v["tag"])
def test_ellis_adam_follows_the_reference(variant):
    worst, state, names = replay(variant)
    assert worst <= 3e-6
    for n in names:
        np.testing.assert_allclose(state.mu[n], TENSORS[f"{variant['tag']}/exp_avg/{n}"], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(state.nu[n], TENSORS[f"{variant['tag']}/exp_avg_sq/{n}"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "flag", ["update_clipping", "atan_adam", "running_init", "decouple_wd", "tensor_wise_gradient_normalization"]
)
def test_every_flag_matters(flag):
    # Control: a flag turned over must leave the reference's path, or the replay above proves nothing about it.
    variant = next(v for v in VARIANTS if v["tag"] == "loud")
    worst, _, _ = replay(variant, **{flag: not variant["flags"][flag]})
    assert worst > 3e-5


def test_eps_adjustment_matters():
    variant = next(v for v in VARIANTS if v["tag"] == "loud_noatan_epsadj")
    assert replay(variant, eps_adjustment=False)[0] > 3e-6


def test_finite_check_leaves_a_bad_tensor_alone():
    tx = ellis_adam(0.1, tensor_wise_finite_check=True)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    good = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    updates, skipped = tx.update(good | {"b": jnp.array([1.0, jnp.nan])}, state, params)
    np.testing.assert_array_equal(updates["b"], 0)
    assert np.all(np.isfinite(updates["a"]))
    # The tensor starts at its first finite gradient, as if the bad one had never come.
    later, _ = tx.update(good, skipped, params)
    first, _ = tx.update(good, state, params)
    np.testing.assert_array_equal(later["b"], first["b"])


def test_a_float_rate_is_its_own_peak():
    params, grads = {"a": jnp.full(4, 2.0)}, {"a": jnp.zeros(4)}
    tx = ellis_adam(0.1, weight_decay=0.25)
    np.testing.assert_allclose(tx.update(grads, tx.init(params), params)[0]["a"], -0.5, rtol=1e-6)
    with pytest.raises(InputError, match="peak_learning_rate"):
        ellis_adam(lambda t: 0.1, weight_decay=0.25)


@pytest.mark.parametrize("name", RATES)
def test_schedule_follows_the_reference(name):
    case = RATES[name]
    config = OptimizerConfig(
        learning_rate=case["base"], min_learning_rate=case["min_lr"], schedule=case["sched"],
        warmup_steps=case["warmup"], cooldown_steps=case["cooldown"],
    )  # fmt: skip
    rate = schedule(config, case["max_steps"])
    # The reference's step 1 is the first update, count 0 for optax.
    counts = np.array(case["steps"]) - 1
    np.testing.assert_allclose(jax.vmap(rate)(counts), case["lr"], rtol=2e-6, atol=1e-6 * case["base"])
    assert float(rate(0)) == pytest.approx(case["base"] / case["warmup"])


@pytest.mark.parametrize("shape", ["trapezoid", "cosine", "linear"])
@pytest.mark.parametrize(
    ("steps", "warmup", "cooldown"), [(1, 0, 0), (1, 5, 5), (60, 50, 300), (10, 10, 0), (10, 0, 30)]
)
def test_short_runs_have_a_sane_schedule(shape, steps, warmup, cooldown):
    config = OptimizerConfig(learning_rate=1e-2, schedule=shape, warmup_steps=warmup, cooldown_steps=cooldown)
    rates = np.asarray(jax.vmap(schedule(config, steps))(np.arange(steps)))
    assert np.all(np.isfinite(rates))
    assert rates.min() >= 0
    assert rates.max() <= 1e-2 * (1 + 1e-6)
    if shape == "trapezoid" and steps == 60:
        assert rates.max() > 0.9e-2


def test_schedule_refuses_nonsense():
    with pytest.raises(InputError, match="min_learning_rate"):
        schedule(OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-2), 10)
    with pytest.raises(InputError, match="steps"):
        schedule(OptimizerConfig(), 0)


def test_clipping_is_the_references():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, _ = clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], np.array([3.0, 0.0]) / (5 + 1e-6), rtol=1e-7)
    same, _ = clip_by_global_norm(10.0).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(same["b"], grads["b"])


def test_decay_falls_on_matrices_and_embeddings_only():
    params = init_params(TINY, jax.random.key(0))
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): m for p, m in
            jax.tree_util.tree_leaves_with_path(decay_mask(params))}  # fmt: skip
    assert {n for n, m in flat.items() if not m} == {n for n in flat if n.endswith(("scale", "qk_bias"))}
    assert flat["wte"]
    assert flat["adapter"]
    assert flat["core_0/mlp/fc"]


@pytest.mark.parametrize("name", ["adamw", "ellis_adam"])
def test_optimizer_decays_what_the_mask_says(name):
    params = jax.tree.map(jnp.ones_like, init_params(TINY, jax.random.key(0)))
    config = OptimizerConfig(name=name, warmup_steps=0, cooldown_steps=0, weight_decay=0.1)
    tx = optimizer(config, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    expected = -0.1 * (config.learning_rate if name == "adamw" else 1.0)
    for leaf, decayed in zip(jax.tree.leaves(updates), jax.tree.leaves(decay_mask(params)), strict=True):
        np.testing.assert_allclose(leaf, expected if decayed else 0.0, rtol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_optimizer(name):
    run = PRESETS[name]
    rate = schedule(run.optimizer, run.steps)
    assert 0 < float(rate(run.steps // 2)) <= run.optimizer.learning_rate * (1 + 1e-6)
    optimizer(run.optimizer, run.steps)
