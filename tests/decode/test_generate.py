"""Decoding: batches that change nothing, one program for all values, sampling, a growing cache, and refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, random_params
from scipy.stats import chisquare

from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling
from rdlm.decode import decode_step, generate, prefill
from rdlm.decode.loop import begin, decode_tokens
from rdlm.model import forward
from rdlm.model.cache import allocate
from rdlm.recurrence import initial_state

# Batches change nothing

TINY = ModelConfig(
    vocab_size=40, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1,
    coda_layers=1, max_length=64, mean_recurrence=6,
)  # fmt: skip
R, NEW = 8, 6  # most recurrences and new tokens; every prompt of up to 16 tokens runs in one compiled shape
KINDS = {
    "latest, kl": (CachePolicy(), exits.kl, (0.001, 0.1)),
    "skip, latent_diff": (CachePolicy(lookup="skip"), exits.latent_diff, (0.03, 0.3)),
    "2 sets, argmax_stability": (CachePolicy(2), exits.argmax_stability, (1, 4)),
}


start = jax.jit(prefill, static_argnums=1, static_argnames=("cache", "capacity", "max_steps"))
step = jax.jit(decode_step, static_argnums=1, donate_argnums=2)


@functools.cache
def params():
    return random_params(TINY, seed=2)


@st.composite
def requests(draw, thresholds):
    """(prompt, threshold, num_steps, min_steps)."""
    prompt = draw(st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=16))
    return prompt, draw(st.floats(*thresholds)), draw(st.integers(1, R)), draw(st.integers(0, 2))


def serve(kind, batch):
    """[(tokens, steps, prompt steps)] of requests served together."""
    policy, rule, _ = KINDS[kind]
    prompts, thresholds, depths, least = zip(*batch, strict=True)
    out = generate(params(), TINY, prompts, max_new_tokens=NEW, num_steps=depths, min_steps=least, cache=policy,
                   exit_rule=rule(np.array(thresholds, np.float32)))  # fmt: skip
    return [tuple(x.tolist() for x in row) for row in zip(out.tokens, out.steps, out.prompt_steps, strict=True)]


def up_to_close_calls(kind, request, served):
    """What the oracle says a request gets, up to the first call too close to make, and (close calls, calls)."""
    policy, rule, _ = KINDS[kind]
    (prompt, threshold, depth, least), (tokens, steps, prompt_steps) = request, served
    sequence, s0 = Oracle(params(), TINY, policy), np.asarray(noise(len(prompt) + NEW))
    found_tokens, found_steps, found_prompt_steps, close, calls = [], [], None, 0, 0
    for j in range(NEW):
        at = slice(0, len(prompt)) if j == 0 else slice(len(prompt) + j - 1, len(prompt) + j)
        done = sequence.process(
            prompt if j == 0 else [tokens[j - 1]], s0[at], depth, rule().kind, np.float32(threshold), least,
            follow=prompt_steps if j == 0 else [steps[j]],
        )  # fmt: skip
        top = np.sort(done.logits[-1])
        close, calls = close + done.close + (top[-1] - top[-2] < 1e-4), calls + done.decisions + 1
        if close:
            break
        found_prompt_steps = found_prompt_steps or done.steps.tolist()
        found_tokens.append(int(done.logits[-1].argmax()))
        found_steps.append(int(done.steps[-1]))
    return (found_tokens, found_steps, found_prompt_steps), close, calls


@functools.cache
def noise(length):
    return initial_state(jax.random.key(0), jnp.arange(32), TINY.embed_dim)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_does_not_depend_on_its_batch(kind, request):
    if kind == "latest, kl":  # one is compiled as in production
        request.getfixturevalue("full_compile")
    close = calls = 0

    @settings(max_examples=8)
    @given(st.data())
    def check(data):
        nonlocal close, calls
        three = [data.draw(requests(KINDS[kind][2])) for _ in range(3)]
        served = serve(kind, three)
        # The same compiled shape: bitwise, whatever the order and the mates.
        order = data.draw(st.permutations(range(3)))
        assert serve(kind, [three[i] for i in order]) == [served[i] for i in order]
        junk = [data.draw(requests(KINDS[kind][2])) for _ in range(3)]
        lane, mine = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
        junk[lane] = three[mine]
        assert serve(kind, junk)[lane] == served[mine]
        # Another shape: the run alone, and the oracle, up to the first close call.
        alone = serve(kind, [three[mine]])[0]
        (tokens, steps, prompt_steps), c, n = up_to_close_calls(kind, three[mine], served[mine])
        close, calls = close + c, calls + n
        for got in (served[mine], alone):
            assert (got[0][: len(tokens)], got[1][: len(tokens)]) == (tokens, steps)
            assert not tokens or got[2] == prompt_steps

    check()
    assert close <= 0.01 * calls


def test_padding_leaves_no_trace():
    lengths, real = np.array([1, 5, 8]), np.arange(8)[None] < np.array([1, 5, 8])[:, None]
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 3, 8))
    tokens[1][real] = tokens[0][real]  # the same prompts, padded with other junk
    options = {"lengths": lengths, "cache": CachePolicy(), "capacity": 32, "max_steps": 8}
    (a, cache_a), (b, cache_b) = (start(params(), TINY, t, jnp.int32(4), **options) for t in tokens)
    assert cache_a.length.tolist() == lengths.tolist()
    assert np.array_equal(a.logits[real], b.logits[real])
    assert np.array_equal(a.steps, np.where(real, 4, 0))
    after = [step(params(), TINY, c, tokens[0, :, 0], jnp.int32(4))[0].logits for c in (cache_a, cache_b)]
    assert np.array_equal(*after)
    alone = forward(params(), TINY, tokens[0, 1:2, :5], 4)
    np.testing.assert_allclose(a.logits[1, :5], alone.logits[0], atol=2e-5, rtol=0)


# Values: per prompt, and never a new program

PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])


def run(prompts=PROMPTS, **options):
    options = {"max_new_tokens": NEW, "num_steps": 5} | options
    return generate(params(), TINY, prompts, **options)


def latent(threshold):
    """A rule with one threshold per prompt, so that all tests share a program."""
    return exits.latent_diff(np.broadcast_to(np.float32(threshold), len(PROMPTS)))


def rows(out):
    return [(t.tolist(), s.tolist()) for t, s in zip(out.tokens, out.steps, strict=True)]


@pytest.mark.parametrize(
    ("each", "build"),
    [
        ([2, 5, 8], lambda v: {"num_steps": v}),
        ([0.0, 0.8, 2.0], lambda v: {"sampling": Sampling(temperature=v), "key": jax.random.key(1)}),
        ([1.0, 5.0, 1.5], lambda v: {"sampling": Sampling(repetition_penalty=v)}),
        ([0.01, 0.1, 0.5], lambda v: {"exit_rule": latent(v), "num_steps": 8}),
        ([0, 3, 6], lambda v: {"exit_rule": latent(0.5), "min_steps": v, "num_steps": 8}),
        ([(7,), (), (1, 2)], lambda v: {"sampling": Sampling(stop_tokens=v)}),
    ],
    ids=["num_steps", "temperature", "repetition_penalty", "threshold", "min_steps", "stop_tokens"],
)
def test_values_per_prompt(each, build):
    together = rows(run(**build(each)))
    for i, value in enumerate(each):
        assert rows(run(**build(value)))[i] == together[i]
    assert len({str(rows(run(**build(value)))) for value in each}) > 1  # control: the value matters


def test_one_program_for_requests_of_any_values():
    rng, key = np.random.default_rng(0), jax.random.key(0)

    def request(i):
        prompts = [rng.integers(0, TINY.vocab_size, rng.integers(1, 17)) for _ in range(2)]
        sampling = Sampling(temperature=rng.uniform(0, 2, 2), top_k=int(rng.integers(0, 9)), top_p=rng.uniform(0.5, 1),
                            min_p=0.01 * i, stop_tokens=tuple(range(i % 4)))  # fmt: skip
        return run(prompts, max_new_tokens=int(rng.integers(1, 17)), num_steps=int(rng.integers(1, 9)),
                   exit_rule=exits.kl(float(rng.uniform(0.01, 1))), min_steps=i % 3, check_every=1 + i % 2,
                   init_scale=i / 20, sampling=sampling, key=jax.random.fold_in(key, i))  # fmt: skip

    for program in (begin, decode_tokens):  # other tests may have compiled the programs that this one counts
        program.clear_cache()
    steps = [s for i in range(20) for s in request(i).steps]
    assert (begin._cache_size(), decode_tokens._cache_size()) == (1, 1)
    assert len({len(s) for s in steps}) > 3
    run([[1, 2], [3] * 17])  # control: another bucket is another program
    assert begin._cache_size() == 2


def test_steps_and_passes_are_counted():
    out = run(num_steps=[2, 5, 8], exit_rule=latent([0.0, 0.3, 0.3]))
    assert [len(s) for s in out.prompt_steps] == [3, 5, 1]
    assert [len(t) for t in out.tokens] == [len(s) for s in out.steps] == [NEW] * 3
    for b in range(3):
        assert out.steps[b][0] == out.prompt_steps[b][-1]  # the pass that gave the first token
        assert out.tokens[b].dtype == out.steps[b].dtype == out.prompt_steps[b].dtype == np.int32
    assert set(out.steps[0].tolist()) == {2}  # a threshold of 0 never exits
    later = np.max([s[1:] for s in out.steps], axis=0)  # rows go through a pass together
    assert out.core_passes == max(s.max() for s in out.prompt_steps) + later.sum()


def test_stop_tokens_are_included_and_end_their_row():
    plain = rows(run())
    stops = tuple((row[0][j],) for row, j in zip(plain, (1, 4, 3), strict=True))
    out = rows(run(sampling=Sampling(stop_tokens=stops)))
    for (tokens, steps), (free, depth), (stop,) in zip(out, plain, stops, strict=True):
        n = free.index(stop) + 1
        assert (tokens, steps) == (free[:n], depth[:n])
    assert len({len(tokens) for tokens, _ in out}) > 1
    first = rows(run(sampling=Sampling(stop_tokens=[row[0][0] for row in plain])))
    assert [len(tokens) for tokens, _ in first] == [1, 1, 1]


@pytest.mark.parametrize("stop", [(), 1])
def test_tokens_are_streamed_as_they_are_made(stop):
    options = {"exit_rule": latent(0.3), "num_steps": 8}
    plain = run(**options)
    if stop:
        options["sampling"] = Sampling(stop_tokens=(int(plain.tokens[0][2]),))
        plain = run(**options)
    seen = []
    out = run(**options, on_token=lambda *event: seen.append(event))
    assert rows(out) == rows(plain)
    for b in range(3):
        mine = [(token, depth) for row, token, depth in seen if row == b]
        assert mine == list(zip(out.tokens[b].tolist(), out.steps[b].tolist(), strict=True))
    # Not all at once in the end: rows take turns.
    assert [row for row, _, _ in seen[:3]] == [0, 1, 2]


# Sampling


def distribution(logits, prompt, temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The sampling order (docs/semantics.md, Generate) for one row in float64."""
    x = np.asarray(logits, np.float64)
    seen = np.isin(np.arange(len(x)), prompt)
    x = np.where(seen, np.where(x >= 0, x / repetition_penalty, x * repetition_penalty), x) / temperature
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    if top_p < 1:
        order = np.argsort(-p)
        dropped = order[np.cumsum(p[order]) > top_p]
        p[dropped[dropped != order[0]]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


FEW = ModelConfig(
    vocab_size=8, embed_dim=8, num_heads=1, mlp_dim=8, prelude_layers=0, core_layers=1, coda_layers=0, max_length=32
)
WAYS = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 4},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.3, "repetition_penalty": 3.0},
]


