"""When may a token exit? Zero-shot rules, learnt halting, classifiers, LayerDrop, calibrated confidence.

    python experiments/studies/early_exit_methods.py  # five ways to train, three seeds each
    python experiments/studies/early_exit_methods.py --methods plain --seeds 0  # only the zero-shot rules
    python experiments/studies/early_exit_methods.py --quick  # only shows that everything works, a minute or two

S3 words of 16 letters for training, of 16 and 32 for tests; at most 24 recurrences. Every rule is an `ExitRule` and is
tested as in decoding: each token exits on its own, and later tokens see the state it held then. A sweep over thresholds
gives (recurrences, FLOPs, accuracy) points; FLOPs include reading logits and learnt heads.

plain: the recurrent model of `depth_scaling.py --task s3`, with KL (gated and not), change of state, of its direction,
of entropy, stability of the answer, confidence, and a classifier fitted to its states afterwards (Elbayad 2020);
thresholds calibrated as in CALM (Schuster 2022). ponder: trained with PonderNet's loss (Banino 2021). joint: trained
together with an exit classifier. drop, token_drop: recurrences skipped at random in training (LayerDrop, Fan 2020), for
the whole batch or token by token. Baselines: fixed depth, and an oracle that knows from where an answer stays correct.
Finished runs are kept in runs/early_exit_methods; the plain ones are read from RUNS/../s3, s3_seed1, ... if they exist.

Hardware: any. Testing the plain model takes about 2 processor minutes, training `joint` 1.8.
Found: rules that wait for a token to settle lose nothing. Rules that exit when the answer seems correct harm later
tokens, which read the state of one recurrence earlier; one recurrence more (`delayed`, `twice`) repairs most of it.
Numbers and open parts: docs/studies/early-exits.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import Array

from experiments.studies.shared import halting
from experiments.studies.shared.comparison import (
    S3,
    TEST_BATCH,
    Contestant,
    Options,
    Protocol,
    Trials,
    beside_earlier,
    check_comparison,
    compete,
    recurrent,
    summary,
)
from experiments.studies.shared.exiting import Reader, inner
from experiments.studies.shared.record import Json, processor_seconds, publish, remembered
from experiments.studies.shared.training import small_run, training_batch
from rdlm import exits
from rdlm.checkpoint import load_checkpoint, saved_steps
from rdlm.config import InputError, ModelConfig
from rdlm.evaluation.calibration import loosest
from rdlm.model import Params
from rdlm.perf import flops
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks import IGNORED, Task, batch
from rdlm.tasks.instance import TEST_STREAM
from rdlm.train.metrics import read_metrics

RATE = 1e-3
MAX_STEPS = 24  # recurrences of a token that does not exit
PONDER_STEPS, PONDER_MEAN, PONDER_WEIGHT = 16, 8, 0.01  # maximum in training; mean of the prior; weight of its KL
JOINT_WEIGHT = 0.1  # weight of the classifier's loss
DROP = 0.2  # share of recurrences that training skips
EPSILON, DELTA = 0.01, 0.05  # calibrated: 0.99 agreement with MAX_STEPS recurrences, at confidence 0.95
CALIBRATION_STREAM, CALIBRATION_BATCHES = 3_000_000, 8  # batches of 64 words
ALLOWED = 0.005  # accuracy that a threshold may lose

SWEEP: dict[str, tuple[float, ...]] = {
    "kl": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    "gated_kl": (1e-1, 1e-3, 1e-5),
    "entropy_diff": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    "latent_diff": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01),
    "cosine": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4),
    "argmax_stability": (1, 2, 3, 4, 6, 8),
    "margin": (0.5, 0.9, 0.99, 0.999, 0.9995),
    "classifier": (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999),
    "halting": (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999),
}
"""Thresholds of each rule of `rdlm.exits`, from loose to safe."""
CONFIDENT = ("margin", "classifier", "halting")  # rules that exit as soon as the answer seems correct
CALIBRATED = ("margin", "cosine", "classifier", "halting")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the model, and the exit rules to test it with."""

    label: str
    rules: tuple[str, ...]
    options: Json = dataclasses.field(default_factory=dict)
    """Settings of its training beside the run."""


