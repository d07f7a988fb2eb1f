"""Hugging Face folders: bit-exact round trips, the reference's layout, and one clear line for whatever is wrong."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN, MODELS, model
from safetensors import safe_open
from safetensors.numpy import load_file

from rdlm.config import PRESETS, InputError, ModelConfig
from rdlm.hf import load_huggingface, save_huggingface, table
from rdlm.hf.names import to_ours, to_theirs
from rdlm.model import cast, init_params
from rdlm.runtime.files import scratch_folder

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


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_the_references(tied, tmp_path):
    # The table written out for the model that `make quickstart` trains.
    config = dataclasses.replace(PRESETS["quickstart"].model, tie_embeddings=tied)
    save_huggingface(tmp_path, fresh(config, jax.random.key(6)), config)
    D, F, V, H, Q = config.embed_dim, config.mlp_dim, config.vocab_size, config.num_heads, config.head_dim
    counts = {"prelude": config.prelude_layers, "core_block": config.core_layers, "coda": config.coda_layers}
    block = {
        "norm_1.weight": [D], "norm_2.weight": [D], "norm_3.weight": [D], "norm_4.weight": [D],
        "attn.qk_bias": [2, 1, H, Q], "attn.Wqkv.weight": [3 * D, D], "attn.proj.weight": [D, D],
        "mlp.fc.weight": [2 * F, D], "mlp.proj.weight": [D, F],
    }  # fmt: skip
    expected = {WTE: [V, D], "transformer.adapter.weight": [D, 2 * D], "transformer.ln_f.weight": [D]}
    expected |= {"freqs_cis": [1, config.max_length, 1, Q // 2, 2]} | ({} if tied else {"lm_head.weight": [V, D]})
    for stack, count in counts.items():
        for i in range(count):
            expected |= {f"transformer.{stack}.{i}.{k}": v for k, v in block.items()}
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected  # noqa: SIM118
    theirs = json.loads((GOLDEN / "A/config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    assert ours.keys() - {"tie_word_embeddings"} == theirs.keys()
    assert {k: type(v) for k, v in ours.items() if k in theirs} == {k: type(v) for k, v in theirs.items()}


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


def test_a_window_is_refused(tmp_path):
    local = dataclasses.replace(TINY, attention_window=4)
    with pytest.raises(InputError, match="attention_window = 4: must be None for the reference"):
        save_huggingface(tmp_path / "out", fresh(local, jax.random.key(2)), local)
    assert not (tmp_path / "out").exists()


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


def test_any_tree_of_the_structure_can_be_written(tmp_path):
    # Gradients in f32 of a model whose config says bf16.
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    gradients = fresh(TINY, jax.random.key(4))
    save_huggingface(tmp_path / "out", gradients, config)
    assert read(tmp_path / "out")[WTE].dtype == np.float32


# Writing


def test_an_earlier_export_is_replaced_and_its_other_files_stay(tmp_path):
    folder = tmp_path / "out"
    save_huggingface(folder, *model("A2"), shard_bytes=30_000)
    (folder / "tokenizer.json").write_text("{}")
    save_huggingface(folder, *model("G_gqa"))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_huggingface(folder)[1] == model("G_gqa")[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def contents(folder):
    """{name: bytes} of everything in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


