"""One self-contained HTML page about a run, without scripts and without requests.

`page.html.jinja` is its markup, style and words; this file reads the run folder and computes what is not in it.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from rdlm.checkpoint import read_config, read_meta, saved_steps
from rdlm.config import InputError
from rdlm.evaluation import calibration
from rdlm.perf import flops
from rdlm.report.charts import MAX_LINES, Series, bar_chart, line_chart
from rdlm.report.figures import can_draw, shown
from rdlm.report.results import Json

Found = tuple[Json, Markup | None]
"""What a file holds and how the page shows it; ({}, None) where there is no file."""

TRAJECTORIES = ("paths", "distance", "heatmap", "independence", "contraction", "lens")
CURVE_POINTS = 200  # of a training curve; longer ones are averaged
SLOWEST = 8  # tokens in the table of the slowest
LIMITED = ("token_correlation", "gain", "state_drift", "contraction")
"""Vitals that `rdlm.analysis.vitals.alarms` watches."""
_DRAWN, _VALIDATION, _VITAL = "recurrences drawn", "validation_loss_r", "vital_"
_NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?( %)?")


def html_page(folder: Path, commands: Mapping[str, str]) -> str:
    """The page about the newest checkpoint in a run folder.

    Args:
      folder: run folder.
      commands: command that creates each missing section, by "train", "evaluate", "depth_sweep", "calibrate_exits",
        "trajectories", "questions" and "lm_eval".

    Raises:
      InputError: not a run folder, no checkpoint, or a damaged file in it: named, with what to do.
    """
    run, meta, step = read_config(folder), read_meta(folder), saved_steps(folder)[-1]
    template = _template(
        folder=folder,
        step=step,
        task=run.data.task,
        commands=commands,
        plots=can_draw(),
    )
    analysis = folder / "analysis"

    def section(name: str, path: Path, command: str = "") -> Found:
        return _section(path, commands[command or name], getattr(template, name))

    asked = {path.stem.removeprefix("questions_"): path for path in sorted(analysis.glob("questions_*.json"))}
    latent = {name: analysis / "trajectories" / f"{name}.json" for name in TRAJECTORIES}
    first = next((path for path in latent.values() if path.is_file()), analysis)
    names = ["config.json", "metrics.jsonl", "loss_by_depth.json", "calibrated_exits.json"]
    listed = [p for p in [*(folder / name for name in names), *sorted(analysis.rglob("*"))] if p.is_file()]
    found = {
        "training": training(folder / "metrics.jsonl"),
        "loss_by_depth": section("loss_by_depth", folder / "loss_by_depth.json", "evaluate"),
        "sweep": section("sweep", analysis / "depth_sweep.json", "depth_sweep"),
        "calibrated": list(calibration.read(folder).values()),
        "about": section("about", first, "trajectories")[1],
        "trajectories": {name: section(name, path, "trajectories") for name, path in latent.items()},
        "questions": {name: section("questions", path) for name, path in asked.items()},
        "lm_eval": [section("lm_eval", path)[1] for path in lm_eval_results(analysis)],
        "others": [
            path
            for path in sorted(analysis.glob("*.png"))
            if not path.name.startswith(("depth_sweep", "questions", "lm_eval"))
        ],
        "files": [[str(path.relative_to(folder)), path.stat().st_size] for path in listed],
    }
    page: str = template.page(f"{folder.resolve().name}: report", run, meta.get("source"), found)
    return page.lstrip()


def checks_page(title: str, words: str, facts: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """A page of checks: rows of (name, value, what is expected, verdict), and what they ran on."""
    page: str = _template(folder=None, step=None, task=None, commands={}, plots=True).checks(
        title, words, list(facts.items()), rows
    )
    return page.lstrip()


def lm_eval_results(analysis: Path) -> list[Path]:
    """The results of each set of tasks, and the newest unless it is one of them."""
    kept, newest = sorted(analysis.glob("lm_eval_*.json")), analysis / "lm_eval.json"
    if newest.is_file() and newest.read_bytes() not in [path.read_bytes() for path in kept]:
        kept.append(newest)
    return kept


def _template(**known: Any) -> Any:
    """The macros of page.html.jinja, with what all of them know."""
    engine = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=text,
        extensions=["jinja2.ext.do"],
    )
    functions = (numeric_columns, percent, interval, deepest, median, shown, slowest, read_png)
    charts = (depth_curve, agreement_chart)
    engine.globals.update({f.__name__: f for f in (*functions, *charts)}, flops=flops, **known)
    engine.filters["guarantee"] = guarantee
    return engine.from_string(files("rdlm.report").joinpath("page.html.jinja").read_text(encoding="utf-8")).module


def _section(path: Path, command: str, macro: Callable[[Json], Markup]) -> Found:
    """What `macro` makes of the JSON object in `path`.

    Raises:
      InputError: the file is damaged, or not what `command` writes.
    """
    if not path.is_file():
        return {}, None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"an object was expected, this is a {type(tree).__name__}")
        return tree, macro(tree)
    except InputError:
        raise
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(
            f"{path}: damaged, or not what `{command}` writes ({reason}); delete it or run that again"
        ) from error


# Cells


def text(value: Any) -> Any:
    """`value` as the page shows it: numbers readably, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else value


