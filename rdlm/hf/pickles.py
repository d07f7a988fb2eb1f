"""Where the tensors of a `pytorch_model.bin` lie, without torch and without running what a pickle asks for.

Such a file is a zip archive: a pickle with the names, and one uncompressed entry of raw numbers for each storage. The
unpickler here knows dicts, tensors and storages, and refuses every other name.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rdlm.config import InputError

ROOT = "data.pkl"

STORAGES = {
    "FloatStorage": ("F32", 4),
    "BFloat16Storage": ("BF16", 2),
    "HalfStorage": ("F16", 2),
    "DoubleStorage": ("F64", 8),
    "ComplexFloatStorage": ("C64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "BoolStorage": ("BOOL", 1),
}
"""torch's class -> (dtype as safetensors writes it, bytes of an element)."""

CONVERT = (
    "convert it where torch is: safetensors.torch.save_file({k: v.clone() for k, v in "
    "torch.load(FILE, weights_only=True).items()}, 'model.safetensors')"
)


class Place(NamedTuple):
    """Of a tensor in a file: dtype, shape, first byte, number of bytes."""

    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> _Tensor:
    return _Tensor(storage, offset, size, stride)


def _parameter(tensor: _Tensor, *_: object) -> _Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Builds dicts, tensors and storages alone."""

    def find_class(self, module: str, name: str) -> Callable[..., object] | str:
        """What may be called for a name in the pickle; a storage's class stays a name."""
        known: dict[str, Callable[..., object]] = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
        }
        if module == "torch" and name in STORAGES:
            return name
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"holds a {module}.{name}, expected tensors alone")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: its class and the name of its entry."""
        return _Storage(pid[1], str(pid[2]))


def read_pickle(file: Path) -> dict[str, Place]:
    """The tensors of one file by name; several may share their numbers.

    Raises:
      InputError: anything but a dict of contiguous tensors in a zip archive of torch.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            root = next((name for name in archive.namelist() if name.endswith(f"/{ROOT}")), f"/{ROOT}")
            folder = root.removesuffix(ROOT)
            with archive.open(root) as source:
                tensors = _Unpickler(source).load()
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("numbers are not little-endian")
            if not isinstance(tensors, dict) or not all(isinstance(x, _Tensor) for x in tensors.values()):
                raise ValueError("holds something else than tensors by name")
            return {str(name): _place(str(name), x, archive, folder, stream) for name, x in tensors.items()}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{file}: not read ({error}); {CONVERT}") from error


def _place(name: str, tensor: _Tensor, archive: zipfile.ZipFile, folder: str, stream: Any) -> Place:
    code, itemsize = STORAGES[tensor.storage.kind]
    entry = archive.getinfo(f"{folder}data/{tensor.storage.key}")
    shape = tuple(int(n) for n in tensor.size)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(n > 1 and step != stride for n, step, stride in zip(shape, steps, tensor.stride, strict=True)):
        raise ValueError(f"tensor {name} is not contiguous")
    nbytes, first = math.prod(shape) * itemsize, tensor.offset * itemsize
    if entry.compress_type != zipfile.ZIP_STORED or min((*shape, first)) < 0 or first + nbytes > entry.file_size:
        raise ValueError(f"tensor {name} does not fit its storage of {entry.file_size} bytes")
    stream.seek(entry.header_offset)
    header = stream.read(30)  # ends with the lengths of a name and an extra field, which follow
    if header[:4] != b"PK\3\4":
        raise ValueError(f"tensor {name}: its storage is not where the archive says")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return Place(code, shape, entry.header_offset + 30 + lengths + first, nbytes)
