"""What keeps the training of a recurrent core alive at high learning rates, and what does it cost?

    python experiments/studies/remedies.py  # six ways at three learning rates, three seeds each: an hour
    python experiments/studies/remedies.py --methods plain diagonal --seeds 0
    python experiments/studies/remedies.py --on text --seeds 0  # on the World Factbook: half an hour
    python experiments/studies/remedies.py --quick  # only shows that everything works, some minutes

S3 words of 16 letters, 500 steps, at the learning rate that suits the model best (3e-3) and at 3.3 and 10 times that.
Six ways to train the same layers:

  plain       the model as it is
  diagonal    the injection is a contraction of every channel, exp(-d exp(A_log)) s + d B e (Parcae, arXiv 2604.12946)
  penalty     .9 loss + .1 R, where R is how much the core's Jacobian at the last state stretches the direction that
              a few products with it leave (STARS, arXiv 2605.26733)
  scaled      a recurrence moves the state by 1/r of what the core says, r being the recurrences of this pass
  curriculum  the mean depth grows from 1 to 8 over the first half of training, as 1 - sqrt(1 - u)
  each        the loss after each of the last four recurrences, instead of after the last one

Every model is read on words of 16 and 32 letters at every r, up to 64; beside it, how much its Jacobian stretches at
r = 16. Finished runs are kept in runs/remedies, a file each; results of other methods stay.

Hardware: any. A run takes about a processor minute. Numbers: docs/studies/remedies.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

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
from experiments.studies.shared.halting import mean, token_losses
from experiments.studies.shared.record import Json, publish
from experiments.studies.shared.supervision import after_each
from experiments.studies.shared.text import TextRows, text_data
from experiments.studies.shared.training import bind_batch, small_run
from rdlm import losses
from rdlm.config import Loop, ModelConfig, RunConfig
from rdlm.data.prepare import prepare_embedded
from rdlm.model import Bound, Params, bind
from rdlm.recurrence import Step, sample_steps, unroll
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.train.step import mean_depth

Name = Literal["plain", "diagonal", "penalty", "scaled", "curriculum", "each"]
STEPS = 500
RATES = 3e-3, 1e-2, 3e-2
WEIGHT = 0.1  # of the penalty
PRODUCTS = 4  # with the Jacobian, in training
READ_PRODUCTS = 16  # and in tests
READ_AT = 16  # recurrences before them
SHARE = 0.5  # of the steps, over which the curriculum grows


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Train the same layers in six ways at high learning rates, from several seeds."""

    methods: tuple[Name, ...] = get_args(Name)
    """Ways to train."""
    on: Literal["s3", "text"] = "s3"
    """Words of S3, or the World Factbook, 8 rows of 128 tokens a step."""
    runs: Path = Path("runs/remedies")
    """Folder for finished runs, a small file each."""
    data_folder: Path = Path("data")
    """Folder of the World Factbook."""


def stretch(step: Step[Array], s: Array, products: int, key: Array) -> Array:
    """How much the Jacobian of step(., 0) at s [B, L, D] stretches each row's direction after `products` products with
    it, f32 [B]: the spectral radius, where one direction dominates. Differentiable with respect to what `step` uses.
    """

    def jacobian(v: Array) -> Array:
        return jax.jvp(lambda s: step(s, jnp.int32(0)), (s,), (v,))[1]

    def length(v: Array) -> Array:
        return jnp.sqrt((v * v).sum((1, 2)))

    def unit(v: Array) -> Array:
        return v / jnp.maximum(length(v), 1e-20)[:, None, None]

    v = lax.fori_loop(0, products, lambda _, v: unit(jacobian(v)), unit(jax.random.normal(key, s.shape)))
    return length(jacobian(lax.stop_gradient(v)))


