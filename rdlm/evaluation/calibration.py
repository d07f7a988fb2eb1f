"""Calibrated exits: the loosest threshold that keeps the predictions of full depth, with a guarantee.

The loss of a threshold is the share of tokens whose likeliest next token is not that of `num_steps` recurrences.
`calibrate` returns the loosest threshold with a mean loss of at most epsilon; it is wrong with probability at most
delta. Thresholds are tested from safe to loose until the first that fails (Learn-then-Test, Angelopoulos et al., 2021).
The method and its limits: docs/calibration.md.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import exits
from rdlm.config import InputError, ModelConfig, did_you_mean, local_path, require
from rdlm.exits import ExitRule
from rdlm.losses import likeliest
from rdlm.model import Params, forward, known
from rdlm.perf import flops
from rdlm.runtime import write_output

FILE = "calibrated_exits.json"

# Exponents at which the thresholds of a rule become fine: two powers of ten below, then 1, 2, 5, 10, ... up to 1. Rules
# that count recurrences start at num_steps - 1 and go down to 1.
_FINE = {"kl": -5, "gated_kl": -5, "min_p_kl": -6, "entropy_diff": -3, "latent_diff": -2, "cosine": -4}
_COUNTING = ("argmax_stability", "fixed")
RULES = (*_FINE, *_COUNTING)
"""Rules that can be calibrated; "fixed" is a fixed depth, for comparison."""

# (lambda, share of the money), see `p_value`. Few rows lose more than a few of their tokens: large bets win the most.
_BETS = ((1.0, 1 / 2), (1 / 2, 1 / 4), (1 / 4, 1 / 8), (1 / 8, 1 / 8))


class Outcome(NamedTuple):
    """What a threshold does to each of N rows. loss: share of the row's tokens that disagree, float64 [N].

    tokens, steps, checks: int64 [N]: scored tokens, their recurrences, and how often the rule read their logits.
    """

    loss: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    checks: np.ndarray

    @property
    def agreement(self) -> float:
        """Mean over rows."""
        return float(1 - self.loss.mean())

    @property
    def mean_steps(self) -> float:
        """Recurrences per token."""
        return float(self.steps.sum() / self.tokens.sum())


class Tried(NamedTuple):
    """A threshold that was tested."""

    threshold: float
    agreement: float
    mean_steps: float
    p_value: float


class Goal(NamedTuple):
    """What is to be guaranteed, and for which checkpoint and text."""

    epsilon: float
    """Share of tokens that may disagree with full depth."""
    delta: float
    """Probability that the guarantee is wrong."""
    num_steps: int
    """Full depth: the maximum recurrences of a token."""
    step: int
    """Checkpoint."""
    data: str
    """Source of the rows, in words."""


class Effect(NamedTuple):
    """What the chosen threshold does. FLOPs are forward FLOPs, checks included, with attention over whole rows."""

    agreement: float
    """On the rows that chose."""
    checked_agreement: float | None
    """On other rows, which were scored afterwards; None without any."""
    mean_steps: float
    """Recurrences per token, on all these rows."""
    flops_per_token: float
    """On all these rows."""


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A calibrated rule, as the run folder keeps it."""

    rule: str
    """Name in `rdlm.exits`."""
    threshold: float | None
    """None: no threshold that was tried passed; decode at fixed depth."""
    goal: Goal
    rows: int
    """Rows that chose the threshold."""
    checked_rows: int
    """Other rows; may be 0."""
    full_flops_per_token: float
    """Forward FLOPs at full depth."""
    effect: Effect | None
    """None without a threshold."""
    tried: tuple[Tried, ...]
    """In the order of the tests."""

    @property
    def flops_saved(self) -> float | None:
        """Share of the FLOPs at full depth; negative where the checks cost more than the exits save."""
        return None if self.effect is None else 1 - self.effect.flops_per_token / self.full_flops_per_token

    @property
    def guarantee(self) -> str:
        """The guarantee in words."""
        share, confidence, r = f"{1 - self.goal.epsilon:.4g}", f"{1 - self.goal.delta:.4g}", self.goal.num_steps
        if self.threshold is None and self.rule == "fixed":
            return (
                f"fixed: no depth below {r} that was tried agrees with {r} recurrences for {share} of tokens at "
                f"confidence {confidence}; keep {r}"
            )
        if self.threshold is None:
            return (
                f"{self.rule}: no threshold that was tried agrees with {r} recurrences for {share} of tokens at "
                f"confidence {confidence}; fixed depth is the answer"
            )
        return (
            f"{self.rule} at {self.threshold:g}: for at least {share} of tokens the likeliest next token of "
            f"{r} recurrences, with confidence {confidence} ({self.rows:,} rows of {self.goal.data})"
        )


