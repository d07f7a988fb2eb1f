"""Choose exit thresholds that keep the predictions of full depth, with a guarantee.

    python experiments/calibrate_exits.py runs/quickstart
    python experiments/calibrate_exits.py runs/quickstart --rules kl --epsilon 0.02 --rows 300
    python experiments/generate.py runs/quickstart --prompt "Geography" --exit kl --calibrated

For each rule: the loosest threshold at which at least 1 - epsilon of the tokens have the same likeliest next token as
after --steps recurrences, with confidence 1 - delta, on held-out text (new instances for a run of depth_scaling.py).
The method and the limits of the guarantee: docs/calibration.md. The threshold is then scored on other rows. Writes
calibrated_exits.json into the run folder, one entry per rule. A rule for which no threshold passes is a result as
well: it is printed and written, and the command exits with 0. Exit codes: 0 done, 2 wrong input. Hardware: any.
Processor time: about 40 s per threshold of kl on the quickstart (8 are tried), 5 s per threshold of latent_diff; 42 s
in all for runs/s3 with four rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rdlm.config import IGNORED, InputError, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from rdlm.evaluation.calibration import Calibrated, Rows
    from rdlm.evaluation.held_out import HeldOut


BATCH = 16  # rows per call


@dataclasses.dataclass(frozen=True)
class Args:
    """Calibrate the exit rules of the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py, depth_scaling.py or convert_huggingface.py."""
    rules: tuple[str, ...] = ("kl", "latent_diff", "fixed")
    """Rules to calibrate: kl, gated_kl, min_p_kl, entropy_diff, latent_diff, cosine, argmax_stability.

    fixed: the smallest fixed depth with the same guarantee, for comparison."""
    epsilon: float = 0.01
    """Share of tokens whose prediction may differ from that at full depth."""
    delta: float = 0.05
    """Probability, over the draw of the rows, that the guarantee is wrong. For each rule separately."""
    steps: int | None = None
    """Full depth: the maximum recurrences of a token. None: twice the model's mean_recurrence, as generate.py."""
    rows: int = 1000
    """Maximum rows to choose with, drawn at random; more rows allow looser thresholds. At most 3/4 of a text's rows.

    The threshold is then scored on up to as many of the other rows."""
    seed: int = 0
    """Of the drawn rows and the initial states."""
    prepared: tuple[str, ...] = ()
    """Where the run's prepared data lie now, if they have moved; they are compared with what it was trained on."""


