"""The promise holds where the truth is known, and calibrate_exits.py and generate.py keep to it."""

import dataclasses
import importlib
import importlib.util
import json
import math

import jax
import numpy as np
import pytest

import rdlm
from rdlm import exits
from rdlm.checkpoint import save_parameters
from rdlm.config import DataConfig, InputError, ModelConfig, RunConfig
from rdlm.data.prepare import prepare_embedded
from rdlm.evaluation import calibration
from rdlm.evaluation.calibration import Scorer, calibrate, load, loosest, min_rows, p_value, read, save, thresholds
from rdlm.runtime import Progress
from rdlm.tokenizer import Tokenizer

TEXTS = [f"{i} The capital of land {i} is city {i % 7}; its river é flows {i * i} km.\n" * 3 for i in range(60)]
TINY = ModelConfig(
    vocab_size=17, embed_dim=16, num_heads=2, mlp_dim=32, prelude_layers=0, core_layers=1, coda_layers=1,
    max_length=64, mean_recurrence=4, backprop_depth=2,
)  # fmt: skip


# The test itself, on numbers whose truth is known


def test_the_p_value_is_what_the_gambler_owns():
    loss, epsilon = np.array([0.0, 0.3, 1.0, 0.05]), 0.2
    money = 0.0
    for bet, share in ((1, 0.5), (0.5, 0.25), (0.25, 0.125), (0.125, 0.125)):
        money += share * math.prod(1 + bet * (epsilon - x) for x in loss)
    assert p_value(loss, epsilon) == pytest.approx(min(1, 1 / money), rel=1e-12)
    assert p_value(np.zeros(1000), epsilon) < 1e-60
    assert p_value(np.zeros(10**6), 0.5) == 0  # beyond what a float holds
    assert p_value(np.ones(1000), epsilon) == 1


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.5, np.inf])
def test_losses_that_are_no_shares_prove_nothing(wrong):
    losses = np.append(np.zeros(400), wrong)
    with pytest.raises(InputError, match=r"must be numbers in \[0, 1\]"):
        loosest([(0.1, losses)], 0.05, 0.05)


DRAWS = {
    "whole rows": lambda rng, n: (rng.random((4000, n)) < 0.1).astype(float),
    "many small losses": lambda rng, n: rng.beta(0.5, 4.5, (4000, n)),
    "nearly constant": lambda rng, n: rng.uniform(0.09, 0.11, (4000, n)),
    "few rows that lose all, without replacement": lambda rng, n: rng.permuted(
        np.tile(np.arange(2 * n) < n // 5, (4000, 1)), axis=1
    )[:, :n].astype(float),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_rejecting_what_is_true_is_as_rare_as_promised(draw, delta):
    losses = draw(np.random.default_rng(0), 60)  # the mean is 0.1 exactly
    assert np.mean([p_value(loss, 0.1) <= delta for loss in losses]) <= delta
    assert np.mean([p_value(loss, 0.3) <= delta for loss in losses]) > 0.5  # and what is false is seen


RISKS = np.linspace(0.002, 0.1, 50)  # thresholds by their true risk: finer than a sample can tell apart
EPSILON, DELTA, RESAMPLES = 0.05, 0.05, 200


def resamples():
    """200 x (losses of 300 rows [50, 300], losses of their tokens [50, 300, 64]) with the means RISKS.

    A tenth of the rows is hard and holds all disagreements, so tokens of a row hang together.
    """
    rng = np.random.default_rng(1)
    for _ in range(RESAMPLES):
        hard = 10.0 * (rng.random(300) < 0.1)
        token = rng.random((300, 64)) < RISKS[:, None, None] * hard[:, None]
        yield token.mean(-1), token


def test_calibrated_thresholds_keep_the_promise_and_others_do_not():
    risks = {"calibrated": [], "tokens taken for rows": [], "best on the sample": []}
    for rows, tokens in resamples():
        risks["calibrated"].append(loosest(zip(RISKS, rows, strict=True), EPSILON, DELTA) or 0.0)
        pieces = (piece.ravel() for piece in tokens)
        risks["tokens taken for rows"].append(loosest(zip(RISKS, pieces, strict=True), EPSILON, DELTA) or 0.0)
        risks["best on the sample"].append(RISKS[rows.mean(1) <= EPSILON].max())
    broken = {name: sum(risk > EPSILON for risk in found) for name, found in risks.items()}
    assert broken["calibrated"] <= DELTA * RESAMPLES
    assert broken["tokens taken for rows"] > 4 * DELTA * RESAMPLES
    assert broken["best on the sample"] > 6 * DELTA * RESAMPLES
    assert np.mean(risks["calibrated"]) > 0.6 * EPSILON  # not by refusing everything


def test_testing_stops_at_the_first_threshold_that_fails():
    def tried():
        yield 1e-4, np.zeros(500)
        yield 1e-3, np.full(500, 0.2)
        raise AssertionError("asked for more")

    assert loosest(tried(), 0.05, 0.05) == 1e-4
    # One that would pass behind one that fails is not taken: the order would no longer be fixed in advance.
    assert loosest([(1e-4, np.full(500, 0.2)), (1e-3, np.zeros(500))], 0.05, 0.05) is None


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.05), (0.3, 0.5), (0.002, 0.01)])
def test_fewer_rows_than_the_least_show_nothing(epsilon, delta):
    least = min_rows(epsilon, delta)
    assert p_value(np.zeros(least), epsilon) <= delta
    assert least == 1 or p_value(np.zeros(least - 1), epsilon) > delta


