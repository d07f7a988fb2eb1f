"""Does recurrence help? The recurrent model against others of equal parameters, equal FLOPs and equal depth.

    python experiments/studies/baselines.py  # eight kinds of model, five seeds each: hours
    python experiments/studies/baselines.py --methods recurrent twin untied_flops --seeds 0 1 2
    python experiments/studies/baselines.py --quick  # only shows that everything works, some minutes

Every kind of model is trained from scratch on the same S3 words of 16 letters in the same order: from one tuning seed
at each of two learning rates, then from every seed at the better rate. It is tested on 256 words of 16 and of 32
letters, recurrent models at r = 16. Kinds: the recurrent model; its twin with the same parameters run once; the twin
trained 2.7 times as long (same parameters and FLOPs); untied layers with the same training FLOPs (1+7+1) and with the
same depth (1+8+1); a looped transformer without prelude and coda, of one layer, and of three (same parameters); a
universal transformer with step signals and per-token halting (`universal_transformer`). Models that run once start
from the zero state. Finished runs are kept in runs/baselines, a file each; results of other methods stay.

Hardware: any. A run takes 1 to 2 processor minutes, the twin half a minute.
Found: at 16 letters recurrent 1.000, twin 0.718, everything deeper 1.000; at 32 letters recurrent 0.767, looped 0.771,
universal 0.706, untied layers with 2.9 times the parameters 0.670, twin 0.442, and 0.512 trained 2.7 times as
long (three seeds each). Intervals: docs/studies/baselines.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from experiments.studies.shared import comparison
from experiments.studies.shared.comparison import (
    S3,
    Contestant,
    Options,
    Protocol,
    Trials,
    beside_earlier,
    check_comparison,
    compete,
    fixed_depth,
    recurrent,
    summary,
)
from experiments.studies.shared.halting import head
from experiments.studies.shared.record import Json, publish
from experiments.studies.shared.training import small_run
from rdlm import losses
from rdlm.config import ModelConfig, RunConfig
from rdlm.losses import IGNORED
from rdlm.model import Params, context, core_step, embed, init_params, inject, readout
from rdlm.model.blocks import Context
from rdlm.perf import flops
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command

RATES = (1e-3, 3e-3)
Carry = tuple[Array, Array, Array, Array]

ACT_STEPS = 8  # steps of the universal transformer in training
ACT_COST = 1e-3  # cost of one ponder step of one token, in nats
ACT_LIMIT = 0.99  # cumulative halting probability at which a token has halted
ACT_START = 1 / (1 + math.exp(2))  # first halting probability, 0.12: spreads the mass over all eight steps


@dataclasses.dataclass(frozen=True)
class Method:
    """How a kind of model differs from the recurrent one."""

    label: str
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ModelConfig that differ."""
    recurrent: bool = True
    """Depth is drawn in training and free at test time; otherwise the layers run once, from the zero state."""
    universal: bool = False
    """A universal transformer."""
    longer: float = 1.0
    """Training steps, relative to the others."""


ONCE = {"mean_recurrence": 1, "backprop_depth": 1}
METHODS = {
    "recurrent": Method("recurrent, 1+1+1 layers"),
    "twin": Method("fixed-depth twin, 1+1+1", ONCE, recurrent=False),
    "twin_flops": Method("twin trained 2.7 times as long", ONCE, recurrent=False, longer=2.7),
    "untied_flops": Method("untied 1+7+1 (same FLOPs)", {"core_layers": 7, **ONCE}, recurrent=False),
    "untied_depth": Method("untied 1+8+1 (same depth)", {"core_layers": 8, **ONCE}, recurrent=False),
    "looped": Method("looped, 0+1+0", {"prelude_layers": 0, "coda_layers": 0}),
    "looped_wide": Method(
        "looped, 0+3+0 (same parameters)",
        {"prelude_layers": 0, "core_layers": 3, "coda_layers": 0, "mean_recurrence": 3, "backprop_depth": 2},
    ),
    "universal": Method(
        "universal transformer, ACT",
        {"prelude_layers": 0, "coda_layers": 0, "mean_recurrence": ACT_STEPS, "backprop_depth": ACT_STEPS},
        universal=True,
    ),
}
Name = Literal["recurrent", "twin", "twin_flops", "untied_flops", "untied_depth", "looped", "looped_wide", "universal"]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Train every kind of model on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Kinds of model."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initialisation, data, depths and initial states."""
    runs: Path = Path("runs/baselines")
    """Folder for finished runs, a small file each."""


