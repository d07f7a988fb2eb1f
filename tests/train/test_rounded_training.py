"""`optimizer.quantize`: training at the matrices that `rdlm.quantize` will keep, straight through to the full ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm import sharding
from rdlm.config import PRESETS, InputError, MeshConfig, OptimizerConfig, TuneConfig
from rdlm.losses import IGNORED
from rdlm.model import rounded
from rdlm.optim import optimizer
from rdlm.train import gradients, init_state, layout_of, train_step
from rdlm.tune import SCALE

NANO = PRESETS["nano"]
KINDS = ("int8", "float8_e4m3fn")
STEP = jnp.int32(1)


def run_of(quantize, **changes):
    return dataclasses.replace(NANO, optimizer=dataclasses.replace(NANO.optimizer, quantize=quantize), **changes)


@functools.cache
def params():
    """Parameters whose channels differ in size."""
    fresh = rdlm.init_params(NANO.model, jax.random.key(0))
    return jax.tree.map(lambda x: x * jnp.linspace(0.5, 2, x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,)), fresh)


@functools.cache
def batch():
    tokens = np.random.default_rng(0).integers(0, NANO.model.vocab_size, (8, 17)).astype(np.int32)
    labels = np.where(np.arange(16) < 2, IGNORED, tokens[:, 1:])
    return {"tokens": tokens[:, :-1], "labels": labels, "sequence_ids": np.full((8, 16), np.arange(8)[:, None])}


@functools.cache
def step_of(quantize):
    """(loss, gradient) of one training step on one device."""
    return jax.jit(lambda p: gradients(run_of(quantize), p, batch(), STEP)[:2])(params())


def loss_of_quantized(kind):
    small = rdlm.quantize(params(), NANO.model, kind)
    return jax.jit(lambda p: gradients(run_of(None), {}, batch(), STEP, frozen=p)[0])(small)


def by_hand(kind):
    """Parameters whose matrices are the stored values times their scales."""

    def wide(tree):
        small = {n: x.astype(jnp.float32) * tree[n + SCALE] for n, x in tree.items() if n + SCALE in tree}
        rest = {n: wide(x) if isinstance(x, dict) else x for n, x in tree.items() if not n.endswith(SCALE)}
        return rest | small

    return wide(rdlm.quantize(params(), NANO.model, kind))


def distance(found, expected):
    return max(
        float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-9))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_quantized_model(kind):
    np.testing.assert_allclose(step_of(kind)[0], loss_of_quantized(kind), rtol=2e-6)
    for other in {*KINDS, None} - {kind}:  # control
        assert abs(step_of(other)[0] / loss_of_quantized(kind) - 1) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_rounded_matrices(kind):
    expected = jax.jit(lambda p: gradients(run_of(None), p, batch(), STEP)[:2])(by_hand(kind))
    assert distance(step_of(kind), expected) < 1e-5
    assert distance(step_of(None), expected) > 1e-3  # control


def test_a_small_matrix_by_hand():
    w = jnp.asarray([[1.0, 100.0], [0.51, 30.0]])
    tree = {"core_0": {"mlp": {"proj": w, "bias": w[0]}}, "adapter": w}
    found = rounded(tree, "int8")
    expected = [[1, 100], [65 / 127, 100 * 38 / 127]]
    np.testing.assert_allclose(found["core_0"]["mlp"]["proj"], expected, rtol=1e-6)
    np.testing.assert_array_equal(found["adapter"], w)
    np.testing.assert_array_equal(found["core_0"]["mlp"]["bias"], w[0])
    assert jnp.isnan(
        rounded({"core_0": {"mlp": {"proj": w.at[0, 0].set(jnp.nan)}}}, "int8")["core_0"]["mlp"]["proj"]
    ).all()


def test_the_step_moves_the_full_matrices():
    run = run_of("int8")
    tx = optimizer(dataclasses.replace(run.optimizer, warmup_steps=0, learning_rate=1e-4), run.steps)
    state = init_state(run, tx, params())
    after = jax.jit(functools.partial(train_step, run, tx))(state, batch())[0].params["core_0"]["mlp"]["proj"]
    before = params()["core_0"]["mlp"]["proj"]
    moved = jnp.abs(after - before).max()
    gap = jnp.abs(by_hand("int8")["core_0"]["mlp"]["proj"] - before).max()
    assert 0 < moved < gap / 4, "a step from the rounded matrix would move it by the rounding too"


def test_split_over_devices():
    run = run_of("float8_e4m3fn", mesh=MeshConfig(2, 4), data=dataclasses.replace(NANO.data, microbatches=2))
    mesh = sharding.make_mesh(run.mesh, run.model, jax.devices()[:8])
    layout = layout_of(run, mesh)
    split = jax.device_put(params(), sharding.named(mesh, layout.specs))
    rows = jax.device_put({n: np.repeat(x, 2, 0) for n, x in batch().items()}, sharding.batch_sharding(mesh))
    found = jax.jit(lambda p, rows: gradients(run, p, rows, STEP, layout)[:2])(split, rows)
    assert distance(jax.device_get(found), step_of("float8_e4m3fn")) < 1e-4


REFUSED = {
    r"optimizer.quantize = 'int4'": lambda: OptimizerConfig(quantize="int4"),
    "optimizer.quantize = 'int8': must be left out with tune.lora_rank": lambda: run_of(
        "int8", init="base", tune=TuneConfig(lora_rank=2)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message):
    with pytest.raises(InputError, match=message) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)


def test_what_is_frozen_is_rounded_and_a_teacher_is_not():
    terms = dataclasses.replace(NANO.loss, teacher="start")
    run = run_of("int8", loss=terms, tune=TuneConfig(only=("core",)), init="there")
    plain = dataclasses.replace(run, optimizer=NANO.optimizer)
    learns = {name: x for name, x in params().items() if name.startswith("core")}
    frozen = {name: x for name, x in params().items() if name not in learns}
    hand = by_hand("int8")

    @functools.cache
    def loss(which, teacher):
        given = {"own": learns | frozen, "rounded": hand}[which]
        core, rest = ({name: given[name] for name in part} for part in (learns, frozen))
        rest["teacher"] = {"own": params(), "rounded": hand}[teacher]
        made = run if which == "own" else plain
        return float(jax.jit(lambda p, f: gradients(made, p, batch(), STEP, frozen=f)[0])(core, rest))

    assert loss("own", "own") == pytest.approx(loss("rounded", "own"), rel=2e-6)
    assert abs(loss("rounded", "rounded") - loss("rounded", "own")) > 1e-5  # control: the teacher matters
