"""What does it take to decode several tokens at once? The parallel sampler against ordinary, adaptive and speculative.

    python experiments/studies/parallel.py runs/quickstart
    python experiments/studies/parallel.py runs/s3_local --new-tokens 32
    python experiments/studies/parallel.py models/smollm2-retrofit --texts prompts.txt --depth 8
    python experiments/studies/parallel.py runs/quickstart --quick  # only shows that everything works, two minutes

Greedy continuations of held-out prompts. Everything is varied by itself around window 16, inner 2, threshold 0.03, and
inner with threshold. Of every way to decode:
passes: recurrences in sequence per token behind the first, mean over prompts; they do not depend on the machine.
forward: recurrences of single positions per token, guesses included; coda and head, once per outer step, are not in it.
agreement: the share of tokens that ordinary decoding at full depth takes after the same tokens (teacher-forced).
speed: tokens per second against ordinary decoding, of one prompt at a time; of each the fastest of some turns, in which
all ways alternate.

Hardware: any. Everything on the quickstart model takes some ten processor minutes, most of it compilation.
Found: 2.1 passes instead of 16 with inner 2 on the quickstart model, all tokens equal; numbers and limits:
docs/studies/parallel.md.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.studies.shared.record import Json, publish
from rdlm import exits
from rdlm.config import CachePolicy, InputError, Parallel, Speculative, require
from rdlm.decode import Generation, generate
from rdlm.model import forward
from rdlm.run import Run, load
from rdlm.runtime import parse_arguments, run_command
from rdlm.tasks import named
from rdlm.tasks.instance import TEST_STREAM, batch

TIMED = 4  # prompts in a turn of timing
CENTRE = Parallel(window=16, inner=2, threshold=0.03)
THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.3)


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue held-out prompts in every way, and count."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder or Hugging Face folder."""
    texts: Path | None = None
    """File of prompts, one a line; None: the first tokens of the run's validation rows, or of its task's instances."""
    prompts: int = 32
    """Number of prompts."""
    prompt_tokens: int = 32
    """Tokens of each prompt from validation rows."""
    new_tokens: int = 64
    """Tokens to make."""
    depth: int = 16
    """Recurrences per token of ordinary decoding."""
    turns: int = 3
    """Turns of timing; 0: only count."""
    results: Path = Path("experiments/studies/results")
    """Folder for parallel_RUN.json and parallel_RUN.png."""
    quick: bool = False
    """Two prompts, a few tokens and ways; writes to runs/quick."""


def ways(quick: bool) -> dict[str, Json]:
    """Options of `generate` for every way to decode, by its name."""
    found: dict[str, Json] = {"ordinary": {}, "ordinary, one kept recurrence": {"cache": CachePolicy(recurrences=1)}}
    found |= {f"latent_diff {t:g}": {"exit_rule": exits.latent_diff(t)} for t in (0.01, 0.03, 0.1)}
    found |= {f"kl {t:g}": {"exit_rule": exits.kl(t)} for t in (5e-4, 5e-3)}
    found |= {f"speculative {k}, {n}": {"speculative": Speculative(k, n)} for k, n in ((2, 8), (4, 8))}
    varied: list[dict[str, Any]] = [{"inner": i, "threshold": t} for i in (2, 1, 4, 8) for t in THRESHOLDS]
    varied += [{"window": w} for w in (4, 8, 32)] + [{"headway": 2}, {"noise": 0.1}, {"noise": 0.5}, {"ema": 0.1}]
    varied += [{"rule": "argmax_stability", "threshold": n} for n in (1, 2, 3)] + [{"freeze": "last"}]
    for change in varied[:2] if quick else varied:
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        found[f"parallel: {name}"] = {"parallel": dataclasses.replace(CENTRE, **change)}
    return found


