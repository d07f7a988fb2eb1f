"""Run lm-eval's tasks at every depth and with an exit rule, and compare with the paper.

    python experiments/lm_eval.py runs/quickstart --tasks arc_easy sciq --depths 4 8 16 32      # needs a network
    python experiments/lm_eval.py runs/huginn --preset paper --depths 4 8 16 32 --exit kl --threshold 5e-4
    python experiments/lm_eval.py runs/quickstart --tasks my_task --include-path FOLDER         # local task files

Needs the extra `eval` (pip install 'rdlm[eval]'). Likelihood tasks cost one unroll to the deepest of --depths; tasks
that generate run once per depth. A preset sets few-shot examples, chat template, system prompt, begin token and dtype
as in the paper, and lists what is not documented; all of it is stored with the results. Offline, the task files of
FOLDER read local data (`dataset_path: json`; see `rdlm/evaluation/lm_eval/tasks.py`).

Prints a table; writes RUN/analysis/lm_eval_TASKS.json and .csv, and the newest also as lm_eval.json.
Exit codes: 0 done, 2 wrong input. Hardware: any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from rdlm.config import ExitName, InputError, check_threshold, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from rdlm.config import ModelConfig
    from rdlm.evaluation.lm_eval import DepthResult, Protocol
    from rdlm.report.results import Json

UNITS = {
    "results": "as lm-eval reports them: shares from 0 to 1, perplexities, bits",
    "published": "per cent",
    "iterations": "mean recurrences per token read or generated",
    "looks": "mean checks that read logits, per token",
    "cut": "requests whose context is longer than the model reads, and was cut on the left",
    "flops_per_token": "forward FLOPs, attention in full over the mean context",
    "equivalent_parameters": "parameters of the unrolled model at the mean recurrences",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Run lm-eval's tasks on the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py or convert_huggingface.py."""
    tasks: tuple[str, ...] = ()
    """lm-eval's names of tasks or groups. Without any: those of the preset."""
    preset: Literal["none", "paper", "gsm8k"] = "none"
    """Protocol of the paper. none: as the flags below say."""
    depths: tuple[int, ...] = (4, 8, 16, 32)
    """Recurrences r."""
    exit: Literal["none"] | ExitName = "none"
    """Adds a row in which every token stops on its own, after at most the largest of --depths."""
    threshold: float | None = None
    """Of the exit rule. None: its default, 5e-4 for kl."""
    include_path: Path | None = None
    """Folder of task files to use instead of lm-eval's own."""
    fewshot: int | None = None
    """Examples in the context. None: as the task says."""
    chat: bool = False
    """Use the tokenizer's chat template, with one turn per example."""
    system: str | None = None
    """System prompt."""
    limit: int | None = None
    """Only the first N documents of each task. None: all."""
    lanes: int = 16
    """Number of texts that are generated at once."""
    tokens_per_batch: int = 4096
    """Of likelihoods. More is faster on a TPU and takes more memory."""
    step: int | None = None
    """Checkpoint. None: the newest."""


def main() -> int:
    args = parse_arguments(Args, prog="lm_eval.py", description=__doc__)
    require(bool(args.depths) and min(args.depths) >= 1, "--depths", args.depths, "must be recurrences of at least 1")
    for name in ("limit", "lanes", "tokens_per_batch"):
        value = getattr(args, name)
        require(value is None or value >= 1, "--" + name.replace("_", "-"), value, "must be at least 1")
    require(args.fewshot is None or args.fewshot >= 0, "--fewshot", args.fewshot, "must not be negative")
    check_threshold(args.exit, args.threshold)
    if args.preset != "none" and (args.fewshot is not None or args.chat or args.system is not None):
        raise InputError(f"--preset {args.preset}: sets --fewshot, --chat and --system; leave out either")
    if args.preset == "none" and not args.tasks:
        raise InputError("--tasks: name at least one, or choose a --preset")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of lm-eval and datasets; ours replaces them
    with script_folder_hidden():
        from rdlm.evaluation.lm_eval import PROTOCOLS, load_tasks
    protocol = args_protocol(args) if args.preset == "none" else PROTOCOLS[args.preset]
    tasks = load_tasks(args.tasks or protocol.tasks, args.include_path)
    return run(args, protocol, tasks)


class script_folder_hidden:
    """Python searches the script's folder first, where `lm_eval` would be this file instead of the package."""

    def __enter__(self) -> None:
        here = Path(__file__).resolve().parent
        self.kept = list(sys.path)
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]

    def __exit__(self, *exception: object) -> None:
        sys.path[:] = self.kept


def args_protocol(args: Args) -> Protocol:
    """The protocol of the command line."""
    from rdlm.evaluation.lm_eval import Protocol

    return Protocol(args.tasks, args.fewshot, args.chat, multiturn=args.chat, system=args.system)


