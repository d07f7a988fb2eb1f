"""Does a depth that is learnt beat rules that need no training? Quality against FLOPs, on text and on a task.

    python experiments/studies/learnt_depth.py          # trains what is missing: an hour
    python experiments/studies/learnt_depth.py --quick  # only shows that everything works

plain: a recurrent model on text, mean r of 8, stopped by zero-shot rules, by two heads that are fitted to its frozen
states, or by thresholds that were calibrated (99 % of predictions as at full depth, docs/calibration.md).
  wish: the second stage of Ouro (arXiv 2510.25741): go on while a recurrence still lowers the loss.
  gain: go on while any later recurrence lowers the loss by more than GAIN, after the decider of arXiv 2609.35748, which
  is trained together with its backbone; here the backbone is frozen.
gate: a model in the shape of Ouro (two layers in a loop, four times, every loop predicts), trained with a gate and the
entropy of where it stops; gate 2: the same, its gate then trained alone by the second stage.
task: S3 words of 32 letters on models trained on 16 (depth_scaling.py --task s3_local), with the same heads.
Tokens stop on their own, and later ones see the state they stopped with, as in decoding.

Text: the World Factbook. Finished runs are kept in RUNS, a run folder each. Hardware: any.
Found: docs/studies/learnt-depth.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.studies.shared import rules
from experiments.studies.shared.comparison import beside_earlier
from experiments.studies.shared.halting import head
from experiments.studies.shared.recipes import RECIPES
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
from rdlm.losses import IGNORED, cross_entropy, improvement_loss
from rdlm.model import Params, bind, forward, known
from rdlm.perf import flops
from rdlm.recurrence import trajectory
from rdlm.run import load
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks.instance import TEST_STREAM, batch
from rdlm.tasks.words import WordProblem
from rdlm.weights import begin_from

Name = Literal["plain", "gate", "gate 2", "task"]
Batches = list[dict[str, np.ndarray]]

STEPS, STAGE_TWO, FIT = 600, 200, 150
"""Training steps: of the models, of the gate alone, of the heads."""
GAIN = 0.005
"""Nats by which a later recurrence must lower the loss to be worth it; thresholds may lose as much."""
ALLOWED = 0.005
"""What a threshold may lose: nats on text, accuracy on the task."""
SWEEP: dict[str, tuple[float, ...]] = {
    "kl": (0.3, 0.1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5),
    "gated_kl": (0.1, 1e-2, 1e-3, 1e-4),
    "latent_diff": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01),
    "cosine": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4),
    "acceleration": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01),
    "wish": (0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999),
    "gain": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "gate": (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.99),
}
HEADS = ("wish", "gain")
ZERO_SHOT = ("kl", "gated_kl", "latent_diff", "cosine", "acceleration")
RULES = {"plain": (*ZERO_SHOT, *HEADS), "gate": ("gate", "kl"), "gate 2": ("gate",), "task": (*ZERO_SHOT, *HEADS)}
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
    """A trained model, held-out batches, those that heads are fitted to, and the recurrences of full depth."""

    params: Params
    model: ModelConfig
    batches: Batches
    fitting: Batches
    max_steps: int


def runs_of(name: str, args: Args, seed: int) -> RunConfig:
    """The run of `gate`, or of `plain`."""
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
    """The model of a seed, trained if need be."""
    if name == "task":
        recipe = RECIPES["s3_local"].quick() if args.quick else RECIPES["s3_local"]
        run = task_config("s3_local", recipe, seed, args.runs)
        held_out = [batch(WordProblem("S3", LETTERS), TEST_STREAM, i, 64) for i in range(1 if args.quick else 4)]
        words = [WordProblem("S3", LETTERS)]
        fitting = [training_batch(words, 1000 + seed, i, 16) for i in range(2 if args.quick else FIT)]
        return Subject(train_task(run, recipe)[0], run.model, held_out, fitting, 32)
    text = load(trained(second_stage(args, seed) if name == "gate 2" else runs_of(name, args, seed)))
    data = text_data(args.data_folder, args.quick)
    packed = PackedData(prepare_embedded(data), sequence_length=data.sequence_length, batch_size=data.batch_size)
    fitting = [packed.batch(i) for i in range(2 if args.quick else FIT)]
    held_out = list(text.validation(str(args.data_folder)).batches(1 if args.quick else 16))
    return Subject(text.params, text.config, held_out, fitting, 16 if name == "plain" else 4)


def segments(found: dict[str, Any]) -> Any:
    """Which document a token belongs to; a word is one."""
    return found.get("segment_ids", np.ones_like(found["tokens"]))


@functools.partial(jax.jit, static_argnames=("config", "max_steps"))
def unrolled(params: Params, config: ModelConfig, tokens: Array, rows: Array, labels: Array, max_steps: int) -> Any:
    """States [R, B, L, D] of all recurrences without exits, and losses f32 [R, B, L]."""
    bound = bind(params, config, tokens, segment_ids=rows, key=jax.random.key(0))
    states = trajectory(bound.step, bound.s0, max_steps)[1:]
    return states, jax.lax.map(lambda s: cross_entropy(known(config, bound.read(s)[0]), labels), states)


def improves(losses: Array) -> Array:
    """Whether a later recurrence lowers the loss f32 [R, ...] by more than GAIN; never at the last one."""
    best = jax.lax.cummin(losses, reverse=True)
    return losses - best > GAIN


def head_loss(kind: str, weights: rules.Head, states: Array, losses: Array, labels: Array) -> Array:
    """What a head that stops tokens is fitted by; f32 scalar."""
    logits = rules.unit(weights, states)
    if kind == "wish":
        found = improvement_loss(losses, logits, LossConfig())
    else:
        found = optax.sigmoid_binary_cross_entropy(logits, 1.0 - improves(losses)).mean(0)
    return jnp.where(labels != IGNORED, found, 0).sum() / (labels != IGNORED).sum()


def fitted(kind: str, of: Subject) -> rules.Head:
    """The head of a kind, fitted to the frozen model."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, len(of.fitting)))

    @jax.jit
    def update(weights: rules.Head, moments: Any, states: Array, losses: Array, labels: Array) -> Any:
        grads = jax.grad(functools.partial(head_loss, kind))(weights, states, losses, labels)
        moves, moments = optimizer.update(grads, moments)
        return optax.apply_updates(weights, moves), moments

    weights = head(of.model.embed_dim, 0.1)
    moments = optimizer.init(weights)
    for found in of.fitting:
        seen = unrolled(of.params, of.model, found["tokens"], segments(found), found["labels"], of.max_steps)
        weights, moments = update(weights, moments, *seen, found["labels"])
    return weights


