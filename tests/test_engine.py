"""The engine: a request gets what it gets alone, whoever comes and goes beside it.

Decisions that lie within the contract's margins may differ between compiled shapes; the seeds here meet none.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
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
    new_engine,
    outcome,
    serve,
    submit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import rdlm.decode.engine
from rdlm.config import Sampling
from rdlm.decode import lanes
from rdlm.decode.lanes import advance

pytestmark = pytest.mark.usefixtures("quick_compile")

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


def is_start_of(got, whole):
    """Whether a request that was cancelled got the beginning of what it would have got."""
    n = len(got[0])
    return (got[0], got[1]) == (whole[0][:n], whole[1][:n]) and got[2] in ([], whole[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_what_it_gets_alone(kind):
    depths, cancelled = set(), 0

    @settings(max_examples=10)
    @given(st.lists(asks(kind), min_size=MANY, max_size=MANY))
    def check(batch):
        nonlocal cancelled
        served, expected = serve(kind, batch, engine(kind)), generated(kind, batch)
        for i, (ask, s, whole) in enumerate(zip(batch, served, expected, strict=True)):
            assert i % 3 or alone(kind, ask, engine(kind)) == whole
            assert is_start_of(outcome(s), whole) if s.cancelled else outcome(s) == whole
            assert ask.leaves is not None or not s.cancelled
            depths.update(whole[1])
            cancelled += s.cancelled

    check()
    assert len(depths) > 4
    assert cancelled > 3


def test_what_a_lane_holds_is_bitwise_what_it_holds_alone():
    kind, served, held = "latest, kl", [], {}

    def keep(i):
        def on_token(token, steps):
            if len(served[i].tokens) == NEW:  # the last one: the lane is not yet anyone else's
                lane, cache = e._serving.index(served[i]), e._lanes.cache
                n = int(cache.length[lane])
                rows = jax.tree.leaves((cache.prelude, cache.core, cache.coda))
                held[i] = [np.asarray(x[..., lane, :n, :]) for x in (*rows, cache.depth[..., None])]

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
    fresh = jax.jit(
        lambda *args, **options: advance.__wrapped__(*args, **options), static_argnums=1,
        static_argnames=("width", "every", "warm_start"), donate_argnums=2,
    )  # fmt: skip
    monkeypatch.setattr(rdlm.decode.engine, "advance", fresh)
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
        cache, lane = p.cache, jnp.arange(p.busy.size)
        m, at = p.ran % cache.sets, jnp.where(p.iterating, cache.length, cache.capacity)
        turned = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), cache.core)
        q = tick(params, config, p._replace(cache=dataclasses.replace(cache, core=turned)))
        own = jax.tree.map(lambda x, y: x.at[m, lane, at].set(y[m, lane, at]), cache.core, q.cache.core)
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