@pytest.mark.parametrize("rule", calibration.RULES)
def test_thresholds_go_from_safe_to_loose(rule):
    grid = thresholds(rule, 16)
    assert len(grid) >= 9
    if rule in ("fixed", "argmax_stability"):
        assert grid == tuple(range(15, 0, -1))
    else:
        assert list(grid) == sorted(set(grid))
        assert grid[0] < 0.1 * getattr(exits, rule)().threshold <= grid[-1]


@pytest.mark.parametrize("value", [0, 1, -0.1, 2, math.nan])
def test_levels_outside_0_and_1_are_refused(value):
    with pytest.raises(InputError, match="epsilon = "):
        loosest([], value, 0.05)
    with pytest.raises(InputError, match="delta = "):
        loosest([], 0.05, value)


# Scoring thresholds


ROWS, LENGTH, STEPS = 43, 12, 10


@pytest.fixture(scope="module")
def rows():
    """Random tokens: the first row ends in padding, the second is padding, in the third nothing is scored."""
    tokens = np.random.default_rng(0).integers(0, 17, (ROWS, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, -3:], segments[1] = 0, 0
    scored = segments != 0
    scored[2] = False
    return {"tokens": tokens, "segment_ids": segments, "scored": scored}


@pytest.fixture(scope="module")
def scorer(rows):
    """Of a random model that settles slowly; the last of three batches is filled up."""
    return Scorer(rdlm.init_params(TINY, jax.random.key(3)), TINY, rows, STEPS, batch_size=20, seed=5)


def test_a_threshold_is_scored_as_forward_scores_it(scorer, rows):
    scores = scorer("latent_diff", 0.3)
    forward = jax.jit(rdlm.forward, static_argnames=("config", "num_steps"))
    given = {"segment_ids": rows["segment_ids"], "key": jax.random.split(jax.random.key(5), ROWS)}
    full = forward(scorer.params, TINY, rows["tokens"], STEPS, **given).logits.argmax(-1)
    out = forward(scorer.params, TINY, rows["tokens"], STEPS, exit_rule=exits.latent_diff(np.float32(0.3)), **given)
    other, steps, used = np.asarray(out.logits.argmax(-1) != full), np.asarray(out.steps), [0, *range(3, ROWS)]
    assert scores.tokens.tolist() == [9] + [12] * (ROWS - 3)
    assert scores.loss.tolist() == [other[i][rows["scored"][i]].mean() for i in used]
    assert scores.steps.tolist() == [steps[i][rows["scored"][i]].sum() for i in used]
    assert 0.1 < scores.loss.mean() < 0.5
    assert 2 < scores.mean_steps < STEPS - 2


def test_no_threshold_compiles_anew_and_never_stopping_agrees(scorer):
    scorer("kl", 1e-3)
    compiled = calibration._score._cache_size()
    never = scorer("kl", 0.0)
    assert never.agreement == 1
    assert never.mean_steps == STEPS
    assert scorer("kl", 1e9).mean_steps == 1
    assert calibration._score._cache_size() == compiled


def test_calibrating_fixed_depth_finds_the_depth_that_the_losses_say(scorer):
    found = calibrate(scorer, "fixed", epsilon=0.4, delta=0.1, step=9, data="noise", check=scorer)
    losses = {r: scorer("fixed", r).loss for r in range(STEPS - 1, 0, -1)}
    passing = [r for r in losses if all(p_value(losses[deeper], 0.4) <= 0.1 for deeper in range(r, STEPS))]
    least = min(passing)
    assert 2 < least < STEPS - 1  # some pass, some fail
    assert (found.threshold, found.effect.mean_steps) == (least, least)
    assert [t for t, *_ in found.tried] == [*passing, least - 1]
    assert found.effect.agreement == found.effect.checked_agreement == pytest.approx(1 - losses[least].mean())
    flops = rdlm.perf.flops.forward_flops
    assert found.effect.flops_per_token == pytest.approx(flops(TINY, least, LENGTH))  # it looks at no logits
    assert found.flops_saved == pytest.approx(1 - flops(TINY, least, LENGTH) / flops(TINY, STEPS, LENGTH))


def test_looks_at_logits_are_paid_for(scorer):
    found = calibrate(scorer, "kl", epsilon=0.4, delta=0.1, step=9, data="noise")
    work = rdlm.perf.flops.forward_flops(TINY, found.effect.mean_steps, LENGTH)
    look = rdlm.perf.flops.check_flops(TINY, LENGTH)
    assert found.effect.flops_per_token == pytest.approx(work + found.effect.mean_steps * look)
    assert (found.checked_rows, found.effect.checked_agreement) == (0, None)


def test_a_model_that_computes_nan_promises_nothing(scorer, rows):
    ln_f = {"scale": scorer.params["ln_f"]["scale"].at[0].set(np.nan)}
    with pytest.raises(InputError, match=r"\d+ tokens are not finite after 10 recurrences; nothing can be promised"):
        Scorer(scorer.params | {"ln_f": ln_f}, TINY, rows, STEPS, batch_size=20)
    healthy = Scorer(scorer.params, TINY, rows, STEPS, batch_size=20)
    healthy.params = scorer.params | {"ln_f": ln_f}  # finite at full depth, and not with a rule
    with pytest.raises(InputError, match=r"not finite with kl at 0\.1"):
        healthy("kl", 0.1)


def test_what_cannot_be_calibrated_is_refused(scorer, rows):
    known = {"epsilon": 0.01, "delta": 0.05, "step": 9, "data": "noise"}
    with pytest.raises(InputError, match=r"41 rows cannot show it .* at least \d{3} can"):
        calibrate(scorer, "kl", **known)
    assert (
        "fixed: no depth below 10 that was tried"
        in dataclasses.replace(
            calibrate(scorer, "fixed", epsilon=0.4, delta=0.1, step=9, data="noise"), threshold=None
        ).guarantee
    )
    with pytest.raises(InputError, match=r"rule = 'latent_dif': .* Did you mean 'latent_diff'"):
        calibrate(scorer, "latent_dif", **known)
    with pytest.raises(InputError, match="num_steps = 1: must be at least 2"):
        Scorer(scorer.params, TINY, rows, 1)
    with pytest.raises(InputError, match="no held-out token to score"):
        Scorer(scorer.params, TINY, rows | {"scored": np.zeros_like(rows["scored"])}, STEPS)


# The run folder


FOUND = calibration.Calibrated(
    "kl", 2e-4, calibration.Goal(0.01, 0.05, num_steps=16, step=600, data="some text"), rows=700, checked_rows=200,
    full_flops_per_token=1e7, effect=calibration.Effect(0.996, 0.995, 5.0, 8e6),
    tried=(calibration.Tried(1e-7, 1.0, 9.0, 0.001), calibration.Tried(2e-4, 0.996, 5.0, 0.04)),
)  # fmt: skip


COMMAND = "python experiments/calibrate_exits.py RUN"


def test_what_is_saved_is_loaded(tmp_path):
    assert read(tmp_path) == {}
    other = dataclasses.replace(FOUND, rule="latent_diff", threshold=0.05)
    for one in (FOUND, other, dataclasses.replace(FOUND, threshold=1e-4)):  # the last replaces the first
        save(tmp_path, one)
    assert read(tmp_path) == {"kl": dataclasses.replace(FOUND, threshold=1e-4), "latent_diff": other}
    assert load(tmp_path, "latent_diff", 600, COMMAND) == other
    assert [p.name for p in tmp_path.iterdir()] == [calibration.FILE]


@pytest.mark.parametrize(
    ("change", "rule", "match"),
    [
        ({}, "cosine", r"cosine is not calibrated \(only kl is there\); run `python experiments/calibrate_exits.py"),
        ({"goal": FOUND.goal._replace(step=400)}, "kl", "for step 400, the checkpoint is step 600"),
        ({"threshold": None}, "kl", "no threshold that was tried .* fixed depth is the answer .*--steps 16"),
    ],
)
def test_what_is_not_calibrated_is_refused(change, rule, match, tmp_path):
    save(tmp_path, dataclasses.replace(FOUND, **change))
    with pytest.raises(InputError, match=match):
        load(tmp_path, rule, 600, COMMAND)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: "{",
        lambda tree: "[]",
        lambda tree: json.dumps({"kl": 3}),
        lambda tree: json.dumps({"kl": tree["kl"] | {"threshold": -1}}),
        lambda tree: json.dumps({"kl": tree["kl"] | {"thresh": 1}}),
        lambda tree: json.dumps({"cl": tree["kl"]}),
    ],
)
def test_a_damaged_file_is_named(damage, tmp_path):
    path = save(tmp_path, FOUND)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(InputError, match=r"not calibrated exits .* delete it") as caught:
        load(tmp_path, "kl", 600, COMMAND)
    assert str(path) in str(caught.value)