def rule(name: str, threshold: float, heads: Mapping[str, rules.Head]) -> ExitRule:
    """The rule of a name; `heads`: those that it may read."""
    if name in HEADS:
        learnt = rules.halting if name == "wish" else rules.classifier
        return learnt(heads[name], np.float32(threshold))
    made: ExitRule = getattr(exits, name)(np.float32(threshold))
    return made


@functools.partial(jax.jit, static_argnames="config")
def stopped(
    params: Params, config: ModelConfig, tokens: Array, rows: Array, labels: Array, max_steps: Array, rule: Any
) -> Array:
    """Sums over scored tokens: their number, losses, right answers, recurrences, checks of logits."""
    out = forward(params, config, tokens, max_steps, segment_ids=rows, exit_rule=rule, key=jax.random.key(0))
    logits, scored = known(config, out.logits), labels != IGNORED
    right = jnp.argmax(logits, -1) == labels
    checks = jnp.zeros_like(out.steps) if out.checks is None else out.checks
    parts = jnp.ones_like(out.steps), cross_entropy(logits, labels), right, out.steps, checks
    return jnp.stack([jnp.where(scored, x, 0).sum() for x in parts])


def point(of: Subject, rule: ExitRule | None, max_steps: int, head_reads: bool = False) -> dict[str, float]:
    """nats, accuracy, recurrences and MFLOP per scored token; with no rule, at `max_steps` recurrences."""
    total = np.zeros(5)
    for b in of.batches:
        rows = segments(b)
        total += np.asarray(stopped(of.params, of.model, b["tokens"], rows, b["labels"], np.int32(max_steps), rule))
    _, nats, accuracy, steps, checks = total / total[0]
    spent = flops.cost(of.model, steps, of.batches[0]["tokens"].shape[1], checks).flops_per_token
    spent += steps * 2 * of.model.embed_dim * head_reads
    return {"nats": nats, "accuracy": accuracy, "steps": steps, "mflop": spent / 1e6}


def worse(of: Subject) -> Json:
    """{"r to 2 r": shares of tokens whose loss changes by at most .001, falls more, grows more}."""
    depths = [r for r in (1, 2, 4, 8, 16) if r <= of.max_steps]
    counts, scored = np.zeros((len(depths) - 1, 3)), 0
    for found in of.batches:
        _, losses = unrolled(of.params, of.model, found["tokens"], segments(found), found["labels"], of.max_steps)
        real = found["labels"] != IGNORED
        at = np.asarray(losses)[np.array(depths) - 1][:, real]
        change = np.diff(at, axis=0)
        counts += np.stack([(np.abs(change) <= 1e-3).sum(1), (change < -1e-3).sum(1), (change > 1e-3).sum(1)], 1)
        scored += int(real.sum())
    pairs = zip(depths, depths[1:], counts / scored, strict=False)
    return {f"{r} to {twice}": rounded(shares) for r, twice, shares in pairs}


