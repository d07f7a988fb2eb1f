"""Readouts: contrasts are of the right logits, a damped loop is a damped loop, signs rank, windows multiply."""

import dataclasses

import numpy as np
import pytest
from experiment_scripts import script
from oracle import random_params

from rdlm import forward
from rdlm.config import Block, InputError, Loop, ModelConfig
from rdlm.losses import cross_entropy
from rdlm.tasks.words import WordProblem, product

STUDY = script("studies/readouts")
TINY = ModelConfig(
    vocab_size=24, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=128, mean_recurrence=8, backprop_depth=2,
)  # fmt: skip
PLAIN = dataclasses.replace(
    TINY, prelude_layers=0, core_layers=3, coda_layers=0, qk_bias=False, embed_scale=1.0, mean_recurrence=1,
    backprop_depth=1, block=Block(norm_output="none"), loop=Loop(injection="none", start="embedding", bridge=False),
)  # fmt: skip
ROWS = np.random.default_rng(0).integers(0, 24, (2, 9))
GIVEN = {"tokens": ROWS[:, :-1], "labels": ROWS[:, 1:]}


def test_a_contrast_is_of_these_two_depths():
    params = random_params(TINY, 3)
    found = STUDY.contrasted(params, TINY, [GIVEN], ((4, 1), (4, 2)))
    late, early = (forward(params, TINY, GIVEN["tokens"], r).logits for r in (4, 1))
    for i, a in enumerate(STUDY.ALPHAS):
        made = late + a * (late - early)
        assert found["4, 1"]["nats"][i] == pytest.approx(float(cross_entropy(made, GIVEN["labels"]).mean()), rel=1e-5)
        assert found["4, 1"]["accuracy"][i] == float((made.argmax(-1) == GIVEN["labels"]).mean())
        sharper = cross_entropy((1 + a) * late, GIVEN["labels"]).mean()
        assert found["4, 1"]["sharpened"][i] == pytest.approx(float(sharper), rel=1e-5)
    assert found["4, 1"]["nats"][0] == found["4, 2"]["nats"][0]
    assert found["4, 1"]["nats"][-1] != found["4, 2"]["nats"][-1]


def test_a_block_run_once_is_the_plain_model_and_damping_is_of_its_layers():
    params = random_params(PLAIN, 3)
    plain = forward(params, PLAIN, ROWS, 1)
    same = forward(*STUDY.looped(params, PLAIN, 1, 1), ROWS, 1)
    np.testing.assert_allclose(same.logits, plain.logits, rtol=1e-5, atol=1e-5)
    twice = forward(*STUDY.looped(params, PLAIN, 1, 1), ROWS, 2)
    assert np.abs(twice.logits - plain.logits).max() > 1e-3
    still = forward(*STUDY.looped(params, PLAIN, 1, 1, 0.0), ROWS, 2)
    without = {name: x for name, x in params.items() if name != "core_1"} | {"core_1": params["core_2"]}
    without.pop("core_2")
    skipped = forward(without, dataclasses.replace(PLAIN, core_layers=2), ROWS, 1)
    np.testing.assert_allclose(still.logits, skipped.logits, rtol=1e-5, atol=1e-5)


def test_signs_and_how_they_rank():
    top = np.array([[1, 2, 3, 4], [1, 5, 3, 5], [1, 2, 3, 4], [1, 2, 7, 4]])
    seen = STUDY.Seen(top, np.array([1, 2, 3, 5]), np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4))
    signs = STUDY.signs(seen)
    assert signs["changes"].tolist() == [0, 2, 1, 2]
    assert signs["settled late"].tolist() == [0, 2, 3, 2]
    wrong = top[-1] != seen.label
    assert wrong.tolist() == [False, False, True, True]
    assert STUDY.ranking(signs["low confidence"], wrong) == 1.0
    assert STUDY.ranking(-signs["low confidence"], wrong) == 0.0
    assert STUDY.ranking(np.zeros(4), wrong) == 0.5
    assert np.isnan(STUDY.ranking(np.zeros(4), np.zeros(4, bool)))


def test_what_confidence_says_already_is_taken_out():
    invent = np.random.default_rng(0)
    confidence = invent.uniform(size=20_000)
    wrong, alone = invent.uniform(size=20_000) > confidence, invent.uniform(size=20_000) < 0.5
    assert STUDY.ranking(-confidence, wrong) > 0.8
    assert STUDY.ranking_within(-confidence, wrong, confidence) == pytest.approx(0.5, abs=0.03)
    assert STUDY.ranking_within(wrong ^ (alone & (confidence > 0.5)), wrong, confidence) > 0.6


def test_states_that_hold_the_last_letters(monkeypatch):
    """Invented states hold the product of the last 3 letters, at r = 2 of all of them."""
    word = WordProblem("S3", STUDY.LETTERS)
    given = [{"tokens": x.tokens[None], "labels": x.labels[None]} for x in (word.instance(0, i) for i in range(6))]
    table = product("S3")

    def last(tokens, w):
        made = [0] * len(tokens)
        for t in range(w, len(tokens)):
            so_far = tokens[t - w + 1]
            for letter in tokens[t - w + 2 : t + 1]:
                so_far = table[so_far, letter]
            made[t] = so_far
        return made

    def invented(params, config, x, deepest):
        tokens = np.asarray(x["tokens"])
        return np.stack([[last(row, 3) for row in tokens], np.maximum(x["labels"], 0)]), None, None, None

    monkeypatch.setattr(STUDY, "_seen", invented)
    found = STUDY.held({}, TINY, given, (1, 2))
    assert found["1"]["best"] == (3, 1.0)
    assert found["1"]["right"] < 0.5
    assert found["2"]["right"] == 1.0
    assert found["2"]["best"][1] < 0.6


def test_over_seeds():
    found = STUDY.over_seeds([{"a": [1.0, (2, 0.5)]}, {"a": [3.0, (2, 0.5)]}])
    assert found["a"][0][0] == 2.0
    assert found["a"][1] == [[2.0, 0.0], [0.5, 0.0]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--parts", "loop", "--model", "nowhere"], "--model nowhere: not a Hugging Face folder"),
        (["--parts", "lens", "lens"], "--parts"),
        (["--seeds", "0", "0"], "--seeds"),
    ],
)
def test_refusals_are_one_line(words, says, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["readouts.py", *words, "--runs", str(tmp_path)])
    with pytest.raises(InputError, match=says):
        STUDY.main()
