"""When may a token stop thinking? Zero-shot rules, learnt halting, classifiers, LayerDrop, calibrated confidence.

    python experiments/studies/early_exit_methods.py  # five ways to train, three seeds each
    python experiments/studies/early_exit_methods.py --methods plain --seeds 0  # zero-shot rules alone
    python experiments/studies/early_exit_methods.py --quick  # the machinery alone, a minute or two

S3 words of 16 letters for training, of 16 and 32 for tests; at most 24 recurrences. Every rule is an `ExitRule` and
is read as decoding would: each token stops on its own, and what it held then is what later tokens see. A sweep over
thresholds gives (recurrences, FLOPs, accuracy) points, looks at logits and learnt heads included in the FLOPs.

plain: the recurrent model of `depth_scaling.py --task s3`, with KL (gated and not), change of state, of its direction,
of entropy, stability of the answer, confidence, and a classifier fitted to its states afterwards (Elbayad 2020);
thresholds calibrated as CALM does it (Schuster 2022). ponder: trained by PonderNet's loss (Banino 2021). joint: trained
together with an exit classifier. drop, token_drop: recurrences skipped at random in training (LayerDrop, Fan 2020), of
the whole batch or token by token. Beside them fixed depth, and an oracle that knows from where an answer stays right.
Finished runs are remembered in runs/early_exit_methods; the plain ones are read from RUNS/../s3, s3_seed1, ... if they
are there.

Hardware: any. Reading the plain model takes about 2 processor minutes, training `joint` 1.8.
Found (one seed): rules that wait for a token to settle lose nothing; rules that stop when the answer seems right
ruin later tokens, which read what a stopped token held one recurrence earlier; one look more (`twice`) repairs most.
Numbers, and what has not been run: experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from experiments.studies.shared.training import check_comparison, small_run
from rdlm.config import InputError, ModelConfig
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    from jax import Array

    from experiments.studies.shared.comparison import Contestant, Protocol, Trials
    from experiments.studies.shared.exiting import Reader
    from rdlm.model import Params

RATE = 1e-3
MOST = 24  # recurrences of a token that does not stop
PONDER_STEPS, PONDER_MEAN, PONDER_WEIGHT = 16, 8, 0.01  # most in training; mean of the prior; weight of its KL
JOINT_WEIGHT = 0.1  # of the classifier's loss
DROP = 0.2  # share of recurrences that training skips
EPSILON, DELTA = 0.01, 0.05  # calibrated: agreement with MOST recurrences of .99, with confidence .95
CALIBRATION_STREAM, CALIBRATION_BATCHES = 3_000_000, 8  # of 64 words
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
CONFIDENT = ("margin", "classifier", "halting")  # rules that stop as soon as the answer seems right
CALIBRATED = ("margin", "cosine", "classifier", "halting")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the model, and the rules that its tokens stop by."""

    label: str
    rules: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What determines its training beside the run."""


METHODS = {
    "plain": Method(
        "the recurrent model",
        ("kl", "gated_kl", "entropy_diff", "latent_diff", "cosine", "argmax_stability", "margin", "classifier",
         "twice margin", "twice classifier"),
    ),
    "ponder": Method(
        "PonderNet", ("halting", "twice halting", "margin", "latent_diff"),
        {"most": PONDER_STEPS, "prior_mean": PONDER_MEAN, "weight": PONDER_WEIGHT},
    ),
    "joint": Method(
        "trained with a classifier", ("classifier", "twice classifier", "margin", "latent_diff"),
        {"weight": JOINT_WEIGHT},
    ),
    "drop": Method("LayerDrop, batch", ("kl", "latent_diff", "classifier"), {"probability": DROP}),
    "token_drop": Method("LayerDrop, per token", ("kl", "latent_diff", "classifier"), {"probability": DROP}),
}  # fmt: skip
Name = Literal["plain", "ponder", "joint", "drop", "token_drop"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Train every way on S3 words of 16 letters, from several seeds; let tokens stop by every rule on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, data, depths and initial states."""
    runs: Path = Path("runs/early_exit_methods")
    """Where finished runs are remembered, a small file each."""
    results: Path = Path("experiments/studies/results")
    """Where early_exit_methods.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def contestant(name: str, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method."""
    from experiments.studies.shared import halting
    from experiments.studies.shared.comparison import recurrent

    if name == "ponder":
        return halting.ponder(model, depths, PONDER_STEPS, 1 / PONDER_MEAN, PONDER_WEIGHT)
    if name == "joint":
        return halting.classified(model, depths, JOINT_WEIGHT)
    if name in ("drop", "token_drop"):
        return halting.layer_drop(model, depths, DROP, per_token=name == "token_drop")
    return recurrent(model, depths)


