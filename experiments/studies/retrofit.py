"""Does it pay to turn a pretrained plain model into a recurrent-depth one? The same fine-tuning, with and without.

    python experiments/studies/retrofit.py                       # everything: about 3 hours on two quiet cores
    python experiments/studies/retrofit.py --methods plain plain_flops retrofit              # the comparison alone
    python experiments/studies/retrofit.py --quick               # only shows that everything works, a minute or two

Every run begins with SmolLM2-135M (`fetch_model.py smollm2`) and learns the same chains of facts, asked for 1 to 3
dependent steps (`shared/chains.py`), with a row of text to fifteen of problems: 8 rows of 128 tokens a step, AdamW at
one rate. Plain: the model as it is. Recurrent: all layers kept, adapter [0 I] (`rdlm.retrofit`), a mean depth that
grows to 4.

  plain             the same steps, so equal tokens
  plain_flops       as many steps as have the training FLOPs of `retrofit`
  retrofit          core of layers 8 to 15, everything learns, loss at the drawn depth alone
  pilot             the same in 30 steps instead of 60, and what the other pilots are compared with
  pilot_cut         core of layers 7 to 22
  pilot_curriculum  the full mean depth from the first step
  pilot_core        only core and adapter learn
  pilot_depths      depth 4 in every step, with the loss after 1, 2 and 4 recurrences
  pilot_clipped     gradients clipped to a norm of 1 together, though the adapter's are far larger than all others

The comparison has two seeds, pilots one. Measured, also of the untouched model: right answers by number of steps, 1 to
6, and depth, on new lists; loss of held-out text by depth and, for seed 0, two question sets, which show damage; FLOPs
of training and of an answer. Finished runs stay in runs/retrofit and are not made again; a run that was stopped goes on
with the same command. Prints the hours that are left.

Exit codes: 0 done; 75 stopped by a signal and saved; 2 wrong input. Memory: 12 GiB; disk: 2 GB a run.
Found: docs/studies/retrofit.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

import rdlm
from experiments.studies.shared.chains import (
    CHANCE,
    CONVERSATION,
    LENGTH,
    TEMPLATES,
    Test,
    questions_alone,
    training_lines,
)
from experiments.studies.shared.comparison import Options, beside_earlier, check_comparison
from experiments.studies.shared.record import Json, publish, remembered
from experiments.studies.shared.text import trained
from rdlm.config import (
    Block,
    DataConfig,
    EvaluationConfig,
    InputError,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RecurrenceConfig,
    RunConfig,
    TuneConfig,
    preset,
)
from rdlm.data import Reading, Recipe, open_validation
from rdlm.data.prepare import Corpus, build, cut_files, find_files, prepare_embedded
from rdlm.evaluation import SETS, Choice, answer, question_file, read_questions, wilson, write_questions
from rdlm.evaluation.depth import depth_curve
from rdlm.folders import write_run
from rdlm.hf import is_huggingface, load_huggingface, open_huggingface
from rdlm.model import init_params, retrofit
from rdlm.model.retrofit import ONCE
from rdlm.perf import flops
from rdlm.report.results import commit
from rdlm.run import Run
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command, write_output
from rdlm.tokenizer import Tokenizer
from rdlm.train import draw_depth
from rdlm.train.metrics import read_metrics
from rdlm.weights import begin_from

Name = Literal[
    "plain", "plain_flops", "retrofit",
    "pilot", "pilot_cut", "pilot_curriculum", "pilot_core", "pilot_depths", "pilot_clipped",
]  # fmt: skip
SOURCE = "source"
"""The model before any training, beside the methods."""
FLOPS_PER_SECOND = 1.2e11
"""Of training on two quiet cores (150 tokens/s of the plain model), until a finished run says it better."""
SCORED = 4, 64
"""Choices of a question of the question sets, and roughly the tokens of each: for the estimate of time."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How a run differs from fine-tuning the plain model."""

    label: str
    cut: tuple[int, int] | None = None
    """Layers of prelude and core; None: plain."""
    curriculum: bool = True
    only: tuple[Literal["core", "adapter"], ...] = ()
    """Parts that learn; (): all."""
    supervised: tuple[int, ...] = ()
    """Recurrences after which the loss is taken, at a fixed depth; (): after the last of a random number."""
    clip_norm: float = 1e9
    """Maximum norm of all gradients together; 1e9: not clipped."""
    pilot: bool = False
    """Fewer steps, one seed, no question sets."""
    flops_of: Name | None = None
    """Train for the FLOPs of that method instead of its steps."""