def test_samples_follow_the_distribution():
    # 1000 prompts for each way of sampling, all in one batch, every one with a key of its own.
    few, prompt, each = random_params(FEW, seed=3), [2, 5], 1000
    logits = forward(few, FEW, np.array([prompt]), 3, state=np.zeros((1, 2, 8))).logits[0, -1]
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    fields = {name: [(off | way)[name] for way in WAYS for _ in range(each)] for name in ("temperature", *off)}
    out = generate(few, FEW, [prompt] * len(WAYS) * each, max_new_tokens=1, num_steps=3, init_scale=0.0,
                   sampling=Sampling(**fields), key=jax.random.split(jax.random.key(0), len(WAYS) * each))  # fmt: skip
    counts = np.stack([np.bincount(t, minlength=8) for t in np.array(out.tokens).reshape(len(WAYS), each)])
    expected = [each * distribution(logits, prompt, **way) for way in WAYS]
    for i, p in enumerate(expected):
        assert not np.any(counts[i][p == 0])
        assert chisquare(counts[i][p > 0], p[p > 0]).pvalue > 0.001
    # Control: at twice the temperature they do not.
    hot = each * distribution(logits, prompt, temperature=2.0)
    assert chisquare(counts[0], hot).pvalue < 1e-6


def test_samples_are_a_function_of_key_and_prompt():
    hot = {"sampling": Sampling(temperature=1.5), "num_steps": 4}
    same = rows(run([[1, 2], [1, 2], [3]], key=jax.random.key(5), **hot))
    assert same[0] == same[1]
    keys = jax.random.split(jax.random.key(5), 3)
    apart = rows(run([[1, 2]] * 3, key=keys, **hot))
    assert len({str(row) for row in apart}) == 3
    # Order and mates do not matter; a prompt's own key does.
    shuffled = rows(run([[4], [1, 2], [1, 2]], key=keys[np.array([0, 2, 1])], **hot))
    assert shuffled[1:] == [apart[2], apart[1]]
    assert rows(run([[1, 2]] * 3, key=keys, **hot)) == apart