def prompts_of(run: Run, args: Args) -> list[np.ndarray]:
    """Token ids to continue.

    Raises:
      InputError: no file, or too few prompts in it.
    """
    count = 2 if args.quick else args.prompts
    rows: list[np.ndarray] = []
    data = run.require_config().data if args.texts is None else None
    if data is not None and data.task:
        task = named(data.task, data.task_size)
        rows = list(batch(task, seed=TEST_STREAM, index=0, size=count)["tokens"][:, : args.prompt_tokens])
    elif args.texts is None:
        for found in run.validation().batches(None):
            alone = (found["segment_ids"][:, : args.prompt_tokens] == found["segment_ids"][:, :1]).all(1)
            rows += list(np.asarray(found["tokens"])[alone, : args.prompt_tokens])
            if len(rows) >= count:
                break
    else:
        require(args.texts.is_file(), "--texts", str(args.texts), "is not there; name a file of prompts, one a line")
        tokenizer = run.require_tokenizer()
        rows = [tokenizer.encode(line) for line in args.texts.read_text().splitlines() if line.strip()]
    if len(rows) < count:
        raise InputError(f"--prompts {count}: there are only {len(rows)}; ask for fewer")
    return rows[:count]


class Continued:
    """One folder's prompts, continued in any way."""

    def __init__(self, run: Run, prompts: Sequence[np.ndarray], args: Args):
        """`args`: tokens to make, depth."""
        self.run, self.prompts, self.depth = run, prompts, args.depth
        self.new_tokens = 8 if args.quick else args.new_tokens
        self.teacher = jax.jit(lambda tokens: forward(run.params, run.config, tokens, args.depth).logits.argmax(-1))

    def generate(self, prompts: Sequence[np.ndarray], options: Json) -> Generation:
        """Greedy continuations; the initial states are those of the teacher."""
        given = {"num_steps": self.depth, "max_new_tokens": self.new_tokens, **options}
        return generate(self.run.params, self.run.config, prompts, **given)

    def agreement(self, tokens: Sequence[np.ndarray]) -> float:
        """The share of tokens, behind the first, that ordinary decoding takes after the same tokens."""
        same = []
        for prompt, new in zip(self.prompts, tokens, strict=True):
            row = np.concatenate([prompt, new])
            padded = np.zeros(self.run.config.max_length if len(row) > 1024 else -(-len(row) // 64) * 64, np.int32)
            padded[: len(row)] = row
            best = np.asarray(self.teacher(padded[None]))[0]
            same.append(best[len(prompt) : len(row) - 1] == new[1:])
        return float(np.concatenate(same).mean())

    def counted(self, options: Json, ordinary: Sequence[np.ndarray]) -> Json:
        """Counters and agreement of a way; `ordinary`: the tokens of ordinary decoding."""
        if "speculative" in options:  # its passes are counted for the whole batch
            each = [self.generate([prompt], options) for prompt in self.prompts]
            tokens = [out.tokens[0] for out in each]
            passes = [(o.core_passes - self.depth) / (len(t) - 1) for o, t in zip(each, tokens, strict=True)]
            forwarded = [float("nan")]
        else:
            out = self.generate(self.prompts, options)
            tokens, spent = out.tokens, out.parallel
            if spent is None:
                passes = forwarded = [steps[1:].mean() for steps in out.steps]
            else:
                n, inner = [len(t) - 1 for t in tokens], options["parallel"].inner
                passes = list(inner * spent.outer_steps / n)
                forwarded = list(spent.tokens_forward / n)
        free = np.concatenate([a[: len(b)] == b[: len(a)] for a, b in zip(tokens, ordinary, strict=True)])
        return {
            "passes": round(float(np.mean(passes)), 3),
            "forward": round(float(np.mean(forwarded)), 3),
            "agreement": round(self.agreement(tokens), 4),
            "free_running": round(float(free.mean()), 4),
        }

    def rates(self, options: dict[str, Json], turns: int) -> dict[str, float]:
        """Tokens per second of every way."""
        best: dict[str, float] = {}
        for turn in range(turns + 1):  # the first compiles
            for name, way in options.items():
                start = time.perf_counter()
                made = sum(len(self.generate([prompt], way).tokens[0]) for prompt in self.prompts[:TIMED])
                rate = made / (time.perf_counter() - start)
                if turn:
                    best[name] = max(best.get(name, 0.0), rate)
        return best


def picture(path: Path, rows: dict[str, Json], depth: int) -> None:
    """Agreement against recurrences in sequence per token; the parallel sampler by `inner`."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()

    def line(names: Sequence[str], label: str, **style: Any) -> None:
        points = sorted((rows[n]["passes"], rows[n]["agreement"]) for n in names)
        axes.plot(*zip(*points, strict=True), label=label, **{"markersize": 6, **style})

    for inner, colour in zip((1, 2, 4, 8), ("#D55E00", "#E69F00", "#009E73", "#56B4E9"), strict=True):
        names = [n for n in rows if n.startswith(f"parallel: inner {inner},")]
        if names:
            line(names, f"window of 16, inner {inner}, thresholds 0 to 0.3", color=colour, marker="o")
    for start, label, colour, marker in (
        ("latent_diff", "adaptive: latent_diff", "#0072B2", "s"),
        ("kl", "adaptive: kl", "#999999", "s"),
        ("speculative", "speculative", "#CC79A7", "^"),
    ):
        line([n for n in rows if n.startswith(start)], label, color=colour, marker=marker)
    line(["ordinary"], f"ordinary, r = {depth}", color="#000000", marker="*", linestyle="", markersize=12)
    axes.axvline(depth / 3, color="#000000", linewidth=0.7, linestyle=":")
    axes.set(xlabel="recurrences in sequence per token", ylabel="tokens equal, teacher-forced", xlim=(0, depth + 1))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)


def show(rows: dict[str, Json]) -> str:
    """The table for the terminal."""
    lines = [f"{'':46} passes  forward  agreement  free-running  speed"]
    for name, row in rows.items():
        numbers = row["passes"], row["forward"], row["agreement"], row["free_running"], row.get("speed", float("nan"))
        lines.append(
            f"{name:46} {numbers[0]:6.2f} {numbers[1]:8.1f} {numbers[2]:10.4f} {numbers[3]:13.4f} {numbers[4]:6.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    args = parse_arguments(Args, prog="parallel.py", description=__doc__)
    for name in ("prompts", "prompt_tokens", "new_tokens", "depth"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", getattr(args, name), "must be at least 1")
    require(args.new_tokens > 1, "--new-tokens", args.new_tokens, "must be at least 2: the first comes from the prompt")
    require(args.depth >= 8, "--depth", args.depth, "must be at least 8, the largest inner")
    require(args.turns >= 0, "--turns", args.turns, "must not be negative")
    run = load(args.folder)
    work, options = Continued(run, prompts_of(run, args), args), ways(args.quick)
    ordinary = work.generate(work.prompts, {}).tokens
    rows: dict[str, Json] = {}
    for name, way in options.items():
        try:
            rows[name] = work.counted(way, ordinary)
        except InputError as given_up:  # freeze = "last" can stand still for ever
            print(f"{name}: left out: {given_up}", flush=True)
        else:
            print(name, rows[name], flush=True)
    timed = ["ordinary", "latent_diff 0.03", "speculative 2, 8", *(n for n in options if n.endswith("threshold 0.03"))]
    timed = [name for name in timed if name in rows and args.turns]
    rates = work.rates({n: options[n] for n in timed}, 1 if args.quick else args.turns)
    for name, rate in rates.items():
        rows[name]["speed"] = round(rate / rates["ordinary"], 3)
    print(show(rows))
    folder = Path("runs/quick") if args.quick else args.results
    units = {
        "passes": "recurrences in sequence per token behind the first, mean over prompts",
        "forward": "recurrences of single positions per such token",
        "agreement": "share of tokens that ordinary decoding takes after the same tokens",
        "free_running": "share of tokens equal to those of ordinary decoding, place by place",
        "speed": "tokens per second against ordinary decoding, one prompt at a time, the fastest turn of each",
    }
    about = {"folder": str(args.folder), "step": run.step, "depth": args.depth, "prompts": len(work.prompts)}
    about |= {"new_tokens": work.new_tokens, "centre": dataclasses.asdict(CENTRE), "ways": rows}
    publish(
        folder / f"parallel_{args.folder.resolve().name}.json",
        about,
        units,
        functools.partial(picture, rows=rows, depth=args.depth),
    )
    return 0


if __name__ == "__main__":
    run_command(main)
