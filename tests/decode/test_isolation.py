"""One request's fault is its own: numbers that overflow, failures inside the engine, consumers that leave.

A token of the model here is poisoned: its embedding is not finite, or so large that sums overflow. Requests without it
must get, bit for bit, what a healthy model gives them.
"""

import asyncio
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import NEW, TINY, R, outcome
from oracle import random_params

import rdlm.decode.running
from rdlm import exits
from rdlm.config import CachePolicy, InputError, Sampling, Speculative
from rdlm.decode import Engine, generate
from rdlm.decode.lanes import advance, insert
from rdlm.decode.loop import begin
from rdlm.model import forward

UNTIED = dataclasses.replace(TINY, tie_embeddings=False)
BAD, LANES = 39, 8
POISONS = {"nan": np.nan, "infinite": np.inf, "overflows": 3e38}


@functools.cache
def model(poison="none", token=BAD):
    params = random_params(UNTIED, seed=2)
    if poison != "none":
        params["wte"] = params["wte"].at[token].set(POISONS[poison])
    return params


def new_engine(poison="none", params=None, **options):
    options = {"lanes": LANES, "ticks_per_step": 5, "exit_rule": exits.kl(0.05)} | options
    return Engine(params or model(poison), UNTIED, max_new_tokens=NEW, num_steps=R, **options)


def prompts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, BAD, rng.integers(1, 17)).tolist() for _ in range(n)]


def all_served(e, asked, **options):
    served = [e.submit(prompt, **options) for prompt in asked]
    e.run()
    return served


@functools.cache
def healthy(n):
    return [outcome(s) for s in all_served(new_engine(), prompts(n))]


# Numbers that are not finite


@pytest.mark.parametrize("poison", POISONS)
def test_a_request_that_overflows_ends_alone(poison):
    e, asked = new_engine(poison), prompts(8)
    first = all_served(e, [[BAD] * 15 + [1]] * LANES)  # every position of every lane
    mixed = [e.submit(prompt) for pair in zip([[BAD, 2], [3, BAD, 4, 5]] * 4, asked, strict=True) for prompt in pair]
    e.run()
    for s in (*first, *mixed[::2]):
        assert s.done
        assert isinstance(s.error, InputError)
        assert "new token 1 are not finite" in str(s.error)
        assert "\n" not in str(s.error)
        assert s.tokens == []
    assert [(outcome(s), s.error) for s in mixed[1::2]] == [(whole, None) for whole in healthy(8)]


def test_a_prompt_that_overflows_in_its_first_chunk_ends_alone():
    e, asked = new_engine("nan", prefill_chunk=16), prompts(8)
    bad, *others = all_served(e, [[1, BAD, *range(20)], *asked])  # the second chunk sees it in the cache alone
    assert "new token 1 are not finite" in str(bad.error)
    assert [(outcome(s), s.error) for s in others] == [(whole, None) for whole in healthy(8)]


def test_a_request_that_overflows_later_keeps_what_it_had():
    # The poison is a token that the model itself chooses.
    asked = prompts(8)
    whole = next(tokens for tokens, *_ in healthy(8) if len(set(tokens)) == NEW)
    i, at = [tokens for tokens, *_ in healthy(8)].index(whole), 3
    params = model()
    params = params | {"wte": params["wte"].at[whole[at]].set(np.nan)}
    (s,) = all_served(new_engine(params=params), [asked[i]])
    assert s.tokens == whole[: at + 1]
    assert "new token 5 are not finite" in str(s.error)
    with pytest.raises(InputError, match=r"^prompts\[0\]: the logits of new token 5"):
        generate(params, UNTIED, [asked[i]], max_new_tokens=NEW, num_steps=R, exit_rule=exits.kl(0.05))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("speculative", [None, Speculative(2, 3)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_names_the_prompt(poison, speculative, temperature):
    options = {"speculative": speculative, "sampling": Sampling(temperature=temperature), "key": jax.random.key(0)}
    with pytest.raises(InputError, match=r"^prompts\[1\]: the logits of new token 1 are not finite") as error:
        generate(model(poison), UNTIED, [[1, 2], [BAD]], max_new_tokens=3, num_steps=4, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("poison", POISONS)
def test_padding_is_the_poisoned_token_and_does_not_matter(poison):
    # Prompts are padded with token 0, and rows of unequal length with each other.
    asked = [[1, 2, 3], list(range(1, 16)), list(range(1, 17))]
    options = {"max_new_tokens": 4, "num_steps": 4, "exit_rule": exits.kl(0.05)}
    sound = generate(model(), UNTIED, asked, **options)
    for params in (model(poison, token=0), model()):
        out = generate(params, UNTIED, asked, **options)
        if all(0 not in tokens for tokens in sound.tokens):
            for name in ("tokens", "steps", "prompt_steps", "log_probs"):
                assert all(np.array_equal(a, b) for a, b in zip(getattr(out, name), getattr(sound, name), strict=True))


@pytest.mark.parametrize("rule", [None, exits.kl(0.05)])
@pytest.mark.parametrize("poison", POISONS)
def test_forward_keeps_documents_and_padding_apart(poison, rule):
    tokens = np.array([[1, 2, 3, BAD, 5, 6, 7, BAD], [4, 5, 6, 7, 8, 9, BAD, BAD]])
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 2, 2, 2, 0, 0]])
    run = jax.jit(forward, static_argnums=1)
    clean, other = (run(model(p), UNTIED, tokens, 4, segment_ids=segments, exit_rule=rule) for p in ("none", poison))
    good = (segments != 0) & ~((segments == 2) & (np.arange(2) == 0)[:, None])
    assert np.array_equal(np.asarray(clean.logits)[good], np.asarray(other.logits)[good])
    assert np.array_equal(np.asarray(clean.steps)[good], np.asarray(other.steps)[good])
    assert not np.isfinite(np.asarray(other.logits)[0, 3:5]).any()
    # Nor do earlier tokens see a later one.
    one = np.ones((2, 8), int)
    late = np.asarray(run(model(poison), UNTIED, tokens, 4, segment_ids=one, exit_rule=rule).logits)
    assert np.isfinite(late[0, :3]).all()
    assert not np.isfinite(late[0, 3:]).any()


