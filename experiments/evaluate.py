"""Validation loss by depth of a trained run, every depth from one unroll.

    python experiments/evaluate.py runs/quickstart
    python experiments/evaluate.py runs/quickstart --depths 1 2 4 8 16 32 64 --batches 20
    python experiments/evaluate.py runs/quickstart --saved

Prints a table: loss in nats per token, bits per byte of text, the change from the row above, forward FLOPs per token
and the parameters of the unrolled model (with the core r times, as in the paper). Writes loss_by_depth.json and, if
matplotlib is installed, loss_by_depth.png into the run folder. Those are always about the newest checkpoint and all of
the validation data; --step, --ema and --batches write files of their own, with these options in their names.
Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from rdlm.config import IGNORED, InputError, RunConfig, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from rdlm.data import Chain
    from rdlm.evaluation.depth import DepthCurve
    from rdlm.run import Run
    from rdlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate the run in RUN_DIR on its validation data."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py or convert_huggingface.py."""
    depths: tuple[int, ...] | None = None
    """Recurrences r. None: those of the run's config (evaluation.depths)."""
    batches: int | None = None
    """Only the first N validation batches: quicker, noisier. None: all."""
    step: int | None = None
    """Checkpoint to evaluate. None: the newest."""
    ema: bool = False
    """Evaluate the moving average of the weights, if the run has one (optimizer.ema_decay)."""
    data_folder: str | None = None
    """Folder in which the embedded corpus is prepared. None: the one in the run's config (data.folder)."""
    prepared: tuple[str, ...] = ()
    """Where the run's prepared data lie now, if they have moved; they are compared with what it was trained on."""
    saved: bool = False
    """Evaluate nothing; print and draw the saved loss_by_depth.json."""


def main() -> int:
    args = parse_arguments(Args, prog="evaluate.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    require(args.batches is None or args.batches >= 1, "--batches", args.batches, "must be at least 1")
    if args.saved and args.depths:
        raise InputError("--saved: shows the saved depths; leave out --depths or --saved")
    from rdlm.checkpoint import saved_steps  # JAX takes seconds to import
    from rdlm.report import CURVE, picture_line, plot_loss_by_depth, read_curve
    from rdlm.run import find

    run = find(args.run_dir, args.step, args.ema)
    config, step = run.require_config(), run.step
    part = ("" if step == saved_steps(args.run_dir)[-1] else f"_step_{step}") + ("_ema" if args.ema else "")
    part += f"_batches_{args.batches}" if args.batches else ""
    name = CURVE.replace(".", part + ".")
    saved = read_curve(args.run_dir, name) if args.saved else None
    data = run.validation(args.data_folder, args.prepared)
    if saved is not None:
        curve = saved_curve(saved, data, run.require_tokenizer(), args.batches)
    else:
        check_writable(args.run_dir / name)
        curve = evaluate(run, args.depths or config.evaluation.depths, args.batches, data)
        write(args.run_dir, name, curve)
    show(f"{args.run_dir}, step {step}{', averaged weights' if args.ema else ''}", curve, args.batches, config)
    print(f"numbers: {args.run_dir / name}")
    print(picture_line(lambda: plot_loss_by_depth(args.run_dir, name)))
    return 0


def evaluate(run: Run, depths: tuple[int, ...], batches: int | None, data: Chain) -> DepthCurve:
    """The curve at the given depths, with a progress bar."""
    progress = Progress(data.steps_per_epoch if batches is None else min(batches, data.steps_per_epoch))

    def show(done: int, total: int) -> None:
        progress.update(done, f"validation batches, r up to {max(depths)}", last=done == total)

    return run.evaluate(depths, batches=batches, data=data, on_batch=show)


def saved_curve(saved: dict[int, float], data: Chain, tokenizer: Tokenizer, batches: int | None) -> DepthCurve:
    """A saved curve, with bits per byte computed from the validation text."""
    from rdlm.evaluation.depth import DepthCurve, bits_per_byte

    tokens, size = 0, 0.0
    for batch in data.batches(batches):
        labels = batch["labels"][batch["labels"] != IGNORED]
        sizes = tokenizer.token_bytes[labels]
        tokens, size = tokens + labels.size, size + (math.nan if (sizes < 0).any() else float(sizes.sum()))
    nats = list(saved.values())
    bits = [bits_per_byte(x * tokens, size) for x in nats]
    return DepthCurve(tuple(saved), nats, bits, tokens, 0 if math.isnan(size) else int(size))


def check_writable(path: Path) -> None:
    """Refuse before minutes of work a file that cannot be written."""
    real = Path(os.path.realpath(path))  # a link is followed, and stays
    new = not real.exists()
    try:
        real.open("a").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    if new:
        real.unlink()


def write(run_dir: Path, name: str, curve: DepthCurve) -> None:
    """Save the curve as {"1": nats, ...}."""
    from rdlm.train import write_curve

    try:
        write_curve(run_dir / name, curve)
    except OSError as error:
        raise InputError(f"{run_dir / name}: cannot be written ({error.strerror or error})") from error


def show(what: str, curve: DepthCurve, batches: int | None, run: RunConfig) -> None:
    """Print the table."""
    from rdlm.perf.flops import cost

    part = "" if batches is None else f" (first {batches} batches)"
    caption = (
        f"{curve.tokens:,} tokens{part}. FLOPs: forward, over {run.data.sequence_length} tokens, attention in full; "
        "parameters: the core counted r times"
    )
    if not curve.bytes:
        caption += ". Bits per byte are not known: the tokenizer does not say the bytes of every token"
    table = Table(title=f"Validation loss by depth: {what}", caption=caption)
    for head in ("r", "nats per token", "bits per byte", "change", "MFLOP/token", "parameters"):
        table.add_column(head, justify="right")
    before: float | None = None
    for r, nats, bits in zip(curve.depths, curve.nats, curve.bits_per_byte, strict=True):
        price = cost(run.model, r, run.data.sequence_length)
        table.add_row(
            str(r),
            f"{nats:.4f}",
            f"{bits:.4f}",
            "" if before is None else f"{nats - before:+.4f}",
            f"{price.flops_per_token / 1e6:,.2f}",
            f"{price.equivalent_parameters:,.0f}",
        )
        before = nats
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