FOREIGN = {
    "another model": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w"},
    "another model in shards": {
        "config.json": b'{"model_type": "llama"}', "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"w1", "model-00002-of-00002.safetensors": b"w2",
    },
    "no model_type": {"config.json": b'{"n_embd": 24}', "model.safetensors": b"w"},
    "an adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"},
    "a run folder": {"config.json": b'{"model": {}}', "metrics.jsonl": b""},
    "a broken config": {"config.json": b"{", "model.safetensors": b"w"},
    "a list for a config": {"config.json": b"[]", "model.safetensors": b"w"},
}  # fmt: skip


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_another_kind_is_refused_and_untouched(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not empty"):
        save_huggingface(tmp_path, *model("A2"))
    assert contents(tmp_path) == files


@pytest.mark.parametrize("bytes_per_file", [30_000, 10**9])
def test_only_the_files_of_an_earlier_export_are_replaced(bytes_per_file, tmp_path):
    others = {
        name: b"mine"
        for name in (
            "adapter_model.safetensors", "model.safetensors.backup", "model_ema.safetensors", "training_args.bin",
            "optimizer.pt", "consolidated.safetensors", "model-00001-of-00002.safetensors.bak", "tokenizer.json",
        )
    }  # fmt: skip
    save_huggingface(tmp_path, *model("A2"), shard_bytes=30_000)
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "onnx").mkdir()
    save_huggingface(tmp_path, *model("G_gqa"), shard_bytes=bytes_per_file)
    (tmp_path / "onnx").rmdir()  # it is still there, and empty
    found = contents(tmp_path)
    assert others.items() <= found.items()
    assert load_huggingface(tmp_path)[1] == model("G_gqa")[1]
    assert not any(".replaced" in name or "partial" in name for name in found)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_export_left_is_gone_after_the_next(there, tmp_path):
    with scratch_folder(tmp_path, "model") as folder:
        name = folder.name[:-12] + "0123456789ab"
    left = (tmp_path / "model" if there else tmp_path) / name
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save_huggingface(tmp_path / "model", *model("A2"))
    assert set(contents(tmp_path / "model")) == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_another_program_wrote_is_set_aside(tmp_path):
    # A model of this kind, but with a config.json that save_huggingface would not write.
    save_huggingface(tmp_path, *model("A2"))
    theirs = (tmp_path / "config.json").read_text().replace("4.53.3", "4.60.0")
    (tmp_path / "config.json").write_text(theirs)
    (tmp_path / "grads.safetensors").write_bytes(b"g")
    before = contents(tmp_path)
    for _ in range(2):  # the second time everything is ours
        save_huggingface(tmp_path, *model("G_gqa"))
    after = contents(tmp_path)
    assert load_huggingface(tmp_path)[1] == model("G_gqa")[1]
    assert set(after) == {*before, "config.json.replaced", "model.safetensors.replaced"}
    for name in ("config.json", "model.safetensors"):
        assert after[f"{name}.replaced"] == before[name]
    assert after["grads.safetensors"] == b"g"


def test_links_are_followed_and_stay(tmp_path):
    disk = tmp_path / "disk/model"
    save_huggingface(disk, *model("A2"))
    (disk / "tokenizer.json").write_text("{}")
    (tmp_path / "out").symlink_to("disk/model")
    (tmp_path / "chain").symlink_to(tmp_path / "out")
    (tmp_path / "dangling").symlink_to("disk/new/model")
    for link in ("out", "chain", "dangling"):
        save_huggingface(tmp_path / link, *model("G_gqa"))
        assert (tmp_path / link).is_symlink()
        assert load_huggingface(tmp_path / link)[1] == model("G_gqa")[1]
    assert sorted(p.name for p in disk.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["model", "new"]
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "out", "chain", "dangling"}


def test_a_file_that_is_a_link_is_set_aside(tmp_path):
    save_huggingface(tmp_path / "out", *model("A2"))
    weights = tmp_path / "weights"
    (tmp_path / "out/model.safetensors").rename(weights)
    (tmp_path / "out/model.safetensors").symlink_to(weights)
    before = weights.read_bytes()
    save_huggingface(tmp_path / "out", *model("G_gqa"))
    assert weights.read_bytes() == before
    assert (tmp_path / "out/model.safetensors.replaced").is_symlink()
    assert load_huggingface(tmp_path / "out")[1] == model("G_gqa")[1]


def test_a_killed_save_is_made_good_by_the_next(tmp_path, monkeypatch):
    save_huggingface(tmp_path, *model("A2"), shard_bytes=30_000)
    replace, moved = Path.replace, []

    def killed(path, target):
        moved.append(target.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(tmp_path, *model("G_gqa"), shard_bytes=30_000)
    monkeypatch.undo()
    with pytest.raises(InputError):  # never a mixture
        load_huggingface(tmp_path)
    save_huggingface(tmp_path, *model("G_gqa"), shard_bytes=30_000)
    assert load_huggingface(tmp_path)[1] == model("G_gqa")[1]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        save_huggingface(tmp_path, *model("A2"))


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rdlm.hf.convert.to_theirs", lambda x, entry: 1 / 0)
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
