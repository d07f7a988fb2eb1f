"""Prepare your own text for training: tokens packed into rows, in shards that any number of hosts can read.

    python experiments/prepare_data.py texts/ --tokenizer tokenizers/mine --sequence-length 1024 --out data/mine
    python experiments/prepare_data.py 'c/*.jsonl.zst' --tokenizer tokenizers/mine --packing best_fit --out data/crawl
    python experiments/prepare_data.py chats.jsonl --field messages --tokenizer FOLDER --out data/chats
    python experiments/prepare_data.py qa.jsonl --prompt-field prompt --field completion --tokenizer TOK --out data/qa
    python experiments/prepare_data.py --tfds imdb_reviews --tokenizer tokenizers/mine --out data/imdb
    python experiments/train.py small --data.prepared data/mine data/crawl --data.weights 1 3

After a kill, the same command resumes where it stopped and makes the same bytes. `experiments/bench/data.py` measures
the speed. Exit codes: 0 done, 2 wrong input (one line says what and where).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rdlm.config import Packing, is_url, local_path, require
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    from rdlm.data import Manifest, Recipe
    from rdlm.data.prepare import Corpus


@dataclasses.dataclass(frozen=True)
class Args:
    """The text to prepare, and how."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders, globs or gs:// URLs: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow; text, JSON and CSV
    also with .gz, .zst, .bz2 or .xz."""
    out: str = ""
    """Folder to make; with --beam also a URL."""
    tokenizer: str = ""
    """Folder with tokenizer.json (experiments/train_tokenizer.py makes one), or "bytes": one token per byte."""
    sequence_length: int = 1024
    """Tokens per row (L)."""
    packing: Packing = "concatenate_and_split"
    """Documents end to end, cut every L tokens; whole documents where they fit best; or the reference's rows, each of
    which starts with a document and drops the tokens that do not fit."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation, chosen by a hash of their text."""
    deduplicate: bool = False
    """Keep only the first of several equal documents; reads the input twice; 16 bytes of memory a document."""
    field: str = "text"
    """Field of JSON, columns and TFDS examples (meta.text: a field within another): text, or a list of chat messages,
    of which only the assistant's are scored."""
    prompt_field: str = ""
    """Field of the prompt that --field completes; only the completion is scored."""
    document: Literal["file", "line", "blank_line"] = "file"
    """One document of a text file: the whole file, each line, or each paragraph between blank lines."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """Text that is not UTF-8, lines that are not JSON, a missing field, chats that the template refuses: stop, or skip
    and count."""
    tfds: str = ""
    """Instead of paths: a TFDS dataset, for example imdb_reviews or story_cloze/2016."""
    tfds_split: str = "train"
    """Its split."""
    tfds_dir: str = "data/tfds"
    """Folder of TFDS datasets; one already prepared there as array_record is used as it is."""
    manual_dir: str = ""
    """Folder with files that the dataset cannot download, or that were downloaded before."""
    embedded: bool = False
    """Instead of paths: the embedded corpus, the CIA World Factbook."""
    processes: int = 0
    """Worker processes; 0: one per core. The result does not depend on it."""
    shard_bytes: int = 64_000_000
    """Approximate size of the input of a shard."""
    beam: bool = False
    """Run as an Apache Beam pipeline (extra `beam`): on this machine, or elsewhere by --beam-flags."""
    beam_flags: str = ""
    """Flags of the pipeline, for example "--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp"."""

    def __post_init__(self) -> None:
        chosen = sum([bool(self.paths), bool(self.tfds), self.embedded])
        require(chosen == 1, "paths", self.paths, "give files or folders, or --tfds NAME, or --embedded: one of them")
        require(bool(self.out), "--out", self.out, "name the folder of the prepared data, for example --out data/mine")
        fix = "give a folder with tokenizer.json (experiments/train_tokenizer.py makes one), or 'bytes'"
        require(bool(self.tokenizer), "--tokenizer", self.tokenizer, fix)
        require(self.processes >= 0, "--processes", self.processes, "must not be negative")
        require(self.shard_bytes >= 1, "--shard-bytes", self.shard_bytes, "must be at least 1")
        if not self.beam:
            fix = "is a URL, and this must be a local path; mount the bucket and give the folder there, or pass --beam"
            require(not is_url(self.out), "--out", self.out, fix)
            local_path(self.out, "--out")
        if self.tokenizer != "bytes":
            local_path(self.tokenizer, "--tokenizer")
        require(self.beam or not self.beam_flags, "--beam-flags", self.beam_flags, "only with --beam")


def main() -> int:
    args = parse_arguments(Args, prog="prepare_data.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    from rdlm.data import Reading, Recipe
    from rdlm.data.prepare import build
    from rdlm.tokenizer import Tokenizer

    reading = Reading(args.field, args.document, args.bad_documents, args.prompt_field)
    recipe = Recipe(args.sequence_length, args.packing, args.validation_fraction, args.deduplicate, reading)
    tokenizer = Tokenizer.bytes_only() if args.tokenizer == "bytes" else Tokenizer.load(args.tokenizer)
    corpus = find_corpus(args, recipe)
    if args.beam:
        from rdlm.data.prepare.beam import build_with_beam

        manifest = build_with_beam(args.out, corpus, recipe, tokenizer, shlex.split(args.beam_flags))
    else:
        processes = args.processes or os.cpu_count() or 1
        manifest = build(args.out, corpus, recipe, tokenizer, processes=processes, say=say)
    report(args.out, manifest, model_of(args.tokenizer))
    return 0


def find_corpus(args: Args, recipe: Recipe) -> Corpus:
    """The documents that the arguments name."""
    from rdlm.data.prepare import Corpus, cut_files, described, find_files

    if args.embedded:
        from rdlm.data.prepare.embedded import embedded_corpus

        return embedded_corpus(Path(args.tfds_dir))
    if args.tfds:
        from rdlm.data.prepare.tfds import dataset, dataset_parts

        builder = dataset(args.tfds, args.tfds_dir, args.manual_dir or None)
        cut = dataset_parts(builder, args.tfds_split, args.field, args.shard_bytes)
        return Corpus(f"{builder.info.full_name}, {args.tfds_split}", str(builder.info.version), cut)
    left_out: Counter[str] = Counter()
    files = find_files(args.paths, left_out)
    size = sum(file.bytes for file in files)
    names = ", ".join(Path(file.path).name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    say(f"{described(files, left_out)}: {size / 1e6:,.1f} MB")
    return Corpus(
        "files", f"{names} ({len(files)} files, {size} bytes)", cut_files(files, recipe.reading, args.shard_bytes)
    )


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr)


def model_of(tokenizer: str) -> str:
    """The model folder that holds a tokenizer, in itself or in its folder `tokenizer`; empty if there is none."""
    folder = Path(tokenizer)
    places = [folder, *[folder.parent] * (folder.name == "tokenizer")]
    return next((str(place) for place in places if (place / "config.json").is_file()), "")


def report(out: str, manifest: Manifest, model: str) -> None:
    """Print what was prepared, and how to train on it: from the beginning, or from `model`, a folder, if given."""
    from rdlm.data.prepare import marked_example

    length = manifest.recipe.sequence_length
    for name in ("train", "validation"):
        split = manifest.split(name)
        labels = "" if split.labels is None else f", {split.labels:,} labels"
        print(
            f"{name:10}  {split.documents:,} documents, {split.bytes / 1e6:,.1f} MB, {split.tokens:,} tokens, "
            f"{split.rows:,} rows of {length}{labels}"
        )
        if split.unscored_documents or split.unscored_rows:
            rows = f" and {split.unscored_rows:,} rows" * bool(split.unscored_rows)
            print(
                f"            {split.unscored_documents:,} documents{rows} have no label: "
                "nothing is scored there, or what is was cut off (--sequence-length, --packing)"
            )
        if split.dropped_rows:
            print(f"            {split.dropped_rows:,} rows had no label and were left out")
    left = {what: n for what, n in dataclasses.asdict(manifest.skipped).items() if n}
    if left:
        print("skipped     " + ", ".join(f"{n:,} {what}" for what, n in left.items()))
    example = [] if is_url(out) else marked_example(out)
    if example:
        print(r"example of what is scored (>) and what is not; only \n is a line break of the text:")
        print("\n".join(example))
    if example or model:
        print(
            f"fine-tune on it: python experiments/train.py finetune --init {model or 'FOLDER'} --data.prepared {out} "
            f"--data.sequence-length {length}"
        )
    if not manifest.validation.rows:
        print(f"{out} holds no validation rows: train on it beside a folder that holds some (--data.prepared A B)")
        return
    print(
        f"train on it: python experiments/train.py PRESET --data.prepared {out} --data.sequence-length {length} "
        f"--data.tokenizer-size {manifest.vocab_size} --model.vocab-size {manifest.vocab_size}"
    )


if __name__ == "__main__":
    run_command(main)