def number(value: float) -> str:
    """Four digits, powers of ten only where they help: 0.0123, 12.34, 1,234,567, 2.5e-07, 3.1e+12."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None, digits: int = 2) -> str | None:
    """99.53 %, or None."""
    return None if share is None else f"{100 * share:.{digits}f} %"


def interval(share: float, low: float, high: float) -> str:
    """A share and its interval, in percent."""
    return f"{percent(share, 1)} ({100 * low:.3g} to {100 * high:.3g})"


def numeric_columns(rows: Iterable[Sequence[Any]]) -> list[bool]:
    """Which columns hold numbers only."""
    columns = [[cell for x in column if (cell := str(text(x)))] for column in zip(*rows, strict=True)]
    return [bool(column) and all(map(_NUMBER.fullmatch, column)) for column in columns]


class Png(NamedTuple):
    """A PNG file as a data address, with its size in pixels."""

    address: str
    width: int
    height: int


def read_png(path: Path) -> Png:
    """A PNG file, to embed.

    Raises:
      InputError: it cannot be read, or is not a PNG.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise InputError(f"{path}: is not a PNG; delete it and make it again")
    return Png("data:image/png;base64," + base64.b64encode(data).decode(), *struct.unpack(">II", data[16:24]))


# Training


def training(path: Path) -> Json:
    """Charts and tables of every number in metrics.jsonl.

    Raises:
      InputError: a line is damaged.
    """
    rows = read_metrics(path) if path.is_file() else []
    for row in rows:
        if "n" in row and "k" in row:
            row[_DRAWN] = row["n"] + row["k"]
    labels = {
        "loss": "training loss (nats per token)",
        "learning_rate": "learning rate",
        _DRAWN: "recurrences r = n + k, mean",
        "tokens_per_second": "tokens per second",
        "grad_norm": "norm of the gradient",
    }
    hidden = {"step", "alarms", "n", "k", "seconds", "processor_seconds", "programs"}
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    known = [name for name in labels if name in names]
    depths = [name for name in names if name.startswith(_VALIDATION)]
    vitals = [name.removeprefix(_VITAL) for name in names if name.startswith(_VITAL)]
    rest = [name for name in names if name not in (*known, *depths) and not name.startswith(_VITAL)]

    def vital_charts(some: Iterable[str]) -> list[Markup]:
        return [metric(rows, _VITAL + name, f"vital: {name.replace('_', ' ')}") for name in some]

    values = {name: [row[_VITAL + name] for row in rows if _VITAL + name in row] for name in vitals}
    return {
        "rows": rows,
        "curves": {name: metric(rows, name, labels[name]) for name in known},
        "validation": validation(rows, depths),
        "draws": draws([int(row[_DRAWN]) for row in rows if _DRAWN in row]),
        "progress_heads": ["steps", *(name.replace("_", " ") for name in known)],
        "progress": progress(rows, known),
        "alarms": [(row["step"], words) for row in rows for words in row.get("alarms", [])],
        "vitals": [[name, found[0], found[-1]] for name, found in values.items()],
        "limited": vital_charts(name for name in LIMITED if name in vitals),
        "unlimited": vital_charts(name for name in vitals if name not in LIMITED),
        "rest": [metric(rows, name, name) for name in rest],
    }


