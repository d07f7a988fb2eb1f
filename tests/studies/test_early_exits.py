"""Ways to stop early: what each is trained on, and that learnt rules decode as they were read."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

import rdlm
from experiments.studies.shared import halting
from experiments.studies.shared import rules as learnt
from experiments.studies.shared.comparison import S3
from experiments.studies.shared.exiting import Reader, Watched, alone, stopped, watched
from experiments.studies.shared.training import small_run, training_batch
from rdlm import exits, losses
from rdlm.config import InputError
from rdlm.exits import Observation
from rdlm.model import forward, init_params
from rdlm.recurrence import sample_steps, unroll
from rdlm.tasks import IGNORED

EXITS = script("studies/early_exit_methods")
MODEL = small_run("test", [S3.train], embed_dim=16, num_heads=2, mlp_dim=16).model
KEYS = jax.random.split(jax.random.key(7))  # of depth and states
RATE = 0.2


@pytest.fixture(scope="module")
def params():
    made = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    return jax.tree.map(lambda x: 2 * x, made)  # so that states differ from step to step


@pytest.fixture(scope="module")
def words():
    return training_batch([S3.train], 0, 0, 4)


@pytest.fixture(scope="module")
def at(params, words):
    """r -> the plain model's loss after r recurrences."""
    run = jax.jit(lambda r: losses.loss(params, MODEL, words, steps=r, key=KEYS[1]))
    return lambda r: float(run(r))


def by_hand(lam, last):
    """Probabilities of halting at looks 1 .. N."""
    left, found = 1.0, []
    for n, p in enumerate(lam, 1):
        halted = 0.0 if n > last else left if n == last else left * p
        found.append(halted)
        left -= halted
    return np.array(found)


@pytest.mark.parametrize("last", [1, 4, 6])
def test_halting_distribution(last):
    logits = 2 * np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    found = np.asarray(halting.halting_distribution(jnp.asarray(logits), last))
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-5)
    lam = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[:, *place], by_hand(lam[:, *place], last), rtol=1e-4, atol=1e-7)
    assert by_hand(lam[:, 0, 0], 7).sum() < 0.999  # control: without the last look's rest something is missing


def test_ponder_loss_is_the_expectation_and_the_divergence_of_a_loop_over_tokens():
    rng, last, weight = np.random.default_rng(1), 5, 0.3
    logits, found = (rng.normal(size=(6, 2, 3)).astype(np.float32) for _ in range(2))
    labels = np.array([[IGNORED, 1, 2], [0, IGNORED, 1]])
    prior = by_hand(np.full(6, RATE), last)
    total = []
    for place in np.argwhere(labels != IGNORED):
        p = by_hand(1 / (1 + np.exp(-logits[:, *place].astype(np.float64))), last)
        divergence = sum(a * math.log(a / b) for a, b in zip(p[:last], prior[:last], strict=True))
        total.append((p * found[:, *place]).sum() + weight * divergence)
    ours = halting.ponder_loss(jnp.asarray(found), jnp.asarray(logits), jnp.asarray(labels), last, RATE, weight)
    assert float(ours) == pytest.approx(np.mean(total), rel=1e-5)
    other = halting.ponder_loss(jnp.asarray(found), jnp.asarray(logits), jnp.asarray(labels), last, 0.5, weight)
    assert abs(float(other) - np.mean(total)) > 0.01


def test_divergence_is_zero_for_the_prior_itself():
    same = jnp.full((6, 1), math.log(RATE / (1 - RATE)))
    assert float(halting.divergence_from_geometric(same, 6, RATE)[0]) == pytest.approx(0, abs=1e-6)
    after = same.at[4].set(3.0)  # after look 4 nobody is left
    assert float(halting.divergence_from_geometric(after, 4, RATE)[0]) == pytest.approx(0, abs=1e-6)
    assert float(halting.divergence_from_geometric(after, 6, RATE)[0]) > 0.1


def test_pondering_reads_the_recurrences_it_halts_at(params, words, at):
    n, k = sample_steps(KEYS[0], 8, 4)
    drawn = int(n + k)
    assert drawn > 1
    for most in (drawn - 1, 16):
        run = jax.jit(halting.ponder(MODEL, (1,), most, RATE, 0.0).loss)
        for probability, r in ((1e-9, min(drawn, most)), (1 - 1e-9, 1)):
            both = {"model": params, "exit": halting.head(16, probability)}
            assert float(run(both, words, *KEYS)) == pytest.approx(at(r), rel=1e-4)
    assert abs(at(1) - at(drawn)) > 1e-3
    assert abs(at(drawn) - at(drawn - 1)) > 1e-3


