"""How should the recurrence be trained? Depth of the gradient, deep supervision, or as a deep equilibrium model.

    python experiments/studies/operators.py  # eight ways, three seeds each: one to two hours
    python experiments/studies/operators.py --methods k4 equilibrium --seeds 0
    python experiments/studies/operators.py --quick  # only shows that everything works, some minutes

The same 132,736 parameters are trained in eight ways on the same S3 words of 16 letters at learning rate 1e-3: with
gradient through the last k = 1, 4, 8 or all recurrences; at a fixed r; with a depth for every sequence; with the loss
taken after each of the last four recurrences; and as a deep equilibrium model
(`experiments.studies.shared.equilibrium`: Anderson acceleration, at most 16 evaluations forward and 8 for the implicit
gradient). Each model is tested at every r on words of 16 and 32 letters. Its fixed point is also solved for, by plain
iteration and by Anderson acceleration: evaluations of the core until the relative change of every row is below 1e-3 (at
most 64), for the state and for the linear system of the gradient. Finished runs are kept in runs/operators, a file
each; results of other methods stay.

Hardware: any. A run takes 1 to 6 processor minutes. Found: trained by unrolling, also at a fixed r, the core has a
fixed point that both solvers find (Anderson in 24 evaluations, plain iteration in 34). How far the gradient reaches
matters little. Trained at equilibrium the core has a fixed point from which plain iteration diverges, and reaches an
accuracy of 0.70 where the unrolled model has 0.999. Numbers: docs/studies/operators.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from experiments.studies.shared.comparison import (
    S3,
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
from experiments.studies.shared.equilibrium import anderson, equilibrium
from experiments.studies.shared.halting import mean, token_losses
from experiments.studies.shared.record import Json, publish
from experiments.studies.shared.supervision import after_each
from experiments.studies.shared.training import bind_batch, small_run
from rdlm import losses
from rdlm.config import ModelConfig, Scheme
from rdlm.losses import IGNORED
from rdlm.model import Params, bind
from rdlm.recurrence import sample_steps
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command

RATE = 1e-3
MAX_FULL = 32  # gradient steps of full backpropagation; one draw in 400 is deeper and is cut
MAX_FORWARD, MAX_BACKWARD = 16, 8  # evaluations of the equilibrium's solvers in training
MAX_READ = 64  # evaluations of every model's solver in tests
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train the core."""

    label: str
    backprop_depth: int = 4
    scheme: Scheme = "poisson-lognormal-filling"
    mean_recurrence: int = 8


METHODS = {
    "k4": Method("k = 4, random r (the model itself)"),
    "k1": Method("k = 1", 1),
    "k8": Method("k = 8", 8),
    "full": Method("k = r: all recurrences"),
    "fixed": Method("fixed r = 9", scheme="fixed", mean_recurrence=9),
    "per_sequence": Method("a depth per sequence"),
    "deep": Method("deep supervision: loss after each of the last 4"),
    "equilibrium": Method("deep equilibrium: Anderson, implicit gradient"),
}
Name = Literal["k4", "k1", "k8", "full", "fixed", "per_sequence", "deep", "equilibrium"]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Train the same model in every way on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Ways to train."""
    runs: Path = Path("runs/operators")
    """Folder for finished runs, a small file each."""


def contestant(name: str, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method, and how the solvers do on what it learnt."""
    standard = recurrent(model, depths, METHODS[name].scheme)
    special: dict[str, Callable[..., Array]] = {
        "full": full,
        "per_sequence": per_sequence,
        "deep": after_each,
        "equilibrium": at_equilibrium,
    }

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        return special[name](params, model, batch, depth_key, state_key)

    return dataclasses.replace(
        standard,
        loss=loss if name in special else standard.loss,
        facts=lambda params, tokens, labels: settling(params, model, tokens, labels),
    )


