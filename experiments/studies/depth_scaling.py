"""Do more recurrences at test time solve harder problems than training did, without more parameters?

    python experiments/studies/depth_scaling.py  # S3, one seed: runs/s3
    python experiments/studies/depth_scaling.py --task s3 --seeds 0 1 2 3 4  # five seeds: runs/s3, runs/s3_seed1, ...
    python experiments/studies/depth_scaling.py --task s3_local  # with attention to the four tokens before only
    python experiments/studies/depth_scaling.py --task s3_local --beside runs/quickstart  # the end of `make quickstart`
    python experiments/studies/depth_scaling.py --task s3 --quick  # only shows that everything works, seconds

A model of 132,736 parameters (prelude, core and coda of one layer each) is trained from scratch on short instances,
with 8 recurrences on average and gradients through the last 4, and tested at many depths on instances of the same
length and longer. `rdlm.load_checkpoint` reads its run folder; the tables go to experiments/studies/results/ as JSON
and PNG. A finished run folder is read, not trained again.

Hardware: any; one CPU core trains a seed of S3 in 1.4 to 1.7 minutes of processor time, other tasks take up to 2.5.
Expected for S3 (printed beside the limits): at 16 letters 0.46 at r = 1 and 0.999 from r = 12 on; at 32 letters 0.51 at
r = 4 and 0.80 at r = 16; exits that lose nothing and spend three times the recurrences on the longest words.
Found: all of that in five seeds of five; after letter 22 or so no depth helps. With a window of five tokens (s3_local)
depth reaches 64 letters: 0.48 at r = 8, 0.73 at 16, 0.999 at 32, in five seeds of five. Other tasks, failures included:
docs/studies/depth.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.studies.shared.comparison import LEARNT, TEST_BATCH
from experiments.studies.shared.recipes import RECIPES, Recipe, run_config, trained
from experiments.studies.shared.record import Json, publish, rounded
from experiments.studies.shared.training import check_seeds
from rdlm import exits
from rdlm.config import InputError, ModelConfig, RunConfig, require
from rdlm.evaluation.difficulty import ByDifficulty, by_depth, with_exits
from rdlm.model import Params
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks import batch
from rdlm.tasks.instance import TEST_STREAM

Name = Literal[
    "s3", "parity", "s3_local", "s5_local", "parity_local", "addition_local", "chains_local", "corridors_local",
    "expressions", "pointers", "reachability",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Train on small instances, test on larger ones, at many depths."""

    task: Name = "s3"
    """Problem."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation, data, depths and initial states: one run each."""
    runs: Path = Path("runs")
    """Folder for run folders: RUNS/TASK for seed 0, RUNS/TASK_seedN for others."""
    results: Path = Path("experiments/studies/results")
    """Folder for depth_scaling_TASK.json and .png."""
    beside: Path | None = None
    """Run folder of a text model. Only accuracy against r is measured and drawn, beside the loss of that model against
    r, as accuracy_by_depth.json and .png in the run folder of the task. One seed."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes only under RUNS/quick."""


def main() -> int:
    args = parse_arguments(Args, prog="depth_scaling.py", description=__doc__)
    check_seeds(args.seeds)
    recipe, runs, results = RECIPES[args.task], args.runs, args.results
    if args.quick:
        recipe, runs, results = recipe.quick(), args.runs / "quick", args.runs / "quick"
    reuse_freed_memory()
    if args.beside:
        require(len(args.seeds) == 1, "--seeds", args.seeds, "must be one seed with --beside")
        return show_beside(args.beside, run_config(args.task, recipe, args.seeds[0], runs), recipe)
    rows: list[Json] = []
    for seed in args.seeds:
        run = run_config(args.task, recipe, seed, runs)
        params, training = trained(run, recipe)
        rows.append({"seed": seed, "run": Path(run.folder).name} | training | measure(params, run.model, recipe))
        print(summary(rows[-1]), flush=True)
    first = next(iter(recipe.tests))
    failed = [row["seed"] for row in rows if row["tests"][first]["mean"][-1] < LEARNT]
    found: Json = {"depths": list(recipe.depths), "failed_seeds": failed}
    if args.task == "s3" and not args.quick:
        found["bars"] = bars(rows, recipe.depths)
        for name, (value, bar, met) in found["bars"].items():
            print(f"{'met   ' if met else 'MISSED'} {name}: {value} ({bar})")
    print(f"{len(failed)} of {len(rows)} seeds below {LEARNT} on {first}: {failed}")
    units = {
        "mean": "accuracy at each of the depths",
        "by_difficulty": "the same, by difficulty",
        "steps": "recurrences per answer",
        "processor_seconds": "of training",
    }
    path = results / f"depth_scaling_{args.task}.json"
    draw = functools.partial(picture, name=args.task, recipe=recipe, rows=rows)
    publish(path, found | {"seeds": rows}, units, draw)
    return 0


