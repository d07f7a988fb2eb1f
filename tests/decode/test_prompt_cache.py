"""An engine that keeps beginnings of prompts reads them once, and nobody's result changes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from engine_cases import KINDS, NEW, TINY, Ask, R, generated, new_engine, outcome, params, serve

from rdlm import exits
from rdlm.config import CachePolicy, InputError
from rdlm.decode import Engine, prompt_cache
from rdlm.decode.lanes import insert
from rdlm.decode.loop import begin, read_chunk
from rdlm.decode.prompt_cache import PromptCache
from rdlm.model.cache import cache_bytes

KIND, CHUNK = "latest, kl", 5
ROOM = 10**9


def caching(kind=KIND, room=ROOM, **options):
    return new_engine(kind, prefill_chunk=CHUNK, prompt_cache=room, **options)


@functools.cache
def beginnings():
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 19))


def alike(seed, count=24):
    """Requests that share beginnings of every length, and a few other values, and come and go."""
    rng = np.random.default_rng(seed)
    asks = []
    for _ in range(count):
        common = beginnings()[rng.integers(3), : rng.integers(4, 20)].tolist()
        own = rng.integers(0, TINY.vocab_size, rng.integers(0, 6)).tolist()
        comes = int(rng.integers(12))
        leaves = comes + int(rng.integers(8)) if rng.random() < 0.2 else None
        ask = Ask(
            tuple(common + own), new=int(rng.integers(1, NEW + 1)), threshold=[0.02, 0.1][rng.integers(2)],
            depth=[3, R][rng.integers(2)], seed=int(rng.integers(2)), comes=comes, leaves=leaves,
        )  # fmt: skip
        asks.append(ask)
    return asks


def differing(batch, engine):
    """Requests of which something is not as `generate` makes it; those that left may have less of it."""
    served, wrong = serve(KIND, batch, engine), 0
    for s, (tokens, steps, prompt_steps) in zip(served, generated(KIND, batch), strict=True):
        ours = outcome(s)
        whole = not s.cancelled
        wrong += ours[:2] != (tokens, steps) if whole else ours[0] != tokens[: len(ours[0])]
        wrong += whole and ours[2] != prompt_steps
    return wrong, sum(s.cached_tokens for s in served)


CHUNK_BYTES = cache_bytes(TINY, R, 1, CHUNK, "float32", coda_sets=True) - 4  # it has no length


@pytest.mark.parametrize("room", [ROOM, 16 * CHUNK_BYTES])
def test_requests_get_what_generate_gives_them(room):
    e = caching(room=room)
    for seed in range(3):
        wrong, cached = differing(alike(seed), e)
        assert wrong == 0
        assert cached >= CHUNK
        assert e.prompt_cache_bytes <= room
    assert e.prompt_cache_bytes % CHUNK_BYTES == 0
    assert (e.prompt_cache_bytes == room) == (room < ROOM)


@pytest.mark.parametrize("part", ["depth", "keys"])
def test_control_a_beginning_that_was_read_otherwise(part, monkeypatch):
    names = PromptCache.names

    def too_few(self, prompt, request):
        idle = e._idle
        row = request._replace(depth=idle.depth) if part == "depth" else request._replace(keys=idle.keys)
        return names(self, prompt, row)

    e = caching()
    monkeypatch.setattr(PromptCache, "names", too_few)
    assert differing(alike(0), e)[0] > 0


def test_a_common_beginning_is_read_once():
    rng, e = np.random.default_rng(1), caching()
    common = beginnings()[0, :15].tolist()
    asks = [Ask((*common, *rng.integers(0, TINY.vocab_size, 1 + i % 4).tolist()), new=2) for i in range(12)]
    served = serve(KIND, asks, e)
    assert [s.cached_tokens for s in served] == [0] + [15] * 11
    assert e.prompt_cache_bytes == 3 * CHUNK_BYTES
    # The last token is read again even if the whole prompt is known.
    again = serve(KIND, [Ask(tuple(common))], e)
    assert again[0].cached_tokens == 10
    caching(room=2**31)  # bytes are no int32
    without = new_engine(KIND, prefill_chunk=CHUNK)  # control
    assert [s.cached_tokens for s in serve(KIND, asks[:3], without)] == [0] * 3


def test_a_chunk_is_found_by_all_tokens_before_it():
    e, one = caching(), beginnings()[0, :12].tolist()
    serve(KIND, [Ask(tuple(one), new=1)], e)
    other = [(one[0] + 1) % TINY.vocab_size, *one[1:]]  # the same second chunk behind another first one
    assert serve(KIND, [Ask(tuple(other), new=1)], e)[0].cached_tokens == 0
    assert serve(KIND, [Ask((*one[:6], *other[:4]), new=1)], e)[0].cached_tokens == CHUNK


def test_what_was_not_used_for_longest_leaves_first():
    e = caching(room=4 * CHUNK_BYTES)
    first, second, third = (tuple(x[:11].tolist()) for x in beginnings())  # two chunks each

    def cached(prompt):
        return serve(KIND, [Ask(prompt, new=1)], e)[0].cached_tokens

    assert [cached(p) for p in (first, second, first)] == [0, 0, 10]
    assert cached(third) == 0  # takes the place of the second
    assert [cached(p) for p in (first, second)] == [10, 0]


def test_the_beginning_of_a_prompt_larger_than_the_room_is_kept():
    e, prompt = caching(room=2 * CHUNK_BYTES), Ask(tuple(beginnings()[0, :16].tolist()), new=1)
    assert [serve(KIND, [prompt], e)[0].cached_tokens for _ in range(3)] == [0, 10, 10]


def test_keys_matter_where_initial_states_are_random():
    embedding = dataclasses.replace(TINY, loop=dataclasses.replace(TINY.loop, start="embedding"))
    options = {"num_steps": 2, "prefill_chunk": CHUNK, "prompt_cache": ROOM, "max_new_tokens": NEW}
    for e, shared in ((caching(), 0), (Engine(params(), embedding, lanes=2, **options), 10)):
        served = [e.submit(beginnings()[0, :11], max_new_tokens=1, key=jax.random.key(seed)) for seed in range(2)]
        e.run()
        assert [s.error for s in served] == [None, None]
        assert [s.cached_tokens for s in served] == [0, shared]


def test_prompts_of_the_named_lengths_compile_everything():
    e, programs = caching(), (prompt_cache._take, prompt_cache._put, read_chunk, begin, insert)
    for program in programs:
        program.clear_cache()
    for length in e.prompt_lengths():
        serve(KIND, [Ask((1,) * length, new=1)], e)
    compiled = [program._cache_size() for program in programs]
    assert all(compiled)
    assert differing(alike(0), e)[0] == 0
    assert [program._cache_size() for program in programs] == [*compiled[:3], compiled[3] + 1, compiled[4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_cache": -1}, "prompt_cache = -1: must be a number of bytes, at least 0"),
        ({"prompt_cache": 1.5}, "prompt_cache"),
        ({"prompt_cache": 2**50}, f"lanes x 32 positions and prompt_cache = {2**50} bytes"),
        ({"prompt_cache": 9, "cache": CachePolicy(2)}, "prompt_cache = 9: this engine reads prompts at once"),
        ({"prompt_cache": 9, "prefill_exit": "together"}, "prompt_cache = 9: this engine reads prompts at once"),
        ({"prompt_cache": CHUNK_BYTES - 1, "prefill_chunk": CHUNK}, "prompt_cache = .*: give 0, or at least"),
    ],
)
def test_impossible_prompt_caches(options, message):
    with pytest.raises(InputError, match=message):
        Engine(params(), TINY, lanes=KINDS[KIND].lanes, num_steps=R, exit_rule=exits.kl(0.1), **options)