CUT = (8, 8)
METHODS: dict[Name, Method] = {
    "plain": Method("plain, equal tokens"),
    "plain_flops": Method("plain, equal FLOPs", flops_of="retrofit"),
    "retrofit": Method("recurrent, core of 8", CUT),
    "pilot": Method("pilot", CUT, pilot=True),
    "pilot_cut": Method("pilot, core of 16", (7, 16), pilot=True),
    "pilot_curriculum": Method("pilot, no curriculum", CUT, curriculum=False, pilot=True),
    "pilot_core": Method("pilot, core and adapter learn", CUT, only=("core", "adapter"), pilot=True),
    "pilot_depths": Method("pilot, loss at 1, 2 and 4", CUT, curriculum=False, supervised=(1, 2, 4), pilot=True),
    "pilot_clipped": Method("pilot, gradients clipped", CUT, clip_norm=1.0, pilot=True),
}


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Fine-tune a plain model as it is and as a recurrent-depth one, on problems in words; test on more steps."""

    methods: tuple[Name, ...] = get_args(Name)
    """Ways to train."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of data order, depths and initial states. Pilots have the first."""
    runs: Path = Path("runs/retrofit")
    """Folder for data, models and runs."""
    model: Path = Path("models/smollm2")
    """Hugging Face folder of a plain model; experiments/fetch_model.py makes this one. With --quick: made on the
    spot."""
    data_folder: Path = Path("data")
    """Folder of the World Factbook and of the question sets."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share."""

    steps: int = 60
    """Optimizer steps of a method."""
    pilot_steps: int = 30
    """Of a pilot."""
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 1e-4
    """One for all, not tuned."""
    mean_depth: int = 4
    trained: tuple[int, ...] = (1, 2, 3)
    """Dependent steps of the problems in training."""
    tested: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    problems: int = 500
    """Lists of every template in training: more than a run reads."""
    tests: int = 40
    """Lists of every template in tests, and questions of every template and number of steps."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Recurrences r of all measurements of a recurrent model."""
    text_batches: int = 8
    """Held-out batches of text."""
    questions: int = 100
    """The first of every question set, for seed 0."""

    def quick(self) -> Setting:
        """A few steps and problems, to see that everything works."""
        return dataclasses.replace(
            self, steps=4, pilot_steps=2, trained=(1,), tested=(1, 2), problems=4, tests=10, depths=(1, 4),
            text_batches=1,
        )  # fmt: skip


class Places(NamedTuple):
    """What runs read. source: the plain model, its weights' sha256 in `digest`. questions: files by name."""

    runs: Path
    source: Path
    digest: str
    problems: Path
    text: Path
    questions: dict[str, Path]


def prepare(args: Args, setting: Setting, runs: Path) -> tuple[Places, list[Test]]:
    """Problems, text and question sets for the tokenizer of the source; (their places, the test problems).

    Raises:
      InputError: no plain model, or other data are there already.
    """
    source = toy(runs / "models/toy") if args.quick else args.model
    if not is_huggingface(source):
        raise InputError(
            f"--model {source}: not a Hugging Face folder; make it with: python experiments/fetch_model.py smollm2 "
            f"--out {source}"
        )
    tokenizer, stored = Tokenizer.load(source), open_huggingface(source)
    if stored.config.loop != ONCE:
        raise InputError(f"--model {source}: is recurrent already; give a plain model")
    lines, asked = runs / "data/problems.jsonl", runs / "data/test.jsonl"
    lines.parent.mkdir(parents=True, exist_ok=True)
    write_output(lines, training_lines(0, setting.problems, setting.trained))
    tested = questions_alone(1, setting.tests, setting.tested)
    clozes = [{"prompt": x.prompt, "answer": x.answer, "category": x.category} for _, _, x in tested]
    write_output(asked, "".join(json.dumps(cloze) + "\n" for cloze in clozes))
    # Without validation: what a run holds out is text.
    conversations = Recipe(setting.length, "best_fit", 0.0, reading=Reading("messages"))
    problems = packed(runs / "data/problems", lines, conversations, conversing(tokenizer, runs / "data/tokenizer"))
    if args.quick:
        invented = "".join(json.dumps({"text": f"{i} rooms have {2 * i} doors and a door."}) + "\n" for i in range(60))
        write_output(runs / "data/text.jsonl", invented)
        text = packed(runs / "data/text", runs / "data/text.jsonl", Recipe(setting.length), tokenizer)
        questions = {"test": runs / "data/questions.jsonl"}
        write_questions(questions["test"], [Choice("How many doors do two rooms have?", ("four", "five"), 0)])
    else:
        corpus = DataConfig(
            folder=str(args.data_folder), tokenizer_size=tokenizer.vocab_size, sequence_length=setting.length
        )
        text = prepare_embedded(corpus, tokenizer=tokenizer)
        questions = {name: question_file(name, args.data_folder) for name in SETS}
    return Places(runs, source, stored.digest(), problems, text, questions), tested


