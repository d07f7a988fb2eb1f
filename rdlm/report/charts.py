"""Line and bar charts as inline SVG, in the colours of the page they stand on, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from rdlm.report.figures import BLACK, BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, VERMILION, can_draw, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, ":"), (PURPLE, "-."), (ORANGE, (0, (1, 2))), (BLACK, (0, (8, 3))))
"""Colour and dashes of each line of a chart."""
MAX_LINES = len(LINES)
_ON_PAGE = {colour.lower(): f"var(--c{i})" for i, (colour, _) in enumerate(LINES)} | {
    GREY.lower(): "var(--soft)",
    GRID.lower(): "var(--line)",
}
"""What stands for a colour in the SVG: a variable that the page's style sets."""


class Series(NamedTuple):
    """A line y over x, optionally with a band from low to high around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(series: Sequence[Series], x: str, y: str, alt: str, log_x: bool = False) -> Markup:
    """At most MAX_LINES lines as inline SVG, or nothing without matplotlib.

    Args:
      series: the lines, with at least one finite point in all; other points leave a gap.
      x, y: labels of the axes, with units.
      alt: the chart in words, for screen readers.
      log_x: a logarithmic x axis; the values must be above 0.

    Raises:
      ValueError: no finite point, or too many lines.
    """
    if len(series) > MAX_LINES or not any(math.isfinite(v) for line in series for v in line.y):
        raise ValueError(f"chart {y!r}: needs a finite point and at most {MAX_LINES} lines")
    if not can_draw():
        return Markup("")
    figure, axes = _axes(x, y)
    for line, (colour, dashes) in zip(series, LINES, strict=False):
        marker = "o" if len(line.x) <= 24 else ""
        axes.plot(line.x, line.y, color=colour, linestyle=dashes, marker=marker, markersize=4.5, label=line.name)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.6g}")  # the scale brings its own
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=GREY, fontsize=9.5)
    return _svg(figure, alt)


def bar_chart(x: Sequence[float], height: Sequence[float], x_label: str, y_label: str, alt: str) -> Markup:
    """Bars from 0 at whole numbers x, as inline SVG, or nothing without matplotlib."""
    if not can_draw():
        return Markup("")
    figure, axes = _axes(x_label, y_label)
    axes.bar(x, height, width=0.8, color=BLUE, linewidth=0)
    return _svg(figure, alt)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=GREY, parse_math=False)
    axes.set_title(y, loc="left", color=GREY, fontsize=10, parse_math=False)
    axes.tick_params(colors=GREY, labelsize=9.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.6g}")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    return figure, axes


def _svg(figure: Figure, alt: str) -> Markup:
    """`figure` as an element of a page: text in the page's font, colours as variables, nothing that refers outside."""
    from matplotlib import rc_context

    for artist in figure.findobj():
        artist.set_clip_on(False)  # a clip path is a url()
    out = io.StringIO()
    # The salt makes references unique among the charts of a page and equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    drawn = out.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None  # matplotlib writes one
    body = drawn.partition("</defs>")[2]  # what comes before is the outer element and a style for a page of its own
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(
        r'(?<= )(d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), body
    )  # a tenth of a point
    body = re.sub("#[0-9a-f]{6}", lambda found: _ON_PAGE.get(found[0], found[0]), body)
    return Markup('<svg {} role="img" aria-label="{}">{}').format(Markup(box[0]), alt, Markup(" ".join(body.split())))
