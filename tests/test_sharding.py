"""A step split over 8 devices is the step on one: every mesh, every way to fetch weights, every way to recompute."""

import dataclasses
import functools
import math
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import QUICK

from rdlm import sharding
from rdlm.config import InputError, LossConfig, MeshConfig, preset
from rdlm.evaluation.depth import depth_curve
from rdlm.losses import loss
from rdlm.model import init_params, logical_axes
from rdlm.recurrence import max_gradient_steps
from rdlm.sharding import Layout
from rdlm.train import depth_weight, draw_depth, gradients, layout_of, step_keys

NANO = preset("nano")
MODEL = dataclasses.replace(NANO.model, num_heads=4, backprop_depth=3)
B, L = 16, 32
TOLERANCE = 1e-5  # of the largest entry of each array


def run_of(mesh=None, microbatches=1, **recurrence):
    return dataclasses.replace(
        NANO,
        model=MODEL,
        mesh=MeshConfig(**(mesh or {"data": 1})),
        data=dataclasses.replace(NANO.data, batch_size=B, microbatches=microbatches),
        recurrence=dataclasses.replace(NANO.recurrence, **recurrence),
    )


@functools.cache
def batch():
    """Two documents a row, each with noise of its own; some labels do not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, MODEL.vocab_size, (B, L + 1))
    segments = np.where(np.arange(L) < 11, 1, 2) * np.ones((B, 1), int)
    arrays = {
        "tokens": tokens[:, :-1],
        "labels": np.where(rng.random((B, L)) < 0.2, -100, tokens[:, 1:]),
        "segment_ids": segments,
        "sequence_ids": segments + 2 * np.arange(B)[:, None],
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def of_steps(run, devices, steps=(0, 1, 2)):
    """[(loss, gradient, (n, k))] of some training steps on so many devices."""
    mesh = sharding.make_mesh(run.mesh, run.model, jax.devices()[:devices])
    layout, params, rows = layout_of(run, mesh), init_params(MODEL, jax.random.key(0)), batch()
    if layout:
        params = jax.device_put(params, sharding.named(mesh, layout.specs))
        rows = jax.device_put(rows, sharding.batch_sharding(mesh))
    chex.clear_trace_counter()  # it counts by name, over tests
    step = jax.jit(chex.assert_max_traces(lambda params, rows, i: gradients(run, params, rows, i, layout), n=1))
    return jax.device_get([step(params, rows, jnp.int32(i)) for i in steps])


@functools.cache
def on_one_device():
    return of_steps(run_of(), 1)


def distance(found, expected):
    return max(
        float(np.abs(x - y).max() / (np.abs(y).max() + 1e-9))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def test_draws_differ_between_the_steps():
    assert len({(int(n), int(k)) for *_, (n, k) in on_one_device()}) == 3


RUNS = {
    "data": ({"data": 8}, {"remat": "none"}),
    "fsdp": ({"data": 1, "fsdp": 8}, {"remat": "layer"}),
    "fsdp, stored": ({"data": 1, "fsdp": 8}, {"remat": "none"}),
    "both, gradient every time, stored": ({"data": 2, "fsdp": 4, "gather": "weights_once"}, {"remat": "none"}),
    "offloaded": ({"data": 2, "fsdp": 4}, {"remat": "offload"}),
    "both, gradient every time": ({"data": 2, "fsdp": 4, "gather": "weights_once"}, {"remat": "iteration"}),
    "plain fsdp": ({"data": 2, "fsdp": 4, "gather": "each"}, {"remat": "layer"}),
    "plain fsdp, stored": ({"data": 2, "fsdp": 4, "gather": "each"}, {"remat": "none"}),
    "fsdp and tensor": ({"data": 1, "fsdp": 4, "tensor": 2}, {"remat": "layer"}),
    "all three, microbatches": ({"data": 2, "fsdp": 2, "tensor": 2}, {"remat": "none", "microbatches": 2}),
    "one device, recomputed": (None, {"remat": "layer", "microbatches": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_do_not_depend_on_the_mesh(name):
    mesh, options = RUNS[name]
    assert distance(of_steps(run_of(mesh, **options), 8 if mesh else 1), on_one_device()) < TOLERANCE


@pytest.mark.slow
def test_two_axes_where_one_does_not_divide():
    """Of 8 devices 4 divide a width of 36; the other 2 split the other dimension (3.5B on 64 chips: 32 x 2)."""
    odd = dataclasses.replace(MODEL, embed_dim=36, num_heads=2, mlp_dim=64)
    mesh = sharding.make_mesh(MeshConfig(1, 8), odd)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "rest": 2, "tensor": 1}
    run = dataclasses.replace(run_of({"data": 1, "fsdp": 8}, remat="layer"), model=odd)
    layout = layout_of(run, mesh)
    params = init_params(odd, jax.random.key(0))
    one = jax.jit(lambda p, b: gradients(run, p, b, jnp.int32(1)))(params, batch())
    placed = jax.device_put(params, sharding.named(mesh, layout.specs))
    assert placed["core_0"]["mlp"]["proj"].addressable_shards[0].data.shape == (32, 9)
    split = jax.jit(lambda p, b: gradients(run, p, b, jnp.int32(1), layout))
    assert distance(jax.device_get(split(placed, batch())), jax.device_get(one)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["mean for sum", "not summed over copies"])
def test_control_a_wrong_scale_shows(wrong, monkeypatch):
    right = Layout.reduce_scatter, Layout.summed
    if wrong == "mean for sum":
        monkeypatch.setattr(
            Layout, "reduce_scatter", lambda self, *a: jax.tree.map(lambda g: g / 4, right[0](self, *a))
        )
    else:
        monkeypatch.setattr(Layout, "summed", lambda self, gradients: gradients)
    run = run_of({"data": 2, "fsdp": 4}, remat="layer")
    assert distance(of_steps(run, 8, steps=(1,)), on_one_device()[1:2]) > 0.1


IN_TWO_PROCESSES = """
import jax, numpy, sys
from rdlm.runtime import start
start("the same")
from rdlm import sharding
from rdlm.sharding import Layout
from test_sharding import MODEL, batch, gradients, init_params, layout_of, run_of

