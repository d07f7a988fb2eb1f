"""Folders that differ from what the reference saves: taken where harmless, else refused in one clear line."""

import json
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, model
from safetensors.numpy import load_file, save_file

from rdlm.checkpoint import load_checkpoint
from rdlm.config import PRESETS, InputError, differences
from rdlm.hf import load_huggingface, model_config, save_huggingface

WTE = "transformer.wte.weight"


def edited(tmp_path, change=None, tensors=None, source="A2"):
    """A copy of a golden folder with config fields and tensors changed (None removes)."""
    folder = tmp_path / "edited"
    shutil.copytree(GOLDEN / source, folder)
    for file, edits, load, save in (
        ("config.json", change, lambda p: json.loads(p.read_text()), lambda x, p: p.write_text(json.dumps(x))),
        ("model.safetensors", tensors, load_file, lambda x, p: save_file(x, p, {"format": "pt"})),
    ):
        if edits:
            content = load(folder / file) | edits
            save({k: v for k, v in content.items() if v is not None}, folder / file)
    return folder


def expect_error(folder, *words):
    with pytest.raises(InputError) as error:
        load_huggingface(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Round trips


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod.", "model.module."])
def test_names_with_the_prefix_of_a_wrapper(prefix, tmp_path):
    tensors = {prefix + k: v for k, v in load_file(GOLDEN / "A2/model.safetensors").items()}
    folder = edited(tmp_path)
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(folder)[0], model("A2")[0])


EXPORTS = """
import sys
import jax
import rdlm

params, config = rdlm.load_huggingface(sys.argv[1])
for i in range(10**6):
    scaled = jax.tree.map(lambda x: x * (1 + i % 2), params)
    rdlm.save_huggingface(sys.argv[2], scaled, config, shard_bytes=int(sys.argv[3]))
    print("saved", flush=True)
"""


@pytest.mark.parametrize("shard_bytes", [30_000, 10**9])
def test_an_export_that_is_killed_over_an_earlier_one_leaves_one_of_them_or_none_and_no_mixture(shard_bytes, tmp_path):
    params, config = model("A2")
    folder, draw = tmp_path / "out", random.Random(shard_bytes)
    for _ in range(3):
        command = [sys.executable, "-c", EXPORTS, GOLDEN / "A2", folder, shard_bytes]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
        (folder / "mine.txt").write_text("mine")
        try:
            found = load_huggingface(folder)[0]
        except InputError:
            continue
        scale = np.asarray(found["wte"]).max() / np.asarray(params["wte"]).max()
        assert scale in (1, 2)
        jax.tree.map(lambda x, y, scale=scale: np.testing.assert_array_equal(x, y * scale), found, params)
    save_huggingface(folder, params, config, shard_bytes=shard_bytes)
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(folder)[0], params)
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_single_file_beside_an_index(tmp_path):
    save_huggingface(tmp_path, *model("A2"), shard_bytes=30_000)
    shutil.copy(GOLDEN / "A2/model.safetensors", tmp_path)
    expect_error(tmp_path, "model.safetensors and model.safetensors.index.json", "move")


def test_paths_of_another_kind(tmp_path):
    expect_error(GOLDEN / "A2/model.safetensors", "is a file", "folder")
    expect_error(GOLDEN / "A2/config.json", "is a file", "folder")
    (tmp_path / "config.json").write_text('{"model": {"vocab_size": 3}}')
    expect_error(tmp_path, "a run folder", "load_checkpoint")
    with pytest.raises(InputError, match="a Hugging Face folder; convert it first"):
        load_checkpoint(GOLDEN / "A2")
    with pytest.raises(InputError, match="is a file"):
        load_checkpoint(GOLDEN / "A2/model.safetensors")