ZERO_SHOT = ("kl", "gated_kl", "entropy_diff", "latent_diff", "cosine", "argmax_stability", "margin", "classifier")
COLOURS = {
    "kl": "#0072B2",
    "gated_kl": "#56B4E9",
    "entropy_diff": "#999999",
    "latent_diff": "#D55E00",
    "cosine": "#E69F00",
    "argmax_stability": "#CC79A7",
    "margin": "#882255",
    "classifier": "#009E73",
    "ponder": "#0072B2",
    "joint": "#009E73",
    "drop": "#D55E00",
    "token_drop": "#CC79A7",
}
METHODS = {
    "plain": Method(
        "the recurrent model",
        (*ZERO_SHOT, "twice margin", "twice classifier", "delayed margin", "delayed classifier", "delayed kl"),
    ),
    "ponder": Method(
        "PonderNet",
        ("halting", "twice halting", "delayed halting", "margin", "latent_diff"),
        {"most": PONDER_STEPS, "prior_mean": PONDER_MEAN, "weight": PONDER_WEIGHT},
    ),
    "joint": Method(
        "trained with a classifier",
        ("classifier", "twice classifier", "delayed classifier", "margin", "latent_diff"),
        {"weight": JOINT_WEIGHT},
    ),
    "drop": Method("LayerDrop, batch", ("kl", "latent_diff", "classifier"), {"probability": DROP}),
    "token_drop": Method("LayerDrop, per token", ("kl", "latent_diff", "classifier"), {"probability": DROP}),
}
Name = Literal["plain", "ponder", "joint", "drop", "token_drop"]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Train every way on S3 words of 16 letters, from several seeds; let tokens exit by every rule on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Ways to train."""
    runs: Path = Path("runs/early_exit_methods")
    """Folder for finished runs, a small file each."""


def contestant(name: str, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method."""
    if name == "ponder":
        return halting.ponder(model, depths, PONDER_STEPS, 1 / PONDER_MEAN, PONDER_WEIGHT)
    if name == "joint":
        return halting.classified(model, depths, JOINT_WEIGHT)
    if name in ("drop", "token_drop"):
        return halting.layer_drop(model, depths, DROP, per_token=name == "token_drop")
    return recurrent(model, depths)


def calibrated(reader: Reader, name: str, epsilon: float) -> float | None:
    """The loosest threshold that agrees with full depth on 1 - epsilon of these answers; None if there is none."""
    scored = reader.labels != IGNORED
    full = reader.stopped(exits.fixed(np.float32(reader.max_steps)))[0]

    def losses() -> Iterator[tuple[float, np.ndarray]]:
        for threshold in reversed(SWEEP[name]):
            other = reader.stopped(reader.rule(name, threshold))[0] != full
            yield threshold, (other & scored).sum(1) / scored.sum(1)

    return loosest(losses(), epsilon, DELTA)


def calibrated_rules(name: str) -> list[str]:
    """The rules of a method whose thresholds are calibrated."""
    return [rule for rule in CALIBRATED if rule in METHODS[name].rules]


def word_batches(task: Task, stream: int, count: int) -> list[dict[str, np.ndarray]]:
    """`count` batches of 64 words from a stream."""
    return [batch(task, stream, i, TEST_BATCH) for i in range(count)]


