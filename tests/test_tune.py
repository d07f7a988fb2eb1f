"""Parts of a model that learn, and low-rank pairs: no other gradient is formed, nothing else moves, and merging is
exact."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import model as golden_model
from jax.extend.core import jaxprs_in_params

from rdlm import sharding
from rdlm.config import Block, InputError, Loop, LossConfig, MeshConfig, TuneConfig, preset
from rdlm.evaluation.depth import depth_curve
from rdlm.model import forward, init_params
from rdlm.optim import module_norms, optimizer
from rdlm.train import frozen_shardings, gradients, init_state, layout_of, state_shardings, train_step
from rdlm.train.faults import modules
from rdlm.train.roofline import state_bytes
from rdlm.tune import begin, combine, divide, join, merge, pick

NANO = preset("nano")
RUN = dataclasses.replace(
    NANO,
    model=dataclasses.replace(NANO.model, num_heads=4),
    optimizer=dataclasses.replace(NANO.optimizer, ema_decay=0.9),
)
LORA = TuneConfig(lora_rank=3, lora_alpha=6.0)
ROWS, LENGTH = 16, 20  # their product is no side of a weight


def tuned(tune, run=RUN, **fields):
    return dataclasses.replace(run, tune=tune, **fields)


@functools.cache
def base():
    return init_params(RUN.model, jax.random.key(0))


def parts(tune, params=None, noise=0.05):
    """(what learns, what is frozen) after some training: no pair is zero."""
    params = base() if params is None else params
    learnt, frozen = begin(params, tune, jax.random.key(1)), divide(params, tune)[1]
    leaves, structure = jax.tree.flatten(learnt)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + noise * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(moved), frozen


def batch(step=0):
    tokens = np.random.default_rng(step).integers(0, RUN.model.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ids = np.arange(ROWS, dtype=np.int32)[:, None] + np.zeros((1, LENGTH), np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "sequence_ids": ids}


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


# Gradients of what is frozen do not exist


def made(jaxpr, found):
    """Adds the shapes of all products, sums of gradients, scatters and reductions in a program and those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "add_any", "scatter-add", "reduce_scatter", "psum"):
            found |= {out.aval.shape for out in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            made(inner, found)
    return found


def shapes_made(run, mesh):
    """Of the program that computes the gradient of a step."""
    layout = layout_of(run, mesh)
    state, _ = state_shardings(run, optimizer(run.optimizer, 10), mesh)
    frozen, _ = frozen_shardings(run, mesh)
    step = functools.partial(gradients, run, layout=layout)
    traced = jax.make_jaxpr(step)(state.params, batch(), jnp.int32(0), frozen=frozen)
    return made(traced.jaxpr, set())


def weight_shapes(tree):
    """Shapes in which a gradient of a matrix may be found: stacked ones by themselves, and transposed."""
    found = {x.shape[-2:] for x in jax.tree.leaves(tree) if x.ndim > 1 and x.shape[-1] > 8}  # no bias of heads
    return found | {shape[::-1] for shape in found}


PROGRAMS = {
    "one device": (1, MeshConfig(1, 1), "none"),
    "one device, recomputed": (1, MeshConfig(1, 1), "layer"),
    "once": (8, MeshConfig(1, 8), "none"),
    "weights_once": (8, MeshConfig(1, 8, gather="weights_once"), "none"),
    "each": (8, MeshConfig(1, 8, gather="each"), "layer"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_gradient_of_a_base_weight_is_formed(name):
    devices, config, remat = PROGRAMS[name]
    mesh = sharding.make_mesh(config, RUN.model, jax.devices()[:devices])
    run = dataclasses.replace(RUN, mesh=config, recurrence=dataclasses.replace(RUN.recurrence, remat=remat))
    wanted = weight_shapes(base())
    assert not shapes_made(tuned(LORA, run), mesh) & wanted
    if devices == 1:
        assert not shapes_made(tuned(TuneConfig(only=("norms",)), run), mesh) & wanted
    full = shapes_made(run, mesh) & wanted
    assert {tuple(sorted(shape)) for shape in full} == {tuple(sorted(shape)) for shape in wanted}


# What learns, and what stays


@functools.cache
def trained(tune, steps=3):
    run = tuned(tune)
    tx = optimizer(run.optimizer, 10)
    first, (_, frozen) = init_state(run, tx), divide(base(), tune)
    step = jax.jit(functools.partial(train_step, run, tx))
    state, metrics = first, {}
    for i in range(steps):
        state, metrics = step(state, batch(i), frozen=frozen)
    return first, state, metrics


@pytest.mark.slow
def test_low_rank_pairs_and_named_parts_learn_and_the_optimizer_knows_no_more():
    tune = TuneConfig(only=("norms", "coda"), lora_rank=2, lora_targets=("attn.qkv", "mlp.fc", "adapter"))
    first, state, metrics = trained(tune)
    pairs = {
        f"{block}_0/{name}_lora_{half}"
        for block in ("prelude", "core")
        for name in ("attn/qkv", "mlp/fc")
        for half in "ab"
    }
    learnt = {f"adapter_lora_{half}" for half in "ab"} | pairs
    learnt |= {name for name in names(base()) if name.endswith("scale") or name.startswith("coda_0")}
    assert names(state.params) == learnt
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, state.params)
    assert all(jax.tree.leaves(moved))
    numbers = sum(x.size for x in jax.tree.leaves(state.params))
    kept = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert kept == 3 * numbers, "two moments and an average of what learns"
    assert metrics["skipped"] == 0
    assert {"grad_norm_adapter", "grad_norm_prelude", "grad_norm_coda", "grad_norm_norms"} < metrics.keys()
    assert "grad_norm_embedding" not in metrics


def test_the_first_state_is_the_base_and_differs_by_seed_and_path():
    run, tx = tuned(LORA), optimizer(RUN.optimizer, 10)
    state = init_state(run, tx)
    params = combine(state.params, divide(base(), LORA)[1], LORA)
    jax.tree.map(np.testing.assert_array_equal, merge(params), base())
    a = [state.params[name]["attn"]["proj_lora_a"] for name in ("core_0", "coda_0")]
    assert np.abs(a[0]).max() < RUN.model.embed_dim**-0.5 < 1.1 * np.abs(a[0]).max()
    assert np.abs(a[0] - a[1]).max() > 0.1
    other = init_state(dataclasses.replace(run, seed=1), tx).params["core_0"]["attn"]["proj_lora_a"]
    assert np.abs(a[0] - other).max() > 0.1


def test_parts_divide_and_join():
    for tune in (TuneConfig(), TuneConfig(only=("core", "norms")), LORA):
        learnt, frozen = divide(base(), tune)
        assert names(learnt) | names(frozen) == names(base())
        assert not names(learnt) & names(frozen)
        jax.tree.map(np.testing.assert_array_equal, join(learnt, frozen), base())
    learnt, _ = divide(base(), TuneConfig(only=("core",)))
    assert set(learnt) == {"core_0"}
    assert "scale" in learnt["core_0"]["norm_1"], "a part has its norms"


def test_norms_and_names_of_modules_are_those_of_the_matrices():
    learnt, _ = parts(LORA)
    assert set(module_norms(learnt)) == {"adapter", "prelude", "core", "coda"}
    order = modules(learnt)
    assert order[:2] == ["coda_0", "core_0"]
    assert sorted(order[2:4]) == ["adapter_lora_a", "adapter_lora_b"]


@pytest.mark.parametrize("name", ["adamw", "muon", "ellis_adam"])
def test_every_optimizer_takes_low_rank_pairs(name):
    learnt, _ = parts(LORA)
    tx = optimizer(dataclasses.replace(RUN.optimizer, name=name), 10)
    updates, _ = jax.jit(tx.update)(learnt, tx.init(learnt), learnt)
    assert all(bool(jnp.isfinite(x).all() and (x != 0).any()) for x in jax.tree.leaves(updates))


# Merged is unmerged


def diagonal():
    """Another adapter, a bridge, value embeddings, and an MLP without gate."""
    loop, block = Loop("diagonal", bridge=False, linear_bridge=True), Block(gated=False, activation="relu2")
    model = dataclasses.replace(RUN.model, loop=loop, block=block, value_tables=(0,), value_gates=(0,))
    return init_params(model, jax.random.key(0)), model


OWN = {"nano": lambda: (base(), RUN.model), "diagonal": diagonal}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "r"), [("nano", 4), ("families/gemma3", 2), ("families/ouro", 1), ("diagonal", 3)])
def test_merged_equals_unmerged(name, r):
    # Recurrences of untrained models make rounding errors larger, so some run once.
    params, config = OWN[name]() if name in OWN else golden_model(name)
    tune = TuneConfig(lora_rank=2)
    whole = combine(*parts(tune, params), tune)
    run = jax.jit(lambda params: forward(params, config, batch()["tokens"][:2] % config.vocab_size, r).logits)
    before, applied, merged = (np.asarray(run(p)) for p in (params, whole, merge(whole)))
    size = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))  # noqa: E731
    assert names(merge(whole)) == names(params)
    assert size(merged - applied) < 1e-6 * max(size(applied), 1)
    assert size(before - applied) > 1e-2 * size(applied), "the pairs must count"


