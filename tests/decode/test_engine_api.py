"""The engine's manners: streams, listeners, cancellation, refusals, one program for all requests, and counters."""

import asyncio
import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from engine_cases import (
    KINDS,
    MANY,
    NEW,
    TINY,
    Ask,
    R,
    crowd,
    engine,
    generated,
    new_engine,
    outcome,
    params,
    submit,
)

import rdlm.decode.running
from rdlm import exits
from rdlm.config import CachePolicy, InputError, Sampling
from rdlm.decode import Engine
from rdlm.decode.lanes import advance, insert
from rdlm.decode.loop import begin

KIND = "latest, kl"
LANES = KINDS[KIND].lanes


def all_at_once(batch, e, **options):
    """Requests submitted together and served."""
    served = [submit(e, KIND, ask, **options) for ask in batch]
    e.run()
    return served


def test_one_program_for_requests_of_any_values():
    def sizes():
        return [f._cache_size() for f in (begin, insert, advance)]

    for program in (begin, insert, advance):  # other tests may have compiled the programs that this one counts
        program.clear_cache()
    rng, e = np.random.default_rng(0), engine(KIND)
    all_at_once(crowd(KIND), e)
    before = sizes()
    for i in range(50):
        ask = Ask(
            tuple(rng.integers(0, TINY.vocab_size, rng.integers(1, 17)).tolist()), new=int(rng.integers(1, NEW + 1)),
            threshold=float(rng.uniform(0, 1)), depth=int(rng.integers(1, R + 1)), least=int(rng.integers(3)), seed=i,
            sampling=Sampling(
                temperature=float(rng.uniform(0, 2)), top_k=i % 5, top_p=float(rng.uniform(0.5, 1)), min_p=0.01 * i,
                repetition_penalty=1 + 0.1 * i, stop_tokens=tuple(range(i % 5)),
            ),
        )  # fmt: skip
        submit(e, KIND, ask)
        if i % 7 == 0:
            e.step()
    e.run()
    new_engine(KIND, max_queue=3, ticks_per_step=1)  # nor do these matter
    assert sizes() == before
    # Another bucket of prompt lengths is another program, but not for the ticks; short prompts may share it.
    batch = [Ask(ask.prompt * 2) if i % 3 == 0 else ask for i, ask in enumerate(crowd(KIND))]
    batch = [Ask(ask.prompt[: TINY.max_length - NEW]) for ask in batch]
    assert max(len(ask.prompt) for ask in batch) > 16
    served = all_at_once(batch, e)
    assert sizes() == [before[0] + 1, before[1] + 1, before[2]]
    assert [outcome(s) for s in served] == generated(KIND, batch)


