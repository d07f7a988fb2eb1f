"""Exit rules: has a token run enough recurrences? Small pytrees with pure init, update and exits, as in optax.

At a check, a rule sees the token after a recurrence (an `Observation`), keeps what the next check needs, and returns a
value and, separately, the decision. Its class and static fields select the compiled program; its thresholds are leaves,
a scalar or one per row of the batch, so changing one never recompiles. Formulas: docs/model.md, Exit rules.

Rules that read logits run coda and head at every check, which costs most of a recurrence (`perf.flops.check_flops`). A
gate first decides from the state alone whether a check is worth that: `gated_kl` needs about two checks per token.

A rule of your own is one small class (arrays start with the axes rows B and tokens L):

    class NormDiff(ExitRule):
        threshold: float = 0.01  # exit when the norm of the state changes by less

        def init(self, s0, vocab):
            return jnp.linalg.norm(s0, axis=-1)

        def update(self, previous, seen):
            norm = jnp.linalg.norm(seen.state, axis=-1)
            return norm, jnp.abs(norm - previous)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, Literal, NamedTuple, dataclass_transform, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32, Int, PyTree

from rdlm.config import ExitName, InputError, did_you_mean

Threshold = ArrayLike | Sequence[float | np.floating]
"""A scalar, or one per row of the batch."""
Counts = ArrayLike | Sequence[int | np.integer]
"""Numbers of recurrences as users give them: a scalar, one per row [B] or one per token [B, L]."""


class Observation(NamedTuple):
    """What a rule sees of every token after a recurrence."""

    state: Array  # [B, L, D], the raw latent state s
    logits: Array | None  # f32 [B, L, V], or None unless the rule needs them
    step: Array  # int32, recurrences run so far: a scalar, or [B, 1] where rows differ (`rdlm.Engine`)
    gate: Array | None = None  # f32 [B, L], logit of the model's exit gate, if it has one


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class ExitRule:
    """An exit rule. Every subclass is made a frozen dataclass and a pytree; fields marked static are no leaves.

    A subclass implements `init` and `update`. `decide` compares the value with `threshold` unless it is overridden.
    """

    threshold: Threshold
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[PyTree]]]

    def __init_subclass__(cls) -> None:
        """Register the subclass."""
        dataclasses.dataclass(frozen=True)(cls)
        fields = dataclasses.fields(cls)
        static = [field.name for field in fields if field.metadata.get("static")]
        leaves = [field.name for field in fields if field.name not in static]

        def flatten(rule: ExitRule) -> tuple[list[PyTree], tuple[Hashable, ...]]:
            return [getattr(rule, name) for name in leaves], tuple(getattr(rule, name) for name in static)

        def unflatten(fixed: tuple[Hashable, ...], values: Sequence[PyTree]) -> ExitRule:
            rule = object.__new__(cls)  # without the checks of the constructor: JAX also stores placeholders in rules
            vars(rule).update(zip(leaves, values, strict=True), **dict(zip(static, fixed, strict=True)))
            return rule

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    def __post_init__(self) -> None:
        """Refuse negative thresholds, and store sequences as arrays."""
        for name in [name for name in vars(self) if name.endswith("threshold")]:
            self._set_threshold(name, 0, "must not be negative")

    def _set_threshold(self, name: str, minimum: float, message: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, jax.core.Tracer) and not _at_least(value, minimum):
            raise InputError(f"exits.{self.kind}: {name} = {value!r}: {message}")
        if isinstance(value, (list, tuple)):  # a pytree of scalars otherwise
            vars(self)[name] = np.asarray(value)

    @property
    def kind(self) -> str:
        """Name of the rule in messages and results."""
        return type(self).__name__

    @property
    def needs_logits(self) -> bool:
        """Whether observations must contain logits."""
        return False

    @property
    def gated(self) -> bool:
        """Whether the rule implements `open_gate`."""
        return False

    @property
    def every_check(self) -> bool:
        """Whether the rule must be checked after every recurrence, from the first on."""
        return False

    def init(self, s0: Array, vocab: int) -> PyTree:
        """State of the rule before the first recurrence, for states s0 [B, L, D] and V = vocab."""
        raise NotImplementedError

    def update(self, previous: PyTree, seen: Observation) -> tuple[PyTree, Array]:
        """One check: (new rule state, value f32 [B, L])."""
        raise NotImplementedError

    def decide(self, value: Array) -> Array:
        """Which tokens exit, bool [B, L]: those with value < threshold."""
        return value < per_row(self.threshold, value)

    def open_gate(self, previous: PyTree, seen: Observation) -> tuple[PyTree, Bool[Array, "B L"]]:
        """For gated rules: (new rule state, which tokens to check). `seen` has no logits.

        Only those tokens are shown to `update`, and coda and head run only if there is one.
        """
        raise NotImplementedError

    def thresholds(self) -> list[Threshold]:
        """Leaves that are a scalar or one per row; a learnt rule leaves out its weights."""
        return jax.tree.leaves(self)

    def by_row(self, rows: int) -> ExitRule:
        """The rule with all `thresholds()` as f32 [rows]: every row of a batch has its own.

        `rdlm.Engine` needs an axis of rows on the other leaves too: a learnt rule that it serves overrides this.
        """
        thresholds = {id(threshold) for threshold in self.thresholds()}
        return jax.tree.map(lambda leaf: spread(leaf, rows) if id(leaf) in thresholds else leaf, self)


def _at_least(value: object, minimum: float) -> bool:
    """Whether all of a number or an array are; False if there are no numbers."""
    try:
        array = np.asarray(value)
        return bool(array.dtype.kind not in "bcUS" and np.all(array >= minimum))
    except (TypeError, ValueError):
        return False


class Reached(ExitRule):
    """A rule whose value must reach the threshold."""

    def decide(self, value: Array) -> Array:
        return value >= per_row(self.threshold, value)


def spread(threshold: Threshold, rows: int) -> np.ndarray:
    """A threshold as f32 [rows], on the host; one for each of fewer prompts serves all rows of its prompt."""
    each = np.asarray(threshold, np.float32)
    return np.repeat(each, rows // len(each)) if each.ndim else np.broadcast_to(each, (rows,))


def per_row(threshold: Threshold, value: Array) -> Array:
    """A threshold, shaped to compare with values [B, L]."""
    threshold = jnp.asarray(threshold)
    return threshold[:, None] if threshold.ndim == 1 and value.ndim == 2 else threshold


def init(rule: ExitRule, s0: Float[Array, "B L D"], vocab: int) -> PyTree:
    """State of `rule` before the first recurrence, for states s0 and V = vocab."""
    return rule.init(s0, vocab)


def update(rule: ExitRule, rule_state: PyTree, observation: Observation) -> tuple[PyTree, Float32[Array, "B L"]]:
    """One check: (new rule state, value)."""
    return rule.update(rule_state, observation)


def exits(rule: ExitRule, value: Float[Array | np.ndarray, "*shape"]) -> Bool[Array, "*shape"]:
    """The decision. Never true for a NaN."""
    return rule.decide(jnp.asarray(value))


class Depth(NamedTuple):
    """When tokens stop: after `num_steps` recurrences, earlier if `rule` says so at a check."""

    num_steps: Array | int  # maximum, at least 1
    rule: ExitRule | None = None
    min_steps: Array | int = 0  # recurrences before the first check
    check_every: Array | int = 1  # recurrences from one check to the next

    def due(self, ran: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether tokens that ran so many recurrences are checked: after min_steps + 1, then every check_every."""
        return (ran > self.min_steps) & ((ran - self.min_steps - 1) % self.check_every == 0)

    def per_token(self, shape: tuple[int, ...]) -> Depth:
        """The same with int32 numbers of this shape [B, L]."""

        def each(value: Array | int) -> Array:
            array = jnp.asarray(value, jnp.int32)
            return jnp.broadcast_to(array[:, None] if array.ndim == 1 else array, shape)

        return Depth(each(self.num_steps), self.rule, each(self.min_steps), each(self.check_every))


