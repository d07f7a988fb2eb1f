"""Think in latent depth, in words or in continuous thoughts? One budget of parameters, one problem, graded at its end.

    python experiments/studies/thinking_in_words.py                            # eight ways to think, three seeds each
    python experiments/studies/thinking_in_words.py --methods latent --saved runs/s3 runs/s3_seed1    # trained already
    python experiments/studies/thinking_in_words.py --quick                    # the machinery alone, a minute or two

All have the same 132,736 parameters (1+1+1 layers, D = 64), the same S3 words of 16 letters in the same order, batches
of 64, learning rate 3e-3, and are graded on the product of the whole word, of 16 letters and of 32. Up to 1,000 steps:

  at_once         every layer once, the product asked for after every letter: no room to think
  latent          the recurrent model, asked in the same way, read after r = 4, 8, 16 recurrences
  verbal          every layer once; it writes all products down, `BOS g1..gT BOS p1..pT`, trained on the written ones,
                  tested by writing them itself, token by token (BOS again is the "=": no parameter is added)
  verbal_coupled  the same, but p_t has the position of g_t, so that the next letter is equally near at any length
  verbal_latent   the recurrent model writing them, 8 recurrences a token
  thoughts        continuous thoughts (Coconut): the last hidden state is the next input in place of a written step;
                  stage by stage 1, 2, .. 15 of the steps are thoughts, with loss on what remains written
  thoughts_revisit  the same, but half of the batches go back to fewer thoughts
  thoughts_3      that with a thought for every three steps: 5 of them

The two recurrent ones are also run token by token with a KL exit, every token's state starting from noise or from its
predecessor's last state (the zero-shot "continuous chain of thought"), with all recurrences' keys and values kept or
the last's alone. Finished runs are remembered in runs/thinking_in_words, a file each; methods that are not asked for
keep their results.

Hardware: any. A run takes half a processor minute (words) to three (thoughts).
Found so far: words reach every product of 16 letters in half of the FLOPs of latent depth, latent depth in a fifth of
the layers in series; both fail at 32. Thoughts were learnt and lost again. Read letter by letter, one shared set of
keys and values takes 41 to 45 % fewer recurrences than all sets; warm starts take more (one seed each).
Numbers, and what has not been run: experiments/README.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from experiments.studies.shared.training import check_comparison, small_run
from rdlm.config import ModelConfig, RunConfig, require
from rdlm.runtime import parse_arguments, run_command
from rdlm.tasks import IGNORED, Scratchpad, Task, WordProblem

if TYPE_CHECKING:
    from jax import Array

    from experiments.studies.shared.comparison import Contestant, Protocol, Trials
    from rdlm.model import Params

LENGTH = 16
TESTED = (16, 32)
DEPTHS = (1, 4, 8, 16)  # that latent depth is read at
RATE = 3e-3  # of the two that `baselines` tries, the one that won for every kind of model there
CURRICULUM = 0.4, 0.8  # of training: the first thought, the last one
WALKS = {"noise": 0, "normalized": 1, "raw": 2}  # what a token's state starts from
THRESHOLDS = (5e-4, 1e-5)  # of the KL exit
MOST = 32  # recurrences a token may take with it
SHOWN = "last noise 1e-05"  # the walk in the picture


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to think."""

    label: str
    kind: Literal["letters", "words", "thoughts"]
    """Asked after every letter; written steps; thoughts, then words."""
    recurrences: tuple[int, ...] = ()
    """To read at; () is a model of fixed depth."""
    coupled: bool = False
    """A written product has the position of its letter."""
    per: int = 0
    """Steps that a thought stands for."""
    revisit: bool = False
    """Half of the batches have a number of thoughts drawn from none to the stage's."""
    steps: int = 1000
    """Of training; words are learnt in a tenth of it."""


METHODS = {
    "at_once": Method("at once, fixed depth", "letters"),
    "latent": Method("latent depth", "letters", DEPTHS),
    "verbal": Method("in words", "words", steps=250),
    "verbal_coupled": Method("in words, coupled positions", "words", coupled=True, steps=250),
    "verbal_latent": Method("in words, r = 8 each", "words", (8,), steps=500),
    "thoughts": Method("continuous thoughts, stage by stage", "thoughts", per=1),
    "thoughts_revisit": Method("continuous thoughts, stages revisited", "thoughts", per=1, revisit=True, steps=600),
    "thoughts_3": Method("the same, one for three steps", "thoughts", per=3, revisit=True, steps=600),
}
Name = Literal[
    "at_once", "latent", "verbal", "verbal_coupled", "verbal_latent", "thoughts", "thoughts_revisit", "thoughts_3"
]


