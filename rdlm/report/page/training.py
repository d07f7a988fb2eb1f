"""The section about training: every number of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from rdlm.config import InputError
from rdlm.report.page.charts import COLOURS, Series, chart
from rdlm.report.page.parts import Html, details, missing, number, table, tag

CURVE_POINTS = 200
"""Of a training curve; longer ones are averaged."""
DRAWN, VALIDATION, VITAL = "recurrences drawn", "validation_loss_r", "vital_"
LIMITED = ("token_correlation", "gain", "state_drift", "contraction")
"""Vitals that `rdlm.analysis.vitals.alarms` watches."""


def training(folder: Path) -> Html:
    """Curves of every number in metrics.jsonl.

    Raises:
      InputError: a line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return missing(
            "There is no metrics.jsonl: this model was not trained here.", "python experiments/train.py PRESET"
        )
    rows = steps(path)
    if not rows:
        return missing("metrics.jsonl holds no step yet.", "python experiments/train.py PRESET")
    for row in rows:
        if "n" in row and "k" in row:
            row[DRAWN] = row["n"] + row["k"]
    chosen = {
        "loss": "training loss (nats per token)", "learning_rate": "learning rate",
        DRAWN: "recurrences r = n + k, mean", "tokens_per_second": "tokens per second",
        "grad_norm": "norm of the gradient",
    }  # fmt: skip
    hidden = {"step", "alarms", "n", "k", "seconds", "processor_seconds", "programs"}
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    known = [name for name in chosen if name in names]
    depths = [name for name in names if name.startswith(VALIDATION)]
    vital = [name for name in names if name.startswith(VITAL)]
    rest = [name for name in names if name not in (*known, *depths, *vital)]
    parts: list[Any] = []
    for name in known:
        parts.append(metric(rows, name, chosen[name]))
        if name == "loss":
            parts += [progress(rows, known), validated(rows, depths)]
        if name == DRAWN:
            parts.append(draws(rows))
    parts.append(vitals(rows, vital) if vital else "")
    if rest:
        parts.append(details(f"Further numbers: {len(rest)}", *(metric(rows, name, name) for name in rest)))
    return Html("".join(parts))


def steps(path: Path) -> list[dict[str, Any]]:
    """The numbers of every step; a line cut short by a kill is dropped.

    Raises:
      InputError: the file cannot be read, or a line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it, or put the run's own back") from error
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
            raise InputError(f"{path}: line {i} is not the numbers of a step ({error}); delete that line") from error
    return rows


def validated(rows: list[dict[str, Any]], names: list[str]) -> Html:
    """The validation losses of training, a line per depth."""
    found = {name: binned(rows, name) for name in names}
    lines = [
        Series(f"r = {name.removeprefix(VALIDATION)}", [p[0] for p in points], [p[1] for p in points])
        for name, points in found.items()
        if points
    ][:COLOURS]
    if not lines:
        return Html("")
    alt = "Validation loss during training: " + ", ".join(f"{x.name}: {number(x.y[-1])} in the end" for x in lines)
    return chart(lines, x="step", y="validation loss (nats per token)", alt=alt)


def vitals(rows: list[dict[str, Any]], names: list[str]) -> Html:
    """Whether the recurrence was well: alarms, the vitals that have limits, and the others on request."""
    alarms = [
        tag("p", f"Step {row['step']:,}: {line}", class_="missing") for row in rows for line in row.get("alarms", [])
    ]
    found = {name.removeprefix(VITAL): [row[name] for row in rows if name in row] for name in names}
    last = table(["vital", "first", "last"], [[name, values[0], values[-1]] for name, values in found.items()],
                 "What they mean and their limits: rdlm/analysis/vitals.py")  # fmt: skip
    charts = {name: metric(rows, VITAL + name, f"vital: {name.replace('_', ' ')}") for name in found}
    shown = [charts.pop(name) for name in LIMITED if name in charts]
    return Html("".join([tag("h3", "Vitals"), *alarms, last, *shown, details("The other vitals", *charts.values())]))


def binned(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, most) of at most CURVE_POINTS equal stretches; steps without the number are left out."""
    found = [(row["step"], float(row[key])) for row in rows if key in row and math.isfinite(row[key])]
    each = -(-len(found) // CURVE_POINTS)
    parts = [found[i : i + each] for i in range(0, len(found), each or 1)]
    return [
        (sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p), min(v for _, v in p), max(v for _, v in p))
        for p in parts
    ]


def metric(rows: list[dict[str, Any]], key: str, label: str) -> Html:
    """The curve of one number; a band shows the range behind each averaged point."""
    points = binned(rows, key)
    if not points:
        return Html("")
    step, mean, low, high = map(list, zip(*points, strict=True))
    band = {"low": low, "high": high} if len(points) < len(rows) else {}
    alt = f"{label} by step: {number(mean[0])} at first, {number(mean[-1])} in the end"
    return chart([Series(label, step, mean, **band)], x="step", y=label, alt=alt)


def progress(rows: list[dict[str, Any]], keys: list[str]) -> Html:
    """The same as numbers, averaged over tenths of the training."""
    each = -(-len(rows) // 10)
    parts = [rows[i : i + each] for i in range(0, len(rows), each)]

    def mean(part: list[dict[str, Any]], key: str) -> float | None:
        found = [row[key] for row in part if key in row]
        return sum(found) / len(found) if found else None

    lines = [[f"{p[0]['step']:,} to {p[-1]['step']:,}", *(mean(p, key) for key in keys)] for p in parts]
    return table(["steps", *(key.replace("_", " ") for key in keys)], lines, "Means over the logged steps")


def draws(rows: list[dict[str, Any]]) -> Html:
    """How often each number of recurrences was drawn."""
    found = [int(row[DRAWN]) for row in rows if DRAWN in row]
    if len(set(found)) < 2:
        return Html("")
    counts = Counter(found)
    r = list(range(min(found), max(found) + 1))
    share = [100 * counts[x] / len(found) for x in r]
    mean = sum(found) / len(found)
    alt = f"Distribution of the drawn recurrences: {min(found)} to {max(found)}, {mean:.1f} on average"
    bars = chart(
        [Series("steps", r, share)], x="recurrences r = n + k", y="share of logged steps (%)", alt=alt, bars=True
    )
    return Html(bars + tag("p", f"{alt}, median {median(found):g}.", class_="soft"))