def seen_only(seen: Bool[Array, "B L"], new: PyTree, old: PyTree) -> PyTree:
    """A rule's state: `new` for the tokens that were `seen`, `old` for the others."""
    return jax.tree.map(lambda n, o: jnp.where(seen.reshape(seen.shape + (1,) * (n.ndim - 2)), n, o), new, old)


def divergence(log_p: Float32[Array, "... V"], log_q: Float32[Array, "... V"]) -> Float32[Array, "..."]:
    """KL(p || q) of distributions over the last axis, in nats."""
    # sum p (d + exp(-d) - 1) with d = log p - log q equals sum p d, as both sum to one, but every term is positive
    # and second order in d: far less noise in f32 than the difference of large sums.
    d = log_p - log_q
    return jnp.sum(jnp.exp(log_p) * (d + jnp.expm1(-d)), axis=-1)


def read_logits(seen: Observation) -> Array:
    """The logits of an observation, in f32.

    Raises:
      InputError: a rule that reads logits does not say so.
    """
    if seen.logits is None:
        raise InputError("this exit rule reads logits: declare it with needs_logits = True")
    return jnp.asarray(seen.logits, jnp.float32)


def _uniform(s0: Array, vocab: int) -> Array:
    return jnp.full((*s0.shape[:-1], vocab), -math.log(vocab), jnp.float32)


