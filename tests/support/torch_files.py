"""Files as torch saves them: a zip archive with a pickle and raw numbers, written here without torch."""

import struct
import zipfile

import numpy as np


def _text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value):
    return b"J" + struct.pack("<i", value)


def _numbers(values):
    return b"(" + b"".join(map(_number, values)) + b"t"


def _tensor(key, x, kind):
    strides = [s // x.itemsize for s in x.strides]
    storage = b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu") + _number(x.size)
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + b"tQ" + _number(0) + _numbers(x.shape) + _numbers(strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def save_torch(file, tensors, shared=None, before_end=b"", kind="FloatStorage"):
    """Write tensors as `torch.save` does; `shared` names a second tensor over the numbers of a first.

    before_end: opcodes that end the pickle's dict.
    """
    keys = {name: str(i) for i, name in enumerate(tensors)}
    items = [(name, name) for name in tensors] + list((shared or {}).items())
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R("
    pickled += b"".join(_text(name) + _tensor(keys[of], tensors[of], kind) for name, of in items)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pytorch_model/data.pkl", pickled + before_end + b"u.")
        archive.writestr("pytorch_model/byteorder", "little")
        for name, key in keys.items():
            archive.writestr(f"pytorch_model/data/{key}", np.asarray(tensors[name]).tobytes())
        archive.writestr("pytorch_model/version", "3\n")
