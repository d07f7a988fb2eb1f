"""Tensors in a Hugging Face folder, one at a time: the safetensors format and its sharded index; torch's is read too.

A file is an 8-byte length, a JSON header (name -> dtype, shape, byte range) and the raw data. The package safetensors
would map whole files into memory, or write from a complete dict of arrays; this holds one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rdlm.config import InputError
from rdlm.hf.pickles import read_pickle

Header = dict[str, Any]
"""Of a safetensors file: name -> {"dtype", "shape", "data_offsets"}."""

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_HEADER = 100_000_000


class Stored(NamedTuple):
    """The place of a tensor: file, dtype code, shape, first byte and number of bytes."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder, from model.safetensors or from the files its index names.

    Without either, from pytorch_model.bin or the files of its index.

    Raises:
      InputError: no weights, a corrupt, truncated or missing file, or an index that does not fit its files.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.exists():
            raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; move the one that is not meant elsewhere")
        return read_header(folder / SINGLE)
    read = read_header
    if not index.is_file() and (folder / PICKLE).is_file():
        return _read_pickle(folder / PICKLE)
    if not index.is_file() and (folder / PICKLE_INDEX).is_file():
        index, read = folder / PICKLE_INDEX, _read_pickle
    if not index.is_file():
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX} nor {PICKLE}")
    try:
        placed = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        files = sorted(set(placed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of files with tensors ({error!r})") from error
    found: dict[str, Stored] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: file {name!r}: must be a file name inside the folder")
        if not (folder / name).is_file():
            lost = sorted(tensor for tensor, file in placed.items() if file == name)
            raise InputError(f"{folder / name}: missing; the index places {len(lost)} tensors there, first {lost[0]}")
        header = read(folder / name)
        for tensor in header:
            if placed.get(tensor) != name:
                raise InputError(f"{folder / name}: tensor {tensor} is not placed there by {index.name}")
        found |= header
    for tensor, name in placed.items():
        if tensor not in found:
            raise InputError(f"{folder / name}: tensor {tensor} is missing, though {index.name} places it there")
    return found


def _read_pickle(file: Path) -> dict[str, Stored]:
    return {name: Stored(file, *place) for name, place in read_pickle(file).items()}


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; their places are checked against its size.

    Raises:
      InputError: a corrupt or truncated file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise InputError(f"{file}: not a safetensors file, or cut off within its header ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _stored(name, file, length + 8, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{file}: corrupt safetensors header ({error})") from error
    position = length + 8
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            raise InputError(f"{file}: tensor {name}: starts at byte {entry.start}, expected {position}")
        position += entry.nbytes
        if position > size:
            raise InputError(f"{file}: tensor {name}: cut off, ends at byte {position} of a file of {size}")
    if position != size:
        raise InputError(f"{file}: {size - position} bytes beyond the last tensor")
    return entries


def _stored(name: str, file: Path, base: int, entry: Header) -> Stored:
    first, last = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    stored = Stored(file, str(entry["dtype"]), shape, base + first, last - first)
    expected = math.prod(shape) * DTYPES[stored.code].itemsize if stored.code in DTYPES else stored.nbytes
    if min(shape, default=1) < 0 or stored.nbytes != expected or stored.nbytes < 0:
        raise ValueError(f"{name}: a {stored.code} of shape {list(shape)} does not fill bytes {first} to {last}")
    return stored


def read_tensor(name: str, tensor: Stored) -> np.ndarray:
    """The bits of a tensor, as unsigned integers.

    Raises:
      InputError: a dtype that rdlm does not support, or a file that changed since its header was read.
    """
    if tensor.code not in DTYPES:
        raise InputError(f"{tensor.file}: tensor {name}: {unsupported(tensor)}")
    count = math.prod(tensor.shape)
    # As unsigned integers, because numpy transposes those at full speed, unlike bf16.
    bits = np.fromfile(tensor.file, f"<u{DTYPES[tensor.code].itemsize}", count, offset=tensor.start)
    if bits.size != count:
        raise InputError(f"{tensor.file}: tensor {name}: cut off while reading")
    return bits.reshape(tensor.shape)


def unsupported(tensor: Stored) -> str:
    """What is wrong with a dtype that is not in `DTYPES`."""
    return f"dtype {tensor.code}: must be one of {', '.join(DTYPES)}"


class Planned(NamedTuple):
    """A tensor to write: dtype, shape, and a function that returns its values when they are needed."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(folder: Path, tensors: dict[str, Planned], shard_bytes: int) -> None:
    """Write model.safetensors, or several files of at most `shard_bytes` and their index."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors)
        return
    placed: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        placed |= dict.fromkeys(names, file)
    total = sum(planned.nbytes for planned in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: dict[str, Planned], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, planned in tensors.items():
        if names and held + planned.nbytes > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += planned.nbytes
    yield names


def write_file(file: Path, tensors: dict[str, Planned]) -> None:
    """Write one safetensors file, with the metadata that the reference's loader needs ("format": "pt")."""
    # Wide dtypes first, so that every tensor is aligned to its dtype.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: Header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        planned = tensors[name]
        span = [position, position + planned.nbytes]
        header[name] = {"dtype": CODES[planned.dtype], "shape": list(planned.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # Not tofile, which does not say why it fails.
            stream.write(np.ascontiguousarray(tensors[name].make()).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
