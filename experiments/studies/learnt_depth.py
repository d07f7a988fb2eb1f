"""Does a depth that is learnt beat rules that need no training? Quality against FLOPs, on text and on a task.

    python experiments/studies/learnt_depth.py          # trains what is missing: an hour
    python experiments/studies/learnt_depth.py --quick  # only shows that everything works

plain: a recurrent model on text, r of 8 on average, stopped by zero-shot rules, by two heads that are fitted to its
frozen states, or by thresholds that were calibrated (99 % of predictions as at full depth, docs/calibration.md).
  wish: the second stage of Ouro (arXiv 2510.25741): go on while a recurrence still lowers the loss.
  gain: go on while any later recurrence lowers the loss by more than GAIN, after the decider of arXiv 2609.35748, which
  is trained together with its backbone; here the backbone is frozen.
gate: a model in the shape of Ouro (two layers in a loop, four times, every loop predicts), trained with a gate and the
entropy of where it stops; gate 2: the same, its gate then trained alone by the second stage.
task: S3 words of 32 letters on models trained on 16 (depth_scaling.py --task s3_local), with the same heads.
Tokens stop on their own, and later ones see the state they stopped with, as in decoding. A threshold is chosen on half
of the held-out batches and shown on the other half.

Text: the World Factbook. Finished runs are kept in RUNS, a run folder each, and what was read of them beside it.
Hardware: any. Found: docs/studies/learnt-depth.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.studies.shared import rules
from experiments.studies.shared.comparison import beside_earlier
from experiments.studies.shared.halting import fitted as logistic
from experiments.studies.shared.recipes import RECIPES, Recipe
from experiments.studies.shared.recipes import run_config as task_config
from experiments.studies.shared.recipes import trained as train_task
from experiments.studies.shared.record import Json, interval, publish, remembered, rounded
from experiments.studies.shared.text import text_data, text_run, trained
from experiments.studies.shared.training import check_seeds, training_batch
from rdlm import exits
from rdlm.config import Loop, LossConfig, ModelConfig, RecurrenceConfig, RunConfig, TuneConfig, require
from rdlm.data import PackedData
from rdlm.data.prepare import prepare_embedded
from rdlm.evaluation import calibration
from rdlm.exits import ExitRule
from rdlm.losses import IGNORED, cross_entropy, wish_to_continue
from rdlm.model import Params, bind, forward, known
from rdlm.perf import flops
from rdlm.recurrence import trajectory
from rdlm.report.results import commit
from rdlm.run import load
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks.instance import TEST_STREAM, batch
from rdlm.tasks.words import WordProblem
from rdlm.weights import begin_from

Name = Literal["plain", "gate", "gate 2", "task"]
Batches = list[dict[str, np.ndarray]]

STEPS, STAGE_TWO = 600, 200
"""Training steps: of the models, of the gate alone."""
READ, FIT, SPARE = 16, 24, 90
"""Batches that are read, that heads are fitted to, and, for calibration, held-out ones beyond those that are read."""
GAIN = 0.005
"""Nats by which a later recurrence must lower the loss to be worth it."""
ALLOWED = 0.005
"""What a threshold may lose to the best fixed depth: nats on text, accuracy on the task."""
FIXED = (*range(1, 17), 20, 24, 32)
SWEEP: dict[str, tuple[Any, ...]] = {
    "kl": (1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    "gated_kl": ((1e-2, 1.0), (1e-2, 0.5), (1e-2, 0.3), (1e-2, 0.1), (1e-4, 0.1), (1e-5, 0.1), (1e-5, 0.03)),
    "latent_diff": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.003, 0.001),
    "cosine": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6),
    "acceleration": (2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01),
    "wish": (0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 0.9999),
    "gain": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999),
    "gate": (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.99),
}
"""Thresholds; of gated_kl with its gate's."""
HEADS = ("wish", "gain")
ZERO_SHOT = ("kl", "gated_kl", "latent_diff", "cosine", "acceleration")
RULES = {
    "plain": (*ZERO_SHOT, *HEADS),
    "gate": ("gate", "kl"),
    "gate 2": ("gate",),
    "task": (*ZERO_SHOT, *HEADS, "delayed kl", "delayed wish", "delayed gain"),
}
CALIBRATED = ("kl", "latent_diff")
LETTERS = 32