@dataclasses.dataclass(frozen=True)
class Args:
    """Train every way to think on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Which."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, data, depths and initial states."""
    saved: tuple[Path, ...] = ()
    """Run folders of `depth_scaling.py --task s3`: latent depth is read from them, and not trained again."""
    runs: Path = Path("runs/thinking_in_words")
    """Where finished runs are remembered, a small file each."""
    results: Path = Path("experiments/studies/results")
    """Where thinking_in_words.json and .png go."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes under RUNS/quick alone."""


def protocol(method: Method) -> Protocol:
    """What a method is trained and read on. Of thoughts only the last product is asked for: the others are thought."""
    from experiments.studies.shared.comparison import Protocol

    def task(T: int, asked: int = 1) -> Task:
        return WordProblem("S3", T) if method.kind == "letters" else Scratchpad(T, asked)

    tests = {f"length {T}": task(T, T if method.kind == "thoughts" else 1) for T in TESTED}
    return Protocol(task(LENGTH), tests, method.recurrences or (1,), steps=method.steps)


def contestant(method: Method, run: RunConfig) -> Contestant:
    """Initialisation, loss and answers of a method."""
    import jax
    import jax.numpy as jnp

    from experiments.studies.shared.comparison import Contestant, fixed_depth, recurrent
    from experiments.studies.shared.thoughts import chain, chain_loss, positions, stage

    model = run.model
    depths = method.recurrences
    if method.kind == "letters" and not depths:
        return fixed_depth(model)
    if depths:
        made = recurrent(model, depths)
        if method.kind == "letters":
            return dataclasses.replace(made, facts=lambda params, x, y: walks(params, model, x, y, write=False))

        def written(params: Params, tokens: Array) -> Array:
            answers, _ = walk(params, model, tokens, depths[-1], write=True)
            return answers[None]

        return dataclasses.replace(
            made, answers=written, facts=lambda params, x, y: walks(params, model, x, y, write=True)
        )
    made, per = fixed_depth(model), method.per

    def answers(params: Params, tokens: Array, empty: bool = False) -> Array:
        T = tokens.shape[1] // 2
        thoughts = (T - 1) // per if per else 0
        logits = chain(params, model, tokens, thoughts, per, method.coupled, empty=empty)
        words = jnp.argmax(logits, -1)[:, thoughts : T - (per - 1) * thoughts if per else T]
        return jnp.full_like(tokens, -1).at[:, -words.shape[1] :].set(words)[None]

    if method.kind == "words":

        def loss(params: Params, batch: Any, depth_key: Array, state_key: Array) -> Array:
            where = positions(LENGTH, method.coupled)
            return made.loss(params, batch | {"positions": where}, depth_key, state_key)

        return dataclasses.replace(made, loss=loss, answers=answers)

    def staged(params: Params, batch: Any, depth_key: Array, state_key: Array, step: Array) -> Array:
        thoughts = stage(step, run.steps, (LENGTH - 1) // per, CURRICULUM)
        if method.revisit:
            often, any_of = jax.random.split(depth_key)
            drawn = jax.random.randint(any_of, (), 0, thoughts + 1)
            thoughts = jnp.where(jax.random.bernoulli(often), drawn, thoughts)
        return chain_loss(params, model, batch, thoughts, per)

    def emptied(params: Params, tokens: Array, labels: Array) -> dict[str, Array]:
        right = answers(params, tokens, empty=True)[0, :, -1] == labels[:, -1]
        return {"emptied": right.mean()}

    return Contestant(made.init, staged, answers, emptied, staged=True)


def walk(
    params: Params, model: ModelConfig, tokens: Array, r: int, write: bool, rule: Any = None, start: Any = 0,
    policy: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """The recurrent model token by token through a cache: (answers, recurrences), int [B, L], where there are answers.

    Args:
      tokens: int [B, L], words, or scratchpads, of which the products are not read.
      r: recurrences, with a rule the most. Before the first letter, or before the first product, always r.
      write: scratchpads, whose products the model writes; otherwise the letters are given to it one by one.
      rule: of exits, per token.
      start: of WALKS; may be traced.
      policy: of the cache; default: keys and values of all recurrences.
    """
    import jax
    import jax.numpy as jnp

    from rdlm import CachePolicy, decode_step, prefill
    from rdlm.recurrence import initial_state

    B, L = tokens.shape
    known = L // 2 + 2 if write else 1
    policy = policy or CachePolicy()
    out, cache = prefill(params, model, tokens[:, :known], r, capacity=L, max_steps=r, cache=policy)

    def one(carry: Any, given: Array) -> tuple[Any, tuple[Array, Array]]:
        cache, logits, z, s = carry
        noise = initial_state(jax.random.key(0), cache.length[:, None], model.embed_dim)[:, 0]
        state = jax.lax.select_n(jnp.int32(start), noise, z, s)
        token = jnp.argmax(logits, -1) if write else given
        out, cache = decode_step(params, model, cache, token, r, state=state, exit_rule=rule)
        return (cache, out.logits, out.latents, out.state), (jnp.argmax(out.logits, -1), out.steps)

    begin = cache, out.logits[:, -1], out.latents[:, -1], out.state[:, -1]
    _, found = jax.lax.scan(one, begin, tokens[:, known:].T)
    first = jnp.argmax(out.logits[:, -1:], -1), out.steps[:, -1:]
    answers, steps = (jnp.concatenate([a, b.T], 1) for a, b in zip(first, found, strict=True))
    nothing = jnp.zeros((B, known - 1), jnp.int32)
    return tuple(jnp.concatenate([nothing, x], 1) for x in (answers, steps))  # type: ignore[return-value]


def walks(params: Params, model: ModelConfig, tokens: Array, labels: Array, write: bool) -> dict[str, Array]:
    """With a KL exit, for every start, threshold and cache: final and mean accuracy, and recurrences per token."""
    import jax
    import jax.numpy as jnp

    from rdlm import CachePolicy, exits

    asked = labels != IGNORED
    out = {}
    cases = [(start, threshold) for start in WALKS.values() for threshold in THRESHOLDS]
    for kept, policy in (("all", CachePolicy()), ("last", CachePolicy(recurrences=1))):

        def case(it: Any, policy: Any = policy) -> tuple[Array, Array, Array]:
            start, threshold = it
            answers, steps = walk(params, model, tokens, MOST, write, exits.kl(threshold), start, policy)
            right = (answers == labels) & asked
            taken = asked.at[:, tokens.shape[1] // 2 + 1].set(False) if write else asked  # the prompt's own runs MOST
            return right[:, -1].mean(), right.sum() / asked.sum(), jnp.where(taken, steps, 0).sum() / taken.sum()

        starts, thresholds = (jnp.asarray(x) for x in zip(*cases, strict=True))
        found = jax.lax.map(case, (starts, thresholds))
        for i, (start, threshold) in enumerate((w, t) for w in WALKS for t in THRESHOLDS):
            for name, values in zip(("final", "mean", "steps"), found, strict=True):
                out[f"{kept} {start} {threshold:g} {name}"] = values[i]
    return out


def price(model: ModelConfig, method: Method, T: int, r: int) -> dict[str, float]:
    """What one word of T letters costs at inference, r recurrences a token.

    tokens: processed, prompt and thoughts included; the last one written is not. written: tokens. thoughts: vectors.
    layers: in series, from the word to its answer. flops: forward, each token attending to itself and those before.
    cache_bytes: of its keys and values in f32, a set for each recurrence kept; cache_bytes_shared: one for all.
    """
    from rdlm.perf import flops

    thoughts = (T - 1) // method.per if method.kind == "thoughts" else 0
    written = 0 if method.kind == "letters" else T - method.per * thoughts
    passes = max(thoughts + written, 1)  # one gives the first of them
    tokens = T + 1 + (method.kind != "letters") + passes - 1

    def cache(sets: int) -> int:
        slots = model.prelude_layers + model.core_layers * sets + model.coda_layers
        return tokens * slots * flops.key_value_bytes(model, 4)

    return {
        "tokens": tokens, "written": written, "thoughts": thoughts, "layers": passes * flops.effective_depth(model, r),
        "flops": sum(flops.forward_flops(model, r, p + 1) for p in range(tokens)),
        "cache_bytes": cache(r), "cache_bytes_shared": cache(1),
    }  # fmt: skip


def run_config(method: Method, steps: int, rate: float) -> RunConfig:
    """The training run of a method."""
    shape: dict[str, Any] = {} if method.recurrences else {"mean_recurrence": 1, "backprop_depth": 1}
    return small_run("thinking_in_words", [protocol(method).train], steps=steps, learning_rate=rate, **shape)


def from_folders(folders: tuple[Path, ...], trials: Trials, runs: Path) -> dict[str, Any]:
    """What `compete` would return of models that are trained already: {"learning_rate", "seeds": rows}."""
    from experiments.studies.shared.record import remembered
    from rdlm.checkpoint import load_checkpoint, read_config
    from rdlm.report.results import commit

    rows = []
    for folder in folders:
        run = read_config(folder)
        same = (run.model, run.preset) == (trials.settings.model, "depth_scaling_s3")
        require(same, "--saved", str(folder), "must be a run of `depth_scaling.py --task s3`")

        def make(folder: Path = folder, run: RunConfig = run) -> dict[str, Any]:
            tests = trials.read(load_checkpoint(folder)[0])
            return {"seed": run.seed, "learning_rate": run.optimizer.learning_rate, "commit": commit(), "tests": tests}

        about = {"folder": str(folder), "depths": DEPTHS, "walks": (THRESHOLDS, MOST), "steps": run.steps}
        rows.append(remembered(runs / f"latent_{folder.name}.json", about, make))
    return {"learning_rate": rows[0]["learning_rate"], "seeds": rows}


def points(method: Method, model: ModelConfig, tests: dict[str, Any]) -> list[dict[str, Any]]:
    """For every test and r: accuracy on the last product, (mean, half its interval), and what a word costs."""
    return [
        {"test": test, "r": r, "final": final, **price(model, method, int(test.split()[1]), r)}
        for test, found in tests.items()
        for r, final in zip(method.recurrences or (1,), found["hardest"], strict=True)
    ]


def walked(model: ModelConfig, tests: dict[str, Any]) -> list[dict[str, Any]]:
    """For every test and walk over given letters: final accuracy, recurrences a letter, and what a word costs.

    flops: of the letters, every look of the exit rule included; BOS is the same for all words and is not counted.
    """
    from rdlm import CachePolicy
    from rdlm.perf import flops

    out = []
    for test, found in tests.items():
        T = int(test.split()[1])
        for walk in [name.removesuffix(" steps") for name in found if name.endswith(" steps")]:
            steps = found[f"{walk} steps"][0]
            policy = CachePolicy(recurrences=1 if walk.startswith("last") else None)
            out.append({
                "test": test, "walk": walk, "final": found[f"{walk} final"], "steps": found[f"{walk} steps"],
                "tokens": T + 1, "cache_bytes": price(model, METHODS["latent"], T, policy.sets(MOST))["cache_bytes"],
                "flops": sum(flops.cost(model, steps, p + 1, steps).flops_per_token for p in range(1, T + 1)),
            })  # fmt: skip
    return out


def picture(path: Path, found: dict[str, Any]) -> None:
    """Accuracy on the last product by what a word costs: FLOPs, tokens, cache; a row for every length."""
    from matplotlib.figure import Figure

    colours = ["#999999", "#000000", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73", "#56B4E9"]
    tests = list(dict.fromkeys(point["test"] for row in found.values() for point in row["points"]))
    costs = {
        "flops": ("FLOPs a word, 10^6", 1e6), "tokens": ("tokens processed a word", 1),
        "cache_bytes": ("cache a word, KiB (hollow: one set for all r)", 1024),
    }  # fmt: skip
    figure = Figure(figsize=(13, 4 * len(tests)), layout="constrained")
    for panels, test in zip(figure.subplots(len(tests), len(costs), squeeze=False), tests, strict=True):
        for axes, (by, (label, unit)) in zip(panels, costs.items(), strict=True):
            for colour, marker, name in zip(colours, "XosDP^<v", METHODS, strict=True):
                if name not in found:
                    continue

                def show(points: list[Any], label: str, by: str, style: dict[str, Any], unit: float = unit) -> None:
                    y, half = np.array([point["final"] for point in points], float).T
                    axes.errorbar([p[by] / unit for p in points], y, half, label=label, capsize=3, **style)  # noqa: B023

                here = [point for point in found[name]["points"] if point["test"] == test]
                style = {"color": colour, "marker": marker, "linestyle": "-" if len(here) > 1 else ""}
                show(here, METHODS[name].label, by, style)
                if by == "cache_bytes":
                    show(here, "", "cache_bytes_shared", style | {"fillstyle": "none", "linestyle": ""})
                walk = [w for w in found[name].get("walks", []) if (w["test"], w["walk"]) == (test, SHOWN)]
                if walk:
                    show(walk, "latent, by letter, one set, KL exit", by, style | {"marker": "*", "markersize": 11})
            axes.axhline(1 / 6, color="#999999", linestyle=":", linewidth=1)
            axes.set(title=f"S3, {test}", xlabel=label, ylabel="accuracy, last product", ylim=(0, 1.05), xscale="log")
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="thinking_in_words.py", description=__doc__)
    from rdlm.runtime.allocator import reuse_freed_memory  # importing JAX takes seconds

    reuse_freed_memory()
    from experiments.studies.shared.comparison import Trials, beside_earlier, compete, summary, training_flops
    from rdlm.perf import flops
    from rdlm.report import can_draw
    from rdlm.report.results import write_result

    runs, results = check_comparison(args)
    found: dict[str, Any] = {}
    for name in args.methods:
        method = METHODS[name]
        made_of = protocol(method)
        if args.quick:
            made_of = dataclasses.replace(made_of.quick(), depths=made_of.depths)

        def trials(rate: float, method: Method = method, made_of: Protocol = made_of) -> Trials:
            run = run_config(method, made_of.steps, rate)
            return Trials(contestant(method, run), run, made_of)

        options: dict[str, Any] = {"per": method.per, "coupled": method.coupled}
        if method.kind == "thoughts":
            options["curriculum"] = CURRICULUM
        if method.revisit:
            options["revisit"] = True
        if method.recurrences:
            options["walks"] = THRESHOLDS, MOST
        if name == "latent" and args.saved:
            made = from_folders(args.saved, trials(RATE), runs)
        else:
            made = compete(name, trials, (RATE,), args.seeds, runs, options)
        run, total = run_config(method, made_of.steps, made["learning_rate"]), summary(made["seeds"])
        found[name] = {
            "label": method.label, "parameters": flops.parameters(run.model), "learning_rate": made["learning_rate"],
            "training_flops": training_flops(run, once=not method.recurrences),
            "points": points(method, run.model, total["tests"]),
            "walks": walked(run.model, total["tests"]) if name == "latent" else [],
            **total, "rows": made["seeds"],
        }  # fmt: skip
        print(lines(name, found[name]), flush=True)
    found = beside_earlier(results / "thinking_in_words.json", found, get_args(Name))
    units = {
        "training_flops": "forward and backward, whole training", "flops": "forward, of a word", "layers": "in series",
        "final": "accuracy on the product of the whole word, half width of its 95 % interval", "hardest": "as final",
        "mean": "the same of all products asked for", "emptied": "as final, thoughts zero vectors",
        "cache_bytes": "of a word in f32, a set for each recurrence", "cache_bytes_shared": "one for all",
        "walk": "KEPT START THRESHOLD: sets in the cache, start of a state, of the KL exit",
        "steps": "recurrences a token",
    }  # fmt: skip
    path = write_result(results / "thinking_in_words.json", {"methods": found}, units)
    print(f"numbers: {path}")
    if can_draw():
        picture(path.with_suffix(".png"), found)
        print(f"picture: {path.with_suffix('.png')}")
    return 0


def lines(name: str, row: dict[str, Any]) -> str:
    """What a method reached and what it costs: a line for every length and r, and for every walk."""
    rate, training = row["learning_rate"], row["training_flops"] / 1e12
    out = [f"{name}: learning rate {rate:g}, training {training:.2f}e12 FLOPs, failed {row['failed']}"]
    for p in row["points"]:
        out.append(
            f"  {p['test']} r={p['r']:<2} final {p['final'][0]:.3f}+-{p['final'][1]:.3f} {p['flops'] / 1e6:5.1f}e6 FLOP"
            f"  tokens {p['tokens']:2}, written {p['written']:2}, thoughts {p['thoughts']:2}  layers {p['layers']:3}"
            f"  cache {p['cache_bytes'] / 1024:6.1f} KiB, shared {p['cache_bytes_shared'] / 1024:5.1f}"
        )
    for test, found in row["tests"].items():
        facts = [f"{fact} {value[0]:.3f}" for fact, value in found.items() if isinstance(value[0], float)]
        out += [f"  {test}: {fact}" for fact in facts]
    return "\n".join(out)


if __name__ == "__main__":
    run_command(main)