class ExitTrials(Trials):
    """`Trials` of a method that keeps trained parameters on disk and also tests them with exit rules."""

    def __init__(self, name: str, protocol: Protocol, folder: Path, quick: bool, rate: float):
        """`name`: of the method. `folder`: for parameters and every part of the tests."""
        run = small_run("early_exit_methods", [protocol.train], steps=protocol.steps, learning_rate=rate)
        super().__init__(contestant(name, run.model, protocol.depths), run, protocol)
        self.name, self.method, self.folder, self.quick = name, METHODS[name], folder, quick
        self.max_steps, self.seed = protocol.depths[-1], 0
        self.made_by = {
            "model": dataclasses.asdict(run.model),
            "steps": run.steps,
            "learning_rate": rate,
            **self.method.options,
        }

    def trained(self, seed: int, name: str = "") -> tuple[Params, float]:
        """As `Trials.trained`, from disk where the seed was trained before."""
        self.seed = seed
        if self.name == "plain" and not self.quick:
            earlier = finished_run(self.folder.parent, seed, self.settings.model, self.settings.steps)
            if earlier is not None:
                return earlier
        path = self.folder / "trained" / f"{self.name}_seed{seed}.json"

        def make() -> Json:
            started = processor_seconds()
            params, loss = super(ExitTrials, self).trained(seed, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path.with_suffix(".npz"), *jax.tree.leaves(params))
            return {"loss": loss, "processor_seconds": round(processor_seconds() - started, 1)}

        facts = remembered(path, self.made_by | {"seed": seed}, make)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        with np.load(path.with_suffix(".npz")) as file:
            return jax.tree.unflatten(jax.tree.structure(shapes), list(file.values())), facts["loss"]

    def read(self, params: Params, stream: int = TEST_STREAM) -> dict[str, Json]:
        """As `Trials.read`, with the oracle's and every rule's points on every test."""
        model, head = (params["model"], params["exit"]) if "exit" in params else (params, None)
        if head is None and "classifier" in self.method.rules:
            head = fitted_head(model, self.settings.model, self.protocol, self.quick)
        make = functools.partial(super().read, params, stream)
        found = self._kept("fixed", stream, make, batches=self.protocol.test_batches)
        of_first: dict[str, float | None] = {}  # thresholds calibrated on the first test
        for test, task in self.protocol.tests.items():
            batches = word_batches(task, stream, self.protocol.test_batches)
            reader = Reader(model, self.settings.model, batches, self.max_steps, head)
            found[test] |= self._kept(f"oracle {test}", stream, reader.oracle)
            for rule in self.method.rules:
                found[test] |= self._swept(rule, test, stream, reader)
            for rule in calibrated_rules(self.name):
                found[test] |= self._calibrated(rule, test, stream, reader, of_first)
        return found

    def _kept(self, part: str, stream: int, make: Callable[[], Json], **made_by: Any) -> Json:
        path = self.folder / "read" / f"{self.name}_seed{self.seed}_{part.replace(' ', '_')}.json"
        about = self.made_by | {"seed": self.seed, "stream": stream, "most": self.max_steps} | made_by
        return remembered(path, about, make)

    def _swept(self, rule: str, test: str, stream: int, reader: Reader) -> Json:
        """Points of a rule at all its thresholds; of rules that look at confidence, also "alone"."""
        thresholds = SWEEP[inner(rule)]
        out: Json = {}

        def sweep(at: Callable[[str, float], dict[str, float]]) -> Json:
            points = [at(rule, threshold) for threshold in thresholds]
            return {part: [p[part] for p in points] for part in points[0]}

        for kind, at in (("", reader.point), ("alone ", reader.alone)):
            if not kind or rule in CONFIDENT:
                make = functools.partial(sweep, at)
                line = self._kept(f"{kind}{rule} {test}", stream, make, thresholds=thresholds)
                out |= {f"{kind}{rule} {part}": values for part, values in line.items()}
        return out

    def _calibrated(self, rule: str, test: str, stream: int, reader: Reader, of_first: dict[str, float | None]) -> Json:
        """Points of a rule at its calibrated threshold: for words of this length (calm) and of the first test."""

        def calibrate() -> Json:
            words = word_batches(
                self.protocol.tests[test], CALIBRATION_STREAM, 1 if self.quick else CALIBRATION_BATCHES
            )
            chosen = calibrated(dataclasses.replace(reader, batches=words), rule, 0.2 if self.quick else EPSILON)
            return at_calibrated(reader, rule, chosen)

        own = self._kept(f"calm {rule} {test}", stream, calibrate, thresholds=SWEEP[rule], risk=(EPSILON, DELTA))
        first = of_first.setdefault(rule, own["threshold"])
        make = functools.partial(at_calibrated, reader, rule, first)
        moved = self._kept(f"calm16 {rule} {test}", stream, make, threshold=first)
        out: Json = {}
        for kind, line in (("calm", own), ("calm16", moved)):
            values = {**line, "threshold": float(line["threshold"] is not None)}  # over seeds: the share that has one
            out |= {f"{kind} {rule} {part}": x for part, x in values.items()}
        return out


def fitted_head(params: Params, model: ModelConfig, protocol: Protocol, quick: bool) -> dict[str, Array]:
    """A classifier fitted to the states of training words: is the answer, from here on, that of 16 recurrences?"""
    words = training_batch([protocol.train], 0, 0, 64 if quick else 512)["tokens"]
    keys = jax.random.split(jax.random.key(0), len(words))
    states, stop = halting.states_and_oracle(params, model, words, min(protocol.depths[-1], 16), keys)
    return halting.fitted(states[:, :, 1:].reshape(-1, model.embed_dim), stop[:, :, 1:].ravel())[0]


def at_calibrated(reader: Reader, rule: str, threshold: float | None) -> Json:
    """A point at a calibrated threshold, and the threshold; without a threshold, all recurrences run."""
    point = ("fixed", reader.max_steps) if threshold is None else (rule, threshold)
    return {"threshold": threshold} | reader.point(*point)