def test_alpha_over_rank_scales_the_product():
    learnt, frozen = parts(LORA)
    merged = merge(combine(learnt, frozen, LORA))
    qkv = learnt["core_0"]["attn"]
    wanted = frozen["core_0"]["attn"]["qkv"] + 2.0 * qkv["qkv_lora_a"] @ qkv["qkv_lora_b"]
    np.testing.assert_allclose(merged["core_0"]["attn"]["qkv"], wanted, atol=1e-6)
    half = jnp.einsum("hdr,hrf->hdf", learnt["adapter_lora_a"], learnt["adapter_lora_b"])
    np.testing.assert_allclose(merged["adapter"], frozen["adapter"] + 2.0 * half, atol=1e-6)
    # A base of few bits stays one.
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    assert merge(combine(learnt, small, LORA))["adapter"].dtype == jnp.bfloat16


# On a mesh

BOTH = TuneConfig(only=("norms", "coda"), lora_rank=2)


@functools.cache
def on_one_device():
    learnt, frozen = parts(BOTH)
    found = jax.jit(functools.partial(gradients, tuned(BOTH)))(learnt, batch(), jnp.int32(3), frozen=frozen)
    params = combine(learnt, frozen, BOTH)
    return jax.device_get(found), depth_curve(params, RUN.model, [batch()], (1, 3), np.ones(RUN.model.vocab_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [MeshConfig(1, 8), MeshConfig(2, 2, 2, gather="each"), MeshConfig(2, 4, gather="weights_once")],
    ids=lambda config: config.gather,
)
def test_eight_devices_equal_one(config):
    run = tuned(BOTH, mesh=config)
    mesh = sharding.make_mesh(config, run.model)
    layout, (learnt, frozen) = layout_of(run, mesh), parts(BOTH)
    places = sharding.named(mesh, layout.specs)
    if config.fsdp == 8:
        assert places["core_0"]["attn"]["qkv_lora_a"].spec[0] == places["core_0"]["attn"]["qkv"].spec[0] != None  # noqa: E711
    learnt, frozen = (jax.device_put(x, pick(places, x)) for x in (learnt, frozen))
    rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
    found = jax.jit(functools.partial(gradients, run, layout=layout))(learnt, rows, jnp.int32(3), frozen=frozen)
    (value, expected, depth), curve = on_one_device()
    assert abs(found[0] - value) < 1e-5
    assert tuple(found[2]) == tuple(depth)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    params = combine(learnt, frozen, BOTH)
    ours = depth_curve(params, run.model, [rows], (1, 3), np.ones(RUN.model.vocab_size), layout=layout)
    np.testing.assert_allclose(ours.nats, curve.nats, atol=1e-5)


# What is refused

REFUSED = {
    "head": (TuneConfig(only=("head",)), r"tune.only = \('head',\): .* say embedding"),
    "gate": (TuneConfig(only=("core", "gate")), "tune.only = .* no exit gate"),
    "values": (TuneConfig(only=("values",)), "tune.only = .* uses no value embeddings"),
    "rank": (TuneConfig(lora_rank=32), "tune.lora_rank = 32: must be below 32"),
    "nothing left": (
        TuneConfig(only=("core", "adapter", "prelude", "coda"), lora_rank=4),
        "tune.lora_rank = 4: no matrix is left for a pair",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_does_not_have_is_refused(name):
    tune, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        tuned(tune)


def test_parts_are_those_of_the_model():
    bare = dataclasses.replace(RUN.model, block=Block(norm_weight="none"))
    with pytest.raises(InputError, match=r"tune.only = \('norms',\): the norms of this model have no weights"):
        tuned(TuneConfig(only=("norms",)), model=bare)
    bridged = dataclasses.replace(RUN.model, coda_layers=0, loop=Loop(bridge=False, linear_bridge=True))
    tune = tuned(TuneConfig(only=("coda",)), model=bridged).tune
    shapes = jax.eval_shape(lambda: init_params(bridged, jax.random.key(0)))
    assert names(divide(shapes, tune)[0]) == {"C"}
    with pytest.raises(InputError, match=r"tune.only = \('coda',\): this model has no coda"):
        tuned(TuneConfig(only=("coda",)), model=dataclasses.replace(bridged, loop=Loop()))


OURO = Loop("none", "embedding", close=True, bridge=False, gate=True)
GATES = {
    "no loss": ("none", TuneConfig(only=("gate", "core")), r"tune.only = .*: the gate learns only with --loss.gate"),
    "frozen": ("improvement", TuneConfig(only=("core",)), "loss.gate = 'improvement': trains the gate alone, which is"),
    "pairs": ("improvement", TuneConfig(lora_rank=2), "loss.gate = 'improvement': trains the gate alone, which is"),
    "it learns": ("improvement", TuneConfig(only=("gate",)), ""),
    "all learn": ("improvement", TuneConfig(), ""),
    "others learn": ("exit", TuneConfig(only=("core",)), ""),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_learns_with_its_loss_alone(name):
    gate, tune, message = GATES[name]
    run = dataclasses.replace(
        RUN,
        model=dataclasses.replace(RUN.model, coda_layers=0, mean_recurrence=2, loop=OURO),
        recurrence=dataclasses.replace(RUN.recurrence, scheme="fixed"),
        optimizer=dataclasses.replace(RUN.optimizer, weight_decay=0.0),
    )
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        tuned(tune, run, loss=LossConfig(gate=gate))


def test_targets_need_a_rank_and_an_adapter():
    with pytest.raises(InputError, match=r"tune.lora_targets = .*: needs tune.lora_rank"):
        TuneConfig(lora_targets=("adapter",))
    with pytest.raises(InputError, match=r"tune.lora_alpha = 32.0: needs tune.lora_rank"):
        TuneConfig(lora_alpha=32.0)
    ouro = dataclasses.replace(RUN.model, loop=Loop("none", "embedding", bridge=False))
    assert dataclasses.replace(RUN, model=ouro, tune=LORA).tune == LORA
    with pytest.raises(InputError, match=r"tune.lora_targets = .* has no adapter"):
        dataclasses.replace(RUN, model=ouro, tune=TuneConfig(lora_rank=2, lora_targets=("adapter",)))


def test_what_is_kept_over_steps_is_counted():
    run = dataclasses.replace(RUN, mesh=MeshConfig(1, 8))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    thin = TuneConfig(lora_rank=1)
    full, pairs = (state_bytes(tuned(tune, run), jax.devices()) for tune in (TuneConfig(), thin))
    # Weights, two moments and an average, an eighth of each but for the norms; of pairs, halves are not split.
    assert size(base()) / 2 <= full < 1.1 * size(base()) / 2
    assert size(base()) / 8 + size(begin(base(), thin, jax.random.key(0))) / 2 <= pairs < full - size(base()) / 8
