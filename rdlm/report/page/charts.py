"""Line charts and bars as inline SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rdlm.report.page.parts import Html, tag

COLOURS = 6
"""Of lines and their keys: --c0 to --c5 of the style, after Okabe and Ito, darker on white and lighter on black."""
LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 46, 350, 22, 184, 220
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "10 4")


class Series(NamedTuple):
    """A line: y over x, and perhaps a band from low to high around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(series: Sequence[Series], *, x: str, y: str, alt: str, log_x: bool = False, bars: bool = False) -> Html:
    """Lines (or, with `bars`, the bars of one series) as inline SVG, in the page's colours, dark ones included.

    Args:
      series: up to 6 lines with at least one finite point in all; points that are not finite leave a gap.
      x, y: names of the axes, with units.
      alt: what is to be seen, for those who do not see it.
      log_x: a logarithmic axis, on which only x above 0 have a place.
      bars: draw bars from 0, at whole numbers x.

    Raises:
      ValueError: nothing to draw, or more lines than there are colours.
    """
    points = [(a, b) for line in series for a, b in zip(line.x, line.y, strict=True) if _drawn(a, b, log_x)]
    if not points or len(series) > COLOURS:
        raise ValueError(f"chart {y!r}: {len(points)} points in {len(series)} lines (1 to {COLOURS})")
    ends = [v for line in series for band in (line.low, line.high) if band for v in band if math.isfinite(v)]
    across = _Axis([a for a, _ in points], LEFT, RIGHT, log=log_x, room=0.5 if bars else None)
    up = _Axis([*(b for _, b in points), *ends, *([0] if bars else [])], BOTTOM, TOP)
    parts = [tag("title", alt), tag("text", y, x=4, y=11), *_grid(across, up)]
    for i, line in enumerate(series):
        at = [(across(a), up(b)) if _drawn(a, b, log_x) else None for a, b in zip(line.x, line.y, strict=True)]
        parts += _bars(at, across(1) - across(0)) if bars else _band(line, at, up, i) + _curve(at, i)
    parts.append(tag("text", x, x=(LEFT + RIGHT) / 2, y=HEIGHT - 7, text_anchor="middle"))
    drawn = tag("svg", *parts, viewBox=f"0 0 360 {HEIGHT}", class_="chart", role="img", aria_label=alt)
    keys = [
        tag("span", tag("i", style=f"background:var(--c{i})"), line.name, class_="key") for i, line in enumerate(series)
    ]
    return tag("figure", drawn, *([tag("figcaption", *keys)] if len(series) > 1 else []))


def _drawn(a: Any, b: Any, log_x: bool) -> bool:
    return a is not None and b is not None and math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x)


def _grid(across: _Axis, up: _Axis) -> list[Html]:
    """Axes, ticks and their labels."""
    parts = []
    for at, label in up.ticks():
        parts.append(tag("path", d=f"M{LEFT} {at:.1f}H{RIGHT}", stroke="var(--line)", stroke_width=0.7))
        parts.append(tag("text", label, x=LEFT - 4, y=f"{at + 3.5:.1f}", text_anchor="end"))
    for at, label in across.ticks():
        parts.append(tag("path", d=f"M{at:.1f} {BOTTOM}v4", stroke="var(--soft)", stroke_width=0.7))
        parts.append(tag("text", label, x=f"{at:.1f}", y=BOTTOM + 15, text_anchor="middle"))
    return [*parts, tag("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}", stroke="var(--soft)", stroke_width=0.9)]


def _bars(at: list[Any], apart: float) -> list[Html]:
    wide = max(1.0, 0.8 * apart)
    bars = [f"M{p[0] - wide / 2:.1f} {p[1]:.1f}h{wide:.1f}V{BOTTOM}h-{wide:.1f}z" for p in at if p]
    return [tag("path", d="".join(bars), fill="var(--c0)")]


def _band(line: Series, at: list[Any], up: _Axis, i: int) -> list[Html]:
    """The range around a line, in its colour."""
    if line.low is None or line.high is None:
        return []
    top, low = ([(p[0], up(v)) for p, v in zip(at, band, strict=True) if p] for band in (line.high, line.low))
    edge = " ".join(f"{a:.1f},{b:.1f}" for a, b in top + low[::-1])
    return [tag("polygon", points=edge, fill=f"var(--c{i})", fill_opacity=0.16)]


def _curve(at: list[Any], i: int) -> list[Html]:
    """A line with gaps, and its points where they are few."""
    d = " ".join(f"{'L' if j and at[j - 1] else 'M'}{p[0]:.1f} {p[1]:.1f}" for j, p in enumerate(at) if p)
    dashes = {"stroke_dasharray": _DASHES[i]} if _DASHES[i] else {}
    line = tag("path", d=d, fill="none", stroke=f"var(--c{i})", stroke_width=1.8, stroke_linejoin="round", **dashes)
    few = len(at) <= 24 or not any(a and b for a, b in pairwise(at))
    dots = [tag("circle", cx=f"{p[0]:.1f}", cy=f"{p[1]:.1f}", r=2.6, fill=f"var(--c{i})") for p in at if p and few]
    return [line, *dots]


class _Axis:
    """Places values between two ends of the drawing."""

    def __init__(
        self, values: Sequence[float], first: float, last: float, log: bool = False, room: float | None = None
    ) -> None:
        """`room`: kept free beyond the values, in their unit; None: a little, and none below 0."""
        self.log, self.first, self.last = log, first, last
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        free = (0.04 * (high - low) or 0.05 * abs(high) or 0.5) if room is None else room
        self.low, self.high = low - (free if low or log or room else 0), high + free

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.first + (at - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of about five round values."""
        if self.log:
            return [(self(v), _label(v, v)) for v in _log_ticks(self.low, self.high)]
        step = _round_step((self.high - self.low) / 5)
        values = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self(v), _label(v, step, max(map(abs, values)))) for v in values]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or of two where the axis spans less than three powers of ten."""
    base = 10.0 if high - low >= 3 else 2.0
    first, last = (f(x / math.log10(base) + e) for f, x, e in ((math.ceil, low, -1e-9), (math.floor, high, 1e-9)))
    every = max(1, -(-(last - first + 1) // 8))
    return [base**i for i in range(first, last + 1, every)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _label(value: float, step: float, largest: float | None = None) -> str:
    """A tick's label, of as many digits as tell it from one that is `step` away."""
    most = abs(value) if largest is None else largest
    units = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}
    size = next((u for u in units if most >= u), 1.0)
    if 0 < most < 0.01:
        size = 10.0 ** math.floor(math.log10(most) + 1e-9)
    digits = max(0, math.ceil(-math.log10(step / size) - 1e-9))
    unit = units.get(size, f"e{round(math.log10(size))}")
    return "0" if abs(value) < 1e-9 * step else f"{value / size:.{digits}f}{unit}"
