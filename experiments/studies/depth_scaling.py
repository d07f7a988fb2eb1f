"""Do more recurrences at test time solve harder problems than training did, without more parameters?

    python experiments/studies/depth_scaling.py  # S3, one seed: runs/s3
    python experiments/studies/depth_scaling.py --task s3 --seeds 0 1 2 3 4  # five seeds: runs/s3, runs/s3_seed1, ...
    python experiments/studies/depth_scaling.py --task s3_local  # tokens that see their neighbours alone
    python experiments/studies/depth_scaling.py --task s3 --quick  # the machinery alone, seconds

A model of 132,736 parameters (prelude, core and coda of one layer each) is trained from scratch on short instances,
with the core run 8 times on average and gradients through the last 4, and read at every depth on instances as long
and longer. Run folders hold what `rdlm.load_checkpoint` loads; the tables go to
experiments/studies/results/ as JSON and PNG. A run folder that is finished is read again, not trained again.

Hardware: any; one CPU core trains a seed of S3 in 1.4 to 1.7 minutes of processor time, other tasks take up to 2.5.
Expected for S3 (the command prints them beside their bars): at 16 letters .46 at r = 1 and .999 from r = 12 on; at 32
letters .51 at r = 4 and .80 at r = 16; exits that lose nothing and spend three times the steps on the longest words.
Found: all of that in five seeds of five; behind letter 22 or so no depth helps. With a window of five tokens (s3_local)
depth reaches 64 letters: .48 at r = 8, .73 at 16, .999 at 32, in five seeds of five. What other tasks gave, failures
included, is in experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.studies.shared.record import processor_seconds, rounded
from experiments.studies.shared.training import check_seeds, small_run, train
from rdlm.config import InputError, ModelConfig, RunConfig, differences
from rdlm.report import can_draw
from rdlm.report.results import command, commit, compact
from rdlm.runtime import parse_arguments, run_command
from rdlm.tasks import Addition, Expression, PointerChasing, Reachability, Task, WordProblem, batch
from rdlm.tasks.instance import TEST_STREAM

if TYPE_CHECKING:
    from rdlm.evaluation.difficulty import ByDifficulty
    from rdlm.model import Params

TEST_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained on what, and read where."""

    train: tuple[Task, ...]
    """Training instances; several take turns."""
    tests: dict[str, tuple[Task, ...]]
    """Test instances by name; the first are of training's size."""
    steps: int = 1000
    learning_rate: float = 1e-3
    rope_base: float = 10_000.0
    attention_window: int | None = None
    """Tokens that a token sees, itself included."""
    mean_recurrence: int = 8
    """Mean r of training."""
    batch_size: int = 64
    depths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    """Recurrences to read at."""
    exits_most: int = 64
    """Recurrences after which a token that has not stopped is stopped."""
    test_batches: int = 4
    """Of 64 instances."""


