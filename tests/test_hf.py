"""Hugging Face folders: bit-exact round trips, the reference's layout, and one clear line for whatever is wrong."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN, MODELS, model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdlm.config import PRESETS, InputError, ModelConfig, differences
from rdlm.hf import load_huggingface, model_config, save_huggingface, table
from rdlm.hf.names import to_ours, to_theirs
from rdlm.model import cast, init_params

WTE = "transformer.wte.weight"
TINY = ModelConfig(
    vocab_size=20, embed_dim=12, num_heads=2, mlp_dim=10, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=16, mean_recurrence=2, backprop_depth=1,
)  # fmt: skip

fresh = jax.jit(init_params, static_argnums=0)


def read(folder):
    """Every tensor of a folder, as the safetensors package reads it."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


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


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_every_bit(name, tmp_path):
    params, config = load_huggingface(GOLDEN / name)
    save_huggingface(tmp_path / "out", params, config)
    before, after = read(GOLDEN / name), read(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before.keys() - {"freqs_cis"}:
        assert same_bits(before[key], after[key]), key
    np.testing.assert_allclose(after["freqs_cis"], before["freqs_cis"], atol=2e-6, rtol=0)
    assert after["freqs_cis"].shape == before["freqs_cis"].shape
    again, config_again = load_huggingface(tmp_path / "out")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("name", ["A", "A2"])
def test_config_is_written_as_the_reference_writes_it(name, tmp_path):
    save_huggingface(tmp_path / "out", *model(name))
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out/config.json").read_text())
    # Not in ModelConfig: any multiple that leads to the same rows will do.
    assert ours["padded_vocab_size"] % ours.pop("padding_multiple") == theirs.pop("padding_multiple") * 0
    assert ours == theirs


def test_names_and_shapes_are_the_references():
    # Spec section 7, written out for one block of each kind.
    config = ModelConfig(vocab_size=20, embed_dim=12, num_heads=2, mlp_dim=10, tie_embeddings=False)
    shapes = {name: entry.shape for name, entry in table(config).items()}
    block = {
        "norm_1.weight": (12,), "norm_2.weight": (12,), "norm_3.weight": (12,), "norm_4.weight": (12,),
        "attn.qk_bias": (2, 1, 2, 6), "attn.Wqkv.weight": (36, 12), "attn.proj.weight": (12, 12),
        "mlp.fc.weight": (20, 12), "mlp.proj.weight": (12, 10),
    }  # fmt: skip
    expected = {
        WTE: (20, 12), "lm_head.weight": (20, 12), "transformer.adapter.weight": (12, 24),
        "transformer.ln_f.weight": (12,),
    }  # fmt: skip
    for stack, count in (("prelude", 2), ("core_block", 4), ("coda", 2)):
        for i in range(count):
            expected |= {f"transformer.{stack}.{i}.{k}": v for k, v in block.items()}
    assert shapes == expected


def test_table_covers_the_parameters_exactly():
    grouped = ModelConfig(vocab_size=20, embed_dim=12, num_heads=6, num_kv_heads=2, mlp_dim=10)
    for config in (TINY, dataclasses.replace(grouped, qk_bias=False, tie_embeddings=False)):
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        ours = {tuple(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
        assert ours == {entry.path: entry.ours for entry in table(config).values()}


def test_layouts_invert_each_other():
    config = ModelConfig(vocab_size=20, embed_dim=12, num_heads=6, num_kv_heads=2, mlp_dim=10)
    for name, entry in table(config).items():
        x = np.arange(np.prod(entry.shape), dtype=np.uint32).reshape(entry.shape)
        np.testing.assert_array_equal(to_theirs(to_ours(x, entry), entry), x, err_msg=name)


def test_written_file_says_format_pt(tmp_path):
    save_huggingface(tmp_path / "out", *model("A2"))
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_untied_head(tmp_path):
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    params = fresh(untied, jax.random.key(1))
    save_huggingface(tmp_path / "out", params, untied)
    assert same_bits(read(tmp_path / "out")["lm_head.weight"], np.asarray(params["head"]))
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["tie_embeddings"] is False
    assert fields["tie_word_embeddings"] is False
    again, config = load_huggingface(tmp_path / "out")
    assert config == untied
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bf16_keeps_its_bits(tmp_path):
    params = cast(fresh(TINY, jax.random.key(2)), jnp.bfloat16)
    save_huggingface(tmp_path / "out", params, TINY)
    stored = read(tmp_path / "out")
    assert stored[WTE].dtype == ml_dtypes.bfloat16
    assert stored["freqs_cis"].dtype == np.float32
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    again, config = load_huggingface(tmp_path / "out")
    assert config.param_dtype == "bfloat16"
    assert config.compute_dtype is None
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert same_bits(np.asarray(a), np.asarray(b))


def test_shards_and_index(tmp_path):
    params, config = model("A2")
    save_huggingface(tmp_path / "out", params, config, shard_bytes=30_000)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(files) > 4
    assert not (tmp_path / "out/model.safetensors").exists()
    assert files[1].endswith(f"-of-{len(files) - 2:05d}.safetensors")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = read(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys() == read(GOLDEN / "A2").keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert all((tmp_path / "out" / f).stat().st_size < 40_000 for f in set(index["weight_map"].values()))
    again, _ = load_huggingface(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
    ("rows", "fields"), [(20, {}), (24, {"padded_vocab_size": 24}), (32, {"padding_multiple": 16})]
)
def test_padded_vocabularies(rows, fields, tmp_path):
    config = dataclasses.replace(TINY, padded_vocab_size=rows)
    save_huggingface(tmp_path / "out", fresh(config, jax.random.key(3)), config)
    path = tmp_path / "out/config.json"
    written = json.loads(path.read_text())
    assert (written["vocab_size"], written["padded_vocab_size"]) == (20, rows)
    for name in ("padded_vocab_size", "padding_multiple"):
        del written[name]
    path.write_text(json.dumps(written | fields))
    loaded = load_huggingface(tmp_path / "out")[1]
    assert (loaded.vocab_size, loaded.rows) == (20, rows)


def test_rows_that_the_config_does_not_allow(tmp_path):
    wte = read(GOLDEN / "A2")[WTE]
    expect_error(edited(tmp_path, tensors={WTE: wte[:100]}), "vocab_size", WTE, "100 rows")


def test_any_tree_of_the_structure_can_be_written(tmp_path):
    # Gradients in f32 of a model whose config says bf16.
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    gradients = fresh(TINY, jax.random.key(4))
    save_huggingface(tmp_path / "out", gradients, config)
    assert read(tmp_path / "out")[WTE].dtype == np.float32


def test_raw_training_names(tmp_path):
    tensors = {f"_orig_mod._original_module.{k}": v for k, v in read(GOLDEN / "A2").items()}
    folder = edited(tmp_path)
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(folder)[0], model("A2")[0])


def test_a_tied_head_may_be_stored(tmp_path):
    wte = read(GOLDEN / "A2")[WTE]
    params, _ = load_huggingface(edited(tmp_path, tensors={"lm_head.weight": wte}))
    assert "head" not in params


def test_freqs_cis_is_ignored(tmp_path):
    load_huggingface(edited(tmp_path, tensors={"freqs_cis": None}))


# Writing


def test_an_earlier_export_is_replaced_and_its_other_files_stay(tmp_path):
    folder = tmp_path / "out"
    save_huggingface(folder, *model("A2"), shard_bytes=30_000)
    (folder / "tokenizer.json").write_text("{}")
    save_huggingface(folder, *model("G_gqa"))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_huggingface(folder)[1] == model("G_gqa")[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        save_huggingface(tmp_path, *model("A2"))


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rdlm.hf.to_theirs", lambda x, entry: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_huggingface(tmp_path / "out", *model("A2"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("adapter"), ["params['adapter']", "missing"]),
        (lambda p: p.update(extra=jnp.zeros(2)), ["params['extra']"]),
        (lambda p: p.update(wte=jnp.zeros((3, 12))), ["params['wte']", "(3, 12)"]),
        (lambda p: p.update(wte=p["wte"].astype(jnp.int32)), ["params['wte']", "int32"]),
    ],
)
def test_a_tree_that_does_not_fit(change, words, tmp_path):
    params = fresh(TINY, jax.random.key(5))
    change(params)
    with pytest.raises(InputError) as error:
        save_huggingface(tmp_path / "out", params, TINY)
    assert all(word in str(error.value) for word in words)


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
        {"state_init": "normal"}, {"model_type": "llama"}, {"init_strategy": "scaled"}, {"qk_norm": True},
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


def test_missing_tensor(tmp_path):
    name = "transformer.core_block.1.attn.proj.weight"
    expect_error(edited(tmp_path, tensors={name: None}), name, "missing")


def test_missing_embedding(tmp_path):
    expect_error(edited(tmp_path, tensors={WTE: None}), WTE, "missing")


def test_missing_head(tmp_path):
    expect_error(edited(tmp_path, {"tie_embeddings": False}), "lm_head.weight", "missing", "tie_embeddings")


def test_extra_tensor(tmp_path):
    name = "transformer.core_block.2.norm_1.weight"
    expect_error(edited(tmp_path, tensors={name: np.ones(24, np.float32)}), name)


def test_wrong_shape(tmp_path):
    name = "transformer.adapter.weight"
    expect_error(edited(tmp_path, tensors={name: np.ones((48, 24), np.float32)}), name, "[48, 24]", "[24, 48]")


def test_wrong_dtype(tmp_path):
    name = "transformer.ln_f.weight"
    expect_error(edited(tmp_path, tensors={name: np.ones(24, np.int8)}), name, "I8")
    expect_error(edited(tmp_path / "wte", tensors={WTE: np.ones((128, 24), np.float64)}), WTE, "F64")


def test_a_tied_head_that_differs(tmp_path):
    wte = read(GOLDEN / "A2")[WTE]
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
