"""Exit rules: when has a token thought enough? Small pytrees with pure init / update / exits, as optax does it.

A rule looks at a token after a recurrence (an `Observation`), keeps what it needs of the previous look, and returns a
value and, separately, the decision. Thresholds are leaves of the pytree, so changing one never recompiles; they may
be scalars or one per row of the batch. Values follow spec section 6.

Rules that read logits run coda and head at every look, which costs most of a core recurrence (`flops.check_flops`).
A rule with a gate is asked first whether a look is worth that: `gated_kl` needs about two such looks per token.

A rule of your own is one call (rows B and tokens L lead every array):

    def update(rule, previous, seen):                     # state norm has settled
        norm = jnp.linalg.norm(seen.state, axis=-1)
        return norm, jnp.abs(norm - previous)

    norm_diff = ExitRule(0.01, "norm_diff", init=lambda rule, s0, vocab: jnp.linalg.norm(s0, axis=-1), update=update)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from rdlm.config import ExitName, InputError


class Observation(NamedTuple):
    """What a rule may look at after a recurrence.

    state: [B, L, D] raw latent state s. logits: f32 [B, L, V], or None unless the rule needs them.
    step: int32, recurrences run so far: a scalar, or [B, 1] where rows differ (`rdlm.Engine`).
    """

    state: Array
    logits: Array | None
    step: Array


def _below(rule: ExitRule, value: Array) -> Array:
    return value < rule.threshold_for(value)


def _at_least(rule: ExitRule, value: Array) -> Array:
    return value >= rule.threshold_for(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitRule:
    """An exit rule. Its thresholds, and the weights of a learnt one, are leaves; everything else is static.

    init(rule, s0 [B, L, D], vocab) -> rule state; update(rule, rule state, Observation) -> (rule state, value f32
    [B, L]); decide(rule, value) -> bool [B, L], by default value < threshold.
    gate(rule, rule state, Observation without logits) -> (rule state, bool [B, L]), if any: only tokens for which it is
    true are shown to `update` at this look, and coda and head run only when there is one.
    weights: a pytree of arrays that a learnt rule reads, each as it was learnt or, behind `by_row`, one per row.
    """

    threshold: Any
    kind: str = dataclasses.field(metadata={"static": True})
    init: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    update: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    decide: Callable[..., Array] = dataclasses.field(default=_below, metadata={"static": True})
    needs_logits: bool = dataclasses.field(default=False, metadata={"static": True})
    gate_threshold: Any = None
    gate: Callable[..., Any] | None = dataclasses.field(default=None, metadata={"static": True})
    weights: Any = None

    def threshold_for(self, value: Array) -> Array:
        """The threshold, shaped to compare with values [B, L]."""
        return _per_row(self.threshold, value)


def _per_row(threshold: Any, value: Array) -> Array:
    threshold = jnp.asarray(threshold)
    return threshold[:, None] if threshold.ndim == 1 and value.ndim == 2 else threshold


def init(rule: ExitRule, s0: Float[Array, "B L D"], vocab: int) -> Any:
    """State of `rule` before the first recurrence, for states s0 and V = vocab."""
    return rule.init(rule, s0, vocab)


def update(rule: ExitRule, rule_state: Any, observation: Observation) -> tuple[Any, Float32[Array, "B L"]]:
    """Look once: (new rule state, value)."""
    return rule.update(rule, rule_state, observation)


def by_row(rule: ExitRule, rows: int) -> ExitRule:
    """`rule` with thresholds f32 [rows] and weights [rows, ...]: every row of a batch carries its own."""
    threshold, gate_threshold = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows,)), (rule.threshold, rule.gate_threshold)
    )
    weights = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), rule.weights)
    return dataclasses.replace(rule, threshold=threshold, gate_threshold=gate_threshold, weights=weights)


def is_due(
    ran: Int[Array, "*#tokens"], min_steps: Int[Array, "*#tokens"], check_every: Int[Array, "*#tokens"]
) -> Bool[Array, "*tokens"]:
    """Whether tokens that ran so many recurrences are looked at: after min_steps + 1, then every check_every."""
    return (ran > min_steps) & ((ran - min_steps - 1) % check_every == 0)


def seen_only(seen: Bool[Array, "B L"], new: Any, old: Any) -> Any:
    """A rule's state: `new` for the tokens that were `seen`, `old` for the others."""
    return jax.tree.map(lambda n, o: jnp.where(seen.reshape(seen.shape + (1,) * (n.ndim - 2)), n, o), new, old)


