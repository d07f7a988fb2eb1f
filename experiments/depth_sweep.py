"""Quality against cost of a trained run, at fixed depths and with exit rules.

    python experiments/depth_sweep.py runs/quickstart
    python experiments/depth_sweep.py runs/s3 --size 32 --batches 4      # words of 32 letters, twice training's
    python experiments/depth_sweep.py RUN --depths 1 4 16 --batches 2 --rules kl gated_kl

All fixed depths come from one unroll and cost little more than the deepest. Then every exit rule runs at several
thresholds, on the same labels and initial states, with at most the largest of --depths. Reads the run's validation
text, or new instances of its task. Prints a table; writes RUN/analysis/depth_sweep.json, .csv and, if matplotlib is
installed, .png. Every row has mean recurrences, FLOPs per token (attention in full; a check that reads logits costs
coda and head) and the parameters of the unrolled model. Exit codes: 0 done, 2 wrong input.
Hardware: any. On two busy CPU cores runs/s3 took 4 minutes (73 s of processor time for four batches) and
runs/quickstart 11.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rdlm.config import ExitName, InputError, ModelConfig, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from rdlm.evaluation.depth import ExitScore
    from rdlm.evaluation.held_out import HeldOut
    from rdlm.model import Params
    from rdlm.perf.flops import Cost
    from rdlm.report.results import Json

THRESHOLDS: dict[ExitName, tuple[float, ...]] = {
    "kl": (0.1, 1e-2, 1e-3, 5e-4, 1e-4, 1e-5),
    "gated_kl": (0.1, 1e-2, 1e-3, 5e-4, 1e-4, 1e-5),
    "min_p_kl": (0.1, 1e-2, 1e-3, 1e-4, 1e-5),
    "entropy_diff": (0.1, 0.03, 1e-2, 1e-3, 1e-4),
    "latent_diff": (0.3, 0.1, 0.03, 0.01, 0.003),
    "cosine": (3e-2, 1e-2, 1e-3, 1e-4, 1e-5),
    "argmax_stability": (1, 2, 3, 5, 8),
}
UNITS = {
    "threshold": "of the rule",
    "nats": "nats per scored token",
    "bits_per_byte": "bits per byte of text",
    "accuracy": "share of scored tokens",
    "iterations": "mean recurrences per token",
    "most_iterations": "maximum recurrences of a token",
    "looks": "mean checks that read logits, per token",
    "flops_per_token": "forward FLOPs, attention in full",
    "equivalent_parameters": "parameters of the unrolled model at the mean recurrences",
    "pareto": "no other row is as good for fewer FLOPs",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Sweep depth and exit rules of the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py, depth_scaling.py or convert_huggingface.py."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Fixed recurrences r. Exit rules stop after at most the largest."""
    rules: tuple[ExitName, ...] = tuple(THRESHOLDS)
    """Exit rules, each at several thresholds."""
    batches: int | None = 2
    """Batches of held-out data. None: all of them."""
    size: int | None = None
    """Size of a task's instances: letters, operators, hops, distance. None: that of training."""
    step: int | None = None
    """Checkpoint. None: the newest."""
    prepared: tuple[str, ...] = ()
    """Where the run's prepared data lie now, if they have moved; they are compared with what it was trained on."""


def main() -> int:
    args = parse_arguments(Args, prog="depth_sweep.py", description=__doc__)
    require(bool(args.depths) and min(args.depths) >= 1, "--depths", args.depths, "must be recurrences of at least 1")
    require(args.batches is None or args.batches >= 1, "--batches", args.batches, "must be at least 1")
    require(args.size is None or args.size >= 1, "--size", args.size, "must be at least 1")
    from rdlm.evaluation.held_out import held_out  # JAX takes seconds to import
    from rdlm.perf.flops import forward_flops, sweep_flops
    from rdlm.report import picture_line, plot_sweep, write_result, write_table
    from rdlm.run import find

    data = held_out(args.run_dir, args.step, args.size, args.prepared)
    run = find(args.run_dir, args.step)
    if data.length > run.config.max_length:
        raise InputError(f"--size {args.size}: {data.length} tokens, more than the model's max_length; choose less")
    params, config = run.params, run.config
    depths = tuple(sorted(set(args.depths)))
    rows, tokens = sweep(params, config, data, depths, args)
    show(f"{args.run_dir}, step {run.step}: {data.what}", rows, tokens)
    path = args.run_dir / "analysis" / "depth_sweep.json"
    found = {
        "run": str(args.run_dir),
        "step": run.step,
        "data": data.what,
        "tokens": tokens,
        "length": data.length,
        "one_unroll_over_deepest_flops": sweep_flops(config, depths, data.length)
        / forward_flops(config, depths[-1], data.length),
        "rows": rows,
    }
    print(f"numbers: {write_result(path, found, UNITS)}")
    print(f"table:   {write_table(path.with_suffix('.csv'), rows)}")
    title = f"{args.run_dir.resolve().name}, step {run.step}: {data.what}, {tokens:,} scored tokens"
    print(picture_line(lambda: plot_sweep(path.with_suffix(".png"), title, rows, quality(data))))
    return 0


