"""Rows that pad the vocabulary are no tokens: with them or without, a model says, exits and is scored the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import TINY
from oracle import random_params

from rdlm import exits
from rdlm.analysis import lens
from rdlm.config import Sampling
from rdlm.decode import Engine, generate
from rdlm.evaluation.scoring import score
from rdlm.model import forward

PLAIN = dataclasses.replace(TINY, tie_embeddings=False)
PADDED = dataclasses.replace(PLAIN, padded_vocab_size=TINY.vocab_size + 8)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]


def models():
    """The same model without and with 8 more rows, which would win every argmax."""
    params = random_params(PLAIN, seed=2)
    more = {name: jnp.concatenate([params[name], 30 * params[name][:8]]) for name in ("wte", "head")}
    return (params, PLAIN), (params | more, PADDED)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", [exits.kl(0.05), exits.argmax_stability(2)])
def test_exits_of_a_text(rule):
    tokens = np.arange(16).reshape(2, 8)
    plain, padded = (jax.jit(forward, static_argnums=1)(*m, tokens, 8, exit_rule=rule) for m in models())
    assert same([plain.steps], [padded.steps])
    np.testing.assert_allclose(plain.logits, padded.logits[..., : TINY.vocab_size], atol=1e-5)
    assert len(np.unique(plain.steps)) > 1


def test_generated_tokens():
    options = {"exit_rule": exits.kl(0.05), "sampling": Sampling(temperature=[0, 0.7, 1.5], top_k=9)}
    options |= {"max_new_tokens": 5, "num_steps": 6, "key": jax.random.key(0)}
    plain, padded = (generate(*m, PROMPTS, **options) for m in models())
    assert same(plain.tokens, padded.tokens)
    assert same(plain.steps, padded.steps)
    np.testing.assert_allclose(np.concatenate(plain.log_probs), np.concatenate(padded.log_probs), atol=1e-5)


def test_served_tokens():
    served = []
    for m in models():
        engine = Engine(*m, lanes=2, max_new_tokens=5, num_steps=6, exit_rule=exits.kl(0.05))
        served.append([engine.submit(prompt) for prompt in PROMPTS])
        engine.run()
    plain, padded = ([(s.tokens, s.steps, s.error) for s in each] for each in served)
    assert plain == padded


@pytest.mark.parametrize("rule", [None, exits.kl(0.05)])
def test_scores(rule):
    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    plain, padded = (score(*m, pairs, [6], exit_rule=rule) for m in models())
    np.testing.assert_allclose(plain.log_likelihood, padded.log_likelihood, atol=1e-4)
    assert same(plain.greedy, padded.greedy)
    assert score(*models()[1], [([1], [TINY.vocab_size])], [6], exit_rule=rule).log_likelihood == -np.inf


def test_lens():
    tokens = np.arange(8)[None]
    plain, padded = (lens(*m, tokens, tokens, (1, 4)) for m in models())
    assert same([plain.top], [padded.top])
    np.testing.assert_allclose(plain.probability, padded.probability, atol=1e-5)