def gate(rule: ExitRule, rule_state: Any, observation: Observation) -> tuple[Any, Bool[Array, "B L"]]:
    """Ask a rule that has a gate which tokens to show it: (new rule state, whether to)."""
    assert rule.gate is not None
    return rule.gate(rule, rule_state, observation)


def exits(rule: ExitRule, value: Float[Array | np.ndarray, "*shape"]) -> Bool[Array, "*shape"]:
    """The decision. Never true for a NaN."""
    return rule.decide(rule, jnp.asarray(value))


def _positive(name: str, threshold: Any) -> Any:
    if not isinstance(threshold, jax.core.Tracer) and not np.all(np.asarray(threshold) >= 0):
        raise InputError(f"exits.{name}: threshold = {threshold!r}: must not be negative")
    return threshold


def _logits(observation: Observation) -> Array:
    if observation.logits is None:
        raise InputError("this exit rule reads logits: declare it with needs_logits=True")
    return jnp.asarray(observation.logits, jnp.float32)


def divergence(log_p: Float32[Array, "... V"], log_q: Float32[Array, "... V"]) -> Float32[Array, "..."]:
    """KL(p || q) of distributions over the last axis, in nats."""
    # sum p (d + exp(-d) - 1) with d = log p - log q equals sum p d, as both sum to one, but every term is positive
    # and second order in d: far less noise in f32 than the difference of large sums.
    d = log_p - log_q
    return jnp.sum(jnp.exp(log_p) * (d + jnp.expm1(-d)), axis=-1)


def _uniform(rule: ExitRule, s0: Array, vocab: int) -> Array:
    return jnp.full((*s0.shape[:-1], vocab), -math.log(vocab), jnp.float32)


def kl(threshold: Any = 5e-4) -> ExitRule:
    """KL(previous || new) of the next-token distributions below `threshold`; the first previous is uniform."""

    return ExitRule(_positive("kl", threshold), "kl", _uniform, _kl_update, needs_logits=True)


def _kl_update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
    new = jax.nn.log_softmax(_logits(seen))
    return new, divergence(previous, new)


def gated_kl(threshold: Any = 5e-4, gate_threshold: Any = 0.1) -> ExitRule:
    """`kl`, evaluated only while the state moves little: ||s - s at the last look|| / ||s|| below `gate_threshold`.

    KL(previous || new) compares a token's distributions at two consecutive *evaluations*, however many looks lie
    between them; the first previous is uniform. So a token stops at its second evaluation at the earliest, and a token
    whose state keeps moving (an orbit) runs to num_steps.
    """
    return ExitRule(
        _positive("gated_kl", threshold), "gated_kl", _gated_init, _gated_update, needs_logits=True,
        gate_threshold=_positive("gated_kl: gate", gate_threshold), gate=_gate,
    )  # fmt: skip


def _gated_init(rule: ExitRule, s0: Array, vocab: int) -> tuple[Array, Array]:
    return s0, _uniform(rule, s0, vocab)


def _gate(rule: ExitRule, previous: tuple[Array, Array], seen: Observation) -> tuple[tuple[Array, Array], Array]:
    state, moved = _latent_update(rule, previous[0], seen)
    return (state, previous[1]), moved < _per_row(rule.gate_threshold, moved)


def _gated_update(rule: ExitRule, previous: tuple[Array, Array], seen: Observation):
    log_p, value = _kl_update(rule, previous[1], seen)
    return (previous[0], log_p), value


def twice(rule: ExitRule) -> ExitRule:
    """Exit when `rule` would at two looks in a row: a token that merely pauses goes on.

    The value is that of the look before when that one would not have stopped, and the present one otherwise.
    """
    static = (rule.kind, rule.init, rule.update, rule.decide, rule.gate)
    init, update, decide, gate = _twice(*static)
    return dataclasses.replace(rule, kind=f"twice({rule.kind})", init=init, update=update, decide=decide, gate=gate)


