"""What all pictures share: figures without a display, colours, token names, and files that appear whole."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdlm.config import InputError
from rdlm.runtime import write_output

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLACK, BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
GREY, GRID = "#555555", "#DDDDDD"
COLOURS = "viridis"
"""Map of all continuous colours: even in lightness, so it reads in grey as well."""


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches.

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


def save_figure(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Write `figure` to `path` as PNG, atomically.

    Raises:
      InputError: the file cannot be written.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks shows as boxes; nothing the reader can do about it here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(content, format="png", dpi=dpi)
    return write_output(path, content.getvalue())


def depth_axis(axes: Any, depths: Sequence[int], label: str = "recurrences r (log scale)") -> None:
    """A log axis of recurrences with a tick at every one of the `depths`, or at powers of two when they are many."""
    most = max(depths)
    ticks = list(depths) if len(depths) <= 10 else [2**i for i in range(most.bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def shown(piece: str, most: int = 12) -> str:
    """A token's text as a label: white space made visible, long ones cut."""
    text = piece.replace(" ", "·").replace("\n", "↵").replace("\t", "→").replace("\r", "↵") or "∅"
    text = "".join(c if c.isprintable() else "□" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"