def penalised(model: ModelConfig, params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
    """The loss with a penalty on how much the core's Jacobian stretches."""
    bound = bind_batch(params, model, batch, state_key)
    n, k = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    s = unroll(bound.step, bound.s0, n, k, max_k=model.backprop_depth)
    loss = mean(token_losses(bound, s, batch["labels"]), batch["labels"])
    stretched = stretch(bound.step, lax.stop_gradient(s), PRODUCTS, jax.random.fold_in(state_key, 1))
    return (1 - WEIGHT) * loss + WEIGHT * stretched.mean()


def slowed(bound: Bound, r: Array | int) -> Step[Array]:
    """The core step, of which a pass of r recurrences takes 1/r."""
    return lambda s, i: s + (bound.step(s, i) - s) / r


def scaled(model: ModelConfig, params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
    """The loss after n + k recurrences, each of which moves the state by 1/(n + k) of what the core says."""
    bound = bind_batch(params, model, batch, state_key)
    n, k = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth)
    s = unroll(slowed(bound, n + k), bound.s0, n, k, max_k=model.backprop_depth)
    return mean(token_losses(bound, s, batch["labels"]), batch["labels"])


def growing(
    run: RunConfig, params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array, step: Array
) -> Array:
    """The loss at depths of a mean that grows."""
    steps = sample_steps(depth_key, *mean_depth(run, step))
    return losses.loss(params, run.model, batch, steps=steps, key=state_key, max_k=run.model.backprop_depth)


def answers_when_scaled(model: ModelConfig, depths: tuple[int, ...]) -> Callable[[Params, Array], Array]:
    """Answers int [R, B, L]; every depth is a pass of its own."""

    def answers(params: Params, tokens: Array) -> Array:
        bound = bind(params, model, tokens, key=jax.random.key(0))

        def after(r: int) -> Array:
            return jnp.argmax(bound.read(unroll(slowed(bound, r), bound.s0, r, 0))[0], -1)

        return jnp.stack([after(r) for r in depths])

    return answers


def contestant(name: Name, run: RunConfig, depths: tuple[int, ...]) -> Contestant:
    """A way to train, and how much the Jacobian stretches afterwards."""
    model = run.model
    made = recurrent(model, depths)
    own: dict[str, Callable[..., Array]] = {"penalty": penalised, "scaled": scaled}
    if name in own:
        made = dataclasses.replace(made, loss=functools.partial(own[name], model))
    if name == "each":
        made = dataclasses.replace(made, loss=lambda params, *given: after_each(params, model, *given))
    if name == "curriculum":
        made = dataclasses.replace(made, loss=functools.partial(growing, run), staged=True)
    if name == "scaled":
        made = dataclasses.replace(made, answers=answers_when_scaled(model, depths))

    def facts(params: Params, tokens: Array, labels: Array) -> dict[str, Array]:
        bound = bind(params, model, tokens, key=jax.random.key(0))
        step = slowed(bound, READ_AT) if name == "scaled" else bound.step
        s = unroll(step, bound.s0, READ_AT, 0)
        return {"stretch": stretch(step, s, READ_PRODUCTS, jax.random.key(1)).mean()}

    return dataclasses.replace(made, facts=facts)


def on_text(folder: Path, quick: bool) -> Protocol:
    """Rows of the World Factbook; 256 held-out ones are read."""
    data = text_data(folder, quick)
    rows = TextRows(str(prepare_embedded(data)), data.tokenizer_size, data.sequence_length)
    return Protocol(rows, {"text": rows}, steps=STEPS, test_batches=4)


def trials(name: Name, protocol: Protocol, rate: float) -> Trials:
    """The `Trials` of a method at a learning rate."""
    loop = Loop(injection="diagonal") if name == "diagonal" else Loop()
    size = 8 if isinstance(protocol.train, TextRows) else 64
    run = small_run("remedies", [protocol.train], steps=protocol.steps, learning_rate=rate, batch_size=size, loop=loop)
    if name == "curriculum":
        grown = dataclasses.replace(run.recurrence, curriculum_share=SHARE, curriculum_shape="one_minus_sqrt")
        run = dataclasses.replace(run, recurrence=grown)
    return Trials(contestant(name, run, protocol.depths), run, protocol)


def cost(rows: Sequence[Json]) -> float:
    """Mean processor seconds of a run that did not diverge; NaN without one."""
    spent = [row["processor_seconds"] for row in rows if row["tests"]]
    return sum(spent) / len(spent) if spent else float("nan")


def table(found: Json, protocol: Protocol) -> str:
    """What was found, in Markdown."""

    def shown(pair: tuple[float, float]) -> str:
        value, half = pair
        return f"{value:.3f}" if half != half else f"{value:.3f} ± {half:.3f}"

    tests, depths = list(protocol.tests), protocol.depths
    read = [r for r in (8, 16, 64) if r in depths]
    heads = ["", "learning rate", "seeds", "diverged", "failed"]
    heads += [f"{test}: r = {r}" for test in tests for r in read] + ["stretch", "processor s"]
    lines = [heads, ["---"] * len(heads)]
    for name, method in found.items():
        for rate, row in method["rates"].items():
            cells = [name, rate, str(len(row["rows"])), str(len(row["diverged"])), str(len(row["failed"]))]
            if row["tests"]:
                cells += [shown(row["tests"][test]["mean"][depths.index(r)]) for test in tests for r in read]
                cells += [shown(row["tests"][tests[0]]["stretch"]), f"{cost(row['rows']):.0f}"]
            lines.append(cells + [""] * (len(heads) - len(cells)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(path: Path, found: Json, protocol: Protocol) -> None:
    """Accuracy against the learning rate, a line per method, a point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    palette = "#000000", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73"
    colours: dict[str, str] = dict(zip(get_args(Name), palette, strict=True))
    tests, depths = list(protocol.tests), protocol.depths
    for axes, test in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
        r = 64 if test == tests[0] else 16
        for name, method in found.items():
            rates = [float(rate) for rate in method["rates"]]
            reached: list[list[float]] = []
            for at in method["rates"].values():
                read = [row["tests"] for row in at["rows"]]
                reached.append([x[test]["mean"][depths.index(r)] if x else 0.0 for x in read])
            axes.plot(rates, [sum(x) / len(x) for x in reached], color=colours[name], label=name)
            for rate, values in zip(rates, reached, strict=True):
                axes.plot([rate] * len(values), values, "o", color=colours[name], markersize=4)
        axes.set(title=f"{test}, r = {r} (diverged: 0)", xlabel="learning rate", ylabel="accuracy", xscale="log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="remedies.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    whole, rates = dataclasses.replace(S3, steps=STEPS), list(RATES)
    if args.on == "text":
        whole, runs = on_text(args.data_folder, args.quick), runs / "text"
    protocol = whole
    if args.quick:
        protocol, rates = dataclasses.replace(whole.quick(), depths=(1, 8, 16, 64), tests=whole.tests), rates[:1]
    found: Json = {name: {"rates": {}} for name in args.methods}
    for rate in rates:
        for name in args.methods:
            options = {"weight": WEIGHT, "products": PRODUCTS, "share": SHARE}
            seeds = args.seeds[:1] if (args.on, rate) == ("s3", RATES[-1]) else args.seeds  # nothing learns there
            made = compete(name, functools.partial(trials, name, protocol), (rate,), seeds, runs, options)
            short = summary(made["seeds"])
            if args.on == "text":
                short["failed"] = []  # there is no accuracy that it must reach
            found[name]["rates"][f"{rate:g}"] = {**short, "rows": made["seeds"]}
    path = results / ("remedies.json" if args.on == "s3" else "remedies_text.json")
    found = beside_earlier(path, found, get_args(Name))
    print(table(found, protocol))
    units = {
        "mean": "accuracy, half the width of its 95 % interval",
        "depths": "recurrences",
        "stretch": "times, of one recurrence at r = 16",
    }
    everything = {"depths": protocol.depths, "methods": found}
    publish(path, everything, units, functools.partial(picture, found=found, protocol=protocol))
    return 0


if __name__ == "__main__":
    run_command(main)
