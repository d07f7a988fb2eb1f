"""What all figures share: colours, a log axis of recurrences, token labels, and saving. Needs no display."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdlm.config import InputError
from rdlm.runtime import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct under every kind of colour blindness.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
GREY, GRID = "#555555", "#DDDDDD"
COLOURS = "viridis"
"""Colour map of all continuous values: even in lightness, so it also reads in grey."""
NO_MATPLOTLIB = "none, matplotlib is not installed (pip install 'rdlm[plots]')"


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def picture_line(draw: Callable[[], Path]) -> str:
    """A line for a command to print: where `draw` put its picture, or why there is none.

    Raises:
      InputError: the picture cannot be written.
    """
    return f"picture: {draw() if can_draw() else NO_MATPLOTLIB}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
      InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise InputError(
            "matplotlib: not installed; pictures need the extra `plots` (pip install 'rdlm[plots]')"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> Path:
    """Write `figure` to `path` as PNG, atomically.

    Raises:
      InputError: the file cannot be written.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks show as boxes; the reader cannot change that here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(content, format="png", dpi=dpi)
    return write_output(path, content.getvalue())


def depth_axis(axes: Axes, depths: Sequence[int], label: str = "recurrences r (log scale)") -> None:
    """A log axis of recurrences, with a tick at each of `depths` or, if there are more than ten, at powers of two."""
    ticks = list(depths) if len(depths) <= 10 else [2**i for i in range(max(depths).bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def shown(piece: str, max_length: int = 12) -> str:
    """A token's text as a label: white space is made visible, and long texts are cut."""
    text = piece.replace(" ", "·").replace("\n", "↵").replace("\t", "→").replace("\r", "↵") or "∅"
    text = "".join(c if c.isprintable() else "□" for c in text)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