@dataclasses.dataclass(frozen=True)
class Args:
    """Train small models on text, stop their tokens in every way, and compare quality and FLOPs."""

    methods: tuple[Name, ...] = get_args(Name)
    """Models."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the models."""
    runs: Path = Path("runs")
    """Folder of their runs: learnt_depth/..., and s3_local with _seedN."""
    data_folder: Path = Path("data")
    """Folder of the World Factbook."""
    results: Path = Path("experiments/studies/results")
    """Folder for learnt_depth.json and learnt_depth.png."""
    quick: bool = False
    """A few steps and batches; writes only under RUNS/quick."""


class Subject(NamedTuple):
    """A trained model, held-out batches, those that heads are fitted to, spare held-out ones, and full depth."""

    params: Params
    model: ModelConfig
    batches: Batches
    fitting: Batches
    spare: Batches
    max_steps: int


def task_recipe(args: Args) -> Recipe:
    """Of the models of the task."""
    return RECIPES["s3_local"].quick() if args.quick else RECIPES["s3_local"]


def runs_of(name: str, args: Args, seed: int) -> RunConfig:
    """The run of `gate`, of `plain` or of `task`."""
    if name == "task":
        return task_config("s3_local", task_recipe(args), seed, args.runs)
    data, folder = text_data(args.data_folder, args.quick), args.runs / "learnt_depth"
    steps = 4 if args.quick else STEPS
    run_dir = folder / f"{name.replace(' ', '_')}_seed{seed}"
    looped = {
        "core_layers": 2,
        "coda_layers": 0,
        "mean_recurrence": 4,
        "backprop_depth": 4,
        "loop": Loop(injection="none", start="embedding", close=True, bridge=False, gate=True),
    }
    run = dataclasses.replace(text_run(name, data, run_dir, steps, looped if name == "gate" else {}), seed=seed)
    if name == "plain":
        return run
    return dataclasses.replace(run, recurrence=RecurrenceConfig(scheme="fixed"), loss=LossConfig(gate="exit"))


def second_stage(args: Args, seed: int) -> RunConfig:
    """The run that trains the gate of `gate` alone."""
    first = runs_of("gate", args, seed)
    begun = dataclasses.replace(
        first,
        preset="gate 2",
        init=str(trained(first)),
        run_dir=str(args.runs / "learnt_depth" / f"gate_2_seed{seed}"),
        loss=LossConfig(gate="improvement"),
        tune=TuneConfig(only=("gate",)),
        optimizer=dataclasses.replace(first.optimizer, weight_decay=0.0, warmup_steps=1, cooldown_steps=1),
        steps=4 if args.quick else STAGE_TWO,
    )
    return begin_from(begun)


def subject(name: Name, args: Args, seed: int) -> Subject:
    """The model of a seed, trained if need be. Heads are fitted to instances and rows that it was not trained on."""
    reading, fit, spare = (2, 2, 2) if args.quick else (READ, FIT, SPARE)
    if name == "task":
        run, words = runs_of(name, args, seed), WordProblem("S3", LETTERS)
        held_out = [batch(words, TEST_STREAM, i, 16) for i in range(reading)]
        fitting = [training_batch([words], 1000 + seed, i, 16) for i in range(fit)]
        return Subject(train_task(run, task_recipe(args))[0], run.model, held_out, fitting, [], LETTERS)
    text = load(trained(second_stage(args, seed) if name == "gate 2" else runs_of(name, args, seed)))
    data = text_data(args.data_folder, args.quick)
    packed = PackedData(
        prepare_embedded(data), sequence_length=data.sequence_length, batch_size=data.batch_size, seed=seed
    )
    fitting = [packed.batch(STEPS + STAGE_TWO + i) for i in range(fit)]
    held_out = list(text.validation(str(args.data_folder)).batches(reading + spare))
    deepest = 16 if name == "plain" else text.config.mean_recurrence
    return Subject(text.params, text.config, held_out[:reading], fitting, held_out[reading:], deepest)


def segments(found: dict[str, Any]) -> Any:
    """Which document a token belongs to; a word is one."""
    return found.get("segment_ids", np.ones_like(found["tokens"]))


def keys(i: int, found: dict[str, Any]) -> Array:
    """Of the initial states, one for every row of batch i."""
    return jax.random.split(jax.random.key(i), len(found["tokens"]))


