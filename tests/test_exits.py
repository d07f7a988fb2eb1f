"""Exit rules: every value against a direct numpy formula, decisions per row, and rules as small pytrees."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import latest_value, log_softmax, random_params

from rdlm import exits
from rdlm.config import InputError, ModelConfig
from rdlm.exits import Observation
from rdlm.model import forward

B, L, D, V, CHECKS = 2, 3, 8, 12, 6
RULES = {
    "kl": exits.kl,
    "min_p_kl": exits.min_p_kl,
    "entropy_diff": exits.entropy_diff,
    "latent_diff": exits.latent_diff,
    "cosine": exits.cosine,
    "argmax_stability": exits.argmax_stability,
}


def draws(seed=0):
    """States [CHECKS + 1, B, L, D] and logits [CHECKS, B, L, V] that settle as a recurrence does."""
    rng = np.random.default_rng(seed)
    fade = 0.5 ** np.arange(CHECKS + 1)
    states = rng.normal(size=(B, L, D)) + fade[:, None, None, None] * rng.normal(size=(CHECKS + 1, B, L, D))
    logits = 3 * rng.normal(size=(B, L, V)) + 3 * fade[1:, None, None, None] * rng.normal(size=(CHECKS, B, L, V))
    return states.astype(np.float32), logits.astype(np.float32)


def values(rule, states, logits):
    """What the rule says at every check, [CHECKS, B, L]."""
    look = jax.jit(exits.update)
    state, found = exits.init(rule, jnp.asarray(states[0]), V), []
    for i, seen in enumerate(states[1:]):
        state, value = look(rule, state, Observation(seen, logits[i] if rule.needs_logits else None, jnp.int32(i + 1)))
        found.append(np.asarray(value))
    return np.array(found)


def exits_at(rule, states, logits):
    """The first check at which the rule says to exit, int [B, L]; CHECKS: none."""
    decided = np.asarray([exits.exits(rule, jnp.asarray(value)) for value in values(rule, states, logits)])
    return np.where(decided.any(0), decided.argmax(0), CHECKS)


@pytest.mark.parametrize("rule", [exits.kl(0.05), exits.argmax_stability(2), exits.latent_diff(0.2)])
def test_delayed_exits_one_check_later(rule):
    at = np.concatenate([exits_at(rule, *draws(seed)) for seed in range(8)])
    delayed = np.concatenate([exits_at(exits.delayed(rule), *draws(seed)) for seed in range(8)])
    np.testing.assert_array_equal(delayed, np.minimum(at + 1, CHECKS))
    assert len(set(at.ravel())) > 2


@pytest.mark.parametrize("kind", RULES)
def test_values(kind):
    states, logits = draws()
    ours = values(RULES[kind](), states, logits)
    for i in range(CHECKS):
        for b, t in np.ndindex(B, L):
            seen = states[: i + 2, b, t].astype(np.float64), logits[: i + 1, b, t].astype(np.float64)
            assert ours[i, b, t] == pytest.approx(latest_value(kind, *seen), rel=1e-3, abs=1e-6)
    # Control: with the neighbour's logits or states, the values are others.
    swapped = values(RULES[kind](), states[:, ::-1], logits[:, ::-1])
    assert not np.allclose(ours, swapped, rtol=1e-3, atol=1e-6)


def test_first_values():
    # What the first check compares with (docs/model.md, Exit rules).
    states, logits = draws()
    states[0] = 0
    np.testing.assert_allclose(values(exits.latent_diff(), states, logits)[0], 1, rtol=1e-6)
    assert not np.any(exits.exits(exits.latent_diff(1.0 - 1e-3), values(exits.latent_diff(), states, logits)[0]))
    first = values(exits.cosine(), states, logits)[0]
    assert np.all(np.isnan(first))
    assert not np.any(exits.exits(exits.cosine(1e9), first))
    p = np.exp(log_softmax(logits[0].astype(np.float64)))
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(values(exits.entropy_diff(), states, logits)[0], 100 - entropy, rtol=1e-5)
    from_uniform = (np.log(1 / V) - np.log(p)).mean(-1)
    np.testing.assert_allclose(values(exits.kl(), states, logits)[0], from_uniform, rtol=1e-4)
    assert not np.any(values(exits.argmax_stability(), states, logits)[0])


def test_argmax_counts_looks_since_the_last_change():
    best = np.array([3, 3, 5, 5, 5, 3])
    logits = np.zeros((CHECKS, B, L, V), np.float32)
    logits[np.arange(CHECKS), :, :, best] = 1
    ours = values(exits.argmax_stability(), draws()[0], logits)
    assert ours[:, 0, 0].tolist() == [0, 1, 0, 1, 2, 0]
    assert np.asarray(exits.exits(exits.argmax_stability(2), ours[:, 0])).any(1).tolist() == [0, 0, 0, 0, 1, 0]


def test_fixed_counts_recurrences():
    rule = exits.fixed(3)
    assert values(rule, *draws())[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.asarray(exits.exits(rule, jnp.array([[2.0], [3.0], [4.0]]))).ravel().tolist() == [False, True, True]


@pytest.mark.parametrize("kind", RULES)
def test_thresholds_per_row(kind):
    value = jnp.array([[0.5, 1.5, 2.5], [0.5, 1.5, 2.5]])
    decided = exits.exits(RULES[kind](np.array([1.0, 2.0], np.float32)), value)
    expected = [[True, False, False], [True, True, False]]
    if kind == "argmax_stability":
        expected = [[False, True, True], [False, False, True]]
    assert np.asarray(decided).tolist() == expected


@pytest.mark.parametrize("kind", [*RULES, "fixed"])
def test_a_list_of_thresholds_is_one_per_row(kind):
    make = getattr(exits, kind)
    for rule in (make([1, 2]), make((1, 2)).by_row(2), exits.twice(make([1, 2])).by_row(2)):
        [leaf] = jax.tree.leaves(rule)
        assert np.asarray(leaf).tolist() == [1, 2]


def test_learnt_weights_are_not_spread_over_rows():
    class Mine(exits.ExitRule):
        weights: jax.Array
        threshold: exits.Threshold = 0.5

        def thresholds(self):
            return [self.threshold]

    for weights in (jnp.arange(2.0), jnp.ones((3, 4))):  # D = B, and shapes that cannot be spread
        rule = Mine(weights).by_row(2)
        assert np.array_equal(rule.weights, weights)
        assert np.asarray(rule.threshold).tolist() == [0.5, 0.5]


def test_default_thresholds():
    # The paper's and the reference's (docs/model.md, Exit rules).
    found = {kind: rule().threshold for kind, rule in RULES.items()}
    assert found == {
        "kl": 5e-4, "min_p_kl": 1e-5, "entropy_diff": 1e-3, "latent_diff": 0.03, "cosine": 1e-3, "argmax_stability": 5
    }  # fmt: skip


def test_a_threshold_is_the_only_leaf_and_does_not_recompile():
    @jax.jit
    def decide(rule, states, logits):
        state = exits.init(rule, states[0], V)
        state, value = exits.update(rule, state, Observation(states[1], logits[0], jnp.int32(1)))
        return exits.exits(rule, value)

    states, logits = draws()
    for kind, rule in RULES.items():
        before = decide._cache_size()
        decided = [np.asarray(decide(rule(t), states, logits)) for t in (0.0, 0.1, 1.0, 1e3)]
        assert decide._cache_size() == before + 1, kind
        assert len(jax.tree.leaves(rule(0.5))) == 1
        assert np.any(decided[0] != decided[-1]), kind
    decide(exits.min_p_kl(0.1, min_p=0.2), states, logits)  # min_p is static: another program, once
    decide(exits.min_p_kl(0.5, min_p=0.2), states, logits)
    assert decide._cache_size() == len(RULES) + 1


def test_kl_stays_accurate_where_it_is_tiny():
    # Thresholds are 1e-5 and less, where the difference of two sums over a vocabulary is mostly rounding.
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(1, 1, 20, 32768)).astype(np.float32)
    moved = logits + 1e-3 * rng.normal(size=logits.shape).astype(np.float32)
    log_p, log_q = log_softmax(logits.astype(np.float64)), log_softmax(moved.astype(np.float64))
    exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)[0]
    assert exact.max() < 1e-6
    rule, state = exits.kl(), np.zeros((1, 20, D), np.float32)
    previous, _ = exits.update(rule, exits.init(rule, jnp.asarray(state), 32768), Observation(state, logits[0], 1))
    _, ours = exits.update(rule, previous, Observation(state, moved[0], 2))
    np.testing.assert_allclose(ours, exact, rtol=1e-3)
    # Control: the formula as one writes it down, in the same precision.
    log_p, log_q = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(moved[0])
    naive = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
    assert np.abs(naive / exact - 1).max() > 0.01


@pytest.mark.parametrize("kind", RULES)
def test_twice_wants_two_looks_in_a_row(kind):
    states, logits = draws()
    plain = values(RULES[kind](), states, logits)
    rule = RULES[kind](float(np.nanmedian(plain)))
    once = np.asarray(exits.exits(rule, plain))
    again = np.concatenate([np.zeros_like(once[:1]), once[:-1]])
    in_a_row, pauses = once & again, once & ~again
    for asked, expected in (
        (exits.twice(rule), in_a_row),
        (exits.twice(exits.twice(rule)), in_a_row & np.roll(again, 1, 0)),
    ):
        found = values(asked, states, logits)
        np.testing.assert_array_equal(exits.exits(asked, found), expected)
    assert np.any(in_a_row)
    assert np.any(pauses)  # where `rule` alone would have stopped


def test_twice_of_equal_rules_is_one_program():
    def structure(rule):
        return jax.tree.structure(exits.twice(rule))

    assert structure(exits.kl(0.1)) == structure(exits.kl(0.2))
    assert structure(exits.min_p_kl(min_p=0.2)) == structure(exits.min_p_kl(0.1, min_p=0.2))
    others = [exits.kl(), exits.min_p_kl(), exits.min_p_kl(min_p=0.2), exits.gated_kl(), exits.twice(exits.kl())]
    assert len({structure(rule) for rule in others}) == len(others)


@pytest.mark.parametrize("gate", [-0.1, float("nan"), np.array([0.1, -1.0])], ids=str)
def test_bad_gates_are_refused(gate):
    with pytest.raises(InputError, match=r"exits\.gated_kl: gate_threshold"):
        exits.gated_kl(gate_threshold=gate)
    with pytest.raises(InputError, match=r"exits\.gated_kl: threshold"):
        exits.gated_kl(gate)


TINY = ModelConfig(
    vocab_size=V, embed_dim=D, num_heads=2, mlp_dim=8, prelude_layers=1, core_layers=1, coda_layers=1, max_length=16
)


def test_the_rule_of_the_docstring_runs():
    # "A rule of your own is one small class": the code a user reads there, executed as it stands.
    code = textwrap.dedent(exits.__doc__.split("L):")[1])
    assert len(code.strip().splitlines()) <= 10
    names = {"jnp": jnp, "ExitRule": exits.ExitRule}
    exec(code, names)
    rule = names["NormDiff"]()
    states, logits = draws()
    norms = np.linalg.norm(states, axis=-1)
    np.testing.assert_allclose(values(rule, states, logits), np.abs(np.diff(norms, axis=0)), rtol=1e-4, atol=1e-6)
    # In the model: single tokens, which attend to nobody, stop where their norms have settled.
    params, tokens, run = random_params(TINY), np.arange(V)[:, None], jax.jit(forward, static_argnums=1)
    states = [run(params, TINY, tokens, jnp.int32(r)).state for r in range(9)]
    settled = np.abs(np.diff(np.linalg.norm(states, axis=-1)[..., 0], axis=0)) < 0.01  # [recurrence, token]
    out = run(params, TINY, tokens, jnp.int32(8), exit_rule=rule)
    assert np.array_equal(out.steps[:, 0], np.where(settled.any(0), 1 + settled.argmax(0), 8))
    assert len(set(out.steps[:, 0].tolist())) > 2


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("threshold", [-1e-3, float("nan"), np.array([1e-3, -1.0]), [0.1, float("nan")]], ids=str)
def test_bad_thresholds_are_refused(kind, threshold):
    with pytest.raises(InputError, match=f"exits.{kind}: threshold"):
        RULES[kind](threshold)


@pytest.mark.parametrize("r", [0, -2, np.array([3, 0])], ids=str)
def test_bad_fixed_depths_are_refused(r):
    with pytest.raises(InputError, match="at least 1"):
        exits.fixed(r)


def test_a_rule_that_reads_logits_must_say_so():
    class Mine(exits.KL):
        needs_logits = False

    with pytest.raises(InputError, match="needs_logits"):
        values(Mine(0.1), *draws())