def run_config(method: Method, protocol: Protocol, rate: float) -> RunConfig:
    """The training run of a method."""
    return small_run(
        "baselines",
        [protocol.train],
        steps=round(protocol.steps * method.longer),
        learning_rate=rate,
        scheme="poisson-lognormal-filling" if method.recurrent else "fixed",
        **method.shape,
    )


def contestant(method: Method, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method."""
    if method.universal:
        return universal_transformer(model, depths)
    return recurrent(model, depths) if method.recurrent else fixed_depth(model)


def universal_transformer(model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """One layer applied repeatedly to the embedded tokens, with a step signal and per-token halting (ACT).

    Differences from the recurrent model: the state starts as the embedding, which is not injected again; the second
    half of the adapter takes a sinusoidal signal of the step instead; the prediction is read from the states weighted
    by their halting probabilities (Graves 2016, as in Dehghani 2018), with a small cost per step; the number of steps
    is fixed in training and all steps carry gradient. Positions are rotary, as everywhere here.
    """
    D = model.embed_dim

    def init(key: Array) -> Params:
        return {"model": init_params(model, key), "halt": head(D, ACT_START)}

    def signal(i: Array) -> Array:
        angle = (i + 1) * 10_000.0 ** (-jnp.arange(D // 2) / (D // 2))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])

    def run(params: Params, tokens: Array, max_steps: int) -> tuple[Array, Array, Context]:
        """(states [max_steps, B, L, D] to read after 1 .. max_steps steps, ponder cost [B, L], context)."""
        inner, halt = params["model"], params["halt"]
        ctx = context(model, jnp.arange(tokens.shape[1]), None)._replace(training=True)
        s, _ = embed(inner, model, tokens, ctx)
        injected = inject(inner, model, jax.vmap(signal)(jnp.arange(max_steps)))

        def step(carry: Carry, i: Array) -> tuple[Carry, Array]:
            s, mixed, spent, cost = carry
            s, _ = core_step(inner, model, s, jnp.broadcast_to(injected[i], s.shape), ctx)
            p = jax.nn.sigmoid(s @ halt["w"] + halt["bias"])
            running, left = spent < ACT_LIMIT, 1 - spent
            p = jnp.where(running, jnp.where(spent + p > ACT_LIMIT, left, p), 0)
            # If the model stops here, a token that has not halted puts the rest of its probability on this state.
            state = jnp.where(running[..., None], mixed + left[..., None] * s, mixed)
            cost = jnp.where(running, i + 1 + left, cost)  # steps + remainder: the gradient is the remainder's
            return (s, mixed + p[..., None] * s, spent + p, cost), state

        nothing = jnp.zeros(tokens.shape)
        (*_, cost), states = jax.lax.scan(step, (s, jnp.zeros_like(s), nothing, nothing), jnp.arange(max_steps))
        return states, cost, ctx

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        states, cost, ctx = run(params, batch["tokens"], ACT_STEPS)
        logits, _ = readout(params["model"], model, states[-1], ctx)
        scored = batch["labels"] != IGNORED
        total = losses.cross_entropy(logits, batch["labels"]) + ACT_COST * jnp.where(scored, cost, 0)
        return total.sum() / scored.sum()

    def answers(params: Params, tokens: Array) -> Array:
        states, _, ctx = run(params, tokens, max(depths))
        read = jax.lax.map(lambda s: readout(params["model"], model, s, ctx)[0], states[jnp.array(depths) - 1])
        return jnp.argmax(read, -1)

    return Contestant(init, loss, answers)


def training_flops(method: Method, run: RunConfig) -> tuple[float, int]:
    """(FLOPs of a whole training, forward and backward, at the depths seed 0 draws; parameters)."""
    model = run.model
    if method.universal:  # with its halting unit: D weights and a bias
        L = run.data.sequence_length
        per_token = flops.training_flops(model, 0, ACT_STEPS, L) + 3 * ACT_STEPS * 2 * model.embed_dim
        return per_token * run.steps * run.data.batch_size * L, flops.parameters(model) + model.embed_dim + 1
    return comparison.training_flops(run, once=not method.recurrent), flops.parameters(model)


def picture(path: Path, found: Json) -> None:
    """Accuracy against parameters and against training FLOPs, at lengths 16 and 32; intervals over seeds."""
    from matplotlib.figure import Figure

    colours = ["#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#999999"]
    figure = Figure(figsize=(10, 4 * len(next(iter(found.values()))["tests"])), layout="constrained")
    tests = next(iter(found.values()))["tests"]
    panels = [(test, by) for test in tests for by in ("parameters", "training_flops")]
    for axes, (test, by) in zip(figure.subplots(len(tests), 2).ravel(), panels, strict=True):
        for colour, marker, name in zip(colours, "osD^vP*X", METHODS, strict=True):
            if name in found and found[name]["tests"]:
                mean, half = found[name]["tests"][test]["mean"][found[name]["read_at"]]
                x = found[name][by] / (1e3 if by == "parameters" else 1e12)
                axes.errorbar(x, mean, half, color=colour, marker=marker, capsize=3, label=METHODS[name].label)
        label = "parameters, thousands" if by == "parameters" else "training FLOPs, 10^12"
        axes.set(title=f"S3, {test}", xlabel=label, ylabel="accuracy", ylim=(0, 1.03))
        axes.axhline(1 / 6, color="#999999", linestyle=":", linewidth=1)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def trials(method: Method, protocol: Protocol, rate: float) -> Trials:
    """The `Trials` of a method at a learning rate."""
    run = run_config(method, protocol, rate)
    return Trials(contestant(method, run.model, protocol.depths), run, protocol)


def main() -> int:
    args = parse_arguments(Args, prog="baselines.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    protocol, rates = (S3.quick(), RATES[:1]) if args.quick else (S3, RATES)
    found: Json = {}
    for name in args.methods:
        method = METHODS[name]
        options = {"act": (ACT_STEPS, ACT_COST, ACT_LIMIT)} if method.universal else {}
        made = compete(name, functools.partial(trials, method, protocol), rates, args.seeds, runs, options)
        depths = protocol.depths if method.recurrent else (1,)
        spent, parameters = training_flops(method, run_config(method, protocol, made["learning_rate"]))
        found[name] = {
            "label": method.label,
            "parameters": parameters,
            "training_flops": spent,
            "depths": depths,
            # Index of the depth that is compared: twice the mean depth of training, or the only one.
            "read_at": depths.index(16) if method.recurrent else 0,
            "learning_rate": made["learning_rate"],
            **summary(made["seeds"]),
            "tuning": made["tuning"],
            "rows": made["seeds"],
        }
        print(line(name, found[name]), flush=True)
    path = results / "baselines.json"
    found = beside_earlier(path, found, get_args(Name))
    units = {
        "training_flops": "forward and backward, whole training",
        "mean": "accuracy, half width of its 95 % interval",
        "last_quarter": "the same, for the longest quarter of prefixes",
        "depths": "recurrences",
    }
    publish(path, {"methods": found}, units, functools.partial(picture, found=found))
    return 0


def line(name: str, row: Json) -> str:
    """Accuracies of a method."""
    parts = [f"{name:13} {row['parameters']:>7,} {row['training_flops'] / 1e12:5.2f}e12 lr {row['learning_rate']:g}"]
    for test, found in row["tests"].items():
        for part in ("mean", "last_quarter"):
            parts.append(f"{test} {part} {found[part][row['read_at']][0]:.3f}+-{found[part][row['read_at']][1]:.3f}")
    return "  ".join([*parts, f"failed {row['failed']}"])


if __name__ == "__main__":
    run_command(main)
