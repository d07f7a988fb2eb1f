"""The data of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rdlm.config import DataConfig, InputError
from rdlm.data.fetch import local_copy
from rdlm.data.loader import PackedData
from rdlm.data.mixture import Chain, Mixture
from rdlm.data.prepare.embedded import prepare_embedded
from rdlm.data.stream import StreamedData
from rdlm.tokenizer import Tokenizer


class RunData(NamedTuple):
    """What training reads. `train` has batch(step), state(step), restore(step, state) and steps_per_epoch."""

    train: PackedData | Mixture | StreamedData
    validation: Chain
    tokenizer: Tokenizer
    folder: Path
    """Of the (first) prepared data, for messages."""


def open_data(data: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1) -> RunData:
    """Open what `data` describes: prepared folders, a stream, or the embedded corpus, prepared on first use.

    Args:
      data: the run's data.
      seed: of the order of rows.
      process_index: which slice of every batch this process makes.
      process_count: of them.

    Raises:
      InputError: something is missing, damaged, or does not fit the configuration.
    """
    folders = _folders(data)
    tokenizer = Tokenizer.load(folders[0] / "tokenizer")
    if data.prepared and tokenizer.vocab_size > data.tokenizer_size:
        raise InputError(
            f"data.tokenizer_size = {data.tokenizer_size}: the tokenizer of {folders[0]} has {tokenizer.vocab_size} "
            f"entries; pass --data.tokenizer-size {tokenizer.vocab_size} --model.vocab-size {tokenizer.vocab_size}"
        )
    slices: dict[str, Any] = {"process_index": process_index, "process_count": process_count}
    train: PackedData | Mixture | StreamedData
    if data.stream:
        train = StreamedData(
            data.stream, PackedData(folders[0], "validation", sequence_length=data.sequence_length, batch_size=1),
            batch_size=data.batch_size, seed=seed, **slices,
        )  # fmt: skip
    elif len(folders) == 1:
        train = PackedData(
            folders[0], sequence_length=data.sequence_length, batch_size=data.batch_size, seed=seed, **slices
        )
    else:
        sources = [PackedData(f, sequence_length=data.sequence_length, batch_size=1, seed=seed) for f in folders]
        train = Mixture(sources, data.weights, batch_size=data.batch_size, **slices)
    return RunData(train, _validation(folders, data, tokenizer, **slices), tokenizer, folders[0])


def open_validation(data: DataConfig, tokenizer: Tokenizer, *, make_with_it: bool = False) -> Chain:
    """The validation split alone, for a model with this tokenizer.

    Args:
      data: the run's data.
      tokenizer: the model's.
      make_with_it: embedded corpus only: prepare it with this tokenizer instead of the one it is trained with.

    Raises:
      InputError: as `open_data`, or the data belong to another tokenizer.
    """
    folders = _folders(data, tokenizer if make_with_it else None)
    return _validation(folders, data, tokenizer)


def _folders(data: DataConfig, tokenizer: Tokenizer | None = None) -> list[Path]:
    if not data.prepared:
        return [prepare_embedded(data, tokenizer=tokenizer)]
    return [local_copy(folder, data.folder) for folder in data.prepared]


def _validation(
    folders: list[Path], data: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Chain:
    sources = [
        PackedData(
            folder, "validation", sequence_length=data.sequence_length, batch_size=data.batch_size, shuffle=False,
            tokenizer_hash=tokenizer.hash, process_index=process_index, process_count=process_count,
        )
        for folder in folders
    ]  # fmt: skip
    if not any(source.len_rows for source in sources):
        raise InputError(f"{folders[0]}: holds no validation rows; prepare it with a validation fraction above 0")
    return Chain([source for source in sources if source.len_rows])