def test_a_byte_order_mark_is_read_over(tmp_path):
    folder = edited(tmp_path)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    load_huggingface(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_base", "Infinity"), ("rope_base", "1e300"), ("rope_base", "1" + 400 * "0"), ("rope_base", "NaN"),
        ("norm_eps", "NaN"), ("norm_eps", "Infinity"), ("mean_recurrence", "1000000000"),
        ("mean_recurrence", "1" + 50 * "0"), ("mean_backprop_depth", "1000000000"),
        ("n_layers_in_prelude", "1000000000"), ("block_size", "1" + 20 * "0"), ("test_time_noise", "-Infinity"),
    ],
)  # fmt: skip
def test_silly_numbers_are_refused_at_once(name, value, tmp_path):
    folder = edited(tmp_path, {name: 12321})
    path = folder / "config.json"
    path.write_text(path.read_text().replace("12321", value))
    expect_error(folder, "config.json", f"{name} = ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"vocab_size": ' + 5000 * "1" + "}", "\ufeff", "{}{}"])
def test_json_that_no_reader_can_take(text, tmp_path):
    folder = edited(tmp_path)
    (folder / "config.json").write_text(text)
    expect_error(folder, "config.json", "not readable as JSON")


def test_rows_that_the_config_does_not_allow(tmp_path):
    wte = load_file(GOLDEN / "A2/model.safetensors")[WTE]
    expect_error(edited(tmp_path, tensors={WTE: wte[:100]}), "vocab_size", WTE, "100 rows")


def test_raw_training_names(tmp_path):
    tensors = {f"_orig_mod._original_module.{k}": v for k, v in load_file(GOLDEN / "A2/model.safetensors").items()}
    folder = edited(tmp_path)
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(folder)[0], model("A2")[0])


def test_a_tied_head_may_be_stored(tmp_path):
    wte = load_file(GOLDEN / "A2/model.safetensors")[WTE]
    params, _ = load_huggingface(edited(tmp_path, tensors={"lm_head.weight": wte}))
    assert "head" not in params


def test_freqs_cis_is_ignored(tmp_path):
    load_huggingface(edited(tmp_path, tensors={"freqs_cis": None}))


# Config


def test_published_config_is_the_preset():
    fields = json.loads((GOLDEN / "huginn_config.json").read_text())
    assert "n_heads" not in fields
    found = differences(model_config(fields), PRESETS["huginn_3p5b"].model)
    assert set(found) <= {"param_dtype", "compute_dtype"}


def test_absent_fields_take_the_references_defaults():
    assert model_config({}) == model_config(json.loads((GOLDEN / "huginn_config.json").read_text()))


def test_stale_derived_fields_are_ignored():
    # What the reference saves when constructed with num_attention_heads: 55 heads everywhere else.
    stale = {"n_embd": 110, "num_attention_heads": 5, "n_heads": 5, "num_key_value_heads": 55, "head_dim": 2}
    config = model_config(stale | {"intermediate_size": 8, "n_layers_in_prelude": 1, "n_layers": 8})
    assert (config.num_heads, config.kv_heads, config.head_dim) == (5, 5, 22)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_class_name": "LayerNorm"}, {"block_class_name": "TransformerPreNormBlock"},
        {"mlp_class_name": "BaseMLP"}, {"nonlin_name": "GELU"}, {"injection_type": "add"}, {"bias": True},
        {"architecture_class_name": "GPT"},
        {"state_init": "normal"}, {"model_type": "mamba"}, {"init_strategy": "scaled"}, {"qk_norm": True},
        {"head_dim": 16}, {"n_layers": 9}, {"num_key_value_heads": 3}, {"num_attention_heads": 4},
        {"n_embd": "24"}, {"n_embd": 25}, {"n_embd": -24}, {"n_heads": 0}, {"rope_base": 0}, {"norm_eps": "1e-6"},
        {"tie_embeddings": "no"}, {"tie_embeddings": 1}, {"mean_recurrence": 0}, {"mean_backprop_depth": 2.5},
        {"test_time_noise_type": "pink"}, {"vocab_size": 200}, {"padding_multiple": 0},
        {"init_values": {"embed_scale": 1}}, {"n_layers_in_coda": "1"}, {"padded_vocab_size": "x"},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)  # fmt: skip
