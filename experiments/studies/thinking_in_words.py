"""Think in latent depth, in words or in continuous thoughts? Equal parameters, one problem, graded on its last answer.

    python experiments/studies/thinking_in_words.py                            # nine ways to think, three seeds each
    python experiments/studies/thinking_in_words.py --methods latent --saved runs/s3 runs/s3_seed1    # from saved runs
    python experiments/studies/thinking_in_words.py --quick          # only shows that everything works, a minute or two

All have the same 132,736 parameters (1+1+1 layers, D = 64), the same S3 words of 16 letters in the same order, batches
of 64, learning rate 3e-3, and are graded on the product of the whole word, of 16 letters and of 32. Up to 1,000 steps:

  at_once         every layer once, a product after every letter: no room to think
  latent          the recurrent model, on the same task, tested at r = 4, 8, 16
  verbal          every layer once; it writes all products down, `BOS g1..gT BOS p1..pT`, is trained on written ones and
                  tested on those it writes itself, token by token (the second BOS is the "=": no parameter is added)
  verbal_coupled  the same, but p_t has the position of g_t, so that the next letter is equally near at any length
  verbal_latent   the recurrent model writing them, 8 recurrences a token
  thoughts        continuous thoughts (Coconut): the last hidden state is the next input instead of a written step;
                  stage by stage 1, 2, .. 15 of the steps are thoughts, with the loss on the steps still written
  thoughts_revisit  the same, but half of the batches use fewer thoughts
  thoughts_calm   thoughts at a learning rate of 1e-3
  thoughts_3      thoughts_revisit with a thought for every three steps: 5 of them

The two recurrent ones are also run token by token with a KL exit. A token's state starts from noise or from the last
state of the token before (zero-shot "continuous chain of thought"); the cache keeps all recurrences or only the last.
Finished runs are kept in runs/thinking_in_words, a file each; results of other methods stay.

Hardware: any. A run takes from half a processor minute (words) to three (thoughts).
Found so far: words reach every product of 16 letters with half the FLOPs of latent depth, latent depth with a fifth of
the sequential layers; both fail at 32. Thoughts are learnt and kept at a learning rate of 1e-3, and lost at 3e-3. Read
letter by letter, one shared set of keys and values takes 41 to 45 % fewer recurrences than all sets; warm starts take
more (one seed).
Numbers and open parts: docs/studies/thinking-in-words.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.studies.shared.comparison import (
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
    training_flops,
)
from experiments.studies.shared.record import Json, publish, remembered
from experiments.studies.shared.thoughts import chain, chain_loss, positions, stage
from experiments.studies.shared.training import small_run
from rdlm import CachePolicy, decode_step, exits, prefill
from rdlm.checkpoint import load_checkpoint, read_config
from rdlm.config import ModelConfig, RunConfig, require
from rdlm.exits import ExitRule
from rdlm.model import Params
from rdlm.model.cache import Cache
from rdlm.perf import flops
from rdlm.recurrence import initial_state
from rdlm.report.results import commit
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks import IGNORED, Scratchpad, Task, WordProblem

Walking = tuple[Cache, Array, Array, Array]
"""Cache, and logits, latents and state of the token before."""

LENGTH = 16
TESTED = (16, 32)
DEPTHS = (1, 4, 8, 16)  # to test latent depth at
RATE = 3e-3  # the better one, for every kind of model, of the two that `baselines` tries
CURRICULUM = 0.4, 0.8  # shares of training at which the first and the last thought come
WALKS = {"noise": 0, "normalized": 1, "raw": 2}  # where a token's state starts
THRESHOLDS = (5e-4, 1e-5)  # of the KL exit
MAX_STEPS = 32  # recurrences of a token with a KL exit
SHOWN = "last noise 1e-05"  # the walk in the picture


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to think."""

    label: str
    kind: Literal["letters", "words", "thoughts"]
    """Answers after every letter; written steps; thoughts, then written steps."""
    recurrences: tuple[int, ...] = ()
    """Depths to test at; () is a model of fixed depth."""
    coupled: bool = False
    """A written product has the position of its letter."""
    per: int = 0
    """Steps that a thought stands for."""
    revisit: bool = False
    """Half of the batches draw their number of thoughts from 0 up to the stage's."""
    rate: float = RATE
    """Learning rate."""
    steps: int = 1000
    """Training steps; words are learnt in a tenth of them."""


