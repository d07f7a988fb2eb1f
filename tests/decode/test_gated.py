"""Gated KL and `twice` in the model, against the slow oracle: forward, decoding and prefill with one exit.

The oracle evaluates the KL at the checks that the gate opens, and takes differences between evaluations. Decisions
closer than 1e-3 (relative) to a threshold follow the model, as in test_adaptive.py, and may be at most 1 %.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle, random_params

from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.config.presets import HUGINN_3P5B
from rdlm.decode import decode_step, prefill
from rdlm.exits import ExitRule
from rdlm.model import forward
from rdlm.model.cache import allocate
from rdlm.perf import flops

SMALL = ModelConfig(
    vocab_size=48, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1,
    coda_layers=2, max_length=32,
)  # fmt: skip
B, L, R = 2, 12, 14
LIMITS, GATES = np.array([0.005, 0.03], np.float32), np.array([0.25, 0.5], np.float32)  # one per row
EVERY_CHECK = {"min_steps": np.zeros(B, np.int32), "check_every": np.ones(B, np.int32)}
SOME_CHECKS = {"min_steps": np.array([1, 0], np.int32), "check_every": np.array([2, 3], np.int32)}
RULES = {  # rule, and the same for the oracle
    "gated_kl": (exits.gated_kl(LIMITS, GATES), {"rule": "kl", "threshold": LIMITS, "gate": GATES}),
    "twice(gated_kl)": (
        exits.twice(exits.gated_kl(3 * LIMITS, GATES)),
        {"rule": "kl", "threshold": 3 * LIMITS, "gate": GATES, "twice": True},
    ),
    "twice(kl)": (exits.twice(exits.kl(LIMITS)), {"rule": "kl", "threshold": LIMITS, "twice": True}),
    "twice(latent_diff)": (
        exits.twice(exits.latent_diff(GATES)), {"rule": "latent_diff", "threshold": GATES, "twice": True},
    ),
}  # fmt: skip
POLICIES = {"latest": CachePolicy(), "skip": CachePolicy(lookup="skip"), "4 sets": CachePolicy(4)}


@functools.cache
def inputs():
    """(params, tokens [B, L], s0 [B, L, D], a depth for every token [B, L])."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, SMALL.vocab_size, (B, L))
    s0 = (0.6 * rng.normal(size=(B, L, SMALL.embed_dim))).astype(np.float32)
    return random_params(SMALL), tokens, s0, rng.integers(2, R + 1, (B, L)).astype(np.int32)


@functools.cache
def program(function):
    static = ("cache", "prefill_exit")
    return jax.jit(lambda *args, **named: function(*args, **named), static_argnums=1, static_argnames=static)


def parallel(rule, policy, options, most=None, **others):
    """(logits, steps) of one pass over all tokens."""
    params, tokens, s0, _ = inputs()
    most = np.full((B, L), R, np.int32) if most is None else most
    out = program(forward)(
        params, SMALL, tokens, most, state=s0, exit_rule=rule, cache=POLICIES[policy], **options, **others
    )
    return np.asarray(out.logits), np.asarray(out.steps)


def one_by_one(rule, policy, options):
    """The same, every token in a pass of its own."""
    params, tokens, s0, _ = inputs()
    held, logits, steps = allocate(SMALL, POLICIES[policy], POLICIES[policy].sets(R), B, L, jnp.float32), [], []
    for t in range(L):
        out, held = program(decode_step)(
            params, SMALL, held, tokens[:, t], np.full(B, R, np.int32), state=s0[:, t], exit_rule=rule, **options
        )
        logits.append(out.logits)
        steps.append(out.steps)
    return np.stack(logits, 1), np.stack(steps, 1)


def oracle(asked, policy, options, chunks, steps, most=None, **others):
    """What the oracle makes of the same inputs in chunks of these lengths."""
    params, tokens, s0, _ = inputs()
    most = np.full((B, L), R) if most is None else most
    logits, found, decisions, close = [], [], 0, 0
    for b in range(B):
        mine = {name: value[b] if np.ndim(value) else value for name, value in (asked | options).items()}
        sequence, start = Oracle(params, SMALL, POLICIES[policy]), 0
        for length in chunks:
            at = slice(start, start := start + length)
            done = sequence.process(tokens[b, at], s0[b, at], most[b, at], follow=steps[b, at], **mine, **others)
            logits.append(done.logits)
            found.append(done.steps)
            decisions, close = decisions + done.decisions, close + done.close
    assert close <= 0.01 * decisions
    return np.concatenate(logits).reshape(B, L, -1), np.concatenate(found).reshape(B, L)


def assert_agrees(ours, reference):
    np.testing.assert_array_equal(ours[1], reference[1])
    np.testing.assert_allclose(ours[0], reference[0], atol=3e-4, rtol=0)
    assert len(set(ours[1].ravel().tolist())) > 2  # otherwise nothing was tested


CASES = [("gated_kl", policy) for policy in POLICIES] + [(name, "latest") for name in RULES if name != "gated_kl"]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_parallel_pass(name, policy):
    rule, asked = RULES[name]
    for options in (EVERY_CHECK, SOME_CHECKS):
        ours = parallel(rule, policy, options)
        assert_agrees(ours, oracle(asked, policy, options, [L], ours[1]))


def test_parallel_pass_in_which_every_token_has_its_own_depth():
    rule, asked = RULES["gated_kl"]
    most = inputs()[3]
    ours = parallel(rule, "latest", SOME_CHECKS, most=most)
    assert_agrees(ours, oracle(asked, "latest", SOME_CHECKS, [L], ours[1], most=most))
    assert np.any(ours[1] < most)
    assert np.any(ours[1] == most)


