"""experiments/convert_huggingface.py, both ways, with its checks and its refusals."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import experiment_scripts
import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, model
from safetensors.numpy import load_file

import rdlm
from rdlm.checkpoint import load_checkpoint
from rdlm.config import InputError, ModelConfig
from rdlm.hf import load_huggingface, save_huggingface
from rdlm.model import cast, init_params
from rdlm.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "experiments/convert_huggingface.py"
TINY = ModelConfig(
    vocab_size=300, embed_dim=12, num_heads=2, mlp_dim=10, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=16, mean_recurrence=2, backprop_depth=1, tie_embeddings=False, param_dtype="bfloat16",
)  # fmt: skip

fresh = jax.jit(init_params, static_argnums=0)


script = experiment_scripts.script("convert_huggingface")


def convert(monkeypatch, *arguments):
    """The script's main with these arguments; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    return script.main()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([SCRIPT.read_text()], 300).save(folder)
    return folder


def test_there_and_back_keeps_every_bit(tmp_path, monkeypatch, tokenizer, capsys):
    source = tmp_path / "source"
    save_huggingface(source, cast(fresh(TINY, jax.random.key(0)), "bfloat16"), TINY)
    for file in tokenizer.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    assert convert(monkeypatch, source, tmp_path / "run", "--verify") == 0
    assert convert(monkeypatch, tmp_path / "run", tmp_path / "back", "--verify") == 0
    printed = capsys.readouterr().out
    assert printed.count("verify: passed") == 2
    for word in ("max |logit difference| 0,", "KL", "top-1", "top-5"):
        assert printed.count(word) == 2
    params, config = load_checkpoint(tmp_path / "run")
    assert config == TINY
    assert params["wte"].dtype == "bfloat16"
    assert Tokenizer.load(tmp_path / "run/tokenizer").hash == Tokenizer.load(tokenizer).hash
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes(), name
    for name in ("config.json", *(file.name for file in tokenizer.iterdir())):
        assert (source / name).read_text() == (tmp_path / "back" / name).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "run", "source"]


@pytest.mark.parametrize("name", ["A2", "G_gqa"])
def test_golden_models_convert_without_a_tokenizer(name, tmp_path, monkeypatch, capsys):
    assert convert(monkeypatch, GOLDEN / name, tmp_path / "run", "--verify") == 0
    assert "no tokenizer" in capsys.readouterr().out
    params, config = load_checkpoint(tmp_path / "run")
    assert config == model(name)[1]
    jax.tree.map(np.testing.assert_array_equal, params, model(name)[0])


def test_verify_notices_a_difference(tmp_path, monkeypatch, capsys):
    def damaged(folder, step=None):
        params, config = load_huggingface(folder) if Path(folder) == GOLDEN / "A2" else load_checkpoint(folder)
        if Path(folder) != GOLDEN / "A2":
            params = params | {"ln_f": {"scale": params["ln_f"]["scale"] * 1.01}}
        return params, config

    monkeypatch.setattr(script, "load", damaged)
    assert convert(monkeypatch, GOLDEN / "A2", tmp_path / "run", "--verify") == 1
    assert "verify: FAILED" in capsys.readouterr().out
    assert convert(monkeypatch, GOLDEN / "A2", tmp_path / "again", "--verify", "--threshold", "1000") == 0


