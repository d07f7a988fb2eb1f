"""experiments/quantize.py: what it writes is read by everything that only runs a model, and refused by training."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN

import rdlm
from rdlm.checkpoint import read_config, save_parameters
from rdlm.config import PRESETS
from rdlm.data import open_data
from rdlm.tune import SCALE


@pytest.fixture(scope="module")
def folder(nano_data, tmp_path_factory):
    """A run folder with random parameters, on the invented text of conftest.py."""
    run = PRESETS["nano"]
    data = dataclasses.replace(run.data, folder=str(nano_data), validation_fraction=0.1)
    tokenizer = open_data(data, seed=0).tokenizer
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, mean_recurrence=2), data=data)
    folder = tmp_path_factory.mktemp("runs") / "run"
    meta = {"config": dataclasses.asdict(run), "tokenizer": tokenizer.hash, "step": 0}
    save_parameters(folder, rdlm.init_params(run.model, jax.random.key(0)), run, json.loads(json.dumps(meta)))
    tokenizer.save(folder / "tokenizer")
    return folder


def nbytes(folder):
    return sum(x.nbytes for x in jax.tree.leaves(rdlm.load(folder).params))


@pytest.fixture(scope="module")
def small(folder):
    """The same, quantized."""
    source = rdlm.load(folder)
    return rdlm.quantize(source.params, source.config, embeddings=True)


def test_a_folder_holds_what_quantize_returns_bit_for_bit(folder, small, tmp_path, command):
    code, out, err = command("quantize", folder, tmp_path / "small", "--embeddings")
    assert code == 0, err
    assert f"wrote run folder {tmp_path / 'small'}" in out
    read, config = rdlm.load_checkpoint(tmp_path / "small")
    assert jax.tree.structure(read) == jax.tree.structure(small)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(small), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert config == rdlm.load(folder).config
    assert nbytes(tmp_path / "small") < 0.4 * nbytes(folder)
    # It is evaluated on the data of its source, at nearly its loss.
    assert read_config(tmp_path / "small").data == read_config(folder).data
    before, after = (rdlm.load(f).evaluate([1, 4], batches=1) for f in (folder, tmp_path / "small"))
    np.testing.assert_allclose(after.nats, before.nats, rtol=5e-3)
    assert after.nats != before.nats
    code, out, err = command("generate", tmp_path / "small", "--prompt", "12 ba", "--max-new-tokens", "3")
    assert code == 0, err
    code, _, err = command("quantize", tmp_path / "small", tmp_path / "again")
    assert (code, err.count("\n")) == (2, 1)
    assert "small: the matrices are quantized (int8)" in err


def test_a_hugging_face_folder_and_other_dtypes(tmp_path, command):
    source = GOLDEN / "families/llama"
    for dtype, stored in (("float8_e4m3fn", "float8_e4m3fn"), ("bfloat16", "bfloat16")):
        code, _, err = command("quantize", source, tmp_path / dtype, "--dtype", dtype)
        assert code == 0, err
        params, config = rdlm.load_checkpoint(tmp_path / dtype)
        assert params["core_0"]["mlp"]["fc"].dtype == stored
        assert config.param_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert ("fc" + SCALE in params["core_0"]["mlp"]) == (dtype != "bfloat16")


def test_refused_in_one_line(folder, small, tmp_path, command):
    source = rdlm.load(folder)
    made = tmp_path / "small"
    assert command("quantize", folder, made)[0] == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    new = tmp_path / "new"
    shutil.copytree(GOLDEN / "families/llama", tmp_path / "llama")
    cases = {
        "is not an empty folder": ("quantize", folder, tmp_path / "full"),
        "no such folder": ("quantize", tmp_path / "none", new),
        "--embeddings: --dtype bfloat16": ("quantize", folder, new, "--embeddings", "--dtype", "bfloat16"),
        "step = 7": ("quantize", folder, new, "--step", 7),
        "leave out step and ema": ("quantize", tmp_path / "llama", new, "--step", 1),
        "kept no moving average": ("quantize", folder, new, "--ema"),
        "its matrices are quantized (int8), so it cannot be trained; train " + str(folder): (
            "train", "nano", "--init", made, "--run-dir", new,
        ),
        "export: the matrices are quantized (int8)": ("convert_huggingface", made, new),
        "there is nothing to merge": ("merge_adapter", made, new),
        "retrofit: the matrices are quantized (int8)": ("retrofit", made, new),
    }  # fmt: skip
    for words, arguments in cases.items():
        code, _, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
        assert not new.exists()
    code, _, err = command("train", "nano", "--run-dir", made)
    print(err)
    assert code == 2
    assert err.count("\n") == 1
    assert source.config == rdlm.load(made).config
