"""Everything that is known of a checkpoint on one HTML page: self-contained, and readable on a phone.

    python experiments/report.py runs/quickstart
    python experiments/report.py runs/quickstart --out ~/quickstart.html

Gathers what the other commands have left in the run folder: config.json, metrics.jsonl, loss_by_depth.json,
calibrated_exits.json, and the JSON and PNG files of analysis/. Computes nothing; where something is missing the page
says which command makes it. The page needs no network, no scripts and no other file. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from rdlm.config import InputError
from rdlm.runtime import parse_arguments, run_command, write_output


@dataclasses.dataclass(frozen=True)
class Args:
    """Write the page of the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py, depth_scaling.py or convert_huggingface.py."""
    out: Path | None = None
    """File to write. None: RUN_DIR/report.html."""


def main() -> int:
    args = parse_arguments(Args, prog="report.py", description=__doc__)
    from rdlm.report.page import html_page  # JAX takes seconds to import

    on_the_run = ("evaluate", "depth_sweep", "calibrate_exits", "trajectories", "questions")
    commands = {name: f"python experiments/{name}.py {args.run_dir}" for name in on_the_run} | {
        "train": "python experiments/train.py PRESET",
        "lm_eval": f"python experiments/lm_eval.py {args.run_dir} --preset paper",
    }
    page = html_page(args.run_dir, commands)
    path = args.run_dir / "report.html" if args.out is None else args.out
    if path.is_file() and not path.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise InputError(f"{path}: exists and is not a page; choose another --out")
    print(f"page: {write_output(path, page)} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_command(main)