def _kl(previous: Array, seen: Observation) -> tuple[Array, Array]:
    new = jax.nn.log_softmax(read_logits(seen))
    return new, divergence(previous, new)


def _moved(seen: Observation, previous: Array) -> Array:
    """||s - previous s|| / ||s||."""
    s, old = seen.state.astype(jnp.float32), previous.astype(jnp.float32)
    return jnp.linalg.norm(s - old, axis=-1) / jnp.linalg.norm(s, axis=-1)


class KL(ExitRule):
    """KL(previous || new) of the next-token distributions below `threshold`; the first previous is uniform."""

    threshold: Threshold = 5e-4
    kind = "kl"
    needs_logits = True

    def init(self, s0: Array, vocab: int) -> Array:
        return _uniform(s0, vocab)

    def update(self, previous: Array, seen: Observation) -> tuple[Array, Array]:
        return _kl(previous, seen)


class GatedKL(ExitRule):
    """`kl`, evaluated only while the state moves little: ||s - s at the last check|| / ||s|| below `gate_threshold`.

    KL(previous || new) compares a token's distributions at two consecutive *evaluations*, however many checks lie
    between them; the first previous is uniform. So a token exits at its second evaluation at the earliest, and a token
    whose state keeps moving (an orbit) runs to num_steps.
    """

    threshold: Threshold = 5e-4
    gate_threshold: Threshold = 0.1
    kind = "gated_kl"
    needs_logits = True
    gated = True

    def init(self, s0: Array, vocab: int) -> tuple[Array, Array]:
        return s0, _uniform(s0, vocab)

    def open_gate(self, previous: tuple[Array, Array], seen: Observation) -> tuple[tuple[Array, Array], Array]:
        moved = _moved(seen, previous[0])
        return (seen.state, previous[1]), moved < per_row(self.gate_threshold, moved)

    def update(self, previous: tuple[Array, Array], seen: Observation) -> tuple[tuple[Array, Array], Array]:
        new, value = _kl(previous[1], seen)
        return (previous[0], new), value


class MinPKL(KL):
    """As `kl`, with probabilities below min_p times the largest replaced by 1/V, then renormalised."""

    threshold: Threshold = 1e-5
    min_p: float = dataclasses.field(default=0.1, metadata={"static": True})

    @property
    def kind(self) -> str:  # type: ignore[override] # a class attribute of KL
        return "min_p_kl" if self.min_p == 0.1 else f"min_p_kl(min_p={self.min_p:g})"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_at_least(self.min_p, 0) and _at_least(-self.min_p, -1)):
            raise InputError(f"exits.min_p_kl: min_p = {self.min_p!r}: must be in [0, 1]")

    def update(self, previous: Array, seen: Observation) -> tuple[Array, Array]:
        p = jax.nn.softmax(read_logits(seen))
        p = jnp.where(p < self.min_p * p.max(-1, keepdims=True), 1 / p.shape[-1], p)
        new = jnp.log(p / p.sum(-1, keepdims=True))
        return new, divergence(previous, new)


class EntropyDiff(ExitRule):
    """|change of entropy| below `threshold`, in nats; the first previous entropy is 100."""

    threshold: Threshold = 1e-3
    kind = "entropy_diff"
    needs_logits = True

    def init(self, s0: Array, vocab: int) -> Array:
        return jnp.full(s0.shape[:-1], 100.0, jnp.float32)

    def update(self, previous: Array, seen: Observation) -> tuple[Array, Array]:
        p = jax.nn.softmax(read_logits(seen))
        entropy = -jnp.sum(p * jnp.log(p + 1e-10), axis=-1)
        return entropy, jnp.abs(entropy - previous)


