"""Training steps against the public reference: loss and the gradient of every parameter, with controls."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, GRADIENTS, LOSS, cases, model, of_kind
from safetensors.numpy import load_file

from rdlm.hf import save_huggingface, table
from rdlm.hf.names import to_theirs
from rdlm.losses import loss

TRAIN, NORMS = of_kind("train"), of_kind("train_norms")
ADAPTER = "transformer.adapter.weight"


@functools.partial(jax.jit, static_argnums=1)
def compiled(params, config, batch, steps, state):
    """Loss and gradients; n and k are traced, so a model compiles once for all its cases."""
    return jax.value_and_grad(lambda params: loss(params, config, batch, steps=steps, state=state))(params)


@functools.cache
def run(name, case, steps=None):
    """(loss, gradients by the reference's names) of a golden case, at its own (n, k) or at `steps`."""
    params, config = model(name)
    arrays = cases(name)[case]["arrays"]
    batch = {"tokens": jnp.asarray(arrays["input_ids"]), "labels": jnp.asarray(arrays["labels"])}
    n, k = steps or cases(name)[case]["num_steps"]
    with jax.default_matmul_precision("highest"):
        value, gradients = compiled(params, config, batch, (jnp.int32(n), jnp.int32(k)), arrays["input_states"])
    flat = {tuple(k.key for k in path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(gradients)}
    return float(value), {key: to_theirs(flat[entry.path], entry) for key, entry in table(config).items()}


def relative(ours, reference):
    """||ours - reference|| / ||reference||."""
    return float(np.linalg.norm(ours.astype(np.float64) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(("name", "case"), TRAIN + NORMS)
def test_loss(name, case):
    assert abs(run(name, case)[0] - float(cases(name)[case]["arrays"]["loss"])) <= LOSS


@pytest.mark.parametrize(("name", "case"), TRAIN)
def test_gradient_of_every_parameter(name, case):
    expected, (_, ours) = load_file(GOLDEN / name / "grads.safetensors"), run(name, case)
    assert ours.keys() == expected.keys()
    worst = {key: relative(ours[key], expected[key]) for key in expected}
    assert max(worst.values()) <= GRADIENTS, max(worst, key=worst.get)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in ours.values()))
    assert norm == pytest.approx(float(cases(name)[case]["arrays"]["global_grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(("name", "case"), NORMS)
def test_gradient_norms(name, case):
    entry, (_, ours) = cases(name)[case], run(name, case)
    names = json.loads((GOLDEN / name / "cases.json").read_text())["param_order"]
    assert ours.keys() == set(names)
    for key, norm in zip(names, entry["arrays"]["grad_norms"], strict=True):
        if key in entry["params_without_grad"]:
            assert np.isnan(norm)
            assert not ours[key].any(), f"{key}: the reference has no gradient here, ours must be exact zeros"
        else:
            assert np.linalg.norm(ours[key].astype(np.float64)) == pytest.approx(norm, rel=GRADIENTS), key
    if ADAPTER not in entry["params_without_grad"]:
        assert relative(ours[ADAPTER], entry["arrays"]["adapter_grad"]) <= GRADIENTS


def test_the_zero_gradients_are_those_of_prelude_adapter_and_core():
    _, ours = run("A", "train_norms_2_0")
    silent = {key for key, g in ours.items() if not g.any()}
    assert silent == {key for key in ours if "prelude" in key or "core_block" in key or "adapter" in key}


def test_every_training_case_is_replayed():
    assert TRAIN == [("A", "train_5_3"), ("A2", "train_5_3"), ("G_gqa", "train_3_2")]
    assert len(NORMS) == 10


def test_gradients_are_written_under_the_references_names(tmp_path):
    # With n and k as Python numbers, which compiles exactly k slots.
    params, config = model("A2")
    arrays = cases("A2")["train_5_3"]["arrays"]
    batch = {"tokens": arrays["input_ids"], "labels": arrays["labels"]}
    gradients = jax.jit(jax.grad(lambda p: loss(p, config, batch, steps=(5, 3), state=arrays["input_states"])))(params)
    save_huggingface(tmp_path / "gradients", gradients, config)
    written, expected = load_file(tmp_path / "gradients/model.safetensors"), load_file(GOLDEN / "A2/grads.safetensors")
    assert max(relative(written[key], expected[key]) for key in expected) <= GRADIENTS


# Controls: another split of the same depth, or one step more or less, must not pass for the reference's.


@pytest.mark.parametrize("steps", [(4, 3), (6, 3), (5, 2), (5, 4), (4, 4)])
def test_control_steps_shifted_by_one(steps):
    value, ours = run("A", "train_5_3", steps)
    expected = load_file(GOLDEN / "A/grads.safetensors")
    assert max(relative(ours[key], expected[key]) for key in expected) > 10 * GRADIENTS
    if sum(steps) != 8:
        assert abs(value - float(cases("A")["train_5_3"]["arrays"]["loss"])) > 10 * LOSS


def test_control_ignored_labels():
    # The case has ignored labels; scoring them must change the loss.
    params, config = model("A")
    arrays = cases("A")["train_5_3"]["arrays"]
    assert (arrays["labels"] == -100).any()
    labels = np.where(arrays["labels"] == -100, 0, arrays["labels"])
    batch = {"tokens": jnp.asarray(arrays["input_ids"]), "labels": jnp.asarray(labels)}
    with jax.default_matmul_precision("highest"):
        value, _ = compiled(params, config, batch, (jnp.int32(5), jnp.int32(3)), arrays["input_states"])
    assert abs(float(value) - float(arrays["loss"])) > 10 * LOSS
