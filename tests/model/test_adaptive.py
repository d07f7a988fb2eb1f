"""Per-token exits and the cache against the slow oracle: the parallel pass, token by token, and in chunks.

Steps must be equal, except where a value lies within 1e-3 (relative) of its threshold: there the oracle follows the
model, and such decisions may be at most 1 % of all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle, random_params

import rdlm.model.adaptive
from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode import decode_step, prefill
from rdlm.model import core_step, forward
from rdlm.model.cache import allocate, frozen_set, stored

SMALL = ModelConfig(
    vocab_size=48, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=2,
    coda_layers=1, max_length=32,
)  # fmt: skip
OTHER = ModelConfig(
    vocab_size=30, padded_vocab_size=32, embed_dim=12, num_heads=2, mlp_dim=20, prelude_layers=0, core_layers=2,
    coda_layers=1, max_length=32, qk_bias=False, tie_embeddings=False, rope_base=100.0,
)  # fmt: skip
WINDOW = dataclasses.replace(SMALL, attention_window=4)
POLICIES = {
    "latest": CachePolicy(),
    "skip": CachePolicy(lookup="skip"),
    "4 sets": CachePolicy(4),
    "1 set": CachePolicy(1),
}
B, L, R = 2, 14, 12
RULES = {  # one threshold per row
    "none": (None, None),
    "latent_diff": (exits.latent_diff, np.array([0.1, 0.2], np.float32)),
    "kl": (exits.kl, np.array([0.01, 0.03], np.float32)),
}
CASES = [(policy, rule) for policy in POLICIES for rule in RULES]


@functools.cache
def inputs(config):
    """(params, tokens [B, L], s0 [B, L, D], a depth for every token [B, L])."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (B, L))
    s0 = (0.6 * rng.normal(size=(B, L, config.embed_dim))).astype(np.float32)
    return random_params(config), tokens, s0, rng.integers(1, R + 1, (B, L)).astype(np.int32)


def wanted(config, rule):
    """(most recurrences [B, L], the rule): without a rule every token has a depth of its own."""
    make, threshold = RULES[rule]
    return (inputs(config)[3], None) if make is None else (np.full((B, L), R, np.int32), make(threshold))


def compiled(function):
    """A fresh program, so that what a test has patched is traced."""
    return jax.jit(lambda *args, **kwargs: function(*args, **kwargs), static_argnums=1, static_argnames="cache")


@functools.cache
def program(function):
    return compiled(function)


def parallel(config, policy, rule, run=None, **options):
    """(logits [B, L, V], steps [B, L]) of one parallel pass."""
    params, tokens, s0, _ = inputs(config)
    most, rule = wanted(config, rule)
    run = run or program(forward)
    out = run(params, config, tokens, most, state=s0, exit_rule=rule, cache=POLICIES[policy], **options)
    return np.asarray(out.logits), np.asarray(out.steps)


def one_by_one(config, policy, rule, run=None):
    """The same, every token in a pass of its own behind the cache of those before."""
    params, tokens, s0, _ = inputs(config)
    most, rule = wanted(config, rule)
    run = run or jax.jit(decode_step, static_argnums=1)
    held, logits, steps = allocate(config, POLICIES[policy], POLICIES[policy].sets(R), B, L, jnp.float32), [], []
    for t in range(L):
        out, held = run(params, config, held, tokens[:, t], most[:, t], state=s0[:, t], exit_rule=rule)
        logits.append(out.logits)
        steps.append(out.steps)
    return np.stack(logits, 1), np.stack(steps, 1)


@functools.cache
def outcome(how, config, policy, rule):
    return how(config, policy, rule)


def oracle(config, policy, rule, chunks, steps, **options):
    """What the oracle makes of the same inputs in `chunks` (a list of lengths), following `steps` in close calls."""
    params, tokens, s0, _ = inputs(config)
    most, _ = wanted(config, rule)
    logits, found, decisions, close = [], [], 0, 0
    for b in range(B):
        asked = {name: value[b] if np.ndim(value) else value for name, value in options.items()}
        if rule != "none":
            asked |= {"rule": rule, "threshold": RULES[rule][1][b]}
        sequence = Oracle(params, config, POLICIES[policy])
        for start, length in zip(np.cumsum([0, *chunks]), chunks, strict=False):
            at = slice(start, start + length)
            done = sequence.process(tokens[b, at], s0[b, at], most[b, at], follow=steps[b, at], **asked)
            logits.append(done.logits)
            found.append(done.steps)
            decisions, close = decisions + done.decisions, close + done.close
    assert close <= 0.01 * decisions
    return np.concatenate(logits).reshape(B, L, -1), np.concatenate(found).reshape(B, L)


def agrees(ours, reference):
    return np.array_equal(ours[1], reference[1]) and np.abs(ours[0] - reference[0]).max() < 3e-4


def assert_agrees(ours, reference):
    np.testing.assert_array_equal(ours[1], reference[1])
    np.testing.assert_allclose(ours[0], reference[0], atol=3e-4, rtol=0)
    assert len(set(ours[1].ravel().tolist())) > 2  # otherwise nothing was tested


@pytest.mark.parametrize(("policy", "rule"), CASES)
def test_parallel_pass(policy, rule):
    ours = outcome(parallel, SMALL, policy, rule)
    assert_agrees(ours, oracle(SMALL, policy, rule, [L], ours[1]))


@pytest.mark.parametrize(("policy", "rule"), CASES)
def test_token_by_token(policy, rule):
    ours = outcome(one_by_one, SMALL, policy, rule)
    assert_agrees(ours, oracle(SMALL, policy, rule, [1] * L, ours[1]))


