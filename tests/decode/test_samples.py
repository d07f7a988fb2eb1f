"""Log-probabilities of tokens, several samples of a prompt, and temperatures next to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import NEW, TINY, R, params

from rdlm.config import InputError, Sampling, Speculative
from rdlm.decode import Engine, generate, prefill, probabilities
from rdlm.decode.sampling import as_arrays

PROMPTS = [[1, 2, 3], [4, 5], list(range(9))]


def made(**options):
    return generate(params(), TINY, PROMPTS, **{"max_new_tokens": NEW, "num_steps": R, **options})


def served(**options):
    engine = Engine(params(), TINY, lanes=2, max_new_tokens=NEW, num_steps=R)
    found = [engine.submit(prompt, **options) for prompt in PROMPTS]
    engine.run()
    return found


def read_again(tokens, key):
    """ln p of new tokens behind each prompt, where the whole text is read in one pass."""
    texts = [[*prompt, *map(int, new)] for prompt, new in zip(PROMPTS, tokens, strict=True)]
    padded = np.zeros((len(texts), max(map(len, texts))), int)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    logits = prefill(params(), TINY, padded, R, lengths=np.array([*map(len, texts)]), key=key)[0].logits
    found = []
    for text, new, row in zip(texts, tokens, logits, strict=True):
        before = jax.nn.log_softmax(row[len(text) - len(new) - 1 : len(text) - 1])
        found.append(np.take_along_axis(np.asarray(before), np.asarray(new)[:, None], 1)[:, 0])
    return found


SAMPLED = {"sampling": Sampling(temperature=1.4, top_k=5, repetition_penalty=1.3), "key": jax.random.key(3)}


@pytest.mark.parametrize("options", [{}, SAMPLED, {"speculative": Speculative(3, 3)}])
def test_log_probabilities_are_the_models_own(options):
    out = made(**options)
    for log_probs, again in zip(out.log_probs, read_again(out.tokens, options.get("key")), strict=True):
        assert log_probs.dtype == np.float32
        np.testing.assert_allclose(log_probs, again, atol=1e-4)
    if "speculative" not in options:
        for s, tokens, log_probs in zip(served(**options), out.tokens, out.log_probs, strict=True):
            assert s.tokens == tokens.tolist()
            np.testing.assert_allclose(s.log_probs, log_probs, atol=1e-5)


def test_samples_of_a_prompt():
    options = SAMPLED | {"sampling": Sampling(temperature=[1.4, 0.9, 1.1])}
    one, many = made(**options), made(**options, samples=3)
    assert len(many.tokens) == len(many.steps) == len(many.prompt_steps) == len(many.log_probs) == 9
    for i, tokens in enumerate(one.tokens):
        assert np.array_equal(tokens, many.tokens[3 * i])
        assert len({tuple(t) for t in many.tokens[3 * i : 3 * i + 3]}) == 3


def test_samples_of_an_engine_are_those_of_generate():
    engine = Engine(params(), TINY, lanes=2, max_new_tokens=NEW, num_steps=R, max_queue=4)
    many = engine.samples(PROMPTS[0], 3, SAMPLED["key"], sampling=SAMPLED["sampling"])
    engine.run()
    expected = made(**SAMPLED, samples=3)
    assert [s.tokens for s in many] == [t.tolist() for t in expected.tokens[:3]]
    with pytest.raises(InputError, match="max_queue"):
        engine.samples(PROMPTS[0], 5, SAMPLED["key"])
    assert engine.step() is False  # nothing was queued
    with pytest.raises(InputError, match="count = 0"):
        engine.samples(PROMPTS[0], 0, SAMPLED["key"])


@pytest.mark.parametrize("temperature", [1e-8, 1e-10, 1e-30, 1e-45])
def test_next_to_zero_is_greedy(temperature):
    out = made(sampling=Sampling(temperature=temperature), key=jax.random.key(0))
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, made().tokens, strict=True))


@pytest.mark.parametrize("temperature", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("V", [8, 40, 384])
@pytest.mark.usefixtures("full_compile")  # as in production: fused
def test_small_temperatures_are_those_of_float64(V, temperature):
    logits = np.random.default_rng(V).normal(size=(3, V)).astype(np.float32) * 8
    logits[:, 5] = logits.max(-1) - np.float32(temperature)  # a rival worth something at that temperature
    ours = jax.jit(probabilities)(jnp.asarray(logits), jnp.zeros((3, V), bool), as_arrays(Sampling(temperature), 3))
    x = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / np.float32(temperature)
    np.testing.assert_allclose(ours, np.exp(x) / np.exp(x).sum(-1, keepdims=True), atol=1e-5)


def test_a_tiny_temperature_still_needs_a_key():
    with pytest.raises(InputError, match="needs key"):
        made(sampling=Sampling(temperature=1e-9))
