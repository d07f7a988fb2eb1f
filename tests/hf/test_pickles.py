"""pytorch_model.bin: read without torch, and nothing in it is run."""

import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, model
from safetensors.numpy import load_file
from torch_files import save_torch

from rdlm.config import InputError
from rdlm.hf import load_huggingface

SOURCE = GOLDEN / "families/parcae"
TENSORS = load_file(SOURCE / "model.safetensors")
ONE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture
def folder(tmp_path):
    shutil.copy(SOURCE / "config.json", tmp_path)
    return tmp_path


def test_a_published_pickle_is_read(folder):
    tied = {name: x for name, x in TENSORS.items() if name != "lm_head.weight"}
    save_torch(folder / "pytorch_model.bin", tied, {"lm_head.weight": "transformer.wte.weight"})
    params, config = load_huggingface(folder)
    assert config == model("families/parcae")[1]
    jax.tree.map(np.testing.assert_array_equal, params, model("families/parcae")[0])


def test_several_files_and_their_index(folder):
    names = sorted(TENSORS)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_torch(folder / file, {name: TENSORS[name] for name in names if files[name] == file})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(folder)[0], model("families/parcae")[0])
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files | {"ghost": "x.bin"}}))
    with pytest.raises(InputError, match=r"x\.bin: missing; the index places 1 tensors there, first ghost"):
        load_huggingface(folder)


def changed(file, change):
    """Rewrite the archive with `change(name, data)` for every entry."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


RUN = b"X\x01\x00\x00\x00xcbuiltins\nprint\n(X\x03\x00\x00\x00ranR"  # calls print


@pytest.mark.parametrize(
    ("words", "write"),
    [
        ("not a zip file", lambda file: file.write_bytes(b"\x80\x02}.")),
        ("holds a builtins.print", lambda file: save_torch(file, ONE, before_end=RUN)),
        ("something else than tensors", lambda file: save_torch(file, ONE, before_end=b"X\x01\x00\x00\x00xN")),
        ("holds a torch.QInt8Storage", lambda file: save_torch(file, ONE, kind="QInt8Storage")),
        ("w is not contiguous", lambda file: save_torch(file, {"w": ONE["w"].T})),
        ("does not fit its storage of 24 bytes", lambda file: save_torch(file, ONE, kind="DoubleStorage")),
    ],
)
def test_what_is_not_read_says_how_to_convert(folder, capsys, words, write):
    write(folder / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        load_huggingface(folder)
    assert words in str(error.value)
    assert "pytorch_model.bin: not read" in str(error.value)
    assert "weights_only=True" in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("not little-endian", lambda name, data: b"big" if name.endswith("byteorder") else data),
        ("does not fit its storage", lambda name, data: data[:-4] if "/data/" in name else data),
        ("not read", lambda name, data: data[:-9] if name.endswith(".pkl") else data),
    ],
)
def test_a_damaged_pickle_is_one_line(folder, words, change):
    save_torch(folder / "pytorch_model.bin", ONE)
    changed(folder / "pytorch_model.bin", change)
    with pytest.raises(InputError, match=words) as error:
        load_huggingface(folder)
    assert "\n" not in str(error.value)


def test_safetensors_win(folder):
    shutil.copy(SOURCE / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert load_huggingface(folder)[1] == model("families/parcae")[1]