def quality(data: HeldOut) -> str:
    """The measure of quality: accuracy for a task, loss for a text."""
    return "accuracy" if data.is_task else "nats"


def sweep(
    params: Params, config: ModelConfig, data: HeldOut, depths: tuple[int, ...], args: Args
) -> tuple[list[Json], int]:
    """(a row for each depth and each threshold of every rule, number of scored tokens)."""
    from rdlm import exits
    from rdlm.evaluation.depth import ExitScore, depth_curve, exit_score
    from rdlm.perf.flops import cost
    from rdlm.report import FIXED, on_front

    count = data.total if args.batches is None else min(args.batches, data.total)
    batches = list(data.batches(count))
    tries = [(name, threshold) for name in dict.fromkeys(args.rules) for threshold in THRESHOLDS[name]]
    progress = Progress(1 + len(tries))
    progress.update(0, f"depths {', '.join(map(str, depths))} in one unroll")
    curve = depth_curve(params, config, batches, depths, data.token_bytes)
    assert curve is not None  # it is never stopped
    rows = []
    for r, nats, bits, accuracy in zip(curve.depths, curve.nats, curve.bits_per_byte, curve.accuracy, strict=True):
        fixed = ExitScore(nats, bits, accuracy, r, 0.0, r, curve.tokens)
        rows.append(row(FIXED, None, fixed, cost(config, r, data.length)))
    for i, (name, threshold) in enumerate(tries):
        progress.update(1 + i, f"{name} at {threshold:g}, at most {depths[-1]} recurrences")
        rule = exits.named(name, threshold)
        found = exit_score(params, config, batches, rule, depths[-1], data.token_bytes)
        rows.append(row(name, threshold, found, cost(config, found.recurrences, data.length, found.checks)))
    progress.update(1 + len(tries), "done", last=True)
    good = [(1 if data.is_task else -1) * x[quality(data)] for x in rows]
    for x, best in zip(rows, on_front(good, [x["flops_per_token"] for x in rows]), strict=True):
        x["pareto"] = best
    return rows, curve.tokens


def row(rule: str, threshold: float | None, found: ExitScore, price: Cost) -> Json:
    """One row of the table."""
    return {
        "rule": rule,
        "threshold": threshold,
        "nats": found.nats,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
        "iterations": float(price.iterations),
        "most_iterations": found.max_steps,
        "looks": found.checks,
        "flops_per_token": price.flops_per_token,
        "equivalent_parameters": price.equivalent_parameters,
    }


def show(what: str, rows: list[Json], tokens: int) -> None:
    """Print the table."""
    text = rows[0]["bits_per_byte"] == rows[0]["bits_per_byte"]  # NaN for a task
    caption = f"{tokens:,} scored tokens; *: no other row is as good for fewer FLOPs"
    table = Table(title=what, caption=caption, box=SIMPLE_HEAD)
    table.add_column("rule, threshold", no_wrap=True)
    heads = ("nats", *(("bits/byte",) if text else ()), "accuracy", "mean r", "MFLOP", "params")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for x in rows:
        name = x["rule"] if x["threshold"] is None else f"{x['rule']} {x['threshold']:g}"
        table.add_row(
            f"{name} *" if x["pareto"] else name,
            f"{x['nats']:.4f}",
            *((f"{x['bits_per_byte']:.4f}",) if text else ()),
            f"{x['accuracy']:.2%}",
            f"{x['iterations']:.2f}",
            f"{x['flops_per_token'] / 1e6:.2f}",
            f"{x['equivalent_parameters'] / 1e6:.2f}M",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
