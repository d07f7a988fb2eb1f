"""What can be read from a trained model beside its last answer? Three readouts that need no training.

    python experiments/studies/readouts.py                       # trains what is missing, then a quarter of an hour
    python experiments/studies/readouts.py --parts contrast lens # without the pretrained model
    python experiments/studies/readouts.py --quick               # only shows that everything works

contrast: logits of depth r and of an earlier depth e, l_r + a (l_r - l_e) (LoopCD, arXiv 2609.24196). Beside it the
same logits sharpened, (1 + a) l_r, since a contrast also sharpens. On text and on S3 words of 64 letters.
loop: a block of layers of a plain pretrained model is run K times at inference, as it is, or damped, with 1/K of what
each of its layers adds (arXiv 2605.23872). Loss of held-out text and right answers of FCC.
lens: the likeliest token after every recurrence. Does it say what the answer does not: is a token that settled late
wrong more often than others of the same confidence? And what do states say on S3 before they know: the product of all
letters so far is asked for, is it that of the last w letters that they hold?

Text: `quickstart`, three seeds. S3: `s3_local` of depth_scaling.py, three seeds. Pretrained: SmolLM2-135M
(fetch_model.py smollm2). Hardware: any. Found: docs/studies/readouts.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import Array

from experiments.studies.shared.comparison import beside_earlier
from experiments.studies.shared.recipes import RECIPES
from experiments.studies.shared.recipes import run_config as task_config
from experiments.studies.shared.recipes import trained as train_task
from experiments.studies.shared.record import Json, interval, publish, rounded
from experiments.studies.shared.text import trained
from experiments.studies.shared.training import check_seeds
from rdlm.config import DataConfig, InputError, Loop, ModelConfig, preset, require
from rdlm.data import open_validation
from rdlm.data.prepare import prepare_embedded
from rdlm.evaluation import answer, question_file, read_questions
from rdlm.evaluation.depth import depth_curve
from rdlm.exits import divergence
from rdlm.hf import is_huggingface
from rdlm.losses import IGNORED, as_batch, cross_entropy, is_likeliest
from rdlm.model import Params, bind, known
from rdlm.model.retrofit import ONCE, cut
from rdlm.recurrence import checkpoints
from rdlm.run import Run, load
from rdlm.runtime import Progress, parse_arguments, reuse_freed_memory, run_command
from rdlm.tasks.instance import TEST_STREAM, batch
from rdlm.tasks.words import WordProblem, product

Part = Literal["contrast", "loop", "lens"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Read trained models in other ways than by their last answer."""

    parts: tuple[Part, ...] = get_args(Part)
    """Readouts to measure; results of others stay."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the models of text and of S3."""
    runs: Path = Path("runs")
    """Folder of their runs: quickstart, s3_local and the same with _seedN."""
    model: Path = Path("models/smollm2")
    """Hugging Face folder of a plain model, for `loop`."""
    data_folder: Path = Path("data")
    """Folder of the World Factbook and of the questions."""
    results: Path = Path("experiments/studies/results")
    """Folder for readouts.json and readouts.png."""
    quick: bool = False
    """Few batches, letters and blocks; writes to RUNS/quick."""


ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)
TEXT_PAIRS = ((16, 1), (16, 2), (16, 4), (16, 8), (4, 1), (4, 2))
TASK_PAIRS = ((8, 4), (12, 6), (16, 8), (24, 12))
"""(r, e) of the contrasts."""
TEXT_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
TASK_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LETTERS = 64
"""Of words, four times those of training."""
BLOCKS = ((4, 4), (8, 4), (8, 8), (12, 4), (16, 4), (20, 4), (24, 4))
"""(first layer, layers) that are repeated, of 30."""
PASSES = (2, 4)
BINS = 20
"""Groups of tokens of equal confidence."""


# Models


def text_run(args: Args, seed: int) -> Run:
    """The quickstart model of a seed, trained if it is not there.

    Raises:
      SystemExit: with the trainer's exit code, if it was stopped.
    """
    run = preset("nano" if args.quick else "quickstart")
    run = dataclasses.replace(
        run,
        run_dir=str(args.runs / ("quickstart" if seed == 0 else f"quickstart_seed{seed}")),
        data=dataclasses.replace(run.data, folder=str(args.data_folder)),
        seed=seed,
    )
    return load(trained(run))


def task_run(args: Args, seed: int) -> tuple[Params, ModelConfig]:
    """The S3 model of a seed, trained if it is not there."""
    recipe = RECIPES["s3_local"].quick() if args.quick else RECIPES["s3_local"]
    run = task_config("s3_local", recipe, seed, args.runs)
    return train_task(run, recipe)[0], run.model