def calibrated(reader: Reader, name: str, epsilon: float) -> float | None:
    """The loosest threshold that agrees with full depth on 1 - epsilon of the answers of such words; None: no such."""
    from rdlm import exits
    from rdlm.evaluation.calibration import loosest
    from rdlm.tasks import IGNORED

    asked = reader.labels != IGNORED
    full = reader.stopped(exits.fixed(np.float32(reader.most)))[0]

    def losses() -> Iterator[tuple[float, np.ndarray]]:
        for threshold in reversed(SWEEP[name]):
            other = reader.stopped(reader.rule(name, threshold))[0] != full
            yield threshold, (other & asked).sum(1) / asked.sum(1)

    return loosest(losses(), epsilon, DELTA)


def calibrated_rules(name: str) -> list[str]:
    """The rules of a method whose thresholds are calibrated."""
    return [rule for rule in CALIBRATED if rule in METHODS[name].rules]


def trials(name: str, protocol: Protocol, folder: Path, quick: bool) -> Trials:
    """The `Trials` of a method, that keep what was trained and read it with exit rules too."""
    import jax

    from experiments.studies.shared.comparison import TEST_BATCH, Trials
    from experiments.studies.shared.exiting import Reader
    from experiments.studies.shared.record import processor_seconds, remembered
    from rdlm.tasks import batch
    from rdlm.tasks.instance import TEST_STREAM

    method, most = METHODS[name], protocol.depths[-1]
    run = small_run("early_exit_methods", [protocol.train], steps=protocol.steps, learning_rate=RATE)
    about = {"model": dataclasses.asdict(run.model), "steps": run.steps, "learning_rate": RATE, **method.options}

    def batches(task: Any, stream: int, count: int) -> list[dict[str, np.ndarray]]:
        return [batch(task, stream, i, TEST_BATCH) for i in range(count)]

    class Kept(Trials):
        def trained(self, seed: int, name_shown: str = "") -> tuple[Any, float]:
            path = folder / "trained" / f"{name}_seed{seed}.json"
            shapes = jax.eval_shape(self.model.init, jax.random.key(0))
            self.seed = seed

            def make() -> dict[str, Any]:
                started = processor_seconds()
                params, loss = super(Kept, self).trained(seed, name_shown)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path.with_suffix(".npz"), *jax.tree.leaves(params))
                return {"loss": loss, "processor_seconds": round(processor_seconds() - started, 1)}

            earlier = None if name != "plain" or quick else finished_run(folder.parent, seed, run.model, run.steps)
            if earlier is not None:
                return earlier
            facts = remembered(path, about | {"seed": seed}, make)
            with np.load(path.with_suffix(".npz")) as file:
                return jax.tree.unflatten(jax.tree.structure(shapes), list(file.values())), facts["loss"]

        def read(self, params: Any, stream: int = TEST_STREAM) -> dict[str, dict[str, Any]]:
            inner, head = (params["model"], params["exit"]) if "exit" in params else (params, None)
            if head is None and "classifier" in method.rules:
                head = fitted_head(inner, run.model, protocol, quick)

            def kept(part: str, make: Callable[[], dict[str, Any]], **by: Any) -> dict[str, Any]:
                path = folder / "read" / f"{name}_seed{self.seed}_{part.replace(' ', '_')}.json"
                return remembered(path, about | {"seed": self.seed, "stream": stream, "most": most} | by, make)

            found = kept("fixed", lambda: super(Kept, self).read(params, stream), batches=protocol.test_batches)
            of_first: dict[str, float | None] = {}
            for test, task in protocol.tests.items():
                reader = Reader(inner, run.model, batches(task, stream, protocol.test_batches), most, head)
                found[test] |= kept(f"oracle {test}", reader.oracle)
                for rule in method.rules:
                    of = SWEEP[rule.removeprefix("twice ")]

                    def sweep(at: Callable[[str, float], dict[str, float]], rule: str = rule, of: Any = of) -> Any:
                        points = [at(rule, threshold) for threshold in of]
                        return {part: [p[part] for p in points] for part in points[0]}

                    for kind, at in (("", reader.point), ("alone ", reader.alone)):
                        if not kind or rule in CONFIDENT:
                            line = kept(f"{kind}{rule} {test}", functools.partial(sweep, at), thresholds=of)
                            found[test] |= {f"{kind}{rule} {part}": values for part, values in line.items()}
                for rule in calibrated_rules(name):

                    def calibrate(task: Any = task, reader: Reader = reader, rule: str = rule) -> dict[str, float]:
                        words = batches(task, CALIBRATION_STREAM, 1 if quick else CALIBRATION_BATCHES)
                        chosen = calibrated(dataclasses.replace(reader, batches=words), rule, 0.2 if quick else EPSILON)
                        return at_calibrated(reader, rule, chosen)

                    own = kept(f"calm {rule} {test}", calibrate, thresholds=SWEEP[rule], risk=(EPSILON, DELTA))
                    of_first.setdefault(rule, own["threshold"])
                    moved = kept(
                        f"calm16 {rule} {test}",
                        functools.partial(at_calibrated, reader, rule, of_first[rule]),
                        threshold=of_first[rule],
                    )
                    for kind, line in (("calm", own), ("calm16", moved)):
                        values = {**line, "threshold": float(line["threshold"] is not None)}  # the share of seeds
                        found[test] |= {f"{kind} {rule} {part}": x for part, x in values.items()}
            return found

    return Kept(contestant(name, run.model, protocol.depths), run, protocol)