@functools.cache  # one set of functions per rule, so that equal rules share a compiled program
def _twice(kind, init, update, decide, gate):
    def twice_init(rule: ExitRule, s0: Array, vocab: int):
        return init(rule, s0, vocab), jnp.full(s0.shape[:-1], jnp.nan, jnp.float32)

    def twice_update(rule: ExitRule, previous, seen: Observation):
        inner, before = previous
        inner, now = update(rule, inner, seen)
        return (inner, now), jnp.where(decide(rule, before), now, before)

    def twice_gate(rule: ExitRule, previous, seen: Observation):
        inner, opened = gate(rule, previous[0], seen)
        return (inner, previous[1]), opened

    return twice_init, twice_update, decide, gate and twice_gate


def min_p_kl(threshold: Any = 1e-5, min_p: float = 0.1) -> ExitRule:
    """As `kl`, with probabilities below min_p times the largest replaced by 1/V, then renormalised."""
    kind = f"min_p_kl(min_p={min_p})"
    return ExitRule(_positive("min_p_kl", threshold), kind, _uniform, _min_p_update(min_p), needs_logits=True)


@functools.cache  # one function object per min_p, so that equal rules share a compiled program
def _min_p_update(min_p: float) -> Callable[..., Any]:
    def update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
        p = jax.nn.softmax(_logits(seen))
        p = jnp.where(p < min_p * p.max(-1, keepdims=True), 1 / p.shape[-1], p)
        new = jnp.log(p / p.sum(-1, keepdims=True))
        return new, divergence(previous, new)

    return update


def entropy_diff(threshold: Any = 1e-3) -> ExitRule:
    """|change of entropy| below `threshold`, in nats; the first previous entropy is 100."""
    return ExitRule(
        _positive("entropy_diff", threshold),
        "entropy_diff",
        _entropy_init,
        _entropy_update,
        needs_logits=True,
    )


def _entropy_init(rule: ExitRule, s0: Array, vocab: int) -> Array:
    return jnp.full(s0.shape[:-1], 100.0, jnp.float32)


def _entropy_update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
    p = jax.nn.softmax(_logits(seen))
    entropy = -jnp.sum(p * jnp.log(p + 1e-10), axis=-1)
    return entropy, jnp.abs(entropy - previous)


def latent_diff(threshold: Any = 0.03) -> ExitRule:
    """||s - previous s|| / ||s|| below `threshold`; costs nothing beside the core."""
    return ExitRule(_positive("latent_diff", threshold), "latent_diff", _state_init, _latent_update)


def cosine(threshold: Any = 1e-3) -> ExitRule:
    """1 - cos(s, previous s) below `threshold`. From the zero state the first value is NaN: no exit."""
    return ExitRule(_positive("cosine", threshold), "cosine", _state_init, _cosine_update)


def _state_init(rule: ExitRule, s0: Array, vocab: int) -> Array:
    return s0


def _latent_update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
    s, old = seen.state.astype(jnp.float32), previous.astype(jnp.float32)
    return seen.state, jnp.linalg.norm(s - old, axis=-1) / jnp.linalg.norm(s, axis=-1)


def _cosine_update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
    s, old = seen.state.astype(jnp.float32), previous.astype(jnp.float32)
    norms = jnp.linalg.norm(s, axis=-1) * jnp.linalg.norm(old, axis=-1)
    return seen.state, 1 - jnp.sum(s * old, axis=-1) / norms


def argmax_stability(threshold: Any = 5) -> ExitRule:
    """The most likely token was the same at `threshold` consecutive looks after its first."""
    return ExitRule(
        _positive("argmax_stability", threshold),
        "argmax_stability",
        _argmax_init,
        _argmax_update,
        _at_least,
        needs_logits=True,
    )


def _argmax_init(rule: ExitRule, s0: Array, vocab: int) -> tuple[Array, Array]:
    return jnp.full(s0.shape[:-1], -1, jnp.int32), jnp.zeros(s0.shape[:-1], jnp.int32)


def _argmax_update(rule: ExitRule, previous: tuple[Array, Array], seen: Observation):
    token, count = previous
    new = jnp.argmax(_logits(seen), axis=-1).astype(jnp.int32)
    count = jnp.where(new == token, count + 1, 0)
    return (new, count), count.astype(jnp.float32)


