"""The sections about results: what the commands of experiments/ have left in a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rdlm.config import InputError
from rdlm.evaluation import calibration
from rdlm.report import shown
from rdlm.report.page.charts import COLOURS, Series, chart
from rdlm.report.page.parts import Html, details, missing, picture, table, tag

LENS_TOKENS, SLOWEST = 24, 8  # rows of tables
SHOWN_DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def read(path: Path, command: str, render: Callable[[dict[str, Any]], Html]) -> Html:
    """What `render` makes of a JSON file.

    Raises:
      InputError: the file is damaged, or not what `command` writes.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"an object was expected, this is a {type(tree).__name__}")
        return render(tree)
    except InputError:
        raise
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(
            f"{path}: damaged, or not what `{command}` writes ({said}); delete it or run that again"
        ) from error


def made_by(tree: dict[str, Any], step: int) -> Html:
    """The command behind a result, and a warning if it is about another checkpoint."""
    parts: list[Any] = ["Made by ", tag("code", tree.get("command", "an unknown command"))]
    if tree.get("commit"):
        parts += [" at commit ", tag("code", tree["commit"])]
    made = tag("p", *parts, class_="soft")
    if tree.get("step", step) == step:
        return made
    stale = f"This is about step {tree['step']}; the checkpoint is step {step}."
    return Html(tag("p", stale, class_="missing") + made)


def beside(path: Path, alt: str) -> Html:
    """The picture that goes with a JSON file, if it was drawn."""
    path = path.with_suffix(".png")
    if path.is_file():
        return picture(path, alt)
    return missing("No picture: matplotlib was not installed.", "pip install 'rdlm[plots]'")


def units_of(units: dict[str, str], names: dict[str, str]) -> str:
    """A caption with the units of the columns, {key: heading}, that have one."""
    return "; ".join(f"{head}: {units[key]}" for key, head in names.items() if key in units)


def columns(tree: dict[str, Any], names: dict[str, str]) -> Html:
    """Some columns, {key: heading}, of a result's rows."""
    rows = [[shown(row[key]) if key == "token" else row[key] for key in names] for row in tree["rows"]]
    return table(list(names.values()), rows, units_of(tree["units"], names))


def loss_by_depth(folder: Path, task: bool) -> Html:
    """The validation loss at every depth that was evaluated."""
    path, command = folder / "loss_by_depth.json", f"python experiments/evaluate.py {folder}"
    if task:
        return tag("p", "Trained on a task: how often it is right at each depth is below, under depth and exits.")
    if not path.is_file():
        return missing("The loss by depth is missing.", command)

    def render(tree: dict[str, Any]) -> Html:
        curve = sorted((int(r), float(nats)) for r, nats in tree.items())
        if not curve or curve[0][0] < 1:
            raise ValueError("no depth of at least 1")
        r, nats = map(list, zip(*curve, strict=True))
        change = [None, *(b - a for a, b in pairwise(nats))]
        alt = f"Validation loss by recurrences: {nats[0]:.3f} at r = {r[0]}, {nats[-1]:.3f} at r = {r[-1]}"
        drawn = chart(
            [Series("validation loss", r, nats)], x="recurrences r", y="validation loss (nats per token)", alt=alt,
            log_x=True,
        )  # fmt: skip
        differences = ["" if c is None else f"{c:+.4f}" if abs(c) >= 5e-5 else f"{c:+.0e}" for c in change]
        rows = [[a, f"{b:.4f}", c] for a, b, c in zip(r, nats, differences, strict=True)]
        return Html(drawn + table(["recurrences r", "nats per token", "change"], rows))

    return read(path, command, render)


def sweep(folder: Path, step: int) -> Html:
    """Quality against effort: fixed depth and exit rules."""
    path, command = folder / "analysis" / "depth_sweep.json", f"python experiments/depth_sweep.py {folder}"
    if not path.is_file():
        return missing("The sweep over depths and exit rules is missing.", command)

    def render(tree: dict[str, Any]) -> Html:
        names = {
            "rule": "rule", "threshold": "threshold", "nats": "nats", "bits_per_byte": "bits/byte",
            "accuracy": "accuracy", "iterations": "mean r", "flops_per_token": "FLOPs/token",
            "equivalent_parameters": "unrolled parameters", "pareto": "best for its FLOPs",
        }  # fmt: skip
        rows = tree["rows"]
        keys = [k for k in names if any(row.get(k) is not None for row in rows)]

        def lines(some: list[dict[str, Any]]) -> Html:
            body = [[round(row[k]) if k == "equivalent_parameters" else row[k] for k in keys] for row in some]
            return table([names[k] for k in keys], body, units_of(tree["units"], {k: names[k] for k in keys}))

        best = [row for row in rows if row["pareto"] or row["threshold"] is None]
        about = tag("p", f"On {tree['data']}, {tree['tokens']:,} scored tokens.")
        drawn = beside(path, f"Quality against mean recurrences and FLOPs per token, {len(rows)} settings")
        said = tag("p", "Every fixed depth, and whatever no other setting beats for fewer FLOPs:")
        return Html(
            about + drawn + said + lines(best) + details(f"All {len(rows)} rows", lines(rows)) + made_by(tree, step)
        )

    return read(path, command, render)