def calibrated(of: Subject, rows: Batches) -> Json:
    """{rule: threshold or None} chosen on other rows, so that 99 % of predictions stay those of full depth."""
    tokens, labels, ids = (np.concatenate([b[k] for b in rows]) for k in ("tokens", "labels", "segment_ids"))
    made = {"tokens": tokens, "segment_ids": ids, "scored": labels != IGNORED}
    scorer = calibration.Scorer(of.params, of.model, made, of.max_steps)
    return {
        name: calibration.calibrate(scorer, name, epsilon=0.01, delta=0.05, step=0, data="text").threshold
        for name in CALIBRATED
    }


def read(name: Name, of: Subject, quick: bool) -> Json:
    """Every rule at every threshold, every fixed depth, and what more recurrences change."""
    deepest = range(1, of.max_steps + 1) if of.max_steps <= 4 else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    found: Json = {"fixed": [{"threshold": r} | point(of, None, r) for r in deepest if r <= of.max_steps]}
    heads = {kind: fitted(kind, of) for kind in HEADS if kind in RULES[name]}
    for kind in RULES[name]:
        sweep = SWEEP[kind][:2] if quick else SWEEP[kind]
        made = ((x, rule(kind, x, heads)) for x in sweep)
        found[kind] = [{"threshold": x} | point(of, made_rule, of.max_steps, kind in HEADS) for x, made_rule in made]
    out: Json = {"points": found, "worse": worse(of)}
    if name == "plain" and not quick:
        out["calibrated"] = {
            kind: None if x is None else {"threshold": x} | point(of, rule(kind, x, {}), of.max_steps)
            for kind, x in calibrated(of, of.fitting[:48]).items()
        }
    return out


def row(name: Name, args: Args, seed: int) -> Json:
    """What `read` finds on the model of a seed, from its file if it is there."""
    about = {
        "rules": {kind: SWEEP[kind] for kind in RULES[name]},
        "gain": GAIN,
        "fit": FIT,
        "steps": (STEPS, STAGE_TWO),
    }
    path = args.runs / "learnt_depth" / f"{name.replace(' ', '_')}_seed{seed}.json"
    return {"seed": seed} | remembered(path, about, lambda: read(name, subject(name, args, seed), args.quick))


def cheapest(name: str, rows: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """(rule, means over seeds at the threshold of fewest FLOPs that loses at most ALLOWED to the best fixed depth)."""
    measure, sign = ("accuracy", -1) if name == "task" else ("nats", 1)

    def mean(kind: str, i: int, part: str) -> float:
        return float(np.mean([row["points"][kind][i][part] for row in rows]))

    best = min(sign * mean("fixed", i, measure) for i in range(len(rows[0]["points"]["fixed"])))
    for kind, points in rows[0]["points"].items():
        good = [i for i in range(len(points)) if sign * mean(kind, i, measure) - best <= ALLOWED]
        if not good:
            yield kind, {}
            continue
        i = min(good, key=lambda i: mean(kind, i, "mflop"))
        spread = interval([row["points"][kind][i]["mflop"] for row in rows])[1]
        parts = {part: round(mean(kind, i, part), 4) for part in ("nats", "accuracy", "steps", "mflop")}
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
                f"| {name} | {kind} | {at['threshold']:g} | {at['nats']:.4f} | {at['accuracy']:.3f} | "
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
                np.mean([[x[p] for x in seed["points"][kind]] for seed in row["rows"]], 0) for p in ("mflop", part)
            )
            order = np.argsort(xs)
            style = {"linestyle": "--" if name == "gate 2" else "-", "marker": "s" if kind == "fixed" else "o"}
            label = f"{name}: {kind}" if axes is middle else kind
            axes.plot(xs[order], ys[order], color=colours[kind], markersize=3, label=label, **style)
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
        print(f"{name}: a further doubling of r leaves, lowers, raises a token's loss: {rows[0]['worse']}", flush=True)
    path = args.results / "learnt_depth.json"
    found = beside_earlier(path, found, get_args(Name))
    units = {
        "mflop": "forward, per token, with checks and heads",
        "steps": "recurrences per token",
        "worse": "shares of tokens whose loss changes by at most .001 nats, falls more, grows more",
        "cheapest": f"threshold of fewest FLOPs within {ALLOWED} of the best fixed depth (nats; on the task, accuracy)",
    }
    publish(path, {"gain": GAIN, "methods": found}, units, functools.partial(picture, found=found))
    return 0


if __name__ == "__main__":
    run_command(main)
