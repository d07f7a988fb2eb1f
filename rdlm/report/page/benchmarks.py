"""The section about benchmarks: question sets and lm-eval tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rdlm.report.page.parts import Html, details, missing, picture, table, tag
from rdlm.report.page.results import made_by, percent, read

WAYS = {"sum": "right by likelihood", "per_character": "right per character", "greedy": "right, greedily"}


def benchmarks(folder: Path, step: int, task: bool) -> Html:
    """What experiments/questions.py and experiments/lm_eval.py have found.

    Raises:
      InputError: a file is damaged.
    """
    if task:
        return tag("p", "None: a model that was trained on a task reads no text.")
    analysis, parts = folder / "analysis", [tag("h3", "Questions")]
    command = f"python experiments/questions.py {folder}"
    found = sorted(analysis.glob("questions_*.json"))
    if not found:
        parts.append(missing("No questions were asked.", command))
    for path in found:
        name = path.stem.removeprefix("questions_")
        parts += [tag("h4", name), *(picture(p, f"{name}: right answers by recurrences") for p in drawn(path, "")),
                  read(path, command, lambda tree: Html(questions(tree) + made_by(tree, step))),
                  *(picture(p, f"{name}: recurrences by category") for p in drawn(path, "_steps"))]  # fmt: skip
    parts.append(tag("h3", "lm-eval tasks"))
    path, command = analysis / "lm_eval.json", f"python experiments/lm_eval.py {folder} --preset paper"
    if path.is_file():
        parts.append(read(path, command, lambda tree: Html(lm_eval(tree) + made_by(tree, step))))
    else:
        parts.append(missing("No task of lm-eval was run.", command))
    return Html("".join(parts))


def drawn(path: Path, ending: str) -> list[Path]:
    """The picture of a result, if there is one."""
    there = path.with_name(f"{path.stem}{ending}.png")
    return [there] if there.is_file() else []


def questions(tree: dict[str, Any]) -> Html:
    """Right answers at every depth, beside what no model at all scores, and recurrences by category."""
    rows = tree["rows"]
    ways = [way for way in WAYS if way in rows[0]]
    numbers = ("nats", "iterations", "flops_per_token")
    body = [
        [
            x["depth"],
            *(f"{percent(x[w]['accuracy'], 1)} ({between(x[w], 100)})" for w in ways),
            *(x[n] for n in numbers),
        ]
        for x in rows
    ]
    nothing = ", ".join(f"{name} {percent(share, 1)}" for name, share in tree["baselines"].items())
    said = f"{tree['count']:,} questions; with 95 % intervals. " + (f"Without a model: {nothing}." if nothing else "")
    heads = ["depth", *(WAYS[way] for way in ways), "nats", "mean r", "FLOPs/token"]
    parts = [table(heads, body, said)]
    if tree["categories"]:
        parts.append(details("By category, at the deepest", categories(tree["categories"])))
    for key, what in (("prompt_steps", "recurrences of the questions' tokens"), ("new_token_steps", "of new tokens")):
        if key in tree:
            parts.append(details(f"Steps: {what}", steps(tree[key] if key == "new_token_steps" else {what: tree[key]})))
    return Html("".join(parts))


def between(row: dict[str, float], factor: float = 1.0) -> str:
    """The interval of a row."""
    return f"{factor * row['low']:.3g} to {factor * row['high']:.3g}"


def categories(known: dict[str, Any]) -> Html:
    """Accuracy of every category at the deepest depth."""
    ways = [way for way in WAYS if way in next(iter(known.values()))]

    def deepest(by_depth: dict[str, list[float]]) -> str:
        share, low, high = by_depth[max(by_depth, key=int)]
        return f"{percent(share, 1)} ({between({'low': low, 'high': high}, 100)})"

    body = [[name, row["count"], *(deepest(row[way]) for way in ways)] for name, row in known.items()]
    return table(["category", "questions", *(WAYS[way] for way in ways)], body)


def steps(ways: dict[str, Any]) -> Html:
    """Mean recurrences by category, one column per way of starting."""
    first = next(iter(ways.values()))
    body = [
        [name, row["questions"], *(f"{way[name]['mean']:.2f} ({between(way[name])})" for way in ways.values())]
        for name, row in first.items()
    ]
    return table(["category", "questions", *ways], body, "Mean with 95 % interval over questions")


def lm_eval(tree: dict[str, Any]) -> Html:
    """Every metric of every task at every depth, and the published rows."""
    rows = tree["rows"]
    metrics = dict.fromkeys((task, m) for x in rows for task, found in x["results"].items() for m in found)
    body = [[task, metric, *(x["results"].get(task, {}).get(metric) for x in rows)] for task, metric in metrics]
    effort = [
        [x["name"], task, cost["iterations"], cost["flops_per_token"]]
        for x in rows
        for task, cost in x["cost"].items()
    ]  # fmt: skip
    limit = tree["protocol"].get("limit")
    said = "All examples." if limit is None else f"Only the first {limit} examples of each task."
    parts = [
        table(["task", "metric", *(x["name"] for x in rows)], body, f"Shares from 0 to 1. {said}"),
        details("What it cost", table(["row", "task", "mean r", "FLOPs/token"], effort)),
    ]
    if tree["published"]:
        names = dict.fromkeys(task for values in tree["published"].values() for task in values)
        body = [[model, *(values.get(name) for name in names)] for model, values in tree["published"].items()]
        parts.append(table(["published, %", *names], body, "arXiv 2502.05171"))
    return Html("".join(parts))