def show_beside(text_run: Path, run: RunConfig, recipe: Recipe) -> int:
    """Train and test one seed; print, save and draw its accuracy against r beside a text model's loss against r."""
    curve = text_run / "loss_by_depth.json"
    if not curve.is_file():
        raise InputError(f"--beside {text_run}: has no loss_by_depth.json; train a text model there first")
    nats = {int(r): float(x) for r, x in json.loads(curve.read_text()).items()}
    params, training = trained(run, recipe)
    accuracy = {name: rounded(tested(params, run.model, recipe, name).accuracy()) for name in recipe.tests}
    found = {
        "run": run.folder,
        "steps": run.steps,
        "processor_seconds": training["processor_seconds"],
        "depths": recipe.depths,
        "accuracy": accuracy,
        "text_run": str(text_run),
        "text_nats": nats,
    }
    print(beside_table(accuracy, recipe.depths, nats))
    draw = functools.partial(beside_picture, accuracy=accuracy, recipe=recipe, nats=nats)
    publish(Path(run.folder) / "accuracy_by_depth.json", found, {"text_nats": "loss per token by r"}, draw)
    return 0


def beside_table(accuracy: Mapping[str, list[float]], depths: tuple[int, ...], nats: Mapping[int, float]) -> str:
    """A column for every r."""
    shown = sorted({*depths, *nats})
    lines = [f"{'recurrences r':22}" + "".join(f"{r:8}" for r in shown)]
    for i, (name, values) in enumerate(accuracy.items()):
        at = dict(zip(depths, values, strict=True))
        label = f"{name}, accuracy" + (" *" if not i else "")
        lines.append(f"{label:22}" + "".join(f"{at[r]:8.3f}" if r in at else " " * 8 for r in shown))
    lines.append(f"{'text, nats a token':22}" + "".join(f"{nats[r]:8.4f}" if r in nats else " " * 8 for r in shown))
    return "\n".join([*lines, "* the length of training"])


