"""The embedded corpus as prepared data: made on first use, then reused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from rdlm.config import DataConfig, InputError, local_path
from rdlm.data.manifest import Recipe, first_difference, read_manifest
from rdlm.data.prepare import factbook
from rdlm.data.prepare.build import Corpus
from rdlm.data.prepare.parts import Part
from rdlm.data.prepare.shards import build_shard, finish, held_out
from rdlm.runtime import Progress, complete_folder
from rdlm.tokenizer import Tokenizer


def prepare_embedded(data: DataConfig, *, tokenizer: Tokenizer | None = None) -> Path:
    """Make the folder of packed rows of the embedded corpus that `data` describes, or return at once if it is there.

    The folder lies in `data.folder` and is named by the settings that decide its content: one shard of rows per split
    (see `records`), tokenizer/ and manifest.json. It is complete or absent, so several processes may call this at once.
    Equal settings give equal bytes on every machine.

    Args:
      data: corpus and sizes.
      tokenizer: use this one; None: train one of `data.tokenizer_size` entries on the train documents alone.

    Returns:
      The folder, for `PackedData`; its tokenizer is `Tokenizer.load(folder / "tokenizer")`.

    Raises:
      InputError: the corpus is not installed, too small for the tokenizer or the split, the tokenizer has another
        size, `data.folder` cannot be written, or a folder of that name holds something else or is damaged.
    """
    folder = prepared_folder(data, tokenizer)
    recipe = Recipe(data.sequence_length, validation_fraction=data.validation_fraction)
    if not folder.exists():
        with complete_folder(folder, "data.folder") as partial:
            _write(partial, data, recipe, tokenizer)
    manifest = read_manifest(folder)
    wanted = {**recipe.settings(), "vocab_size": data.tokenizer_size, "source": f"{data.source}, {SOURCE_VERSION}"}
    found = {**manifest.identity(), "vocab_size": manifest.vocab_size}
    different = first_difference(wanted, {name: found[name] for name in wanted})
    if different:
        raise InputError(f"{folder}: prepared with {different}; set another data.folder")
    return folder


def prepared_folder(data: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """The folder of `prepare_embedded`: data.folder/SOURCE-VOCABULARY-LENGTH, then non-default settings."""
    name = f"{data.source}-{data.tokenizer_size}-{data.sequence_length}"
    if data.validation_fraction != DataConfig.validation_fraction:
        name += f"-v{data.validation_fraction:g}"
    if tokenizer is not None:
        if tokenizer.vocab_size != data.tokenizer_size:
            raise InputError(
                f"data.tokenizer_size = {data.tokenizer_size}: the tokenizer given has {tokenizer.vocab_size} entries"
            )
        name += f"-{tokenizer.hash[:8]}"
    return local_path(data.folder, "data.folder") / name


def embedded_corpus(folder: Path) -> Corpus:
    """The embedded corpus for `build`, its TFDS dataset made in `folder` if need be.

    Raises:
      InputError: its package is missing or another, or `folder` cannot be written.
    """
    size = sum(len(text.encode()) for text in factbook.documents(folder))
    return Corpus("factbook", SOURCE_VERSION, [Part("factbook", (str(folder),), size)])


def _write(folder: Path, data: DataConfig, recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    say = functools.partial(print, file=sys.stderr, flush=True)
    say(f"Reading {data.source}")
    texts = _documents(data)
    train = [text for text in texts if not held_out(text, data.validation_fraction)]
    for name, count in (("train", len(train)), ("validation", len(texts) - len(train))):
        if not count:
            raise InputError(
                f"data.validation_fraction = {data.validation_fraction}: leaves no {name} document of {len(texts)}"
            )
    if tokenizer is None:
        say(f"Training a tokenizer of {data.tokenizer_size} entries on {len(train)} documents")
        tokenizer = Tokenizer.train(train, data.tokenizer_size)
    say(f"Packing {len(texts)} documents into rows of {data.sequence_length}")

    sizes = [len(text.encode()) for text in texts]
    with Progress(sum(sizes), "Packing", unit="bytes") as progress:

        def documents() -> Iterator[str]:
            for text, size in zip(texts, sizes, strict=True):
                yield text
                progress.advance(size)

        shard = build_shard(folder, 0, documents(), recipe, tokenizer)
    finish(folder, [shard], recipe, tokenizer, data.source, SOURCE_VERSION)


SOURCE_VERSION = f"{factbook.PACKAGE} {factbook.PACKAGE_VERSION}, text {factbook.CiaWorldFactbook.VERSION}"
"""Of the embedded corpus."""


def _documents(data: DataConfig) -> list[str]:
    return factbook.documents(local_path(data.folder, "data.folder") / "tfds")
