"""The engine: a request gets what it gets alone, whoever comes and goes beside it.

Decisions within the margins of docs/semantics.md may differ between compiled shapes; the seeds here meet none.
"""

import contextlib
import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
    EXACT,
    KINDS,
    MANY,
    NEW,
    TINY,
    Ask,
    R,
    alone,
    crowd,
    engine,
    generated,
    held_by,
    new_engine,
    outcome,
    serve,
    submit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import rdlm.decode.running
from rdlm.config import CachePolicy, Sampling
from rdlm.decode import lanes
from rdlm.decode.lanes import advance, insert
from rdlm.decode.loop import begin, decode_tokens, read_chunk
from rdlm.model import kernels

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    stop_tokens=st.lists(st.integers(0, TINY.vocab_size - 1), max_size=4).map(tuple),
)


@st.composite
def asks(draw, kind):
    comes = draw(st.integers(0, 6))
    return Ask(
        prompt=tuple(draw(st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=16))),
        new=draw(st.integers(1, NEW)), threshold=draw(st.floats(*KINDS[kind].thresholds)),
        depth=draw(st.integers(1, R)), least=draw(st.integers(0, 2)), sampling=draw(samplings),
        seed=draw(st.integers(0, 9)), comes=comes,
        leaves=draw(st.none() | st.none() | st.integers(comes, comes + 6)),
    )  # fmt: skip


def agrees(served, whole):
    """Whether a request got `whole`, or the beginning of it if it was cancelled."""
    tokens, steps, prompt_steps = outcome(served)
    n = len(tokens) if served.cancelled else None
    return (tokens, steps) == (whole[0][:n], whole[1][:n]) and prompt_steps in (
        [whole[2], []] if n == 0 else [whole[2]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_a_request_gets_what_it_gets_alone(kind):
    depths, cancelled, close, calls = set(), 0, 0, 0

    @settings(max_examples=10)
    @given(st.lists(asks(kind), min_size=MANY, max_size=MANY))
    def check(batch):
        nonlocal cancelled, close, calls
        served, expected = serve(kind, batch, engine(kind)), generated(kind, batch)
        for i, (ask, s, whole) in enumerate(zip(batch, served, expected, strict=True)):
            assert i % 3 or agrees(s, alone(kind, ask, engine(kind)))
            if not agrees(s, whole):  # thresholds within 1e-3 of a value may decide otherwise in another program
                nudged = [[dataclasses.replace(a, threshold=a.threshold * f) for a in batch] for f in (0.999, 1.001)]
                assert any(agrees(s, generated(kind, other)[i]) for other in nudged)
                close += 1
            assert ask.leaves is not None or not s.cancelled
            depths.update(whole[1])
            cancelled, calls = cancelled + s.cancelled, calls + len(whole[1])

    check()
    assert close <= 0.01 * calls
    assert len(depths) > 4
    assert cancelled > 3


def test_what_a_lane_holds_is_bitwise_what_it_holds_alone():
    kind, served, held = "latest, kl", [], {}

    def keep(i):
        def on_token(token, steps):
            if len(served[i].tokens) == NEW:  # the last one: the lane is not yet anyone else's
                held[i] = held_by(e, e._schedule.serving.index(served[i]))

        return on_token

    batch, e = crowd(kind), engine(kind)
    served += [submit(e, kind, ask, on_token=keep(i)) for i, ask in enumerate(batch)]
    e.run()
    together = held.copy()
    served.clear()
    for i, ask in enumerate(batch):
        served.append(submit(e, kind, ask, on_token=keep(i)))
        e.run()
    assert len(together) == len(held) == MANY
    for i in range(MANY):
        assert held[i][0].shape[-2] == len(batch[i].prompt) + NEW - 1
        assert all(np.array_equal(a, b) for a, b in zip(together[i], held[i], strict=True))


# Controls: the property must notice.

CONTROL = "latest, twice, noisy"


@functools.cache
def sound():
    """What the control's requests get when nothing is broken."""
    got = [outcome(s) for s in serve(CONTROL, crowd(CONTROL), engine(CONTROL))]
    assert got == generated(CONTROL, crowd(CONTROL))
    return got


def broken(monkeypatch):
    """(outcomes in a crowd, outcomes alone) with what a test has patched."""
    fresh = jax.jit(lambda *args: advance.__wrapped__(*args), static_argnums=(1, 6, 7), donate_argnums=2)
    monkeypatch.setattr(rdlm.decode.running, "advance", fresh)
    e, batch = new_engine(CONTROL), crowd(CONTROL)
    return [outcome(s) for s in serve(CONTROL, batch, e)], [alone(CONTROL, ask, e) for ask in batch]


def test_control_state_keyed_by_lane(monkeypatch):
    enter, expected, keys = lanes._enter, sound(), jax.random.split(jax.random.key(0), KINDS[CONTROL].lanes)

    def by_lane(params, config, cache, row, request, *rest):
        return enter(params, config, cache, row, request._replace(keys=keys[row]), *rest)

    monkeypatch.setattr(lanes, "_enter", by_lane)
    together, one = broken(monkeypatch)
    assert together != expected
    assert together != one


def test_control_without_freezing(monkeypatch):
    tick, expected = lanes._tick, sound()

    def iterate_all(params, config, p):
        q = tick(params, config, p._replace(iterating=p.busy))
        return q._replace(iterating=q.iterating & p.iterating)

    monkeypatch.setattr(lanes, "_tick", iterate_all)
    together, one = broken(monkeypatch)
    assert together != expected
    assert together != one


def test_control_sets_read_off_by_one(monkeypatch):
    tick, expected = lanes._tick, sound()

    def read_next(params, config, p):
        cache, m = p.cache, p.ran % p.cache.sets
        page, at = p.place(jnp.arange(p.busy.size), jnp.where(p.iterating, cache.length, cache.capacity))
        turned = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), cache.core)
        q = tick(params, config, p._replace(cache=dataclasses.replace(cache, core=turned)))
        own = jax.tree.map(lambda x, y: x.at[m, page, at].set(y[m, page, at]), cache.core, q.cache.core)
        return q._replace(cache=dataclasses.replace(q.cache, core=own))

    monkeypatch.setattr(lanes, "_tick", read_next)
    together, _ = broken(monkeypatch)
    assert together != expected