@pytest.mark.parametrize("cache", [CachePolicy(), CachePolicy(lookup="skip")])
def test_a_cache_is_left_finite(cache):
    e = new_engine("nan", cache=cache)
    all_served(e, [[BAD] * 16, [1, BAD], [2, 3]])
    held = e._running.lanes.cache
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((held.prelude, held.core, held.coda)))


# Failures inside


@pytest.mark.parametrize("where", ["begin", "insert", "advance"])
def test_whatever_fails_ends_the_requests_concerned(monkeypatch, where):
    e, asked, failures = new_engine(), prompts(8), 1
    original = {"begin": begin, "insert": insert, "advance": advance}[where]

    def fails(*args, **options):
        nonlocal failures
        failures -= 1
        if failures == 0:
            raise RuntimeError(f"{where} failed")
        return original(*args, **options)

    monkeypatch.setattr(rdlm.decode.running, where, fails)
    served = all_served(e, asked)
    assert all(s.done for s in served)
    errors = [s for s in served if s.error is not None]
    assert {str(s.error) for s in errors} <= {f"{where} failed"}
    assert len(errors) == (LANES if where == "advance" else 0)  # of a group, each is tried again alone
    for s, whole in zip(served, healthy(8), strict=True):
        assert s.error is not None or outcome(s) == whole
    assert [outcome(s) for s in all_served(e, asked)] == healthy(8)


def test_a_program_that_takes_the_lanes_with_it(monkeypatch):
    # Donated and then lost, as when memory runs out in the middle: those in flight end, the queue is served.
    e, asked, failed = new_engine(), prompts(8), []

    def loses(params, config, lanes, *rest):
        if not failed:
            failed.append(True)
            jax.tree.map(lambda x: x.delete(), lanes)
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return advance(params, config, lanes, *rest)

    monkeypatch.setattr(rdlm.decode.running, "advance", loses)
    served = all_served(e, asked)
    assert [str(s.error) for s in served[:LANES]] == ["RESOURCE_EXHAUSTED"] * LANES
    assert [(outcome(s), s.error) for s in served[LANES:]] == [(whole, None) for whole in healthy(8)[LANES:]]


def test_of_a_group_only_the_one_that_fails(monkeypatch):
    def fragile(params, config, tokens, *rest):
        if np.any(np.asarray(tokens) == BAD):
            raise RuntimeError("no")
        return begin(params, config, tokens, *rest)

    monkeypatch.setattr(rdlm.decode.running, "begin", fragile)
    e, asked = new_engine(), prompts(8)
    served = all_served(e, [*asked[:3], [BAD, 1], *asked[3:]])
    assert str(served.pop(3).error) == "no"
    assert [(s.tokens, s.error) for s in served] == [(tokens, None) for tokens, *_ in healthy(8)]