def test_the_oracle_stops_where_an_answer_stays():
    right = np.array([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]], bool)  # [look, token]
    stop = np.asarray(halting.stays(jnp.asarray(right)))
    assert stop.T.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    # In the table: steps 3 and 2 for what is right in the end, 1 for what never is.
    batch = {"labels": np.array([[5, 5, 5, 5, IGNORED]])}
    answers = np.where(np.pad(right, ((0, 0), (0, 1)))[:, None], 5, 4)
    reader = Reader(None, MODEL, [batch], 4)
    vars(reader)["seen"] = [Watched(None, None, np.eye(6)[answers])]
    assert reader.oracle() == {"oracle accuracy": 0.5, "oracle steps": (3 + 1 + 2 + 1) / 4}


def test_the_classifier_is_asked_at_every_depth_with_gradient(params, words, at):
    n = int(sample_steps(KEYS[0], 8, 4)[0])
    head = {"w": jax.random.normal(jax.random.key(1), (16,)), "bias": jnp.float32(0.5)}
    asked, found = words["labels"] != IGNORED, []
    keys = jax.vmap(lambda row: jax.random.fold_in(KEYS[1], row))(words["sequence_ids"][:, 0])
    run = jax.jit(lambda r: forward(params, MODEL, words["tokens"], r, key=keys))
    outs = [run(n + j) for j in (1, 2, 3, 4)]
    right = np.array([np.asarray(out.logits).argmax(-1) == words["labels"] for out in outs])
    for j, out in enumerate(outs):
        p = 1 / (1 + np.exp(-(np.asarray(out.state) @ np.asarray(head["w"]) + 0.5)))
        found.append(-np.log(np.where(right[j:].all(0), p, 1 - p))[asked].mean())
    expected = np.mean([at(n + j) for j in (1, 2, 3, 4)]) + 0.7 * np.mean(found)
    ours = jax.jit(halting.classified(MODEL, (1,), 0.7).loss)({"model": params, "exit": head}, words, *KEYS)
    assert float(ours) == pytest.approx(expected, rel=1e-4)
    assert right[:, asked].any()
    assert not right[:, asked].all()


def test_fitting_finds_what_a_state_says():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2000, 8)).astype(np.float32)
    stop = states[:, 2] - states[:, 5] > 0.5
    head, loss = halting.fitted(jnp.asarray(states), jnp.asarray(stop))
    w = np.asarray(head["w"])
    assert (w[2] - w[5]) / np.linalg.norm(w) / 2**0.5 > 0.999  # the direction
    assert -float(head["bias"]) / np.linalg.norm(w) * 2**0.5 == pytest.approx(0.5, abs=0.05)  # and how far along it
    nothing = halting.fitted(jnp.asarray(states), jnp.asarray(rng.permutation(stop)))[1]
    assert float(loss) < 0.05 < 0.6 < float(nothing)


def test_skipping_leaves_out_the_share_it_says():
    def ran(probability, shape):
        step = halting.skipping(lambda s, i: s + 1, jax.random.key(0), probability, shape)
        return np.asarray(jax.jit(lambda s: unroll(step, s, 2000, 0))(jnp.zeros((4, 5, 3))))

    assert np.all(ran(0.0, ()) == 2000)
    together = ran(0.2, ())
    assert np.ptp(together) == 0
    assert abs(together[0, 0, 0] - 1600) < 4 * math.sqrt(2000 * 0.16)
    apart = ran(0.2, (4, 5, 1))
    assert np.ptp(apart, axis=-1).max() == 0 < np.ptp(apart)  # of a token all or nothing
    assert abs(apart.mean() - 1600) < 4 * math.sqrt(2000 * 0.16 / 20)