class LatentDiff(ExitRule):
    """||s - previous s|| / ||s|| below `threshold`; costs nothing beside the core."""

    threshold: Threshold = 0.03
    kind = "latent_diff"

    def init(self, s0: Array, vocab: int) -> Array:
        return s0

    def update(self, previous: Array, seen: Observation) -> tuple[Array, Array]:
        return seen.state, _moved(seen, previous)


class Cosine(LatentDiff):
    """1 - cos(s, previous s) below `threshold`. From the zero state the first value is NaN: no exit."""

    threshold: Threshold = 1e-3
    kind = "cosine"

    def update(self, previous: Array, seen: Observation) -> tuple[Array, Array]:
        s, old = seen.state.astype(jnp.float32), previous.astype(jnp.float32)
        norms = jnp.linalg.norm(s, axis=-1) * jnp.linalg.norm(old, axis=-1)
        return seen.state, 1 - jnp.sum(s * old, axis=-1) / norms


class ArgmaxStability(Reached):
    """The most likely token was the same at `threshold` consecutive checks after its first."""

    threshold: Threshold = 5
    kind = "argmax_stability"
    needs_logits = True

    def init(self, s0: Array, vocab: int) -> tuple[Array, Array]:
        return jnp.full(s0.shape[:-1], -1, jnp.int32), jnp.zeros(s0.shape[:-1], jnp.int32)

    def update(self, previous: tuple[Array, Array], seen: Observation) -> tuple[tuple[Array, Array], Array]:
        token, count = previous
        new = jnp.argmax(read_logits(seen), axis=-1).astype(jnp.int32)
        count = jnp.where(new == token, count + 1, 0)
        return (new, count), count.astype(jnp.float32)


class Fixed(ExitRule):
    """Exit after r recurrences (or num_steps, when that is less)."""

    r: Threshold
    kind = "fixed"

    def __post_init__(self) -> None:
        self._set_threshold("r", 1, "must be at least 1")

    def init(self, s0: Array, vocab: int) -> tuple[()]:
        return ()

    def update(self, previous: tuple[()], seen: Observation) -> tuple[tuple[()], Array]:
        return (), jnp.full(seen.state.shape[:-1], seen.step, jnp.float32)

    def decide(self, value: Array) -> Array:
        return value >= per_row(self.r, value)


class Gate(Reached):
    """The model's own exit gate: exit once the probability of having stopped reaches `threshold`; never from 1 on.

    After recurrence t the gate stops a token with probability sigmoid(gate), if nothing has stopped it before. The
    value is the sum of these probabilities over all recurrences so far, so every one of them must be checked
    (min_steps = 0, check_every = 1). (arXiv 2510.25741)
    """

    threshold: Threshold = 0.9
    kind = "gate"
    every_check = True

    def init(self, s0: Array, vocab: int) -> tuple[Array, Array]:
        return jnp.ones(s0.shape[:-1], jnp.float32), jnp.zeros(s0.shape[:-1], jnp.float32)

    def update(self, previous: tuple[Array, Array], seen: Observation) -> tuple[tuple[Array, Array], Array]:
        if seen.gate is None:
            raise InputError("exits.gate: this model has no exit gate (config.loop.gate is false)")
        running, stopped = previous
        p = jax.nn.sigmoid(seen.gate)
        stopped = stopped + p * running
        return (running * (1 - p), stopped), stopped

    def decide(self, value: Array) -> Array:
        threshold = per_row(self.threshold, value)
        return (value >= threshold) & (threshold < 1)


def exit_probabilities(gate: Float[Array, "T *tokens"]) -> Float32[Array, "T *tokens"]:
    """Probability of stopping after each of T recurrences, from the gate's logits; the last takes what remains.

    p_t = g_t (1 - g_1) ... (1 - g_{t-1}) for t < T, with g = sigmoid(gate) (arXiv 2510.25741).
    """
    p = jax.nn.sigmoid(gate.astype(jnp.float32))
    stay = jnp.cumprod(1 - p, axis=0)
    before = jnp.concatenate([jnp.ones_like(stay[:1]), stay[:-1]])
    return jnp.concatenate([before[:-1] * p[:-1], before[-1:]])


