"""Follow the latent states of a text: paths, limits, initial states, contraction, and a logit lens.

    python experiments/trajectories.py runs/quickstart                       # the first row of the validation text
    python experiments/trajectories.py runs/quickstart --prompt "Geography of the sea"
    python experiments/trajectories.py runs/s3 --size 32                     # a word of 32 letters

Captures the states of one text for 128 recurrences from several initial states and writes to RUN/analysis/trajectories/

    paths          every token's path in its own principal components; fixed point, orbit, drift or unsettled
    distance       distance of every token to its limit (the deepest state), by recurrence
    heatmap        the same over the text: which tokens take long
    independence   do different initial states lead to the same limit?
    contraction    largest singular value and spectral radius of a recurrence; observed rate of every token
    lens           the prediction after each recurrence

as JSON (with a CSV of all tokens, tokens.csv) and, if matplotlib is installed, PNG. The kinds of paths are defined in
rdlm/analysis/paths.py. Exit codes: 0 done, 2 wrong input. Hardware: any; two CPU cores take about a minute.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text as Cell

from rdlm.config import InputError, ModelConfig, require
from rdlm.runtime import Progress, parse_arguments, run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdlm.evaluation.held_out import HeldOut
    from rdlm.model import Params
    from rdlm.report.results import Json
    from rdlm.run import Run

LENS_ROWS, LENS_SHOWN = 40, 10  # tokens in the picture of the lens, and in the printed table
PANELS = 12  # paths in the figure


@dataclasses.dataclass(frozen=True)
class Args:
    """Follow the latent states of one text through the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py, depth_scaling.py or convert_huggingface.py."""
    prompt: str | None = None
    """Text to follow. None: a row of the validation text, or an instance of the run's task."""
    row: int = 0
    """Index of the row or instance."""
    tokens: int = 96
    """Maximum number of tokens, from the beginning (a prompt is never cut)."""
    recurrences: int = 128
    """Depth R of the capture; the state there counts as the limit. At least 16."""
    starts: int = 5
    """Number of initial states: all but one are noise, and one is zero."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Recurrences of the lens and of the contraction."""
    size: int | None = None
    """Size of a task's instance: letters, operators, hops, distance. None: that of training."""
    step: int | None = None
    """Checkpoint. None: the newest."""
    prepared: tuple[str, ...] = ()
    """Where the run's prepared data lie now, if they have moved; they are compared with what it was trained on."""


class Text(NamedTuple):
    """The text: ids and labels int [L], pieces(ids) -> names of tokens, a description, and the meaning of a label."""

    ids: np.ndarray
    labels: np.ndarray
    pieces: Callable[[np.ndarray], list[str]]
    what: str
    label: str

    @property
    def names(self) -> list[str]:
        """A name for every token."""
        return self.pieces(self.ids)


def main() -> int:
    args = parse_arguments(Args, prog="trajectories.py", description=__doc__)
    require(args.recurrences >= 16, "--recurrences", args.recurrences, "must be at least 16 to tell how a path ends")
    require(args.starts >= 2, "--starts", args.starts, "must be at least 2 to compare")
    require(args.tokens >= 2, "--tokens", args.tokens, "must be at least 2")
    require(args.row >= 0, "--row", args.row, "must not be negative")
    require(args.size is None or args.size >= 1, "--size", args.size, "must be at least 1")
    right = bool(args.depths) and min(args.depths) >= 1 and max(args.depths) <= args.recurrences
    require(right, "--depths", args.depths, f"must be recurrences from 1 to --recurrences ({args.recurrences})")
    from rdlm.evaluation.held_out import held_out  # JAX takes seconds to import
    from rdlm.run import find

    run = find(args.run_dir, args.step)
    if args.prompt is not None:
        text = prompted(args, run)
    else:
        text = chosen(args, held_out(args.run_dir, args.step, args.size, args.prepared))
    params, config = run.params, run.config
    if len(text.ids) > config.max_length:
        what = "--prompt" if args.prompt is not None else f"--size {args.size}"
        raise InputError(f"{what}: {len(text.ids)} tokens, the model takes at most {config.max_length}; shorten it")
    out = Writer(args, run.step, text)
    analyse(args, params, config, text, out)
    return 0


