"""Calibrated exits: the loosest threshold that still says what the model says at full depth, with a guarantee.

Disagreement of a threshold is the share of tokens whose likeliest next token, read where the token stopped, is not
the one after `num_steps` recurrences; both teacher-forced on the same text from the same initial states. `calibrate`
finds the loosest threshold whose disagreement is at most epsilon, and is wrong with probability at most delta
(Learn-then-Test, Angelopoulos et al., 2021; for exits: CALM, Schuster et al., 2022): thresholds are tested from safe
to loose, each at level delta, until the first that fails (`loosest`). That order is fixed in advance, so a threshold
that is too loose can only be chosen if the *first* such one passes its test, whatever the tests have in common.

What counts as one observation is the row, not the token: tokens of a row share a text and read each other, and a test
that took them for independent would be far too sure of itself (`tests/evaluation/test_calibration.py` shows it fail).
The loss of a row is the share of its tokens that disagree, and nothing is assumed about how they hang together. Rows
are drawn at random, without replacement, from the held-out text, which is what makes the test valid for that text
whatever its rows have in common; for other text it holds as far as its rows might have been drawn from the same. Rows
of few documents say little about other documents: pass one loss per *document* to `loosest` for that, with at least
`least_rows` of them.

The guarantee is about one rule as it is scored here (every look, no min_steps, the default cache). Three rules
calibrated at delta are wrong, one or another of them, with probability up to 3 delta.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import exits
from rdlm.config import InputError, ModelConfig, did_you_mean, require
from rdlm.exits import ExitRule
from rdlm.model import Params, forward
from rdlm.perf import flops
from rdlm.runtime import write_output

FILE = "calibrated_exits.json"

# Where the thresholds of a rule begin to be fine (10^x): two tighter ones come first, each ten times the one before,
# and then 1, 2, 5, 10, ... up to 1. Rules that count recurrences begin at num_steps - 1 and go down to 1.
_FINE = {"kl": -5, "gated_kl": -5, "min_p_kl": -6, "entropy_diff": -3, "latent_diff": -2, "cosine": -4}
_COUNTING = ("argmax_stability", "fixed")
RULES = (*_FINE, *_COUNTING)
"""Rules that can be calibrated; "fixed" is fixed depth itself, for comparison."""

# A bet of `lambda` on agreement multiplies a gambler's money by 1 + lambda (epsilon - loss): fair or worse if the mean
# loss is epsilon or more. Rows rarely lose more than a few of their tokens, so bold bets win most.
_BETS = ((1.0, 1 / 2), (1 / 2, 1 / 4), (1 / 4, 1 / 8), (1 / 8, 1 / 8))  # (lambda, share of the money)


class Scores(NamedTuple):
    """What a threshold did to each of N rows. loss: share of the row's tokens that disagree, float64 [N].

    tokens, steps, looks: int64 [N], scored tokens, the recurrences they ran, how often the rule read their logits.
    """

    loss: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    looks: np.ndarray

    @property
    def agreement(self) -> float:
        """Mean over rows."""
        return float(1 - self.loss.mean())

    @property
    def mean_steps(self) -> float:
        """Recurrences per token."""
        return float(self.steps.sum() / self.tokens.sum())


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A calibrated rule, as it stands in the run folder."""

    rule: str
    """Name in `rdlm.exits`."""
    threshold: float | None
    """None: no threshold that was tried keeps the promise; decode at fixed depth."""
    epsilon: float
    """Agreement with full depth is at least 1 - epsilon ..."""
    delta: float
    """... with confidence 1 - delta."""
    num_steps: int
    """Full depth: most recurrences of a token."""
    step: int
    """Checkpoint."""
    data: str
    """What the rows were drawn from."""
    rows: int
    """Drawn rows that the threshold was chosen with."""
    agreement: float | None
    """On those rows; None without a threshold."""
    checked_rows: int
    """Other rows, that were only looked at afterwards; may be 0."""
    checked_agreement: float | None
    """On the other rows."""
    mean_steps: float | None
    """Recurrences per token, on all these rows."""
    flops_per_token: float | None
    """Forward FLOPs on all these rows, looks at logits included; attention over whole rows."""
    full_flops_per_token: float
    """Forward FLOPs at fixed depth num_steps."""
    tried: tuple[tuple[float, float, float, float], ...]
    """(threshold, agreement, mean recurrences, p-value) of every threshold that was tested, in order."""

    @property
    def flops_saved(self) -> float | None:
        """Share of the FLOPs of fixed depth; negative where looking costs more than it saves."""
        return None if self.flops_per_token is None else 1 - self.flops_per_token / self.full_flops_per_token

    @property
    def guarantee(self) -> str:
        """The promise in words."""
        if self.threshold is None:
            return (
                f"{self.rule}: no threshold that was tried agrees with {self.num_steps} recurrences for "
                f"{1 - self.epsilon:.4g} of tokens at confidence {1 - self.delta:.4g}; fixed depth is the answer"
            )
        return (
            f"{self.rule} at {self.threshold:g}: for at least {1 - self.epsilon:.4g} of tokens the likeliest next "
            f"token of {self.num_steps} recurrences, with confidence {1 - self.delta:.4g} ({self.rows:,} rows of "
            f"{self.data})"
        )