def test_wrong_config_names_the_field(change, tmp_path):
    expect_error(edited(tmp_path, change), "config.json", next(iter(change)))


def test_wrong_width_names_the_tensor(tmp_path):
    expect_error(edited(tmp_path, {"intermediate_size": 47}), "mlp.fc.weight", "[96, 24]", "[94, 24]")


# Weights


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("transformer.core_block.1.attn.proj.weight", None, ["missing"]),
        (WTE, None, ["missing"]),
        ("transformer.core_block.2.norm_1.weight", np.ones(24, np.float32), ["no place"]),
        ("transformer.adapter.weight", np.ones((48, 24), np.float32), ["[48, 24]", "[24, 48]"]),
        ("transformer.ln_f.weight", np.ones(24, np.int8), ["I8"]),
        (WTE, np.ones((128, 24)), ["F64"]),
    ],
    ids=["missing", "no embedding", "extra", "shape", "dtype", "dtype of the embedding"],
)
def test_wrong_tensor_is_named(name, value, words, tmp_path):
    expect_error(edited(tmp_path, tensors={name: value}), name, *words)


def test_missing_head(tmp_path):
    expect_error(edited(tmp_path, {"tie_embeddings": False}), "lm_head.weight", "missing", "tie_embeddings")


def test_a_tied_head_that_differs(tmp_path):
    wte = load_file(GOLDEN / "A2/model.safetensors")[WTE]
    expect_error(edited(tmp_path, tensors={"lm_head.weight": wte + 1}), "lm_head.weight", "tie_embeddings")


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, 60_000, -1])
def test_truncated_file(keep, tmp_path):
    folder = edited(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    expect_error(folder, "model.safetensors", "cut off")
    if keep in (60_000, -1):
        with pytest.raises(InputError, match=r"tensor transformer\.\S+: cut off"):
            load_huggingface(folder)


def test_trailing_bytes(tmp_path):
    folder = edited(tmp_path)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    expect_error(folder, "model.safetensors", "4 bytes")


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{broken}", b"\x02" + b"\0" * 7 + b"[]", b"hello world, this is no model"],
)
def test_corrupt_header(content, tmp_path):
    folder = edited(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    expect_error(folder, "model.safetensors")


def test_corrupt_entry(tmp_path):
    folder = edited(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(re.sub(rb'"shape":\[24,48\]', b'"shape":[24,49]', whole))
    expect_error(folder, "model.safetensors", "[24, 49]")


def test_corrupt_config(tmp_path):
    folder = edited(tmp_path)
    for text in ("{", "[1]", ""):
        (folder / "config.json").write_text(text)
        expect_error(folder, "config.json")


def test_missing_files(tmp_path):
    expect_error(tmp_path / "nothing", "nothing", "no such folder")
    expect_error(tmp_path, "config.json", "missing")
    folder = edited(tmp_path)
    (folder / "model.safetensors").unlink()
    expect_error(folder, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    expect_error(folder, "pytorch_model.bin")


def test_index_errors(tmp_path):
    save_huggingface(tmp_path, *model("A2"), shard_bytes=30_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["transformer.ln_f.weight"]

    def with_map(**changes):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    for text in ("{", "{}", '{"weight_map": 3}'):
        path.write_text(text)
        expect_error(tmp_path, "index.json")
    with_map(**{"transformer.ghost.weight": file})
    expect_error(tmp_path, "transformer.ghost.weight", file)
    with_map(**{"transformer.ghost.weight": "model-00099-of-00099.safetensors"})
    expect_error(tmp_path, "model-00099-of-00099.safetensors", "transformer.ghost.weight")
    with_map(**{"transformer.ghost.weight": "../elsewhere.safetensors"})
    expect_error(tmp_path, "../elsewhere.safetensors")
    path.write_text(
        json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != "transformer.ln_f.weight"}})
    )
    expect_error(tmp_path, "transformer.ln_f.weight")