@functools.partial(jax.jit, static_argnames=("config", "max_steps"))
def _unrolled(
    params: Params, config: ModelConfig, tokens: Array, rows: Array, labels: Array, key: Array, max_steps: int
) -> tuple[Array, Array]:
    bound = bind(params, config, tokens, segment_ids=rows, key=key)
    states = trajectory(bound.step, bound.s0, max_steps)[1:]
    return states, jax.lax.map(lambda s: cross_entropy(known(config, bound.read(s)[0]), labels), states)


def unrolled(of: Subject, i: int, found: dict[str, Any]) -> tuple[Array, Array]:
    """States [R, B, L, D] of all recurrences of batch i without exits, and losses f32 [R, B, L]."""
    tokens, labels = found["tokens"], found["labels"]
    return _unrolled(of.params, of.model, tokens, segments(found), labels, keys(i, found), of.max_steps)


def stop_at(kind: str, losses: Array) -> Array:
    """What a head learns: how much a token should stop after each recurrence, f32 [R, ...] in [0, 1], from its losses.

    wish: not at all at the first one, which has none before it.
    """
    if kind == "wish":
        return jnp.concatenate([jnp.zeros_like(losses[:1]), 1 - wish_to_continue(losses)])
    best = jax.lax.cummin(losses, reverse=True)
    return (losses - best <= GAIN).astype(jnp.float32)


def fitted(kinds: Iterable[str], of: Subject) -> dict[str, rules.Head]:
    """The head of every kind, by logistic regression on the first half of the recurrences of the frozen model."""
    half, states = of.max_steps // 2, []
    stops: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for i, found in enumerate(of.fitting):
        seen, losses = unrolled(of, 10_000 + i, found)
        scored = found["labels"] != IGNORED
        states.append(np.asarray(seen)[:half, scored].reshape(-1, of.model.embed_dim))
        for kind, stop in stops.items():
            stop.append(np.asarray(stop_at(kind, losses))[:half, scored].ravel())
    given = jnp.asarray(np.concatenate(states))
    return {kind: logistic(given, jnp.asarray(np.concatenate(stop)))[0] for kind, stop in stops.items()}


def rule(name: str, threshold: Any, heads: Mapping[str, rules.Head]) -> ExitRule:
    """The rule of a name, or delayed by a recurrence; `heads`: those that it may read."""
    if name.startswith("delayed "):
        return exits.delayed(rule(name.removeprefix("delayed "), threshold, heads))
    if name in HEADS:
        learnt = rules.halting if name == "wish" else rules.classifier
        return learnt(heads[name], np.float32(threshold))
    values = threshold if isinstance(threshold, tuple) else (threshold,)
    made: ExitRule = getattr(exits, name)(*map(np.float32, values))
    return made


@functools.partial(jax.jit, static_argnames="config")
def stopped(
    params: Params, config: ModelConfig, tokens: Array, rows: Array, labels: Array, key: Array, asked: Any
) -> Array:
    """Sums over scored tokens: their number, losses, right answers, recurrences, checks of logits.

    asked: (maximum of recurrences, rule or None).
    """
    out = forward(params, config, tokens, asked[0], segment_ids=rows, exit_rule=asked[1], key=key)
    logits, scored = known(config, out.logits), labels != IGNORED
    right = jnp.argmax(logits, -1) == labels
    checks = jnp.zeros_like(out.steps) if out.checks is None else out.checks
    parts = jnp.ones_like(out.steps), cross_entropy(logits, labels), right, out.steps, checks
    return jnp.stack([jnp.where(scored, x, 0).sum() for x in parts])


def point(of: Subject, rule: ExitRule | None, max_steps: int, head_reads: bool = False) -> Json:
    """nats, accuracy, recurrences (steps) and MFLOP per scored token, each on the two halves of the held-out batches.

    With no rule, at `max_steps` recurrences.
    """
    total = np.zeros((2, 5))
    for i, b in enumerate(of.batches):
        asked = np.int32(max_steps), rule
        total[i % 2] += np.asarray(
            stopped(of.params, of.model, b["tokens"], segments(b), b["labels"], keys(i, b), asked)
        )
    _, nats, accuracy, steps, checks = (total / total[:, :1]).T
    length = of.batches[0]["tokens"].shape[1]
    costs = [flops.cost(of.model, n, length, c).flops_per_token for n, c in zip(steps, checks, strict=True)]
    spent = (np.array(costs) + steps * 2 * of.model.embed_dim * head_reads) / 1e6
    return {"nats": rounded(nats), "accuracy": rounded(accuracy), "steps": rounded(steps), "mflop": rounded(spent)}