def calibrated(folder: Path, step: int) -> Html:
    """Thresholds with a promise, and what was tried on the way."""
    found = calibration.read(folder)
    command = f"python experiments/calibrate_exits.py {folder}"
    if not found:
        return missing("No exit rule is calibrated.", command)
    rows = [
        [
            x.rule, "none" if x.threshold is None else x.threshold, percent(x.agreement), percent(x.checked_agreement),
            x.mean_steps, x.flops_per_token, percent(x.flops_saved, 0),
        ]
        for x in found.values()
    ]  # fmt: skip
    heads = ["rule", "threshold", "agreement", "on other rows", "mean r", "FLOPs/token", "saved"]
    note = "Agreement: tokens whose likeliest next token is that of full depth. Saved: FLOPs against full depth."
    some = list(found.values())[:COLOURS]
    lines = [Series(x.rule, [t[2] for t in x.tried], [100 * t[1] for t in x.tried]) for x in some]
    alt = "Agreement with full depth by mean recurrences, for every threshold that was tested: " + ", ".join(found)
    drawn = chart(lines, x="mean recurrences per token", y="agreement with full depth (%)", alt=alt)
    words = "".join(tag("p", words) for words in dict.fromkeys(promise(x) for x in found.values()))
    other = {x.step for x in found.values()} - {step}
    stale = missing(f"Calibrated for step {', '.join(map(str, other))}, not {step}.", command) if other else ""
    tests = [[x.rule, *t[:1], percent(t[1], 3), *t[2:]] for x in found.values() for t in x.tried]
    every = table(["rule", "threshold", "agreement", "mean r", "p-value"], tests)
    return Html(stale + words + table(heads, rows, note) + drawn + details("Every threshold that was tested", every))


def promise(x: calibration.Calibrated) -> str:
    """What all rules that were calibrated alike promise; of a rule that promises nothing, just that."""
    words = x.guarantee if x.threshold is None else x.guarantee.partition(": ")[2]
    return words[0].upper() + words[1:] + "."


def percent(share: float | None, digits: int = 2) -> str | None:
    """99.53 %, or None."""
    return None if share is None else f"{100 * share:.{digits}f} %"


def trajectories(folder: Path, step: int) -> Html:
    """What the latent states of one text do."""
    where, command = folder / "analysis" / "trajectories", f"python experiments/trajectories.py {folder}"
    parts: dict[str, tuple[str, Callable[[dict[str, Any]], Html]]] = {
        "paths": ("Paths of tokens, in their principal components", paths),
        "distance": ("Distance to the limit", lambda tree: by_depth(tree["distance"], 0, tree["units"]["distance"])),
        "heatmap": ("Convergence over the text", slowest),
        "independence": ("Different initial states", independence),
        "contraction": ("What a recurrence does to small differences", contraction),
        "lens": ("Logit lens: what it would have said", lens),
    }
    if not any((where / f"{name}.json").is_file() for name in parts):
        return missing("The latent trajectories are missing.", command)
    made = []
    for name, (heading, render) in parts.items():
        path = where / f"{name}.json"
        if not path.is_file():
            made.append(Html(tag("h3", heading) + missing(f"{name}.json is missing.", command)))
            continue

        def one(tree: dict[str, Any], path: Path = path, heading: str = heading, render: Any = render) -> Html:
            what = tag("p", f"{len(tree['tokens'])} tokens ({tree['text']}), {tree['recurrences']} recurrences.")
            first = Html(what + made_by(tree, step)) if not made else ""
            return Html(first + tag("h3", heading) + beside(path, f"{heading}: {tree['text']}") + render(tree))

        made.append(read(path, command, one))
    return Html("".join(made))


def paths(tree: dict[str, Any]) -> Html:
    """How many tokens come to rest, go round or drift."""
    counts = table(["kind of path", "tokens"], list(tree["counts"].items()))
    names = {k: k.replace("_", " ") for k in ("position", "token", "kind", "settled_after", "rate", "period")}
    return Html(counts + details(f"All {len(tree['rows'])} tokens", columns(tree, names)))


def by_depth(values: list[list[float]], first: int, unit: str) -> Html:
    """Median and largest over tokens of values [r - first][token]."""
    depths = [r for r in SHOWN_DEPTHS if first <= r < first + len(values)]
    return table(["recurrences r", "median token", "largest"],
                 [[r, median(values[r - first]), max(values[r - first])] for r in depths], unit)  # fmt: skip


def slowest(tree: dict[str, Any]) -> Html:
    """The tokens that are farthest from their limit for longest."""
    values, names = tree["log10_distance"], tree["tokens"]
    far = [max((r for r, row in enumerate(values, 1) if row[i] > -2), default=0) for i in range(len(names))]
    order = sorted(range(len(names)), key=lambda i: -far[i])[:SLOWEST]
    return table(["position", "token", "recurrences"], [[i, shown(names[i]), far[i] + 1] for i in order],
                 "The slowest tokens: recurrences until within 1 % of the limit")  # fmt: skip


def independence(tree: dict[str, Any]) -> Html:
    """Whether other initial states end at the same limit."""
    count, starts = f"{tree['same_limit']} of {len(tree['tokens'])}", tree["starts"]
    words = f"{count} tokens reach the same limit from {starts} initial states (within {tree['same_within']:.0%})."
    return Html(tag("p", words) + by_depth(tree["spread"], 0, tree["units"]["spread"]))


def contraction(tree: dict[str, Any]) -> Html:
    """Singular values and eigenvalues along the path."""
    return columns(tree, {k: k for k in ("r", "norm", "radius", "period")})


def lens(tree: dict[str, Any]) -> Html:
    """The likeliest next token after r recurrences; right ones in bold."""
    lines = []
    for row in tree["rows"][:LENS_TOKENS]:
        cells = zip(row["top"], row["probability"], row["hit"], strict=True)
        lines.append([
            shown(row["token"]),
            *(tag("b" if hit else "span", f"{shown(top)} {100 * p:.0f}") for top, p, hit in cells),
        ])  # fmt: skip
    right = tree["units"]["hit"].removeprefix("whether the likeliest is ")
    caption = f"The first {len(lines)} tokens: likeliest next token and its probability in %; bold: {right}"
    return table(["after", *(f"r = {r}" for r in tree["depths"])], lines, caption)