class Weighted(exits.ExitRule):
    """A learnt rule: weights, one set per row in an engine."""

    weights: jax.Array
    threshold: exits.Threshold = 0.5

    def init(self, s0, vocab):
        return ()

    def update(self, previous, seen):
        w = self.weights[:, None] if self.weights.ndim == 2 else self.weights[None, None]
        return (), jnp.sum(seen.state * w, -1)

    def thresholds(self):
        return [self.threshold]

    def by_row(self, rows):
        w = self.weights
        return Weighted(jnp.broadcast_to(w, (rows, *w.shape)), exits.spread(self.threshold, rows))


class Shared(Weighted):
    """The same without weights of each row's own."""

    def by_row(self, rows):
        return Shared(self.weights, exits.spread(self.threshold, rows))


@pytest.mark.parametrize("weights", [np.zeros(TINY.embed_dim + 1, np.float32), np.zeros(TINY.embed_dim, np.float16)])
def test_weights_of_another_shape_are_refused_when_they_come(weights):
    e = new_engine(exit_rule=Weighted(jnp.zeros(TINY.embed_dim)))
    with pytest.raises(InputError, match=r"exit_rule: weights of float.* \[1[67]\], but this engine serves those of"):
        e.submit([1], exit_rule=Weighted(jnp.asarray(weights)))
    assert not e._schedule.queue


def test_an_engine_refuses_a_rule_that_has_no_weights_per_row():
    with pytest.raises(InputError, match=r"exit_rule: 'Shared' .* by_row"):
        new_engine(exit_rule=Shared(jnp.zeros(TINY.embed_dim)))


@pytest.mark.parametrize("error", [RuntimeError("no"), asyncio.CancelledError()])
def test_a_listener_that_raises_ends_its_own_request(error):
    def raises(*_):
        raise error

    e, asked = new_engine(), prompts(8)
    bad = e.submit([1, 2], on_token=raises)
    served = all_served(e, asked)
    assert bad.error is error
    assert [outcome(s) for s in served] == healthy(8)


# Consumers


def test_a_consumer_whose_request_is_lost_does_not_wait():
    e = new_engine()
    lost = e.submit([1, 2])
    e._schedule.queue.clear()

    async def consume():
        async with asyncio.timeout(20):
            return [token async for token, _ in lost]

    with pytest.raises(InputError, match="does not know this request"):
        asyncio.run(consume())


def test_a_request_ends_when_its_last_consumer_leaves():
    e, asked = new_engine(ticks_per_step=1), prompts(8)
    left, shared, kept = (e.submit(prompt) for prompt in asked[:3])

    async def first_of(served):
        async for token, _ in served:
            return token

    async def consume():
        await first_of(left)
        one = asyncio.create_task(first_of(shared))
        return await one, [token async for token, _ in shared], [token async for token, _ in kept]

    first, *whole = asyncio.run(consume())
    assert left.done
    assert left.cancelled
    assert len(left.tokens) < NEW
    assert whole == [tokens for tokens, *_ in healthy(8)[1:3]]
    assert first == whole[0][0]
    assert not kept.cancelled


# All at once


def test_chaos():
    count, rng, e = 500, np.random.default_rng(5), new_engine("nan")
    expected = [outcome(s) for s in all_served(new_engine(), prompts(count, seed=1))]
    kinds = ["nan", "weights", "listener", "cancel", "leave"]
    poisoned = dict(zip(rng.choice(count, count // 10, replace=False).tolist(), kinds * (count // 50), strict=True))
    asked, served = prompts(count, seed=1), {}

    def raises(*_):
        raise RuntimeError("listener")

    async def leave(s):
        async for _ in s:
            break

    for i, prompt in enumerate(asked):
        kind = poisoned.get(i)
        if kind == "weights":
            for wrong in (exits.latent_diff(), exits.kl(np.zeros(3, np.float32))):
                with pytest.raises(InputError):
                    e.submit(prompt, exit_rule=wrong)
            continue
        bad = [*prompt[:-1], BAD] if kind == "nan" else prompt
        served[i] = e.submit(bad, on_token=raises if kind == "listener" else None)
        if rng.random() < 0.5:
            e.step()
        if kind == "cancel":
            served[i].cancel()
        if kind == "leave":
            asyncio.run(leave(served[i]))
    e.run()
    assert all(s.done for s in served.values())
    for i, s in served.items():
        kind = poisoned.get(i)
        if kind is None:
            whole = expected[i][0]
            n = whole.index(BAD) + 1 if BAD in whole else NEW  # a healthy model may choose it
            assert (s.tokens, s.steps) == tuple(x[:n] for x in expected[i][:2])
            assert s.prompt_steps.tolist() == expected[i][2]
            assert (s.error is None) == (n == NEW)
        assert kind != "nan" or "not finite" in str(s.error)
        assert kind != "listener" or str(s.error) == "listener"
        assert kind not in ("cancel", "leave") or s.cancelled