# The cache grows


@pytest.mark.parametrize("policy", [CachePolicy(), CachePolicy(lookup="skip"), CachePolicy(6)], ids=str)
def test_a_cache_that_grows_is_one_that_was_large_from_the_start(policy):
    # Deeper than its sets and longer than its capacity, as in a session that did not know.
    tokens, depths = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 8)), (8, 5)
    _, small = start(params(), TINY, tokens, jnp.int32(2), cache=policy, capacity=9, max_steps=2)
    _, large = start(params(), TINY, tokens, jnp.int32(2), cache=policy, capacity=32, max_steps=8)
    sizes, kept = [(small.sets, small.capacity)], (large.sets, large.capacity)
    for t, r in enumerate(depths):
        out, small = decode_step(params(), TINY, small, tokens[:, t], r)
        expected, large = step(params(), TINY, large, tokens[:, t], jnp.int32(r))
        np.testing.assert_allclose(out.logits, expected.logits, atol=2e-5, rtol=0)
        sizes.append((small.sets, small.capacity))
    assert len(set(sizes)) > 2
    assert (large.sets, large.capacity) == kept


def test_a_cache_does_not_grow_beyond_the_model():
    full = dataclasses.replace(allocate(TINY, CachePolicy(), 2, 1, 64, "float32"), length=jnp.array([64]))
    with pytest.raises(InputError, match=r"exceeds config\.max_length = 64"):
        decode_step(params(), TINY, full, np.array([1]), 2)
    with pytest.raises(InputError, match="do not fit capacity = 3"):
        prefill(params(), TINY, [[1, 2, 3, 4]], 2, capacity=3)