RECIPES = {
    "s3": Recipe(
        train=(WordProblem("S3", 16),),
        tests={f"length {T}": (WordProblem("S3", T),) for T in (16, 32, 64)},
    ),
    "parity": Recipe(
        train=(WordProblem("Z2", 16),),
        tests={f"length {T}": (WordProblem("Z2", T),) for T in (16, 32)},
    ),
    "s3_local": Recipe(
        train=(WordProblem("S3", 16),),
        tests={f"length {T}": (WordProblem("S3", T),) for T in (16, 32, 64)},
        attention_window=5,
    ),
    "s5_local": Recipe(
        train=(WordProblem("S5", 8),),
        tests={f"length {T}": (WordProblem("S5", T),) for T in (8, 16, 32)},
        steps=1500, learning_rate=2e-3, attention_window=2,
    ),
    "parity_local": Recipe(
        train=(WordProblem("Z2", 8),),
        tests={f"length {T}": (WordProblem("Z2", T),) for T in (8, 16, 32)},
        attention_window=2,
    ),
    "addition_local": Recipe(
        train=(Addition(3, 8, 0.5),),
        tests={
            "8 digits": (Addition(3, 8, 0.5),),
            "16 digits, one chain": (Addition(3, 16, 1.0),),
            "32 digits, one chain": (Addition(3, 32, 1.0),),
        },
        learning_rate=2e-3, mean_recurrence=4,
        attention_window=5,  # a column, and the `=` before it
    ),
    "expressions": Recipe(
        train=(Expression(8),),
        tests={f"{n} operators": (Expression(n),) for n in (8, 16, 24)},
        learning_rate=2e-3, batch_size=48,
    ),
    "pointers": Recipe(
        train=(PointerChasing(4, 12),),
        tests={f"{h} hops": (PointerChasing(h, 12),) for h in (4, 8)},
        learning_rate=2e-3, batch_size=48,
    ),
    "reachability": Recipe(
        train=(Reachability(2), Reachability(4), Reachability(6)),
        tests={f"distance {d}": (Reachability(d),) for d in (6, 12)},
        learning_rate=2e-3, batch_size=32,
    ),
}  # fmt: skip
Name = Literal[
    "s3", "parity", "s3_local", "s5_local", "parity_local", "addition_local", "expressions", "pointers", "reachability"
]
LEARNT = 0.95  # accuracy on instances of training's size at the deepest r, below which a seed counts as failed