def read_metrics(path: Path) -> list[Json]:
    """The numbers of every step; a line truncated by a kill is dropped.

    Raises:
      InputError: the file cannot be read, or a line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); put the run's own back") from error
    rows = []
    for i, line in enumerate(lines, 1):
        if not line.endswith("}"):
            continue
        try:
            row = json.loads(line)
            alarms = {"alarms": list(map(str, row["alarms"]))} if "alarms" in row else {}
            numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
            rows.append({"step": numbers["step"]} | numbers | alarms)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: line {i} is not the numbers of a step ({error}); mend it, or put the run's own file back"
            ) from error
    return rows


def binned(rows: Sequence[Json], key: str) -> list[list[float]]:
    """[steps, means, minima, maxima] of at most CURVE_POINTS equal stretches; [] where no step has the number."""
    found = [(row["step"], float(row[key])) for row in rows if key in row and math.isfinite(row[key])]
    each = max(1, -(-len(found) // CURVE_POINTS))
    parts = [list(zip(*found[i : i + each], strict=True)) for i in range(0, len(found), each)]
    points = [(fmean(at), fmean(values), min(values), max(values)) for at, values in parts]
    return [list(x) for x in zip(*points, strict=True)]


def metric(rows: Sequence[Json], key: str, label: str) -> Markup:
    """The curve of one number; a band shows the range behind each averaged point."""
    points = binned(rows, key)
    if not points:
        return Markup("")
    at, mean, *band = points
    alt = f"{label} by step: {number(mean[0])} at first, {number(mean[-1])} at the end"
    return line_chart([Series(label, at, mean, *(band if len(at) < len(rows) else []))], "step", label, alt)


def validation(rows: Sequence[Json], names: Sequence[str]) -> Markup:
    """Validation loss during training, a line for each of the first depths."""
    found = [(f"r = {name.removeprefix(_VALIDATION)}", binned(rows, name)) for name in names[:MAX_LINES]]
    lines = [Series(name, *points[:2]) for name, points in found if points]
    if not lines:
        return Markup("")
    alt = "Validation loss during training: " + ", ".join(f"{x.name}: {number(x.y[-1])} at the end" for x in lines)
    return line_chart(lines, "step", "validation loss (nats per token)", alt)


def draws(r: Sequence[int]) -> dict[str, str] | None:
    """How often each number of recurrences was drawn; None where it was always the same."""
    if len(set(r)) < 2:
        return None
    counts, depths = Counter(r), range(min(r), max(r) + 1)
    words = f"Recurrences drawn: {min(r)} to {max(r)}, mean {fmean(r):.1f}, median {median(r):g}"
    shares = [100 * counts[x] / len(r) for x in depths]
    return {
        "words": words,
        "svg": bar_chart(depths, shares, "recurrences r = n + k", "share of logged steps (%)", words),
    }


def progress(rows: Sequence[Json], keys: Sequence[str]) -> list[list[Any]]:
    """The same as numbers, averaged over tenths of the training."""
    each = max(1, -(-len(rows) // 10))
    parts = [rows[i : i + each] for i in range(0, len(rows), each)]

    def mean(part: Sequence[Json], key: str) -> float | None:
        found = [row[key] for row in part if key in row]
        return fmean(found) if found else None

    return [[f"{p[0]['step']:,} to {p[-1]['step']:,}", *(mean(p, key) for key in keys)] for p in parts]


# Results


def depth_curve(tree: Json) -> Json:
    """A chart and the rows (r, nats, change) of a loss by depth."""
    points = sorted((int(r), math.nan if nats is None else float(nats)) for r, nats in tree.items())
    if not points or points[0][0] < 1:
        raise ValueError("no depth of at least 1")
    r, nats = zip(*points, strict=True)
    change = ["", *(f"{b - a:+.4f}" if abs(b - a) >= 5e-5 else f"{b - a:+.0e}" for a, b in pairwise(nats))]
    rows = [
        [a, f"{b:.4f}", c] if math.isfinite(b) else [a, "not finite", ""]
        for a, b, c in zip(r, nats, change, strict=True)
    ]
    if not any(map(math.isfinite, nats)):
        return {"svg": Markup(""), "rows": rows}
    alt = f"Validation loss by recurrences: {nats[0]:.3f} at r = {r[0]}, {nats[-1]:.3f} at r = {r[-1]}"
    line = Series("validation loss", r, nats)
    svg = line_chart([line], "recurrences r (log scale)", "validation loss (nats per token)", alt, log_x=True)
    return {"svg": svg, "rows": rows}


def agreement_chart(found: Sequence[calibration.Calibrated]) -> Markup:
    """Agreement with full depth against recurrences, of every threshold that was tested."""
    lines = [
        Series(x.rule, [t.mean_steps for t in x.tried], [100 * t.agreement for t in x.tried]) for x in found[:MAX_LINES]
    ]
    alt = "Agreement with full depth by mean recurrences, for every threshold that was tested"
    return line_chart(lines, "mean recurrences per token", "agreement with full depth (%)", alt)


def guarantee(x: calibration.Calibrated) -> str:
    """The guarantee of a rule, without its name: rules calibrated with the same goal share this text."""
    words = x.guarantee if x.threshold is None else x.guarantee.partition(": ")[2]
    return words[0].upper() + words[1:] + "."


def slowest(log_distance: Sequence[Sequence[float]], tokens: Sequence[str]) -> list[list[Any]]:
    """(position, token, recurrences) of the tokens that are farthest from their limit for longest."""
    far = [max((r for r, row in enumerate(log_distance, 1) if row[i] > -2), default=0) for i in range(len(tokens))]
    order = sorted(range(len(tokens)), key=lambda i: -far[i])[:SLOWEST]
    return [[i, shown(tokens[i]), far[i] + 1] for i in order]


def deepest(by_depth: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """What stands at the largest depth."""
    return by_depth[max(by_depth, key=int)]