def test_usage_adds_up():
    e = new_engine(KIND)
    assert (e.usage.ticks, e.usage.utilisation, e.usage.flushes) == (0, 0, 0)
    served = all_at_once(crowd(KIND), e)
    spent = sum(sum(s.steps[1:]) for s in served)  # prefill gives each its first token
    made = sum(len(s.tokens) - 1 for s in served)
    assert e.usage.utilisation * e.usage.ticks * LANES == pytest.approx(spent)
    assert 0 < e.usage.utilisation <= 1
    assert made / (LANES // 4) <= e.usage.flushes <= made


def test_no_lane_waits_where_every_token_takes_one_recurrence():
    e = Engine(params(), TINY, lanes=8, max_new_tokens=NEW, capacity=16, num_steps=1)
    for i in range(8):
        e.submit([1 + i])
    e.run()
    assert e.usage.utilisation == 1.0


def test_no_lane_waits_for_ever():
    # All tokens take one recurrence, so that all lanes wait at every tick, for a flush that takes two of eight.
    e = new_engine(KIND, ticks_per_step=1)
    served = [submit(e, KIND, Ask((i,), depth=1)) for i in range(LANES)]
    while any(len(s.tokens) < NEW for s in served):
        assert e.step()
        made = [len(s.tokens) for s in served]
        assert max(made) - min(made) <= 3
    assert e.step() is False
    assert {s.done for s in served} == {True}


# Streams and listeners


async def collect(served):
    return [pair async for pair in served]


def test_every_consumer_gets_its_own_stream():
    expected = [outcome(s)[:2] for s in all_at_once(crowd(KIND), engine(KIND))]
    e = new_engine(KIND, ticks_per_step=3)

    async def consume():
        return await asyncio.gather(*(collect(submit(e, KIND, ask)) for ask in crowd(KIND)))

    for _ in range(2):  # an engine outlives an event loop
        streams = asyncio.run(consume())
        assert [tuple(list(x) for x in zip(*pairs, strict=True)) for pairs in streams] == expected


def test_tokens_are_streamed_as_they_are_made():
    e, seen = new_engine(KIND, ticks_per_step=1), []

    async def consume():
        async for token, steps in submit(e, KIND, Ask((1, 2, 3), depth=4, threshold=0.0)):
            seen.append((token, steps, e.usage.ticks))

    asyncio.run(consume())
    _, steps, ticks = zip(*seen, strict=True)
    assert set(steps) == {4}
    assert ticks == (1, 4, 8, 12, 16, 20)  # the first token comes with the prompt, in the first step


def test_a_consumer_that_goes_away_in_the_middle_of_a_step(monkeypatch):
    # Its step is still running in a thread: the others must wait for it, and then get what they get anyway.
    inside, most = 0, 0

    def slow(*args, **options):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        out = advance(*args, **options)
        inside -= 1
        return out

    monkeypatch.setattr(rdlm.decode.running, "advance", slow)
    batch = crowd(KIND)[:4]
    expected = [outcome(s)[0] for s in all_at_once(batch, engine(KIND))]
    e = new_engine(KIND, ticks_per_step=1)

    async def consume():
        tasks = [asyncio.create_task(collect(submit(e, KIND, ask))) for ask in batch]
        while inside == 0:
            await asyncio.sleep(0.001)
        for task in tasks[:3]:
            task.cancel()
            await asyncio.sleep(0.005)
        return await asyncio.gather(*tasks, return_exceptions=True)

    *gone, (last) = asyncio.run(consume())
    assert all(isinstance(x, asyncio.CancelledError) for x in gone)
    assert [token for token, _ in last] == expected[3]
    assert most == 1


def test_requests_may_come_while_another_thread_runs_the_engine():
    e, stop, served = new_engine(KIND, ticks_per_step=2), threading.Event(), []

    def work():
        while not stop.is_set():
            e.step()

    thread = threading.Thread(target=work)
    thread.start()
    batch = crowd(KIND) * 3
    try:
        for ask in batch:
            served.append(submit(e, KIND, ask))
        end = time.monotonic() + 60
        while not all(s.done for s in served) and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    expected = [outcome(s) for s in all_at_once(crowd(KIND), engine(KIND))]
    assert [outcome(s) for s in served] == expected * 3


def test_listeners_hear_every_token_and_a_broken_one_ends_only_its_own_request():
    batch, e = crowd(KIND), engine(KIND)
    expected, heard = [outcome(s) for s in all_at_once(batch, e)], [[] for _ in batch]

    def listener(i):
        def on_token(token, steps):
            heard[i].append((token, steps))
            if i in (2, 9) and len(heard[i]) == i // 2:
                raise RuntimeError(f"listener {i}")

        return on_token

    served = [submit(e, KIND, ask, on_token=listener(i)) for i, ask in enumerate(batch)]
    e.run()
    for i, s in enumerate(served):
        assert list(zip(s.tokens, s.steps, strict=True)) == heard[i]
        if i in (2, 9):
            assert s.done
            assert not s.cancelled
            assert str(s.error) == f"listener {i}"
            assert s.tokens == expected[i][0][: i // 2]
            with pytest.raises(RuntimeError, match=f"listener {i}"):
                asyncio.run(collect(s))
        else:
            assert (outcome(s), s.error) == (expected[i], None)


def test_a_listener_may_not_run_the_engine():
    e = engine(KIND)
    expected = [outcome(s) for s in all_at_once(crowd(KIND), e)]
    served = [submit(e, KIND, ask) for ask in crowd(KIND)]
    bad = submit(e, KIND, Ask((5,)), on_token=lambda *_: e.run())
    e.run()
    assert [outcome(s) for s in served] == expected
    assert isinstance(bad.error, InputError)


# Cancellation


def test_a_cancelled_request_frees_its_lane_and_changes_nobody():
    batch = crowd(KIND)
    e = engine(KIND)
    expected = [outcome(s) for s in all_at_once(batch, e)]
    served = []

    def cancel_many(token, steps):
        if len(served[0].tokens) == 3:
            for i in (0, 1, 11):  # itself, one in flight, one that still waits
                served[i].cancel()

    e = new_engine(KIND, ticks_per_step=1)
    served += [submit(e, KIND, ask, on_token=cancel_many if i == 0 else None) for i, ask in enumerate(batch)]
    e.run()
    for i, s in enumerate(served):
        assert s.done
        assert s.cancelled == (i in (0, 1, 11))
        n = len(s.tokens)
        assert s.tokens == expected[i][0][:n]
        assert s.steps == expected[i][1][:n]
        assert s.cancelled or n == len(expected[i][0])
    assert len(served[0].tokens) == 3  # nothing is heard after it
    assert served[11].tokens == []
    assert asyncio.run(collect(served[11])) == []
    served[5].cancel()  # too late, and harmless
    assert not served[5].cancelled


def test_cancelling_everything_leaves_an_engine_that_serves():
    e, ask = new_engine(KIND, ticks_per_step=2), crowd(KIND)[0]
    (expected,) = (outcome(s) for s in all_at_once([ask], engine(KIND)))
    served = [submit(e, KIND, ask) for _ in range(MANY)]
    e.step()
    for s in served:
        s.cancel()
    assert e.step() is False
    for lane in range(LANES):  # every lane is as good as new
        (s,) = all_at_once([ask], e)
        assert outcome(s) == expected, lane


# Refusals


def test_the_queue_is_bounded():
    e = new_engine(KIND, max_queue=3)
    waiting = [e.submit([1], max_new_tokens=1) for _ in range(3)]
    with pytest.raises(InputError, match="max_queue = 3 requests are waiting"):
        e.submit([1])
    waiting[1].cancel()  # makes room
    waiting.append(e.submit([1], max_new_tokens=1))
    with pytest.raises(InputError, match="max_queue"):
        e.submit([1])
    e.run()
    assert [len(s.tokens) for s in waiting] == [1, 0, 1, 1]
    e.submit([1])


REFUSED = [
    ({"prompt": []}, "must be a non-empty 1-D sequence"),
    ({"prompt": [[1, 2], [3, 4]]}, r"non-empty 1-D sequence of token ids, got shape \(2, 2\)"),
    ({"prompt": [[1], [2, 3]]}, "not nested lists"),
    ({"prompt": [1.0]}, "token ids must be integers"),
    ({"prompt": [1, TINY.vocab_size]}, r"ids must be in \[0, 40\), found 1 .. 40"),
    ({"prompt": [-1]}, "found -1"),
    ({"prompt": [1] * 30}, "30 tokens .* exceed config.max_length = 32"),
    ({"prompt": [1] * 20}, "20 tokens .* exceed the engine's capacity = 24"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
    ({"max_new_tokens": NEW + 1}, "max_new_tokens = 7: the engine was made for at most 6"),
    ({"num_steps": 0}, "num_steps.*at least 1"),
    ({"num_steps": 9}, "num_steps = 9: the engine's cache keeps 8 recurrences"),
    ({"num_steps": [3, 4]}, "num_steps: expected one value or 1"),
    ({"min_steps": -1}, "min_steps = -1"),
    ({"exit_rule": "kl"}, "exit_rule = 'kl': must be a rule"),
    ({"exit_rule": exits.latent_diff()}, "this engine serves 'kl'; another kind"),
    ({"exit_rule": exits.twice(exits.kl())}, "this engine serves 'kl'; another kind"),
    ({"exit_rule": lambda: exits.kl(-1.0)}, "exits.kl: threshold = -1.0: must not be negative"),
    ({"exit_rule": exits.kl(np.array([0.1, 0.2]))}, "exit_rule: threshold"),
    ({"sampling": Sampling(temperature=1.0)}, r"needs key=jax.random.key\(seed\)"),
    ({"sampling": Sampling(temperature=[1.0, 2.0])}, "Sampling.temperature: expected one value or 1"),
    ({"sampling": Sampling(top_p=0.0)}, "Sampling.top_p = 0.0"),
    ({"sampling": Sampling(stop_tokens=(1, 2, 3, 4, 5))}, "at most 4 per request"),
    ({"sampling": Sampling(stop_tokens=3)}, r"must be a tuple of ids, such as \(2,\)"),
    ({"key": jax.random.split(jax.random.key(0), 2)}, r"key: expected one key or 1, got shape \(2,\)"),
    ({"key": 5}, "key = 5: expected a key such as"),
    ({"key": jax.random.key(0, impl="rbg")}, "key: .*rbg"),
]


def test_what_is_refused_is_one_line_and_nobody_else_notices():
    e, batch = new_engine(KIND, capacity=24), crowd(KIND)
    served = []
    for i, ask in enumerate(batch):
        served.append(submit(e, KIND, ask))
        for options, match in REFUSED[i::MANY]:
            with pytest.raises(InputError, match=match) as error:  # noqa: PT012
                options = {name: value() if callable(value) else value for name, value in options.items()}
                e.submit(**{"prompt": [1, 2], **options})
            assert "\n" not in str(error.value)
        e.step()
    e.run()
    assert [outcome(s) for s in served] == generated(KIND, batch)


def test_another_min_p_is_another_kind():
    e = Engine(params(), TINY, lanes=1, max_new_tokens=2, num_steps=2, exit_rule=exits.min_p_kl())
    with pytest.raises(InputError, match=r"serves 'min_p_kl'; another kind, 'min_p_kl\(min_p=0.2\)', needs"):
        e.submit([1], exit_rule=exits.min_p_kl(min_p=0.2))


def test_depths_that_the_kept_sets_cannot_tell_apart_are_refused():
    # 12 recurrences into 10 kept sets; an engine for at most 4 keeps 4.
    e = Engine(params(), TINY, lanes=2, max_new_tokens=2, num_steps=4, cache=CachePolicy(10))
    with pytest.raises(InputError, match="num_steps = 12: the engine's cache keeps 4"):
        e.submit([1], num_steps=12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lanes": 0}, "lanes = 0: must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"max_queue": -1}, "max_queue = -1"),
        ({"flush_every": 0}, "flush_every = 0"),
        ({"ticks_per_step": 0}, "ticks_per_step = 0"),
        ({"prefill_chunk": 0}, "prefill_chunk = 0: must be at least 1"),
        ({"capacity": 33}, r"capacity = 33: must be in \[2, config.max_length = 32\]"),
        ({"capacity": 1}, "capacity = 1"),
        ({"num_steps": 0}, "num_steps.*at least 1"),
        ({"num_steps": 2.5}, "num_steps.*integer"),
        ({"exit_rule": "kl"}, "exit_rule = 'kl': must be a rule"),
        ({"prefill_exit": "always"}, "prefill_exit = 'always'"),
        ({"check_every": 0}, "check_every = 0"),
        ({"warm_start": True}, "warm_start = True"),
    ],
)
def test_impossible_engines(options, match):
    with pytest.raises(InputError, match=match) as error:
        Engine(params(), TINY, **options)
    assert "\n" not in str(error.value)


def test_sizes_may_be_numpy_integers():
    Engine(params(), TINY, lanes=np.int64(2), max_new_tokens=np.int64(2), num_steps=np.int64(4))


def test_a_prompt_that_cannot_be_read_ends_only_its_own_group(monkeypatch):
    def fragile(params, config, tokens, *rest):
        if np.any(np.asarray(tokens) == 39):
            raise RuntimeError("out of memory")
        return begin(params, config, tokens, *rest)

    monkeypatch.setattr(rdlm.decode.running, "begin", fragile)
    batch = [dataclasses.replace(ask, prompt=tuple(t % 39 for t in ask.prompt)) for ask in crowd(KIND)]
    expected = generated(KIND, batch)
    e = new_engine(KIND)
    served = [submit(e, KIND, ask) for ask in batch[:8]]
    e.step()
    bad = submit(e, KIND, Ask((1, 39)))
    served += [submit(e, KIND, ask) for ask in batch[8:]]
    e.run()
    assert str(bad.error) == "out of memory"
    assert bad.done
    for s, whole in zip(served, expected, strict=True):
        assert outcome(s) == whole or (s.error is bad.error and s.tokens == [])
    assert sum(s.error is not None for s in served) <= LANES // 4 - 1