def prompted(args: Args, run: Run) -> Text:
    """The user's text, whose labels are its own next tokens. Needs the tokenizer alone."""
    from rdlm.evaluation.held_out import pieces

    if run.run_config is not None and run.run_config.data.task:
        raise InputError("--prompt: this run was trained on a task and reads no text; choose an instance with --row")
    for flag, given in (("--size", args.size), ("--row", args.row), ("--prepared", args.prepared)):
        require(not given, flag, given, "chooses held-out data, and --prompt is the text; leave one of them out")
    tokenizer = run.require_tokenizer()
    ids = tokenizer.encode(args.prompt or "")
    if len(ids) < 2:
        raise InputError("--prompt: has fewer than two tokens; give at least a word")
    labels, name = np.append(ids[1:], -100), functools.partial(pieces, tokenizer)
    return Text(ids, labels, name, f"prompt of {len(ids)} tokens", "the text's next token")


def chosen(args: Args, data: HeldOut) -> Text:
    """A row of the validation text, or an instance of the task, without padding."""
    i, batch = args.row, None
    for batch in data.batches(None):
        if i < len(batch["tokens"]):
            break
        i -= len(batch["tokens"])
    else:
        raise InputError(f"--row {args.row}: there are {args.row - i} rows, counted from 0")
    assert batch is not None
    inside = batch["segment_ids"][i] == batch["segment_ids"][i][0]  # the first document of the row
    ids, labels = (batch[name][i][inside][: args.tokens] for name in ("tokens", "labels"))
    what = f"{data.what.removeprefix('new instances of ')}, row {args.row}"
    return Text(ids, labels, data.pieces, what, "the right answer" if data.is_task else "the text's next token")


class Writer:
    """Writes the files of the analyses, and shows progress."""

    def __init__(self, args: Args, step: int, text: Text) -> None:
        """Write nothing yet."""
        from rdlm.report import can_draw

        self.folder = args.run_dir / "analysis" / "trajectories"
        self.title = f"{args.run_dir.resolve().name}, step {step}: {text.what}"
        self.common = {
            "run": str(args.run_dir),
            "step": step,
            "text": text.what,
            "tokens": text.names,
            "recurrences": args.recurrences,
        }
        self.draws = can_draw()
        self.progress, self.done = Progress(6), 0

    def start(self, what: str) -> None:
        """Show which analysis starts."""
        self.progress.update(self.done, what)
        self.done += 1

    def write(self, name: str, found: Json, units: dict[str, str], draw: Callable[..., Path], heading: str) -> None:
        """Write NAME.json, and NAME.png by draw(path, title)."""
        from rdlm.report import write_result

        write_result(self.folder / f"{name}.json", self.common | found, units)
        if self.draws:
            draw(self.folder / f"{name}.png", f"{heading}\n{self.title}")


def analyse(args: Args, params: Params, config: ModelConfig, text: Text, out: Writer) -> None:
    """All six analyses of one text."""
    from rdlm.analysis import from_starts

    out.start(f"{args.recurrences} recurrences of {len(text.ids)} tokens from {args.starts} initial states")
    states = from_starts(params, config, text.ids, args.recurrences, args.starts)
    if not np.isfinite(states).all():
        raise InputError(f"{args.run_dir}: the state is not finite within {args.recurrences} recurrences: it diverges")
    own = states[:, 0]
    lines = [paths(text, own, out)]
    lines.append(distance(text, own, out))
    out.start("starts")
    lines.append(independence(states, out))
    out.start("contraction")
    lines.append(contract(args, params, config, text, own, out))
    out.start("logit lens")
    show_lens(args, params, config, text, out)
    out.progress.update(6, "done", last=True)
    print(f"{out.title}\n" + "\n".join(lines))
    files = "JSON, CSV and PNG" if out.draws else "JSON and CSV (no pictures: pip install 'rdlm[plots]')"
    print(f"{files} in {out.folder}")


