"""Self-speculation: the same tokens with fewer sequential recurrences, or the same distribution when sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import cases, model, of_kind
from oracle import random_params
from scipy.stats import chi2_contingency

from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling, Speculative
from rdlm.decode import generate, speculative
from rdlm.decode.speculative import speculate
from rdlm.model import forward

pytestmark = pytest.mark.slow

TINY = ModelConfig(
    vocab_size=6, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=64, mean_recurrence=4, backprop_depth=2,
)  # fmt: skip


@pytest.mark.parametrize(("name", "case"), of_kind("speculative", models=("A", "A2")))
def test_the_reference_says_the_same_tokens(name, case):
    entry = cases(name)[case]
    (params, config), arrays, n = model(name), entry["arrays"], entry["max_new_tokens"]
    spec = Speculative(entry["draft_steps"], entry["lookahead"], float(entry["verification_threshold"]))
    prompt = arrays["input_ids"][0]
    out = generate(
        params, config, [prompt], max_new_tokens=n, num_steps=entry["num_steps"], init_scale=0.0, speculative=spec
    )
    # The reference may overshoot max_new_tokens; we never do.
    np.testing.assert_array_equal(out.tokens[0], arrays["sequences"][0][len(prompt) : len(prompt) + n])
    assert (out.steps[0] == entry["num_steps"]).all()


@pytest.mark.parametrize("spec", [Speculative(1, 3), Speculative(3, 4), Speculative(8, 2)])
def test_greedy_output_is_that_of_plain_decoding_in_a_batch(spec):
    params, config = model("A2")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n) for n in (1, 4, 9, 16, 2, 7)]
    options = {"max_new_tokens": 13, "num_steps": 8, "key": jax.random.key(5)}
    plain = generate(params, config, prompts, **options)
    stop = (int(plain.tokens[1][4]),)  # some row stops inside a round
    for sampling in (Sampling(), Sampling(stop_tokens=stop), Sampling(repetition_penalty=1.3)):
        expected = generate(params, config, prompts, sampling=sampling, **options)
        streamed = []
        out = generate(
            params, config, prompts, sampling=sampling, speculative=spec,
            on_token=lambda row, token, steps, streamed=streamed: streamed.append((row, token, steps)), **options,
        )  # fmt: skip
        for row, tokens in enumerate(expected.tokens):
            np.testing.assert_array_equal(out.tokens[row], tokens)
            assert [s[1:] for s in streamed if s[0] == row] == [(t, 8) for t in tokens]


def test_greedy_output_of_200_prompts():
    """A prompt may differ only where two logits are within 1e-4 of each other, and hardly any may."""
    params, rng = random_params(TINY, 5), np.random.default_rng(0)
    prompts = [rng.integers(0, TINY.vocab_size, rng.integers(1, 12)).tolist() for _ in range(200)]
    options = {"max_new_tokens": 12, "num_steps": 8}
    plain = generate(params, TINY, prompts, **options)
    drafted = generate(params, TINY, prompts, speculative=Speculative(2, 3), **options)
    close = 0
    for prompt, right, found in zip(prompts, plain.tokens, drafted.tokens, strict=True):
        if not np.array_equal(right, found):
            first = int(np.argmax(right != found))
            row = np.array([[*prompt, *right[:first]]])
            top = np.sort(np.asarray(forward(params, TINY, row, 8).logits)[0, -1])
            assert top[-1] - top[-2] < 1e-4, "a token differs that was no near-tie"
            close += 1
    assert close <= 2
    assert len({tuple(t) for t in plain.tokens}) > 100, "prompts must lead to different tokens"


def test_drafts_that_are_always_right_cost_fewer_sequential_recurrences():
    # Weights without a core: every depth says the same, so all drafts are accepted.
    params, config = model("A2")
    params = params | {"adapter": params["adapter"].at[0].set(0)}  # the state is ignored: one recurrence is enough
    out = generate(params, config, [[1, 2, 3]], max_new_tokens=13, num_steps=8, speculative=Speculative(1, 4))
    plain = generate(params, config, [[1, 2, 3]], max_new_tokens=13, num_steps=8)
    np.testing.assert_array_equal(out.tokens[0], plain.tokens[0])
    assert plain.core_passes == 13 * 8
    assert out.core_passes == 8 + 3 * (4 * 1 + 7)  # prefill, then three rounds of four drafts and one verification


def pair_counts(params, spec):
    """How often each pair of second and third tokens is said, over 1,000 keys."""
    rows = 1000
    out = generate(
        params, TINY, [[0, 3, 1]] * rows, max_new_tokens=3, num_steps=4, speculative=spec,
        sampling=Sampling(temperature=0.8), key=jax.random.split(jax.random.key(11 if spec else 12), rows),
    )  # fmt: skip
    tokens = np.stack(out.tokens)
    return np.bincount(tokens[:, 1] * TINY.vocab_size + tokens[:, 2], minlength=TINY.vocab_size**2)


def p_value(a, b):
    table = np.stack([a, b])
    return chi2_contingency(table[:, table.sum(0) >= 10]).pvalue


def test_sampled_output_keeps_its_distribution(monkeypatch):
    params = random_params(TINY, 3)
    plain = pair_counts(params, None)
    assert p_value(plain, pair_counts(params, Speculative(1, 2))) > 1e-3

    def accept_all(logits, drafts, request, count, spec):
        return jnp.ones(drafts.tokens.shape, bool), drafts.tokens

    monkeypatch.setattr(speculative, "_accept", accept_all)
    speculate.clear_cache()
    assert p_value(plain, pair_counts(params, Speculative(1, 2))) < 1e-6, "a wrong acceptance rule must be seen"
    speculate.clear_cache()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache": CachePolicy(recurrences=4)}, "recurrences = 4"),
        ({"exit_rule": exits.kl()}, "exit_rule"),
        ({"warm_start": "raw"}, "warm_start"),
        ({"speculative": Speculative(9, 2)}, "draft_steps = 9"),
    ],
)
def test_refusals_are_one_line(options, says):
    params, config = model("A2")
    options = {"speculative": Speculative(2, 2)} | options
    with pytest.raises(InputError, match=says) as refused:
        generate(params, config, [[1, 2]], max_new_tokens=2, num_steps=8, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (1, 1, 0.0), (1, 1, 1.5)])
def test_a_wrong_speculation_is_refused(wrong):
    with pytest.raises(InputError, match="Speculative"):
        Speculative(*wrong)


def test_a_limited_cache_that_keeps_every_recurrence_is_fine():
    params, config = model("A2")
    options = {"max_new_tokens": 6, "num_steps": 4}
    out = generate(params, config, [[1, 2]], cache=CachePolicy(recurrences=4), speculative=Speculative(2, 2), **options)
    np.testing.assert_array_equal(out.tokens[0], generate(params, config, [[1, 2]], **options).tokens[0])
