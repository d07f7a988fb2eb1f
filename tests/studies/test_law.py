"""The law of the loss: what it fits, and the runs that it is fitted to."""

import itertools

import numpy as np
import pytest
from experiment_scripts import script

STUDY = script("studies/law")


def losses(phi, noise=0.0):
    """Rows of a grid whose losses obey a law with this phi, give or take `noise` nats."""
    rows, generator = [], np.random.default_rng(0)
    for width, steps in itertools.product((32, 64, 96), (200, 600)):
        for layers, r in [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1)]:
            once, core = 15 * width**2, 13 * width**2 * layers
            nats = 9 / width + 100 / steps + 1.5 * ((once + r**phi * core) / 1e4) ** -0.4
            nats += noise * generator.standard_normal()
            rows.append({"width": width, "tokens": steps, "once": once, "core": core, "r": r, "nats": nats})
    return rows


@pytest.mark.parametrize("phi", [-0.2, 0.0, 0.46, 1.0])
def test_the_worth_of_a_recurrence_is_found_again(phi):
    rows = losses(phi)
    law, said = STUDY.fitted(rows)
    np.testing.assert_allclose(law, [1.5, 0.4, phi], atol=0.01)
    np.testing.assert_allclose(said, [row["nats"] for row in rows], atol=1e-4)


def test_an_interval_holds_the_value_and_widens_with_noise():
    _, low, high = STUDY.law_of(losses(0.46, noise=0.01))["phi"]
    assert low < 0.46 < high
    exact = STUDY.law_of(losses(0.46, noise=0.001))["phi"]
    assert high - low > 3 * (exact[2] - exact[1])


def test_runs_differ_in_what_the_law_says():
    assert len(set(STUDY.cells((200, 600)))) == 39
    assert len(set(STUDY.cells((600,)))) == 27
    data = STUDY.text_data("data")
    run = STUDY.run_config(STUDY.Cell(32, 1, 8, 200), data, STUDY.Path("runs"))
    assert (run.model.embed_dim, run.model.mean_recurrence, run.model.backprop_depth) == (32, 8, 4)
    assert run.recurrence.scheme == "poisson-lognormal-filling"
    deeper = STUDY.run_config(STUDY.Cell(32, 4, 1, 200), data, STUDY.Path("runs"))
    assert (deeper.model.core_layers, deeper.recurrence.scheme) == (4, "non-recurrent")
    fixed = STUDY.run_config(STUDY.Cell(32, 1, 8, 200, fixed=True), data, STUDY.Path("runs"))
    assert (fixed.model.backprop_depth, fixed.recurrence.scheme) == (8, "fixed")
    assert len({run.folder, deeper.folder, fixed.folder}) == 3


def test_drawn_and_fixed_depths_have_laws_of_their_own():
    rows = [row | {"steps": row["tokens"], "fixed": False} for row in losses(0.0)]
    rows += [row | {"steps": row["tokens"], "fixed": True} for row in losses(0.5) if row["r"] > 1]
    found = STUDY.laws([row for row in rows if row["tokens"] == 600 or not row["fixed"]])
    assert found["drawn"]["phi"][0] == pytest.approx(0, abs=0.01)
    assert found["fixed"]["phi"][0] == pytest.approx(0.5, abs=0.01)


def test_quick_run(command, nano_data, tmp_path):
    code, out, err = command("studies/law", "--quick", "--runs", tmp_path, "--data-folder", nano_data)
    assert code == 0, err
    assert "| width | steps | r = 2 |\n|---|---|---|\n| 16 | 4 |" in out
    assert (tmp_path / "quick" / "law.png").exists()