def main() -> int:
    args = parse_arguments(Args, prog="calibrate_exits.py", description=__doc__)
    require(args.rows >= 1, "--rows", args.rows, "must be at least 1")
    require(0 <= args.seed < 2**31, "--seed", args.seed, "must be in [0, 2**31)")
    require(args.steps is None or args.steps >= 2, "--steps", args.steps, "must be at least 2, or nothing is saved")
    require(args.steps is None or args.steps < 2**31, "--steps", args.steps, "must be below 2**31")
    require(len(args.rules) > 0, "--rules", args.rules, "name at least one rule")
    from rdlm.evaluation import calibration  # JAX takes seconds to import
    from rdlm.evaluation.held_out import held_out
    from rdlm.run import find

    calibration.check_risk(args.epsilon, args.delta)
    for rule in args.rules:
        calibration.thresholds(rule, 2)  # refuse a wrong name before minutes of work
    data = held_out(args.run_dir, prepared=args.prepared)
    calibration.read(args.run_dir)
    run = find(args.run_dir)
    made = run.require_config().data
    params, config, step = run.params, run.config, run.step
    looped = config.mean_recurrence == 1 or config.loop.close  # made for exactly so many
    num_steps = args.steps or config.mean_recurrence * (1 if looped else 2)
    what = f"validation text of {', '.join(made.prepared) or made.source}"
    if data.is_task:
        what = f"new instances of {made.task}"
    chosen, others = draw(data, args.rows, args.seed)
    count = len(chosen["tokens"])
    calibration.check_rows(count, args.epsilon, args.delta)
    print(f"{args.run_dir}, step {step}: {count:,} rows of {what}, up to {num_steps} recurrences", flush=True)
    with Progress(-(-count // BATCH)) as progress:

        def scorer(rows: Rows) -> calibration.Scorer:
            return calibration.Scorer(
                params,
                config,
                rows,
                num_steps,
                batch_size=BATCH,
                seed=args.seed,
                progress=lambda done: progress.update(done, "batches of a threshold"),
            )

        choose = scorer(chosen)
        check = scorer(others) if len(others["tokens"]) else None
        found = []
        for rule in args.rules:

            def tried(x: calibration.Tried, rule: str = rule) -> None:
                progress.say(
                    f"{rule} at {x.threshold:g}: {x.agreement:.3%} agree after {x.mean_steps:.2f} recurrences; "
                    f"p = {x.p_value:.2g}, {'passes' if x.p_value <= args.delta else 'fails'}"
                )

            found.append(
                calibration.calibrate(
                    choose, rule, epsilon=args.epsilon, delta=args.delta, step=step, data=what, check=check, tried=tried
                )
            )
            calibration.save(args.run_dir, found[-1])
    show(found)
    for one in found:
        print(one.guarantee)
    print(f"numbers: {args.run_dir / calibration.FILE}")
    return 0


def draw(data: HeldOut, max_rows: int, seed: int) -> tuple[Rows, Rows]:
    """(rows to choose with, other rows), drawn at random without replacement.

    Raises:
      InputError: there is no row with a token to score.
    """
    first = next(iter(data.batches(1)), None)
    if first is None:
        raise InputError(f"{data.what}: there is none; prepare the data with a validation fraction above 0")
    size = len(first["tokens"])
    batches = -(-2 * max_rows // size) if data.is_task else data.total  # a task's instances are endless
    wanted = set(np.random.default_rng(seed).permutation(batches * size)[: 2 * max_rows].tolist())
    found = [
        {name: values[i] for name, values in batch.items()}
        for b, batch in enumerate(data.batches(batches))
        for i in range(len(batch["tokens"]))
        if b * size + i in wanted and batch["segment_ids"][i].any()
    ]
    if not found:
        raise InputError(f"{data.what}: holds no token; prepare the data with a validation fraction above 0")
    order = np.random.default_rng([seed, 1]).permutation(len(found))
    cut = min(max_rows, max(1, len(found) * 3 // 4))
    return stacked([found[i] for i in order[:cut]], data), stacked([found[i] for i in order[cut:]], data)


def stacked(rows: Iterable[dict], data: HeldOut) -> Rows:
    """Rows as arrays [N, L]. Every token of a text is scored; of a task, those with an answer."""

    rows = list(rows)

    def column(name: str) -> np.ndarray:
        return np.stack([row[name] for row in rows]) if rows else np.zeros((0, data.length), np.int32)

    segments = column("segment_ids")
    return {
        "tokens": column("tokens"),
        "segment_ids": segments,
        "scored": (segments != 0) & (column("labels") != IGNORED) if data.is_task else segments != 0,
    }


def show(found: list[Calibrated]) -> None:
    """Print the table."""
    one, goal = found[0], found[0].goal
    share, confidence = f"{1 - goal.epsilon:.4g}", f"{1 - goal.delta:g}"
    table = Table(
        title=f"Agree with {goal.num_steps} recurrences: at least {share}, confidence {confidence}",
        caption=f"agree: on the {one.rows:,} rows that chose; others: on {one.checked_rows:,} more rows\n"
        f"full depth: {one.full_flops_per_token:,.3g} FLOPs/token",
    )
    for head in ("rule", "threshold", "agree", "others", "mean r", "FLOPs/token", "saved"):
        table.add_column(head, justify="left" if head == "rule" else "right")
    for x in found:
        if (e := x.effect) is None:
            table.add_row(x.rule, "none", *[""] * 5)
            continue
        checked = "" if e.checked_agreement is None else f"{e.checked_agreement:.2%}"
        effect = (
            f"{e.agreement:.2%}",
            checked,
            f"{e.mean_steps:.2f}",
            f"{e.flops_per_token:.3g}",
            f"{x.flops_saved:.0%}",
        )
        table.add_row(x.rule, f"{x.threshold:g}", *effect)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