def worse(of: Subject) -> Json:
    """{"r to 2 r": shares of tokens whose loss changes by at most .001, falls more, grows more}."""
    depths = [r for r in (1, 2, 4, 8, 16, 32) if r <= of.max_steps]
    counts, scored = np.zeros((len(depths) - 1, 3)), 0
    for i, found in enumerate(of.batches):
        _, losses = unrolled(of, i, found)
        real = found["labels"] != IGNORED
        at = np.asarray(losses)[np.array(depths) - 1][:, real]
        change = np.diff(at, axis=0)
        counts += np.stack([(np.abs(change) <= 1e-3).sum(1), (change < -1e-3).sum(1), (change > 1e-3).sum(1)], 1)
        scored += int(real.sum())
    pairs = zip(depths, depths[1:], counts / scored, strict=False)
    return {f"{r} to {twice}": rounded(shares) for r, twice, shares in pairs}


def calibrated(of: Subject, epsilon: float) -> Json:
    """{rule: its point, or None} at thresholds chosen on spare rows: 1 - epsilon of predictions as at full depth."""
    tokens, labels, ids = (np.concatenate([b[k] for b in of.spare]) for k in ("tokens", "labels", "segment_ids"))
    scorer = calibration.Scorer(
        of.params, of.model, {"tokens": tokens, "segment_ids": ids, "scored": labels != IGNORED}, of.max_steps
    )
    out: Json = {}
    for kind in CALIBRATED:
        x = calibration.calibrate(scorer, kind, epsilon=epsilon, delta=0.05, step=0, data="text").threshold
        out[kind] = None if x is None else {"threshold": x} | point(of, rule(kind, x, {}), of.max_steps)
    return out


def read(name: Name, of: Subject, quick: bool) -> Json:
    """Every rule at every threshold, every fixed depth, and what more recurrences change."""
    depths = [r for r in FIXED if r <= of.max_steps and (not quick or r in (1, 2, 16))]
    found: Json = {"fixed": [{"threshold": r} | point(of, None, r) for r in depths]}
    learnt = [kind for kind in HEADS if kind in RULES[name]]
    heads = fitted(learnt, of) if learnt else {}
    for kind in RULES[name]:
        plain = kind.removeprefix("delayed ")
        reads = plain in (*HEADS, "gate")
        sweep = SWEEP[plain][1:3] if quick else SWEEP[plain]
        found[kind] = [{"threshold": x} | point(of, rule(kind, x, heads), of.max_steps, reads) for x in sweep]
    out: Json = {"commit": commit(), "points": found, "worse": worse(of)}
    if name == "plain":
        out["calibrated"] = calibrated(of, 0.3 if quick else 0.01)
    return out


def row(name: Name, args: Args, seed: int) -> Json:
    """What `read` finds on the model of a seed, from its file if it is there."""
    about = {
        "model": dataclasses.asdict(runs_of("gate" if name == "gate 2" else name, args, seed).model),
        "steps": (STEPS, STAGE_TWO),
        "batches": (READ, FIT, SPARE),
        "fixed": FIXED,
        "rules": {kind: SWEEP[kind.removeprefix("delayed ")] for kind in RULES[name]},
        "gain": GAIN,
        "letters": LETTERS,
        "seed": seed,
    }
    path = args.runs / "learnt_depth" / f"{name.replace(' ', '_')}_seed{seed}.json"
    return {"seed": seed} | remembered(path, about, lambda: read(name, subject(name, args, seed), args.quick))