def finished_run(runs: Path, seed: int, model: ModelConfig, steps: int) -> tuple[Params, float] | None:
    """(parameters, last loss) of a seed's run that `depth_scaling.py --task s3` left in `runs`; None if there is none.

    Raises:
      InputError: the run is of another model.
    """
    folder = runs / ("s3" if seed == 0 else f"s3_seed{seed}")
    if not (folder / "config.json").exists() or steps not in saved_steps(folder):
        return None
    params, config = load_checkpoint(folder)
    if config != model:
        raise InputError(f"{folder}: holds another model than depth_scaling.py --task s3 trains; choose other --runs")
    return params, read_metrics(folder)[-1]["loss"]


Point = dict[str, float]
"""threshold, accuracy, steps, mflop."""


def curve(found: Json, test: str, rule: str, model: ModelConfig, length: int) -> list[Point]:
    """Points of a rule ("fixed": fixed depths) from loose to safe, means over seeds."""
    of = found["tests"][test]
    if rule == "fixed":
        return [
            {"threshold": r, "accuracy": mean[0], "steps": r, "mflop": flops.forward_flops(model, r, length) / 1e6}
            for r, mean in enumerate(of["mean"], 1)
        ]
    parts = {part: [x[0] for x in of[f"{rule} {part}"]] for part in ("accuracy", "steps", "mflop")}
    return [
        {"threshold": threshold, **{part: values[i] for part, values in parts.items()}}
        for i, threshold in enumerate(SWEEP[inner(rule)])
    ]


def cheapest(points: list[Point], full: float) -> Point | None:
    """The point with the fewest recurrences whose accuracy is at most ALLOWED below that at `full` depth."""
    good = [p for p in points if p["accuracy"] >= full - ALLOWED]
    return min(good, key=lambda p: p["steps"]) if good else None


def table(found: Json, protocol: Protocol, model: ModelConfig) -> list[Json]:
    """A row per method and rule: on each test, the cheapest point that loses at most ALLOWED.

    chosen: with the threshold chosen on that test. transferred: with the one chosen on the first. Either may be None.
    """
    rows = []
    for name, of in found.items():
        if not of["tests"]:
            continue
        for rule in ("fixed", *METHODS[name].rules):
            tests, threshold = {}, None
            for i, (test, task) in enumerate(protocol.tests.items()):
                points = curve(of, test, rule, model, len(task.instance(0, 0).tokens))
                full = of["tests"][test]["mean"][-1][0]
                best = cheapest(points, full)
                if i == 0:
                    threshold = None if best is None else best["threshold"]
                moved = next((p for p in points if p["threshold"] == threshold), None)
                tests[test] = {"full": full, "chosen": best, "transferred": moved}
            rows.append({"method": name, "rule": rule, "tests": tests})
    return rows


def show(rows: list[Json], found: Json) -> str:
    """The table for the terminal."""

    def cell(point: Point | None) -> str:
        if point is None:
            return f"{'none':>34}"
        return f"{point['threshold']:>9g} {point['accuracy']:.3f} {point['steps']:6.2f} {point['mflop']:6.3f} MF"

    lines = [f"fewest recurrences that lose at most {ALLOWED}: threshold, accuracy, recurrences, MFLOP per token"]
    for row in rows:
        parts = [f"{row['method']:10} {row['rule']:16}"]
        for i, (test, of) in enumerate(row["tests"].items()):
            parts.append(f"| {test}, full {of['full']:.3f}: {cell(of['chosen'])}")
            if i:
                parts.append(f"| with the first's: {cell(of['transferred'])}")
        lines.append(" ".join(parts))
    for name, test, of in ((name, *pair) for name, x in found.items() for pair in x["tests"].items()):
        lines.append(f"{name} oracle, {test}: {of['oracle accuracy'][0]:.3f} with {of['oracle steps'][0]:.2f}")
        for kind, rule in ((kind, rule) for kind in ("calm", "calm16") for rule in calibrated_rules(name)):
            point = [of[f"{kind} {rule} {part}"][0] for part in ("accuracy", "steps", "mflop")]
            lines.append(f"{name} {kind} {rule}, {test}: {point[0]:.3f} with {point[1]:.2f}, {point[2]:.3f} MF")
    return "\n".join(lines)


