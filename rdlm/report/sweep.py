"""The figure of a depth sweep: quality against cost, at fixed depths and with every exit rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdlm.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    depth_axis,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
FIXED = "fixed depth"
_STYLES = {
    "kl": (BLUE, "o"),
    "gated_kl": (SKY, "s"),
    "min_p_kl": (PURPLE, "D"),
    "entropy_diff": (ORANGE, "v"),
    "latent_diff": (GREEN, "^"),
    "cosine": (YELLOW, "P"),
    "argmax_stability": (VERMILION, "X"),
}
_LINEAR = {"nats": 1e-3, "accuracy": 0.1}
"""Differences, in nats or percentage points, below which the lower panels are linear."""


def on_front(quality: Sequence[float], effort: Sequence[float]) -> list[bool]:
    """Which points are Pareto optimal: no other has at least the quality for less effort, or more for the same."""

    def beaten(i: int) -> bool:
        return any(
            q >= quality[i] and x <= effort[i] and (q > quality[i] or x < effort[i])
            for q, x in zip(quality, effort, strict=True)
        )

    return [not beaten(i) for i in range(len(quality))]


def plot_sweep(path: Path, title: str, rows: Sequence[Row], quality: str) -> Path:
    """Quality against mean recurrences and against FLOPs per token: the whole range above, differences below.

    Args:
      path: the PNG.
      title: heading of the figure.
      rows: with rule, iterations (mean recurrences), flops_per_token, `quality` and pareto (see `on_front`); those of
        FIXED by increasing depth.
      quality: "nats" or "accuracy".

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(11, 8.4)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    scale, name = (1.0, "loss (nats per token)") if quality == "nats" else (100.0, "accuracy (%)")
    fixed = [row for row in rows if row["rule"] == FIXED]
    deepest = scale * fixed[-1][quality]
    for column, x in enumerate(("iterations", "flops_per_token")):
        for axes, base in ((grid[0, column], 0.0), (grid[1, column], deepest)):
            _draw(axes, rows, x, [scale * row[quality] - base for row in rows])
            axes.grid(color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(colors=GREY)
    _near_the_end(grid[1, 0], [scale * row[quality] - deepest for row in rows], quality)
    depths = [round(row["iterations"]) for row in fixed]
    for axes in grid[:, 0]:
        depth_axis(axes, depths, "")
    for axes in grid[:, 1]:
        _flops_axis(axes, [row["flops_per_token"] for row in rows])
    grid[1, 0].set_xlabel("mean recurrences per token (log scale)")
    grid[1, 1].set_xlabel("forward MFLOP per token, checks of the rule included (log scale)")
    grid[0, 0].set_ylabel(name)
    unit, linear = ("nats", _LINEAR["nats"]) if quality == "nats" else ("percentage points", _LINEAR["accuracy"])
    grid[1, 0].set_ylabel(f"difference from r = {depths[-1]}\n({unit}, log scale beyond ±{linear:g})")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}\nfilled: no other point is as good for fewer FLOPs", fontsize=12)
    return save_figure(figure, path)


def _draw(axes: Axes, rows: Sequence[Row], x: str, y: Sequence[float]) -> None:
    """A line per rule over row[x], with a marker per row that is filled where the row is Pareto optimal."""
    for rule in dict.fromkeys(row["rule"] for row in rows):
        points = sorted((row[x], at, row["pareto"]) for row, at in zip(rows, y, strict=True) if row["rule"] == rule)
        colour, marker = (BLACK, "o") if rule == FIXED else _STYLES.get(rule, (BLACK, "."))
        width, alpha = (2, 1) if rule == FIXED else (1, 0.6)
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=width, alpha=alpha, zorder=2)
        edge = BLACK if rule == "cosine" else colour  # its yellow is too light for an edge
        style: dict[str, Any] = {"marker": marker, "markersize": 7, "markeredgecolor": edge, "markeredgewidth": 1}
        for at_x, at_y, best in points:
            axes.plot(at_x, at_y, linestyle="", markerfacecolor=colour if best else "white", zorder=3, **style)
        axes.plot([], [], color=colour, label=rule, **style)


def _flops_axis(axes: Axes, flops: Sequence[float]) -> None:
    """A log axis with ticks at 1, 2, 5, 10, ... MFLOP."""
    axes.set_xscale("log")
    low, high = math.floor(math.log10(min(flops))), math.ceil(math.log10(max(flops)))
    ticks = [digit * 10.0**i for i in range(low, high + 1) for digit in (1, 2, 5)]
    ticks = [x for x in ticks if min(flops) / 1.1 <= x <= max(flops) * 1.1]
    axes.set_xticks(ticks, [f"{x / 1e6:g}" for x in ticks])
    axes.minorticks_off()


def _near_the_end(axes: Axes, differences: Sequence[float], quality: str) -> None:
    """A symmetric log scale, so that both thousandths and whole units can be read."""
    linear = _LINEAR[quality]
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    low, high = min(*differences, -linear), max(*differences, linear)
    axes.set_ylim(2 * low, 2 * high)
    ticks = [sign * linear * 10**i for i in range(6) for sign in (-1, 1)]
    ticks = sorted(x for x in (0, *ticks) if 2 * low <= x <= 2 * high)
    axes.set_yticks(ticks, [f"{x:+g}" if x else "0" for x in ticks])
    axes.minorticks_off()
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