run = run_of({"data": 2, "fsdp": 4}, remat="layer")
mesh = sharding.make_mesh(run.mesh, MODEL, jax.devices())
layout = layout_of(run, mesh)
places = sharding.named(mesh, layout.specs)
params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)), out_shardings=places)()
split = sharding.batch_sharding(mesh)
rows = {name: jax.make_array_from_callback(x.shape, split, numpy.asarray(x).__getitem__) for name, x in batch().items()}
right, found = Layout.reduce_scatter, {}

def scaled(params, rows, scale):
    Layout.reduce_scatter = lambda self, *a: jax.tree.map(lambda g: g / scale, right(self, *a))
    return gradients(run, params, rows, jax.numpy.int32(1), layout)

step = jax.jit(scaled, out_shardings=sharding.replicated(mesh))  # one program for both
for name, scale in (("right", 1.0), ("wrong", 2.0)):
    for i, x in enumerate(jax.tree.leaves(step(params, rows, scale))):
        found[f"{name} {i}"] = numpy.asarray(x.addressable_data(0))
if jax.process_index() == 0:
    numpy.savez(sys.argv[1], **found)
"""


@pytest.mark.slow
def test_loss_and_gradient_of_two_processes(tmp_path):
    """Two processes of four devices each; half of a gradient, as a control, is seen."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = {"RDLM_COORDINATOR": f"localhost:{free.getsockname()[1]}", "RDLM_PROCESSES": "2"}
    together |= QUICK | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    here = pathlib.Path(__file__).parent
    places = f"{here}{os.pathsep}{here / 'support'}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TWO_PROCESSES, tmp_path / "found.npz"], stderr=subprocess.PIPE, text=True,
            env=os.environ | together | {"RDLM_PROCESS_ID": str(i), "PYTHONPATH": places},
        )
        for i in range(2)
    ]  # fmt: skip
    for process in both:
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    found, expected = np.load(tmp_path / "found.npz"), jax.tree.leaves(on_one_device()[1])
    right, wrong = ([found[f"{name} {i}"] for i in range(len(expected))] for name in ("right", "wrong"))
    assert distance(right, expected) < TOLERANCE
    assert distance(wrong, expected) > 0.1


# Who draws a depth


@pytest.mark.slow
def test_every_row_may_have_its_own_depth():
    """The loss of a batch in which every row drew for itself is the mean over rows run alone at their depths."""
    run = run_of({"data": 2, "fsdp": 4}, draw="sequence", remat="layer")
    [(value, gradient, means)] = of_steps(run, 8, steps=(1,))
    ids = batch()["sequence_ids"][:, 0]
    n, k = draw_depth(run, jnp.int32(1), ids)
    assert len(set(np.asarray(n + k).tolist())) > 4
    assert [float(x) for x in means] == [n.mean(), k.mean()]
    total, summed = 0.0, None
    rows = batch()
    scored = rows["labels"] != -100
    alone = jax.jit(  # a row alone, at the depth it drew
        lambda row, n, k: jax.value_and_grad(loss_alone)(init_params(MODEL, jax.random.key(0)), row, n, k)
    )
    for b in range(B):
        weight = float(follows(rows, b).sum())
        loss_b, gradient_b = alone({name: x[b : b + 1] for name, x in rows.items()}, n[b], k[b])
        total += weight * float(loss_b)
        part = jax.tree.map(lambda g, w=weight: w * np.asarray(g, np.float64), gradient_b)
        summed = part if summed is None else jax.tree.map(np.add, summed, part)
    count = sum(float(follows(rows, b).sum()) for b in range(B))
    assert scored.sum() >= count
    np.testing.assert_allclose(value, total / count, rtol=1e-5)
    assert distance(gradient, jax.tree.map(lambda g: g / count, summed)) < TOLERANCE


