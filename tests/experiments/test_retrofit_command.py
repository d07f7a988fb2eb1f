"""experiments/retrofit.py: what it writes, where, and what it refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, deviation, model
from safetensors import safe_open

import rdlm
from rdlm.checkpoint import load_checkpoint
from rdlm.hf import load_huggingface
from rdlm.tokenizer import Tokenizer

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Copies of golden models, a Llama whose heads are as wide as published retrofits have them, and no model."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llama", "olmo2", "qwen3", "gemma3", "ouro", "retro_llama"):
        shutil.copytree(GOLDEN / "families" / name, folder / name)
    config = dataclasses.replace(model("families/llama")[1], head_width=None)
    rdlm.save_huggingface(folder / "narrow", jax.jit(rdlm.init_params, static_argnums=0)(config, KEY), config)
    (folder / "empty").mkdir()
    return folder


def tensors(folder):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator


@pytest.mark.parametrize(("name", "own"), [("narrow", ()), ("olmo2", ("attn.q_norm", "attn.k_norm"))])
def test_a_folder_in_the_published_format(name, own, sources, tmp_path, command):
    code, out, _ = command("retrofit", sources / name, tmp_path / "deep", "--layers", "1/1/1")
    assert code == 0
    for line in (
        "prelude  layers 0 to 0 (1)",
        "core     layers 1 to 1 (1)",
        "coda     layers 2 to 2 (1)",
        "dropped  none",
    ):
        assert line in out
    written, before = tensors(tmp_path / "deep"), tensors(sources / name)
    block = ("attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj", "norm_1", "norm_2", *own)
    assert written.keys() == {
        "lm_head.weight", *(f"transformer.{x}.weight" for x in ("wte", "adapter", "ln_f")),
        *(f"transformer.{part}.0.{x}.weight" for part in ("prelude", "core_block", "coda") for x in block),
    }  # fmt: skip
    for i, part in enumerate(("prelude", "core_block", "coda")):
        theirs, ours = f"model.layers.{i}.", f"transformer.{part}.0."
        stacks = {"attn.Wqkv": [f"self_attn.{x}_proj" for x in "qkv"], "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"]}
        for fused, parts in stacks.items():
            stack = np.concatenate([before[f"{theirs}{x}.weight"] for x in parts])
            np.testing.assert_array_equal(written[f"{ours}{fused}.weight"], stack)
    D = before["model.norm.weight"].size
    np.testing.assert_array_equal(written["transformer.adapter.weight"], np.eye(D, 2 * D, D))
    fields, known = json.loads((tmp_path / "deep/config.json").read_text()), GOLDEN / "families/retro_llama/config.json"
    assert fields.keys() >= json.loads(known.read_text()).keys() - {"rope_scaling"}
    assert fields["init_values"]["std"] == pytest.approx((2 / (5 * 5280)) ** 0.5)
    assert [fields[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")] == [1, 1, 1]
    assert "tie_word_embeddings" not in fields, "the class of published retrofits refuses it"
    tokens = np.arange(24).reshape(2, 12)
    logits = rdlm.forward(*load_huggingface(tmp_path / "deep"), tokens, 2).logits
    assert deviation(logits, rdlm.forward(*load_huggingface(sources / name), tokens).logits) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_what_the_format_does_not_hold_goes_to_a_run_folder(name, sources, tmp_path, command):
    code, out, _ = command("retrofit", sources / name, tmp_path / "deep")
    assert code == 0
    assert f"wrote run folder {tmp_path / 'deep'}" in out
    params, config = load_checkpoint(tmp_path / "deep")
    made, expected = rdlm.retrofit(*model(f"families/{name}"), prelude=0, core=3, coda=0)
    assert config == expected
    jax.tree.map(np.testing.assert_array_equal, params, made)
    code, _, err = command("retrofit", tmp_path / "deep", tmp_path / "deeper")
    assert code == 2
    assert "recurrent already" in err
    assert not (tmp_path / "deeper").exists()


@pytest.mark.parametrize("name", ["narrow", "llama"])
def test_tokenizer_and_template_come_along(name, sources, tmp_path, command):
    params, config = load_huggingface(sources / name)
    params, config = params | {"wte": np.ones((262, config.embed_dim))}, dataclasses.replace(config, vocab_size=262)
    params = rdlm.cast(params, "float32")
    rdlm.save_huggingface(tmp_path / "source", params, config)
    tokenizer = Tokenizer.train(["abc"], 262)
    tokenizer.save(tmp_path / "source")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages }}")
    words = ["--layers", "1/1/0", "--drop", "--adapter", "random", "--seed", "3"]
    assert command("retrofit", tmp_path / "source", tmp_path / "deep", *words)[0] == 0
    run = rdlm.load(tmp_path / "deep")
    assert run.require_tokenizer().hash == tokenizer.hash
    assert len(list((tmp_path / "deep").rglob("chat_template.jinja"))) == 1
    expected, _ = rdlm.retrofit(
        params, config, prelude=1, core=1, coda=0, adapter="random", drop=True, key=jax.random.key(3)
    )
    jax.tree.map(np.testing.assert_array_equal, run.params, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{src}/llama {tmp}/out --layers 1/1", "--layers = '1/1': must be the layers of prelude, core and coda"),
        ("{src}/llama {tmp}/out --layers 0/1/1", "0 + 1 + 1 layers: the model has 3"),
        ("{src}/llama {tmp}/out --layers 2/2/2 --drop", "the model has only 3"),
        ("{src}/llama {tmp}/out --layers 2/0/1", "core = 0"),
        ("{src}/llama {tmp}/out --drop", "no cut of a model with 3 layers is published"),
        ("{src}/llama {tmp}/out --seed -1", "--seed = -1"),
        ("{src}/ouro {tmp}/out", "recurrent already"),
        ("{src}/retro_llama {tmp}/out", "recurrent already"),
        ("{src}/llama {src}/llama", "exists and is not an empty folder"),
        ("{src}/empty {tmp}/out", "neither a Hugging Face model folder"),
        ("{src}/llama/config.json {tmp}/out", "is a file"),
        ("{src}/none {tmp}/out", "no such folder"),
    ],
)
def test_wrong_input_is_one_line(words, message, sources, tmp_path, command):
    code, out, err = command("retrofit", *words.format(src=sources, tmp=tmp_path).split())
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
