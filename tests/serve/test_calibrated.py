"""What a request gets that asks for calibrated exits."""

import dataclasses

import pytest

from rdlm.evaluation import calibration
from rdlm.evaluation.calibration import Calibrated, Effect, Goal
from rdlm.serve.depth import Depths
from rdlm.serve.errors import APIError
from rdlm.serve.options import ServeOptions
from rdlm.serve.service import _calibrations


def found(rule, threshold, steps=6, checkpoint=7):
    effect = None if threshold is None else Effect(0.99, None, 3.0, 1.0)
    return Calibrated(rule, threshold, Goal(0.01, 0.05, steps, checkpoint, "text"), 9, 0, 2.0, effect, ())


def depths(*calibrations):
    options = ServeOptions(exit=("kl", "latent_diff"), steps=8, max_steps=8)
    return Depths(options, 4, {each.rule: each for each in calibrations}, plain_steps=8)


def test_it_gets_depth_and_threshold_of_the_first_rule_that_has_them():
    offered = depths(found("latent_diff", 0.07), found("cosine", 0.1))
    assert offered.offered == ("kl", "latent_diff", "none", "calibrated")
    choice = offered.choose(None, "calibrated", None, None)
    assert (choice.name, choice.kind, choice.num_steps, choice.min_steps) == ("calibrated", "latent_diff", 6, 0)
    assert choice.rule.threshold == 0.07
    assert depths(found("latent_diff", 0.07), found("kl", 0.01)).choose(None, "calibrated", None, None).kind == "kl"


@pytest.mark.parametrize("given", [(6, None, None), (None, 0.1, None), (None, None, 0)])
def test_what_would_break_the_guarantee_is_refused(given):
    steps, threshold, least = given
    with pytest.raises(APIError, match="has its own; leave it out"):
        depths(found("kl", 0.01)).choose(steps, "calibrated", threshold, least)


@pytest.mark.parametrize("none", [[], [found("cosine", 0.1)], [found("kl", None)], [found("kl", 0.01, steps=9)]])
def test_without_a_calibration_that_can_be_served_it_is_not_offered(none):
    with pytest.raises(APIError, match="'calibrated' is not served here; this server offers: kl, latent_diff, none"):
        depths(*none).choose(None, "calibrated", None, None)


def test_only_calibrations_of_these_weights_count(toy_run, tmp_path):
    run = dataclasses.replace(toy_run, folder=tmp_path)
    assert _calibrations(run) == {}
    for each in (found("kl", 0.01), found("latent_diff", 0.1, checkpoint=6)):
        calibration.save(tmp_path, each)
    assert list(_calibrations(run)) == ["kl"]
    assert _calibrations(dataclasses.replace(run, ema=True)) == {}


@pytest.mark.slow
def test_it_is_answered_as_by_the_rule_with_that_threshold(server, monkeypatch):
    ask = {"prompt": "The capital", "max_tokens": 8, "temperature": 0}
    status, _ = server.post("completions", **ask, exit="calibrated")
    assert status == 400
    known = dataclasses.replace(server.service.depths, calibrations={"latent_diff": found("latent_diff", 0.4)})
    monkeypatch.setattr(server.service, "depths", known)
    by_hand = server.post("completions", **ask, exit="latent_diff", threshold=0.4, num_steps=6)[1]["choices"]
    assert server.post("completions", **ask, exit="calibrated")[1]["choices"] == by_hand
    assert server.post("completions", **ask)[1]["choices"] != by_hand