def check_risk(epsilon: float, delta: float) -> None:
    """Refuse levels outside (0, 1).

    Raises:
      InputError: naming the one.
    """
    require(0 < epsilon < 1, "epsilon", epsilon, "share of tokens that may disagree, must be in (0, 1), such as 0.01")
    require(0 < delta < 1, "delta", delta, "probability of being wrong, must be in (0, 1), such as 0.05")


def p_value(loss: np.ndarray, epsilon: float) -> float:
    """p-value of "the mean loss is epsilon or more", from losses in [0, 1], float [N], of N rows drawn at random.

    One over what a gambler owns who started with 1 and bet on every row that it loses less than epsilon: in
    expectation at most 1 if the mean is epsilon or more, so he seldom gets rich (Markov). Valid at any N for
    independent rows, and for rows drawn without replacement from a fixed set: such rows are negatively associated, so
    the mean of the product is at most the product of the means. The order of rows does not matter.
    """
    money = [math.log(share) + np.log1p(bet * (epsilon - np.asarray(loss, np.float64))).sum() for bet, share in _BETS]
    return float(min(1.0, math.exp(-np.logaddexp.reduce(money))))


def least_rows(epsilon: float, delta: float) -> int:
    """Rows without which even perfect agreement shows nothing."""
    rows = 1
    while p_value(np.zeros(rows), epsilon) > delta:
        rows += max(1, rows // 64)
    while rows > 1 and p_value(np.zeros(rows - 1), epsilon) <= delta:
        rows -= 1
    return rows


def loosest(tried: Iterable[tuple[float, np.ndarray]], epsilon: float, delta: float) -> float | None:
    """The loosest threshold whose mean loss is at most epsilon with confidence 1 - delta.

    Args:
      tried: (threshold, losses in [0, 1] of rows, float [N]) from safe to loose, in an order that does not depend on
        the losses. Nothing after the first threshold that fails is asked for, so it may be computed on the way.
      epsilon, delta: in (0, 1).

    Returns:
      A threshold, or None when the safest fails already.

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
    """Thresholds of a rule from safe to loose, in the order in which they are tested.

    Raises:
      InputError: no such rule.
    """
    if rule in _COUNTING:
        return tuple(float(r) for r in range(num_steps - 1, 0, -1))
    if rule not in _FINE:
        raise InputError(f"rule = {rule!r}: cannot be calibrated.{did_you_mean(rule, RULES)}")
    fine = _FINE[rule]
    coarse = [float(f"1e{power}") for power in (fine - 2, fine - 1)]
    return (*coarse, *(float(f"{digit}e{power}") for power in range(fine, 0) for digit in (1, 2, 5)), 1.0)


Rows = dict[str, np.ndarray]
"""N rows: tokens, segment_ids int32 [N, L]; scored bool [N, L], the tokens that count."""


@functools.partial(jax.jit, static_argnames="config")
def _full(params: Params, config: ModelConfig, rows: dict[str, Array], num_steps: Array) -> Array:
    out = forward(params, config, rows["tokens"], num_steps, segment_ids=rows["segment_ids"], key=rows["key"])
    return jnp.argmax(out.logits, axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def _score(params: Params, config: ModelConfig, rows: dict[str, Array], num_steps: Array, full: Array, rule: ExitRule):
    out = forward(
        params, config, rows["tokens"], num_steps, segment_ids=rows["segment_ids"], key=rows["key"], exit_rule=rule
    )
    assert out.looks is not None  # a rule's looks are counted
    scored = rows["scored"]
    other = scored & (jnp.argmax(out.logits, axis=-1) != full)
    spent = [jnp.where(scored, x, 0).sum(1) for x in (out.steps, out.looks)]
    return other.sum(1), scored.sum(1), *spent


class Scorer:
    """Scores thresholds on the same rows. Full depth runs once, and a rule compiles once for all its thresholds."""

    def __init__(
        self, params: Params, config: ModelConfig, rows: Rows, num_steps: int, *, batch_size: int = 16, seed: int = 0,
        tick: Callable[[int], None] = lambda batches: None,
    ) -> None:  # fmt: skip
        """Run `rows` at full depth.

        Args:
          params, config: the model.
          rows: N rows, each with initial states of its own.
          num_steps: most recurrences, at least 2.
          batch_size: rows per call.
          seed: of the initial states.
          tick: called after every batch of a pass with the number that are done.

        Raises:
          InputError: fewer than 2 recurrences, or nothing to score.
        """
        require(num_steps >= 2, "num_steps", num_steps, "must be at least 2: at 1 there is nothing to save")
        if not len(rows["tokens"]) or not rows["scored"].any():
            raise InputError("calibration: there is no held-out token to score; prepare more validation text")
        self.params, self.config, self.num_steps, self.tick = params, config, num_steps, tick
        self.length = rows["tokens"].shape[1]
        self.used = np.array(rows["scored"].any(axis=1))
        keys = jax.random.split(jax.random.key(seed), len(self.used))
        self.batches: list[tuple[dict[str, Array], Array]] = []
        for first in range(0, len(self.used), batch_size):
            # The last batch is filled up with copies of the first rows, so that every call has the same shape.
            index = np.arange(first, first + batch_size) % len(self.used)
            batch = {name: jnp.asarray(values[index]) for name, values in rows.items()} | {"key": keys[index]}
            self.batches.append((batch, _full(params, config, batch, jnp.int32(num_steps))))
            tick(len(self.batches))

    def __call__(self, rule: str, threshold: float) -> Scores:
        """What `rule` does at `threshold`, for all rows that have a token to score."""
        made: ExitRule = getattr(exits, rule)(np.float32(threshold))
        found = []
        for done, (batch, full) in enumerate(self.batches, 1):
            counts = _score(self.params, self.config, batch, jnp.int32(self.num_steps), full, made)
            found.append(np.stack([np.asarray(x) for x in counts]).astype(np.int64))
            self.tick(done)
        other, tokens, steps, looks = np.concatenate(found, axis=1)[:, : len(self.used)][:, self.used]
        return Scores(other / tokens, tokens, steps, looks)


def calibrate(
    scorer: Scorer,
    rule: str,
    *,
    epsilon: float,
    delta: float,
    step: int,
    data: str,
    check: Scorer | None = None,
    tried: Callable[[float, Scores, float], None] = lambda threshold, scores, p: None,
) -> Calibrated:
    """Calibrate one rule of `RULES` on the rows of `scorer`.

    Args:
      scorer: the rows that choose.
      rule: name in `RULES`.
      epsilon, delta: agreement of at least 1 - epsilon, with confidence 1 - delta.
      step, data: the checkpoint and what the rows were drawn from, for the record.
      check: rows on which the chosen threshold is looked at afterwards.
      tried: told of every threshold that was tested: threshold, its scores, its p-value.

    Raises:
      InputError: an unknown rule, levels outside (0, 1), or too few rows to show anything.
    """
    check_risk(epsilon, delta)
    grid, rows = thresholds(rule, scorer.num_steps), int(scorer.used.sum())
    if p_value(np.zeros(rows), epsilon) > delta:
        raise InputError(
            f"epsilon = {epsilon:g}: {rows} rows cannot show it at delta = {delta:g} even if all agree, at least "
            f"{least_rows(epsilon, delta)} can; use a larger epsilon or more held-out text"
        )
    seen: list[tuple[float, Scores, float]] = []

    def losses(threshold: float) -> np.ndarray:
        scores = scorer(rule, threshold)
        seen.append((threshold, scores, p_value(scores.loss, epsilon)))
        tried(*seen[-1])
        return scores.loss

    chosen = loosest(((t, losses(t)) for t in grid), epsilon, delta)
    keys, config = scorer.length, scorer.config
    facts: dict[str, Any] = dict.fromkeys(("agreement", "checked_agreement", "mean_steps", "flops_per_token"))
    if chosen is not None:
        scores = next(s for t, s, _ in seen if t == chosen)
        after = None if check is None else check(rule, chosen)
        both = [scores] if after is None else [scores, after]
        tokens = sum(s.tokens.sum() for s in both)
        steps, looks = (float(sum(getattr(s, x).sum() for s in both) / tokens) for x in ("steps", "looks"))
        facts = {
            "agreement": scores.agreement,
            "checked_agreement": None if after is None else after.agreement,
            "mean_steps": steps,
            "flops_per_token": flops.cost(config, steps, keys, looks).flops_per_token,
        }
    return Calibrated(
        rule=rule, threshold=chosen, epsilon=epsilon, delta=delta, num_steps=scorer.num_steps, step=step, data=data,
        rows=rows, checked_rows=0 if check is None else int(check.used.sum()),
        full_flops_per_token=flops.forward_flops(config, scorer.num_steps, keys),
        tried=tuple((t, s.agreement, s.mean_steps, p) for t, s, p in seen), **facts,
    )  # fmt: skip


def save(run_folder: str | Path, found: Calibrated) -> Path:
    """Put a calibrated rule into RUN/calibrated_exits.json, in place of an older one of the same rule.

    Raises:
      InputError: the file is damaged or cannot be written.
    """
    known = read(run_folder) | {found.rule: found}
    text = json.dumps({rule: dataclasses.asdict(x) for rule, x in known.items()}, indent=1)
    return write_output(Path(run_folder) / FILE, text + "\n")


def read(run_folder: str | Path) -> dict[str, Calibrated]:
    """Every calibrated rule of a run folder by name; empty when there is none.

    Raises:
      InputError: the file is damaged.
    """
    path = Path(run_folder) / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = {rule: Calibrated(**(x | {"tried": tuple(map(tuple, x["tried"]))})) for rule, x in tree.items()}
        for rule, x in found.items():
            thresholds(rule, x.num_steps)
            if x.threshold is not None and not 0 < float(x.threshold) < math.inf:
                raise ValueError(f"threshold {x.threshold!r} of {rule}")
    except FileNotFoundError:
        return {}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not what calibrate_exits.py writes ({error}); delete it and calibrate again"
        ) from error
    return found


def load(run_folder: str | Path, rule: str, step: int) -> Calibrated:
    """The calibrated threshold of `rule` for checkpoint `step`.

    Raises:
      InputError: not calibrated, calibrated for another checkpoint, no threshold passed, or the file is damaged.
    """
    command = f"`python experiments/calibrate_exits.py {run_folder} --rules {rule}`"
    known = read(run_folder)
    if rule not in known:
        there = f"only {', '.join(known)}" if known else "nothing"
        raise InputError(f"{Path(run_folder) / FILE}: {rule} is not calibrated ({there} is there); run {command}")
    found = known[rule]
    if found.step != step:
        raise InputError(
            f"{Path(run_folder) / FILE}: {rule} was calibrated for step {found.step}, the checkpoint is step {step}; "
            f"run {command}"
        )
    if found.threshold is None:
        raise InputError(
            f"{Path(run_folder) / FILE}: {found.guarantee} (--exit none --steps {found.num_steps}), or allow more: "
            f"{command[:-1]} --epsilon {min(2 * found.epsilon, 0.5):g}`"
        )
    return found
