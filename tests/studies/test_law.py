"""The law of the loss: what it fits, and the runs that it is fitted to."""

import itertools

import numpy as np
import pytest
from experiment_scripts import script

STUDY = script("studies/law")


def losses(phi, generator=None):
    """Rows of a grid whose losses obey a law with this phi, or nearly so."""
    rows = []
    for width, r, steps in itertools.product((32, 64, 96), (1, 2, 4, 8), (200, 600)):
        once, core, tokens = 15 * width**2, 13 * width**2, steps * 1024
        nats = STUDY.predicted((2.0, 1.5, 0.4, phi, 0.8, 0.5), once, core, r, tokens)
        noise = 1 if generator is None else 1 + 1e-3 * generator.standard_normal()
        rows.append({"once": once, "core": core, "r": r, "tokens": tokens, "nats": nats * noise})
    return rows


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_worth_of_a_recurrence_is_found_again(phi):
    law, left = STUDY.fitted(losses(phi))
    assert law[3] == pytest.approx(phi, abs=0.01)
    assert left < 1e-3


def test_intervals_hold_the_value_and_widen_with_noise():
    found = STUDY.law_of(losses(0.46, np.random.default_rng(0)))
    _, low, high = found["phi"]
    assert low < 0.46 < high
    exact = STUDY.law_of(losses(0.46))["phi"]
    assert high - low > 2 * (exact[2] - exact[1])


def test_one_length_of_training_has_a_law_without_tokens():
    rows = [row for row in losses(0.46) if row["tokens"] == 600 * 1024]
    assert len(STUDY.fitted(rows)[0]) == 4
    assert set(STUDY.law_of(rows)) == {"E", "A", "alpha", "phi", "left"}


def test_runs_differ_in_what_the_law_says():
    assert len(STUDY.cells((200, 600))) == 30
    assert len(STUDY.cells((600,))) == 18
    data = STUDY.text_data("data")
    run = STUDY.run_config(STUDY.Cell(32, 1, 8, 200), data, STUDY.Path("runs"))
    assert (run.model.embed_dim, run.model.mean_recurrence, run.model.backprop_depth) == (32, 8, 4)
    assert run.recurrence.scheme == "poisson-lognormal-filling"
    deeper = STUDY.run_config(STUDY.Cell(32, 4, 1, 200), data, STUDY.Path("runs"))
    assert (deeper.model.core_layers, deeper.recurrence.scheme) == (4, "non-recurrent")
    assert deeper.folder != run.folder


def test_quick_run(command, nano_data, tmp_path):
    code, out, err = command("studies/law", "--quick", "--runs", tmp_path, "--data-folder", nano_data)
    assert code == 0, err
    assert "| width | steps | r = 2 |\n|---|---|---|\n| 16 | 4 |" in out
    assert (tmp_path / "quick" / "law.png").exists()