def test_control_a_neighbour_is_read(monkeypatch):
    step, expected = lanes.core_step, sound()

    def next_door(params, config, s, injected, ctx, past):
        return step(params, config, s, injected, ctx, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), past))

    monkeypatch.setattr(lanes, "core_step", next_door)
    together, one = broken(monkeypatch)
    assert together != expected
    assert together != one


def test_control_nothing_broken(monkeypatch):
    together, one = broken(monkeypatch)
    assert together == one == sound()


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")  # as in production: roundings depend on what is fused
def test_agreement_in_bf16(capsys):
    def agreement(ours, theirs):
        """Shares of tokens equal up to a request's first difference, of their steps, and of whole requests."""
        tokens = [np.cumprod(np.equal(a[0], b[0])).sum() for a, b in zip(ours, theirs, strict=True)]
        steps = [np.equal(a[1], b[1])[:n].sum() for a, b, n in zip(ours, theirs, tokens, strict=True)]
        whole = [a == b for a, b in zip(ours, theirs, strict=True)]
        return sum(tokens) / sum(len(b[0]) for b in theirs), sum(steps) / sum(tokens), np.mean(whole)

    batches = [crowd("bf16", seed) for seed in range(20)]

    def by_engine(kind):
        return [outcome(s) for batch in batches for s in serve(kind, batch, engine(kind))]

    ours = by_engine("bf16")
    assert ours[:MANY] == [alone("bf16", ask, engine("bf16")) for ask in batches[0]]  # in one shape exact as ever
    found = agreement(ours, [whole for batch in batches for whole in generated("bf16", batch)])
    control = agreement(ours, by_engine("latest, kl"))
    with capsys.disabled():
        for name, shares in (("engine and generate, both bf16", found), ("engine, bf16 and f32", control)):
            print("\n{}: tokens {:.4f}, their steps {:.4f}, whole requests {:.4f}".format(name, *shares))
    # Where two programs round differently, they do by one bit in 256, so a value must lie that close to its threshold
    # for another decision. Measured: all tokens, 0.9993 of their steps, 0.9958 of requests; three times as many
    # differences are granted.
    assert found[0] >= 0.995
    assert found[1] >= 0.998
    assert found[2] >= 0.99
    assert control[2] < 0.9  # 0.7333: the precision itself matters far more


