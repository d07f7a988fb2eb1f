"""What is an extra recurrence worth on text? A law of the loss in parameters and recurrences.

    python experiments/studies/law.py                             # 39 runs on the World Factbook: an hour
    python experiments/studies/law.py --prepared data/shakespeare # and 27 on your own prepared text
    python experiments/studies/law.py --quick                     # only shows that everything works

Models with one layer of coda and one of core, at three widths, are trained with 1, 2, 4 and 8 recurrences and read at
that r: at depths drawn around it with gradient through the last four, as usual, and at a fixed r with gradient through
all. Beside them are models whose core has two or four layers of its own and runs once. To the losses a law is fitted,
after arXiv 2604.21106, for drawn and for fixed r:

    loss = c + A (N1 + r^phi N2)^-alpha

N1: parameters of coda and adapter, N2: of the core's layers; c: a constant for every width and length of training,
since embeddings and head grow with the width. At phi = 1 a recurrence is worth as much as new layers, at 0 nothing,
below 0 it harms. That paper, at 116 runs of larger models, found .46, and .38 with a truncated gradient. Intervals come
from fitting again to the law's values with its residuals drawn anew.

Finished runs are kept in RUNS, a run folder each. Hardware: any. Found: docs/studies/law.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize

from experiments.studies.shared.record import Json, publish
from experiments.studies.shared.text import text_data, text_run, trained
from rdlm.config import DataConfig, RecurrenceConfig, RunConfig, require
from rdlm.data.manifest import read_manifest
from rdlm.perf import flops
from rdlm.runtime import parse_arguments, reuse_freed_memory, run_command

WIDTHS, RECURRENCES, LAYERS = (32, 64, 96), (1, 2, 4, 8), (2, 4)
SHORT, LONG = 200, 600
"""Training steps; the short ones on the World Factbook alone."""
SAMPLES = 200
"""Samples of residuals that intervals come from."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Train models of several widths, recurrences and lengths on text; fit a law to their losses."""

    prepared: tuple[Path, ...] = ()
    """Further corpora: folders made by experiments/prepare_data.py, with rows of 128 tokens, or 64 with --quick."""
    runs: Path = Path("runs/law")
    """Folder for run folders."""
    data_folder: Path = Path("data")
    """Folder of the World Factbook."""
    results: Path = Path("experiments/studies/results")
    """Folder for law.json and law.png."""
    quick: bool = False
    """One small model, a few steps, and no law; writes only under RUNS/quick."""


class Cell(NamedTuple):
    """A model and how long it is trained."""

    width: int
    layers: int
    """Of the core."""
    r: int
    steps: int
    fixed: bool = False
    """Trained at r, with gradient through all recurrences, instead of at depths drawn around it."""


def cells(lengths: Sequence[int]) -> list[Cell]:
    """Recurrent models at every length; deeper cores and a fixed r at the last one."""
    looped = [Cell(D, 1, r, steps) for steps, D, r in itertools.product(lengths, WIDTHS, RECURRENCES)]
    deeper = [Cell(D, layers, 1, lengths[-1]) for D, layers in itertools.product(WIDTHS, LAYERS)]
    return looped + deeper + [Cell(D, 1, r, lengths[-1], fixed=True) for D in WIDTHS for r in RECURRENCES[1:]]


def run_config(cell: Cell, data: DataConfig, folder: Path) -> RunConfig:
    """The run of a cell."""
    shape = {
        "embed_dim": cell.width,
        "core_layers": cell.layers,
        "mean_recurrence": cell.r,
        "backprop_depth": cell.r if cell.fixed else min(cell.r, 4),
    }
    name = f"d{cell.width}_layers{cell.layers}_r{cell.r}_steps{cell.steps}" + "_fixed" * cell.fixed
    run = text_run("law", data, folder / name, cell.steps, shape)
    return dataclasses.replace(run, recurrence=RecurrenceConfig(scheme="fixed")) if cell.fixed else run


def row(cell: Cell, data: DataConfig, folder: Path) -> Json:
    """Train a cell, or read its finished run: its numbers and its loss on all held-out rows.

    Raises:
      SystemExit: with the trainer's exit code, if it was stopped.
    """
    run = run_config(cell, data, folder)
    nats = json.loads((trained(run) / "loss_by_depth.json").read_text())[str(cell.r)]
    block = flops.block_parameters(run.model)
    adapter = 2 * cell.width**2
    return {
        **cell._asdict(),
        "once": run.model.coda_layers * block + adapter,
        "core": cell.layers * block,
        "tokens": cell.steps * data.batch_size * data.sequence_length,
        "nats": round(float(nats), 4),
    }


NAMES = ("A", "alpha", "phi")
STARTS = tuple(itertools.product((0.05, 0.3, 1.0), (-1.0, 0.0, 0.5)))
"""alpha and phi that the search starts from; the best end counts."""


def fitted(rows: Sequence[Json]) -> tuple[list[float], np.ndarray]:
    """([A, alpha, phi], what the law says in nats), by least squares. A is per 10,000 parameters.

    For given alpha and phi the law is linear in A and its constants, so only those two are searched for.
    """
    once, core, r, nats = (np.array([x[name] for x in rows], float) for name in ("once", "core", "r", "nats"))
    pairs = [(x["width"], x["tokens"]) for x in rows]
    constants = np.array([[pair == column for column in sorted(set(pairs))] for pair in pairs], float)

    def solved(exponents: np.ndarray) -> tuple[float, np.ndarray]:
        alpha, phi = exponents
        size = ((once + r**phi * core) / 1e4) ** -alpha
        design = np.column_stack([constants, size])
        found = np.linalg.lstsq(design, nats)[0]
        return float(found[-1]), design @ found

    ends = [
        scipy.optimize.least_squares(lambda x: solved(x)[1] - nats, start, bounds=((0.01, -2), (3, 2)), diff_step=1e-4)
        for start in STARTS
    ]
    found = min(ends, key=lambda end: end.cost)
    A, said = solved(found.x)
    return [A, *found.x.tolist()], said


