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
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rdlm.config import RunConfig
from rdlm.runtime import parse_arguments, run_command, write_output

if TYPE_CHECKING:
    from rdlm.report.page import Html


@dataclasses.dataclass(frozen=True)
class Args:
    """Write the page of the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py, depth_scaling.py or convert_huggingface.py."""
    out: Path | None = None
    """File to write. None: RUN_DIR/report.html."""


def main() -> int:
    args = parse_arguments(Args, prog="report.py", description=__doc__)
    from rdlm.checkpoint import read_config, read_meta, saved_steps  # JAX takes seconds to import
    from rdlm.report.page import document

    run, meta = read_config(args.run_dir), read_meta(args.run_dir)
    found = sections(args.run_dir, run, saved_steps(args.run_dir)[-1], meta)
    page = document(f"{args.run_dir.resolve().name}: report", found)
    path = args.run_dir / "report.html" if args.out is None else args.out.expanduser()
    print(f"page: {write_output(path, page)} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def sections(folder: Path, run: RunConfig, step: int, meta: dict[str, Any]) -> list[tuple[str, str, Html]]:
    """(id, heading, content) of every section."""
    from rdlm.evaluation.held_out import PRESET
    from rdlm.report import page

    analysis, task = folder / "analysis", run.preset.startswith(PRESET)
    return [
        ("model", "Model", headline(run, step, meta)),
        ("training", "Training", page.training(folder)),
        ("depth", "Loss by depth", page.loss_by_depth(folder, task)),
        ("sweep", "Depth and exits", page.sweep(folder, step)),
        ("exits", "Calibrated exits", page.calibrated(folder, step)),
        ("trajectories", "Latent trajectories", page.trajectories(folder, step)),
        ("benchmarks", "Benchmarks", page.benchmarks(folder, step, task)),
        ("files", "Files", others(folder, analysis)),
    ]


def headline(run: RunConfig, step: int, meta: dict[str, Any]) -> Html:
    """What kind of model this is, and how far it has come."""
    from rdlm.perf import flops
    from rdlm.report.page import Html, facts, tag

    m, data = run.model, run.data
    known = {
        "parameters": flops.parameters(m),
        f"unrolled, r = {m.mean_recurrence}": flops.materialised_parameters(m, m.mean_recurrence),
        "layers": f"{m.prelude_layers} / {m.core_layers} / {m.coda_layers}",
        "width, heads": f"{m.embed_dim}, {m.num_heads} x {m.head_dim}",
        "vocabulary": m.vocab_size,
        "mean r, with gradient": f"{m.mean_recurrence}, {m.backprop_depth}",
        "checkpoint": f"step {step:,}",
    }
    if "source" in meta:
        what = f"Converted from {meta['source']}."
    else:
        known |= {
            "of steps": run.steps, "tokens seen": step * data.batch_size * data.sequence_length,
            "batch": f"{data.batch_size} x {data.sequence_length}", "preset": run.preset or "none", "seed": run.seed,
        }  # fmt: skip
        what = f"Trained on {', '.join([*data.prepared, *data.stream]) or data.source}."
        if run.preset.startswith("depth_scaling_"):
            what = f"Trained on instances of the task {run.preset.removeprefix('depth_scaling_')}."
    shape = " Layers are those of prelude, core and coda; the core runs r times with the same weights."
    return Html(tag("p", what, shape) + facts(known))


def others(folder: Path, analysis: Path) -> Html:
    """Pictures that belong to no section, and what the page was made of."""
    from rdlm.report.page import Html, details, picture, table, tag

    known = ("depth_sweep", "questions", "lm_eval")
    extra = [p for p in sorted(analysis.glob("*.png")) if not p.name.startswith(known)]
    parts = [Html(tag("h3", p.stem.replace("_", " ")) + picture(p, p.stem.replace("_", " "))) for p in extra]
    names = ["config.json", "metrics.jsonl", "loss_by_depth.json", "calibrated_exits.json"]
    paths = [folder / name for name in names] + sorted(p for p in analysis.rglob("*") if p.is_file())
    rows = [[str(p.relative_to(folder)), p.stat().st_size] for p in paths if p.is_file()]
    listed = table(["file", "bytes"], rows, f"In the run folder {folder}")
    return Html("".join(parts) + details(f"{len(rows)} files behind this page", listed))


if __name__ == "__main__":
    run_command(main)