def cheapest(name: str, rows: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """(rule, means over seeds) at the threshold of fewest FLOPs that loses at most ALLOWED to the best fixed depth.

    Chosen on the first halves of the batches, shown on the second ones. Nothing for a rule without such a threshold.
    """
    measure, sign = ("accuracy", -1) if name == "task" else ("nats", 1)

    def mean(kind: str, i: int, part: str, half: int) -> float:
        return float(np.mean([row["points"][kind][i][part][half] for row in rows]))

    best = min(sign * mean("fixed", i, measure, 0) for i in range(len(rows[0]["points"]["fixed"])))
    for kind, points in rows[0]["points"].items():
        good = [i for i in range(len(points)) if sign * mean(kind, i, measure, 0) - best <= ALLOWED]
        if not good:
            yield kind, {}
            continue
        i = min(good, key=lambda i: mean(kind, i, "mflop", 0))
        spread = interval([row["points"][kind][i]["mflop"][1] for row in rows])[1]
        parts = {part: round(mean(kind, i, part, 1), 4) for part in ("nats", "accuracy", "steps", "mflop")}
        yield kind, {"threshold": points[i]["threshold"], **parts, "mflop_half": round(spread, 3)}


def table(found: Json) -> str:
    """A row for every model and rule."""
    lines = ["| model | stops by | threshold | nats | accuracy | recurrences | MFLOP |", "|---" * 7 + "|"]
    for name, row in found.items():
        for kind, at in row["cheapest"].items():
            if not at:
                lines.append(f"| {name} | {kind} | none | | | | |")
                continue
            half = "" if math.isnan(at["mflop_half"]) else f" ± {at['mflop_half']:.2f}"
            lines.append(
                f"| {name} | {kind} | {at['threshold']} | {at['nats']:.4f} | {at['accuracy']:.3f} | "
                f"{at['steps']:.2f} | {at['mflop']:.2f}{half} |"
            )
    return "\n".join(lines)


def picture(path: Path, found: Json) -> None:
    """Loss on text and accuracy on the task against FLOPs, a line for every model and rule; means over seeds."""
    from matplotlib.figure import Figure

    colours = {
        "fixed": "#000000",
        "kl": "#0072B2",
        "gated_kl": "#56B4E9",
        "latent_diff": "#D55E00",
        "cosine": "#E69F00",
        "acceleration": "#CC79A7",
        "wish": "#009E73",
        "gain": "#882255",
        "gate": "#999999",
    }
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, row in found.items():
        axes, part = {"plain": (left, "nats"), "task": (right, "accuracy")}.get(name, (middle, "nats"))
        for kind in row["rows"][0]["points"]:
            if (name, kind) == ("gate 2", "fixed"):
                continue  # that of `gate`: only the gate was trained
            xs, ys = (
                np.mean([[np.mean(x[p]) for x in seed["points"][kind]] for seed in row["rows"]], 0)
                for p in ("mflop", part)
            )
            order = np.argsort(xs)
            style = {
                "linestyle": "--" if name == "gate 2" or kind.startswith("delayed") else "-",
                "marker": "s" if kind == "fixed" else "o",
            }
            label = f"{name}: {kind}" if axes is middle else kind
            axes.plot(
                xs[order], ys[order], color=colours[kind.removeprefix("delayed ")], markersize=3, label=label, **style
            )
    for axes, title, label in (
        (left, "text, recurrent model", "loss, nats per token"),
        (middle, "text, with a gate", "loss, nats per token"),
        (right, f"S3, {LETTERS} letters", "accuracy"),
    ):
        axes.set(title=title, xlabel="MFLOP per token", ylabel=label)
        if axes.lines:
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="learnt_depth.py", description=__doc__)
    reuse_freed_memory()
    check_seeds(args.seeds)
    require(len(set(args.methods)) == len(args.methods) > 0, "--methods", args.methods, "must be different methods")
    if args.quick:
        args = dataclasses.replace(args, runs=args.runs / "quick", results=args.runs / "quick")
    found: Json = {}
    for name in args.methods:
        rows = [row(name, args, seed) for seed in args.seeds]
        found[name] = {"cheapest": dict(cheapest(name, rows)), "rows": rows}
        print(table({name: found[name]}), flush=True)
        found[name]["worse"] = {
            step: rounded(np.mean([seed["worse"][step] for seed in rows], axis=0)) for step in rows[0]["worse"]
        }
        print(f"{name}: a doubling of r leaves, lowers, raises a token's loss: {found[name]['worse']}", flush=True)
    path = args.results / "learnt_depth.json"
    found = beside_earlier(path, found, get_args(Name))
    units = {
        "mflop": "forward, per token, with checks and heads",
        "steps": "recurrences per token",
        "points": "on the half of the batches that thresholds are chosen on, and on the other",
        "worse": "shares of tokens whose loss changes by at most .001 nats, falls more, grows more",
        "cheapest": f"threshold of fewest FLOPs within {ALLOWED} of the best fixed depth (nats; on the task, accuracy)",
    }
    publish(path, {"gain": GAIN, "methods": found}, units, functools.partial(picture, found=found))
    return 0


if __name__ == "__main__":
    run_command(main)