@pytest.mark.parametrize(("name", "policy"), [("gated_kl", "latest"), ("twice(gated_kl)", "4 sets")])
def test_token_by_token(name, policy):
    rule, asked = RULES[name]
    for options in (EVERY_CHECK, SOME_CHECKS):
        ours = one_by_one(rule, policy, options)
        assert_agrees(ours, oracle(asked, policy, options, [1] * L, ours[1]))


@pytest.mark.parametrize("name", ["gated_kl", "twice(gated_kl)"])
def test_one_exit_for_a_prompt(name):
    params, tokens, s0, _ = inputs()
    rule, asked = RULES[name]
    for options in (EVERY_CHECK, SOME_CHECKS):
        out, _ = program(prefill)(
            params, SMALL, tokens, np.full(B, R, np.int32), state=s0, exit_rule=rule, prefill_exit="together", **options
        )
        ours = np.asarray(out.logits), np.asarray(out.steps)
        reference = oracle(asked, "latest", options, [L], ours[1], together=True)
        np.testing.assert_array_equal(ours[1], reference[1])
        np.testing.assert_allclose(ours[0], reference[0], atol=3e-4, rtol=0)
        assert np.ptp(ours[1], axis=1).tolist() == [0, 0]
        assert np.all(ours[1] < R)


# The gate


def ungated(refresh):
    """Gated KL written as a rule that looks at logits every time; `refresh`: which looks the next one compares with."""

    class Ungated(exits.GatedKL):
        gated = False

        def update(self, previous, seen):
            state, log_p = previous
            moved = jnp.linalg.norm(seen.state - state, axis=-1) / jnp.linalg.norm(seen.state, axis=-1)
            opened = moved < GATES[:, None]
            new = jax.nn.log_softmax(seen.logits)
            value = jnp.where(opened, jnp.sum(jnp.exp(log_p) * (log_p - new), axis=-1), jnp.inf)
            return (seen.state, jnp.where(refresh(opened)[..., None], new, log_p)), value

    return Ungated(LIMITS)


def test_control_differences_between_checks_instead_of_evaluations():
    rule, asked = RULES["gated_kl"]
    found = parallel(rule, "latest", EVERY_CHECK)[1]
    same = parallel(ungated(lambda opened: opened), "latest", EVERY_CHECK)[1]
    other = parallel(ungated(jnp.ones_like), "latest", EVERY_CHECK)[1]
    np.testing.assert_array_equal(found, same)
    reference = oracle(asked, "latest", EVERY_CHECK, [L], found)[1]
    np.testing.assert_array_equal(found, reference)
    assert np.any(other != reference)


def test_a_shut_gate_never_looks_and_an_open_one_always():
    looks = []

    class Counted(exits.GatedKL):
        def update(self, previous, seen):
            jax.debug.callback(lambda step: looks.append(int(step)), seen.step)
            return super().update(previous, seen)

    def steps(gate):
        looks.clear()
        rule = Counted(LIMITS, np.full(B, gate, np.float32))
        found = parallel(rule, "latest", EVERY_CHECK)[1]
        jax.effects_barrier()
        return found, sorted(looks)

    counted_programs = program(forward)._cache_size
    found, when = steps(0.0)
    assert np.all(found == R)
    assert when == []
    before = counted_programs()
    found, when = steps(np.inf)
    assert when == list(range(1, found.max() + 1))
    np.testing.assert_array_equal(found, parallel(exits.kl(LIMITS), "latest", EVERY_CHECK)[1])
    found, when = steps(0.25)
    assert 0 < len(when) < found.max() - 1
    assert counted_programs() == before + 1  # that of kl: neither limits nor gates are part of a program


def test_what_a_look_costs():
    # About 0.69 of a recurrence in operations, for the published model in the middle of 2,048 positions.
    ratio = flops.check_flops(HUGINN_3P5B, 1024) / flops.core_flops(HUGINN_3P5B, 1024)
    assert round(ratio, 3) == 0.689
    streamed = flops.check_bytes(HUGINN_3P5B, 2) / flops.core_bytes(HUGINN_3P5B, 2)
    layer, D = flops.block_matrices(HUGINN_3P5B), HUGINN_3P5B.embed_dim
    assert streamed == (2 * layer + HUGINN_3P5B.rows * D) / (4 * layer + D * D)
    assert flops.check_bytes(HUGINN_3P5B, 2) == 2 * flops.check_bytes(HUGINN_3P5B, 1)


# Rows do not look for each other


def test_a_row_is_not_asked_when_its_neighbour_is():
    # A rule on the last bits of the logits, two layers of coda, and tokens that stopped between two looks of their row.
    class Fine(ExitRule):
        threshold: float = 0.15
        needs_logits = True

        def init(self, s0, vocab):
            return ()

        def update(self, previous, seen):
            return (), jnp.mod(1e3 * jnp.abs(seen.logits).sum(-1), 1)

    fine = Fine()
    most = inputs()[3]

    def first_row(min_steps, every):
        options = {"min_steps": np.array([2, min_steps], np.int32), "check_every": np.array([4, every], np.int32)}
        logits, steps = parallel(fine, "latest", options, most=most)
        return logits[0], steps[0]

    logits, steps = first_row(R, 1)  # the neighbour never looks
    assert np.any(steps < most[0])
    for schedule in ((0, 1), (1, 2)):
        for ours, theirs in zip((logits, steps), first_row(*schedule), strict=True):
            np.testing.assert_array_equal(ours, theirs)