def beside_picture(path: Path, accuracy: Mapping[str, list[float]], recipe: Recipe, nats: Mapping[int, float]) -> None:
    """Left: accuracy of the task against r, a line for every test. Right: loss of the text model against r."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    task, text = figure.subplots(1, 2)
    for colour, (name, values) in zip(("#0072B2", "#D55E00", "#009E73"), accuracy.items(), strict=False):
        task.plot(recipe.depths, values, color=colour, marker="o", markersize=4, label=name)
    task.axvline(recipe.mean_recurrence, color="#999999", linestyle=":", label="mean r of training")
    trained_on = next(iter(accuracy))
    task.set(title=f"{recipe.task[0].upper()}, trained on {trained_on}", ylabel="accuracy", ylim=(0, 1.03))
    task.legend(frameon=False, fontsize=8)
    text.plot(list(nats), list(nats.values()), color="#000000", marker="o", markersize=4)
    text.set(title="text", ylabel="validation loss, nats per token")
    for axes, depths in ((task, recipe.depths), (text, tuple(nats))):
        axes.set(xscale="log", xlabel="recurrences r")
        axes.set_xticks(depths, map(str, depths))
        axes.minorticks_off()
    figure.savefig(path, dpi=110)


def bars(rows: list[Json], depths: tuple[int, ...]) -> dict[str, tuple[float, str, bool]]:
    """Expectations for S3, as means over the seeds: {name: (value, limit, whether it is met)}."""

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return round(sum(values) / len(values), 4)

    def accuracy(T: int, r: int) -> float:
        return mean(row["tests"][f"length {T}"]["mean"][depths.index(r)] for row in rows)

    def last_quarter(r: int) -> float:
        tests = [row["tests"]["length 16"]["by_difficulty"] for row in rows]
        return mean(test[str(t)][depths.index(r)] for test in tests for t in (13, 14, 15, 16))

    exits = [row["tests"]["length 16"]["exits"]["kl 5e-4, per sequence"] for row in rows]
    kept = mean(e["accuracy"] - row["tests"]["length 16"]["mean"][-1] for e, row in zip(exits, rows, strict=True))
    ratio = mean(e["steps_by_difficulty"]["16"] / e["steps_by_difficulty"]["2"] for e in exits)
    found = {
        "length 16, r=1": (accuracy(16, 1), "<= .62"),
        "length 16, r=12": (accuracy(16, 12), ">= .99"),
        "last quarter of 16, r=1": (last_quarter(1), "<= .27"),
        "last quarter of 16, r=12": (last_quarter(12), ">= .97"),
        "length 16, change from r=12 to r=64": (round(abs(accuracy(16, 64) - accuracy(16, 12)), 4), "<= .01"),
        "length 32, gain from r=4 to r=16": (round(accuracy(32, 16) - accuracy(32, 4), 4), ">= .18"),
        "KL exit of sequences of 16, loss of accuracy": (0.0 - kept, "<= .005"),
        "KL exit, steps at length 16 / steps at length 2": (ratio, ">= 2.5"),
        "most processor seconds of a seed": (max(row["processor_seconds"] for row in rows), "<= 120"),
        "most compiled training steps of a seed": (max(row["programs"] for row in rows), "<= 1"),
    }
    return {
        name: (value, bar, value <= float(bar[3:]) if bar[0] == "<" else value >= float(bar[3:]))
        for name, (value, bar) in found.items()
    }


def picture(path: Path, name: str, recipe: Recipe, rows: list[Json]) -> None:
    """Above: accuracy by (difficulty, r), mean over seeds. Below: accuracy by r for every seed; depth of exits."""
    from matplotlib.figure import Figure

    tests, depths = list(recipe.tests), recipe.depths
    figure = Figure(figsize=(4.2 * max(len(tests), 2), 7.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    upper, lower = parts
    for axes, test in zip(upper.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
        table = [row["tests"][test]["by_difficulty"] for row in rows]
        hard = sorted({int(d) for found in table for d in found})
        mean = np.array([np.mean([found[str(d)] for found in table if str(d) in found], axis=0) for d in hard])
        image = axes.imshow(mean, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="cividis", interpolation="none")
        axes.set_xticks(range(len(depths)), map(str, depths))
        some = range(0, len(hard), max(1, len(hard) // 8))
        axes.set_yticks(some, [str(hard[i]) for i in some])
        axes.set(title=f"{name}, {test}", xlabel="recurrences r", ylabel="difficulty")
    upper.colorbar(image, ax=upper.axes, label=f"accuracy (seeds: {len(rows)})")
    curves, exits = lower.subplots(1, 2)
    for colour, test in zip(("#0072B2", "#D55E00", "#009E73"), tests, strict=False):
        for row in rows:
            curves.plot(depths, row["tests"][test]["mean"], color=colour, alpha=0.3, linewidth=1)
        mean = np.mean([row["tests"][test]["mean"] for row in rows], axis=0)
        curves.plot(depths, mean, color=colour, marker="o", markersize=4, label=test)
    curves.axvline(recipe.mean_recurrence, color="#999999", linestyle=":", label="mean r of training")
    curves.set(xscale="log", xlabel="recurrences r", ylabel="accuracy", ylim=(0, 1.03))
    curves.set_xticks(depths, map(str, depths))
    curves.minorticks_off()
    curves.legend(frameon=False, fontsize=8)
    table = [row["tests"][tests[-1]]["exits"] for row in rows]
    for colour, rule in zip(("#0072B2", "#56B4E9", "#009E73", "#D55E00"), table[0], strict=True):
        steps = [found[rule]["steps_by_difficulty"] for found in table]
        hard = sorted({int(d) for found in steps for d in found})
        exits.plot(hard, [np.mean([f[str(d)] for f in steps if str(d) in f]) for d in hard], color=colour, label=rule)
    exits.set(title=f"exits, {tests[-1]}", xlabel="difficulty", ylabel="mean recurrences", ylim=(0, None))
    exits.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def test_data(recipe: Recipe, name: str) -> list[dict[str, np.ndarray]]:
    """The test batches of a name."""
    return [batch(recipe.tests[name], TEST_STREAM, i, TEST_BATCH) for i in range(recipe.test_batches)]


def tested(params: Params, model: ModelConfig, recipe: Recipe, name: str) -> ByDifficulty:
    """Correct answers by difficulty and depth on a test."""
    return by_depth(params, model, test_data(recipe, name), recipe.depths)


def measure(params: Params, model: ModelConfig, recipe: Recipe) -> Json:
    """Accuracy by depth and by difficulty, and with exits, on every test."""
    out, limit = {}, recipe.max_steps
    for name in recipe.tests:
        data, curve = test_data(recipe, name), tested(params, model, recipe, name)
        rules = {
            "kl 5e-4, per sequence": with_exits(params, model, data, exits.kl(5e-4), limit, per_sequence=True),
            "kl 5e-4, per token": with_exits(params, model, data, exits.kl(5e-4), limit),
            "kl 1e-5, per token": with_exits(params, model, data, exits.kl(1e-5), limit),
            "latent_diff 0.03, per token": with_exits(params, model, data, exits.latent_diff(0.03), limit),
        }
        out[name] = {
            "answers": int(curve.count.sum()),
            "mean": rounded(curve.accuracy()),
            "by_difficulty": {str(d): rounded(curve.accuracy(d, d)) for d in known(curve)},
            "exits": {
                rule: {
                    "accuracy": round(float(found.accuracy()[0]), 4),
                    "steps": round(found.mean_steps(), 2),
                    "accuracy_by_difficulty": {str(d): round(float(found.accuracy(d, d)[0]), 4) for d in known(found)},
                    "steps_by_difficulty": {str(d): round(found.mean_steps(d, d), 2) for d in known(found)},
                }
                for rule, found in rules.items()
            },
        }
    return {"tests": out}


def known(found: ByDifficulty) -> list[int]:
    """Difficulties that occur."""
    return [d for d, n in enumerate(found.count.tolist()) if n]


def summary(row: Json) -> str:
    """Accuracies of a seed, and its exits."""
    lines = [f"seed {row['seed']}: loss {row['loss']:.4f}, {row['processor_seconds']:.0f} s of processor time"]
    for name, test in row["tests"].items():
        lines.append(f"  {name:12} " + " ".join(f"{x:.3f}" for x in test["mean"]))
        for rule, found in test["exits"].items():
            lines.append(f"    exit {rule}: {found['accuracy']:.4f} with {found['steps']:.2f} recurrences")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
