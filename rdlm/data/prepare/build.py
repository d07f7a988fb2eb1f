"""Preparing a corpus in a folder: in parallel, and resumable after a kill.

Work happens in a hidden folder beside the target, `.NAME.unfinished`. It holds `settings.json` and complete shards,
each with a JSON file written after it. A rerun with the same settings keeps those shards and makes the others; at the
end the folder is renamed. So the target is complete or absent, and its bytes depend neither on kills nor on the number
of processes.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rdlm.config import InputError, from_json, local_path, one_line, to_json
from rdlm.data.manifest import INPUTS, Manifest, Recipe, first_difference, read_manifest
from rdlm.data.prepare.documents import read_documents
from rdlm.data.prepare.input_files import Fingerprint, changed, fingerprint
from rdlm.data.prepare.parts import Part
from rdlm.data.prepare.shards import Shard, build_shard, digest, finish
from rdlm.runtime import Progress, write_atomically
from rdlm.tokenizer import Tokenizer


class Corpus(NamedTuple):
    """Documents to prepare."""

    name: str
    """"files", "factbook", or a TFDS dataset with its version and split."""
    version: str
    """Of the dataset, or the names and number of files and bytes."""
    parts: Sequence[Part]
    """Units of work, in order."""

    def fingerprints(self) -> list[Fingerprint]:
        """Of all files; of a TFDS dataset, those with its examples. Reads them."""
        paths = dict.fromkeys(
            (part.kind, path) for part in self.parts for path in part.paths if part.kind != "factbook"
        )
        files = [sorted(map(str, Path(p).glob("*.array_record*"))) if kind == "tfds" else [p] for kind, p in paths]
        return [fingerprint(path) for path in itertools.chain.from_iterable(files)]


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
      corpus: documents to prepare.
      recipe: how to split and pack them.
      tokenizer: encodes the documents; a copy goes into the folder.
      processes: number of worker processes. The result does not depend on it.
      say: prints a line.

    Raises:
      InputError: the target holds other data, or was begun with other settings (the message says which); another
        process is preparing it; a document is bad, or the disk is full. Complete shards are kept for the next attempt.
    """
    target = local_path(target)
    target = target.resolve() if target.is_symlink() else target
    unfinished = target.parent / f".{target.name}.unfinished"
    try:
        if target.exists() and not (target / "manifest.json").exists():
            raise InputError(f"{target}: is there already and holds no prepared data; choose another --out")
        _require_ours(unfinished, target)
        inputs = corpus.fingerprints()
        if (unfinished / "manifest.json").exists() and not target.exists():
            _rename(unfinished, target)
        if not target.exists():
            unfinished.mkdir(parents=True, exist_ok=True)
            with _locked(unfinished, target):
                _check_settings(unfinished, target, _settings(corpus, recipe, tokenizer), corpus.parts, inputs)
                tokenizer.save(unfinished / "work" / "tokenizer")
                try:
                    shards = _shards(unfinished, corpus, recipe, tokenizer, processes, say)
                except BaseException:
                    if not list((unfinished / "work").glob("shard-*.json")):
                        _remove(unfinished)  # no shard to keep
                    raise
                try:
                    finish(unfinished, shards, recipe, tokenizer, corpus.name, corpus.version, inputs)
                except InputError:  # these settings leave a split empty: no rerun can finish it
                    _remove(unfinished)
                    raise
                _rename(unfinished, target)
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
    wanted, identity = _settings(corpus, recipe, tokenizer), manifest.identity()
    different = first_difference(wanted, {name: identity.get(name) for name in wanted})
    if different is None and (target / INPUTS).exists():  # older prepared data have none
        different = changed(inputs, _saved(target / INPUTS))
    if different:
        raise InputError(f"{target}: was prepared with {different}; choose another --out")
    return manifest


def _settings(corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, object]:
    return {**recipe.settings(), "tokenizer": tokenizer.hash, "source": f"{corpus.name}, {corpus.version}"}


