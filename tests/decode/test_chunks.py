"""A long prompt is read chunk by chunk while others get their tokens, and nobody's result changes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import KINDS, NEW, TINY, Ask, R, crowd, generated, new_engine, outcome, params, submit
from oracle import random_params

import rdlm.decode.reading
import rdlm.decode.running
from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode import Engine
from rdlm.decode.loop import Sizes, begin, read_chunk
from rdlm.decode.requests import RequestOptions, as_requests
from rdlm.model.cache import allocate

# Reading alone: a chunk after the other leaves what one pass over the whole prompt leaves.

DEEP = dataclasses.replace(TINY, coda_layers=2)
CHUNK, LENGTH, ROWS = 5, 23, 6
PLAIN = RequestOptions()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a rule of one threshold per prompt, and options of its requests."""

    config: ModelConfig = DEEP
    rule: exits.ExitRule | None = None
    cache: CachePolicy = CachePolicy()
    options: RequestOptions = PLAIN


def spread(low, high):
    return np.geomspace(low, high, ROWS).astype(np.float32)


CASES = {
    "kl": Case(rule=exits.kl(spread(1e-3, 0.3))),
    "gated kl": Case(rule=exits.gated_kl(spread(0.01, 0.5), spread(0.2, 0.6)), options=RequestOptions(min_steps=1)),
    "latent_diff, skip, window": Case(
        config=dataclasses.replace(DEEP, attention_window=7),
        rule=exits.latent_diff(spread(0.1, 0.6)),
        cache=CachePolicy(lookup="skip"),
        options=RequestOptions(warm_start="normalized"),
    ),
    "no rule, noise, no coda": Case(config=dataclasses.replace(TINY, coda_layers=0, test_time_noise=0.05)),
}


@functools.cache
def requests(name):
    """(Parameters, request, prompts) of a case."""
    case, rng = CASES[name], np.random.default_rng(1)
    options = dataclasses.replace(case.options, num_steps=[8, 8, 8, 8, 8, 3], exit_rule=case.rule)
    prompts = rng.integers(0, TINY.vocab_size, (ROWS, LENGTH))
    request, _ = as_requests(case.config, prompts, 1, dataclasses.replace(options, key=jax.random.key(3)))
    return random_params(case.config, seed=2), request, jnp.asarray(prompts, jnp.int32)


def found(progress, steps):
    """What is compared: exactly, and up to roundings."""
    cache = progress.cache
    held = [x[..., :LENGTH, :] for x in jax.tree.leaves((cache.prelude, cache.core, cache.coda))]
    exact = progress.tokens, progress.steps, progress.present, steps, cache.depth[:, :LENGTH]
    return [np.asarray(x) for x in exact], [np.asarray(x) for x in (*held, progress.log_probs)]


@functools.cache
def whole(name):
    case, (params, request, prompts) = CASES[name], requests(name)
    sizes = Sizes(case.cache, 8, LENGTH, 1)
    lengths = jnp.full(ROWS, LENGTH)
    return found(*begin(params, case.config, prompts, lengths, request, sizes, "per_token", case.options.warm_start))


def in_chunks(name, final_coda=False, shift=0):
    """The same from chunks. final_coda: checks read it; shift: positions by which later chunks are displaced."""
    case, (params, request, prompts) = CASES[name], requests(name)
    coda_sets = case.rule is not None and case.rule.needs_logits and not final_coda
    present = np.zeros((ROWS, TINY.vocab_size), bool)
    present[np.arange(ROWS)[:, None], prompts] = True
    cache = allocate(case.config, case.cache, 8, ROWS, TINY.max_length, jnp.float32, coda_sets)
    steps = []
    for start in range(0, LENGTH, CHUNK):
        count = min(CHUNK, LENGTH - start)
        tokens = jnp.pad(prompts[:, start : start + count], ((0, 0), (0, CHUNK - count)))
        if start:
            cache = dataclasses.replace(cache, length=cache.length + shift)
        progress, ran = read_chunk(
            params, case.config, cache, tokens, jnp.full(ROWS, count), jnp.asarray(present), request,
            case.options.warm_start,
        )  # fmt: skip
        cache = progress.cache
        steps.append(ran[:, :count])
    return found(progress, jnp.concatenate(steps, 1))


def same(one, other):
    exact = all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    return exact and all(np.allclose(a, b, atol=1e-4) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_chunks_leave_what_one_pass_leaves(name):
    if CASES[name].rule is not None:
        assert len(np.unique(whole(name)[0][3])) > 3  # the depths of prompt tokens differ
    assert same(in_chunks(name), whole(name))


def test_control_a_wrong_position():
    name = "no rule, noise, no coda"
    assert not same(in_chunks(name, shift=1), whole(name))


def test_control_checks_that_read_the_final_coda_of_earlier_chunks():
    assert not same(in_chunks("kl", final_coda=True), whole("kl"))


# In the engine

KIND = "latest, kl"
LANES = KINDS[KIND].lanes
LONG = TINY.max_length - NEW


def mixed():
    """Short prompts, and every third one long."""
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(ask, prompt=tuple(rng.integers(0, TINY.vocab_size, LONG - i).tolist()))
        if i % 3 == 0
        else ask
        for i, ask in enumerate(crowd(KIND))
    ]


@functools.cache
def expected():
    return generated(KIND, mixed())


