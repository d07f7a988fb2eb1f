"""Optimizers and schedules against runs of the public reference (tests/golden/optim, tests/golden/stats/lr.json).

Muon and the moving average of the weights, which it has not, against linear algebra and a sum.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from rdlm import sharding
from rdlm.checkpoint import Checkpoints, load_checkpoint, write_config
from rdlm.config import PRESETS, InputError, MeshConfig, ModelConfig, OptimizerConfig
from rdlm.losses import loss
from rdlm.model import init_params
from rdlm.optim import (
    MATRICES,
    average_of,
    clip_by_global_norm,
    decay_mask,
    ellis_adam,
    global_norm,
    module_norms,
    optimizer,
    schedule,
)
from rdlm.train import state_shardings

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


@pytest.mark.usefixtures("full_compile")  # close to the tolerance, roundings depend on what is fused
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
    with pytest.raises(InputError, match="steps = 0: a schedule needs at least 1 step"):
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


@pytest.mark.parametrize("name", ["adamw", "ellis_adam", "muon"])
def test_optimizer_decays_what_the_mask_says(name):
    params = jax.tree.map(jnp.ones_like, init_params(TINY, jax.random.key(0)))
    config = OptimizerConfig(name=name, warmup_steps=0, cooldown_steps=0, weight_decay=0.1)
    tx = optimizer(config, 10)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    expected = -0.1 * (1.0 if name == "ellis_adam" else config.learning_rate)
    for leaf, decayed in zip(jax.tree.leaves(updates), jax.tree.leaves(decay_mask(params)), strict=True):
        np.testing.assert_allclose(leaf, expected if decayed else 0.0, rtol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_optimizer(name):
    run = PRESETS[name]
    rate = schedule(run.optimizer, run.steps)
    assert 0 < float(rate(run.steps // 2)) <= run.optimizer.learning_rate * (1 + 1e-6)
    optimizer(run.optimizer, run.steps)


# Muon

NANO = PRESETS["nano"].model
STEADY = OptimizerConfig(name="muon", learning_rate=0.5, warmup_steps=0, cooldown_steps=0, weight_decay=0.0)


@functools.cache
def fresh():
    return jax.jit(functools.partial(init_params, NANO))(jax.random.key(0))


def some_gradients(seed):
    """Gradients of the nano model with singular values from 1 down to 0.03; of stacked matrices the second is tiny."""
    random = np.random.default_rng(seed)

    def one(path, p):
        if path[-1].key not in MATRICES:
            return random.normal(size=p.shape).astype(np.float32)
        u, s, v = np.linalg.svd(random.normal(size=p.shape), full_matrices=False)
        g = u * np.geomspace(1, 0.03, s.shape[-1]) @ v
        return (g * np.array([1, 1e-3])[:, None, None] if g.ndim == 3 else g).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, fresh())


def test_muon_moves_every_matrix_by_an_orthogonal_one_and_the_rest_as_adamw():
    params, grads = fresh(), some_gradients(1)
    tx, adamw = optimizer(STEADY, 10), optimizer(dataclasses.replace(STEADY, name="adamw"), 10)
    updates, plain = (jax.jit(lambda g, t=t: t.update(g, t.init(params), params)[0])(grads) for t in (tx, adamw))
    seen = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name, key = jax.tree_util.keystr(path), path[-1].key
        gradient, as_adamw = (functools.reduce(lambda t, k: t[k.key], path, tree) for tree in (grads, plain))
        if key not in MATRICES:
            np.testing.assert_allclose(update, as_adamw, rtol=1e-6, err_msg=name)
            continue
        seen.add(key)
        values = np.linalg.svd(update / (0.5 * 0.2 * max(update.shape[-2:]) ** 0.5), compute_uv=False)
        assert values.min() > 0.6, name
        assert values.max() < 1.25, name
        # Control: neither the gradient itself nor what AdamW makes of it is anywhere near.
        for other in (gradient, as_adamw):
            own = np.linalg.svd(other, compute_uv=False)
            assert own.max() / own.min() > 5, name
    assert seen == set(MATRICES)


def test_adamw_beside_muon_may_have_a_rate_of_its_own():
    params, grads = fresh(), some_gradients(1)
    one, two = (optimizer(dataclasses.replace(STEADY, adamw_learning_rate=rate), 10) for rate in (None, 0.05))
    shared, split = (jax.jit(lambda g, t=t: t.update(g, t.init(params), params)[0])(grads) for t in (one, two))
    for (path, update), other in zip(jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(shared), strict=True):
        factor = 1.0 if path[-1].key in MATRICES else 0.1
        np.testing.assert_allclose(update, factor * other, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
    for wrong, message in (({"name": "adamw"}, "needs optimizer.name = 'muon'"), ({}, "must be positive")):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(STEADY, adamw_learning_rate=1e-3 if wrong else 0.0, **wrong)


def test_muon_trains():
    params = fresh()
    rows = jax.random.randint(jax.random.key(1), (4, 17), 0, 20)
    tx = optimizer(dataclasses.replace(STEADY, learning_rate=1e-2), 30)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, NANO, rows, steps=(0, 2))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[0] > 5.5  # ln 384 = 5.95
    assert values[-1] < 2.5  # below ln 20 = 3.0: rows are being learnt by heart


def test_muon_on_eight_devices_is_muon_on_one():
    run = dataclasses.replace(PRESETS["nano"], optimizer=dataclasses.replace(STEADY, ema_decay=0.5))
    tx = optimizer(run.optimizer, 10)
    mesh = sharding.make_mesh(MeshConfig(1, 8), run.model)
    _, shardings = state_shardings(run, tx, mesh)
    update, add = jax.jit(tx.update), jax.jit(optax.apply_updates)

    def two_steps(place, scale=1.0):
        params, state = jax.tree.map(lambda p: np.asarray(p) * np.float32(scale), fresh()), tx.init(fresh())
        if place:
            params, state = jax.device_put((params, state), (shardings.params, shardings.optimizer))
        for seed in (1, 2):
            updates, state = update(some_gradients(seed), state, params)
            params = add(params, updates)
        return params, average_of(state), state

    one, eight, wrong = two_steps(False), two_steps(True), two_steps(True, scale=1.01)

    def worst(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.abs(np.asarray(x) - y).max()) for x, y in pairs)

    assert worst(one[:2], eight[:2]) < 1e-5
    assert worst(one[:2], wrong[:2]) > 1e-3, "a wrong scale must be seen"
    # Momentum and average live where their parameters do, a part on each device.
    momentum = eight[2][1].inner_states["muon"].inner_state[0].mu
    for found in (momentum["adapter"], eight[1]["adapter"]):
        assert found.sharding.is_equivalent_to(shardings.params["adapter"], 3)
        assert not found.is_fully_replicated


# The moving average of the weights


def test_the_average_is_that_of_a_numpy_recursion():
    decay, params = 0.8, {"a": jnp.array([1.0, -2.0]), "b": jnp.ones((2, 2))}
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, cooldown_steps=0, ema_decay=decay)
    tx = optimizer(config, 100)
    state, track = tx.init(params), [params]
    for t in range(7):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(7.0 * t + jnp.arange(p.size)).reshape(p.shape), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        track.append(params)

    def recursion(values):
        """sum decay^(t-i) p_i / sum decay^(t-i), in float64, as m <- decay m + (1 - decay) p with a zero start."""
        m = 0.0
        for p in values:
            m = decay * m + (1 - decay) * np.asarray(p, np.float64)
        return m / (1 - decay ** len(values))

    for name in ("a", "b"):
        average = average_of(state)[name]
        np.testing.assert_allclose(average, recursion([p[name] for p in track[1:]]), rtol=1e-6)
        # Controls: with the initialisation in it, one step late, or without the correction it is another.
        for other in (recursion([p[name] for p in track]), recursion([p[name] for p in track[:-1]])):
            assert np.abs(average - other).max() > 1e-3
        assert np.abs(average - recursion([p[name] for p in track[1:]]) * (1 - decay**7)).max() > 1e-3
    # Nothing is kept unasked, and no update changes by it.
    plain = optimizer(dataclasses.replace(config, ema_decay=0.0), 100)
    assert average_of(plain.init(params)) is None
    np.testing.assert_array_equal(tx.update(grads, tx.init(params), params)[0]["a"],
                                  plain.update(grads, plain.init(params), params)[0]["a"])  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_is_loaded_from_a_run_folder(name, tmp_path):
    run = dataclasses.replace(PRESETS["nano"], optimizer=OptimizerConfig(name=name, ema_decay=0.9))
    params, tx = fresh(), optimizer(run.optimizer, run.steps)
    # As if some steps had been made: what is saved need not come from training.
    state = optax.tree.map_params(
        tx, lambda m, p: m if isinstance(m, optax.MaskedNode) else p + 1.0, tx.init(params), params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(2, params, state, {})
    write_config(tmp_path, run)
    average, config = load_checkpoint(tmp_path, ema=True)
    assert config == run.model
    jax.tree.map(np.testing.assert_array_equal, average, average_of(state))
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path)[0], params)
    assert float(jnp.abs(average["wte"] - params["wte"]).max()) > 1e-5
    write_config(tmp_path, PRESETS["nano"])
    with pytest.raises(InputError, match=r"kept no moving average .*ema_decay = 0.0.*--optimizer.ema-decay") as refused:
        load_checkpoint(tmp_path, ema=True)
    assert "\n" not in str(refused.value)


def test_norms_by_module():
    params = jax.tree.map(np.asarray, fresh())
    norms = module_norms(params)
    assert set(norms) == {"embedding", "prelude", "adapter", "core", "coda", "norms"}
    np.testing.assert_allclose(sum(float(x) ** 2 for x in norms.values()), float(global_norm(params)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(norms["adapter"], np.linalg.norm(params["adapter"].ravel()), rtol=1e-6)
    block = params["core_0"]
    changed = module_norms(params | {"core_0": block | {"norm_1": {"scale": 3 * block["norm_1"]["scale"]}}})
    assert {name for name in norms if float(norms[name]) != float(changed[name])} == {"norms"}
