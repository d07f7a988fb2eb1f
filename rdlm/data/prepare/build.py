"""A corpus of files to a folder of prepared data: in parallel, and going on after a kill where it stopped.

While it works everything lies in a hidden folder beside the target, `.NAME.unfinished`: shards that are complete, each
with a JSON file that says so, and `settings.json`. A rerun with the same settings keeps those shards and makes the
others; the last act gives the folder its name. So the target is complete or absent, and equal in every byte whatever
was killed on the way and however many processes there were.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdlm.config import InputError, from_json, one_line, to_json
from rdlm.data.manifest import Manifest, Recipe, first_difference, read_manifest
from rdlm.data.prepare.documents import read_documents
from rdlm.data.prepare.parts import Part
from rdlm.data.prepare.shards import Shard, build_shard, digest, finish
from rdlm.runtime import Progress, write_atomically
from rdlm.tokenizer import Tokenizer


class Corpus(NamedTuple):
    """What to prepare."""

    name: str
    """"files", "factbook", or a TFDS dataset with its version and split."""
    version: str
    """Of the dataset, or which files and bytes there are."""
    parts: Sequence[Part]
    """Units of work, in order."""


def build(
    target: str | Path,
    corpus: Corpus,
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    processes: int,
    say: Callable[[str], None],
) -> Manifest:
    """Prepare `corpus` in the folder `target`; returns at once if it is there already.

    Args:
      target: a local folder that does not exist, or holds the same data.
      corpus: what to prepare.
      recipe: how.
      tokenizer: encodes the documents; a copy goes into the folder.
      processes: that work side by side. The result does not depend on it.
      say: prints a line.

    Raises:
      InputError: the target holds something else, or was begun with other settings (the message says which); another
        process is at work on it; a document is bad, or the disk full. Complete shards are kept for the next attempt.
    """
    target = Path(target).expanduser()
    unfinished = target.parent / f".{target.name}.unfinished"
    try:
        if (unfinished / "manifest.json").exists() and not target.exists():
            _give_name(unfinished, target)
        if not target.exists():
            unfinished.mkdir(parents=True, exist_ok=True)
            with _locked(unfinished, target):
                _check_settings(unfinished, target, corpus, recipe, tokenizer)
                try:
                    shards = _shards(unfinished, corpus, recipe, tokenizer, processes, say)
                except BaseException:
                    if not list((unfinished / "work").glob("shard-*.json")):
                        shutil.rmtree(unfinished)  # nothing to go on with
                    raise
                try:
                    finish(unfinished, shards, recipe, tokenizer, corpus.name, corpus.version)
                except InputError:  # nothing to go on with: these settings leave a split empty
                    shutil.rmtree(unfinished)
                    raise
                _give_name(unfinished, target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or one_line(error)}); free space or fix "
            "permissions, and run the same command again: complete shards are kept"
        ) from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise InputError(
            f"{target}: a process was killed, perhaps for lack of memory; run the same command again with fewer "
            "--processes: complete shards are kept"
        ) from error
    manifest = read_manifest(target)
    expected = {
        "recipe": dataclasses.asdict(recipe), "tokenizer": tokenizer.hash, "source": (corpus.name, corpus.version)
    }  # fmt: skip
    found = {
        "recipe": dataclasses.asdict(manifest.recipe),
        "tokenizer": manifest.tokenizer_hash,
        "source": (manifest.source.name, manifest.source.version),
    }
    different = _difference(expected, found)
    if different:
        raise InputError(f"{target}: was prepared with {different}; choose another --out, or delete it")
    return manifest


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """'packing = "best_fit", not "document_start"', looking into nested settings."""

    def flat(tree: dict[str, Any]) -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for name, value in tree.items():
            leaves |= flat(value) if isinstance(value, dict) else {name: value}
        return leaves

    return first_difference(flat(wanted), flat(found))


def _give_name(unfinished: Path, target: Path) -> None:
    """Remove everything but the prepared data, which are complete, and give the folder its name."""
    wanted = {"manifest.json", "tokenizer", *(file.name for file in read_manifest(unfinished).files)}
    for path in unfinished.iterdir():
        if path.is_dir() and path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in wanted:
            path.unlink()
    unfinished.rename(target)


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"{target}: another process is preparing it; wait for it, or choose another --out") from error
    finally:
        os.close(handle)


def _check_settings(folder: Path, target: Path, corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write settings.json, or compare with the one there. Times of files count: shards must not mix versions."""
    stamps = sorted(
        (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
        for path in {path for part in corpus.parts for path in part.paths}
        if os.path.isfile(path)
    )
    parts = [dataclasses.asdict(part) for part in corpus.parts]
    settings = {
        **dataclasses.asdict(recipe),
        "tokenizer": tokenizer.hash,
        "source": f"{corpus.name}, {corpus.version}",
        "files": hashlib.sha256(json.dumps([stamps, parts]).encode()).hexdigest(),
    }
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["reading"]["bad_documents"] == "refuse":  # then there are none in the shards so far
            found["reading"] = {**found["reading"], "bad_documents": recipe.reading.bad_documents}
        different = _difference(settings, found)
        if different:
            raise InputError(
                f"{target}: {folder.name} beside it is an unfinished preparation, whose settings differ "
                f"({different}); finish that one, or delete {folder}"
            )
    write_atomically(path, json.dumps(settings, indent=2))
    for left in folder.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    (folder / "work").mkdir(exist_ok=True)
    tokenizer.save(folder / "work" / "tokenizer")


def _shards(
    folder: Path, corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer, processes: int, say: Callable[[str], None]
) -> list[Shard]:
    """Every shard, those already there and those made now."""
    parts = corpus.parts
    with _Crew(folder, recipe, tokenizer, min(processes, len(parts)), say) as crew:
        if recipe.deduplicate:
            crew.run("Comparing documents", _write_digests, parts, lambda n: _digests(folder, n).exists())
            _find_duplicates(folder, len(parts))
        crew.run("Preparing", _write_shard, parts, lambda n: _complete(folder, n) is not None)
    shards = [_complete(folder, number) for number in range(len(parts))]
    return [shard for shard in shards if shard is not None]


def _complete(folder: Path, number: int) -> Shard | None:
    """The shard, if its files are there as its JSON file, written last, says."""
    path = folder / "work" / f"shard-{number:05d}.json"
    try:
        shard = from_json(Shard, path.read_text(), str(path))
        files = [split.file for split in (shard.train, shard.validation) if split.file]
        complete = all((folder / file.name).stat().st_size == file.bytes for file in files)
    except (OSError, InputError):
        return None
    return shard if complete else None


# What a worker does


class _Context(NamedTuple):
    """What stays the same from part to part."""

    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    advance: Callable[[int], None]


def _write_shard(context: _Context, number: int, part: Part) -> None:
    folder, recipe, tokenizer, advance = context
    skipped: Counter[str] = Counter()
    documents = read_documents(part, recipe.reading, advance=advance, skipped=skipped)
    duplicates = np.load(folder / "work" / f"duplicates-{number:05d}.npy") if recipe.deduplicate else None
    shard = build_shard(folder, number, documents, recipe, tokenizer, duplicates=duplicates, skipped=skipped)
    write_atomically(folder / "work" / f"shard-{number:05d}.json", to_json(shard))


def _write_digests(context: _Context, number: int, part: Part) -> None:
    documents = read_documents(part, context.recipe.reading, advance=context.advance)
    found = b"".join(digest(text)[:16] for text in documents)
    write_atomically(_digests(context.folder, number), found)


def _digests(folder: Path, number: int) -> Path:
    return folder / "work" / f"digests-{number:05d}"


def _find_duplicates(folder: Path, count: int) -> None:
    """For every part the positions of documents that are equal to an earlier one, in it or before. 16 bytes each."""
    found = [np.frombuffer(_digests(folder, n).read_bytes(), "V16") for n in range(count)]
    everything = np.concatenate(found)
    _, first = np.unique(everything, return_index=True)
    again = np.ones(len(everything), bool)
    again[first] = False
    for number, mine in enumerate(np.split(again, np.cumsum([len(f) for f in found])[:-1])):
        np.save(folder / "work" / f"duplicates-{number:05d}.npy", np.flatnonzero(mine))


# Processes


class _Crew:
    """Does parts of the work, here or in processes of its own. Use as a context manager."""

    def __init__(self, folder: Path, recipe: Recipe, tokenizer: Tokenizer, processes: int, say: Callable[[str], None]):
        self.context = _Context(folder, recipe, tokenizer, lambda _: None)
        self.say = say
        self.pool = None
        if processes > 1:
            multi = multiprocessing.get_context("spawn")
            self.counter = multi.Value("q", 0)  # bytes read; below zero: stop
            self.pool = concurrent.futures.ProcessPoolExecutor(
                processes, multi, _start_worker, (folder, recipe, self.counter)
            )

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            if kind is not None:
                self.counter.value = _STOP
            self.pool.shutdown(cancel_futures=True)

    def run(self, title: str, work: _Work, parts: Sequence[Part], done: Callable[[int], bool]) -> None:
        """Do the parts that are not done, under a bar."""
        todo = [(number, part) for number, part in enumerate(parts) if not done(number)]
        total = sum(part.size for part in parts)
        before = total - sum(part.size for _, part in todo)
        if len(todo) < len(parts):
            self.say(f"{title}: {len(parts) - len(todo)} of {len(parts)} parts are there already")
        with Progress(total, title, done=before, unit="bytes", say=self.say) as bar:
            if self.pool is None:
                for number, part in todo:
                    work(self.context._replace(advance=bar.advance), number, part)
                return
            self.counter.value = 0
            waiting = {self.pool.submit(_in_worker, work, number, part) for number, part in todo}
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, 0.25, concurrent.futures.FIRST_COMPLETED)
                bar.update(before + self.counter.value)
                for future in finished:
                    future.result()


_Work = Callable[[_Context, int, Part], None]
_STOP = -(2**62)
_context: _Context | None = None  # of a worker process


def _start_worker(folder: Path, recipe: Recipe, counter: Any) -> None:
    global _context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # it may be killed, and nobody else would tell
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def advance(n: int) -> None:
        with counter.get_lock():
            counter.value += n
        if counter.value < 0:
            raise RuntimeError("stopped, because another part failed")

    _context = _Context(folder, recipe, Tokenizer.load(folder / "work" / "tokenizer"), advance)


def _in_worker(work: _Work, number: int, part: Part) -> None:
    assert _context is not None
    work(_context, number, part)