def follows(rows, b):
    """Labels of row b that count: not ignored, and in the segment of their token."""
    segments = np.asarray(rows["segment_ids"][b])
    inside = np.append(segments[1:] == segments[:-1], True)
    return (np.asarray(rows["labels"][b]) != -100) & inside


def loss_alone(params, row, n, k):
    most = max_gradient_steps(MODEL.backprop_depth, NANO.recurrence.scheme)
    return loss(params, MODEL, row, steps=(n, k), key=step_keys(NANO.seed, jnp.int32(1))[1], max_k=most)


def draws(run, parts=None, steps=20_000):
    at = jnp.arange(steps)
    n, k = jax.vmap(lambda i: draw_depth(run, i, parts))(at)
    return np.asarray(n), np.asarray(k)


def test_expected_depth_whoever_draws():
    expected = MODEL.mean_recurrence + 1  # docs/model.md, Sampling the depth
    for parts in (None, jnp.int32(3), jnp.arange(2)):
        n, k = draws(run_of(), parts)
        assert abs((n + k).mean() - expected) < 0.06, parts
    n, k = draws(run_of(), jnp.arange(2))
    assert abs(np.corrcoef((n + k).T)[0, 1]) < 0.03, "rows of one step draw apart"


def test_a_floor_under_the_depth():
    n, k = draws(run_of(least=4))
    free_n, free_k = draws(run_of())
    np.testing.assert_array_equal(n + k, np.maximum(free_n + free_k, 4))
    np.testing.assert_array_equal(k, free_k)
    assert (free_n + free_k).min() < 4


def test_a_curriculum_reaches_the_full_depth():
    run = run_of(curriculum_steps=20_000)
    n, k = draws(run)
    assert k[:2000].max() == 1, "at first the gradient takes one step"
    assert abs((n + k)[:2000].mean() - 3) < 0.2, "and so does the rest: t = s = 1, and the draw adds one"
    assert abs((n + k)[-2000:].mean() - (MODEL.mean_recurrence + 1)) < 0.2


@pytest.mark.slow
def test_teachers_and_the_stability_penalty_do_not_depend_on_the_mesh():
    terms = LossConfig(depths=(1, MODEL.mean_recurrence), teacher="deepest", stability=0.2)

    def of(mesh, devices):
        run = run_of(mesh, scheme="fixed")
        run = dataclasses.replace(run, model=dataclasses.replace(MODEL, backprop_depth=MODEL.mean_recurrence))
        return of_steps(dataclasses.replace(run, loss=terms), devices, steps=(0,))

    assert distance(of({"data": 2, "fsdp": 4, "gather": "each"}, 8), of(None, 1)) < TOLERANCE


SHAPES = {"linear": lambda u: u, "one_minus_sqrt": lambda u: 1 - (1 - u) ** 0.5}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_curriculum_by_share_follows_its_shape(shape):
    run = dataclasses.replace(
        run_of(scheme="fixed", curriculum_share=0.5, curriculum_shape=shape),
        model=dataclasses.replace(MODEL, mean_recurrence=30, backprop_depth=4),
        steps=200,
    )
    n, k = draws(run, steps=200)
    means = [max(1, math.ceil(30 * SHAPES[shape](min(t / 100, 1)) - 1e-4)) for t in range(1, 201)]
    assert (n + k).tolist() == means
    assert k.tolist() == [min(m, 4) for m in means], "below b every recurrence has a gradient"
    assert depth_weight(run, n[-1], k[-1]) == 1.0
    weighed = dataclasses.replace(run, recurrence=dataclasses.replace(run.recurrence, loss_power=1.0))
    assert float(depth_weight(weighed, n[-1], k[-1])) == 1.0, "weights are those of the whole depth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curriculum_share": 1.5}, "curriculum_share = 1.5: must be in"),
        ({"curriculum_share": 0.5, "curriculum_steps": 9}, "choose one"),
        ({"curriculum_shape": "one_minus_sqrt"}, "needs recurrence.curriculum_share"),
    ],
)
def test_curricula_that_say_two_things_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        run_of(**change)


