"""How deep a request thinks: its fields, checked and completed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from rdlm import exits
from rdlm.config import ExitName, InputError
from rdlm.evaluation.calibration import Calibrated
from rdlm.exits import ExitRule
from rdlm.serve.errors import from_input_error, wrong
from rdlm.serve.options import ServeOptions


@dataclasses.dataclass(frozen=True)
class DepthChoice:
    """When the tokens of a request stop."""

    name: str  # of the rule, as requests say it
    kind: str  # of the engine that serves it
    num_steps: int
    rule: ExitRule | None
    min_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Depths:
    """The choices that a server offers."""

    options: ServeOptions  # resolved
    trained: int  # recurrences, in the mean
    calibrations: Mapping[str, Calibrated]  # by rule, of these weights
    plain_steps: int  # of a request without a rule that does not say

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of exit rules: one engine each. Tokens without a rule run in the first."""
        rules = tuple(name for name in self.options.exit or () if name != "none")
        return rules or ("none",)

    @property
    def offered(self) -> tuple[str, ...]:
        """What a request may say for `exit`, its default first."""
        found = () if self.calibrated is None else ("calibrated",)
        return tuple(dict.fromkeys((*(self.options.exit or ()), "none", *found)))

    @property
    def calibrated(self) -> Calibrated | None:
        """The calibration that a request gets: that of the first rule which has one within the depth served."""
        known = [self.calibrations[kind] for kind in self.kinds if kind in self.calibrations]
        most = self.options.max_steps or 1
        return next((x for x in known if x.threshold is not None and x.goal.num_steps <= most), None)

    def rule(self, kind: str, threshold: float | None = None) -> ExitRule | None:
        """A rule of this kind; None for "none"."""
        return exits.named(cast(ExitName, kind), threshold)

    def choose(
        self, num_steps: int | None, exit: str | None, threshold: float | None, min_steps: int | None
    ) -> DepthChoice:
        """What a request gets that says so much.

        Raises:
          APIError: something that this server does not offer.
        """
        options = self.options
        name = self.offered[0] if exit is None else exit
        if name not in self.offered:
            raise wrong("exit", f"{name[:40]!r} is not served here; this server offers: {', '.join(self.offered)}")
        if name == "calibrated":
            return self._as_calibrated({"num_steps": num_steps, "threshold": threshold, "min_steps": min_steps})
        if name == "none" and threshold is not None:
            raise wrong("threshold", "exit 'none' takes no threshold; leave it out, or choose another exit")
        default = self.plain_steps if name == "none" else options.steps or self.trained
        most = options.max_steps or default
        steps = min(default, most) if num_steps is None else num_steps
        if not 1 <= steps <= most:
            raise wrong("num_steps", f"{steps} is not in [1, {most}]")
        least = min_steps or 0
        if least < 0 or least >= 2**31:
            raise wrong("min_steps", "must not be negative")
        if name == "none":
            return self.without_rule(steps)
        if name == "argmax_stability" and threshold is not None and threshold >= 2**31:
            raise wrong("threshold", "must be a number of recurrences")
        if threshold is None and name == self.offered[0]:
            threshold = options.threshold
        try:
            rule = self.rule(name, threshold)
        except InputError as error:
            raise from_input_error(error, "threshold") from error
        assert rule is not None
        if rule.every_check and least:
            raise wrong("min_steps", f"exit {name!r} is checked at every recurrence; leave it out")
        return DepthChoice(name, name, steps, rule, least)

    def _as_calibrated(self, given: dict[str, float | None]) -> DepthChoice:
        """Depth and threshold of the calibration, whose guarantee holds for no others."""
        found = self.calibrated
        assert found is not None
        for field, value in given.items():
            if value is not None:
                raise wrong(field, "exit 'calibrated' has its own; leave it out, or choose another exit")
        return DepthChoice("calibrated", found.rule, found.goal.num_steps, self.rule(found.rule, found.threshold))

    def without_rule(self, steps: int) -> DepthChoice:
        """Exactly `steps` recurrences, in an engine whose rule is never checked."""
        kind = self.kinds[0]
        if kind == "none":
            return DepthChoice("none", kind, steps, None)
        if kind == "gate":  # from 1 on it never stops
            return DepthChoice("none", kind, steps, self.rule(kind, 1.0))
        return DepthChoice("none", kind, steps, self.rule(kind), steps)
