"""Is it the recurrence? The recurrent model against others of the same parameters, the same FLOPs, the same depth.

    python experiments/studies/baselines.py  # eight kinds of model, five seeds each: hours
    python experiments/studies/baselines.py --methods recurrent twin untied_flops --seeds 0 1 2
    python experiments/studies/baselines.py --quick  # the machinery alone, some minutes

Every kind of model is trained from scratch on the same S3 words of 16 letters in the same order, at each of two
learning rates from one tuning seed, and then from every seed at the better rate; it is read on 256 words of 16 and of
32 letters, depth-free models at r = 16. Kinds: the recurrent model; its twin of the same parameters run once; the twin
trained 2.7 times as long (same parameters and FLOPs); untied layers of the same training FLOPs (1+7+1) and of the same
depth (1+8+1); a looped transformer without prelude and coda, of one layer, and of three (same parameters); a
universal transformer with step signals and per-token halting (`universal_transformer`). What runs once starts from
the zero state.
Finished runs are remembered in runs/baselines, a file each; methods that are not asked for keep their results.

Hardware: any. A run takes 1 to 2 processor minutes, the twin half a minute.
Found: at 16 letters recurrent 1.000, twin .718, and everything deeper 1.000 too; at 32 letters recurrent .767, looped
.771, universal .706, untied layers of 2.9 times the parameters .670, twin .442 (three seeds each). Intervals and what
has not been run: experiments/README.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from experiments.studies.shared.training import check_comparison, small_run
from rdlm.config import ModelConfig, RunConfig
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    from jax import Array

    from experiments.studies.shared.comparison import Contestant, Protocol
    from rdlm.model import Params

RATES = (1e-3, 3e-3)
ACT_STEPS = 8  # of the universal transformer in training
ACT_COST = 1e-3  # of one ponder step of one token, in nats
ACT_LIMIT = 0.99  # halting probability at which a token has halted


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes a kind of model from the recurrent one."""

    label: str
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ModelConfig."""
    recurrent: bool = True
    """Depths are drawn in training and free at test time; otherwise the layers run once, from the zero state."""
    universal: bool = False
    longer: float = 1.0
    """Times the training steps of the others."""


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
Name = Literal[
    "recurrent", "twin", "twin_flops", "untied_flops", "untied_depth", "looped", "looped_wide", "universal"
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Train every kind of model on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of initialisation, data, depths and initial states."""
    runs: Path = Path("runs/baselines")
    """Where finished runs are remembered, a small file each."""
    results: Path = Path("experiments/studies/results")
    """Where baselines.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def run_config(method: Method, protocol: Protocol, rate: float) -> RunConfig:
    """The training run of a method."""
    return small_run(
        "baselines", [protocol.train], steps=round(protocol.steps * method.longer), learning_rate=rate,
        scheme="poisson-lognormal-filling" if method.recurrent else "fixed", **method.shape,
    )  # fmt: skip


def contestant(method: Method, model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """Initialisation, loss and answers of a method."""
    from experiments.studies.shared.comparison import fixed_depth, recurrent

    if method.universal:
        return universal_transformer(model, depths)
    return recurrent(model, depths) if method.recurrent else fixed_depth(model)


def universal_transformer(model: ModelConfig, depths: tuple[int, ...]) -> Contestant:
    """One layer applied again and again to the embedded tokens, told the time, halting per token (ACT).

    What distinguishes it from the recurrent model: the state starts as the embedding and nothing injects it again;
    the second half of the adapter carries a sinusoidal signal of the step instead; the prediction is read from the
    states weighted by their halting probabilities (Graves 2016, as in Dehghani 2018), with a small price per step;
    the number of steps is fixed in training and all of them carry gradient. Positions are rotary, as everywhere here.
    """
    import jax
    import jax.numpy as jnp

    from experiments.studies.shared.comparison import Contestant
    from rdlm import losses
    from rdlm.model import context, core_step, embed, init_params, inject, readout
    from rdlm.tasks.instance import IGNORED

    D = model.embed_dim

    def init(key: Array) -> Any:
        # sigmoid(-2) = .12: at first the probability mass is spread over all eight steps.
        return {"model": init_params(model, key), "halt": {"w": jnp.zeros(D), "bias": jnp.float32(-2)}}

    def signal(i: Array) -> Array:
        angle = (i + 1) * 10_000.0 ** (-jnp.arange(D // 2) / (D // 2))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])

    def run(params: Params, tokens: Array, most: int) -> tuple[Array, Array, Any]:
        """(states [most, B, L, D] to read when stopped after 1 .. most steps, ponder cost [B, L], context)."""
        inner, halt = params["model"], params["halt"]
        ctx = context(model, jnp.arange(tokens.shape[1]), None)
        s, _ = embed(inner, model, tokens, ctx)
        told = inject(inner, model, jax.vmap(signal)(jnp.arange(most)))

        def step(carry: Any, i: Array) -> tuple[Any, Array]:
            s, mixed, spent, cost = carry
            s, _ = core_step(inner, model, s, jnp.broadcast_to(told[i], s.shape), ctx)
            p = jax.nn.sigmoid(s @ halt["w"] + halt["bias"])
            running, left = spent < ACT_LIMIT, 1 - spent
            p = jnp.where(running, jnp.where(spent + p > ACT_LIMIT, left, p), 0)
            # Stopped here, a token that has not halted gives what is left of its probability to this state.
            state = jnp.where(running[..., None], mixed + left[..., None] * s, mixed)
            cost = jnp.where(running, i + 1 + left, cost)  # steps + remainder: the gradient is the remainder's
            return (s, mixed + p[..., None] * s, spent + p, cost), state

        nothing = jnp.zeros(tokens.shape)
        (*_, cost), states = jax.lax.scan(step, (s, jnp.zeros_like(s), nothing, nothing), jnp.arange(most))
        return states, cost, ctx

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        states, cost, ctx = run(params, batch["tokens"], ACT_STEPS)
        logits, _ = readout(params["model"], model, states[-1], ctx)
        asked = batch["labels"] != IGNORED
        total = losses.cross_entropy(logits, batch["labels"]) + ACT_COST * jnp.where(asked, cost, 0)
        return total.sum() / asked.sum()

    def answers(params: Params, tokens: Array) -> Array:
        states, _, ctx = run(params, tokens, max(depths))
        read = jax.lax.map(lambda s: readout(params["model"], model, s, ctx)[0], states[jnp.array(depths) - 1])
        return jnp.argmax(read, -1)

    return Contestant(init, loss, answers)


def training_flops(method: Method, run: RunConfig) -> tuple[float, int]:
    """(FLOPs of a whole training, forward and backward, with the depths seed 0 draws; parameters)."""
    from experiments.studies.shared import comparison
    from rdlm.perf import flops

    model = run.model
    if method.universal:  # its halting unit: D weights and a bias
        L = run.data.sequence_length
        per_token = flops.training_flops(model, 0, ACT_STEPS, L) + 3 * ACT_STEPS * 2 * model.embed_dim
        return per_token * run.steps * run.data.batch_size * L, flops.parameters(model) + model.embed_dim + 1
    return comparison.training_flops(run, once=not method.recurrent), flops.parameters(model)


def picture(path: Path, found: dict[str, Any]) -> None:
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
        axes.set(
            title=f"S3, {test}", ylabel="accuracy", ylim=(0, 1.03),
            xlabel="parameters, thousands" if by == "parameters" else "training FLOPs, 10^12",
        )  # fmt: skip
        axes.axhline(1 / 6, color="#999999", linestyle=":", linewidth=1)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="baselines.py", description=__doc__)
    from rdlm.runtime.allocator import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    from experiments.studies.shared.comparison import S3, Trials, beside_earlier, compete, summary
    from rdlm.report import can_draw
    from rdlm.report.results import write_result

    runs, results = check_comparison(args)
    protocol, rates = (S3.quick(), RATES[:1]) if args.quick else (S3, RATES)
    found: dict[str, Any] = {}
    for name in args.methods:
        method = METHODS[name]

        def trials(rate: float, method: Method = method) -> Trials:
            run = run_config(method, protocol, rate)
            return Trials(contestant(method, run.model, protocol.depths), run, protocol)

        options = {"act": (ACT_STEPS, ACT_COST, ACT_LIMIT)} if method.universal else {}
        made = compete(name, trials, rates, args.seeds, runs, options)
        depths = protocol.depths if method.recurrent else (1,)
        spent, parameters = training_flops(method, run_config(method, protocol, made["learning_rate"]))
        found[name] = {
            "label": method.label, "parameters": parameters, "training_flops": spent, "depths": depths,
            # Read at twice the mean depth of training; the fixed ones where they end.
            "read_at": depths.index(16) if method.recurrent else 0, "learning_rate": made["learning_rate"],
            **summary(made["seeds"]), "tuning": made["tuning"], "rows": made["seeds"],
        }  # fmt: skip
        print(line(name, found[name]), flush=True)
    found = beside_earlier(results / "baselines.json", found, get_args(Name))
    units = {
        "training_flops": "forward and backward, whole training", "mean": "accuracy, half width of its 95 % interval",
        "last_quarter": "the same of the longest quarter of prefixes", "depths": "recurrences",
    }  # fmt: skip
    path = write_result(results / "baselines.json", {"methods": found}, units)
    print(f"numbers: {path}")
    if can_draw():
        picture(path.with_suffix(".png"), found)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


def line(name: str, row: dict[str, Any]) -> str:
    """What a method reached."""
    parts = [f"{name:13} {row['parameters']:>7,} {row['training_flops'] / 1e12:5.2f}e12 lr {row['learning_rate']:g}"]
    for test, found in row["tests"].items():
        for part in ("mean", "last_quarter"):
            parts.append(f"{test} {part} {found[part][row['read_at']][0]:.3f}+-{found[part][row['read_at']][1]:.3f}")
    return "  ".join([*parts, f"failed {row['failed']}"])


if __name__ == "__main__":
    run_command(main)