def test_a_tokenizer_of_yours_is_set_aside(tmp_path, monkeypatch, tokenizer, capsys):
    source = tmp_path / "source"
    save_huggingface(source, fresh(TINY, jax.random.key(0)), dataclasses.replace(TINY, param_dtype="float32"))
    for file in tokenizer.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    convert(monkeypatch, source, tmp_path / "run")
    convert(monkeypatch, tmp_path / "run", tmp_path / "out")
    (tmp_path / "out/tokenizer_config.json").write_text("my template")
    capsys.readouterr()
    convert(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert "tokenizer_config.json.replaced" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer_config.json.replaced").read_text() == "my template"
    convert(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert "replaced" not in capsys.readouterr().out


def test_folders_of_mixed_dtype_are_widened_and_said(tmp_path, monkeypatch, capsys):
    params = cast(fresh(TINY, jax.random.key(0)), "float16")
    params = params | {"ln_f": cast(params["ln_f"], "float32")}
    save_huggingface(tmp_path / "source", params, dataclasses.replace(TINY, param_dtype="float16"))
    assert convert(monkeypatch, tmp_path / "source", tmp_path / "run", "--verify") == 0
    assert "float16 and float32; the run folder holds float32" in capsys.readouterr().out
    loaded, config = load_checkpoint(tmp_path / "run")
    assert config.param_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_gguf_file_becomes_a_folder_and_that_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'rdlm[gguf]'")
    import gguf_files

    tokenizer = gguf_files.sentence_piece([*"▁abc", "ab"])
    file = gguf_files.write(tmp_path / "toy.gguf", GOLDEN / "families/llama", tokenizer)
    assert convert(monkeypatch, file, tmp_path / "folder") == 0
    assert "float32" in capsys.readouterr().out
    assert convert(monkeypatch, tmp_path / "folder", tmp_path / "run") == 0
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "run")[0], model("families/llama")[0])
    assert rdlm.load(tmp_path / "run").tokenizer.encode("ab b").tolist()[0] == 1
    for target, flags, word in (
        ("folder", [], "folder: exists and is not an empty folder"),
        ("new", ["--verify"], "--verify: SRC is a GGUF file"),
        ("new", ["--step", "1"], "--step: SRC is a GGUF file"),
    ):
        with pytest.raises(InputError, match=word):
            convert(monkeypatch, file, tmp_path / target, *flags)
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_said(tmp_path, monkeypatch, capsys):
    params = fresh(TINY, jax.random.key(0))
    params["ln_f"] = {"scale": params["ln_f"]["scale"].at[0].set(np.nan)}
    save_huggingface(tmp_path / "source", params, TINY)
    assert convert(monkeypatch, tmp_path / "source", tmp_path / "run") == 0
    assert "NaN or infinity in 1 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--recurrences", "-5"], "--recurrences = -5"),
        (["--recurrences", "0"], "--recurrences = 0"),
        (["--threshold", "nan"], "--threshold"),
        (["--threshold", "inf"], "--threshold"),
        (["--threshold", "-1"], "--threshold"),
    ],
)
def test_a_verification_that_verifies_nothing_is_refused(flags, word, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=word):
        convert(monkeypatch, GOLDEN / "A2", tmp_path / "out", "--verify", *flags)
    assert not (tmp_path / "out").exists()


def run(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    for arguments, word in [
        ((tmp_path / "nowhere", tmp_path / "out"), "no such folder"),
        (("organisation/name", tmp_path / "out"), "hub"),
        ((tmp_path / "full", tmp_path / "out"), "neither"),
        ((wrong, tmp_path / "out"), "model_type"),
        ((GOLDEN / "A2", tmp_path / "full"), "not an empty folder"),
        ((GOLDEN / "A2", GOLDEN / "A2"), "same folder"),
        ((GOLDEN / "A2", tmp_path / "out", "--step", "3"), "--step"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        assert word in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_hub_name_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="install huggingface_hub"):
        convert(monkeypatch, "organisation/name", tmp_path / "out")


def test_a_tokenizer_that_does_not_fit_is_said(tmp_path, monkeypatch, tokenizer, capsys):
    for size, code in ((256, 2), (512, 0)):
        source = tmp_path / str(size)
        config = dataclasses.replace(TINY, vocab_size=size)
        save_huggingface(source, cast(fresh(config, jax.random.key(0)), "bfloat16"), config)
        for file in tokenizer.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
        if code:
            with pytest.raises(InputError, match="tokenizer has 300 entries, the model only 256"):
                convert(monkeypatch, source, tmp_path / "run")
            assert not (tmp_path / "run").exists()
    assert convert(monkeypatch, source, tmp_path / "run") == 0
    assert "the tokenizer has 300 entries, the model 512: the rest is masked" in capsys.readouterr().out
    run = rdlm.load(tmp_path / "run")
    assert (run.require_config().data.tokenizer_size, run.require_config().model.vocab_size) == (300, 512)
    assert (run.config.vocab_size, run.config.rows) == (300, 512)
    # What ends a text comes along, both ways.
    assert {1, 7} <= set(run.require_tokenizer().end_ids)
    assert convert(monkeypatch, tmp_path / "run", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
