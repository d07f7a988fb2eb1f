"""Learnt depth: what heads are fitted to, which threshold is shown, and which runs are trained."""

import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

STUDY = script("studies/learnt_depth")


def test_gain_goes_on_while_a_later_recurrence_helps_by_more_than_its_worth():
    losses = jnp.array([[1.0, 0.5, 0.5], [0.9, 0.498, 0.8], [0.99, 0.499, 0.2]])
    found = STUDY.improves(losses)
    assert found.tolist() == [[True, False, True], [False, False, True], [False, False, False]]


def test_a_head_is_fitted_to_scored_tokens_alone():
    rng = np.random.default_rng(0)
    states, losses = jnp.float32(rng.normal(size=(4, 1, 3, 8))), jnp.float32(rng.random((4, 1, 3)))
    weights = {"w": jnp.asarray(rng.normal(size=8), jnp.float32), "bias": jnp.float32(0.1)}
    labels = jnp.array([[5, -100, 2]])
    for kind in STUDY.HEADS:
        whole = STUDY.head_loss(kind, weights, states, losses, labels)
        unscored = losses.at[:, :, 1].add(jnp.arange(4.0)[:, None])
        assert STUDY.head_loss(kind, weights, states, unscored, labels) == whole
        assert STUDY.head_loss(kind, weights, states, losses.at[1, :, 0].add(1), labels) != whole


def test_the_cheapest_threshold_that_loses_little_is_shown():
    def points(*values):
        return [
            {"threshold": i, "nats": x, "accuracy": 1 - x, "steps": s, "mflop": s} for i, (x, s) in enumerate(values)
        ]

    row = {
        "points": {
            "fixed": points((0.5, 1), (0.1, 9)),
            "kl": points((0.3, 2), (0.104, 5), (0.1, 7)),
            "gate": points((0.2, 1)),
        }
    }
    found = dict(STUDY.cheapest("plain", [row]))
    assert found["kl"]["threshold"] == 1
    assert found["fixed"]["threshold"] == 1
    assert found["gate"] == {}
    row["points"]["fixed"][0]["nats"] = 0.05  # the best fixed depth counts, not the deepest
    assert dict(STUDY.cheapest("plain", [row]))["kl"] == {}
    row["points"]["fixed"][1]["nats"] = 0.9
    assert dict(STUDY.cheapest("task", [row]))["kl"]["threshold"] == 1


def test_shares_of_tokens_that_recurrences_change(monkeypatch):
    losses = np.zeros((4, 1, 4), np.float32)
    losses[:, 0] = [[1.0, 1.0, 1.0, 1.0], [0.5, 1.0005, 1.5, 9.0], [0.5, 1.0, 1.5, 9.0], [0.5, 1.0, 1.0, 9.0]]
    monkeypatch.setattr(STUDY, "unrolled", lambda *_: (None, losses))
    batch = {"tokens": np.zeros((1, 4), int), "labels": np.array([[1, 1, 1, -100]])}
    found = STUDY.worse(STUDY.Subject({}, None, [batch], [], 4))
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