Batches = list[dict[str, np.ndarray]]


def text_batches(run: Run, args: Args) -> Batches:
    """Held-out text."""
    return list(run.validation().batches(1 if args.quick else 16))


def task_batches(args: Args) -> Batches:
    """Words longer than those of training."""
    made = (batch(WordProblem("S3", LETTERS), TEST_STREAM, i, 64) for i in range(1 if args.quick else 4))
    return [{"tokens": x["tokens"], "labels": x["labels"]} for x in made]


# Contrast


@functools.partial(jax.jit, static_argnames=("config", "pairs"))
def contrast(
    params: Params, config: ModelConfig, given: dict[str, Array], pairs: tuple[tuple[int, int], ...]
) -> tuple[Array, Array, Array]:
    """Sums over a batch for every (r, e) and weight of `ALPHAS`, f32 [pairs, ALPHAS]: nats, right answers, and nats of
    the logits at r that are sharpened as much.
    """
    labelled, depths = as_batch(given), tuple(sorted({r for pair in pairs for r in pair}))
    bound = bind(params, config, labelled.tokens, segment_ids=labelled.segment_ids, positions=labelled.positions)
    read = checkpoints(bound.step, bound.s0, depths, lambda s: known(config, bound.read(s)[0]))
    labels = labelled.labels

    def weighed(pair: tuple[int, int]) -> tuple[Array, Array, Array]:
        late, early = (read[depths.index(r)] for r in pair)

        def at(a: Array) -> tuple[Array, Array, Array]:
            made = late + a * (late - early)
            right = is_likeliest(made, labels).sum()
            return cross_entropy(made, labels).sum(), right, cross_entropy((1 + a) * late, labels).sum()

        return jax.lax.map(at, jnp.asarray(ALPHAS))

    return tuple(jnp.stack(x).astype(jnp.float32) for x in zip(*map(weighed, pairs), strict=True))  # type: ignore[return-value]


def contrasted(params: Params, config: ModelConfig, batches: Batches, pairs: tuple[tuple[int, int], ...]) -> Json:
    """Of one model: nats, accuracy and nats of sharpened logits, {r, e: by weight}."""
    sums = [np.asarray(contrast(params, config, x, pairs), np.float64) for x in batches]
    count = sum(int((np.asarray(as_batch(x).labels) != IGNORED).sum()) for x in batches)
    nats, right, sharpened = np.sum(sums, axis=0) / count
    return {
        f"{r}, {e}": {"nats": nats[i].tolist(), "accuracy": right[i].tolist(), "sharpened": sharpened[i].tolist()}
        for i, (r, e) in enumerate(pairs)
    }


# A plain model in a loop


def looped(
    params: Params, config: ModelConfig, first: int, count: int, damping: float = 1.0
) -> tuple[Params, ModelConfig]:
    """A plain model whose layers first ... first + count - 1 are its core, without injection.

    damping: share of what each of these layers adds to the state. With 1 it is the same model at r = 1.
    """
    layers = len(config.layers)
    parts = cut(layers, first, count, layers - first - count)
    named = {"prelude": parts.prelude, "core": parts.core, "coda": parts.coda}
    moved = {f"{part}_{i}": params[config.layers[j]] for part, of in named.items() for i, j in enumerate(of)}
    for i in range(count if damping != 1 else 0):
        layer = moved[f"core_{i}"]
        damped = {name: layer[name] | {"proj": damping * layer[name]["proj"]} for name in ("attn", "mlp")}
        moved[f"core_{i}"] = layer | damped
    kept = {name: x for name, x in params.items() if name not in config.layers}
    loop = Loop(injection="none", start="embedding", bridge=False)
    return kept | moved, dataclasses.replace(
        config, prelude_layers=first, core_layers=count, coda_layers=layers - first - count, loop=loop,
        mean_recurrence=max(PASSES),
    )  # fmt: skip


