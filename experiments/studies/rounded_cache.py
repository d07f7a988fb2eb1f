"""What do keys and values in 8 bits cost, at every depth? Held-out text, read through the cache.

    python experiments/studies/rounded_cache.py runs/quickstart
    python experiments/studies/rounded_cache.py models/smollm2 --text held_out.txt --length 512 --depths 1

Rows of text are read in chunks, the first by `prefill` and the others by `decode_step`, so that all but the first read
earlier tokens from the cache. Prints the mean loss of the next token in nats at every depth, with activations in
float32 and in bfloat16, with the cache in the same dtype and in int8; and the bytes of a token's keys and values at
that depth. Exit codes: 0 done, 2 wrong input.
Hardware: any. Found: docs/quantize.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rdlm.config import CachePolicy, InputError, ModelConfig, require
from rdlm.decode import decode_step, prefill
from rdlm.losses import cross_entropy
from rdlm.model import Params, cast
from rdlm.perf.flops import cache_bytes
from rdlm.recurrence import check_depths
from rdlm.run import Run, load
from rdlm.runtime import parse_arguments, run_command

POLICIES = CachePolicy(), CachePolicy(dtype="int8")


@dataclasses.dataclass(frozen=True)
class Args:
    """Score held-out text with the model in FOLDER."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder or Hugging Face folder."""
    text: Path | None = None
    """File of text; None: the run's validation rows that are one document."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Recurrences r."""
    rows: int = 32
    """Rows of text."""
    length: int = 128
    """Tokens of each."""
    chunk: int = 16
    """Tokens that are read at once."""


def rows_of(run: Run, args: Args) -> np.ndarray:
    """Token ids [rows, length].

    Raises:
      InputError: no file, or too little text.
    """
    if args.text is None:
        found = [np.asarray(batch["tokens"])[_alone(batch["segment_ids"])] for batch in run.validation().batches(None)]
        tokens = np.concatenate(found)
        tokens = tokens[:, : tokens.shape[1] // args.length * args.length].reshape(-1, args.length)
    else:
        require(args.text.is_file(), "--text", str(args.text), "is not there; name a file of text")
        ids = run.require_tokenizer().encode(args.text.read_text(encoding="utf-8"))
        tokens = ids[: len(ids) // args.length * args.length].reshape(-1, args.length)
    if len(tokens) < args.rows:
        raise InputError(f"--rows {args.rows}: there are only {len(tokens)} of {args.length} tokens; ask for fewer")
    return tokens[: args.rows]


def _alone(segments: np.ndarray) -> np.ndarray:
    """Rows that are one document."""
    return (segments == 1).all(1)


def losses(
    params: Params, config: ModelConfig, rows: np.ndarray, policy: CachePolicy, depths: tuple[int, ...], chunk: int
) -> list[float]:
    """Mean loss of the next token at every depth, from chunks of `rows` [B, L] that read each other's cache."""
    B, L = rows.shape
    room = {"capacity": L, "max_steps": max(depths)}
    first = jax.jit(lambda params, tokens, r: prefill(params, config, tokens, r, cache=policy, **room))
    later = jax.jit(lambda params, cache, tokens, r: decode_step(params, config, cache, tokens, r), donate_argnums=1)
    score = jax.jit(lambda logits, labels: cross_entropy(logits, labels).sum())
    labels, found = jnp.asarray(rows[:, 1:]), []
    for r in map(jnp.int32, depths):
        out, cache = first(params, jnp.asarray(rows[:, :chunk]), r)
        total = float(score(out.logits[:, : L - 1], labels[:, :chunk]))
        for at in range(chunk, L - 1, chunk):
            tokens = jnp.asarray(rows[:, at : min(at + chunk, L - 1)])
            out, cache = later(params, cache, tokens, r)
            total += float(score(out.logits, labels[:, at : at + tokens.shape[1]]))
        found.append(total / (B * (L - 1)))
    return found


def main() -> int:
    args = parse_arguments(Args, prog="rounded_cache.py", description=__doc__)
    for name in ("rows", "length", "chunk"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "must be at least 1")
    require(
        args.chunk < args.length, "--chunk", args.chunk, f"must be below --length {args.length}, or nothing is read"
    )
    check_depths(args.depths)
    run = load(args.folder)
    rows = rows_of(run, args)
    print(f"{args.folder}: {rows.size - len(rows):,} tokens in rows of {args.length}, read in chunks of {args.chunk}")
    columns: dict[str, list[str]] = {"r": [str(r) for r in args.depths]}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(run.config, compute_dtype=dtype)
        for policy in POLICIES:
            found = losses(cast(run.params, dtype), config, rows, policy, args.depths, args.chunk)
            columns[f"{dtype}, {policy.dtype or dtype}"] = [f"{x:.4f}" for x in found]
    for policy in POLICIES:
        sizes = [cache_bytes(run.config, policy, r, 1, 1, 2) for r in args.depths]
        columns[f"bytes, {policy.dtype or 'bfloat16'}"] = [f"{n:,}" for n in sizes]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in zip(*columns.values(), strict=True):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    run_command(main)