def fitted_head(params: Params, model: ModelConfig, protocol: Protocol, quick: bool) -> dict[str, Array]:
    """A classifier fitted to the states of training words: has the answer become, for good, that of 16 recurrences?"""
    import jax

    from experiments.studies.shared import halting
    from experiments.studies.shared.training import training_batch

    words = training_batch([protocol.train], 0, 0, 64 if quick else 512)["tokens"]
    keys = jax.random.split(jax.random.key(0), len(words))
    states, stop = halting.states_and_oracle(params, model, words, min(protocol.depths[-1], 16), keys)
    return halting.fitted(states[:, :, 1:].reshape(-1, model.embed_dim), stop[:, :, 1:].ravel())[0]


def at_calibrated(reader: Reader, rule: str, threshold: float | None) -> dict[str, Any]:
    """A point at a calibrated threshold, and the threshold; where there is none, all recurrences are run."""
    asked = ("fixed", reader.most) if threshold is None else (rule, threshold)
    return {"threshold": threshold} | reader.point(*asked)


def finished_run(runs: Path, seed: int, model: ModelConfig, steps: int) -> tuple[Params, float] | None:
    """(parameters, last loss) of the run of a seed that `depth_scaling.py --task s3` left in `runs`, if it is there.

    Raises:
      InputError: it is another model's.
    """
    from rdlm.checkpoint import load_checkpoint, saved_steps
    from rdlm.train.metrics import read_metrics

    folder = runs / ("s3" if seed == 0 else f"s3_seed{seed}")
    if not (folder / "config.json").exists() or steps not in saved_steps(folder):
        return None
    params, config = load_checkpoint(folder)
    if config != model:
        raise InputError(f"{folder}: holds another model than depth_scaling.py --task s3 trains; choose other --runs")
    return params, read_metrics(folder)[-1]["loss"]


def curve(found: dict[str, Any], test: str, rule: str, model: ModelConfig, length: int) -> list[dict[str, float]]:
    """Points of a rule ("fixed": of fixed depth), from loose to safe: threshold, accuracy, steps, mflop over seeds."""
    from rdlm.perf import flops

    of = found["tests"][test]
    if rule == "fixed":
        return [
            {"threshold": r, "accuracy": mean[0], "steps": r, "mflop": flops.forward_flops(model, r, length) / 1e6}
            for r, mean in enumerate(of["mean"], 1)
        ]
    parts = {part: [x[0] for x in of[f"{rule} {part}"]] for part in ("accuracy", "steps", "mflop")}
    return [
        {"threshold": threshold, **{part: values[i] for part, values in parts.items()}}
        for i, threshold in enumerate(SWEEP[rule.removeprefix("twice ")])
    ]


def cheapest(points: list[dict[str, float]], full: float) -> dict[str, float] | None:
    """The point of fewest recurrences that loses at most ALLOWED of the accuracy of `full` depth."""
    good = [p for p in points if p["accuracy"] >= full - ALLOWED]
    return min(good, key=lambda p: p["steps"]) if good else None


def table(found: dict[str, Any], protocol: Protocol, model: ModelConfig) -> list[dict[str, Any]]:
    """A row per method and rule: what it costs to lose at most ALLOWED on the first test, and on the others.

    chosen: on that test itself. transferred: the threshold chosen on the first test. Either may be None.
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


def show(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """The table for the terminal."""

    def cell(point: dict[str, float] | None) -> str:
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


def picture(path: Path, found: dict[str, Any], protocol: Protocol, model: ModelConfig) -> None:
    """Accuracy against recurrences (above) and FLOPs (below): zero-shot rules by length, then models trained to stop.

    Black: fixed depth of the plain model. Squares: calibrated thresholds. Star: the oracle. Thin: own fixed depth.
    Dotted, without markers: what a rule would reach if stopping changed nothing for later tokens.
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


