"""Ways to think on S3 words: what is asked, that a thought is the state fed back, and what each way costs."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

import rdlm
from experiments.studies.shared.comparison import fixed_depth, training_flops
from experiments.studies.shared.thoughts import chain_loss, once, stage
from experiments.studies.shared.training import small_run, training_batch
from rdlm import losses
from rdlm.config import InputError
from rdlm.model import context, forward, init_params, vectors
from rdlm.tasks import IGNORED, Scratchpad, WordProblem
from rdlm.tasks.words import elements

WORDS = script("studies/thinking_in_words")
MODEL = small_run(
    "test", [Scratchpad(6)], embed_dim=16, num_heads=2, mlp_dim=16, mean_recurrence=1, backprop_depth=1
).model  # fmt: skip
T = 6


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 2 * x, init_params(MODEL, jax.random.key(3)))  # so that answers differ


@pytest.fixture(scope="module")
def batch():
    return training_batch([Scratchpad(T)], 0, 0, 5)


def test_a_scratchpad_holds_the_products_of_its_word():
    known = elements("S3")
    swapped = 0
    for index in range(20):
        tokens, labels, number = Scratchpad(T).instance(7, index)
        assert len(tokens) == 2 * T + 1
        assert tokens[0] == tokens[T + 1] == len(known)
        np.testing.assert_array_equal(tokens[: T + 1], WordProblem("S3", T).instance(7, index).tokens)
        moved = back = [0, 1, 2]  # where "first g1, then g2, ..." takes each point, and what the other order would do
        for t in range(1, T + 1):
            letter = known[tokens[t]]
            moved, back = [letter[x] for x in moved], [back[x] for x in letter]
            assert known[labels[T + t]] == tuple(moved)
            assert number[T + t] == t
            assert t == T or tokens[T + 1 + t] == labels[T + t]
            swapped += moved != back
        assert (labels[: T + 1] == IGNORED).all()
        last = Scratchpad(T, first=T).instance(7, index)
        assert (last.labels[:-1] == IGNORED).all()
        assert last.labels[-1] == labels[-1]
        assert not last.difficulty[:-1].any()
    assert swapped > 20


def slot_loss(logits, labels):
    return losses.cross_entropy(logits, labels).sum() / (labels != IGNORED).sum()


def test_without_thoughts_the_chain_has_the_loss_of_words(params, batch):
    expected = fixed_depth(MODEL).loss(params, batch, None, None)
    found = jax.jit(lambda thoughts: chain_loss(params, MODEL, batch, thoughts, 1))
    np.testing.assert_allclose(found(0), expected, rtol=1e-5)
    assert abs(found(1) - expected) > 1e-3


def test_a_thought_is_the_hidden_state_fed_back(params, batch):
    """Value and gradient of two thoughts for two steps each, against whole passes over ever longer input vectors."""
    thoughts, per = 2, 2
    tokens, labels = jnp.asarray(batch["tokens"]), jnp.asarray(batch["labels"])

    def grown(params, delay=0, cut=False):
        x = vectors(params, MODEL, tokens)
        seen = x[:, : T + 2]
        for _ in range(thoughts):
            _, y, _ = once(params, MODEL, seen, context(MODEL, jnp.arange(seen.shape[1]), None))
            thought = y[:, -1 - delay][:, None]
            seen = jnp.concatenate([seen, jax.lax.stop_gradient(thought) if cut else thought], 1)
        rest = x[:, T + 2 + per * thoughts :]  # the steps that are still written
        seen = jnp.concatenate([seen, rest], 1)
        logits, _, _ = once(params, MODEL, seen, context(MODEL, jnp.arange(seen.shape[1]), None))
        wanted = labels[:, T + 1 + per * thoughts :]
        return slot_loss(logits[:, -wanted.shape[1] :], wanted)

    found, slopes = jax.jit(
        jax.value_and_grad(lambda p, c: chain_loss(p, MODEL, batch, c, per))
    )(params, thoughts)  # fmt: skip
    expected, wanted = jax.jit(jax.value_and_grad(grown))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    cut = jax.jit(jax.grad(lambda params: grown(params, cut=True)))(params)
    for name in ("wte", "adapter"):
        size = jnp.linalg.norm(wanted[name])
        assert jnp.linalg.norm(slopes[name] - wanted[name]) < 1e-4 * size
        assert jnp.linalg.norm(cut[name] - wanted[name]) > 0.05 * size
    assert abs(grown(params, delay=1) - expected) > 1e-3  # the state of the token before


def test_thoughts_come_one_after_the_other():
    found = np.array([stage(step, 1000, 15, (0.4, 0.8)) for step in range(0, 1001, 5)])
    assert found[79] == 0  # step 395
    assert found[80] == 1
    assert found[-41:].tolist() == [15] * 41  # from step 800
    assert set(np.diff(found)) == {0, 1}


@pytest.mark.parametrize("coupled", [False, True])
def test_a_written_chain_is_what_one_pass_over_it_says(params, batch, coupled):
    method = WORDS.Method("", "words", coupled=coupled)
    run = small_run("test", [Scratchpad(T)])
    answers = jax.jit(WORDS.contestant(method, dataclasses.replace(run, model=MODEL)).answers)
    answers = np.asarray(answers(params, jnp.asarray(batch["tokens"])))[0]
    assert (answers[:, : T + 1] == -1).all()
    own = np.concatenate([batch["tokens"][:, : T + 2], answers[:, T + 1 : -1]], 1)
    assert (own != batch["tokens"]).any()  # it wrote something of its own

    def said(tokens, coupled):
        where = jnp.asarray([*range(T + 1), *range(T)] if coupled else range(2 * T + 1))
        state = jnp.zeros((*tokens.shape, 16))
        return np.asarray(forward(params, MODEL, tokens, 1, state=state, positions=where).logits.argmax(-1))

    np.testing.assert_array_equal(said(own, coupled)[:, T + 1 :], answers[:, T + 1 :])
    assert (said(batch["tokens"], coupled)[:, T + 1 :] != answers[:, T + 1 :]).any()
    assert (said(own, not coupled)[:, T + 1 :] != answers[:, T + 1 :]).any()


def test_walks_agree_with_the_library(params, batch):
    scratchpads, letters = jnp.asarray(batch["tokens"]), jnp.asarray(batch["tokens"][:, : T + 1])
    answers, steps = jax.jit(lambda: WORDS.walk(params, MODEL, letters, 5, write=False))()
    np.testing.assert_array_equal(answers[:, 1:], forward(params, MODEL, letters, 5).logits.argmax(-1)[:, 1:])
    assert (steps[:, 1:] == 5).all()
    rule = rdlm.exits.kl(1e-1)
    walk = jax.jit(lambda start: WORDS.walk(params, MODEL, scratchpads, 9, True, rule, start))
    answers, steps = (np.asarray(x)[:, T + 1 :] for x in walk(WORDS.WALKS["normalized"]))
    out = rdlm.generate(
        params, MODEL, list(batch["tokens"][:, : T + 2]), max_new_tokens=T, num_steps=9, exit_rule=rule,
        prefill_exit="never", warm_start="normalized",
    )  # fmt: skip
    np.testing.assert_array_equal(answers, out.tokens)
    np.testing.assert_array_equal(steps, out.steps)
    # From noise it is something else. (Before ln_f it is the same here: fresh norms change nothing.)
    assert (steps != np.asarray(walk(WORDS.WALKS["noise"])[1])[:, T + 1 :]).any()


def test_what_a_word_costs(params, batch):
    model = small_run("test", [WordProblem("S3", 16)]).model
    layer = 2 * (64 * 3 * 64 + 64 * 64 + 3 * 64 * 128)  # qkv, proj, the gated MLP: FLOPs of one token

    def by_hand(tokens, r):
        once = tokens * (layer * (2 + r) + r * 2 * (2 * 64) * 64 + 2 * 7 * 64)
        return once + sum(4 * keys * 64 * (2 + r) for keys in range(1, tokens + 1))

    expected = {  # tokens, written, thoughts, layers in series at r = 1
        "at_once": (17, 0, 0, 3), "latent": (17, 0, 0, 3), "verbal": (33, 16, 0, 48), "thoughts": (33, 1, 15, 48),
        "thoughts_3": (23, 1, 5, 18),
    }  # fmt: skip
    for name, counts in expected.items():
        found = WORDS.price(model, WORDS.METHODS[name], 16, 1)
        assert tuple(found[x] for x in ("tokens", "written", "thoughts", "layers")) == counts
        assert found["flops"] == by_hand(counts[0], 1)
    deep = WORDS.price(model, WORDS.METHODS["latent"], 16, 8)
    assert (deep["layers"], deep["flops"]) == (10, by_hand(17, 8))
    own = once(
        params, MODEL, vectors(params, MODEL, jnp.asarray(batch["tokens"])), context(MODEL, jnp.arange(13), None)
    )[2]
    held = sum(x.nbytes for x in jax.tree.leaves(own)) // len(batch["tokens"])
    plain, deep = (WORDS.price(MODEL, WORDS.METHODS["verbal"], T, r) for r in (1, 4))
    assert plain["cache_bytes"] == plain["cache_bytes_shared"] == deep["cache_bytes_shared"] == held
    assert deep["cache_bytes"] == held // 3 * (2 + 4)
    longer = WORDS.price(model, WORDS.METHODS["thoughts_3"], 32, 1)
    assert (longer["thoughts"], longer["written"], longer["tokens"]) == (10, 2, 45)


def test_training_flops_are_those_of_the_depths_drawn():
    run = small_run("test", [WordProblem("S3", 16)], steps=40)
    tokens = 40 * 64 * 17
    once, drawn = training_flops(run, once=True) / tokens, training_flops(run) / tokens
    assert once == rdlm.perf.flops.training_flops(run.model, 0, 1, 17)
    assert (
        rdlm.perf.flops.training_flops(run.model, 3, 3, 17)
        < drawn
        < rdlm.perf.flops.training_flops(run.model, 8, 4, 17)
    )


@pytest.mark.slow
def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["thinking_in_words.py", "--quick", "--seeds", "0", "--methods", "verbal", "thoughts_3"]
    monkeypatch.setattr(sys, "argv", words)
    assert WORDS.main() == 0
    table = tmp_path / "runs" / "thinking_in_words" / "quick" / "thinking_in_words.json"
    found = json.loads(table.read_text())["methods"]
    assert list(found) == ["verbal", "thoughts_3"]
    for method in found.values():
        assert method["parameters"] == 132_736
        assert method["failed"] == [0]  # four steps teach nothing, and that is said
        assert [point["test"] for point in method["points"]] == ["length 16"]
        assert method["rows"][0]["programs"] == 1  # all stages of a curriculum are one program
    assert table.with_suffix(".png").stat().st_size > 10_000
    before = table.read_text()
    assert WORDS.main() == 0  # everything is remembered
    assert table.read_text() == before


def test_refusals(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["thinking_in_words.py", "--methods", "latent", "latent"])
    with pytest.raises(InputError, match=r"--methods = \('latent', 'latent'\): must be different methods"):
        WORDS.main()
