"""rdlm.report: the picture of loss by depth and what it is drawn from."""

import json
import sys

import numpy as np
import pytest

from rdlm.config import InputError, preset, to_json
from rdlm.report import depth_distribution, plot_loss_by_depth, read_curve


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(to_json(preset("quickstart")))
    (tmp_path / "loss_by_depth.json").write_text(json.dumps({"8": 2.4, "1": 2.9, "2": 2.6}))
    return tmp_path


def test_the_distribution_of_depths_is_the_one_training_draws_from():
    # E[n + k] = mean_recurrence + 1 when the gradient steps are filled first.
    shares = depth_distribution(preset("quickstart"))
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == 0
    assert shares @ np.arange(len(shares)) == pytest.approx(9, abs=0.1)
    assert np.array_equal(shares, depth_distribution(preset("quickstart")))
    assert np.array_equal(depth_distribution(preset("quickstart_twin")), [0, 1])


@pytest.mark.parametrize(
    "curve", [{"8": 2.4, "1": 2.9, "2": 2.6}, {"1": 3.0}, {str(r): 3 - r / 99 for r in range(1, 40)}]
)
def test_pictures_are_drawn_for_many_few_and_single_depths(curve, run):
    (run / "loss_by_depth.json").write_text(json.dumps(curve))
    path = plot_loss_by_depth(run)
    assert path == run / "loss_by_depth.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in run.iterdir()} == {"config.json", "loss_by_depth.json", "loss_by_depth.png"}


def test_curves_are_read_by_increasing_depth(run):
    assert list(read_curve(run).items()) == [(1, 2.9), (2, 2.6), (8, 2.4)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "missing; training writes it"),
        ('{"1": 2.9, "2":', "not a loss by depth"),
        ("[1, 2]", "not a loss by depth"),
        ('{"one": 2.9}', "not a loss by depth"),
        ('{"1": null}', "not a loss by depth"),
        ("{}", "holds no depth"),
        ('{"0": 1.0}', "holds no depth"),
        ('{"1": NaN}', "not a finite number"),
    ],
)
def test_what_is_not_a_curve_is_refused(text, match, run):
    path = run / "loss_by_depth.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        plot_loss_by_depth(run)
    assert str(path) in str(caught.value)
    assert not (run / "loss_by_depth.png").exists()


def test_without_matplotlib_the_message_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"rdlm\[plots\]"):
        plot_loss_by_depth(run)