@dataclasses.dataclass(frozen=True)
class Args:
    """Train on small instances, test on larger ones, at many depths."""

    task: Name = "s3"
    """Which problem."""
    seeds: tuple[int, ...] = (0,)
    """Of initialisation, data, depths and initial states: one run each."""
    runs: Path = Path("runs")
    """Where run folders go: RUNS/TASK for seed 0, RUNS/TASK_seedN for others."""
    results: Path = Path("experiments/studies/results")
    """Where depth_scaling_TASK.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def main() -> int:
    args = parse_arguments(Args, prog="depth_scaling.py", description=__doc__)
    check_seeds(args.seeds)
    recipe, runs, results = RECIPES[args.task], args.runs, args.results
    if args.quick:
        hardest = dict(list(recipe.tests.items())[-1:])
        recipe = dataclasses.replace(
            recipe, tests=hardest, steps=12, batch_size=8, depths=(1, 2, 8), exits_most=8, test_batches=1
        )
        runs = results = args.runs / "quick"
    from rdlm.runtime.allocator import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        run = run_config(args.task, recipe, seed, runs)
        params, training = trained(run, recipe)
        rows.append({"seed": seed, "run": Path(run.folder).name} | training | measure(params, run.model, recipe))
        print(summary(rows[-1]), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"depth_scaling_{args.task}.json"
    found: dict[str, Any] = {"command": command(), "commit": commit(), "depths": list(recipe.depths)}
    first = next(iter(recipe.tests))
    failed = [row["seed"] for row in rows if row["tests"][first]["mean"][-1] < LEARNT]
    found["failed_seeds"] = failed
    if args.task == "s3" and not args.quick:
        found["bars"] = checked = bars(rows, recipe.depths)
        for name, (value, bar, met) in checked.items():
            print(f"{'met   ' if met else 'MISSED'} {name}: {value} ({bar})")
    print(f"{len(failed)} of {len(rows)} seeds below {LEARNT} on {first}: {failed}")
    path.write_text(compact(found | {"seeds": rows}))
    print(f"numbers: {path}")
    if can_draw():
        picture(path.with_suffix(".png"), args.task, recipe, rows)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


def bars(rows: list[dict[str, Any]], depths: tuple[int, ...]) -> dict[str, tuple[float, str, bool]]:
    """What S3 was expected to show, as means over the seeds: {name: (value, bar, whether it was met)}."""

    def mean(values: Any) -> float:
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


def picture(path: Path, name: str, recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    """Above: accuracy by (difficulty, r), mean over seeds. Below: accuracy by r of every seed; steps until exit."""
    import numpy as np
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


def run_config(name: str, recipe: Recipe, seed: int, runs: Path) -> RunConfig:
    """The run of one seed; its folder is RUNS/NAME, or RUNS/NAME_seedN for N > 0."""
    return small_run(
        f"depth_scaling_{name}", recipe.train, steps=recipe.steps, learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size, rope_base=recipe.rope_base, attention_window=recipe.attention_window, seed=seed,
        mean_recurrence=recipe.mean_recurrence,
        run_dir=str(runs / (name if seed == 0 else f"{name}_seed{seed}")),
    )  # fmt: skip


def trained(run: RunConfig, recipe: Recipe) -> tuple[Params, dict[str, Any]]:
    """(parameters, facts of training) of a run: from its folder if it is finished, else trained from scratch.

    Raises:
      InputError: the folder holds another run, or training diverged.
    """
    import jax

    from rdlm.checkpoint import Checkpoints, load_checkpoint, read_config, saved_steps, write_config
    from rdlm.optim import optimizer
    from rdlm.runtime.progress import Progress
    from rdlm.train import init_state, train_step
    from rdlm.train.metrics import MetricsWriter, read_metrics

    folder = Path(run.folder)
    if (folder / "config.json").exists():
        changed = differences(read_config(folder), run)
        if changed:
            name, (old, new) = next(iter(changed.items()))
            raise InputError(
                f"run folder {folder}: holds a run with {name} = {old!r}, not {new!r}; choose other --runs"
            )
        if run.steps in saved_steps(folder):
            return load_checkpoint(folder)[0], read_metrics(folder)[-1]
    tx = optimizer(run.optimizer, run.steps)
    state = jax.jit(functools.partial(init_state, run, tx))()
    step: Any = jax.jit(functools.partial(train_step, run, tx), donate_argnums=0)
    progress, started = Progress(run.steps), processor_seconds()
    with Checkpoints(folder, keep=1) as checkpoints:
        writer = MetricsWriter(folder, 0)

        def watch(i: int, values: dict[str, float]) -> None:
            spent = {"processor_seconds": round(processor_seconds() - started, 1), "programs": step._cache_size()}
            writer.write(i, values | spent)
            progress.update(i + 1, f"{folder}  loss {values['loss']:.4f}", last=i + 1 == run.steps)

        state = train(run, recipe.train, step, state, watch)
        writer.close()
        checkpoints.save(
            run.steps, state.params, state.optimizer, {"config": dataclasses.asdict(run), "step": run.steps}
        )
    write_config(folder, run)  # last: a folder with a config is a run that is finished
    return state.params, read_metrics(folder)[-1]


def measure(params: Params, model: ModelConfig, recipe: Recipe) -> dict[str, Any]:
    """Everything that is read of one model."""
    from rdlm import exits
    from rdlm.evaluation import difficulty as depth

    out, most = {}, recipe.exits_most
    for name, tasks in recipe.tests.items():
        data = [batch(tasks, TEST_STREAM, i, TEST_BATCH) for i in range(recipe.test_batches)]
        curve = depth.by_depth(params, model, data, recipe.depths)
        rules = {
            "kl 5e-4, per sequence": depth.with_sequence_exits(params, model, data, exits.kl(5e-4), most),
            "kl 5e-4, per token": depth.with_exits(params, model, data, exits.kl(5e-4), most),
            "kl 1e-5, per token": depth.with_exits(params, model, data, exits.kl(1e-5), most),
            "latent_diff 0.03, per token": depth.with_exits(params, model, data, exits.latent_diff(0.03), most),
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


def summary(row: dict[str, Any]) -> str:
    """What a seed found, a line per test."""
    lines = [f"seed {row['seed']}: loss {row['loss']:.4f}, {row['processor_seconds']:.0f} s of processor time"]
    for name, test in row["tests"].items():
        lines.append(f"  {name:12} " + " ".join(f"{x:.3f}" for x in test["mean"]))
        for rule, found in test["exits"].items():
            lines.append(f"    exit {rule}: {found['accuracy']:.4f} with {found['steps']:.2f} steps")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