def test_initial_states_of_another_shape_are_refused():
    D = TINY.embed_dim
    with pytest.raises(InputError, match=rf"state: expected shape \[1, 3, {D}\], got \[1, 1, {D}\]"):
        prefill(params(), TINY, [[1, 2, 3]], 2, state=np.zeros((1, 1, D)))
    held = allocate(TINY, CachePolicy(), 2, 1, 64, "float32")
    with pytest.raises(InputError, match=rf"state: expected shape \[1, {D}\], got \[{D}\]"):
        decode_step(params(), TINY, held, np.array([1]), 2, state=np.zeros(D))


# What is refused, in one line


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompts": []}, "prompts: at least one"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: must be a non-empty 1-D sequence"),
        ({"prompts": [[[1, 2]]]}, r"prompts\[0\].*\(1, 2\)"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: token ids must be integers, got float64"),
        ({"prompts": [[1], [40]]}, r"prompts\[1\]: ids must be in \[0, 40\), found 40 .. 40"),
        ({"prompts": [[-1]]}, "found -1"),
        ({"prompts": [[1] * 60]}, r"60 tokens \+ max_new_tokens = 6 exceed config.max_length = 64"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"num_steps": 0}, "num_steps.*at least 1"),
        ({"num_steps": [3, 0, 3]}, "num_steps.*at least 1"),
        ({"num_steps": [3, 3]}, r"num_steps: expected one value or 3, got shape \(2,\)"),
        ({"num_steps": 2.5}, "num_steps.*integer"),
        ({"min_steps": -1}, "min_steps = -1: must"),
        ({"check_every": 0}, "check_every = 0: must"),
        ({"exit_rule": "kl"}, "exit_rule = 'kl': must be a rule"),
        ({"exit_rule": exits.kl(np.array([0.1, 0.2]))}, r"exit_rule: threshold: expected shape .* or \[3\], got \[2\]"),
        ({"prefill_exit": "always"}, "prefill_exit = 'always': must be one of per_token, together, never"),
        ({"warm_start": True}, "warm_start = True: must be False, 'normalized' or 'raw'"),
        ({"sampling": Sampling(temperature=1.0)}, r"needs key=jax.random.key\(seed\)"),
        ({"sampling": Sampling(temperature=-1.0)}, "Sampling.temperature = -1.0: must not be negative"),
        ({"sampling": Sampling(temperature=float("nan"))}, "Sampling.temperature = nan"),
        ({"sampling": Sampling(top_k=-1)}, "Sampling.top_k = -1"),
        ({"sampling": Sampling(top_k=2.5)}, "Sampling.top_k.*integer"),
        ({"sampling": Sampling(top_p=0.0)}, "Sampling.top_p = 0.0"),
        ({"sampling": Sampling(min_p=1.5)}, "Sampling.min_p = 1.5"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "Sampling.repetition_penalty = 0.0: must be positive"),
        ({"sampling": Sampling(temperature=[1.0, 1.0])}, "Sampling.temperature: expected one value or 3"),
        ({"sampling": Sampling(stop_tokens=((1,), (2,)))}, "Sampling.stop_tokens: expected one tuple or 3, got 2"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, r"key: expected one key or 3, got shape \(2,\)"),
    ],
)
def test_what_generate_refuses(options, match):
    with pytest.raises(InputError, match=match) as error:
        run(**options)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)
