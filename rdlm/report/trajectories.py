"""Figures of latent states: paths, distances, convergence over a text, starts, contraction, logit lens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.report.figures import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    SKY,
    VERMILION,
    depth_axis,
    new_figure,
    save_figure,
    shown,
)

_ROW = 36  # maximum tokens per line of a heat map
_FLOOR = 1e-7  # smaller distances are f32 rounding


def plot_paths(path: Path, title: str, panels: Sequence[Mapping[str, Any]]) -> Path:
    """Each token's path s_1 .. s_R in the plane of its own two first principal components, coloured by recurrence.

    panels: dicts with token, position, kind, note, coordinates [R, >= 2] and explained [>= 2] (shares of the variance).
    """
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = new_figure(3.1 * columns + 0.9, 2.9 * height + 0.8)
    from matplotlib.colors import LogNorm  # here and below: only where one is drawn

    grid = figure.subplots(height, columns, squeeze=False)
    max_steps = max(len(panel["coordinates"]) for panel in panels)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        x, y = np.asarray(panel["coordinates"])[:, :2].T
        axes.plot(x, y, color=GREY, linewidth=0.6, zorder=1)
        dots = axes.scatter(
            x, y, c=np.arange(1, len(x) + 1), norm=LogNorm(1, max_steps), cmap=COLOURS, s=16, zorder=2, linewidths=0
        )
        axes.plot(x[0], y[0], marker="s", color=BLACK, markersize=6, linestyle="", fillstyle="none", label="r = 1")
        axes.plot(x[-1], y[-1], marker="x", color=VERMILION, markersize=7, linestyle="", label=f"r = {len(x)}")
        axes.set_title(
            f"{shown(panel['token'])}  at {panel['position']}\n{panel['kind']}{panel['note']}",
            fontsize=9,
            parse_math=False,
        )
        share = [f"{100 * s:.0f} %" for s in panel["explained"][:2]]
        axes.set_xlabel(f"component 1 ({share[0]})", fontsize=8)
        axes.set_ylabel(f"component 2 ({share[1]})", fontsize=8)
        axes.tick_params(labelsize=7, colors=GREY)
        axes.margins(0.12)
    grid.flat[0].legend(fontsize=8, frameon=False, loc="best")
    bar = figure.colorbar(dots, ax=grid, label="recurrence (log scale)", shrink=0.8)
    ticks = [2**i for i in range(max_steps.bit_length())]
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    bar.ax.minorticks_off()
    figure.suptitle(f"{title}\naxes in units of the state, with their share of the path's variance", fontsize=11)
    return save_figure(figure, path)


def plot_distance(path: Path, title: str, distance: np.ndarray, tokens: Sequence[str], settled: float) -> Path:
    """Distance to the limit [R/2 + 1, L] against r: one line per token, the median, and the slowest token."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    r, distance = np.arange(1, len(distance)), np.maximum(distance[1:], _FLOOR / 3)
    axes.plot(r, distance, color=SKY, linewidth=0.6, alpha=0.6)
    axes.plot([], [], color=SKY, linewidth=1, label="every token")
    axes.plot(r, np.median(distance, axis=1), color=BLUE, linewidth=2.5, label="median")
    slowest = int(np.log(distance).sum(0).argmax())
    axes.plot(
        r,
        distance[:, slowest],
        color=VERMILION,
        linewidth=1.8,
        linestyle="--",
        label=f"slowest: {shown(tokens[slowest])} at {slowest}".replace("$", r"\$"),
    )
    axes.axhline(settled, color=GREY, linewidth=1, linestyle=":", label=f"settled below {settled:g}")
    axes.set_yscale("log")
    depth_axis(axes, [2**i for i in range(len(r).bit_length())])
    axes.set_ylabel(r"distance to the limit, $\|s_r - s_R\| / \|s_R\|$ (log scale)")
    axes.grid(color=GRID, linewidth=0.7)
    axes.legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_heatmap(path: Path, title: str, distance: np.ndarray, tokens: Sequence[str]) -> Path:
    """log10 of the distance to the limit [r, L]: recurrences from top to bottom, tokens from left to right."""
    width = math.ceil(len(tokens) / math.ceil(len(tokens) / _ROW))  # lines of about equal length
    lines = [range(i, min(i + width, len(tokens))) for i in range(0, len(tokens), width)]
    figure = new_figure(0.36 * width + 2.4, (0.16 * len(distance) + 1.25) * len(lines) + 0.8)
    grid = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    values = np.log10(np.maximum(distance, _FLOOR))
    for axes, line in zip(grid, lines, strict=True):
        part = np.full((len(distance), width), np.nan)
        part[:, : len(line)] = values[:, line[0] : line[-1] + 1]
        image = axes.imshow(part, aspect="auto", cmap=COLOURS, vmin=-7, vmax=0, interpolation="none")
        axes.set_xticks(
            range(len(line)),
            [shown(tokens[i], 9) for i in line],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
            fontsize=8,
            parse_math=False,
        )
        depths = [d for d in (1, 2, 4, 8, 16, 32, 64, 128) if d <= len(distance)]
        axes.set_yticks([d - 1 for d in depths], [str(d) for d in depths])
        axes.set_ylabel("recurrences r")
        axes.tick_params(colors=GREY, labelcolor=BLACK, length=2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[-1].set_xlabel("tokens in the order of the text")
    figure.colorbar(image, ax=grid, label="log10 of the distance to the limit", shrink=0.9)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_independence(path: Path, title: str, spread: np.ndarray) -> Path:
    """Distance between paths from different starts, [R+1, L], against r: median, middle 80 % and maximum."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    r, spread = np.arange(1, len(spread)), np.maximum(spread[1:], 1e-9)
    low, middle, high = np.percentile(spread, (10, 50, 90), axis=1)
    axes.fill_between(r, low, high, color=SKY, alpha=0.4, linewidth=0, label="middle 80 % of tokens")
    axes.plot(r, middle, color=BLUE, linewidth=2.5, label="median token")
    axes.plot(r, spread.max(1), color=VERMILION, linewidth=1.8, linestyle="--", label="largest")
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":", label="distance of the starts")
    axes.set_yscale("log")
    depth_axis(axes, [2**i for i in range(len(r).bit_length())])
    axes.set_ylabel("distance between paths from different s₀,\nshare of the starts' distance (log scale)")
    axes.grid(color=GRID, linewidth=0.7)
    axes.legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_contraction(
    path: Path,
    title: str,
    depths: Sequence[int],
    norm: Sequence[float],
    radius: Sequence[float],
    rates: Sequence[float | None],
) -> Path:
    """Left: norm and spectral radius of a recurrence at each depth. Right: the observed rate of every token."""
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    left.plot(depths, norm, color=ORANGE, marker="s", linewidth=2, label="largest singular value")
    left.plot(depths, radius, color=BLUE, marker="o", linewidth=2, label="spectral radius")
    left.axhline(1, color=GREY, linewidth=1, linestyle=":", label="1: nothing grows or shrinks")
    depth_axis(left, depths, "after r recurrences (log scale)")
    left.set_ylim(0, 1.4 * max(*norm, *radius, 1))
    left.set_ylabel("factor per recurrence on a small difference\n(all tokens of the text together)")
    known = [(i, x) for i, x in enumerate(rates) if x is not None]
    if known:
        right.plot(*zip(*known, strict=True), color=GREEN, marker="o", markersize=4, linestyle="", label="a token")
    right.axhline(radius[-1], color=BLUE, linewidth=2, label=f"spectral radius at r = {depths[-1]}")
    right.axhline(1, color=GREY, linewidth=1, linestyle=":")
    right.set_ylim(0, 1.25)
    right.set_xlabel("position in the text (tokens)")
    right.set_ylabel("observed factor per recurrence\nof the distance to the limit")
    for axes in (left, right):
        axes.grid(color=GRID, linewidth=0.7)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_lens(path: Path, title: str, rows: Sequence[Mapping[str, Any]], depths: Sequence[int], right: str) -> Path:
    """A table of tokens by depths: each cell has the likeliest next token, shaded by its probability.

    rows: dicts with token, position and, per depth, top (a text), probability and hit. A hit has a frame; `right` says
    what that means.
    """
    figure = new_figure(1.12 * len(depths) + 3.4, 0.3 * len(rows) + 1.7)
    axes = figure.add_subplot()
    p = np.array([row["probability"] for row in rows])
    image = axes.imshow(p, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
    from matplotlib.patches import Rectangle

    for i, row in enumerate(rows):
        for j, text in enumerate(row["top"]):
            axes.text(
                j,
                i,
                shown(text),
                ha="center",
                va="center",
                fontsize=8.5,
                parse_math=False,
                color="white" if p[i, j] < 0.55 else "black",
            )
            if row["hit"][j]:
                axes.add_patch(
                    Rectangle((j - 0.47, i - 0.43), 0.94, 0.86, fill=False, edgecolor=VERMILION, linewidth=1.6)
                )
    axes.set_xticks(range(len(depths)), [str(r) for r in depths])
    axes.set_yticks(
        range(len(rows)), [f"{row['position']}: {shown(row['token'])}" for row in rows], fontsize=8.5, parse_math=False
    )
    axes.tick_params(length=0)
    axes.set_xlabel("recurrences r")
    axes.set_ylabel("input token")
    figure.colorbar(image, ax=axes, label="probability of the likeliest token")
    figure.suptitle(f"{title}\nred frame: {right}", fontsize=11)
    return save_figure(figure, path)