def test_weights_by_depth_are_one_on_average():
    run = run_of(loss_power=0.5)
    n, k = draws(run)
    weights = np.asarray(depth_weight(run, n, k))
    assert abs(weights.mean() - 1) < 0.01
    np.testing.assert_allclose(weights[0] / weights[1], ((n + k)[0] / (n + k)[1]) ** 0.5, rtol=1e-5)
    assert depth_weight(run_of(), n, k) == 1.0


def test_the_loss_that_is_reported_is_not_weighed():
    plain, gradient, depth = on_one_device()[1]
    run = run_of(loss_power=0.5)
    [(value, weighed, _)] = of_steps(run, 1, steps=(1,))
    weight = float(depth_weight(run, *(jnp.asarray(x) for x in depth)))
    assert value == plain
    assert abs(weight - 1) > 0.01
    assert distance(weighed, jax.tree.map(lambda g: weight * g, gradient)) < TOLERANCE


# Meshes


@pytest.mark.parametrize("chips", [1, 8, 16, 64, 256])
@pytest.mark.parametrize("name", ["huginn_3p5b", "huginn_tpu", "small", "nano", "quickstart"])
def test_every_preset_is_split_over_any_pod(name, chips):
    """Shapes only: every dimension divides, and large models are split as far as the pod goes."""
    run = preset(name)
    fsdp = chips if name.startswith("huginn") else min(chips, 32)
    mesh = FakeMesh(run.model, fsdp, chips)
    shapes = jax.eval_shape(lambda: init_params(run.model, jax.random.key(0)))
    specs = sharding.parameter_specs(mesh, logical_axes(run.model), shapes)
    matrix = specs["core_0"]["mlp"]["proj"]
    assert np.prod([mesh.shape[a] for part in matrix for a in sharding._axes(part)]) == fsdp


class FakeMesh:
    def __init__(self, model, fsdp, chips):
        along = int(np.gcd(fsdp, model.embed_dim))
        self.shape = {"data": chips // fsdp, "fsdp": along, "rest": fsdp // along, "tensor": 1}


def test_what_does_not_divide_is_refused():
    odd = dataclasses.replace(MODEL, embed_dim=36, num_heads=2, mlp_dim=66)
    mesh = sharding.make_mesh(MeshConfig(1, 8), dataclasses.replace(odd, mlp_dim=65))
    with pytest.raises(InputError, match=r"mesh.fsdp = 2: does not divide mlp = 65 .*'mlp'.*; use a divisor of 65"):
        layout_of(dataclasses.replace(run_of(), model=dataclasses.replace(odd, mlp_dim=65)), mesh)
    with pytest.raises(InputError, match=r"mesh.fsdp = 2 does not|does not fit 8 devices"):
        sharding.make_mesh(MeshConfig(3, 2), MODEL)
    with pytest.raises(InputError, match="embed_dim = 36, and tensor takes the other dimension; use fsdp = 4"):
        sharding.make_mesh(MeshConfig(-1, 8, 1 + 1), odd, [object()] * 16)
    with pytest.raises(InputError, match=r"mesh.tensor = 8: does not divide num_heads = 4"):
        layout_of(run_of(), sharding.make_mesh(MeshConfig(1, 1, 8), MODEL))
    with pytest.raises(InputError, match=r"batch_size = 12: must be a multiple of the 8 devices \(try 16\)"):
        sharding.check_batch(sharding.make_mesh(MeshConfig(2, 4), MODEL), 12)
    with pytest.raises(InputError, match=r"multiple of 16 = devices x data.microbatches \(try 32\)"):
        sharding.check_batch(sharding.make_mesh(MeshConfig(2, 4), MODEL), 24, 2)


@pytest.mark.slow
def test_the_depth_curve_does_not_depend_on_the_mesh():
    bytes_of = np.arange(MODEL.vocab_size) % 7
    params, depths = init_params(MODEL, jax.random.key(0)), (1, 2, 5)
    one = depth_curve(params, MODEL, [batch()], depths, bytes_of)
    run = run_of({"data": 2, "fsdp": 4})
    mesh = sharding.make_mesh(run.mesh, MODEL)
    layout = layout_of(run, mesh)
    placed = jax.device_put(params, sharding.named(mesh, layout.specs))

    def place(rows):
        return jax.device_put(rows, sharding.batch_sharding(mesh))

    many = depth_curve(placed, MODEL, [batch()], depths, bytes_of, place, layout=layout)
    np.testing.assert_allclose(many.nats, one.nats, rtol=1e-5)
    assert (many.tokens, many.bytes, many.accuracy) == (one.tokens, one.bytes, one.accuracy)
    deeper = depth_curve(placed, MODEL, [batch()], (1, 2, 6), bytes_of, place, layout=layout)
    assert abs(deeper.nats[-1] - one.nats[-1]) > 1e-4
