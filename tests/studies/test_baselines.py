"""Comparisons of kinds of model: fair training, honest summaries, and what each kind computes."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

from experiments.studies.shared.comparison import S3, TUNING_SEED, Trials, compete, recurrent, summary
from experiments.studies.shared.record import interval, remembered
from experiments.studies.shared.training import small_run, training_batch
from rdlm import losses
from rdlm.config import InputError
from rdlm.model import context, core_step, embed, init_params, inject, readout
from rdlm.optim import optimizer
from rdlm.recurrence import sample_steps
from rdlm.report.results import command
from rdlm.train import init_state, train_step

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_dim": 16}


BASELINES, OPERATORS = script("studies/baselines"), script("studies/operators")


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.30265273 * np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert half > 2 * 1.96 * np.std([1, 2, 4], ddof=1) / 3**0.5  # a normal one would be far too narrow
    assert interval([*range(12)])[1] == pytest.approx(2.20098516 * np.std(range(12), ddof=1) / 12**0.5)
    assert math.isnan(interval([1.0])[1])
    with pytest.raises(InputError, match="interval of 0 values"):
        interval([])


def test_finished_parts_are_remembered_with_what_made_them(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"accuracy": 0.5}

    path = tmp_path / "runs" / "a.json"
    assert remembered(path, {"seed": 1, "depths": (1, 2)}, make) == {"accuracy": 0.5}
    assert remembered(path, {"seed": 1, "depths": (1, 2)}, make) == {"accuracy": 0.5}
    assert len(made) == 1
    with pytest.raises(InputError, match=r"a.json: holds a result with depths = \[1, 2\], not \[1, 3\]"):
        remembered(path, {"seed": 1, "depths": (1, 3)}, make)
    # An option that came later and is not set.
    path = path.with_name("b.json")
    remembered(path, {"model": {"width": 3}}, make)
    assert remembered(path, {"model": {"width": 3, "option": None}, "other": None}, make) == {"accuracy": 0.5}
    assert len(made) == 2
    with pytest.raises(InputError, match=r"model = \{'width': 3\}, not"):
        remembered(path, {"model": {"width": 3, "option": 2}}, make)


@pytest.mark.parametrize(
    "places", [["--runs", "/a/b", "--results", "c"], ["--runs=/a/b"], ["--data-folder", "/d", "--model=/m/n"], []]
)
def test_a_command_is_kept_without_the_places_of_a_machine(places, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/experiments/some.py", "--seeds", "0", *places, "--quick"])
    assert command() == "python experiments/some.py --seeds 0 --quick"
    monkeypatch.setattr(sys, "argv", ["/x/experiments/studies/some.py", *places, "--model", "models/smollm2"])
    assert command() == "python experiments/studies/some.py --model models/smollm2"


def row(seed, *means, rate=1e-3):
    tests = {"length 16": {"mean": list(means), "last_quarter": list(means), "steps": 8 * means[0]}} if means else {}
    return {"seed": seed, "learning_rate": rate, "tests": tests}


def test_failures_are_counted_and_stay_in_the_means():
    found = summary([row(0, 0.2, 1.0), row(1, 0.4, 0.5), row(2)])
    assert found["failed"] == [1, 2]
    assert found["diverged"] == [2]
    (first, _), (second, half) = found["tests"]["length 16"]["mean"]
    assert (first, second) == (0.3, 0.75)
    assert half == pytest.approx(12.706 * 0.25, abs=1e-3)
    assert found["tests"]["length 16"]["steps"][0] == 2.4


def test_the_better_rate_is_chosen_by_the_tuning_seed_alone(tmp_path):
    runs = []

    class Fake(Trials):
        def __init__(self, rate):
            self.settings, self.protocol, self.rate = small_run("fake", [S3.train]), S3, rate

        def run(self, seed, stream, name):
            runs.append((self.rate, seed, stream))
            good = self.rate == 3e-3 if seed == TUNING_SEED else self.rate == 1e-3
            return row(seed, 0.9 if good else 0.1, rate=self.rate)

    found = compete("fake", Fake, (1e-3, 3e-3), (0, 1), tmp_path, {})
    assert found["learning_rate"] == 3e-3
    assert [(rate, seed) for rate, seed, _ in runs] == [
        (1e-3, TUNING_SEED), (3e-3, TUNING_SEED), (3e-3, 0), (3e-3, 1)
    ]  # fmt: skip
    assert runs[0][2] != runs[2][2]  # other test instances
    before = len(runs)
    assert compete("fake", Fake, (1e-3, 3e-3), (0, 1), tmp_path, {}) == found
    assert len(runs) == before


@pytest.mark.slow
def test_a_trial_trains_as_a_run_of_the_library_does():
    run = small_run("test", [S3.train], steps=3, batch_size=8, seed=5, **TINY)
    trials = Trials(recurrent(run.model, (1, 4)), run, S3.quick())
    tx = optimizer(run.optimizer, run.steps)
    state, mine = init_state(run, tx), trials.start(jnp.int32(5))
    step = jax.jit(lambda state, batch: train_step(run, tx, state, batch))
    for i in range(3):
        batch = training_batch([S3.train], 5, i, 8)
        state, expected = step(state, batch)
        other = trials.step(jax.tree.map(jnp.copy, mine), batch, jnp.int32(6))[1]
        mine, found = trials.step(mine, batch, jnp.int32(5))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        assert abs(other["loss"] - expected["loss"]) > 1e-4  # other depths and states
    for name in ("wte", "adapter"):
        np.testing.assert_allclose(mine.params[name], state.params[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [20.0, -20.0, 0.3])
def test_universal_transformer_against_a_loop_over_tokens(bias):
    method = BASELINES.METHODS["universal"]
    model = small_run("test", [S3.train], **method.shape | TINY).model
    found = BASELINES.contestant(method, model, (1, 2, 5))
    params = found.init(jax.random.key(0))
    params["model"] = jax.tree.map(lambda x: 3 * x, params["model"])  # so that states differ from step to step
    params["halt"] = {"w": jax.random.normal(jax.random.key(1), (16,)), "bias": jnp.float32(bias)}
    batch = training_batch([S3.train], 0, 0, 2)
    tokens = jnp.asarray(batch["tokens"])

    ctx = context(model, jnp.arange(tokens.shape[1]), None)
    s, _ = embed(params["model"], model, tokens, ctx)
    states = []
    for i in range(8):
        angle = (i + 1) / 10_000 ** (np.arange(8) / 8)
        told = inject(params["model"], model, jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)]), jnp.float32))
        s, _ = core_step(params["model"], model, s, jnp.broadcast_to(told, s.shape), ctx)
        states.append(np.asarray(s))

    def mixed(most):
        out, cost = np.zeros_like(states[0]), np.zeros(tokens.shape)
        for place in np.ndindex(*tokens.shape):
            left = 1.0
            for i in range(most):
                logit = states[i][place] @ np.asarray(params["halt"]["w"]) + bias
                p = float(1 / (1 + np.exp(-logit)))
                if i + 1 == most or 1 - left + p > 0.99:
                    out[place] += left * states[i][place]
                    cost[place] = i + 1 + left
                    break
                out[place] += p * states[i][place]
                left -= p
        return out, cost

    answers = jax.jit(found.answers)(params, tokens)
    for at, most in enumerate((1, 2, 5)):
        logits, _ = readout(params["model"], model, jnp.asarray(mixed(most)[0]), ctx)
        np.testing.assert_array_equal(answers[at], logits.argmax(-1))
    asked = batch["labels"] != losses.IGNORED
    out, cost = mixed(8)
    logits, _ = readout(params["model"], model, jnp.asarray(out), ctx)
    expected = losses.cross_entropy(logits, batch["labels"])[asked].mean() + 1e-3 * cost[asked].mean()
    key = jax.random.key(0)
    np.testing.assert_allclose(jax.jit(found.loss)(params, batch, key, key), expected, rtol=1e-4)
    if bias == 20.0:
        assert (np.abs(cost[asked] - 2) < 1e-6).any()  # halted at once


@pytest.mark.slow
def test_every_way_to_train_has_the_loss_it_says():
    model = small_run("test", [S3.train], **TINY).model
    params = init_params(model, jax.random.key(0))
    batch = training_batch([S3.train], 0, 0, 4)
    depth_key, state_key = jax.random.split(jax.random.key(7))

    def found(name):
        return jax.jit(OPERATORS.contestant(name, model, (1,)).loss)(params, batch, depth_key, state_key)

    at = jax.jit(lambda r, batch: losses.loss(params, model, batch, steps=r, key=state_key))
    n, k = sample_steps(depth_key, 8, 4)
    np.testing.assert_allclose(found("k4"), at(n + k, batch), rtol=1e-5)
    np.testing.assert_allclose(found("full"), at(n + k, batch), rtol=1e-5)
    last = [at(n + j, batch) for j in (1, 2, 3, 4)]
    np.testing.assert_allclose(found("deep"), np.mean(last), rtol=1e-5)
    assert abs(found("deep") - found("k4")) > 1e-5
    rows = [sample_steps(key, 8, 4) for key in jax.random.split(depth_key, 4)]
    alone = [at(n + k, {name: x[i : i + 1] for name, x in batch.items()}) for i, (n, k) in enumerate(rows)]
    assert len({int(n + k) for n, k in rows}) > 1
    np.testing.assert_allclose(found("per_sequence"), np.mean(alone), rtol=1e-5)
    settled = found("equilibrium")
    np.testing.assert_allclose(settled, at(64, batch), rtol=1e-3)
    assert abs(settled - at(1, batch)) > 1e-2 * settled


@pytest.mark.slow
@pytest.mark.parametrize(("module", "methods"), [(BASELINES, ("twin", "universal")), (OPERATORS, ("equilibrium",))])
def test_quick_run(tmp_path, monkeypatch, module, methods):
    monkeypatch.chdir(tmp_path)
    name = module.__name__.removeprefix("experiments_studies_")
    words = [f"{name}.py", "--quick", "--seeds", "0", "1", "--methods", *methods]
    monkeypatch.setattr(sys, "argv", words)
    assert module.main() == 0
    table = tmp_path / "runs" / name / "quick" / f"{name}.json"
    found = json.loads(table.read_text())
    assert set(found["methods"]) == set(methods)
    for method in found["methods"].values():
        assert method["failed"] == [0, 1]  # four steps teach nothing, and that is said
        assert [r["programs"] for r in method["rows"]] == [1, 1]  # one compiled step for all seeds
    assert table.with_suffix(".png").stat().st_size > 10_000
    before = table.read_text()
    assert module.main() == 0  # everything is remembered
    assert table.read_text() == before


@pytest.mark.parametrize("name", ["baselines", "operators"])
def test_refusals(monkeypatch, name):
    module = {"baselines": BASELINES, "operators": OPERATORS}[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seeds", "1", "1"])
    with pytest.raises(InputError, match=r"--seeds = \(1, 1\): must be different seeds"):
        module.main()