def paths(text: Text, states: np.ndarray, out: Writer) -> str:
    """Kinds of paths and principal components; also the table of all tokens."""
    from rdlm.analysis import KINDS, SETTLED, classify, distances, pca, settled_after
    from rdlm.report import plot_paths, write_table

    out.start("paths")
    settled = settled_after(distances(states))
    rows: list[Json] = []
    panels: list[Json] = []
    for i, name in enumerate(text.names):
        found = classify(states[:, i])
        coordinates, explained = pca(states[1:, i])
        share = dict(zip(("explained_1", "explained_2", "explained_3"), explained.tolist(), strict=False))
        rows.append({"position": i, "token": name} | found._asdict() | {"settled_after": int(settled[i])} | share)
        note = f", period {found.period:.1f}" if found.kind == "orbit" else f", settled after {settled[i]}"
        panels.append(
            {
                "token": name,
                "position": i,
                "kind": found.kind,
                "note": note if found.kind != "drift" else "",
                "coordinates": coordinates,
                "explained": explained,
            }
        )
    counts = collections.Counter(row["kind"] for row in rows)
    # Of every kind, from quick to slow.
    by_kind = [sorted((p for p in panels if p["kind"] == k), key=lambda p: settled[p["position"]]) for k in KINDS]
    by_kind = [kind for kind in by_kind if kind]
    each = PANELS // len(by_kind)
    some = [kind[round(i)] for kind in by_kind for i in np.linspace(0, len(kind) - 1, min(each, len(kind)))]
    out.write(
        "paths",
        {
            "counts": {kind: counts[kind] for kind in KINDS},
            "settled_within": SETTLED,
            "rows": rows,
            "coordinates": [p["coordinates"] for p in panels],
        },
        {
            "spread": "share of the state's length",
            "shrink": "ratio of mean steps, last quarter over the one before",
            "straight": "share of the tail's variance",
            "returns": "squared distance over twice the variance",
            "period": "recurrences",
            "rate": "factor per recurrence",
            "settled_after": "recurrences",
            "explained_1": "share of the path's variance",
            "coordinates": "units of the state; [token][r - 1][component], r from 1",
        },
        lambda path, title: plot_paths(path, title, some),
        "Paths of tokens through latent space",
    )
    write_table(out.folder / "tokens.csv", rows)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    return (
        f"  paths         {kinds}; settled within {SETTLED:.0%} after {np.median(settled):g} recurrences "
        f"(median; slowest {settled.max()}: {text.names[int(settled.argmax())]!r} at {int(settled.argmax())})"
    )