def loop_part(args: Args) -> Json:
    """Nats of held-out text for every block, passes and damping; FCC for the block that text likes most.

    Raises:
      InputError: no plain model.
    """
    if not is_huggingface(args.model):
        raise InputError(
            f"--model {args.model}: not a Hugging Face folder; make it with: python experiments/fetch_model.py smollm2 "
            f"--out {args.model}"
        )
    run = load(args.model)
    params, config, tokenizer = run.params, run.config, run.require_tokenizer()
    if config.loop != ONCE:
        raise InputError(f"--model {args.model}: is recurrent already; give a plain model")
    corpus = DataConfig(
        folder=str(args.data_folder), tokenizer_size=tokenizer.vocab_size, sequence_length=128, batch_size=8
    )
    corpus = dataclasses.replace(corpus, prepared=(str(prepare_embedded(corpus, tokenizer=tokenizer)),))
    batches = list(open_validation(corpus, tokenizer).batches(1 if args.quick else 8))

    def nats(first: int, count: int, damping: float, depths: tuple[int, ...]) -> list[float]:
        model = looped(params, config, first, count, damping)
        curve = depth_curve(*model, batches, depths, tokenizer.token_bytes)
        assert curve is not None  # nothing stops it
        return curve.nats

    blocks = BLOCKS[:1] if args.quick else BLOCKS
    progress, found, plain = Progress(len(blocks)), {}, 0.0
    for i, (first, count) in enumerate(blocks):
        plain, *repeated = nats(first, count, 1.0, (1, *PASSES))
        damped = [nats(first, count, 1 / k, (k,))[0] for k in PASSES]
        found[f"{first} to {first + count - 1}"] = {"as they are": repeated, "damped": damped}
        progress.update(i + 1, f"layers {first} to {first + count - 1}", last=i + 1 == len(blocks))
    best = min(range(len(blocks)), key=lambda i: list(found.values())[i]["damped"][0])
    asked = read_questions(question_file("fcc", args.data_folder))[: 2 if args.quick else 300]
    first, count = blocks[best]

    def right(damping: float, depths: tuple[int, ...]) -> list[int]:
        model = looped(params, config, first, count, damping)
        return answer(*model, tokenizer, asked, depths, tokens_per_batch=2048).right["per_character"].sum(1).tolist()

    as_they_are = right(1.0, (1, 2))
    return {
        "plain_nats": plain,
        "passes": PASSES,
        "blocks": found,
        "questions": len(asked),
        "block": list(found)[best],
        "right": {"plain": as_they_are[0], "as they are, 2": as_they_are[1], "damped, 2": right(0.5, (2,))[0]},
    }


# Lens


class Seen(NamedTuple):
    """What the lens shows of N scored tokens at R depths. top int32 [R, N]: the likeliest. label int32 [N].
    confidence f32 [N]: probability of the last one. moved f32 [N]: KL(last || half as deep), nats.
    """

    top: np.ndarray
    label: np.ndarray
    confidence: np.ndarray
    moved: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "deepest"))
