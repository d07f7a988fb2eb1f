"""When may a token stop thinking? Zero-shot rules, learnt halting, classifiers, LayerDrop, calibrated confidence.

    python experiments/early_exit_methods.py                             # five ways to train, three seeds each
    python experiments/early_exit_methods.py --methods plain --seeds 0   # zero-shot rules on the recurrent model alone
    python experiments/early_exit_methods.py --quick                     # the machinery alone, a minute or two

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

Hardware: any. Found: see experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rdlm.config import InputError, ModelConfig, require
from rdlm.runtime import parse_arguments, run_command
from rdlm.tasks.training import check_seeds, small_run

if TYPE_CHECKING:
    from jax import Array

    from rdlm.exits import ExitRule
    from rdlm.model import Params
    from rdlm.tasks.comparison import Contestant, Protocol, Trials
    from rdlm.tasks.exiting import Watched

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
    "gated_kl": (1e-1, 1e-3, 1e-5, 1e-6),
    "entropy_diff": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    "latent_diff": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01),
    "cosine": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5),
    "argmax_stability": (1, 2, 3, 4, 6, 8, 12),
    "margin": (0.5, 0.9, 0.99, 0.999, 0.9995, 0.9998),
    "classifier": (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999),
    "halting": (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999),
}
"""Thresholds of each rule of `rdlm.exits`, from loose to safe."""
LEARNT = ("classifier", "halting")
CALIBRATED = ("margin", "cosine", "classifier", "halting")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the model, and the rules that its tokens stop by."""

    label: str
    rules: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What determines its training beside the run."""


METHODS = {
    "plain": Method("the recurrent model", tuple(name for name in SWEEP if name != "halting")),
    "ponder": Method(
        "PonderNet", ("halting", "margin", "latent_diff"),
        {"most": PONDER_STEPS, "prior_mean": PONDER_MEAN, "weight": PONDER_WEIGHT},
    ),
    "joint": Method("trained with a classifier", ("classifier", "margin", "latent_diff"), {"weight": JOINT_WEIGHT}),
    "drop": Method("LayerDrop, batch", ("kl", "latent_diff", "argmax_stability"), {"probability": DROP}),
    "token_drop": Method("LayerDrop, per token", ("kl", "latent_diff", "argmax_stability"), {"probability": DROP}),
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
    results: Path = Path("experiments/results")
    """Where early_exit_methods.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def contestant(name: str, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method."""
    from rdlm.tasks import halting
    from rdlm.tasks.comparison import recurrent

    if name == "ponder":
        return halting.ponder(model, depths, PONDER_STEPS, 1 / PONDER_MEAN, PONDER_WEIGHT)
    if name == "joint":
        return halting.classified(model, depths, JOINT_WEIGHT)
    if name in ("drop", "token_drop"):
        return halting.layer_drop(model, depths, DROP, per_token=name == "token_drop")
    return recurrent(model, depths)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads a model on batches of one length, with rules and without."""

    params: Params
    model: ModelConfig
    most: int
    head: dict[str, Array] | None

    def rule(self, name: str, threshold: float) -> ExitRule:
        """The rule `name`, with this model's head if it is a learnt one."""
        from rdlm import exits

        make: Callable[..., ExitRule] = getattr(exits, name)
        return make(self.head, np.float32(threshold)) if name in LEARNT else make(np.float32(threshold))

    def answers(self, batches: Iterable[dict[str, np.ndarray]], rule: ExitRule) -> tuple[np.ndarray, ...]:
        """(answers, recurrences, looks at logits), int [N, L], when every token stops by `rule`."""
        from rdlm.tasks.exiting import stopped

        found = [stopped(self.params, self.model, b["tokens"], rule, np.int32(self.most)) for b in batches]
        answers, steps, looks = (np.concatenate([np.asarray(part[i]) for part in found]) for i in range(3))
        return answers, steps, looks

    def point(
        self, batches: list[dict[str, np.ndarray]], seen: list[Watched], name: str, threshold: float
    ) -> dict[str, float]:
        """accuracy, steps (recurrences per answer) and mflop (forward, per token) of a rule at a threshold.

        alone accuracy, alone steps: if stopping changed nothing for later tokens. A gate is left out there.
        """
        from rdlm import flops
        from rdlm.tasks import IGNORED
        from rdlm.tasks.exiting import alone

        answers, steps, looks = self.answers(batches, self.rule(name, threshold))
        labels = np.concatenate([b["labels"] for b in batches])
        asked = labels != IGNORED
        mean_steps = float(steps[asked].mean())
        spent = flops.cost(self.model, mean_steps, labels.shape[1], float(looks[asked].mean())).flops_per_token
        if name in LEARNT:
            spent += mean_steps * 2 * self.model.embed_dim
        parts = [alone(self.rule(name, threshold), at) for at in seen]
        by_itself, depth = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))
        return {
            "accuracy": float((answers == labels)[asked].mean()), "steps": mean_steps, "mflop": spent / 1e6,
            "alone accuracy": float((by_itself == labels)[asked].mean()), "alone steps": float(depth[asked].mean()),
        }  # fmt: skip

    def calibrated(self, batches: list[dict[str, np.ndarray]], name: str, epsilon: float) -> float | None:
        """The loosest threshold that agrees with `most` recurrences on 1 - epsilon of the answers; None: no such."""
        from rdlm import exits
        from rdlm.calibration import loosest
        from rdlm.tasks import IGNORED

        asked = np.concatenate([b["labels"] for b in batches]) != IGNORED
        full = self.answers(batches, exits.fixed(np.float32(self.most)))[0]

        def losses() -> Iterator[tuple[float, np.ndarray]]:
            for threshold in reversed(SWEEP[name]):
                other = self.answers(batches, self.rule(name, threshold))[0] != full
                yield threshold, (other & asked).sum(1) / asked.sum(1)

        return loosest(losses(), epsilon, DELTA)