def chunked(**options):
    return new_engine(KIND, prefill_chunk=CHUNK, **options)


@pytest.fixture
def read(monkeypatch):
    """Lengths of what engines read, as they read it: chunks, and prompts at once (padded)."""
    sizes = []

    def chunk(*args):
        sizes.append(int(args[4][0]))
        return read_chunk(*args)

    def at_once(params, config, tokens, *rest):
        sizes.append(tokens.shape[1])
        return begin(params, config, tokens, *rest)

    monkeypatch.setattr(rdlm.decode.reading, "read_chunk", chunk)
    monkeypatch.setattr(rdlm.decode.running, "begin", at_once)
    return sizes


def test_a_request_gets_what_generate_gives_it(read):
    e = chunked()
    served = [submit(e, KIND, ask) for ask in mixed()]
    e.run()
    assert [outcome(s) for s in served] == expected()
    assert read.count(CHUNK) >= 4 * (LONG // CHUNK)  # four prompts of that length came in chunks
    assert max(read) <= 16


@pytest.mark.parametrize("chunk", [CHUNK, TINY.max_length])
def test_others_get_tokens_between_chunks(read, chunk):
    e, before, between = new_engine(KIND, prefill_chunk=chunk, ticks_per_step=8), {}, []

    def listener(i):
        def on_token(token, steps):
            if i in before:
                between.append(sum(read) - before[i])
            before[i] = sum(read)

        return on_token

    for i in range(LANES - 1):
        submit(e, KIND, Ask((i,), threshold=0.0), on_token=listener(i))
    e.step()
    between.clear()
    before |= dict.fromkeys(before, sum(read))
    late = submit(e, KIND, Ask((1,) * LONG, new=1))
    e.run()
    assert late.done
    assert len(between) >= (LANES - 1) * (NEW - 2)
    if chunk == CHUNK:
        assert 0 < max(between) <= 2 * CHUNK
    else:  # the control: the whole prompt comes between two tokens
        assert max(between) >= LONG


def test_others_wait_for_one_chunk_or_one_group_at_a_time(monkeypatch):
    engine, done = chunked(lanes=8), []
    first = engine.submit((1, 2, 3), max_new_tokens=NEW)
    engine.step()
    place, read = engine._running.place, engine._reader.read
    monkeypatch.setattr(engine._running, "place", lambda *a: (done.append("group"), place(*a))[1])
    monkeypatch.setattr(engine._reader, "read", lambda *a: (done.append("chunk"), read(*a))[1])
    long = engine.submit(np.arange(CHUNK * 4) % 7, max_new_tokens=2)
    short = [engine.submit((i, 2, 3), max_new_tokens=2) for i in range(6)]  # groups of two
    steps = []
    while not all(s.done for s in (first, long, *short)):
        before = len(done)
        waited = any(engine._schedule.serving)
        engine.step()
        steps.append((waited, done[before:]))
    assert all(len(taken) <= 1 for waited, taken in steps if waited)
    assert done.count("chunk") == 4
    assert done.index("group") < 4, "neither kind waits until the other has ended"
    assert done.index("chunk") < 4


def test_free_lanes_are_filled_a_token_of_the_others_apart(monkeypatch):
    e, before = Engine(params(), TINY, lanes=4, max_new_tokens=24, num_steps=R, ticks_per_step=10 * R), []
    first = e.submit((1, 2, 3))
    e.step()
    place = e._running.place
    monkeypatch.setattr(e._running, "place", lambda *a: (before.append(len(first.tokens)), place(*a)))
    for i in range(3):
        e.submit((i, 2))
    e.run()
    assert len(before) == 3
    assert all(0 < b - a <= 2 for a, b in itertools.pairwise(before))


def test_long_prompts_keep_their_turn():
    # While one is read short ones pass the next, but then it gets the next lane.
    e, order = chunked(), []
    batch = [Ask((1,) * LONG, new=1)] * 3 + [Ask((2,), threshold=0.0)] * 40
    for i, ask in enumerate(batch):
        submit(e, KIND, ask, on_token=lambda *_, i=i: order.append(i))
    e.run()
    first = [order.index(i) for i in range(len(batch))]
    assert first[3] < first[0] < first[1] < first[2] < first[-1]


@pytest.mark.parametrize("options", [{"cache": CachePolicy(6)}, {"prefill_exit": "together"}])
def test_a_prompt_that_chunks_would_change_is_read_at_once(options):
    for e, chunks in ((chunked(), True), (chunked(**options), False)):
        assert submit(e, KIND, Ask((1,) * LONG))._in_chunks is chunks


def test_a_prompt_that_is_cancelled_or_fails_leaves_its_lane(monkeypatch):
    e, batch = chunked(), mixed()[:2]
    gone = submit(e, KIND, batch[0])
    e.step()
    gone.cancel()
    broken = submit(e, KIND, batch[0])
    monkeypatch.setattr(rdlm.decode.reading, "read_chunk", lambda *_: 1 / 0)
    e.run()
    monkeypatch.undo()
    assert (gone.tokens, gone.error) == ([], None)
    assert isinstance(broken.error, ZeroDivisionError)
    assert len(e._schedule.free) == LANES
    served = [submit(e, KIND, ask) for ask in batch]
    e.run()
    assert [outcome(s) for s in served] == expected()[:2]