def draw(
    axes: Any, x: str, found: dict[str, Any], test: str, names: list[str], model: ModelConfig, length: int
) -> None:
    """One panel of the picture, over `x`: "steps" or "mflop"."""
    colours = {
        "kl": "#0072B2", "gated_kl": "#56B4E9", "entropy_diff": "#999999", "latent_diff": "#D55E00",
        "cosine": "#E69F00", "argmax_stability": "#CC79A7", "margin": "#882255", "classifier": "#009E73",
        "twice margin": "#882255", "twice classifier": "#009E73",
        "ponder": "#0072B2", "joint": "#009E73", "drop": "#D55E00", "token_drop": "#CC79A7",
    }  # fmt: skip

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
            line(name, "fixed", color=colours[name], linewidth=0.7)
        for i, rule in enumerate(METHODS[name].rules):
            first = name == "plain"
            plain_line = "--" if rule.startswith("twice") else "-"
            line(
                name, rule, color=colours[rule if first else name], marker="os^vD*XP<>"[i],
                linestyle=plain_line if first else ("-", "--", ":", "-.")[i],
                label=rule if first else f"{METHODS[name].label}: {rule}",
            )  # fmt: skip
            if rule in CONFIDENT and x == "steps":
                by_itself = ([pair[0] for pair in of[f"alone {rule} {part}"]] for part in ("steps", "accuracy"))
                axes.plot(*by_itself, color=colours[rule if first else name], linestyle=":", linewidth=1)
            if rule in CALIBRATED:
                point = of[f"calm {rule} {x}"][0], of[f"calm {rule} accuracy"][0]
                axes.plot(
                    *point, color=colours[rule if first else name], marker="s", markersize=11, markerfacecolor="none"
                )
    unit = "recurrences per answer" if x == "steps" else "forward MFLOP per token, looks and heads included"
    kind = "the plain model" if names == ["plain"] else "trained to stop"
    axes.set(title=f"S3, {test}: {kind}", xlabel=unit, ylabel="accuracy", xlim=(0, None), ylim=(0.1, 1.03))


def main() -> int:
    args = parse_arguments(Args, prog="early_exit_methods.py", description=__doc__)
    from rdlm.runtime.allocator import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    from experiments.studies.shared.comparison import S3, beside_earlier, compete, summary
    from rdlm.report import can_draw
    from rdlm.report.results import write_result

    runs, results = check_comparison(args)
    protocol = S3.quick() if args.quick else S3
    protocol = dataclasses.replace(protocol, depths=tuple(range(1, (3 if args.quick else MOST) + 1)))
    model = small_run("early_exit_methods", [protocol.train]).model
    found: dict[str, Any] = {}
    for name in args.methods:
        method = METHODS[name]
        options = {**method.options, "sweep": {rule: SWEEP[rule.removeprefix("twice ")] for rule in method.rules}}
        if calibrated_rules(name):
            options["calibration"] = calibrated_rules(name), EPSILON, DELTA, CALIBRATION_BATCHES

        def of_rate(rate: float, name: str = name) -> Trials:
            return trials(name, protocol, runs, args.quick)

        made = compete(name, of_rate, (RATE,), args.seeds, runs, options)
        found[name] = {"label": method.label, **summary(made["seeds"]), "rows": made["seeds"]}
        print(f"{name}: failed {found[name]['failed']}", flush=True)
    found = beside_earlier(results / "early_exit_methods.json", found, get_args(Name))
    rows = table(found, protocol, model)
    units = {
        "mean": "accuracy at 1 .. most recurrences, half width of its 95 % interval", "steps": "recurrences per answer",
        "mflop": "forward MFLOP per token, looks at logits and learnt heads included",
        "calm": "threshold calibrated on words of the same length; calm16: of 16 letters",
    }  # fmt: skip
    head = {"learning_rate": RATE, "most": protocol.depths[-1], "sweep": SWEEP, "allowed": ALLOWED, "table": rows}
    path = write_result(results / "early_exit_methods.json", head | {"methods": found}, units)
    print(show(rows, found))
    print(f"numbers: {path}")
    if can_draw():
        picture(path.with_suffix(".png"), found, protocol, model)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    run_command(main)