def distance(text: Text, states: np.ndarray, out: Writer) -> str:
    """Distance to the limit, as lines and over the text."""
    from rdlm.analysis import SETTLED, distances, settled_after
    from rdlm.report import plot_distance, plot_heatmap

    out.start("distances")
    # The first half only: near its end every path is close to its end point.
    found = distances(states)[: len(states) // 2 + 1]
    units = {"distance": "share of the limit's length; [r][token], r from 0"}
    draw = lambda path, title: plot_distance(path, title, found, text.names, SETTLED)  # noqa: E731
    out.write("distance", {"distance": found}, units, draw, "Distance to the limit")
    # Until the slowest token has settled to a hundredth of the threshold, or to the end.
    shown = min(max(int(np.max(settled_after(found, SETTLED / 100))), 8), len(found) - 1)
    part = found[1 : shown + 1]
    units = {"log10_distance": "log10 of the share of the limit's length; [r - 1][token], r from 1"}
    values = {"log10_distance": np.log10(np.maximum(part, 1e-12))}
    draw = lambda path, title: plot_heatmap(path, title, part, text.names)  # noqa: E731
    out.write("heatmap", values, units, draw, "Convergence over the text")
    middle = np.median(found, axis=1)
    return "  distance      median " + ", ".join(
        f"{middle[r]:.1e} at r = {r}" for r in (1, 2, 4, 8, 16, 32) if r < len(found)
    )


def independence(states: np.ndarray, out: Writer) -> str:
    """Different initial states."""
    from rdlm.analysis import SETTLED, spread
    from rdlm.report import plot_independence

    found = spread(states)
    same = int((found[-1] < SETTLED).sum())
    out.write(
        "independence",
        {"starts": states.shape[1], "spread": found, "same_limit": same, "same_within": SETTLED},
        {"spread": "share of the starts' distance; [r][token], r from 0", "same_limit": "tokens"},
        lambda path, title: plot_independence(path, title, found),
        "Do different initial states lead to the same limit?",
    )
    return (
        f"  independence  {same} of {found.shape[1]} tokens reach the same limit from {states.shape[1]} initial states "
        f"(remaining share of their distance: median {np.median(found[-1]):.1e}, at most {found[-1].max():.1e})"
    )


def contract(args: Args, params: Params, config: ModelConfig, text: Text, states: np.ndarray, out: Writer) -> str:
    """Singular values and eigenvalues of a recurrence along the path."""
    from rdlm.analysis import contraction, distances, rate
    from rdlm.report import plot_contraction

    depths = sorted({*args.depths, args.recurrences})
    rows = []
    for r in depths:
        found = contraction(params, config, text.ids[None], states[r][None])
        rows.append({"r": r} | {name: value[0] for name, value in found._asdict().items()})
    far = distances(states)
    rates = [rate(far[:, i]) for i in range(len(text.ids))]
    norm, radius = ([row[name] for row in rows] for name in ("norm", "radius"))
    out.write(
        "contraction",
        {"rows": rows, "observed_rate": rates},
        {
            "norm": "largest singular value of ds_{i+1}/ds_i over all tokens",
            "radius": "its largest |eigenvalue|",
            "period": "recurrences per turn of that eigenvalue; null: it does not turn",
            "residual": "||J v - lambda v|| of a unit vector",
            "observed_rate": "factor per recurrence, per token",
        },
        lambda path, title: plot_contraction(path, title, depths, norm, radius, rates),
        "What a recurrence does to small differences",
    )
    known = [x for x in rates if x is not None]
    observed = f"; observed per token {np.median(known):.2f} (median of {len(known)})" if known else ""
    at = f"spectral radius {radius[-1]:.3f}, largest singular value {norm[-1]:.2f}"
    return f"  contraction   at the limit: {at}{observed}"


def show_lens(args: Args, params: Params, config: ModelConfig, text: Text, out: Writer) -> None:
    """The logit lens, as files and, for the first tokens, as a table."""
    from rdlm.analysis import lens
    from rdlm.report import plot_lens

    depths = tuple(sorted(set(args.depths)))
    found = lens(params, config, text.ids[None], text.labels[None], depths)
    known = np.unique(np.concatenate([found.top.ravel(), text.labels[text.labels >= 0]]))
    names = dict(zip(known.tolist(), text.pieces(known), strict=True))
    rows = []
    for i, token in enumerate(text.names):
        label = int(text.labels[i])
        top = found.top[:, 0, i]
        rows.append(
            {
                "position": i,
                "token": token,
                "label": names.get(label),
                "top": [names[t] for t in top[:, 0].tolist()],
                "probability": found.probability[:, 0, i, 0],
                "hit": [t == label for t in top[:, 0].tolist()],
                "others": [[names[t] for t in row] for row in top[:, 1:].tolist()],
                "others_probability": found.probability[:, 0, i, 1:],
                "nats": found.nats[:, 0, i] if label >= 0 else None,
                "divergence": found.divergence[:, 0, i],
            }
        )
    out.write(
        "lens",
        {"depths": depths, "rows": rows},
        {
            "top": "likeliest next token at each depth",
            "probability": "its share",
            "nats": "nats, of the label",
            "divergence": "KL(deepest || this depth), nats",
            "hit": f"whether the likeliest is {text.label}",
        },
        lambda path, title: plot_lens(path, title, rows[:LENS_ROWS], depths, text.label),
        "Logit lens: the likeliest next token after r recurrences",
    )
    show(rows[:LENS_SHOWN], depths, text.label)


def show(rows: list[Json], depths: tuple[int, ...], label: str) -> None:
    """Print the lens of some tokens."""
    from rdlm.report import shown

    table = Table(
        title="Likeliest next token after r recurrences, and its probability in %",
        caption=f"bold: {label}; all tokens in lens.json",
    )
    table.add_column("token", no_wrap=True)
    for r in depths:
        table.add_column(f"r = {r}", no_wrap=True)
    for row in rows:
        cells = zip(row["top"], row["probability"], row["hit"], strict=True)
        table.add_row(
            Cell(shown(row["token"])),
            *(Cell(f"{shown(top, 6)} {100 * p:.0f}", "bold" if hit else "") for top, p, hit in cells),
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)