def fixed(r: Any) -> ExitRule:
    """Exit after r recurrences (or num_steps, when that is less)."""
    if not isinstance(r, jax.core.Tracer) and not np.all(np.asarray(r) >= 1):
        raise InputError(f"exits.fixed: r = {r!r}: must be at least 1")
    return ExitRule(r, "fixed", _fixed_init, _fixed_update, _at_least)


def _fixed_init(rule: ExitRule, s0: Array, vocab: int) -> tuple[()]:
    return ()


def _fixed_update(rule: ExitRule, previous: tuple[()], seen: Observation):
    return (), jnp.full(seen.state.shape[:-1], seen.step, jnp.float32)


def margin(threshold: Any = 0.9) -> ExitRule:
    """Confidence: the likeliest token is more probable than the next one by `threshold` or more (CALM's first)."""
    return ExitRule(_positive("margin", threshold), "margin", _fixed_init, _margin_update, _at_least, needs_logits=True)


def _margin_update(rule: ExitRule, previous: tuple[()], seen: Observation):
    best = jax.lax.top_k(jax.nn.softmax(_logits(seen)), 2)[0]
    return (), best[..., 0] - best[..., 1]


def classifier(weights: Any, threshold: Any = 0.5) -> ExitRule:
    """Learnt: sigmoid(w . s + bias) reaches `threshold`; costs 2 D FLOPs a look.

    weights: {"w": f32 [D], "bias": f32 scalar}, such as `experiments.studies.shared.halting` learns them.
    """
    rule_threshold = _positive("classifier", threshold)
    return ExitRule(rule_threshold, "classifier", _fixed_init, _classifier_update, _at_least, weights=weights)


def halting(weights: Any, threshold: Any = 0.5) -> ExitRule:
    """Learnt: the probability of having halted by now reaches `threshold` (PonderNet, Banino et al., 2021).

    A look halts with probability sigmoid(w . s + bias). weights: as of `classifier`.
    """
    return ExitRule(
        _positive("halting", threshold), "halting", _halting_init, _halting_update, _at_least, weights=weights
    )


def unit(weights: Any, state: Float[Array, "*tokens D"]) -> Float32[Array, "*tokens"]:
    """w . s + bias of states [..., B, L, D]; weights as of `classifier`, or one per row."""
    w, bias = (jnp.asarray(weights[name], jnp.float32) for name in ("w", "bias"))
    per_row = w.ndim == 2
    w, bias = (w[:, None], bias[:, None]) if per_row else (jnp.expand_dims(w, range(state.ndim - 1)), bias)
    return jnp.sum(state.astype(jnp.float32) * w, axis=-1) + bias


def _classifier_update(rule: ExitRule, previous: tuple[()], seen: Observation):
    return (), jax.nn.sigmoid(unit(rule.weights, seen.state))


def _halting_init(rule: ExitRule, s0: Array, vocab: int) -> Array:
    return jnp.zeros(s0.shape[:-1], jnp.float32)


def _halting_update(rule: ExitRule, previous: Array, seen: Observation) -> tuple[Array, Array]:
    # Kept as log of the probability of still running: log(1 - sigmoid(x)) = -softplus(x).
    running = previous - jax.nn.softplus(unit(rule.weights, seen.state))
    return running, -jnp.expm1(running)


_NAMED: dict[str, Callable[..., ExitRule]] = {
    make.__name__: make for make in (kl, gated_kl, min_p_kl, entropy_diff, latent_diff, cosine, argmax_stability)
}


@overload
def named(name: ExitName, threshold: float | None = None) -> ExitRule: ...


@overload
def named(name: Literal["none"] | ExitName, threshold: float | None = None) -> ExitRule | None: ...


def named(name: str, threshold: float | None = None) -> ExitRule | None:
    """The rule of this module that a command line calls `name` (`rdlm.config.ExitName`); "none" is None.

    threshold: None is the rule's default; argmax_stability counts, so its threshold is cut to a whole number.
    """
    if name == "none":
        return None
    make = _NAMED[name]
    if threshold is None:
        return make()
    return make(int(threshold) if name == "argmax_stability" else threshold)
