"""Learnt depth: what heads are fitted to, which threshold is shown, and which runs are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

from rdlm.config import LossConfig
from rdlm.losses import improvement_loss

STUDY = script("studies/learnt_depth")


def test_gain_goes_on_while_a_later_recurrence_helps_by_more_than_its_worth():
    losses = jnp.array([[1.0, 0.5, 0.5], [0.9, 0.498, 0.8], [0.99, 0.499, 0.2]])
    assert STUDY.stop_at("gain", losses).tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_wish_is_the_second_stage_of_the_library_after_the_first_recurrence():
    losses, gate = jnp.float32(np.random.default_rng(0).random((2, 5, 7)))
    stop = STUDY.stop_at("wish", losses)
    assert not stop[0].any()
    entropy = (stop * jax.nn.softplus(-gate) + (1 - stop) * jax.nn.softplus(gate))[1:].sum(0) / 5
    np.testing.assert_allclose(entropy, improvement_loss(losses, gate, LossConfig()), rtol=1e-5)


def test_a_head_is_fitted_to_scored_tokens_of_the_first_half(monkeypatch):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(4, 1, 400, 3)).astype("float32")
    losses = np.where(states[..., 0] > 0, 0.0, 1.0)
    losses[-1] = 0.0  # so that a token may stop where its loss is 0
    labels = np.ones((1, 400), int)
    labels[:, ::2] = -100
    losses[:, :, ::2] = rng.random((4, 1, 200))
    model = STUDY.ModelConfig(vocab_size=9, embed_dim=3, num_heads=1, mlp_dim=4, head_width=2)
    of = STUDY.Subject({}, model, [], [{"labels": labels}], [], 4)
    monkeypatch.setattr(STUDY, "unrolled", lambda *_: (states, jnp.asarray(losses)))
    found = STUDY.fitted(["gain"], of)["gain"]
    assert found["w"][0] > 5 * np.abs(found["w"][1:]).max()
    states[2:] = 0.0
    again = STUDY.fitted(["gain"], of)["gain"]
    np.testing.assert_allclose(again["w"], found["w"])


def test_the_cheapest_threshold_that_loses_little_is_shown_on_other_batches():
    def points(*values, shown=0.0):
        return [
            {"threshold": i, "nats": (x, x + shown), "accuracy": (1 - x, 0), "steps": (s, s + 1), "mflop": (s, s + 1)}
            for i, (x, s) in enumerate(values)
        ]

    first = {"fixed": points((0.5, 1), (0.1, 9)), "kl": points((0.3, 2), (0.108, 5), (0.1, 7), shown=1.0)}
    second = {"fixed": points((0.5, 1), (0.1, 9)), "kl": points((0.3, 2), (0.1, 6), (0.1, 7), shown=3.0)}
    gate = {"gate": points((0.2, 1))}
    found = dict(STUDY.cheapest("plain", [{"points": first | gate}, {"points": second | gate}]))
    assert found["fixed"]["threshold"] == 1
    assert found["kl"]["threshold"] == 1  # .004 on average, though .008 in one seed
    assert found["kl"]["nats"] == pytest.approx(2.104)
    assert found["kl"]["mflop"] == pytest.approx(6.5)
    assert found["gate"] == {}
    best = {"fixed": points((0.05, 1), (0.9, 9)), "kl": points((0.108, 5))}  # the best fixed depth, not the deepest
    assert dict(STUDY.cheapest("task", [{"points": best}]))["kl"] == {}


def test_shares_of_tokens_that_recurrences_change(monkeypatch):
    losses = np.zeros((4, 1, 4), np.float32)
    losses[:, 0] = [[1.0, 1.0, 1.0, 1.0], [0.5, 1.0005, 1.5, 9.0], [0.5, 1.0, 1.5, 9.0], [0.5, 1.0, 1.0, 9.0]]
    monkeypatch.setattr(STUDY, "unrolled", lambda *_: (None, losses))
    batch = {"tokens": np.zeros((1, 4), int), "labels": np.array([[1, 1, 1, -100]])}
    found = STUDY.worse(STUDY.Subject({}, None, [batch], [], [], 4))
    assert found == {
        "1 to 2": pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-4),
        "2 to 4": pytest.approx([2 / 3, 1 / 3, 0], abs=1e-4),
    }


def test_quick_run_trains_a_gate_and_then_the_gate_alone(command, nano_data, tmp_path):
    code, out, err = command(
        "studies/learnt_depth", "--quick", "--seeds", 0, "--methods", "gate 2", "--runs", tmp_path,
        "--data-folder", nano_data,
    )  # fmt: skip
    assert code == 0, err
    assert "| gate 2 | fixed |" in out
    assert "65 numbers learn" in out + err
    assert (tmp_path / "quick" / "learnt_depth.png").exists()