# Long caches, which CPUs read in blocks. (All others here have at most 128 positions.)


@contextlib.contextmanager
def in_blocks(monkeypatch, read=kernels._in_blocks):
    """Read caches in blocks of 4 positions; gives the longest cache of everything that is compiled for it."""
    programs, longest = (begin, decode_tokens, insert, advance, read_chunk), []
    read_filled = kernels.attend_filled

    def noted(q, new, cached, bias, filled):
        longest.append(bias.shape[-1])
        return read(q, new, cached, bias, filled)

    with monkeypatch.context() as patch, contextlib.ExitStack() as forget:
        patch.setattr(kernels, "FILLED", 4)
        patch.setattr(kernels, "_in_blocks", noted)
        patch.setattr(kernels, "attend_filled", lambda *given: read_filled(*given))  # JAX keeps traces of a function
        for program in programs:
            program.clear_cache()
            forget.callback(program.clear_cache)
        yield longest


def of_all_lengths(kind):
    """Few requests whose prompts fill 1, 3 and 5 blocks."""
    rng = np.random.default_rng(5)
    return [
        Ask(
            tuple(rng.integers(0, TINY.vocab_size, length).tolist()), seed=length, depth=depth, comes=comes,
            threshold=float(rng.uniform(*KINDS[kind].thresholds)),
        )
        for length, depth, comes in ((17, R, 0), (2, R - 1, 2), (9, 3, 1))
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in EXACT if KINDS[kind].shared["cache"] != CachePolicy()])
def test_what_is_read_in_blocks_is_what_is_read_at_once(kind, monkeypatch):
    batch = of_all_lengths(kind)
    whole = generated(kind, batch)
    with in_blocks(monkeypatch) as longest:
        assert generated(kind, batch) == whole
        assert set(longest) == {64}
        assert [outcome(s) for s in serve(kind, batch, new_engine(kind, lanes=3, page_size=2))] == whole
        assert set(longest) == {64, TINY.max_length}


def test_control_the_last_block_is_not_read(monkeypatch):
    def one_less(q, new, cached, bias, filled, read=kernels._in_blocks):
        return read(q, new, cached, bias, filled - 4)

    kind = "latest, kl"
    batch = of_all_lengths(kind)
    whole = generated(kind, batch)
    with in_blocks(monkeypatch, one_less):
        assert generated(kind, batch) != whole


def test_what_lanes_read_follows_the_longest_request_in_flight(monkeypatch):
    with in_blocks(monkeypatch) as longest:
        e = new_engine("latest, kl", prefill_chunk=5, page_size=2)
        rng = np.random.default_rng(0)
        long, *short = [tuple(rng.integers(0, TINY.vocab_size, n).tolist()) for n in (TINY.max_length - NEW, 3, 1, 9)]
        first = Ask(long, new=2)
        later = [Ask(prompt, comes=4) for prompt in short]
        served = serve("latest, kl", [first, *later], e)
        assert [outcome(s) for s in served] == generated("latest, kl", [first, *later])
        assert set(longest) == {64, TINY.max_length}
        submit(e, "latest, kl", later[0])
        e.step()
        assert sorted(np.asarray(e._running.lanes.cache.length) > 0) == [False] * 7 + [True]  # none of those that left
        e.run()


def test_an_engine_that_is_dropped_frees_its_lanes_at_once():
    e = new_engine("latest, kl")
    lanes = weakref.ref(e._running.lanes.tokens)
    gc.disable()
    try:
        del e
        assert lanes() is None
    finally:
        gc.enable()
