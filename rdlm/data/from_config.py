"""The data of a run, from its configuration."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import NamedTuple, TypedDict

from rdlm.config import DataConfig, InputError
from rdlm.data.fetch import local_copy
from rdlm.data.loader import DataState, PackedData, check_sources
from rdlm.data.manifest import read_manifest
from rdlm.data.mixture import Chain, Mixture
from rdlm.data.prepare.embedded import prepare_embedded, prepared_folder
from rdlm.data.stream import StreamedData
from rdlm.tokenizer import Tokenizer


class RunData(NamedTuple):
    """What training reads. `train` has batch(step), state(step), restore(step, state), check and steps_per_epoch."""

    train: PackedData | Mixture | StreamedData
    validation: Chain
    tokenizer: Tokenizer
    folder: Path
    """Of the (first) prepared data, for messages."""
    identity: dict[str, object]
    """By the names of what was read: what must be the same on all hosts."""


class _Batches(TypedDict):
    batch_size: int
    process_index: int
    process_count: int


def open_data(
    data: DataConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    tokenizer_folder: Path | None = None,
) -> RunData:
    """Open what `data` describes: prepared folders, a stream, or the embedded corpus, prepared on first use.

    Args:
      data: the run's data.
      seed: decides the order of rows.
      process_index: which slice of every batch this process makes.
      process_count: slices of a batch.
      tokenizer_folder: of the tokenizer that the data must have, but for special tokens that were added to it; None:
        any. The embedded corpus is prepared with it.

    Raises:
      InputError: something is missing, damaged, or does not fit the configuration.
    """
    wanted = None if tokenizer_folder is None else Tokenizer.load(tokenizer_folder)
    folders, length = _folders(data, wanted), data.sequence_length
    read_manifest(folders[0])  # says what is wrong with other folders
    for folder, again in itertools.combinations(folders, 2):
        if folder.resolve() == again.resolve():
            raise InputError(f"data.prepared = {data.prepared}: {again} is given twice; give it once, with a weight")
    if data.prepared and data.validation_fraction != DataConfig.validation_fraction and process_index == 0:
        print(
            f"data.validation_fraction = {data.validation_fraction} has no effect: {folders[0]} is split already",
            file=sys.stderr,
        )
    tokenizer = Tokenizer.load(folders[0] / "tokenizer")
    if wanted is not None and tokenizer.added_to(wanted) is None:
        raise InputError(
            f"{folders[0]}: was prepared with another tokenizer than the model's; prepare the text again, with "
            f"prepare_data.py --tokenizer {tokenizer_folder}"
        )
    if data.prepared and tokenizer.vocab_size > data.tokenizer_size:
        raise InputError(
            f"data.tokenizer_size = {data.tokenizer_size}: the tokenizer of {folders[0]} has {tokenizer.vocab_size} "
            f"entries; pass --data.tokenizer-size {tokenizer.vocab_size} --model.vocab-size {tokenizer.vocab_size}"
        )
    batches = _Batches(batch_size=data.batch_size, process_index=process_index, process_count=process_count)
    train: PackedData | Mixture | StreamedData
    if data.stream:
        sample = PackedData(folders[0], "validation", sequence_length=length, batch_size=1)
        train = StreamedData(data.stream, sample, seed=seed, **batches)
    elif len(folders) == 1:
        train = PackedData(folders[0], sequence_length=length, seed=seed, **batches)
    else:
        sources = [PackedData(folder, sequence_length=length, batch_size=1, seed=seed) for folder in folders]
        train = Mixture(sources, data.weights, **batches)
    identity = {
        f"{name}: {key}": value
        for name, folder in zip(data.prepared or [data.source], folders, strict=True)
        for key, value in read_manifest(folder).identity().items()
    }
    if isinstance(train, StreamedData):
        identity |= {f"data.stream: file {i}": str(file) for i, file in enumerate(train.files)}
    return RunData(train, _validation(folders, length, tokenizer, batches), tokenizer, folders[0], identity)


def prepared_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of prepared data; None for the embedded corpus, which may be prepared with any.

    Raises:
      InputError: there are no such data.
    """
    if not data.prepared:
        return None
    folder = local_copy(data.prepared[0], data.folder)
    read_manifest(folder)
    return Tokenizer.load(folder / "tokenizer")


def open_validation(
    data: DataConfig, tokenizer: Tokenizer, *, make_with_it: bool = False, state: DataState | None = None
) -> Chain:
    """The validation split alone, for a model with this tokenizer.

    Args:
      data: the run's data.
      tokenizer: the model's.
      make_with_it: embedded corpus only: prepare it with this tokenizer instead of the one it is trained with.
      state: of the data that the run was trained on, to be compared.

    Raises:
      InputError: as `open_data`, or the data belong to another tokenizer, or are not those of `state`.
    """
    folders = _folders(data, tokenizer if make_with_it else None)
    if state is not None:
        check_sources(state, [(folder, read_manifest(folder)) for folder in folders])
    batches = _Batches(batch_size=data.batch_size, process_index=0, process_count=1)
    return _validation(folders, data.sequence_length, tokenizer, batches)


def _folders(data: DataConfig, tokenizer: Tokenizer | None = None) -> list[Path]:
    if data.prepared:
        return [local_copy(folder, data.folder) for folder in data.prepared]
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer_size=tokenizer.vocab_size)
        trained = prepared_folder(data) / "tokenizer"  # on the corpus itself
        if trained.exists() and Tokenizer.load(trained).hash == tokenizer.hash:
            tokenizer = None
    return [prepare_embedded(data, tokenizer=tokenizer)]


def _validation(folders: list[Path], length: int, tokenizer: Tokenizer, batches: _Batches) -> Chain:
    sources = [
        PackedData(f, "validation", sequence_length=length, shuffle=False, tokenizer_hash=tokenizer.hash, **batches)
        for f in folders
    ]
    if not any(source.len_rows for source in sources):
        raise InputError(f"{folders[0]}: holds no validation rows; prepare it with a validation fraction above 0")
    return Chain([source for source in sources if source.len_rows])