def test_layer_drop_of_a_shared_core_is_a_shallower_draw(params, words, at):
    n, k = (int(x) for x in sample_steps(KEYS[0], 8, 4))

    def loss(probability, per_token):
        return jax.jit(halting.layer_drop(MODEL, (1,), probability, per_token).loss)(params, words, *KEYS)

    for per_token in (False, True):
        assert float(loss(0.0, per_token)) == pytest.approx(at(n + k), rel=1e-4)
    key = jax.random.fold_in(KEYS[0], 1)
    drop = [bool(jax.random.bernoulli(jax.random.fold_in(key, i), 0.4)) for i in range(n + k)]
    free, last = n - sum(drop[:n]), k - sum(drop[n:])
    assert 0 < free + last < n + k
    found = jax.jit(jax.grad(halting.layer_drop(MODEL, (1,), 0.4, False).loss))(params, words, *KEYS)
    shallow = jax.jit(jax.grad(lambda p: losses.loss(p, MODEL, words, steps=(free, last), key=KEYS[1])))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, shallow)
    assert float(loss(0.4, False)) == pytest.approx(at(free + last), rel=1e-4)
    assert abs(at(free + last) - at(n + k)) > 1e-3
    assert min(abs(float(loss(0.4, True)) - at(r)) for r in range(1, n + k + 1)) > 1e-4  # tokens at many depths


def rules(width):
    weights = {"w": jax.random.normal(jax.random.key(3), (width,)) / 2, "bias": jnp.float32(-1.5)}
    return {
        "classifier": lambda t: learnt.classifier(weights, t),
        "halting": lambda t: learnt.halting(weights, t),
    }, weights


def values(name, weights, states):
    """Offline: what a learnt rule says of states [N, ..., D] at each look, [N, ...]."""
    lam = 1 / (1 + np.exp(-(np.asarray(states, np.float64) @ np.asarray(weights["w"]) + float(weights["bias"]))))
    return lam if name == "classifier" else 1 - np.cumprod(1 - lam, axis=0)


