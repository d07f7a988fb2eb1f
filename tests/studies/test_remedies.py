"""Remedies for training at high learning rates: what each of them computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

from experiments.studies.shared.comparison import S3
from experiments.studies.shared.supervision import after_each
from experiments.studies.shared.text import TextRows, text_data
from experiments.studies.shared.training import bind_batch, small_run, training_batch
from rdlm import losses
from rdlm.data import PackedData
from rdlm.data.prepare import prepare_embedded
from rdlm.losses import IGNORED
from rdlm.model import init_params
from rdlm.recurrence import sample_steps, unroll
from rdlm.tasks.instance import TEST_STREAM, batch

STUDY = script("studies/remedies")
RUN = small_run("remedies", [S3.train], embed_dim=16, num_heads=2, mlp_dim=16)
PARAMS = init_params(RUN.model, jax.random.key(0))
BATCH = training_batch([S3.train], 0, 0, 2)
KEYS = jax.random.key(1), jax.random.key(2)


def test_the_penalty_sees_the_largest_eigenvalue_of_a_row():
    matrices = jnp.array([[[0.9, 0.2], [0.0, 0.3]], [[0.5, 0.0], [0.0, -1.4]]])

    def step(s, i):
        return jnp.einsum("bij,blj->bli", matrices, s)

    found = STUDY.stretch(step, jnp.ones((2, 1, 2)), 30, jax.random.key(0))
    np.testing.assert_allclose(found, [0.9, 1.4], rtol=1e-5)
    early = STUDY.stretch(step, jnp.ones((2, 1, 2)), 0, jax.random.key(0))
    assert np.abs(early - np.array([0.9, 1.4])).max() > 0.01  # control: the products matter


def test_the_penalty_pulls_the_core_towards_a_contraction():
    def penalty(scale):
        return STUDY.stretch(lambda s, i: scale * jnp.tanh(s), jnp.full((1, 3, 4), 0.1), 4, jax.random.key(0)).mean()

    assert jax.grad(penalty)(jnp.float32(1.2)) == pytest.approx(float(penalty(1.0)), rel=1e-3)


def test_a_pass_moves_as_far_whatever_its_recurrences():
    bound = bind_batch(PARAMS, RUN.model, BATCH, KEYS[1])
    once = unroll(STUDY.slowed(bound, 1), bound.s0, 1, 0)
    np.testing.assert_allclose(once, bound.step(bound.s0, 0), atol=1e-6)
    first = STUDY.slowed(bound, 8)(bound.s0, 0) - bound.s0
    np.testing.assert_allclose(first, (once - bound.s0) / 8, atol=1e-6)


def test_each_scores_the_last_recurrences_alike():
    n = int(sample_steps(KEYS[0], RUN.model.mean_recurrence, RUN.model.backprop_depth)[0])
    alone = [losses.loss(PARAMS, RUN.model, BATCH, steps=(n, 1 + j), key=KEYS[1]) for j in range(4)]
    np.testing.assert_allclose(after_each(PARAMS, RUN.model, BATCH, *KEYS), np.mean(alone), rtol=1e-5)
    assert np.ptp(alone) > 1e-4  # control: they differ


def test_the_penalty_is_a_tenth():
    loss = STUDY.trials("plain", S3, 3e-3).model.loss
    params = init_params(STUDY.trials("plain", S3, 3e-3).settings.model, jax.random.key(0))
    model = STUDY.trials("plain", S3, 3e-3).settings.model
    stretched = (STUDY.penalised(model, params, BATCH, *KEYS) - 0.9 * loss(params, BATCH, *KEYS)) / 0.1
    assert 0.1 < stretched < 10


def test_the_curriculum_begins_with_one_recurrence_and_ends_with_the_model_s_depths():
    run = STUDY.trials("curriculum", S3, 3e-3).settings
    assert run.steps == 1000
    params = init_params(run.model, jax.random.key(0))

    def at(step):
        return STUDY.growing(run, params, BATCH, *KEYS, jnp.int32(step))

    def fixed(steps):
        return losses.loss(params, run.model, BATCH, steps=steps, key=KEYS[1])

    whole = STUDY.trials("plain", S3, 3e-3).model.loss(params, BATCH, *KEYS)
    np.testing.assert_allclose(at(999), whole, rtol=1e-6)
    np.testing.assert_allclose(at(500), whole, rtol=1e-6)
    assert any(np.isclose(at(0), fixed((n, 1)), rtol=1e-5) for n in range(5))  # a mean of one recurrence
    assert abs(at(0) - whole) > 1e-4


def test_quick_run(command, tmp_path):
    code, out, err = command(
        "studies/remedies", "--quick", "--seeds", 0, "--methods", "penalty", "scaled", "--runs", tmp_path
    )
    assert code == 0, err
    assert "| penalty | 0.003 | 1 |" in out
    assert "| scaled | 0.003 | 1 |" in out
    assert (tmp_path / "quick" / "remedies.png").exists()


def test_rows_of_text_are_a_task(nano_data):
    data = text_data(nano_data, quick=True)
    folder = prepare_embedded(data)
    rows = TextRows(str(folder), data.tokenizer_size, data.sequence_length)
    packed = PackedData(folder, sequence_length=data.sequence_length, batch_size=4, seed=7)
    made = batch(rows, 7, 2, 4)
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(made[name], packed.batch(2)[name])
    np.testing.assert_array_equal(made["difficulty"], made["labels"] != IGNORED)
    held_out = batch(rows, TEST_STREAM, 0, 2)["tokens"]
    kept = PackedData(folder, "validation", sequence_length=data.sequence_length, batch_size=2, shuffle=False)
    np.testing.assert_array_equal(held_out, next(iter(kept.batches(1)))["tokens"])
    assert not np.array_equal(batch(rows, 8, 2, 4)["tokens"], made["tokens"])
    assert STUDY.on_text(nano_data, quick=True).train == rows