def calibrated_rules(name: str) -> list[str]:
    """The rules of a method whose thresholds are calibrated."""
    return [rule for rule in CALIBRATED if rule in METHODS[name].rules]


def trials(name: str, protocol: Protocol, folder: Path, quick: bool) -> Trials:
    """The `Trials` of a method, that keep what was trained and read it with exit rules too."""
    import jax

    from rdlm.tasks import batch, halting
    from rdlm.tasks.comparison import TEST_BATCH, Trials
    from rdlm.tasks.exiting import oracle, watched
    from rdlm.tasks.record import processor_seconds, remembered
    from rdlm.tasks.training import TEST_STREAM, training_batch

    method, most = METHODS[name], protocol.depths[-1]
    run = small_run("early_exit_methods", [protocol.train], steps=protocol.steps, learning_rate=RATE)
    about = {"model": dataclasses.asdict(run.model), "steps": run.steps, "learning_rate": RATE, **method.options}

    class Kept(Trials):
        def trained(self, seed: int, name_shown: str = "") -> tuple[Any, float]:
            path = folder / "trained" / f"{name}_seed{seed}.json"
            shapes = jax.eval_shape(self.model.init, jax.random.key(0))

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
            found = super().read(params, stream)
            inner, head = (params["model"], params["exit"]) if "exit" in params else (params, None)
            if head is None and "classifier" in method.rules:
                words = training_batch([protocol.train], 0, 0, 64 if quick else 512)["tokens"]
                keys = jax.random.split(jax.random.key(0), len(words))
                states, stop = halting.states_and_oracle(inner, run.model, words, min(most, 16), keys)
                head, _ = halting.fitted(states[:, :, 1:].reshape(-1, run.model.embed_dim), stop[:, :, 1:].ravel())
            reader = Reader(inner, run.model, most, head)
            of_first: dict[str, float | None] = {}
            for test, task in protocol.tests.items():
                batches = [batch(task, stream, i, TEST_BATCH) for i in range(protocol.test_batches)]
                seen = [watched(inner, run.model, b["tokens"], most) for b in batches]
                accuracy, steps = oracle(batches, seen)
                found[test] |= {"oracle accuracy": accuracy, "oracle steps": steps}
                for rule in method.rules:
                    points = [reader.point(batches, seen, rule, threshold) for threshold in SWEEP[rule]]
                    found[test] |= {f"{rule} {part}": [p[part] for p in points] for part in points[0]}
                held_out = [
                    batch(task, CALIBRATION_STREAM, i, TEST_BATCH) for i in range(1 if quick else CALIBRATION_BATCHES)
                ]
                for rule in calibrated_rules(name):
                    chosen = reader.calibrated(held_out, rule, 0.2 if quick else EPSILON)
                    of_first.setdefault(rule, chosen)
                    for kind, threshold in (("calm", chosen), ("calm16", of_first[rule])):
                        # Where nothing is safe enough, all recurrences are run.
                        asked_of = ("fixed", most) if threshold is None else (rule, threshold)
                        point = reader.point(batches, seen, *asked_of)
                        point["threshold"] = float("nan") if threshold is None else threshold
                        found[test] |= {f"{kind} {rule} {part}": x for part, x in point.items()}
            return found

    return Kept(contestant(name, run.model, protocol.depths), run, protocol)


def finished_run(runs: Path, seed: int, model: ModelConfig, steps: int) -> tuple[Params, float] | None:
    """(parameters, last loss) of the run of a seed that `depth_scaling.py --task s3` left in `runs`, if it is there.

    Raises:
      InputError: it is another model's.
    """
    from rdlm.checkpoint import load_checkpoint, saved_steps
    from rdlm.metrics import read_metrics

    folder = runs / ("s3" if seed == 0 else f"s3_seed{seed}")
    if not (folder / "config.json").exists() or steps not in saved_steps(folder):
        return None
    params, config = load_checkpoint(folder)
    if config != model:
        raise InputError(f"{folder}: holds another model than depth_scaling.py --task s3 trains; choose other --runs")
    return params, read_metrics(folder)[-1]["loss"]