def full(params: Params, model: ModelConfig, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
    """The depths of k = 4, with gradient through all recurrences."""
    n, k = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    steps = 0, jnp.minimum(n + k, MAX_FULL)
    return losses.loss(params, model, batch, steps=steps, key=state_key, max_k=MAX_FULL)


def per_sequence(
    params: Params, model: ModelConfig, batch: dict[str, Array], depth_key: Array, state_key: Array
) -> Array:
    """Every row draws its own depth. Shallower rows start later, so a step takes as long as its deepest row."""
    keys = jax.random.split(depth_key, len(batch["tokens"]))
    n, k = jax.vmap(lambda key: sample_steps(key, model.mean_recurrence, model.backprop_depth))(keys)
    depths = losses.Depths(n.max(), k.max(), model.backprop_depth, (n, k))
    labelled = losses.as_batch(batch)
    start = losses.batch_state(params, model, labelled, None, state_key)
    found = losses.token_losses(params, model, labelled, depths, start)
    return found.sum() / (batch["labels"] != IGNORED).sum()


def at_equilibrium(
    params: Params, model: ModelConfig, batch: dict[str, Array], depth_key: Array, state_key: Array
) -> Array:
    """The loss at the fixed point of the core, with the implicit gradient. There is no depth to draw."""
    bound = bind_batch(params, model, batch, state_key)
    found = equilibrium(
        lambda s: bound.step(s, jnp.int32(0)),
        bound.s0,
        max_calls=MAX_FORWARD,
        max_backward=MAX_BACKWARD,
        tolerance=TOLERANCE,
    )
    return mean(token_losses(bound, found.state, batch["labels"]), batch["labels"])


def settling(params: Params, model: ModelConfig, tokens: Array, labels: Array) -> dict[str, Array]:
    """How close the core comes to a fixed point, and at what cost.

    residual_r16: relative change of a row at recurrence 16, mean over rows. For plain iteration and for Anderson:
    evaluations until every row is below the tolerance (at most 64), the residual and the accuracy there. adjoint: the
    same for the linear system of the gradient, with a random right-hand side.
    """
    bound = bind(params, model, tokens, key=jax.random.key(0))

    def core(s: Array) -> Array:
        return bound.step(s, jnp.int32(0))

    out = {"residual_r16": anderson(core, bound.s0, max_calls=16, tolerance=0.0, memory=1).residual.mean()}
    for name, memory in (("plain", 1), ("anderson", 5)):
        found = anderson(core, bound.s0, max_calls=MAX_READ, tolerance=TOLERANCE, memory=memory)
        answers = jnp.argmax(bound.read(found.state)[0], -1)
        correct = (answers == labels) & (labels != IGNORED)
        out |= {
            f"{name}_evaluations": found.evaluations.astype(jnp.float32),
            f"{name}_residual": found.residual.mean(),
            f"{name}_accuracy": correct.sum() / (labels != IGNORED).sum(),
        }
    _, pull = jax.vjp(core, found.state)
    g = jax.random.normal(jax.random.key(1), bound.s0.shape)
    for name, memory in (("plain", 1), ("anderson", 5)):
        adjoint = anderson(lambda u: pull(u)[0] + g, g, max_calls=MAX_READ, tolerance=TOLERANCE, memory=memory)
        out |= {
            f"adjoint_{name}_evaluations": adjoint.evaluations.astype(jnp.float32),
            f"adjoint_{name}_residual": adjoint.residual.mean(),
        }
    return out


def picture(path: Path, found: Json, depths: tuple[int, ...]) -> None:
    """Accuracy against r for every method, mean over seeds, at lengths 16 and 32."""
    from matplotlib.figure import Figure

    colours = ["#000000", "#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#009E73", "#999999", "#D55E00"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    tests = list(next(iter(found.values()))["tests"])
    for axes, test in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
        for colour, marker, name in zip(colours, "os^vD*XP", METHODS, strict=True):
            if name in found and found[name]["tests"]:
                mean = [pair[0] for pair in found[name]["tests"][test]["mean"]]
                axes.plot(depths, mean, color=colour, marker=marker, markersize=5, label=METHODS[name].label)
                if name == "equilibrium":  # trained to be solved, not iterated
                    solved = found[name]["tests"][test]["anderson_accuracy"][0]
                    label = f"... solved by Anderson, up to {MAX_READ} evaluations"
                    axes.plot(MAX_READ, solved, color=colour, marker="*", markersize=11, linestyle="", label=label)
        axes.set(title=f"S3, {test}", xlabel="recurrences r", ylabel="accuracy", xscale="log", ylim=(0, 1.03))
        axes.set_xticks(depths, map(str, depths))
        axes.minorticks_off()
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def trials(name: str, protocol: Protocol, rate: float) -> Trials:
    """The `Trials` of a method at a learning rate."""
    method = METHODS[name]
    run = small_run(
        "operators",
        [protocol.train],
        steps=protocol.steps,
        learning_rate=rate,
        scheme=method.scheme,
        mean_recurrence=method.mean_recurrence,
        backprop_depth=method.backprop_depth,
    )
    return Trials(contestant(name, run.model, protocol.depths), run, protocol)


def main() -> int:
    args = parse_arguments(Args, prog="operators.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    protocol = S3.quick() if args.quick else S3
    found: Json = {}
    for name in args.methods:
        options: Json = {"read": (MAX_READ, TOLERANCE)}
        if name == "equilibrium":
            options["solvers"] = MAX_FORWARD, MAX_BACKWARD
        made = compete(name, functools.partial(trials, name, protocol), (RATE,), args.seeds, runs, options)
        found[name] = {"label": METHODS[name].label, **summary(made["seeds"]), "rows": made["seeds"]}
        print(line(name, found[name], protocol.depths), flush=True)
    path = results / "operators.json"
    found = beside_earlier(path, found, get_args(Name))
    units = {
        "mean": "accuracy, half width of its 95 % interval",
        "depths": "recurrences",
        "residual": "relative, per row",
        "evaluations": "calls of the core until every row of a batch is below the tolerance, at most MAX_READ",
    }
    everything = {"learning_rate": RATE, "depths": protocol.depths, "methods": found}
    publish(path, everything, units, functools.partial(picture, found=found, depths=protocol.depths))
    return 0


def line(name: str, row: Json, depths: tuple[int, ...]) -> str:
    """Accuracy of a method at some depths."""
    parts = [f"{name:13}"]
    for test, found in row["tests"].items():
        at = (f"r={r} {found['mean'][depths.index(r)][0]:.3f}" for r in (4, 8, 16, 64) if r in depths)
        parts.append(f"{test}: {' '.join(at)}")
    return "  ".join([*parts, f"failed {row['failed']}"])


if __name__ == "__main__":
    run_command(main)