def conversing(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The same tokenizer, with `CONVERSATION` for its chat template; saved in `folder`."""
    tokenizer.save(folder)
    write_output(folder / "chat_template.jinja", CONVERSATION)
    return Tokenizer.load(folder)


def packed(folder: Path, lines: Path, recipe: Recipe, tokenizer: Tokenizer) -> Path:
    """The documents of a JSON-lines file as rows in `folder`."""
    parts = cut_files(find_files([str(lines)]), recipe.reading, 10**8)
    build(folder, Corpus("files", lines.name, parts), recipe, tokenizer, processes=1, say=lambda line: None)
    return folder


def toy(folder: Path) -> Path:
    """A random plain model of three layers, as a Hugging Face folder."""
    if not folder.exists():
        told = [test.question for test in questions_alone(2, 40, (1, 2, 3))]
        tokenizer = Tokenizer.train([x.prompt + x.answer for x in told], 400)
        model = ModelConfig(
            tokenizer.vocab_size, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=0, core_layers=3, coda_layers=0,
            max_length=512, rope_base=1e4, qk_bias=False, embed_scale=1.0, mean_recurrence=1, backprop_depth=1,
            block=Block(norm_output="none"), loop=ONCE,
        )  # fmt: skip
        rdlm.save_huggingface(folder, jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)), model)
        tokenizer.save(folder)
    return folder


def beginning(method: Method, places: Places) -> Path:
    """The folder a run begins from: the source, or what it is cut into, which is made if need be."""
    if method.cut is None:
        return places.source
    plain = open_huggingface(places.source).config
    layers = len(plain.layers)
    prelude, core = method.cut if layers > sum(method.cut) else (1, layers - 2)
    coda = layers - prelude - core
    folder = places.runs / f"models/{prelude}-{core}-{coda}-{places.digest[:8]}"
    if not folder.exists():
        made = retrofit(*load_huggingface(places.source), prelude=prelude, core=core, coda=coda)
        write_run(folder, *made, places.source)
    return folder


def run_config(name: Name, setting: Setting, places: Places, seed: int) -> RunConfig:
    """The training run of a method."""
    method, depth = METHODS[name], setting.mean_depth
    steps = setting.pilot_steps if method.pilot else setting.steps
    base = preset("finetune")
    run = begin_from(
        dataclasses.replace(
            base,
            preset=name,
            init=str(beginning(method, places)),
            run_dir=str(places.runs / f"{name}_seed{seed}"),
            data=dataclasses.replace(
                base.data,
                prepared=(str(places.problems), str(places.text)),
                weights=(15.0, 1.0),
                batch_size=setting.batch_size,
                sequence_length=setting.length,
            ),
            mesh=MeshConfig(),
            recurrence=RecurrenceConfig(),
            evaluation=EvaluationConfig(every=10**6, batches=1, depths=(1,)),
            seed=seed,
            steps=steps,
        )
    )
    if method.cut is not None:
        share = 0.75 if method.curriculum else 0.0
        grows = RecurrenceConfig(curriculum_share=share, curriculum_shape="one_minus_sqrt" if share else "linear")
        run = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, mean_recurrence=depth, backprop_depth=depth),
            recurrence=RecurrenceConfig(scheme="fixed") if method.supervised else grows,
            loss=LossConfig(depths=method.supervised),
            tune=TuneConfig(only=method.only),
        )
    if method.flops_of is not None:
        wanted = training_flops(run_config(method.flops_of, setting, places, 0))
        steps = round(wanted / (training_flops(run) / steps))
    optimizer = OptimizerConfig(
        learning_rate=setting.learning_rate,
        min_learning_rate=setting.learning_rate / 20,
        warmup_steps=steps // 10,
        cooldown_steps=steps // 2,
        weight_decay=0.01,
        clip_norm=method.clip_norm,
    )
    checkpoint = dataclasses.replace(run.checkpoint, every=50, keep=1)
    return dataclasses.replace(run, steps=steps, optimizer=optimizer, checkpoint=checkpoint)


@functools.cache
def training_flops(run: RunConfig) -> float:
    """FLOPs of a whole training at the depths that seed 0 draws.

    Forward once; backward once for the activations wherever something before learns, and once for weights that learn.
    """
    draw = functools.partial(draw_depth, dataclasses.replace(run, seed=0))
    draws = jax.jit(jax.vmap(draw))(jnp.arange(run.steps))
    n, k = (float(x.mean()) for x in draws)
    model, L, everything = run.model, run.data.sequence_length, not run.tune.only
    read = flops.check_flops(model, L)  # coda and head
    prelude, core = flops.outer_flops(model, L) - read, flops.core_flops(model, L)
    reads = max(1, len(run.loss.depths))
    per_token = prelude * (3 if everything else 1) + core * (n + 3 * k) + reads * read * (3 if everything else 2)
    return per_token * run.steps * run.data.batch_size * L


def depths_of(model: ModelConfig, setting: Setting) -> tuple[int, ...]:
    """Recurrences to measure a model at."""
    return setting.depths if model.mean_recurrence > 1 else (1,)


def measure(run: Run, setting: Setting, places: Places, asked: Sequence[Test], damage: bool) -> Json:
    """Of a model: right answers and the FLOPs of one, held-out text, and the question sets with `damage`."""
    tokenizer, config, params = run.require_tokenizer(), run.config, run.params
    depths = depths_of(config, setting)
    found = answer(params, config, tokenizer, [test.question for test in asked], depths, tokens_per_batch=2048)
    right: dict[str, dict[str, list[int]]] = {}
    for i, test in enumerate(asked):
        row = right.setdefault(test.template, {}).setdefault(str(test.steps), [0] * len(depths))
        row[:] = [a + int(b) for a, b in zip(row, found.right["greedy"][:, i], strict=True)]
    tokens = float(np.mean([len(tokenizer.encode(test.question.prompt)) for test in asked]))
    data = DataConfig(
        prepared=(str(places.text),), batch_size=setting.batch_size, sequence_length=setting.length,
        tokenizer_size=tokenizer.vocab_size,
    )  # fmt: skip
    batches = open_validation(data, tokenizer).batches(setting.text_batches)
    curve = depth_curve(params, config, batches, depths, tokenizer.token_bytes)
    assert curve is not None  # nothing stops it
    sets: Json = {}
    for name, path in places.questions.items() if damage else ():
        some = read_questions(path)[: setting.questions]
        ends = tuple(r for r in depths if r in (1, setting.mean_depth))
        scored = answer(params, config, tokenizer, some, ends, tokens_per_batch=2048)
        counts = {way: x.sum(1).tolist() for way, x in scored.right.items()}
        sets[name] = {"depths": ends, "count": len(some), "right": counts}
    return {
        "depths": depths,
        "right": right,
        "answer_flops": [tokens * flops.forward_flops(config, r, tokens) for r in depths],
        "text_nats": curve.nats,
        "questions": sets,
    }


def made_by(run: RunConfig | None, setting: Setting, places: Places) -> Json:
    """What determines a row: the run without the names of its folders, and what is measured."""
    about: Json = {"source": places.digest, "setting": dataclasses.asdict(setting)}
    if run is not None:
        settled = dataclasses.asdict(dataclasses.replace(run, run_dir="", init="", weights_digest=""))
        settled["data"]["prepared"] = None
        about["run"] = settled
    return about


def row(name: Name, seed: int, setting: Setting, places: Places, asked: Sequence[Test]) -> Json:
    """Train and measure a run: what `measure` found with seed, commit, last loss, speed and seconds."""
    run = run_config(name, setting, places, seed)

    def make() -> Json:
        model = rdlm.load(trained(run))
        begun = time.monotonic()
        found = measure(model, setting, places, asked, damage=not METHODS[name].pilot and seed == 0)
        steps = [x for x in read_metrics(Path(run.folder)) if x.get("loss") is not None]
        speeds = sorted(x["tokens_per_second"] for x in steps if x.get("tokens_per_second"))
        return {
            "seed": seed,
            "commit": commit(),
            "loss": [float(np.mean([x["loss"] for x in part])) for part in (steps[:20], steps[-20:])],
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "measured_seconds": round(time.monotonic() - begun, 1),
            **found,
        }

    return remembered(places.runs / f"{name}_seed{seed}.json", made_by(run, setting, places), make)


def planned(args: Args) -> list[tuple[Name, int]]:
    """Runs in the order in which they are made: all of a seed before the next seed, so that a part compares too."""
    of = {name: args.seeds[:1] if METHODS[name].pilot else args.seeds for name in args.methods}
    return [(name, seed) for seed in args.seeds for name in args.methods if seed in of[name]]


def estimated(name: Name, setting: Setting, places: Places) -> float:
    """FLOPs of a run and of measuring it, roughly."""
    run = run_config(name, setting, places, 0)
    tokens = setting.text_batches * setting.batch_size * setting.length
    tokens += setting.tests * len(TEMPLATES) * len(setting.tested) * setting.length * 4 // 5
    L, model = setting.length, run.model
    measuring = tokens * flops.sweep_flops(model, depths_of(model, setting), L)
    if not METHODS[name].pilot:
        choices, long = SCORED
        asked = len(places.questions) * setting.questions * choices * long
        measuring += asked * flops.sweep_flops(model, (1, model.mean_recurrence), L)
    return training_flops(run) + measuring


def hours_left(waiting: Sequence[Name], done: Sequence[tuple[Name, Json]], setting: Setting, places: Places) -> str:
    """'about 3.2 hours left'."""
    speeds = []
    for name, found in done:
        run = run_config(name, setting, places, 0)
        if found["tokens_per_second"]:
            speeds.append(training_flops(run) / (run.steps * run.data.batch_size * setting.length))
            speeds[-1] *= found["tokens_per_second"]
    speed = float(np.mean(speeds)) if speeds else FLOPS_PER_SECOND
    hours = sum(estimated(name, setting, places) for name in waiting) / speed / 3600
    said = "as its finished runs say" if speeds else "if this machine is two quiet cores"
    return f"{len(waiting)} runs, about {hours:.1f} hours left, {said}"


def gathered(name: str, rows: Sequence[Json], setting: Setting) -> Json:
    """Aggregates over templates and seeds.

    accuracy: {steps: at every depth [mean over seeds, low, high]}, with Wilson's 95 % interval for the number of
    problems of one seed, since seeds share the problems.
    """
    depths, seeds = rows[0]["depths"], len(rows)
    count = setting.tests * len(TEMPLATES)
    accuracy: Json = {}
    by_template: Json = {template: {} for template in TEMPLATES}
    for steps in map(str, setting.tested):
        total = np.sum([row["right"][template][steps] for row in rows for template in TEMPLATES], axis=0)
        shares = [(x / (seeds * count), *wilson(round(x / seeds), count)) for x in total.tolist()]
        accuracy[steps] = [[round(x, 4) for x in share] for share in shares]
        for template in TEMPLATES:
            share = np.mean([row["right"][template][steps] for row in rows], axis=0) / setting.tests
            by_template[template][steps] = [round(x, 4) for x in share.tolist()]
    asked: Json = {}
    asked_of = [row["questions"] for row in rows if row["questions"]]
    for questions, first in asked_of[0].items() if asked_of else ():
        for way in first["right"]:
            total = np.mean([sets[questions]["right"][way] for sets in asked_of], axis=0).tolist()
            found = [[x / first["count"], *wilson(round(x), first["count"])] for x in total]
            asked.setdefault(questions, {"depths": first["depths"], "count": first["count"]})[way] = found
    return {
        "label": METHODS[name].label if name in METHODS else "before training",
        "seeds": [row["seed"] for row in rows],
        "depths": depths,
        "problems": count,
        "accuracy": accuracy,
        "by_template": by_template,
        "text_nats": np.mean([row["text_nats"] for row in rows], axis=0).tolist(),
        "answer_flops": rows[0]["answer_flops"],
        "questions": asked,
    }


def table(methods: Mapping[str, Json]) -> str:
    """A row for every method and depth, in Markdown."""
    first = next(iter(methods.values()))
    steps, sets = list(first["accuracy"]), list(first["questions"])
    heads = ["", "r", "training FLOPs", "FLOPs an answer", *(f"steps: {n}" for n in steps), "text, nats", *sets]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for found in methods.values():
        for i, r in enumerate(found["depths"]):
            training = f"{found['training_flops']:.2e}" if found.get("training_flops") else ""
            cells = [found["label"] if i == 0 else "", str(r), training if i == 0 else ""]
            cells += [f"{found['answer_flops'][i]:.2e}"]
            for n in steps:
                mean, low, high = found["accuracy"][n][i]
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{found['text_nats'][i]:.3f}")
            for name in sets:
                asked = found["questions"].get(name)
                there = asked is not None and r in asked["depths"]
                cells.append(f"{asked['per_character'][list(asked['depths']).index(r)][0]:.1%}" if there else "")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def picture(path: Path, methods: Mapping[str, Json], trained_to: int) -> None:
    """Accuracy against number of steps. Left: the comparison, by depth. Right: pilots, if any, at theirs."""
    from matplotlib.figure import Figure

    parts = 1 + any(name.startswith("pilot") for name in methods)
    figure = Figure(figsize=(6 * parts, 4.6), layout="constrained")
    panels = figure.subplots(1, parts, sharey=True, squeeze=False)[0]
    plain = {SOURCE: "#999999", "plain": "#000000", "plain_flops": "#D55E00"}
    depth_colours = ("#B9D7EA", "#56B4E9", "#0072B2", "#003A5C")
    pilot_colours = iter(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
    for name, found in methods.items():
        steps = [int(n) for n in found["accuracy"]]
        lines = np.array(list(found["accuracy"].values()))  # [steps, depths, 3]
        pilot = name.startswith("pilot")
        shown = [min(range(len(found["depths"])), key=lambda i: abs(found["depths"][i] - 4))]
        for i in shown if pilot else range(len(found["depths"])):
            mean, low, high = lines[:, i].T
            r = f", r = {found['depths'][i]}" if len(found["depths"]) > 1 else ""
            colour = next(pilot_colours) if pilot else plain.get(name, depth_colours[i % 4])
            bars = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
            panels[int(pilot)].errorbar(
                steps, mean, bars, color=colour, marker="o", markersize=4, capsize=2, label=found["label"] + r
            )
    for axes, title in zip(panels, ("comparison", "pilots, fewer steps, one seed"), strict=False):
        axes.axvline(trained_to + 0.5, color="#999999", linestyle=":", linewidth=1)
        axes.axhline(CHANCE, color="#999999", linestyle="--", linewidth=1, label="chance")
        axes.set(title=title, xlabel="dependent steps (trained left of the dotted line)", ylim=(0, 1.03))
        axes.legend(frameon=False, fontsize=8)
    panels[0].set(ylabel="right answers")
    figure.savefig(path, dpi=110)


def main() -> int:
    args = parse_arguments(Args, prog="retrofit.py", description=__doc__)
    reuse_freed_memory()
    runs, results = check_comparison(args, args.methods)
    setting = Setting().quick() if args.quick else Setting()
    assert max(setting.tested) <= LENGTH
    places, asked = prepare(args, setting, runs)
    before = remembered(
        runs / "source.json",
        made_by(None, setting, places),
        lambda: {"seed": None, **measure(rdlm.load(places.source), setting, places, asked, damage=True)},
    )
    rows: dict[Name, list[Json]] = {}
    plan = planned(args)
    for i, (name, seed) in enumerate(plan):
        print(
            hours_left([n for n, _ in plan[i:]], [(n, x) for n in rows for x in rows[n]], setting, places), flush=True
        )
        rows.setdefault(name, []).append(row(name, seed, setting, places, asked))
        jax.clear_caches()  # the next run has other programs
    found: Json = {SOURCE: gathered(SOURCE, [before], setting)}
    for name, of in rows.items():
        run = run_config(name, setting, places, 0)
        more: dict[str, Any] = {
            "parameters": flops.parameters(run.model),
            "steps": run.steps,
            "tokens": run.steps * run.data.batch_size * run.data.sequence_length,
            "training_flops": training_flops(run),
            "tokens_per_second": [x["tokens_per_second"] for x in of],
            "loss": [x["loss"] for x in of],
        }
        found[name] = gathered(name, of, setting) | more
    path = results / "retrofit.json"
    found = beside_earlier(path, found, (SOURCE, *get_args(Name)))
    print(table(found))
    units = {
        "accuracy": "of the likeliest choice by number of steps, at each of the depths: mean over seeds, Wilson's 95 %",
        "by_template": "the same, mean alone",
        "text_nats": "per token of held-out text, at each of the depths",
        "answer_flops": "forward FLOPs of reading a mean test problem, at each of the depths",
        "training_flops": "forward and backward, at the depths that seed 0 draws",
        "questions": "share right by likelihood (sum) and per character: mean over seeds, Wilson's 95 %",
        "loss": "training loss of the first and the last 20 steps",
    }
    shown = {"chance": CHANCE, "trained_steps": setting.trained, "methods": found}
    publish(path, shown, units, functools.partial(picture, methods=found, trained_to=max(setting.trained)))
    return 0


if __name__ == "__main__":
    run_command(main)