def check_risk(epsilon: float, delta: float) -> None:
    """Refuse levels outside (0, 1).

    Raises:
      InputError: naming the value.
    """
    share = isinstance(epsilon, numbers.Real) and 0 < epsilon < 1
    require(share, "epsilon", epsilon, "share of tokens that may disagree, must be in (0, 1), such as 0.01")
    share = isinstance(delta, numbers.Real) and 0 < delta < 1
    require(share, "delta", delta, "probability of being wrong, must be in (0, 1), such as 0.05")


def p_value(loss: np.ndarray, epsilon: float) -> float:
    """p-value of the hypothesis that the mean loss is epsilon or more, from the losses of random rows, [N] in [0, 1].

    It is one over the money of a gambler who starts with 1 and bets on every row that its loss is below epsilon. Under
    the hypothesis the expected money is at most 1, so it is rarely large (Markov). Valid for any N, for independent
    rows and for rows drawn without replacement (docs/calibration.md).

    Raises:
      InputError: a loss outside [0, 1], such as NaN.
    """
    try:
        loss = np.asarray(loss, np.float64)
    except (TypeError, ValueError, OverflowError):
        loss = np.asarray(np.nan)
    require(bool(((loss >= 0) & (loss <= 1)).all()), "loss", loss, "must be numbers in [0, 1]")
    money = [math.log(share) + np.log1p(bet * (epsilon - loss)).sum() for bet, share in _BETS]
    return float(min(1.0, math.exp(-np.logaddexp.reduce(money))))