def run(args: Args, protocol: Protocol, tasks: list[Any]) -> int:
    """Evaluate, print and write."""
    import rdlm
    from rdlm import exits
    from rdlm.evaluation.lm_eval import DepthLM, evaluate
    from rdlm.report import write_result, write_table
    from rdlm.run import find

    model = find(args.run_dir, args.step)
    tokenizer, params, config = model.require_tokenizer(), model.params, model.config
    if protocol.dtype is not None:
        params = rdlm.cast(params, protocol.dtype)
    lm = DepthLM(
        params,
        config,
        tokenizer,
        tuple(sorted(set(args.depths))),
        bos=protocol.bos,
        exit_rule=exits.named(args.exit, args.threshold),
        lanes=args.lanes,
        tokens_per_batch=args.tokens_per_batch,
        progress=Bar(),
    )
    rows = evaluate(lm, tasks, protocol, args.limit)
    asked = [name for name in args.tasks or protocol.tasks if name in rows[0].results]
    names = list(dict.fromkeys([*(getattr(task, "task_name", None) or task.name for task in tasks), *asked]))
    found = [record(config, x, name_of(args, x)) for x in rows]
    show(f"{args.run_dir}, step {model.step}", rows, [name_of(args, x) for x in rows], found, names, args.limit)
    cut, of = lm.cut
    if cut:
        print(f"note: {cut} of {of} contexts are longer than the model reads and were cut on the left")
    result = {
        "run": str(args.run_dir),
        "step": model.step,
        "preset": args.preset,
        "protocol": protocol.record() | {"tasks": names, "limit": args.limit, "seeds": "lm-eval's defaults"},
        "lm_eval": importlib.metadata.version("lm-eval"),
        "task_versions": rows[0].versions,
        "examples_in_context": rows[0].fewshot,
        "cut": cut,
        "requests": of,
        "rows": found,
        "published": published(names),
    }
    newest = args.run_dir / "analysis" / "lm_eval.json"
    for path in (newest, newest.with_name(f"lm_eval_{file_name(names)}.json")):
        write_result(path, result, UNITS)
        write_table(path.with_suffix(".csv"), flat(found))
    print(f"numbers: {path}\ntable:   {path.with_suffix('.csv')}")
    return 0


def file_name(tasks: list[str]) -> str:
    """The tasks as part of a file's name: results of other tasks are kept."""
    name = re.sub(r"[^\w.+-]", "_", "+".join(tasks))
    return name if len(name) <= 80 else f"{name[:60]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Bar:
    """A progress display with one line per kind of request."""

    def __init__(self) -> None:

        self.what, self.progress = "", Progress(0)

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show the number of finished requests."""
        if what != self.what or self.progress.total != of:
            self.what, self.progress = what, Progress(of)
        self.progress.update(done, what, last=done == of)


def name_of(args: Args, row: DepthResult) -> str:
    """Name of a row."""
    if row.rule is None:
        return f"r = {row.depth}"
    from rdlm import exits

    rule = exits.named(args.exit, args.threshold)
    assert rule is not None  # the row has one
    return f"{args.exit}({rule.threshold:g}), r <= {row.depth}"


def record(config: ModelConfig, row: DepthResult, name: str) -> Json:
    """A row for JSON."""
    from rdlm.perf.flops import cost

    tasks = {}
    for task, effort in row.effort.items():
        n = max(effort.tokens, 1)
        price = cost(config, effort.recurrences / n, round(effort.lengths / n), effort.checks / n)
        tasks[task] = {
            "iterations": effort.recurrences / n,
            "looks": effort.checks / n,
            "tokens": effort.tokens,
            "flops_per_token": price.flops_per_token,
            "equivalent_parameters": price.equivalent_parameters,
        }
    return {"name": name, "depth": row.depth, "rule": row.rule, "results": row.results, "cost": tasks}


def flat(found: list[Json]) -> list[Json]:
    """One line per row, task and metric."""
    return [
        {"row": x["name"], "task": task, "metric": metric, "value": value}
        | {k: x["cost"].get(task, {}).get(k) for k in ("iterations", "flops_per_token")}
        for x in found
        for task, metrics in x["results"].items()
        for metric, value in metrics.items()
    ]


def published(names: list[str]) -> dict[str, dict[str, float]]:
    """The published rows of these tasks."""
    from rdlm.evaluation.lm_eval import PUBLISHED

    rows = {
        model: {task: x for task, x in values.items() if task.split(",")[0] in names}
        for model, values in PUBLISHED.items()
    }
    return {model: values for model, values in rows.items() if values}


def show(
    what: str, rows: list[DepthResult], called: list[str], found: list[Json], names: list[str], limit: int | None
) -> None:
    """Print our rows and the published ones."""
    from rdlm.evaluation.lm_eval import headline

    ours = [
        {
            f"{name}, {which}" if which else name: value
            for name in names
            for which, value in headline(row.results.get(name, {}))
        }
        for row in rows
    ]
    columns = list(ours[0])
    part = "" if limit is None else f"; only the first {limit} documents of each task"
    table = Table(title=what, caption=f"published rows: arXiv 2502.05171, per cent{part}")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("recurrences", justify="right")
    for name, values, x in zip(called, ours, found, strict=True):
        costs = x["cost"].values()
        mean = sum(c["iterations"] * c["tokens"] for c in costs) / max(sum(c["tokens"] for c in costs), 1)
        table.add_row(name, *(shown(values.get(c)) for c in columns), f"{mean:.1f}")
    for i, (model, scores) in enumerate(published(names).items()):
        if i == 0:
            table.add_section()
        table.add_row(model, *(f"{scores[c]:.2f}" if c in scores else "" for c in columns), "")
    Console(highlight=False).print(table)


def shown(value: float | None) -> str:
    """Shares in per cent, as published; larger values as they are."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if 0 <= value <= 1 else f"{value:.3f} (not %)"


if __name__ == "__main__":
    run_command(main)
