"""Preparation as an Apache Beam pipeline, for corpora too large for one machine. Needs the extra `beam`.

`build_shard` makes a shard of every part, as in `build`, so the bytes are the same. Every worker must be able to read
the parts and write the target: use URLs of a bucket, except with the direct runner.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import fsspec

from rdlm.config import InputError, from_json, to_json
from rdlm.data.manifest import Manifest, Recipe
from rdlm.data.prepare.build import Corpus
from rdlm.data.prepare.documents import read_documents
from rdlm.data.prepare.parts import Part
from rdlm.data.prepare.shards import Shard, build_shard, finish
from rdlm.tokenizer import Tokenizer

_OURS = re.compile(r"(train|validation)-\d+\.array_record|\.work|\.partial-.+")
"""What an earlier attempt may have left in the target."""


def build_with_beam(
    target: str, corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer, flags: Sequence[str] = ()
) -> Manifest:
    """Prepare `corpus` in `target` by a pipeline.

    Shards appear in the target one by one. The manifest is written last, and without it nothing reads them.

    Args:
      target: a folder or URL that is not there, or holds shards of an earlier attempt.
      corpus: documents to prepare.
      recipe: how to split and pack them; without deduplication.
      tokenizer: encodes the documents.
      flags: of the pipeline; none: Beam's direct runner.

    Raises:
      InputError: Beam is not installed, the target is prepared data already or somebody else's, the recipe
        deduplicates, or a document is bad.
    """
    if recipe.deduplicate:
        raise InputError("--deduplicate: not with --beam; remove duplicates before this pipeline")
    fs, root = fsspec.core.url_to_fs(target)
    listed = fs.ls(root, detail=False) if fs.isdir(root) else []
    there = [Path(name).name for name in listed if name.rstrip("/") != root.rstrip("/")]  # buckets may list the folder
    if "manifest.json" in there:
        raise InputError(f"{target}: is prepared data already; choose another --out")
    if fs.isfile(root) or not all(map(_OURS.fullmatch, there)):
        raise InputError(f"{target}: is there already and holds no prepared data; choose another --out")
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"--beam: Apache Beam is not installed ({error}); run: pip install 'rdlm[beam]'") from error
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save(local)
        files = {path.name: path.read_text(encoding="utf-8") for path in Path(local).iterdir()}
    work = _ShardWork(target, recipe, files)
    options = PipelineOptions(list(flags), save_main_session=False)
    try:
        with apache_beam.Pipeline(options=options) as pipeline:
            (
                pipeline
                | apache_beam.Create(list(enumerate(corpus.parts)))
                | apache_beam.Reshuffle()  # parts spread over workers
                | apache_beam.Map(work)
            )
    except InputError:
        raise
    except Exception as error:  # runners wrap a worker's error
        raise InputError(f"{target}: the pipeline failed ({_reason(error)})") from error
    names = [f"{root}/{_entry(number)}" for number in range(len(corpus.parts))]
    shards = [from_json(Shard, fs.cat_file(name).decode(), name) for name in names]
    for name in names:
        fs.rm_file(name)
    with contextlib.suppress(OSError):  # in a bucket it is gone with its files
        fs.rmdir(f"{root}/.work")
    return finish(target, shards, recipe, tokenizer, corpus.name, corpus.version, corpus.fingerprints())


class _ShardWork:
    """Makes the shard of (number, part), and a JSON file that describes it. Beam pickles it."""

    def __init__(self, target: str, recipe: Recipe, tokenizer_files: dict[str, str]) -> None:
        self.target, self.recipe, self.tokenizer_files = target, recipe, tokenizer_files

    def __call__(self, work: tuple[int, Part]) -> None:
        number, part = work
        with tempfile.TemporaryDirectory() as local:
            for name, text in self.tokenizer_files.items():
                (Path(local) / name).write_text(text, encoding="utf-8")
            tokenizer = Tokenizer.load(local)
        skipped: Counter[str] = Counter()
        documents = read_documents(part, self.recipe.reading, skipped=skipped)
        shard = build_shard(self.target, number, documents, self.recipe, tokenizer, skipped=skipped)
        fs, root = fsspec.core.url_to_fs(self.target)
        fs.makedirs(f"{root}/.work", exist_ok=True)
        fs.pipe_file(f"{root}/{_entry(number)}", to_json(shard).encode())


def _entry(number: int) -> str:
    return f".work/shard-{number:05d}.json"


def _reason(error: Exception) -> str:
    """The InputError inside a runner's error, or the last line of that."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if "InputError: " in line]
    return named[-1].partition("InputError: ")[2] if named else lines[-1][:300]
