"""An engine whose lanes share pages, fewer than they may want: everybody gets what `generate` gives, and in order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import EXACT, KINDS, NEW, TINY, Ask, R, generated, new_engine, outcome, params, serve, submit

import rdlm.decode.running
from rdlm.config import InputError
from rdlm.decode import Engine, preempt
from rdlm.decode.lanes import PageSizes
from rdlm.decode.pages import Claim, Pages, page_sizes
from rdlm.decode.running import _Made

KIND, SIZE, TOKENS = "latest, kl", 2, 18
MOST = 10  # tokens of a prompt; with 6 new ones it needs 15 of the 18 positions


def short_of_pages(kind=KIND, tokens=TOKENS, **options):
    return new_engine(kind, page_size=SIZE, cache_tokens=tokens, capacity=MOST + NEW, **options)


@functools.cache
def load(seed, kind=KIND, count=12):
    """Requests of all depths, lengths and priorities that come and go."""
    rng = np.random.default_rng(seed)
    asks = []
    for i in range(count):
        comes = int(rng.integers(8))
        ask = Ask(
            tuple(rng.integers(0, TINY.vocab_size, rng.integers(1, MOST + 1)).tolist()),
            new=int(rng.integers(3, NEW + 1)), threshold=float(rng.uniform(*KINDS[kind].thresholds)),
            depth=int(rng.integers(1, R + 1)), seed=i, comes=comes, priority=int(rng.integers(3)),
            leaves=comes + int(rng.integers(1, 9)) if rng.random() < 0.15 else None,
        )  # fmt: skip
        asks.append(ask)
    return asks


LOADS = 6
PREEMPTION = preempt._row, preempt._page, preempt._with_row, preempt._with_page


@functools.cache
def expected(seed, kind=KIND):
    return generated(kind, load(seed, kind))


def wrong(engine, loads=LOADS, kind=KIND):
    """Requests that did not get what `generate` makes of them; those that left may have less of it."""
    found = 0
    for seed in range(loads):
        served = serve(kind, load(seed, kind), engine)
        for s, (tokens, steps, prompt_steps) in zip(served, expected(seed, kind), strict=True):
            ours, n = outcome(s), len(s.tokens) if s.cancelled else None
            found += (ours[0], ours[1]) != (tokens[:n], steps[:n])
            found += ours[2] != prompt_steps and (n != 0 or ours[2] != [])
    return found


def test_a_request_gets_what_generate_gives_however_few_the_pages():
    e = short_of_pages()
    e.compile_preemption()
    compiled = [program._cache_size() for program in PREEMPTION]
    assert wrong(e) == 0
    assert e.preempted > LOADS
    assert e.cache_usage == 0
    assert [program._cache_size() for program in PREEMPTION] == compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind != KIND])
def test_with_every_kind_of_cache(kind):
    e = short_of_pages(kind)
    assert wrong(e, 3, kind) == 0
    assert e.preempted > 3


def test_prompts_in_chunks_and_from_the_prompt_cache():
    for room in (0, 10**8):
        e = short_of_pages(prefill_chunk=3, prompt_cache=room)
        assert wrong(e, 2 * LOADS) == 0
        assert e.preempted > LOADS
        assert (e.prompt_cache_bytes > 0) == (room > 0)


@pytest.mark.slow
def test_on_two_copies_of_the_model_with_four_devices_each():
    e = short_of_pages(tensor=4, data=2, tokens=2 * (MOST + NEW), prefill_chunk=3, prompt_cache=10**8)
    assert wrong(e) == 0
    assert e.preempted > 3
    assert e.prompt_cache_bytes > 0
    assert e.cache_usage == 0


# Controls: the property must notice.


def broken(monkeypatch, where, name, change):
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: change(original(*args), *args))
    return wrong(short_of_pages())


def test_control_a_wrong_page(monkeypatch):
    def swapped(table, pages, claims):
        held = [lane for lane in range(len(table)) if table[lane, 0] < pages.sizes.number]
        if len(held) > 1:
            table[held[0], 0] = table[held[1], 0]
        return table

    assert broken(monkeypatch, Pages, "assign", swapped)


def test_control_a_page_freed_too_early(monkeypatch):
    def freed(table, pages, claims):
        held = [page for pages in pages._held.values() for page in pages]
        pages._free += [page for page in held[:1] if page not in pages._free]
        return table

    assert broken(monkeypatch, Pages, "assign", freed)


def test_control_without_the_state_of_the_rule(monkeypatch):
    def forgotten(suspended, *args):
        rule = jax.tree.map(jnp.zeros_like, suspended.row["rule"])
        return suspended._replace(row=suspended.row | {"rule": rule})

    assert broken(monkeypatch, rdlm.decode.running, "suspend", forgotten)


def test_control_a_page_is_not_kept(monkeypatch):
    def lost(suspended, *args):
        return suspended._replace(pages=suspended.pages[:-1])

    assert broken(monkeypatch, rdlm.decode.running, "suspend", lost)


def test_control_a_row_that_stays_on_its_copy_of_the_model(monkeypatch):
    monkeypatch.setattr(preempt, "_everywhere", lambda rows, copy: rows)
    assert wrong(short_of_pages(data=2, tokens=2 * TOKENS))


# Order


def firsts(e, asks):
    """Which request got its first token when, the engine running from the start."""
    order = []
    served = [submit(e, KIND, ask, on_token=lambda *_, i=i: order.append(i)) for i, ask in enumerate(asks)]
    e.run()
    assert all(s.error is None for s in served)
    return list(dict.fromkeys(order))


def test_requests_come_in_the_order_of_their_submission_and_higher_priorities_first():
    rng = np.random.default_rng(0)
    asks = [Ask(tuple(rng.integers(0, 40, MOST - 4).tolist())) for _ in range(12)]
    assert firsts(short_of_pages(), asks) == list(range(12))
    asks = [dataclasses.replace(ask, priority=i % 2) for i, ask in enumerate(asks)]
    assert firsts(short_of_pages(), asks) == [1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10]


def test_a_higher_priority_takes_the_lane_of_a_lower_one():
    e = short_of_pages(ticks_per_step=1)
    low = [submit(e, KIND, Ask((i,) * 6)) for i in range(2)]
    e.step()
    assert e.in_flight == low
    high = submit(e, KIND, Ask((9,) * 6, priority=1))
    e.step()
    assert set(map(id, e.in_flight)) == {id(low[0]), id(high)}  # the younger of the two waits
    e.run()
    asked = [Ask((0,) * 6), Ask((1,) * 6), Ask((9,) * 6)]
    assert [outcome(s) for s in (*low, high)] == generated(KIND, asked * 4)[:3]
    assert e.preempted >= 1


def test_of_the_copies_of_the_model_the_one_with_the_lowest_priority_makes_room():
    e = new_engine(KIND, data=2, lanes=2, ticks_per_step=1)
    middle, low = (submit(e, KIND, Ask((priority,) * 6, priority=priority)) for priority in (1, 0))
    e.step()
    assert set(map(id, e.in_flight)) == {id(middle), id(low)}
    high = submit(e, KIND, Ask((2,) * 6, priority=2))
    e.step()
    assert set(map(id, e.in_flight)) == {id(middle), id(high)}
    e.run()
    assert e.preempted == 1


def test_a_preempted_request_may_be_cancelled_and_its_pages_are_forgotten():
    e = short_of_pages(ticks_per_step=1)
    low = [submit(e, KIND, Ask((i,) * 6)) for i in range(2)]
    e.step()
    submit(e, KIND, Ask((9,) * 6, priority=1))
    e.step()
    assert low[1]._suspended is not None
    low[1].cancel()
    e.run()
    assert (low[1]._suspended, len(low[0].tokens)) == (None, NEW)


def test_one_that_cannot_be_kept_ends_alone(monkeypatch):
    def fails(*args):
        raise MemoryError("no room on the host")

    monkeypatch.setattr(rdlm.decode.running, "suspend", fails)
    e = short_of_pages()
    served = serve(KIND, [dataclasses.replace(ask, leaves=None) for ask in load(0)], e)
    lost = [s for s in served if s.error is not None]
    assert 0 < len(lost) < len(served)
    assert {str(s.error) for s in lost} == {"no room on the host"}
    for s, whole in zip(served, expected(0), strict=True):
        assert s.error is not None or outcome(s) == whole


def test_an_interrupted_step_is_made_up_for(monkeypatch):
    e = new_engine(KIND, page_size=1, lanes=4, capacity=16, ticks_per_step=12)
    asks = [Ask((3, 1), threshold=0.03), Ask((7,), threshold=0.03), Ask((5, 9, 2, 8))]
    served, read, reads = [submit(e, KIND, ask) for ask in asks[:2]], _Made.read, []

    def interrupted(lanes):
        reads.append(read(lanes))
        if reads[-1].count.max() > 1:  # not when prompts have just been read
            raise KeyboardInterrupt
        return reads[-1]

    monkeypatch.setattr(_Made, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.step()
    monkeypatch.setattr(_Made, "read", read)
    assert [len(s.tokens) for s in served] == [1, 1]
    assert reads[-1].busy.sum() == 2
    served.append(submit(e, KIND, asks[2]))  # its pages must not be those of tokens that nobody has heard of
    e.run()
    assert [outcome(s) for s in served] == generated(KIND, asks * 4)[:3]


def test_an_interrupted_return_ends_nobody(monkeypatch):
    e = short_of_pages(ticks_per_step=1)
    low = [submit(e, KIND, Ask((i,) * 6)) for i in range(2)]
    e.step()
    high = submit(e, KIND, Ask((9,) * 6, priority=1))
    e.step()
    put = preempt._with_page

    def interrupted(*args):
        put(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(preempt, "_with_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.run()
    assert not low[1].done
    monkeypatch.setattr(preempt, "_with_page", put)
    e.run()
    asked = [Ask((0,) * 6), Ask((1,) * 6), Ask((9,) * 6)]
    assert [outcome(s) for s in (*low, high)] == generated(KIND, asked * 4)[:3]


def test_nobody_gives_way_where_that_makes_no_room():
    e = short_of_pages(ticks_per_step=1)
    equal, low = submit(e, KIND, Ask((1,) * MOST, priority=1)), submit(e, KIND, Ask((2,)))
    e.step()
    assert e.in_flight == [equal, low]
    submit(e, KIND, Ask((3,) * MOST, priority=1))
    e.step()
    assert (e.preempted, e.in_flight) == (0, [equal, low])
    e.run()


def test_a_long_prompt_of_a_higher_priority_is_read_first():
    e = short_of_pages(ticks_per_step=1, prefill_chunk=3)
    asks = [Ask(tuple(range(k, k + 9)), priority=k) for k in range(2)]
    low = submit(e, KIND, asks[0])
    e.step()
    assert (e.in_flight, low.tokens) == ([low], [])
    high = submit(e, KIND, asks[1])
    while not high.tokens:
        e.step()
    assert (low.tokens, e.preempted) == ([], 1)
    e.run()
    assert [outcome(s) for s in (low, high)] == generated(KIND, asks * 6)[:2]


def test_those_that_gave_way_are_not_waiting_requests():
    e = short_of_pages(ticks_per_step=1, max_queue=2)
    low = [submit(e, KIND, Ask((i,) * 6)) for i in range(2)]
    e.step()
    submit(e, KIND, Ask((9,) * 6, priority=1))
    e.step()
    assert (e.preempted, low[1].done) == (1, False)
    for _ in range(2):
        submit(e, KIND, Ask((4,)))
    with pytest.raises(InputError, match="max_queue = 2"):
        submit(e, KIND, Ask((4,)))
    e.run()


# Room


def test_equal_bytes_serve_three_times_as_many():
    config = dataclasses.replace(TINY, max_length=128)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(32) - 0.32, 0.8, 150), 2, 128).astype(int)  # mean: a quarter of the maximum
    assert 30 < lengths.mean() < 34

    def engine(**options):
        return Engine(params(), config, max_new_tokens=127, num_steps=1, page_size=4, **options)

    def held(e):
        layers = e._running.lanes.cache.prelude, e._running.lanes.cache.core, e._running.lanes.cache.coda
        return sum(x.nbytes for x in jax.tree.leaves(layers))

    e, lanes = engine(lanes=20, cache_tokens=4 * 128), 4
    assert held(e) == held(engine(lanes=lanes))
    for n in lengths:
        e.submit([1] * max(n // 4, 1), max_new_tokens=int(n - max(n // 4, 1)))
    while e._schedule.queue:
        e.step()
    assert e.usage.utilisation * 20 > 3 * lanes  # requests at work at each tick, while others waited
    e.run()


def test_pages_are_shared_out_by_need_and_rank():
    rng = np.random.default_rng(0)
    for _ in range(200):
        pages, claims = Pages(6, 40, PageSizes(14, 4)), {}
        for _ in range(5):
            for lane in rng.integers(0, 6, 3):
                least = int(rng.integers(1, 40))
                most = min(least + int(rng.integers(12)), 40)
                claims[int(lane)] = Claim((int(rng.integers(2)), int(lane)), least, most)
            claims.pop(int(rng.integers(6)), None)
            gone = pages.lacking(claims)
            assert [claims[lane].rank for lane in gone] == sorted((c.rank for c in claims.values()), reverse=True)[
                : len(gone)
            ]
            assert not gone or pages.spare({lane: c for lane, c in claims.items() if lane not in gone[:-1]}) < 0
            for lane in gone:
                del claims[lane]
            before = {lane: pages.of(lane, 40) for lane in claims}
            table = pages.assign(claims)
            held = table[table < 14].tolist()
            assert len(set(held)) == len(held)
            for lane in range(6):
                mine = pages.of(lane, 40)
                assert table[lane].tolist() == mine + [14] * (10 - len(mine))
                if lane in claims:
                    assert pages.needed(claims[lane].least) <= len(mine) <= pages.needed(claims[lane].most)
                    kept = min(len(mine), len(before[lane]))
                    assert mine[:kept] == before[lane][:kept]
                else:
                    assert mine == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"page_size": 0}, "page_size = 0: must be at least 1"),
        ({"page_size": 2.5}, "page_size = 2.5"),
        ({"cache_tokens": 0}, "cache_tokens = 0: must be at least 1"),
        ({"cache_tokens": 31}, "cache_tokens = 31: must be at least the capacity of one lane, 32"),
        (
            {"cache_tokens": 2 * 10**9, "lanes": 10**8},
            "cache: 8 recurrences x 2000000000 positions: .* fewer cache_tokens",
        ),
    ],
)
def test_impossible_pages(options, match):
    with pytest.raises(InputError, match=match) as error:
        Engine(params(), TINY, **options)
    assert "\n" not in str(error.value)


def test_what_would_never_fit_is_refused():
    e = short_of_pages()
    with pytest.raises(InputError, match=r"11 tokens .* exceed the engine's capacity = 16"):
        e.submit([1] * 11)
    with pytest.raises(InputError, match=r"priority = 0\.5"):
        e.submit([1], priority=0.5)


def test_usual_pages():
    assert page_sizes(16, 1000) == (16 * 32, 32)
    assert page_sizes(16, 1000, platform="tpu") == (16 * 8, 128)
    assert page_sizes(16, 1000, tokens=4000, platform="tpu") == (32, 128)
    assert page_sizes(16, 1000, tokens=10**6) == page_sizes(16, 1000)