@pytest.mark.parametrize("name", ["classifier", "halting"])
def test_learnt_rules_and_their_rows(name):
    states = np.random.default_rng(2).normal(size=(5, 2, 3, 8)).astype(np.float32)
    made, weights = rules(8)
    expected = values(name, weights, states)
    for rule in (made[name](0.5), made[name](0.5).by_row(2)):
        state = exits.init(rule, jnp.zeros((2, 3, 8)), 7)
        for i, s in enumerate(states):
            state, value = exits.update(rule, state, Observation(jnp.asarray(s), None, jnp.int32(i + 1)))
            np.testing.assert_allclose(value, expected[i], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(exits.exits(rule, value), np.asarray(value) >= 0.5)
    # Rows may carry other heads and thresholds.
    rule = made[name](np.array([0.1, 0.9])).by_row(2)
    rule = dataclasses.replace(rule, weights=jax.tree.map(lambda x: x.at[1].multiply(-1), rule.weights))
    value = exits.update(
        rule, exits.init(rule, jnp.zeros((2, 3, 8)), 7), Observation(jnp.asarray(states[0]), None, jnp.int32(1))
    )[1]
    np.testing.assert_allclose(value[0], expected[0, 0], rtol=1e-4)
    assert np.abs(value[1] - expected[0, 1]).max() > 0.1
    with pytest.raises(InputError, match=f"exits.{name}: threshold"):
        made[name](-1.0)


def test_margin():
    logits = np.log(np.array([[[0.7, 0.1, 0.2], [0.3, 0.4, 0.3]]], np.float32))
    rule = learnt.margin(0.3)
    _, value = exits.update(rule, (), Observation(jnp.zeros((1, 2, 4)), logits, jnp.int32(1)))
    np.testing.assert_allclose(value, [[0.5, 0.1]], rtol=1e-4)
    assert np.asarray(exits.exits(rule, value)).tolist() == [[True, False]]


@pytest.mark.parametrize("name", ["classifier", "halting"])
def test_learnt_rules_generate_as_they_were_read(name, params, words):
    prompts, most = words["tokens"][:3, :6], 12
    make, weights = rules(16)[0][name], rules(16)[1]
    # The prompt runs to the end; the rule is for the token that follows it.
    made = rdlm.generate(
        params, MODEL, prompts, max_new_tokens=2, num_steps=most, exit_rule=make(2.0), prefill_exit="never"
    )  # fmt: skip
    assert [s.tolist() for s in made.steps] == [[most, most]] * 3
    read = np.concatenate([prompts, np.array([t[:1] for t in made.tokens])], axis=1)
    run = jax.jit(lambda r: forward(params, MODEL, read, r).state[:, -1])
    offline = values(name, weights, np.array([run(jnp.int32(r)) for r in range(1, most + 1)]))  # [look, row]
    # A threshold which rows pass at different looks, and that no value is near.
    candidates = np.sort(offline.ravel())
    gaps = np.diff(candidates)
    usable = [
        t for t, gap in zip((candidates[1:] + candidates[:-1]) / 2, gaps, strict=True)
        if gap > 1e-3 and len(set((offline >= t).argmax(0))) > 1
    ]  # fmt: skip
    threshold = usable[len(usable) // 2]
    passed = offline >= threshold
    expected = np.where(passed.any(0), 1 + passed.argmax(0), most)
    found = rdlm.generate(
        params, MODEL, prompts, max_new_tokens=2, num_steps=most, exit_rule=make(threshold), prefill_exit="never"
    )  # fmt: skip
    assert [int(s[1]) for s in found.steps] == expected.tolist()
    assert len(set(expected)) > 1
    with pytest.raises(InputError, match="exit_rule: threshold"):
        forward(params, MODEL, prompts, most, exit_rule=make(np.zeros(2)))


def test_alone_nobody_waits(params, words):
    tokens, most, rule = words["tokens"], 8, rules(16)[0]["halting"](0.6)
    seen = watched(params, MODEL, tokens, most)
    answers, by_itself = (np.asarray(x) for x in alone(rule, seen))
    expected = values("halting", rules(16)[1], seen.states)
    passed = expected >= 0.6
    np.testing.assert_array_equal(by_itself, np.where(passed.any(0), 1 + passed.argmax(0), most))
    said = np.asarray(seen.logits).argmax(-1)
    np.testing.assert_array_equal(answers, np.take_along_axis(said, by_itself[None] - 1, axis=0)[0])
    # As tokens decode, the first one has nobody to wait for; others see what those before them held.
    steps = np.asarray(stopped(params, MODEL, tokens, rule, most)[1])
    np.testing.assert_array_equal(by_itself[:, 0], steps[:, 0])
    assert np.any(by_itself != steps)


def test_the_cheapest_threshold_that_loses_little():
    points = [{"accuracy": a, "steps": s} for a, s in ((0.5, 1), (0.995, 4), (0.999, 6), (1.0, 24))]
    assert EXITS.cheapest(points, 1.0)["steps"] == 4
    assert EXITS.cheapest(points, 1.001)["steps"] == 6
    assert EXITS.cheapest(points[:1], 1.0) is None


@pytest.mark.slow
def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["early_exit_methods.py", "--quick", "--seeds", "0", "1", "--methods", "drop"]
    monkeypatch.setattr(sys, "argv", words)
    for rule, few in {"kl": (0.1,), "latent_diff": (0.5,), "classifier": (0.5, 0.99999)}.items():
        monkeypatch.setitem(EXITS.SWEEP, rule, few)
    assert EXITS.main() == 0
    table = tmp_path / "runs/early_exit_methods/quick/early_exit_methods.json"
    found = json.loads(table.read_text())
    drop = found["methods"]["drop"]
    assert drop["failed"] == [0, 1]  # four steps teach nothing, and that is said
    assert [row["rule"] for row in found["table"]] == ["fixed", "kl", "latent_diff", "classifier"]
    fixed = found["table"][0]["tests"]["length 16"]
    assert fixed["chosen"] == fixed["transferred"]
    for row in drop["rows"]:
        test = row["tests"]["length 16"]
        steps = test["alone classifier steps"]
        assert steps == sorted(steps)
        assert 1 <= steps[0] <= steps[-1] <= 3
        assert test["oracle accuracy"] == pytest.approx(test["mean"][-1], abs=1e-4)
        if not test["calm classifier threshold"]:  # nothing was safe enough
            assert test["calm classifier steps"] == 3
    assert table.with_suffix(".png").stat().st_size > 10_000
    before = table.read_text()
    assert EXITS.main() == 0  # everything is remembered
    assert table.read_text() == before


def test_refusals(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["early_exit_methods.py", "--seeds", "1", "1"])
    with pytest.raises(InputError, match=r"--seeds = \(1, 1\): must be different seeds"):
        EXITS.main()