class Acceleration(ExitRule):
    """||change of the last step|| / ||state|| below `threshold` at two checks in a row.

    A step is the difference of the states at two consecutive checks, so the value is a second difference
    (arXiv 2509.23314). It is infinite at the first two checks, so no token exits before the third.
    """

    threshold: Threshold = 0.05
    kind = "acceleration"

    def init(self, s0: Array, vocab: int) -> tuple[Array, Array, Array]:
        return s0, jnp.full_like(s0, jnp.inf), jnp.full(s0.shape[:-1], jnp.inf, jnp.float32)

    def update(
        self, previous: tuple[Array, Array, Array], seen: Observation
    ) -> tuple[tuple[Array, Array, Array], Array]:
        old, step, before = previous
        new = seen.state - old
        change = (new - step).astype(jnp.float32)
        now = jnp.linalg.norm(change, axis=-1) / jnp.linalg.norm(seen.state.astype(jnp.float32), axis=-1)
        return (seen.state, new, now), jnp.maximum(before, now)


class Delayed(ExitRule):
    """Exit one check after `rule` would: the token's last keys and values are of a state that `rule` was content with.

    Those of the recurrence after which `rule` is content were made from the state before it. Later tokens read them,
    so a rule that stops as soon as an answer is there hides that answer from them (docs/studies/early-exits.md).

    The value is that of the previous check.
    """

    rule: ExitRule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, ExitRule):
            name = type(self).__name__.lower()
            raise InputError(f"exits.{name}: rule = {self.rule!r}: must be a rule such as rdlm.exits.kl()")

    @property
    def kind(self) -> str:
        return f"{type(self).__name__.lower()}({self.rule.kind})"

    @property
    def needs_logits(self) -> bool:
        return self.rule.needs_logits

    @property
    def gated(self) -> bool:
        return self.rule.gated

    @property
    def every_check(self) -> bool:
        return self.rule.every_check

    def init(self, s0: Array, vocab: int) -> tuple[PyTree, Array]:
        return self.rule.init(s0, vocab), jnp.full(s0.shape[:-1], jnp.nan, jnp.float32)

    def update(self, previous: tuple[PyTree, Array], seen: Observation) -> tuple[tuple[PyTree, Array], Array]:
        inner, before = previous
        inner, now = self.rule.update(inner, seen)
        return (inner, now), before

    def decide(self, value: Array) -> Array:
        return self.rule.decide(value)

    def open_gate(self, previous: tuple[PyTree, Array], seen: Observation) -> tuple[tuple[PyTree, Array], Array]:
        inner, opened = self.rule.open_gate(previous[0], seen)
        return (inner, previous[1]), opened

    def thresholds(self) -> list[Threshold]:
        return self.rule.thresholds()

    def by_row(self, rows: int) -> Delayed:
        return type(self)(self.rule.by_row(rows))


class Twice(Delayed):
    """Exit when `rule` would at two checks in a row: a token that merely pauses continues.

    The value is that of the previous check if that one would not have exited, and the present one otherwise.
    """

    def update(self, previous: tuple[PyTree, Array], seen: Observation) -> tuple[tuple[PyTree, Array], Array]:
        (inner, now), before = super().update(previous, seen)
        return (inner, now), jnp.where(self.rule.decide(before), now, before)


kl = KL
gated_kl = GatedKL
min_p_kl = MinPKL
entropy_diff = EntropyDiff
latent_diff = LatentDiff
cosine = Cosine
argmax_stability = ArgmaxStability
fixed = Fixed
gate = Gate
acceleration = Acceleration
delayed = Delayed
twice = Twice


@overload
def named(name: ExitName, threshold: float | None = None) -> ExitRule: ...


@overload
def named(name: Literal["none"] | ExitName, threshold: float | None = None) -> ExitRule | None: ...


def named(name: str, threshold: float | None = None) -> ExitRule | None:
    """The rule of this module that command lines call `name` (`rdlm.config.ExitName`); None for "none".

    threshold: None is the rule's default; argmax_stability counts checks, so its threshold is cut to an integer.
    """
    if name == "none":
        return None
    names = get_args(ExitName)
    if name not in names:
        raise InputError(f"exit rule {name!r}: unknown.{did_you_mean(str(name), (*names, 'none'))}")
    make: Callable[..., ExitRule] = globals()[name]
    if threshold is None:
        return make()
    if name == "argmax_stability" and not (_at_least(threshold, 0) and threshold < 2**31):
        raise InputError(f"exits.{name}: threshold = {threshold!r}: must be a number of checks")
    return make(int(threshold) if name == "argmax_stability" else threshold)
