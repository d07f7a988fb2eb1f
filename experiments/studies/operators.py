"""How should the recurrence be trained? Gradient and depth, deep supervision, or as a deep equilibrium model.

    python experiments/studies/operators.py  # eight ways, three seeds each: an hour or two
    python experiments/studies/operators.py --methods k4 equilibrium --seeds 0
    python experiments/studies/operators.py --quick  # the machinery alone, some minutes

The same 132,736 parameters, trained in different ways on the same S3 words of 16 letters at learning rate 1e-3: with
gradient through the last k = 1, 4, 8 or all recurrences; at a fixed r; with a depth of its own for every sequence; with
the loss taken after each of the last four recurrences; and as a deep equilibrium model
(`experiments.studies.shared.equilibrium`: Anderson acceleration, at most 16 evaluations forward and 8 for the implicit
gradient). Each is read at every r on words of 16 and 32 letters, and solved: evaluations of the core until the relative
change of every row is below 1e-3 (at most 64), by plain iteration and by Anderson, for the state and for the linear
system of its gradient. Finished runs are remembered in runs/operators, a file each; methods that are not asked for keep
their results.

Hardware: any. A run takes 1 to 2.6 processor minutes. Found: trained by unrolling, the core has a fixed point that both
solvers find (Anderson in 24 evaluations, plain iteration in 34; never, where r was fixed in training). How far the
gradient reaches decides little. Trained at equilibrium it learnt a fixed point that plain iteration runs away from, and
.76 of the answers where the unrolled model has .999 (one seed). Numbers, and what has not been run:
experiments/README.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from experiments.studies.shared.training import check_comparison, small_run
from rdlm.config import ModelConfig, Scheme
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    from jax import Array

    from experiments.studies.shared.comparison import Contestant
    from rdlm.model import Params

RATE = 1e-3
MOST_FULL = 32  # gradient slots of full backpropagation; deeper draws, one in 400, are cut
MOST_FORWARD, MOST_BACKWARD = 16, 8  # evaluations of the equilibrium's solvers in training
MOST_READ = 64  # and of every model's solver when it is read
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
class Args:
    """Train the same model in every way on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, data, depths and initial states."""
    runs: Path = Path("runs/operators")
    """Where finished runs are remembered, a small file each."""
    results: Path = Path("experiments/studies/results")
    """Where operators.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def contestant(name: str, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss, answers, and how the solver does on what was learnt."""
    from experiments.studies.shared.comparison import recurrent

    standard = recurrent(model, depths, METHODS[name].scheme)
    special: dict[str, Callable[..., Any]] = {
        "full": full, "per_sequence": per_sequence, "deep": deep, "equilibrium": at_equilibrium
    }  # fmt: skip
    loss = standard.loss
    if name in special:

        def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
            return special[name](params, model, batch, depth_key, state_key)

    return dataclasses.replace(
        standard, loss=loss, facts=lambda params, tokens, labels: settling(params, model, tokens, labels)
    )


def full(params: Params, model: ModelConfig, batch: Any, depth_key: Array, state_key: Array) -> Array:
    """The depths of k = 4, with gradient through all of them."""
    import jax.numpy as jnp

    from rdlm import losses
    from rdlm.recurrence import sample_steps

    n, k = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    steps = 0, jnp.minimum(n + k, MOST_FULL)
    return losses.loss(params, model, batch, steps=steps, key=state_key, max_k=MOST_FULL)


def per_sequence(params: Params, model: ModelConfig, batch: Any, depth_key: Array, state_key: Array) -> Array:
    """Every row draws a depth of its own and waits for the deepest before it starts: a step costs the deepest."""
    import jax

    from rdlm import losses
    from rdlm.recurrence import sample_steps

    keys = jax.random.split(depth_key, len(batch["tokens"]))
    n, k = jax.vmap(lambda key: sample_steps(key, model.mean_recurrence, model.backprop_depth))(keys)
    found = losses.token_losses(
        params, model, losses.as_batch(batch), steps=(n.max(), k.max()), rows=(n, k), key=state_key
    )  # fmt: skip
    return found.sum() / (batch["labels"] != losses.IGNORED).sum()


def deep(params: Params, model: ModelConfig, batch: Any, depth_key: Array, state_key: Array) -> Array:
    """The mean of the losses after each of the last k recurrences, instead of the last one's."""
    import jax.numpy as jnp

    from rdlm.evaluation.difficulty import started
    from rdlm.recurrence import sample_steps, unroll

    step, s, ctx = started(params, model, batch, state_key)
    n, _ = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    s, found = unroll(step, s, n, 0), []
    for j in range(model.backprop_depth):
        s = step(s, n + j)
        found.append(cross_entropy(params, model, s, ctx, batch))
    return jnp.stack(found).mean()


def at_equilibrium(params: Params, model: ModelConfig, batch: Any, depth_key: Array, state_key: Array) -> Array:
    """The loss at the fixed point of the core, with the implicit gradient. There is no depth to draw."""
    import jax.numpy as jnp

    from experiments.studies.shared.equilibrium import equilibrium
    from rdlm.evaluation.difficulty import started

    step, s, ctx = started(params, model, batch, state_key)
    found = equilibrium(
        lambda s: step(s, jnp.int32(0)), s, most=MOST_FORWARD, most_backward=MOST_BACKWARD, tolerance=TOLERANCE
    )  # fmt: skip
    return cross_entropy(params, model, found.state, ctx, batch)


def cross_entropy(params: Params, model: ModelConfig, s: Array, ctx: Any, batch: Any) -> Array:
    """Mean loss of state s over the labels that are scored."""
    from rdlm import losses
    from rdlm.model import readout

    found = losses.cross_entropy(readout(params, model, s, ctx)[0], batch["labels"])
    return found.sum() / (batch["labels"] != losses.IGNORED).sum()


def settling(params: Params, model: ModelConfig, tokens: Array, labels: Array) -> dict[str, Array]:
    """How near the core comes to a fixed point, and at what price.

    residual_r16: relative change of a row by recurrence 16, mean over rows. For plain iteration and for Anderson:
    evaluations until every row is below the tolerance (at most 64), the residual then, the accuracy there. adjoint:
    the same of the gradient's linear system, for a random right-hand side.
    """
    import jax
    import jax.numpy as jnp

    from experiments.studies.shared.equilibrium import anderson
    from rdlm.evaluation.difficulty import setup
    from rdlm.losses import IGNORED
    from rdlm.model import readout

    step, s, ctx = setup(params, model, tokens, jax.random.key(0))

    def core(s: Array) -> Array:
        return step(s, jnp.int32(0))

    out = {"residual_r16": anderson(core, s, most=16, tolerance=0.0, memory=1).residual.mean()}
    for name, memory in (("plain", 1), ("anderson", 5)):
        found = anderson(core, s, most=MOST_READ, tolerance=TOLERANCE, memory=memory)
        answers = jnp.argmax(readout(params, model, found.state, ctx)[0], -1)
        right = (answers == labels) & (labels != IGNORED)
        out |= {
            f"{name}_evaluations": found.evaluations.astype(jnp.float32),
            f"{name}_residual": found.residual.mean(),
            f"{name}_accuracy": right.sum() / (labels != IGNORED).sum(),
        }
    _, pull = jax.vjp(core, found.state)
    g = jax.random.normal(jax.random.key(1), s.shape)
    for name, memory in (("plain", 1), ("anderson", 5)):
        adjoint = anderson(lambda u: pull(u)[0] + g, g, most=MOST_READ, tolerance=TOLERANCE, memory=memory)
        out |= {
            f"adjoint_{name}_evaluations": adjoint.evaluations.astype(jnp.float32),
            f"adjoint_{name}_residual": adjoint.residual.mean(),
        }
    return out


def picture(path: Path, found: dict[str, Any], depths: tuple[int, ...]) -> None:
    """Accuracy by r of every method, mean over seeds, at lengths 16 and 32."""
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
                    label = f"... solved by Anderson, up to {MOST_READ} evaluations"
                    axes.plot(MOST_READ, solved, color=colour, marker="*", markersize=11, linestyle="", label=label)
        axes.set(title=f"S3, {test}", xlabel="recurrences r", ylabel="accuracy", xscale="log", ylim=(0, 1.03))
        axes.set_xticks(depths, map(str, depths))
        axes.minorticks_off()
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="operators.py", description=__doc__)
    from rdlm.runtime.allocator import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    from experiments.studies.shared.comparison import S3, Trials, beside_earlier, compete, summary
    from rdlm.report import can_draw
    from rdlm.report.results import write_result

    runs, results = check_comparison(args)
    protocol = S3.quick() if args.quick else S3
    found: dict[str, Any] = {}
    for name in args.methods:
        method = METHODS[name]

        def trials(rate: float, name: str = name, method: Method = method) -> Trials:
            run = small_run(
                "operators", [protocol.train], steps=protocol.steps, learning_rate=rate, scheme=method.scheme,
                mean_recurrence=method.mean_recurrence, backprop_depth=method.backprop_depth,
            )  # fmt: skip
            return Trials(contestant(name, run.model, protocol.depths), run, protocol)

        options: dict[str, Any] = {"read": (MOST_READ, TOLERANCE)}
        if name == "equilibrium":
            options["solvers"] = MOST_FORWARD, MOST_BACKWARD
        made = compete(name, trials, (RATE,), args.seeds, runs, options)
        found[name] = {"label": method.label, **summary(made["seeds"]), "rows": made["seeds"]}
        print(line(name, found[name], protocol.depths), flush=True)
    found = beside_earlier(results / "operators.json", found, get_args(Name))
    units = {
        "mean": "accuracy, half width of its 95 % interval", "depths": "recurrences", "residual": "relative, per row",
        "evaluations": "calls of the core until every row of a batch is below the tolerance, at most MOST_READ",
    }  # fmt: skip
    head = {"learning_rate": RATE, "depths": protocol.depths}
    path = write_result(results / "operators.json", head | {"methods": found}, units)
    print(f"numbers: {path}")
    if can_draw():
        picture(path.with_suffix(".png"), found, protocol.depths)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


def line(name: str, row: dict[str, Any], depths: tuple[int, ...]) -> str:
    """What a method reached at some depths, and what its solver needed."""
    parts = [f"{name:13}"]
    for test, found in row["tests"].items():
        at = (f"r={r} {found['mean'][depths.index(r)][0]:.3f}" for r in (4, 8, 16, 64) if r in depths)
        parts.append(f"{test}: {' '.join(at)}")
    return "  ".join([*parts, f"failed {row['failed']}"])


if __name__ == "__main__":
    run_command(main)
