"""Biases, penalties for new tokens and least lengths, against their formulas, in `generate` and in the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import TINY, engine, params

from rdlm import exits
from rdlm.config import InputError, Sampling, Speculative
from rdlm.decode import generate
from rdlm.decode.sampling import MAX_BIASES, adjusted, as_arrays

PROMPT, END = [3, 1, 4, 1, 5], 7


def test_the_formula():
    rng, V = np.random.default_rng(0), 12
    logits = rng.normal(size=(4, V)).astype(np.float32)
    made, count = rng.integers(0, V, (4, 6)), np.array([0, 3, 6, 2])
    sampling = Sampling(
        presence_penalty=[0.5, 0.0, 0.7, 0.0], frequency_penalty=[0.0, 0.3, -0.4, 0.0], min_tokens=[2, 3, 0, 0],
        stop_tokens=(1, 2), logit_bias=[((4, 2.5),), (), ((0, -1.0), (11, 3.0)), ()],
    )  # fmt: skip
    out = np.asarray(adjusted(jnp.asarray(logits), jnp.asarray(made), jnp.asarray(count), as_arrays(sampling, 4)))
    expected = logits.copy()
    for b, (presence, frequency) in enumerate(zip(sampling.presence_penalty, sampling.frequency_penalty, strict=True)):
        for v in range(V):
            times = (made[b, : count[b]] == v).sum()
            expected[b, v] -= presence * (times > 0) + frequency * times
        for v, bias in sampling.logit_bias[b]:
            expected[b, v] += bias
        if count[b] < sampling.min_tokens[b]:
            expected[b, [1, 2]] = -np.inf
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert (out[3] == logits[3]).all()


SAMPLINGS = [
    Sampling(logit_bias=((END, 100.0),), stop_tokens=(END,)),
    Sampling(logit_bias=((END, 100.0),), stop_tokens=(END,), min_tokens=4),
    Sampling(logit_bias=((END, 100.0), (8, 99.0)), presence_penalty=2.0),
    Sampling(temperature=0.8, frequency_penalty=5.0, presence_penalty=1.0),
    Sampling(),
]


def test_generate_and_the_engine_obey():
    rule = exits.kl(np.float32(0.1))
    e = engine("latest, kl")
    served = [
        e.submit(PROMPT, max_new_tokens=6, sampling=s, key=jax.random.key(i), exit_rule=rule)
        for i, s in enumerate(SAMPLINGS)
    ]
    e.run()
    for i, (s, got) in enumerate(zip(SAMPLINGS, served, strict=True)):
        out = generate(
            params(), TINY, [PROMPT], max_new_tokens=6, sampling=s, key=jax.random.key(i), num_steps=8, exit_rule=rule
        )
        assert got.tokens == out.tokens[0].tolist()
        assert got.steps == out.steps[0].tolist()
    ends, late, penalised, varied, _ = (s.tokens for s in served)
    assert ends == [END]
    assert late[-1] == END
    assert late.index(END) == 4
    assert penalised[:3] == [END, 8, END]
    assert len(set(varied)) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": ((1, 2, 3),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "once"),
        ({"logit_bias": ((1.5, 2.0),)}, "ids"),
        ({"logit_bias": ((-1, 2.0),)}, "ids"),
        ({"logit_bias": ((40, 2.0),)}, "40 is no token"),
        ({"logit_bias": "a"}, "must be a tuple of pairs"),
        ({"logit_bias": tuple((i, 1.0) for i in range(MAX_BIASES + 1))}, str(MAX_BIASES)),
        ({"min_tokens": -1}, "min_tokens"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
    ],
)
def test_what_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        generate(params(), TINY, [PROMPT], max_new_tokens=2, sampling=Sampling(**fields))


@pytest.mark.parametrize("fields", [{"presence_penalty": 1.0}, {"logit_bias": ((1, 1.0),)}, {"min_tokens": 2}])
def test_drafts_are_refused_with_them(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        generate(
            params(), TINY, [PROMPT], max_new_tokens=2, sampling=Sampling(**fields),
            speculative=Speculative(draft_steps=2, lookahead=2),
        )  # fmt: skip