def min_rows(epsilon: float, delta: float) -> int:
    """Minimum number of rows: with fewer, even perfect agreement does not pass."""
    check_risk(epsilon, delta)

    def passes(rows: int) -> bool:  # `p_value` of so many zeros, without the zeros
        money = [math.log(share) + rows * math.log1p(bet * epsilon) for bet, share in _BETS]
        return float(np.logaddexp.reduce(money)) >= -math.log(delta)

    rows = 1
    while not passes(rows):
        rows *= 2
    return bisect.bisect_left(range(rows + 1), True, lo=rows // 2, key=passes)


def check_rows(rows: int, epsilon: float, delta: float) -> None:
    """Refuse levels that so many rows cannot show.

    Raises:
      InputError: naming how many can.
    """
    least = min_rows(epsilon, delta)
    if rows < least:
        raise InputError(
            f"epsilon = {epsilon:g}: {rows} rows cannot show it at delta = {delta:g} even if all agree, at least "
            f"{least} can; use a larger epsilon or more held-out text"
        )


def loosest(tried: Iterable[tuple[float, np.ndarray]], epsilon: float, delta: float) -> float | None:
    """The loosest threshold whose mean loss is at most epsilon with confidence 1 - delta.

    Args:
      tried: (threshold, losses in [0, 1] of rows, float [N]) from safe to loose, in an order that does not depend on
        the losses. It is read only up to the first threshold that fails, so losses may be computed on demand.
      epsilon, delta: in (0, 1).

    Returns:
      A threshold, or None if the safest one fails.

    Raises:
      InputError: epsilon or delta outside (0, 1).
    """
    check_risk(epsilon, delta)
    chosen = None
    for threshold, loss in tried:
        if p_value(loss, epsilon) > delta:
            break
        chosen = threshold
    return chosen


def thresholds(rule: str, num_steps: int) -> tuple[float, ...]:
    """Thresholds of a rule in the order of the tests, from safe to loose.

    Raises:
      InputError: no such rule.
    """
    require(isinstance(rule, str), "rule", rule, f"must be a name, one of {', '.join(RULES)}")
    require(isinstance(num_steps, numbers.Integral), "num_steps", num_steps, "must be a whole number")
    if rule in _COUNTING:
        return tuple(float(r) for r in range(num_steps - 1, 0, -1))
    if rule not in _FINE:
        raise InputError(f"rule = {rule!r}: cannot be calibrated.{did_you_mean(rule, RULES)}")
    fine = _FINE[rule]
    coarse = [float(f"1e{power}") for power in (fine - 2, fine - 1)]
    return (*coarse, *(float(f"{digit}e{power}") for power in range(fine, 0) for digit in (1, 2, 5)), 1.0)


Rows = dict[str, np.ndarray]
"""N rows of text: tokens, segment_ids int32 [N, L]; scored bool [N, L], the tokens that count."""


@functools.partial(jax.jit, static_argnames="config")
def _full(params: Params, config: ModelConfig, rows: dict[str, Array], num_steps: Array) -> Array:
    out = forward(params, config, rows["tokens"], num_steps, segment_ids=rows["segment_ids"], key=rows["key"])
    return likeliest(known(config, out.logits))


@functools.partial(jax.jit, static_argnames="config")
def _score(params: Params, config: ModelConfig, rows: dict[str, Array], num_steps: Array, full: Array, rule: ExitRule):
    out = forward(
        params, config, rows["tokens"], num_steps, segment_ids=rows["segment_ids"], key=rows["key"], exit_rule=rule
    )
    assert out.checks is not None  # with a rule, checks are counted
    scored = rows["scored"]
    found = likeliest(known(config, out.logits))
    spent = [jnp.where(scored, x, 0).sum(1) for x in (out.steps, out.checks)]
    return (scored & (found != full)).sum(1), scored.sum(1), *spent, (scored & (found < 0)).sum(1)


class Scorer:
    """Scores thresholds on the same rows. Full depth runs once, and each rule compiles once for all its thresholds."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        rows: Rows,
        num_steps: int,
        *,
        batch_size: int = 16,
        seed: int = 0,
        progress: Callable[[int], None] = lambda batches: None,
    ) -> None:
        """Run `rows` at full depth.

        Args:
          params, config: the model.
          rows: N rows, each with its own initial states.
          num_steps: full depth, at least 2.
          batch_size: rows per call.
          seed: of the initial states.
          progress: called with the number of finished batches, for full depth and for each threshold.

        Raises:
          InputError: fewer than 2 recurrences, nothing to score, or logits that are not finite.
        """
        require(num_steps >= 2, "num_steps", num_steps, "must be at least 2: at 1 there is nothing to save")
        require(num_steps < 2**31, "num_steps", num_steps, "must be below 2**31")
        if not len(rows["tokens"]) or not rows["scored"].any():
            raise InputError("calibration: there is no held-out token to score; prepare more validation text")
        self.params, self.config, self.num_steps, self.progress = params, config, num_steps, progress
        self.length = rows["tokens"].shape[1]
        self.used = np.array(rows["scored"].any(axis=1))
        keys = jax.random.split(jax.random.key(seed), len(self.used))
        self.batches: list[tuple[dict[str, Array], Array]] = []
        for first in range(0, len(self.used), batch_size):
            # The last batch is padded with copies of the first rows, so that every call has the same shape.
            index = np.arange(first, first + batch_size) % len(self.used)
            batch = {name: jnp.asarray(values[index]) for name, values in rows.items()} | {"key": keys[index]}
            full = _full(params, config, batch, jnp.int32(num_steps))
            _require_finite(int((batch["scored"] & (full < 0)).sum()), f"after {num_steps} recurrences")
            self.batches.append((batch, full))
            progress(len(self.batches))

    def __call__(self, rule: str, threshold: float) -> Outcome:
        """The outcome of `rule` at `threshold`, for all rows that have a token to score.

        Raises:
          InputError: logits that are not finite.
        """
        made: ExitRule = getattr(exits, rule)(np.float32(threshold))
        found = []
        for done, (batch, full) in enumerate(self.batches, 1):
            counts = _score(self.params, self.config, batch, jnp.int32(self.num_steps), full, made)
            found.append(np.stack([np.asarray(x) for x in counts]).astype(np.int64))
            self.progress(done)
        other, tokens, steps, checks, lost = np.concatenate(found, axis=1)[:, : len(self.used)][:, self.used]
        _require_finite(lost.sum(), f"with {rule} at {threshold:g}")
        return Outcome(other / tokens, tokens, steps, checks)


def _require_finite(lost: int, where: str) -> None:
    if lost:
        raise InputError(f"calibration: the logits of {lost} tokens are not finite {where}; nothing can be promised")


def calibrate(
    scorer: Scorer,
    rule: str,
    *,
    epsilon: float,
    delta: float,
    step: int,
    data: str,
    check: Scorer | None = None,
    tried: Callable[[Tried], None] = lambda tried: None,
) -> Calibrated:
    """Calibrate one rule of `RULES` on the rows of `scorer`.

    Args:
      scorer: the rows that choose.
      rule: name in `RULES`.
      epsilon, delta: agreement of at least 1 - epsilon, with confidence 1 - delta.
      step, data: the checkpoint and the source of the rows, for the record.
      check: other rows, on which the chosen threshold is scored afterwards.
      tried: called with every threshold that was tested.

    Raises:
      InputError: an unknown rule, levels outside (0, 1), or too few rows for any threshold to pass.
    """
    check_risk(epsilon, delta)
    grid, rows = thresholds(rule, scorer.num_steps), int(scorer.used.sum())
    check_rows(rows, epsilon, delta)
    outcomes: dict[float, Outcome] = {}
    tests: list[Tried] = []

    def losses(threshold: float) -> np.ndarray:
        outcome = outcomes[threshold] = scorer(rule, threshold)
        tests.append(Tried(threshold, outcome.agreement, outcome.mean_steps, p_value(outcome.loss, epsilon)))
        tried(tests[-1])
        return outcome.loss

    chosen = loosest(((t, losses(t)) for t in grid), epsilon, delta)
    return Calibrated(
        rule,
        chosen,
        Goal(epsilon, delta, scorer.num_steps, step, data),
        rows,
        0 if check is None else int(check.used.sum()),
        flops.forward_flops(scorer.config, scorer.num_steps, scorer.length),
        None if chosen is None else _effect(scorer, outcomes[chosen], None if check is None else check(rule, chosen)),
        tuple(tests),
    )


def _effect(scorer: Scorer, outcome: Outcome, after: Outcome | None) -> Effect:
    """Agreement and cost on the rows that chose and on other rows."""
    both = [outcome] if after is None else [outcome, after]
    tokens, steps, checks = (sum(int(getattr(x, name).sum()) for x in both) for name in ("tokens", "steps", "checks"))
    cost = flops.cost(scorer.config, steps / tokens, scorer.length, checks / tokens)
    checked = None if after is None else after.agreement
    return Effect(outcome.agreement, checked, steps / tokens, cost.flops_per_token)


def save(run_folder: str | Path, found: Calibrated) -> Path:
    """Add a calibrated rule to RUN/calibrated_exits.json; it replaces an older one of the same rule.

    Raises:
      InputError: the file is damaged or cannot be written.
    """
    known = read(run_folder) | {found.rule: found}
    text = json.dumps({rule: _flat(x) for rule, x in known.items()}, indent=1)
    return write_output(local_path(run_folder) / FILE, text + "\n")


def read(run_folder: str | Path) -> dict[str, Calibrated]:
    """Every calibrated rule of a run folder by name; empty if there is none.

    Raises:
      InputError: the file is damaged.
    """
    path = local_path(run_folder) / FILE
    try:
        return {rule: _from_flat(rule, x) for rule, x in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not calibrated exits ({error}); delete it and calibrate again") from error


def _flat(x: Calibrated) -> dict[str, Any]:
    """All fields at one level, as the file has them."""
    effect = dict.fromkeys(Effect._fields) if x.effect is None else x.effect._asdict()
    own = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in ("goal", "effect")}
    return own | x.goal._asdict() | effect


def _from_flat(rule: str, tree: dict[str, Any]) -> Calibrated:
    """The opposite of `_flat`.

    Raises:
      KeyError, TypeError, ValueError: `tree` is something else.
    """
    goal = Goal(*(tree.pop(name) for name in Goal._fields))
    effect = Effect(*(tree.pop(name) for name in Effect._fields))
    found = Calibrated(
        **tree | {"tried": tuple(Tried(*x) for x in tree["tried"])},
        goal=goal,
        effect=None if tree["threshold"] is None else effect,
    )
    thresholds(rule, goal.num_steps)
    if found.threshold is not None and not 0 < float(found.threshold) < math.inf:
        raise ValueError(f"threshold {found.threshold!r} of {rule}")
    return found


def load(run_folder: str | Path, rule: str, step: int, command: str) -> Calibrated:
    """The calibrated threshold of `rule` for checkpoint `step`.

    command: how to calibrate the rules of this folder, for error messages.

    Raises:
      InputError: not calibrated, calibrated for another checkpoint, no threshold passed, or the file is damaged.
    """
    path, known, command = local_path(run_folder) / FILE, read(run_folder), f"{command} --rules {rule}"
    if rule not in known:
        there = f"only {', '.join(known)}" if known else "nothing"
        raise InputError(f"{path}: {rule} is not calibrated ({there} is there); run `{command}`")
    found = known[rule]
    if found.goal.step != step:
        raise InputError(
            f"{path}: {rule} was calibrated for step {found.goal.step}, the checkpoint is step {step}; run `{command}`"
        )
    if found.threshold is None:
        raise InputError(
            f"{path}: {found.guarantee} (--exit none --steps {found.goal.num_steps}), or allow more: "
            f"`{command} --epsilon {min(2 * found.goal.epsilon, 0.5):g}`"
        )
    return found
