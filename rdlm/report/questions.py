"""Figures of answers: accuracy against depth, and recurrences by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rdlm.report.figures import BLUE, GREEN, GREY, GRID, PURPLE, VERMILION, depth_axis, new_figure, save_figure

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
_STYLES = ("-", "--", "-.", ":")  # so that lines also differ in grey


def plot_accuracy(
    path: Path,
    title: str,
    depths: Sequence[int],
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    baselines: Mapping[str, float],
) -> Path:
    """Accuracy against depth with its interval; baselines are thin lines.

    Args:
      path: the PNG.
      title: heading of the figure.
      depths: recurrences r.
      curves: label: (accuracy, low, high) per depth, as shares.
      baselines: label: share.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for (label, points), colour, style in zip(curves.items(), _COLOURS, _STYLES, strict=False):
        value, low, high = (100 * np.array(x) for x in zip(*points, strict=True))
        axes.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(depths, value, style, color=colour, marker="o", linewidth=2, label=label)
    names: dict[float, list[str]] = {}
    for name, share in baselines.items():
        names.setdefault(round(100 * share, 1), []).append(name)
    for share, those in names.items():
        axes.axhline(share, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            f"{' = '.join(those)} {share:.1f}",
            (1, share),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=GREY,
            annotation_clip=False,
        )
    depth_axis(axes, depths)
    axes.set_ylabel("right answers (%), band: 95 % interval")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_steps(path: Path, title: str, steps: Mapping[str, Mapping[str, np.ndarray]], max_steps: int) -> Path:
    """A histogram of recurrences per category, one outline per kind of start, with means in the legends.

    Args:
      path: the PNG.
      title: heading of the figure.
      steps: category: {kind of start: recurrences of all its tokens}.
      max_steps: the limit on recurrences.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    columns = min(3, len(steps))
    lines = -(-len(steps) // columns)
    figure = new_figure(4.2 * columns, 2.6 * lines + 0.8)
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
    deepest = max(int(x.max(initial=1)) for ways in steps.values() for x in ways.values())
    bins = np.arange(0.5, min(max_steps, deepest) + 1)
    for panel, (category, ways) in zip(panels.flat, steps.items(), strict=False):
        for (way, values), colour, style in zip(ways.items(), _COLOURS, _STYLES, strict=False):
            share = 100 * np.histogram(values, bins)[0] / max(values.size, 1)
            mean = values.mean() if values.size else float("nan")
            panel.stairs(share, bins, color=colour, linestyle=style, linewidth=1.8, label=f"{way}, mean {mean:.1f}")
        panel.set_title(category, fontsize=10)
        panel.legend(frameon=False, fontsize=8)
        panel.grid(axis="y", color=GRID, linewidth=0.7)
    for panel in panels.flat[len(steps) :]:
        panel.set_visible(False)
    figure.supxlabel("recurrences until exit", fontsize=10)
    figure.supylabel("share of tokens (%)", fontsize=10)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)