def law_of(rows: Sequence[Json]) -> Json:
    """{name: [value, lower end, upper end of its 95 % interval]}, and the standard deviation of what it leaves.

    The interval is of what is left over, as if it were independent from run to run. It does not know of other seeds.
    """
    law, said = fitted(rows)
    left = np.array([x["nats"] for x in rows]) - said
    free = len(rows) - len({(x["width"], x["tokens"]) for x in rows}) - len(law)
    left *= math.sqrt(len(rows) / free)
    generator = np.random.default_rng(0)
    again = []
    for _ in range(SAMPLES):
        noisy = said + generator.choice(left, size=len(rows))
        again.append(fitted([x | {"nats": nats} for x, nats in zip(rows, noisy, strict=True)])[0])
    ends = np.percentile(again, [2.5, 97.5], axis=0).T
    named = zip(NAMES, law, ends.tolist(), strict=True)
    found = {name: [round(x, 4) for x in (value, *pair)] for name, value, pair in named}
    return found | {"left": round(float(left.std()), 4)}


def laws(rows: Sequence[Json]) -> Json:
    """The law of depths that are drawn, and that of a fixed r; runs of one recurrence belong to both."""
    return {
        "drawn": law_of([x for x in rows if not x["fixed"]]),
        "fixed": law_of([x for x in rows if x["steps"] == LONG and (x["fixed"] or x["r"] == 1)]),
    }


def table(rows: Sequence[Json]) -> str:
    """A row for every width and length: the loss of every model."""
    at = {Cell(*(x[name] for name in Cell._fields)): x["nats"] for x in rows}
    kinds = sorted({(c.layers, c.fixed, c.r) for c in at})
    heads = [f"{layers} layers" if layers > 1 else f"{'fixed ' * fixed}r = {r}" for layers, fixed, r in kinds]
    lines = ["| width | steps | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for D, steps in sorted({(c.width, c.steps) for c in at}):
        keys = [Cell(D, layers, r, steps, fixed) for layers, fixed, r in kinds]
        lines.append(f"| {D} | {steps} | " + " | ".join(f"{at[key]:.3f}" if key in at else "" for key in keys) + " |")
    return "\n".join(lines)


def picture(path: Path, corpora: Json) -> None:
    """Loss after the longer training against the layers a token passes in the core: recurrences, and new layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(corpora) + 1.5, 4.2), layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73")
    for axes, (name, found) in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora.items(), strict=True):
        longest = max(x["steps"] for x in found["rows"])
        for colour, D in zip(colours, sorted({x["width"] for x in found["rows"]}), strict=False):
            here = [x for x in found["rows"] if x["width"] == D and x["steps"] == longest]
            lines = {
                ("o-", "r, drawn"): [x for x in here if x["layers"] == 1 and not x["fixed"]],
                ("^:", "r, fixed"): [x for x in here if x["layers"] == 1 and (x["fixed"] or x["r"] == 1)],
                ("s--", "layers"): [x for x in here if x["r"] == 1],
            }
            for (style, label), points in lines.items():
                xs, ys = [x["r"] * x["layers"] for x in points], [x["nats"] for x in points]
                axes.plot(xs, ys, style, color=colour, label=f"D = {D}, {label}")
        axes.set(title=name, xlabel="recurrences r, or layers of the core", ylabel="loss, nats per token", xscale="log")
        axes.set_xticks(RECURRENCES, map(str, RECURRENCES))
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def corpora(args: Args) -> list[tuple[str, DataConfig, tuple[int, ...]]]:
    """(name, data, training lengths) of every corpus. Raises InputError: see `Args.prepared`."""
    common = text_data(args.data_folder, args.quick)
    found: list[tuple[str, DataConfig, tuple[int, ...]]] = [("factbook", common, (SHORT, LONG))]
    for folder in args.prepared:
        manifest = read_manifest(folder)
        length = manifest.identity()["sequence_length"]
        require(
            length == common.sequence_length, f"{folder}: sequence_length", length, f"must be {common.sequence_length}"
        )
        data = dataclasses.replace(common, prepared=(str(folder),), tokenizer_size=manifest.vocab_size)
        found.append((folder.name, data, (LONG,)))
    names = [name for name, *_ in found]
    require(len(set(names)) == len(names), "--prepared", names, "must be folders of different names")
    return found


def main() -> int:
    args = parse_arguments(Args, prog="law.py", description=__doc__)
    reuse_freed_memory()
    runs, results = (args.runs / "quick", args.runs / "quick") if args.quick else (args.runs, args.results)
    found: Json = {}
    for name, data, lengths in corpora(args):
        grid = [Cell(16, 1, 2, 4)] if args.quick else cells(lengths)
        rows = [row(cell, data, runs / name) for cell in grid]
        found[name] = {"rows": rows} | ({} if args.quick else {"laws": laws(rows)})
        print(f"{name}\n{table(rows)}")
        for way, law in found[name].get("laws", {}).items():
            print(f"{way}: {law}")
    units = {
        "nats": "per token, on all held-out rows, at the mean recurrence of training",
        "once, core": "parameters",
        "laws": "value, ends of its 95 % interval; A per 1e4 parameters; left: standard deviation in nats",
    }
    publish(results / "law.json", {"corpora": found}, units, functools.partial(picture, corpora=found))
    return 0


if __name__ == "__main__":
    run_command(main)
