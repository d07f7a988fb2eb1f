"""Train a tokenizer on your own text: byte-level BPE with the reference's special tokens at the end of the vocabulary.

    python experiments/train_tokenizer.py texts/ --size 8192 --out tokenizers/mine
    python experiments/train_tokenizer.py --bytes --out tokenizers/bytes            # one token per byte, no training

It learns from train documents only: preparation holds out the same documents for validation. Two cores learn 8,192
entries from 100 MB in about a minute. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import tyro

from rdlm.config import InputError, local_path, require
from rdlm.runtime import parse_arguments, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """The text to learn from, and how much of it."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders, globs or gs:// URLs, as prepare_data.py reads them."""
    out: str = ""
    """Folder for tokenizer.json and tokenizer_config.json; must not exist."""
    size: int = 8192
    """Entries, the 32 special ids included."""
    bytes: bool = False
    """One token per byte instead; needs no text."""
    field: str = "text"
    """Field of JSON or column that holds the text, or the messages of a chat (meta.text: of a field within a field)."""
    document: Literal["file", "line", "blank_line"] = "file"
    """One document of a text file: the whole file, each line, or each paragraph between blank lines."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """Text that is not UTF-8, lines that are not JSON, a missing field: stop, or skip and count."""
    validation_fraction: float = 0.05
    """Share of documents that preparation will hold out."""
    max_bytes: int = 1_000_000_000
    """Learn from at most about this much text, sampled in parts; memory grows with it."""

    def __post_init__(self) -> None:
        require(bool(self.out), "--out", self.out, "name a folder for the tokenizer, for example --out tokenizers/mine")
        require(self.bytes or bool(self.paths), "paths", self.paths, "give files or folders, or pass --bytes")
        require(self.max_bytes > 0, "--max-bytes", self.max_bytes, "must be positive")
        require(
            0 <= self.validation_fraction < 1, "--validation-fraction", self.validation_fraction, "must be in [0, 1)"
        )


def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    args = parse_arguments(Args, prog="train_tokenizer.py", description=__doc__, config=flags)
    from rdlm.runtime.files import complete_folder
    from rdlm.tokenizer import Tokenizer

    out = local_path(args.out, "--out")
    if out.exists():
        raise InputError(f"--out = {args.out}: is there already; choose another")
    tokenizer = Tokenizer.bytes_only() if args.bytes else Tokenizer.train(texts(args), args.size, "last")
    with complete_folder(out, alike=False) as partial:
        tokenizer.save(partial)
    special = ", ".join(f"{i} {name}" for name, i in list(tokenizer.special_ids.items())[:6])
    print(f"{out}: {tokenizer.vocab_size:,} entries; special: {special}, ...")
    return 0


def texts(args: Args) -> Iterator[str]:
    """The train documents; messages of conversations one by one."""
    from rdlm.data import Reading
    from rdlm.data.prepare import cut_files, described, find_files, held_out, read_documents, texts_of

    reading = Reading(args.field, args.document, args.bad_documents)
    left_out: Counter[str] = Counter()
    files = find_files(args.paths, left_out)
    cut = cut_files(files, reading, min(64_000_000, args.max_bytes))
    total = sum(part.size for part in cut)
    every = max(1.0, total / args.max_bytes)  # one in so many parts is used
    chosen = [cut[int(i * every)] for i in range(int(len(cut) / every))] or cut[:1]
    size = sum(part.size for part in chosen)
    print(
        f"{described(files, left_out)}: learning from {size / 1e6:,.1f} of {total / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    skipped: Counter[str] = Counter()
    for part in chosen:
        for document in read_documents(part, reading, skipped=skipped):
            if held_out(document, args.validation_fraction):
                continue
            yield from texts_of(document)
    if skipped:
        print("Skipped: " + ", ".join(f"{n} {what}" for what, n in sorted(skipped.items())), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