def _seen(params: Params, config: ModelConfig, given: dict[str, Array], deepest: int) -> tuple[Array, ...]:
    labelled = as_batch(given)
    bound = bind(params, config, labelled.tokens, segment_ids=labelled.segment_ids, positions=labelled.positions)

    def read(s: Array) -> Array:
        return jax.nn.log_softmax(known(config, bound.read(s)[0]))

    half, last = checkpoints(bound.step, bound.s0, (deepest // 2, deepest), read)
    top = checkpoints(bound.step, bound.s0, tuple(range(1, deepest + 1)), lambda s: jnp.argmax(read(s), -1))
    return top, labelled.labels, jnp.exp(last.max(-1)), divergence(last, half)


def seen(params: Params, config: ModelConfig, batches: Batches, deepest: int) -> Seen:
    """All scored tokens of the batches, at depths 1 to `deepest`."""
    parts = [[np.asarray(x) for x in _seen(params, config, given, deepest)] for given in batches]
    chosen = [[x[..., labels != IGNORED] for x in (top, labels, sure, moved)] for top, labels, sure, moved in parts]
    return Seen(*(np.concatenate(x, axis=-1) for x in zip(*chosen, strict=True)))


def signs(found: Seen) -> dict[str, np.ndarray]:
    """Of every token, what may say that its answer is wrong: the larger, the more so."""
    changes = (found.top[1:] != found.top[:-1]).sum(0)
    settled = (found.top != found.top[-1]).cumsum(0).argmax(0)  # last depth that says something else
    return {
        "low confidence": -found.confidence,
        "settled late": np.where(changes > 0, settled + 1, 0),
        "changes": changes,
        "still moving": found.moved,
    }


def ranking(sign: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that the sign is larger for a wrong token than for a right one, ties counted half (area under the
    ROC curve); NaN without both kinds.
    """
    n = int(wrong.sum()), int((~wrong).sum())
    if not min(n):
        return math.nan
    return float(scipy.stats.mannwhitneyu(sign[wrong], sign[~wrong]).statistic / (n[0] * n[1]))


def ranking_within(sign: np.ndarray, wrong: np.ndarray, confidence: np.ndarray) -> float:
    """The same among tokens of about equal confidence: the mean over `BINS` groups, weighted by their pairs."""
    groups = [g for g in np.array_split(np.argsort(confidence), BINS) if 0 < wrong[g].sum() < len(g)]
    weights = [float(wrong[g].sum() * (~wrong[g]).sum()) for g in groups]
    return float(np.average([ranking(sign[g], wrong[g]) for g in groups], weights=weights)) if groups else math.nan


def monitored(params: Params, config: ModelConfig, batches: Batches, deepest: int) -> Json:
    """How well each sign ranks wrong tokens before right ones: by itself, and among tokens of equal confidence."""
    found = seen(params, config, batches, deepest)
    wrong = found.top[-1] != found.label
    return {
        "wrong": float(wrong.mean()),
        "changed": float((found.top[-1] != found.top[0]).mean()),
        "lost": float(((found.top == found.label).any(0) & wrong).mean()),
        "ranks": {name: ranking(sign, wrong) for name, sign in signs(found).items()},
        "ranks_within": {name: ranking_within(x, wrong, found.confidence) for name, x in signs(found).items()},
    }


def held(params: Params, config: ModelConfig, batches: Batches, depths: Sequence[int]) -> Json:
    """What states say on S3: {r: share of positions whose likeliest token is the product of the last w letters}.

    Counted at positions of the second half, so that w up to the first half's letters leaves some out. `right`: the
    product of all letters so far. `best`: (w, share) where the share is largest.
    """
    table, half = product("S3"), LETTERS // 2
    tops, words = [], []
    for given in batches:
        tops.append(np.asarray(_seen(params, config, given, max(depths))[0])[[r - 1 for r in depths]])
        words.append(np.asarray(given["tokens"])[:, 1:])
    top, word = np.concatenate(tops, 1)[:, :, 1:], np.concatenate(words)
    windows = np.zeros((half + 1, *word.shape), np.int32)  # of the last w letters; of none: the identity
    for w in range(1, half + 1):
        windows[w, :, w - 1 :] = table[windows[w - 1, :, w - 2 : -1], word[:, w - 1 :]] if w > 1 else word
    right = np.concatenate([np.asarray(x["labels"])[:, 1:] for x in batches])
    late = slice(half, None)
    shares = [(top[:, None] == windows[None])[..., late].mean((2, 3))[:, w] for w in range(1, half + 1)]
    by_depth = np.stack(shares, 1)  # [depths, half]
    return {
        str(r): {
            "right": float((top[i] == right)[..., late].mean()),
            "best": (int(by_depth[i].argmax()) + 1, float(by_depth[i].max())),
        }
        for i, r in enumerate(depths)
    }


# All


def contrast_part(args: Args) -> Json:
    """`contrasted` on text and on words, means over seeds with half the width of their intervals."""
    text, task = [], []
    for seed in args.seeds:
        run = text_run(args, seed)
        text.append(contrasted(run.params, run.config, text_batches(run, args), TEXT_PAIRS))
        task.append(contrasted(*task_run(args, seed), task_batches(args), TASK_PAIRS))
    return {"text": over_seeds(text), "task": over_seeds(task)}


def lens_part(args: Args) -> Json:
    """`monitored` on text at r = 16 and on words at r = 12, and `held`; over seeds."""
    text, task, states = [], [], []
    for seed in args.seeds:
        run, model = text_run(args, seed), task_run(args, seed)
        text.append(monitored(run.params, run.config, text_batches(run, args), 16))
        task.append(monitored(*model, task_batches(args), 12))
        states.append(held(*model, task_batches(args), TASK_DEPTHS))
    return {"text": over_seeds(text), "task": over_seeds(task), "held": over_seeds(states)}


def over_seeds(rows: Sequence[Any]) -> Any:
    """The same tree with (mean, half the width of the interval) in place of every number."""
    first = rows[0]
    if isinstance(first, dict):
        return {name: over_seeds([row[name] for row in rows]) for name in first}
    if isinstance(first, (list, tuple)):
        return [over_seeds(x) for x in zip(*rows, strict=True)]
    return rounded(interval(rows))


def tables(found: Json) -> str:
    """What was found, in Markdown."""
    out: list[str] = []

    def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
        out.extend(["| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows)] + [""])

    def shown(x: Sequence[float], digits: int = 3) -> str:
        mean, half = x
        return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"

    if "contrast" in found:
        for data in ("text", "task"):
            rows: list[list[str]] = []
            for pair, by in found["contrast"][data].items():
                for name, values in by.items():
                    rows.append([data, pair, name, *(shown(x, 4) for x in values)])
            table(["", "r, e", "", *(f"a = {a:g}" for a in ALPHAS)], rows)
    if "loop" in found:
        part = found["loop"]
        ways = ("as they are", "damped")
        heads = ["layers", *(f"{way}, {k} times" for way in ways for k in part["passes"])]
        rows = [[name, *(f"{x:.3f}" for way in ways for x in by[way])] for name, by in part["blocks"].items()]
        table(heads, rows)
        asked, right = part["questions"], part["right"]
        out.append(f"plain: {part['plain_nats']:.3f} nats. Layers {part['block']}, right of {asked}: {right}\n")
    if "lens" in found:
        part, names = found["lens"], list(found["lens"]["text"]["ranks"])
        table(
            ["", "wrong", "changed", "right before", *names, *(f"{name}, equal confidence" for name in names)],
            [
                [data, *(shown(part[data][x]) for x in ("wrong", "changed", "lost"))]
                + [shown(part[data][kind][name]) for kind in ("ranks", "ranks_within") for name in names]
                for data in ("text", "task")
            ],
        )
        table(
            ["r", "right", "w", "product of the last w letters"],
            [[r, shown(x["right"]), shown(x["best"][0], 1), shown(x["best"][1])] for r, x in part["held"].items()],
        )
    return "\n".join(out)


def picture(path: Path, found: Json) -> None:
    """Contrast on text; blocks in a loop; what states hold on S3."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for colour, (pair, by) in zip(colours, found.get("contrast", {}).get("text", {}).items(), strict=False):
        left.plot(ALPHAS, [x[0] for x in by["nats"]], color=colour, marker="o", markersize=4, label=f"r, e = {pair}")
        left.plot(ALPHAS, [x[0] for x in by["sharpened"]], color=colour, linestyle=":")
    left.set(title="text: contrast (dotted: sharpened alone)", xlabel="weight of the contrast", ylabel="nats")
    part = found.get("loop")
    if part is not None:
        places = np.arange(len(part["blocks"]))
        for shift, (way, colour) in enumerate((("as they are", colours[1]), ("damped", colours[0]))):
            heights = [by[way][0] - part["plain_nats"] for by in part["blocks"].values()]
            middle.bar(places + 0.4 * shift - 0.2, heights, 0.4, color=colour, label=way)
        middle.set_xticks(places, list(part["blocks"]), rotation=30)
        middle.set(title="plain model: layers run twice", ylabel="nats more than the plain model")
    states = found.get("lens", {}).get("held", {})
    if states:
        r = [int(x) for x in states]
        right.plot(r, [x["right"][0] for x in states.values()], color=colours[0], marker="o", label="of all letters")
        shares = [x["best"][1][0] for x in states.values()]
        right.plot(r, shares, color=colours[1], marker="o", label="of the last w letters, best w")
        right.set(title=f"S3, {LETTERS} letters: the product that states hold", xlabel="r", ylim=(0, 1.03))
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="readouts.py", description=__doc__)
    reuse_freed_memory()
    check_seeds(args.seeds)
    require(len(set(args.parts)) == len(args.parts) > 0, "--parts", args.parts, "must be different readouts")
    if args.quick:
        args = dataclasses.replace(args, runs=args.runs / "quick", results=args.runs / "quick", seeds=args.seeds[:1])
    make: dict[str, Callable[[Args], Json]] = {"contrast": contrast_part, "loop": loop_part, "lens": lens_part}
    path = args.results / "readouts.json"
    found = beside_earlier(path, {part: make[part](args) for part in args.parts}, get_args(Part))
    print(tables(found))
    units = {
        "contrast": "by weight a: nats and accuracy of l_r + a (l_r - l_e), nats of (1 + a) l_r; mean over seeds and "
        "half the width of its 95 % interval, as everywhere",
        "loop": "nats of held-out text; right answers per character",
        "lens": "ranks: probability that a wrong token has more of the sign than a right one; ranks_within: among "
        "tokens of equal confidence; lost: wrong, and right at an earlier depth; held: [w, share]",
    }
    publish(path, {"alphas": ALPHAS, "methods": found}, units, functools.partial(picture, found=found))
    return 0


if __name__ == "__main__":
    run_command(main)