def _saved(path: Path) -> list[Fingerprint]:
    return [Fingerprint(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


_OURS = re.compile(
    r"settings\.json|inputs\.json|manifest\.json|tokenizer|work|(train|validation)-\d+\.array_record|\.(.+\.)?partial-.+"
)
"""Names in the folder of an unfinished preparation. Nothing else is ever removed."""


def _require_ours(unfinished: Path, target: Path) -> None:
    """Refuse a folder of somebody else's at the place of an unfinished preparation."""
    if unfinished.is_dir():
        names = {path.name for path in unfinished.iterdir()}
        if not names & {"settings.json", "manifest.json"} and not all(map(_OURS.fullmatch, names)):
            raise InputError(f"{target}: {unfinished} is in the way and no preparation; choose another --out")


def _rename(unfinished: Path, target: Path) -> None:
    """Remove what only the preparation needed, and rename the folder of the complete data to `target`."""
    _remove(unfinished, {"manifest.json", "tokenizer", *(file.name for file in read_manifest(unfinished).files)})
    unfinished.rename(target)


def _remove(folder: Path, but: Collection[str] = ()) -> None:
    """Remove what preparation wrote, and the folder if nothing is left."""
    for path in folder.iterdir():
        if path.name in but or not _OURS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, even if it is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"{target}: another process is preparing it; wait for it, or choose another --out") from error
    finally:
        os.close(handle)


def _check_settings(
    folder: Path, target: Path, settings: dict[str, object], parts: Sequence[Part], inputs: Sequence[Fingerprint]
) -> None:
    """Write settings.json and inputs.json, or compare with those there: shards must not mix settings or versions."""
    cut = json.dumps([dataclasses.asdict(part) for part in parts])
    settings = {**settings, "parts": hashlib.sha256(cut.encode()).hexdigest()}
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        found |= found.pop("reading", {})  # older preparations nest these fields
        if found["bad_documents"] == "refuse":  # then the shards so far hold no bad documents
            found["bad_documents"] = settings["bad_documents"]
        known = {name: value for name, value in found.items() if name not in ("files", "parts")}  # files: in older ones
        different = first_difference(settings, known)
        if not different and (folder / INPUTS).exists():
            different = changed(inputs, _saved(folder / INPUTS)) or first_difference(settings, found)
        if different:
            raise InputError(
                f"{target}: {folder.name} beside it is an unfinished preparation, whose settings differ "
                f"({different}); finish it with its own settings, or choose another --out"
            )
    write_atomically(folder / INPUTS, json.dumps(inputs))
    write_atomically(path, json.dumps(settings, indent=2))
    for left in folder.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    (folder / "work").mkdir(exist_ok=True)


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
    """The shard, if its files have the sizes in its JSON file, which is written last."""
    path = folder / "work" / f"shard-{number:05d}.json"
    try:
        shard = from_json(Shard, path.read_text(), str(path))
        files = [split.file for split in (shard.train, shard.validation) if split.file]
        complete = all((folder / file.name).stat().st_size == file.bytes for file in files)
    except (OSError, InputError):
        return None
    return shard if complete else None


# The work on one part


class _Context(NamedTuple):
    """The same for all parts."""

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
    """Save for every part the positions of documents that equal an earlier one, in this part or before.

    Takes 16 bytes of memory per document.
    """
    found = [np.frombuffer(_digests(folder, n).read_bytes(), "V16") for n in range(count)]
    everything = np.concatenate(found)
    _, first = np.unique(everything, return_index=True)
    again = np.ones(len(everything), bool)
    again[first] = False
    for number, mine in enumerate(np.split(again, np.cumsum([len(f) for f in found])[:-1])):
        np.save(folder / "work" / f"duplicates-{number:05d}.npy", np.flatnonzero(mine))


# Processes


class _Crew:
    """Works on parts, in this process or in a pool of processes. Use as a context manager."""

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
        """Work on the parts that are not done, and show progress."""
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


def _start_worker(folder: Path, recipe: Recipe, counter: "Synchronized[int]") -> None:
    global _context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a pool's workers outlive a parent that is killed
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