@pytest.mark.parametrize("how", [parallel, one_by_one])
def test_another_shape_of_model(how):
    ours = how(OTHER, "4 sets", "kl")
    assert_agrees(ours, oracle(OTHER, "4 sets", "kl", [L] if how is parallel else [1] * L, ours[1]))


@pytest.mark.parametrize(("policy", "rule"), [("4 sets", "kl"), ("skip", "none")])
def test_a_window_of_attention(policy, rule):
    whole = outcome(parallel, SMALL, policy, rule)
    for how, chunks in ((parallel, [L]), (one_by_one, [1] * L)):
        ours = how(WINDOW, policy, rule)
        assert_agrees(ours, oracle(WINDOW, policy, rule, chunks, ours[1]))
        assert not agrees(ours, whole)


@pytest.mark.parametrize("rule", ["none", "latent_diff"])
@pytest.mark.parametrize("policy", ["latest", "skip"])
def test_parallel_prefill_is_token_by_token_decoding(policy, rule):
    # For fixed depth and rules on states, with every recurrence kept (docs/semantics.md, Prefill and exactness).
    assert_agrees(outcome(parallel, SMALL, policy, rule), outcome(one_by_one, SMALL, policy, rule))


@pytest.mark.parametrize(("policy", "rule"), [("latest", "kl"), ("4 sets", "none"), ("1 set", "latent_diff")])
def test_elsewhere_they_are_different_computations(policy, rule):
    # Also the control that agreement means something.
    assert not agrees(outcome(parallel, SMALL, policy, rule), outcome(one_by_one, SMALL, policy, rule))


def test_prefill_then_a_chunk():
    params, tokens, s0, _ = inputs(SMALL)
    (most, rule), half = wanted(SMALL, "kl"), L // 2
    first, held = compiled(prefill)(
        params, SMALL, tokens[:, :half], R, state=s0[:, :half], exit_rule=rule, cache=POLICIES["4 sets"]
    )
    second, held = jax.jit(decode_step, static_argnums=1)(
        params, SMALL, held, tokens[:, half:], most[:, half:], state=s0[:, half:], exit_rule=rule
    )
    assert held.length.tolist() == [L] * B
    ours = np.concatenate([first.logits, second.logits], 1), np.concatenate([first.steps, second.steps], 1)
    assert_agrees(ours, oracle(SMALL, "4 sets", "kl", [half, half], ours[1]))


@pytest.mark.parametrize("rule", ["latent_diff", "kl"])
def test_when_a_rule_is_asked(rule):
    # After recurrences min_steps + 1, then every check_every; differences are between checks.
    run = compiled(forward)
    for min_steps, every in (([2, 0], 3), ([4, 1], 2), ([0, R], 1)):
        options = {"min_steps": np.array(min_steps, np.int32), "check_every": np.int32(every)}
        ours = parallel(SMALL, "latest", rule, run=run, **options)
        options["check_every"] = every
        reference = oracle(SMALL, "latest", rule, [L], ours[1], **options)
        np.testing.assert_array_equal(ours[1], reference[1])
        np.testing.assert_allclose(ours[0], reference[0], atol=3e-4, rtol=0)
        for b in range(B):
            assert set(ours[1][b].tolist()) <= {*range(min_steps[b] + 1, R, every), R}
    assert run._cache_size() == 1


def test_stopping_at_once_and_never():
    logits, steps = parallel(SMALL, "latest", "latent_diff", min_steps=np.int32(R))
    assert np.all(steps == R)
    params, tokens, s0, _ = inputs(SMALL)
    out = program(forward)(params, SMALL, tokens, jnp.int32(R), state=s0)
    np.testing.assert_allclose(logits, out.logits, atol=1e-5, rtol=0)  # the plain pass at that depth
    first = program(forward)(params, SMALL, tokens, R, state=s0, exit_rule=exits.fixed(1))
    np.testing.assert_allclose(
        first.logits, program(forward)(params, SMALL, tokens, jnp.int32(1), state=s0).logits, atol=1e-5, rtol=0
    )


# Controls: the oracle must notice.


def test_control_without_freezing(monkeypatch):
    def never_held(params, config, s, injected, ctx, past=None, held=None, active=None):
        return core_step(params, config, s, injected, ctx, past)

    monkeypatch.setattr(rdlm.model.adaptive, "core_step", never_held)
    ours = parallel(SMALL, "latest", "latent_diff", run=compiled(forward))
    assert not agrees(ours, oracle(SMALL, "latest", "latent_diff", [L], ours[1]))


def test_control_own_sets_read_off_by_one(monkeypatch):
    monkeypatch.setattr(rdlm.model.adaptive, "frozen_set", lambda core_kv, i: frozen_set(core_kv, i + 1))
    ours = parallel(SMALL, "4 sets", "latent_diff", run=compiled(forward))
    assert not agrees(ours, oracle(SMALL, "4 sets", "latent_diff", [L], ours[1]))


@pytest.mark.parametrize("policy", ["latest", "4 sets"])
def test_control_cached_sets_read_off_by_one(monkeypatch, policy):
    def next_set(layers, m=None):
        return stored(layers, None if m is None else jnp.minimum(m + 1, layers[0].k.shape[0] - 1))

    monkeypatch.setattr(rdlm.model.adaptive, "stored", next_set)
    run = jax.jit(lambda *args, **kwargs: decode_step(*args, **kwargs), static_argnums=1)
    ours = one_by_one(SMALL, policy, "latent_diff", run=run)
    assert not agrees(ours, oracle(SMALL, policy, "latent_diff", [1] * L, ours[1]))
