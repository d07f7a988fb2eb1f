"""Measure how fast data are prepared and read, and in how much memory.

    python experiments/bench/data.py --megabytes 2000 --folder /tmp/bench        # 2 GB: some minutes

Makes a synthetic corpus (one large JSON-lines file of word salad with the statistics of a small vocabulary), trains a
tokenizer on a piece of it, prepares it, and reads it back. Prints, with the load of the machine beside them:
preparation in tokens per second and core, BPE included, with the peak resident memory of any process; reading in
tokens per second and core, batch assembly included, by processor time and by the clock; and the share of time that a
consumer of 1M tokens per second spends waiting in `next()`. Measured on two shared CPU cores: docs/data.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from rdlm.config import InputError, Packing
from rdlm.runtime import parse_arguments, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes."""

    folder: str = "build/bench_data"
    """Working folder; the corpus is kept for the next run, the prepared data are deleted."""
    megabytes: int = 200
    """Size of the corpus."""
    vocabulary: int = 8192
    """Entries of the tokenizer."""
    sequence_length: Annotated[int, tyro.conf.arg(name="length")] = 1024
    """Tokens per row."""
    batch_size: int = 64
    """Rows per batch."""
    packing: Packing = "concatenate_and_split"
    """How documents are laid into rows."""
    processes: int = 1
    """Processes that prepare data."""
    seconds: float = 20.0
    """Time for which the consumer reads."""


def main() -> int:
    args = parse_arguments(Args, prog="bench_data.py", description=__doc__)
    from rdlm.data import Recipe
    from rdlm.data.prepare import Corpus, build, cut_files, find_files, read_documents
    from rdlm.tokenizer import Tokenizer

    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = synthetic(folder / f"corpus-{args.megabytes}.jsonl", args.megabytes)
    recipe = Recipe(args.sequence_length, args.packing)
    cut = cut_files(find_files([str(source)]), recipe.reading, 64_000_000)
    sample = list(read_documents(cut_files(find_files([str(source)]), recipe.reading, 5_000_000)[0], recipe.reading))
    tokenizer = Tokenizer.train([str(text) for text in sample], args.vocabulary, "last")
    print(
        f"{load()}; corpus {source.stat().st_size / 1e6:,.0f} MB in {len(cut)} parts, {args.vocabulary:,} BPE entries"
    )

    target = folder / "prepared"
    if target.exists():
        raise InputError(f"{target}: exists, and this bench deletes what it prepares; move it or choose another folder")
    if args.processes == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as each process of several has
    began, used = time.monotonic(), processor()
    corpus = Corpus("files", source.name, cut)
    manifest = build(target, corpus, recipe, tokenizer, processes=args.processes, say=lambda line: print(line))
    seconds, used = time.monotonic() - began, processor() - used
    tokens = manifest.train.tokens + manifest.validation.tokens
    print(
        f"preparation  {tokens / 1e6:,.1f}M tokens in {seconds:,.1f} s, {used:,.1f} s of processor: "
        f"{tokens / used:,.0f} tokens/s per core used, {tokens / seconds:,.0f} by the clock on {args.processes} "
        f"processes; peak memory {peak():,.0f} MB ({load()})"
    )
    reading(target, args)
    shutil.rmtree(target)
    return 0


def reading(target: Path, args: Args) -> None:
    """Print the speed of `batch(step)`, and the time blocked in `next()` of a prefetched loader."""
    from rdlm.data import PackedData, prefetch

    data = PackedData(target, sequence_length=args.sequence_length, batch_size=args.batch_size)
    per_batch = args.batch_size * args.sequence_length
    data.batch(0)
    steps, began, used = 0, time.monotonic(), time.process_time()
    while time.monotonic() - began < args.seconds / 2:
        steps += 1
        data.batch(steps)
    used, seconds = time.process_time() - used, time.monotonic() - began
    print(
        f"reading      {steps * per_batch / used / 1e6:,.2f}M tokens/s per core used, "
        f"{steps * per_batch / seconds / 1e6:,.2f}M by the clock; {args.batch_size} x {args.sequence_length} ({load()})"
    )
    batches = prefetch(data.batch)
    next(batches)
    pause, waited, began = per_batch / 1e6, 0.0, time.monotonic()
    while (now := time.monotonic()) - began < args.seconds:
        next(batches)
        waited += time.monotonic() - now
        time.sleep(pause)
    total = time.monotonic() - began
    batches.close()
    print(f"waiting      {waited / total:.3%} of the time in next(), beside a consumer of 1M tokens/s ({load()})")


def synthetic(path: Path, megabytes: int) -> Path:
    """A JSON-lines file of documents of some hundred to some thousand invented words."""
    if path.exists():
        return path
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 2) for rank in range(len(words))]  # Zipf's law
    pool = draw.choices(words, weights, k=2_000_000)
    partial, written = path.with_suffix(".partial"), 0
    with partial.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            first, count = draw.randrange(len(pool)), draw.randint(50, 3000)
            line = json.dumps({"text": " ".join(pool[first : first + count]) + "."}) + "\n"
            written += file.write(line)
    partial.rename(path)
    return path


def processor() -> float:
    """Seconds of processor time of this process and its finished children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def peak() -> float:
    """Largest resident memory in MB that this process or any of its children had."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or kilobytes
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e6


def load() -> str:
    """How busy the machine is."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


if __name__ == "__main__":
    run_command(main)