METHODS = {
    "at_once": Method("at once, fixed depth", "letters"),
    "latent": Method("latent depth", "letters", DEPTHS),
    "verbal": Method("in words", "words", steps=250),
    "verbal_coupled": Method("in words, coupled positions", "words", coupled=True, steps=250),
    "verbal_latent": Method("in words, r = 8 each", "words", (8,), steps=500),
    "thoughts": Method("continuous thoughts, stage by stage", "thoughts", per=1),
    "thoughts_revisit": Method("continuous thoughts, stages revisited", "thoughts", per=1, revisit=True, steps=600),
    "thoughts_calm": Method("continuous thoughts, a third of the rate", "thoughts", per=1, rate=1e-3),
    "thoughts_3": Method("continuous thoughts, one for three steps", "thoughts", per=3, revisit=True, steps=600),
}
Name = Literal[
    "at_once",
    "latent",
    "verbal",
    "verbal_coupled",
    "verbal_latent",
    "thoughts",
    "thoughts_revisit",
    "thoughts_calm",
    "thoughts_3",
]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Train every way to think on S3 words of 16 letters, from several seeds; test on 16 and 32."""

    methods: tuple[Name, ...] = get_args(Name)
    """Ways to think."""
    saved: tuple[Path, ...] = ()
    """Run folders of `depth_scaling.py --task s3`, from which latent depth is tested instead of trained."""
    runs: Path = Path("runs/thinking_in_words")
    """Folder for finished runs, a small file each."""


def protocol(method: Method) -> Protocol:
    """Training and test instances of a method. With thoughts only the last product is scored."""

    def task(T: int, first: int = 1) -> Task:
        return WordProblem("S3", T) if method.kind == "letters" else Scratchpad(T, first)

    tests = {f"length {T}": task(T, T if method.kind == "thoughts" else 1) for T in TESTED}
    return Protocol(task(LENGTH), tests, method.recurrences or (1,), steps=method.steps)


def contestant(method: Method, run: RunConfig) -> Contestant:
    """Initialisation, loss and answers of a method."""
    if method.kind == "thoughts":
        return thinking(method, run)
    if not method.recurrences:
        return fixed_depth(run.model) if method.kind == "letters" else writing(method, run.model)
    made, write = recurrent(run.model, method.recurrences), method.kind == "words"

    def written(params: Params, tokens: Array) -> Array:
        return walk(params, run.model, tokens, method.recurrences[-1], write=True)[0][None]

    return dataclasses.replace(
        made,
        answers=written if write else made.answers,
        facts=lambda params, tokens, labels: walks(params, run.model, tokens, labels, write),
    )


def chained(method: Method, model: ModelConfig, params: Params, tokens: Array, empty: bool = False) -> Array:
    """Answers int [1, B, L] of a chain of thoughts and words that the model makes by itself; -1 where it has none."""
    T, per = tokens.shape[1] // 2, method.per
    thoughts = (T - 1) // per if per else 0
    logits = chain(params, model, tokens, thoughts, per, method.coupled, empty=empty)
    words = jnp.argmax(logits, -1)[:, thoughts : T - (per - 1) * thoughts if per else T]
    return jnp.full_like(tokens, -1).at[:, -words.shape[1] :].set(words)[None]


def writing(method: Method, model: ModelConfig) -> Contestant:
    """A model of fixed depth that writes every product down."""
    made = fixed_depth(model)

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        where = positions(LENGTH, method.coupled)
        return made.loss(params, batch | {"positions": where}, depth_key, state_key)

    return dataclasses.replace(made, loss=loss, answers=functools.partial(chained, method, model))


def thinking(method: Method, run: RunConfig) -> Contestant:
    """A model of fixed depth that learns, stage by stage, to replace written products by thoughts."""
    model, per = run.model, method.per
    answers = functools.partial(chained, method, model)

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array, step: Array) -> Array:
        thoughts = stage(step, run.steps, (LENGTH - 1) // per, CURRICULUM)
        if method.revisit:
            often, any_of = jax.random.split(depth_key)
            drawn = jax.random.randint(any_of, (), 0, thoughts + 1)
            thoughts = jnp.where(jax.random.bernoulli(often), drawn, thoughts)
        return chain_loss(params, model, batch, thoughts, per)

    def emptied(params: Params, tokens: Array, labels: Array) -> dict[str, Array]:
        correct = answers(params, tokens, empty=True)[0, :, -1] == labels[:, -1]
        return {"emptied": correct.mean()}

    return Contestant(fixed_depth(model).init, loss, answers, emptied, staged=True)


def walk(
    params: Params,
    model: ModelConfig,
    tokens: Array,
    r: int,
    write: bool,
    rule: ExitRule | None = None,
    start: int | Array = 0,
    policy: CachePolicy | None = None,
) -> tuple[Array, Array]:
    """The recurrent model token by token through a cache: (answers, recurrences), int [B, L], zero before the first.

    Args:
      tokens: int [B, L], words, or scratchpads, whose products are not read.
      r: recurrences, with a rule their maximum. Before the first letter, or before the first product, always r.
      write: tokens are scratchpads and the model writes the products; otherwise it reads the letters one by one.
      rule: exit rule, per token.
      start: a value of WALKS; may be traced.
      policy: of the cache; default: keys and values of all recurrences.
    """
    B, L = tokens.shape
    known = L // 2 + 2 if write else 1
    policy = policy or CachePolicy()
    out, cache = prefill(params, model, tokens[:, :known], r, capacity=L, max_steps=r, cache=policy)

    def one(carry: Walking, given: Array) -> tuple[Walking, tuple[Array, Array]]:
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
    scored = labels != IGNORED
    out = {}
    cases = [(start, threshold) for start in WALKS.values() for threshold in THRESHOLDS]
    for kept, policy in (("all", CachePolicy()), ("last", CachePolicy(recurrences=1))):

        def case(it: tuple[Array, Array], policy: CachePolicy = policy) -> tuple[Array, Array, Array]:
            start, threshold = it
            answers, steps = walk(params, model, tokens, MAX_STEPS, write, exits.kl(threshold), start, policy)
            right = (answers == labels) & scored
            # The first product comes from the prompt, which always runs MAX_STEPS.
            taken = scored.at[:, tokens.shape[1] // 2 + 1].set(False) if write else scored
            return right[:, -1].mean(), right.sum() / scored.sum(), jnp.where(taken, steps, 0).sum() / taken.sum()

        starts, thresholds = (jnp.asarray(x) for x in zip(*cases, strict=True))
        found = jax.lax.map(case, (starts, thresholds))
        for i, (start, threshold) in enumerate((w, t) for w in WALKS for t in THRESHOLDS):
            for name, values in zip(("final", "mean", "steps"), found, strict=True):
                out[f"{kept} {start} {threshold:g} {name}"] = values[i]
    return out


def price(model: ModelConfig, method: Method, T: int, r: int) -> dict[str, float]:
    """Cost of one word of T letters at inference, with r recurrences a token.

    tokens: processed, prompt and thoughts included, without the last one written. written: tokens. thoughts: vectors.
    layers: sequential, from the word to its answer. flops: forward, each token attending to itself and those before.
    cache_bytes: keys and values in f32, a set for each recurrence. cache_bytes_shared: one set for all recurrences.
    """
    thoughts = (T - 1) // method.per if method.kind == "thoughts" else 0
    written = 0 if method.kind == "letters" else T - method.per * thoughts
    passes = max(thoughts + written, 1)  # the prompt's pass yields the first of them
    tokens = T + 1 + (method.kind != "letters") + passes - 1

    def cache(sets: int) -> int:
        slots = model.prelude_layers + model.core_layers * sets + model.coda_layers
        return tokens * slots * flops.key_value_bytes(model, 4)

    return {
        "tokens": tokens,
        "written": written,
        "thoughts": thoughts,
        "layers": passes * flops.effective_depth(model, r),
        "flops": sum(flops.forward_flops(model, r, p + 1) for p in range(tokens)),
        "cache_bytes": cache(r),
        "cache_bytes_shared": cache(1),
    }


def run_config(method: Method, steps: int, rate: float) -> RunConfig:
    """The training run of a method."""
    shape: Json = {} if method.recurrences else {"mean_recurrence": 1, "backprop_depth": 1}
    return small_run("thinking_in_words", [protocol(method).train], steps=steps, learning_rate=rate, **shape)


def from_folders(folders: tuple[Path, ...], trials: Trials, runs: Path) -> Json:
    """As `compete` returns, for models that are trained already: {"learning_rate", "seeds": rows}."""
    rows = []
    for folder in folders:
        run = read_config(folder)
        same = (run.model, run.data.task) == (trials.settings.model, "s3")
        require(same, "--saved", str(folder), "must be a run of `depth_scaling.py --task s3`")

        def make(folder: Path = folder, run: RunConfig = run) -> Json:
            tests = trials.read(load_checkpoint(folder)[0])
            return {"seed": run.seed, "learning_rate": run.optimizer.learning_rate, "commit": commit(), "tests": tests}

        about = {"folder": str(folder), "depths": DEPTHS, "walks": (THRESHOLDS, MAX_STEPS), "steps": run.steps}
        rows.append(remembered(runs / f"latent_{folder.name}.json", about, make))
    return {"learning_rate": rows[0]["learning_rate"], "seeds": rows}


def points(method: Method, model: ModelConfig, tests: Json) -> list[Json]:
    """For every test and r: accuracy on the last product, (mean, half its interval), and the cost of a word."""
    return [
        {"test": test, "r": r, "final": final, **price(model, method, int(test.split()[1]), r)}
        for test, found in tests.items()
        for r, final in zip(method.recurrences or (1,), found["hardest"], strict=True)
    ]


def walked(model: ModelConfig, tests: Json) -> list[Json]:
    """For every test and walk over given letters: final accuracy, recurrences a letter, and the cost of a word.

    flops: of the letters, with every check of the exit rule; BOS is the same for all words and is not counted.
    """
    out = []
    for test, found in tests.items():
        T = int(test.split()[1])
        for walk in [name.removesuffix(" steps") for name in found if name.endswith(" steps")]:
            steps = found[f"{walk} steps"][0]
            policy = CachePolicy(recurrences=1 if walk.startswith("last") else None)
            cost = [flops.cost(model, steps, p + 1, steps).flops_per_token for p in range(1, T + 1)]
            kept = price(model, METHODS["latent"], T, policy.sets(MAX_STEPS))
            out.append(
                {
                    "test": test,
                    "walk": walk,
                    "final": found[f"{walk} final"],
                    "steps": found[f"{walk} steps"],
                    "tokens": T + 1,
                    "cache_bytes": kept["cache_bytes"],
                    "flops": sum(cost),
                }
            )
    return out


def picture(path: Path, found: Json) -> None:
    """Accuracy on the last product against the cost of a word (FLOPs, tokens, cache); a row for every length."""
    from matplotlib.figure import Figure

    colours = ["#999999", "#000000", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#F0E442", "#009E73", "#56B4E9"]
    tests = list(dict.fromkeys(point["test"] for row in found.values() for point in row["points"]))
    costs = {
        "flops": ("FLOPs a word, 10^6", 1e6),
        "tokens": ("tokens processed a word", 1),
        "cache_bytes": ("cache a word, KiB (hollow: one set for all r)", 1024),
    }
    figure = Figure(figsize=(13, 4 * len(tests)), layout="constrained")
    for panels, test in zip(figure.subplots(len(tests), len(costs), squeeze=False), tests, strict=True):
        for axes, (by, (label, unit)) in zip(panels, costs.items(), strict=True):
            for colour, marker, name in zip(colours, "XosDP^p<v", METHODS, strict=True):
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
    figure.axes[-len(costs)].legend(frameon=False, fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110)


def trials(method: Method, made_of: Protocol, rate: float) -> Trials:
    """The `Trials` of a method at a learning rate."""
    run = run_config(method, made_of.steps, rate)
    return Trials(contestant(method, run), run, made_of)


def options_of(method: Method) -> Json:
    """Settings of a method beside its run, which its finished runs depend on."""
    options: Json = {"per": method.per, "coupled": method.coupled}
    if method.kind == "thoughts":
        options["curriculum"] = CURRICULUM
    if method.revisit:
        options["revisit"] = True
    if method.recurrences:
        options["walks"] = THRESHOLDS, MAX_STEPS
    return options


def main() -> int:
    args = parse_arguments(Args, prog="thinking_in_words.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    found: Json = {}
    for name in args.methods:
        method = METHODS[name]
        made_of = protocol(method)
        if args.quick:
            made_of = dataclasses.replace(made_of.quick(), depths=made_of.depths)
        at = functools.partial(trials, method, made_of)
        if name == "latent" and args.saved:
            made = from_folders(args.saved, at(method.rate), runs)
        else:
            made = compete(name, at, (method.rate,), args.seeds, runs, options_of(method))
        run, total = run_config(method, made_of.steps, made["learning_rate"]), summary(made["seeds"])
        found[name] = {
            "label": method.label,
            "parameters": flops.parameters(run.model),
            "learning_rate": made["learning_rate"],
            "training_flops": training_flops(run, once=not method.recurrences),
            "points": points(method, run.model, total["tests"]),
            "walks": walked(run.model, total["tests"]) if name == "latent" else [],
            **total,
            "rows": made["seeds"],
        }
        print(lines(name, found[name]), flush=True)
    path = results / "thinking_in_words.json"
    found = beside_earlier(path, found, get_args(Name))
    units = {
        "training_flops": "forward and backward, whole training",
        "flops": "forward, of a word",
        "layers": "sequential",
        "final": "accuracy on the product of the whole word, half width of its 95 % interval",
        "hardest": "as final",
        "mean": "the same for all scored products",
        "emptied": "as final, thoughts zero vectors",
        "cache_bytes": "of a word in f32, a set for each recurrence",
        "cache_bytes_shared": "one set for all",
        "walk": "KEPT START THRESHOLD: sets in the cache, start of a state, threshold of the KL exit",
        "steps": "recurrences a token",
    }
    publish(path, {"methods": found}, units, functools.partial(picture, found=found))
    return 0


def lines(name: str, row: Json) -> str:
    """Accuracy and cost of a method: a line for every length and r, and for every walk."""
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
