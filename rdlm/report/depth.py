"""The figure of a run: loss against depth, with the distribution of depths in training behind it."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from rdlm.checkpoint import read_config
from rdlm.config import InputError, RunConfig, local_path
from rdlm.perf import flops
from rdlm.recurrence import sample_steps
from rdlm.report.figures import BLUE, GREY, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE = "loss_by_depth.json"
_DRAWS = 40_000
_LINE, _BARS, _BAR_TEXT = BLUE, "#F8E3BC", "#8A5D00"


def read_curve(run_folder: str | Path, name: str = CURVE) -> dict[int, float]:
    """{r: nats per token} of a run, by increasing r.

    Raises:
      InputError: no such file, or it is not a curve.
    """
    path = local_path(run_folder) / name
    try:
        tree = json.loads(path.read_text())
        curve = {int(r): float(nats) for r, nats in tree.items()}
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; training writes it at its end, and evaluating the run writes it at any time"
        ) from error
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a loss by depth ({error}); evaluate the run again") from error
    if not curve or min(curve) < 1:
        raise InputError(f"{path}: holds no depth of at least 1; evaluate the run again")
    if not all(map(math.isfinite, curve.values())):
        raise InputError(f"{path}: holds a loss that is not a finite number; the run has diverged, nothing to draw")
    return dict(sorted(curve.items()))


def depth_distribution(run: RunConfig) -> np.ndarray:
    """Share of training steps with r = n + k recurrences, float64 [max r + 1], indexed by r.

    Sampled from `sample_steps` with a fixed key. With a depth curriculum: the distribution at its end.
    """
    draw = functools.partial(
        sample_steps,
        mean_recurrence=run.model.mean_recurrence,
        backprop_depth=run.model.backprop_depth,
        scheme=run.recurrence.scheme,
    )
    n, k = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), _DRAWS))
    return np.bincount(np.asarray(n) + np.asarray(k)) / _DRAWS


def plot_loss_by_depth(run_folder: str | Path, name: str = CURVE) -> Path:
    """Draw loss against r from loss_by_depth.json, with the training distribution of r behind it.

    Args:
      run_folder: holds config.json and the curve.
      name: file of the curve; the figure gets the same name with the ending .png.

    Returns:
      Path of the figure.

    Raises:
      InputError: matplotlib is missing, not a run folder, no curve there, or the folder cannot be written.
    """
    folder = local_path(run_folder)
    figure = new_figure(8, 5)
    run, curve = read_config(folder), read_curve(folder, name)
    losses = figure.add_subplot()
    share = losses.twinx()
    losses.set_zorder(share.get_zorder() + 1)  # draw the line in front of the bars
    losses.patch.set_visible(False)
    distribution = depth_distribution(run)
    _draw_distribution(share, distribution)
    _draw_curve(losses, curve)
    _draw_depth_axis(losses, curve, distribution)
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (losses, share)), strict=True))
    losses.legend(handles, labels, loc="upper right", frameon=False)
    figure.suptitle(_title(folder, run, name), fontsize=12)
    return save_figure(figure, (folder / name).with_suffix(".png"), dpi=150)


def _draw_curve(axes: Axes, curve: dict[int, float]) -> None:
    depths, nats = list(curve), list(curve.values())
    axes.plot(depths, nats, color=_LINE, marker="o", linewidth=2, markersize=6, label="validation loss")
    low, high = min(nats), max(nats)
    span = max(high - low, 0.01 * abs(high), 1e-3)
    axes.set_ylim(low - 0.12 * span, high + 0.25 * span)  # space above for the numbers and the legend
    if len(depths) <= 10:
        digits = 3 if span < 10 else 1
        for r, x in curve.items():
            # A falling line leaves the upper right free.
            axes.annotate(
                f"{x:.{digits}f}", (r, x), xytext=(3, 7), textcoords="offset points", fontsize=9.5, color=_LINE
            )
    axes.set_ylabel("validation loss (nats per token)", color=_LINE)
    axes.tick_params(axis="y", colors=_LINE)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)


def _draw_distribution(axes: Axes, distribution: np.ndarray) -> None:
    r = np.arange(1, len(distribution))
    mean = float(distribution @ np.arange(len(distribution)))
    axes.bar(
        r,
        100 * distribution[1:],
        width=0.9,
        color=_BARS,
        linewidth=0,
        label=f"training steps (mean r = {mean:.1f})",
    )
    axes.set_ylim(0, min(200 * distribution.max(), 118))  # keep the bars in the lower half
    axes.set_ylabel("share of training steps (%)", color=_BAR_TEXT)
    axes.tick_params(axis="y", colors=_BAR_TEXT)


def _draw_depth_axis(axes: Axes, curve: dict[int, float], distribution: np.ndarray) -> None:
    reach = int(np.searchsorted(np.cumsum(distribution), 0.999))
    low, high = min(*curve, 1), max(*curve, reach)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 2**0.95, high * 2**0.6)
    ticks = sorted({2**i for i in range(math.floor(math.log2(high)) + 1)} | (set(curve) if len(curve) <= 10 else set()))
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("recurrences r of the core (log scale)")
    axes.tick_params(axis="x", colors=GREY)


def _title(folder: Path, run: RunConfig, name: str) -> str:
    count = flops.parameters(run.model)
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if count >= s), (1, ""))
    which = "" if name == CURVE else f", {Path(name).stem.removeprefix('loss_by_depth_').replace('_', ' ')}"
    return f"{folder.resolve().name}{which}: loss by depth ({count / size:.3g}{unit} parameters)"