def picture(path: Path, found: Json, protocol: Protocol, model: ModelConfig) -> None:
    """Accuracy against recurrences (above) and FLOPs (below): zero-shot rules by length, then models trained to exit.

    Black: the plain model at fixed depths. Thin: other models at fixed depths. Squares: calibrated thresholds. Star:
    the oracle. Dotted, without markers: a rule's accuracy if exits changed nothing for later tokens.
    """
    from matplotlib.figure import Figure

    found = {name: of for name, of in found.items() if of["tests"]}
    groups = [[name for name in found if name == "plain"], [name for name in found if name != "plain"]]
    panels = [(test, names) for names in groups if names for test in protocol.tests]
    figure: Any = Figure(figsize=(5 * len(panels) + 0.5, 9), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for column, (test, names) in enumerate(panels):
        for axes, x in zip(grid[:, column], ("steps", "mflop"), strict=True):
            draw(axes, x, found, test, names, model, len(protocol.tests[test].instance(0, 0).tokens))
        if test == next(iter(protocol.tests)):  # a legend for each group, below the panels
            side = "left" if names == groups[0] else "right"
            lines, labels = grid[0, column].get_legend_handles_labels()
            figure.legend(lines, labels, loc=f"outside lower {side}", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def draw(axes: Any, x: str, found: Json, test: str, names: Sequence[str], model: ModelConfig, length: int) -> None:
    """One panel of the picture, over `x`: "steps" or "mflop"."""

    def line(name: str, rule: str, **style: Any) -> None:
        points = curve(found[name], test, rule, model, length)
        axes.plot([p[x] for p in points], [p["accuracy"] for p in points], **{"markersize": 4, **style})

    if "plain" in found:
        line("plain", "fixed", color="#000000", linewidth=2.5, label="fixed depth")
    for name in names:
        of = found[name]["tests"][test]
        if name == "plain" and x == "steps":
            axes.plot(of["oracle steps"][0], of["oracle accuracy"][0], color="#000000", marker="*", markersize=13)
        if name != "plain":
            line(name, "fixed", color=COLOURS[name], linewidth=0.7)
        for i, rule in enumerate(METHODS[name].rules):
            first = name == "plain"
            plain_line = {"twice": "--", "delayed": "-."}.get(rule.split()[0], "-")
            colour = COLOURS[inner(rule) if first else name]
            style = plain_line if first else ("-", "--", "-.", ":", (0, (5, 5)))[i]
            label = rule if first else f"{METHODS[name].label}: {rule}"
            line(name, rule, color=colour, marker="os^vD*XP<>hdp"[i], linestyle=style, label=label)
            if rule in CONFIDENT and x == "steps":
                by_itself = ([pair[0] for pair in of[f"alone {rule} {part}"]] for part in ("steps", "accuracy"))
                axes.plot(*by_itself, color=colour, linestyle=":", linewidth=1)
            if rule in CALIBRATED:
                point = of[f"calm {rule} {x}"][0], of[f"calm {rule} accuracy"][0]
                axes.plot(*point, color=colour, marker="s", markersize=11, markerfacecolor="none")
    unit = "recurrences per answer" if x == "steps" else "forward MFLOP per token, with checks and heads"
    kind = "the plain model" if names == ["plain"] else "trained to exit"
    axes.set(title=f"S3, {test}: {kind}", xlabel=unit, ylabel="accuracy", xlim=(0, None), ylim=(0.1, 1.03))


def main() -> int:
    args = parse_arguments(Args, prog="early_exit_methods.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    protocol = S3.quick() if args.quick else S3
    protocol = dataclasses.replace(protocol, depths=tuple(range(1, (3 if args.quick else MAX_STEPS) + 1)))
    model = small_run("early_exit_methods", [protocol.train]).model
    found: Json = {}
    for name in args.methods:
        method = METHODS[name]
        options = {**method.options, "sweep": {rule: SWEEP[inner(rule)] for rule in method.rules}}
        if calibrated_rules(name):
            options["calibration"] = calibrated_rules(name), EPSILON, DELTA, CALIBRATION_BATCHES
        trials = functools.partial(ExitTrials, name, protocol, runs, args.quick)
        made = compete(name, trials, (RATE,), args.seeds, runs, options)
        found[name] = {"label": method.label, **summary(made["seeds"]), "rows": made["seeds"]}
        print(f"{name}: failed {found[name]['failed']}", flush=True)
    path = results / "early_exit_methods.json"
    found = beside_earlier(path, found, get_args(Name))
    rows = table(found, protocol, model)
    units = {
        "mean": "accuracy at 1 .. most recurrences, half width of its 95 % interval",
        "steps": "recurrences per answer",
        "mflop": "forward MFLOP per token, reading logits and learnt heads included",
        "calm": "threshold calibrated on words of the same length; calm16: of 16 letters",
    }
    print(show(rows, found))
    everything = {
        "learning_rate": RATE,
        "most": protocol.depths[-1],
        "sweep": SWEEP,
        "allowed": ALLOWED,
        "table": rows,
        "methods": found,
    }
    publish(path, everything, units, functools.partial(picture, found=found, protocol=protocol, model=model))
    return 0


if __name__ == "__main__":
    run_command(main)