# The commands


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run folder with a random model and real tokenizer and data."""
    base = tmp_path_factory.mktemp("text")
    data = DataConfig(
        tokenizer_size=290, sequence_length=16, batch_size=4, validation_fraction=0.5, folder=str(base / "data")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: TEXTS)
        tokenizer = Tokenizer.load(prepare_embedded(data) / "tokenizer")
    config = dataclasses.replace(TINY, vocab_size=290)
    params = rdlm.init_params(config, jax.random.key(0))
    folder = base / "run"
    save_parameters(folder, params, RunConfig(model=config, data=data), {"tokenizer": tokenizer.hash}, step=4)
    tokenizer.save(folder / "tokenizer")
    return folder


CALIBRATE = ("--rules", "kl", "fixed", "--epsilon", "0.2", "--rows", "40")


@pytest.mark.slow
def test_calibrated_thresholds_reach_generate(text_run, command):
    code, out, err = command("calibrate_exits", text_run, *CALIBRATE)
    assert code == 0, err
    found = read(text_run)
    assert list(found) == ["kl", "fixed"]
    assert all((x.goal.step, x.goal.num_steps, x.rows, x.checked_rows) == (4, 8, 40, 40) for x in found.values())
    assert f"kl at {found['kl'].threshold:g}" in out
    assert "validation text of factbook" in found["kl"].goal.data
    say = ("generate", text_run, "--prompt", "The", "--max-new-tokens", "4", "--exit", "kl")
    code, out, err = command(*say, "--calibrated")
    assert code == 0, err
    assert found["kl"].guarantee in err
    by_hand = command(*say, "--threshold", repr(found["kl"].threshold), "--steps", "8")
    assert untimed(out) == untimed(by_hand[1])


def test_an_error_ends_the_live_display(text_run, command, monkeypatch):
    ended = []
    monkeypatch.setattr(Progress, "__exit__", lambda *_: ended.append(True))

    def refuse(*_, **__):
        raise InputError("no")

    monkeypatch.setattr(calibration, "calibrate", refuse)
    assert command("calibrate_exits", text_run, *CALIBRATE)[0] == 2
    assert ended == [True]


def untimed(out):
    return out[: out.rindex(";")]


def test_a_rule_that_keeps_no_promise_is_a_result(text_run, command, monkeypatch):
    monkeypatch.setattr(calibration, "thresholds", lambda rule, num_steps: (1e6,))
    monkeypatch.setattr(calibration, "p_value", lambda loss, epsilon: float(loss.any()) or 0.01)
    monkeypatch.setattr(calibration.Outcome, "agreement", 0.5)
    real = calibration.Scorer.__call__
    broken = lambda *given: real(*given)._replace(loss=np.ones(40))  # noqa: E731
    monkeypatch.setattr(calibration.Scorer, "__call__", broken)
    code, out, _ = command("calibrate_exits", text_run, "--rules", "cosine", "--epsilon", "0.2", "--rows", "40")
    assert code == 0
    assert "cosine: no threshold that was tried agrees with 8 recurrences for 0.8 of tokens" in out
    assert read(text_run)["cosine"].threshold is None
    code, _, err = command("generate", text_run, "--prompt", "The", "--exit", "cosine", "--calibrated")
    assert code == 2
    assert "fixed depth is the answer" in err


def test_a_task_is_calibrated_on_new_instances(tmp_path, command):
    config = dataclasses.replace(TINY, vocab_size=3)
    data = DataConfig(tokenizer_size=3, sequence_length=17, task="parity", task_size=16)
    run = RunConfig(model=config, data=data)
    save_parameters(tmp_path / "run", rdlm.init_params(config, jax.random.key(0)), run, {}, step=7)
    code, out, err = command("calibrate_exits", tmp_path / "run", "--rules", "latent_diff", "--rows", "100",
                             "--epsilon", "0.1")  # fmt: skip
    assert code == 0, err
    found = read(tmp_path / "run")["latent_diff"]
    assert (found.goal.step, found.rows, found.checked_rows) == (7, 100, 100)
    assert "new instances of parity" in out
    assert math.isfinite(found.effect.mean_steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rules", "klo"), ["rule = 'klo'", "Did you mean 'kl'?"]),
        (("--epsilon", "0"), ["epsilon = 0.0", "must be in (0, 1)"]),
        (("--epsilon", "1.5"), ["epsilon = 1.5"]),
        (("--delta", "1"), ["delta = 1.0", "must be in (0, 1)"]),
        (("--steps", "0"), ["--steps = 0", "at least 2"]),
        (("--rows", "0"), ["--rows = 0"]),
        (("--rows", "20"), ["20 rows cannot show it", "larger epsilon"]),
    ],
)
def test_wrong_input_is_one_line(arguments, words, text_run, command):
    before = (text_run / calibration.FILE).exists()
    code, _, err = command("calibrate_exits", text_run, *arguments)
    refused(code, err, words)
    assert (text_run / calibration.FILE).exists() == before


def refused(code, err, words):
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--exit", "entropy_diff"), ["entropy_diff is not calibrated", "calibrate_exits.py"]),
        (("--exit", "none"), ["--exit none has no threshold"]),
        (("--threshold", "1e-3"), ["--threshold 0.001", "leave one of them out"]),
        (("--steps", "9"), ["--steps 9", "leave one of them out"]),
        (("--min-steps", "2"), ["--min-steps 2", "leave one of them out"]),
        (("--parallel.window", "8"), ["--parallel.window 8", "leave one of them out"]),
    ],
)
def test_generate_refuses_what_no_promise_covers(arguments, words, text_run, command):
    code, _, err = command("generate", text_run, "--prompt", "a", "--calibrated", *arguments)
    refused(code, err, words)


def test_runs_without_checkpoint_or_held_out_text_are_refused(text_run, tmp_path, command):
    code, _, err = command("calibrate_exits", tmp_path)
    refused(code, err, ["not (yet) a run folder"])
    for name in ("config.json", "tokenizer"):
        (tmp_path / name).symlink_to(text_run / name)
    code, _, err = command("calibrate_exits", tmp_path)
    refused(code, err, ["no complete checkpoint"])
    (tmp_path / "checkpoints").symlink_to(text_run / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rdlm.data.loader").PackedData, "len_rows", 0, raising=False)
        real = importlib.import_module("rdlm.data.loader").PackedData.__init__

        def empty(self, *given, **more):
            real(self, *given, **more)
            self.len_rows = 0

        patch.setattr(importlib.import_module("rdlm.data.loader").PackedData, "__init__", empty)
        code, _, err = command("calibrate_exits", tmp_path)
    refused(code, err, ["no validation rows", "validation fraction above 0"])