def curve(found: dict[str, Any], test: str, rule: str, model: ModelConfig, length: int) -> list[dict[str, float]]:
    """Points of a rule ("fixed": of fixed depth), from loose to safe: threshold, accuracy, steps, mflop over seeds."""
    from rdlm import flops

    of = found["tests"][test]
    if rule == "fixed":
        return [
            {"threshold": r, "accuracy": mean[0], "steps": r, "mflop": flops.forward_flops(model, r, length) / 1e6}
            for r, mean in enumerate(of["mean"], 1)
        ]
    parts = {part: [x[0] for x in of[f"{rule} {part}"]] for part in ("accuracy", "steps", "mflop")}
    return [
        {"threshold": threshold, **{part: values[i] for part, values in parts.items()}}
        for i, threshold in enumerate(SWEEP[rule][: len(parts["steps"])])
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
            at, *point = (of[f"{kind} {rule} {part}"][0] for part in ("threshold", "accuracy", "steps", "mflop"))
            lines.append(f"{name} {kind} {rule}, {test}: {at:g}: {point[0]:.3f} with {point[1]:.2f}, {point[2]:.3f} MF")
    return "\n".join(lines)


def picture(path: Path, found: dict[str, Any], protocol: Protocol, model: ModelConfig) -> None:
    """Accuracy against mean recurrences (above) and FLOPs per token (below), a column per length."""
    from matplotlib.figure import Figure

    colours = {
        "fixed": "#000000", "kl": "#0072B2", "gated_kl": "#56B4E9", "entropy_diff": "#999999", "cosine": "#E69F00",
        "latent_diff": "#D55E00", "argmax_stability": "#CC79A7", "margin": "#F0E442", "classifier": "#009E73",
        "halting": "#882255",
    }  # fmt: skip
    styles = {"plain": "-", "ponder": "--", "joint": "-.", "drop": ":", "token_drop": (0, (1, 3))}
    tests = protocol.tests
    figure = Figure(figsize=(6.5 * len(tests) + 2.5, 9), layout="constrained")
    grid = figure.subplots(2, len(tests), squeeze=False)
    for column, (test, task) in enumerate(tests.items()):
        for axes, x in zip(grid[:, column], ("steps", "mflop"), strict=True):
            for name, of in found.items():
                shown = [rule for rule in ("fixed", *METHODS[name].rules) if of["tests"]]
                for rule in shown:
                    points = curve(of, test, rule, model, len(task.instance(0, 0).tokens))
                    axes.plot(
                        [p[x] for p in points], [p["accuracy"] for p in points], color=colours[rule],
                        linestyle=styles[name], marker="o", markersize=3, linewidth=2.5 if rule == "fixed" else 1.2,
                        label=f"{METHODS[name].label}: {rule}",
                    )  # fmt: skip
                if name == "plain" and of["tests"]:
                    for rule in calibrated_rules(name):
                        at = of["tests"][test]
                        axes.plot(
                            at[f"calm {rule} {x}"][0], at[f"calm {rule} accuracy"][0], color=colours[rule], marker="s",
                            markersize=8, markerfacecolor="none", linestyle="", label=f"calibrated: {rule}",
                        )  # fmt: skip
                    if x == "steps":
                        axes.plot(
                            of["tests"][test]["oracle steps"][0], of["tests"][test]["oracle accuracy"][0],
                            color="#000000", marker="*", markersize=12, linestyle="", label="oracle",
                        )  # fmt: skip
            unit = "recurrences per answer" if x == "steps" else "forward MFLOP per token, looks and heads included"
            axes.set(title=f"S3, {test}", xlabel=unit, ylabel="accuracy", xlim=(0, None), ylim=(0, 1.03))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="early_exit_methods.py", description=__doc__)
    from rdlm.memory import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    from rdlm.report.results import write_result
    from rdlm.tasks.comparison import S3, beside_earlier, compete, summary

    require(len(set(args.methods)) == len(args.methods) > 0, "--methods", args.methods, "must be different methods")
    check_seeds(args.seeds)
    runs, results, protocol = args.runs, args.results, S3
    if args.quick:
        runs = results = args.runs / "quick"
        protocol = S3.quick()
    protocol = dataclasses.replace(protocol, depths=tuple(range(1, (3 if args.quick else MOST) + 1)))
    model = small_run("early_exit_methods", [protocol.train]).model
    found: dict[str, Any] = {}
    for name in args.methods:
        method = METHODS[name]
        options = {**method.options, "sweep": {rule: SWEEP[rule] for rule in method.rules}}
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
    if importlib.util.find_spec("matplotlib"):
        picture(path.with_suffix(".png"), found, protocol, model)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    run_command(main)
