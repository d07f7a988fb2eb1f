"""Runs that train low-rank pairs and parts of a model: what they save, resume from, and are read with."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script
from small_runs import prepared
from training_cases import losses

import rdlm
from rdlm.checkpoint import load_checkpoint, read_config, save_parameters
from rdlm.config import PRESETS, InputError, MeshConfig, TuneConfig
from rdlm.model import cast
from rdlm.run import find
from rdlm.train import Trainer
from rdlm.tune import begin
from rdlm.weights import Weights, begin_from, identified, read_run

NANO = PRESETS["nano"]
TUNE = TuneConfig(only=("norms", "core"), lora_rank=2, lora_targets=("attn.qkv", "mlp.proj", "adapter"))


def run_of(init, data, run_dir, **changes):
    """A run of 4 steps."""
    base = dataclasses.replace(
        NANO,
        data=dataclasses.replace(NANO.data, prepared=(str(data),), sequence_length=24, batch_size=8, tokenizer_size=99),
        checkpoint=dataclasses.replace(NANO.checkpoint, every=2),
        evaluation=dataclasses.replace(NANO.evaluation, depths=(1, 3)),
        optimizer=dataclasses.replace(NANO.optimizer, ema_decay=0.5, learning_rate=0.01, warmup_steps=1),
        mesh=MeshConfig(1, 8),
        tune=TUNE,
        run_dir=str(run_dir),
        init=str(init),
        steps=4,
    )
    return begin_from(dataclasses.replace(base, **changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model in a run folder, and beside it the data."""
    return prepared(tmp_path_factory.mktemp("base"), 0.2)


@pytest.fixture(scope="module")
def tuned(base):
    """A finished run on eight devices."""
    folder = base.parent / "tuned"
    assert Trainer(run_of(base, base.parent / "data", folder), lambda line: None).run() == 0
    return folder


@pytest.mark.slow
def test_it_saves_only_what_learns_and_is_read_with_its_base(tuned, base):
    stored = (tuned / "checkpoints/4/params/_METADATA").read_text()
    assert "qkv_lora_a" in stored
    assert "norm_1" in stored
    assert "wte" not in stored
    run, original = rdlm.load(tuned), rdlm.load(base).params
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.shape, run.params), jax.tree.map(np.shape, original))
    np.testing.assert_array_equal(run.params["wte"], original["wte"])
    for name in ("adapter", "prelude_0", "coda_0"):
        assert any(
            np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (run.params[name], original[name])), strict=True)
        )
    np.testing.assert_array_equal(run.params["coda_0"]["attn"]["proj"], original["coda_0"]["attn"]["proj"])
    assert np.any(run.params["core_0"]["attn"]["proj"] != original["core_0"]["attn"]["proj"])
    averaged = rdlm.load(tuned, ema=True).params
    assert np.any(averaged["core_0"]["attn"]["qkv"] != run.params["core_0"]["attn"]["qkv"])
    np.testing.assert_array_equal(averaged["wte"], original["wte"])
    assert run.generate("The capital", max_new_tokens=2).text is not None
    with pytest.raises(InputError, match=r"holds only what it learnt beside the weights of .*text_run; read both with"):
        load_checkpoint(tuned)
    with pytest.raises(InputError, match="holds only what it learnt"):
        run_of(tuned, base.parent / "data", tuned.parent / "next")


@pytest.mark.slow
def test_merged_it_is_a_model_of_its_own(tuned, base, tmp_path, monkeypatch, capsys):
    merge = script("merge_adapter")
    for kind in ("run", "huggingface"):
        monkeypatch.setattr("sys.argv", ["merge_adapter.py", str(tuned), str(tmp_path / kind), "--kind", kind])
        assert merge.main() == 0
        found = rdlm.load(tmp_path / kind)
        jax.tree.map(np.testing.assert_array_equal, found.params, rdlm.load(tuned).params)
        assert found.tokenizer.hash == rdlm.load(tuned).tokenizer.hash
    assert "and its base" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["merge_adapter.py", str(base), str(tmp_path / "no")])
    with pytest.raises(InputError, match="nothing to merge"):
        merge.main()


@pytest.mark.slow
def test_resumed_on_one_device_it_is_the_same(tuned, base, monkeypatch):
    run, says = base.parent / "again", []
    shutil.copytree(tuned, run)
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "loss_by_depth.json").unlink()
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    config = dataclasses.replace(run_of(base, base.parent / "data", run), mesh=MeshConfig(1, 1))
    assert Trainer(config, says.append).run() == 0
    assert any(f"resuming {run} at step 2" in line for line in says)
    assert any("numbers learn; the parameters of" in line for line in says)
    np.testing.assert_allclose(losses(run), losses(tuned), atol=1e-5, rtol=0)
    last = [rdlm.load(folder).params for folder in (run, tuned)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *last)
    # The merged model is that which was evaluated.
    curve = json.loads((run / "loss_by_depth.json").read_text())
    np.testing.assert_allclose(rdlm.load(run).evaluate((1, 3)).nats, list(curve.values()), atol=1e-5)


@pytest.mark.slow
def test_another_base_is_refused_with_both_digests(tuned, base, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(tuned, run)
    digest = read_config(run).weights_digest[:16]
    params = jax.tree.map(lambda x: 1.5 * x, rdlm.load(base).params)
    save_parameters(other, params, read_config(base), {"tokenizer": None}, step=7)
    shutil.copytree(base / "tokenizer", other / "tokenizer")
    with pytest.raises(
        InputError, match=rf"from the weights of .*text_run \(digest {digest}\), not from .*other \(dig"
    ):
        Trainer(run_of(other, base.parent / "data", run))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(base), str(other)))
    with pytest.raises(InputError, match=rf"init = '.*other': holds other weights \(digest \w{{16}}\) than .*{digest}"):
        rdlm.load(run)
    (run / "config.json").write_text(config.replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"init = '.*gone': no such folder"):
        rdlm.load(run)
    # The same weights elsewhere are the same base.
    shutil.copytree(base, tmp_path / "moved")
    (run / "config.json").write_text(config.replace(str(base), str(tmp_path / "moved")))
    jax.tree.map(np.testing.assert_array_equal, rdlm.load(run).params, rdlm.load(tuned).params)


def test_without_a_base_it_does_not_begin(base, tmp_path):
    run = dataclasses.replace(run_of(base, base.parent / "data", tmp_path / "run"), init="")
    with pytest.raises(InputError, match=r"tune.lora_rank = 2: needs --init FOLDER"):
        Trainer(run)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pairs(base, tmp_path):
    """A run folder with pairs as after some training beside a base in bfloat16, and its base."""
    init, folder = shutil.copytree(base, tmp_path / "base"), tmp_path / "pairs"
    run = run_of(init, base.parent / "data", folder, tune=TuneConfig(lora_rank=2, lora_targets=("mlp.fc",)))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, param_dtype="bfloat16"))
    run = identified(run, Weights(run))
    params = cast(rdlm.load(init).params, "bfloat16")
    learnt = jax.tree.map(lambda x: jnp.full_like(x, 0.002), begin(params, run.tune, jax.random.key(0)))
    save_parameters(folder, learnt, run, {"tokenizer": None}, step=1)
    return folder, init, run, params


def test_pairs_are_merged_in_float32(pairs):
    folder, _, _, params = pairs
    merged, model = read_run(folder)
    assert (model.param_dtype, model.compute_dtype) == ("float32", "bfloat16")
    assert (find(folder).config.param_dtype, find(folder).config.compute_dtype) == ("float32", "bfloat16")
    w = np.asarray(params["core_0"]["mlp"]["fc"], np.float32)
    moved = np.asarray(merged["core_0"]["mlp"]["fc"]) - w
    np.testing.assert_allclose(moved, 16 / 2 * 2 * 0.002**2, rtol=1e-2)
    assert np.any((w + moved).astype(jnp.bfloat16) == w), "in bfloat16 some of it would be lost"
    np.testing.assert_array_equal(merged["wte"], np.asarray(params["wte"], np.float32))


def test_what_is_wrong_with_a_base_names_the_run_and_the_base(pairs, base):
    folder, init, run, _ = pairs
    config, trainer = init / "config.json", dataclasses.replace(run, mesh=MeshConfig(1, 1))
    way_out = rf"put them back, or write their new place into init of {folder}/config.json \(to train on, give it with"
    whose = f"run folder {folder}: the weights that it began from, init = '{init}': "
    text = config.read_text()
    config.write_text(text.replace('"num_heads": 2', '"num_heads": 4'))
    with pytest.raises(InputError, match=rf"{whose}its config.json now says num_heads = 4, .* with 2; {way_out}"):
        read_run(folder)
    with pytest.raises(InputError, match=f"{whose}its config.json now says num_heads = 4"):
        Weights(trainer).load({}, run.weights_digest)
    # What changes no tensor may differ.
    config.write_text(text.replace('"rope_base": 50000.0', '"rope_base": 60000.0'))
    read_run(folder)
    config.unlink()
    with pytest.raises(InputError, match=f"{whose}.*config.json.*; {way_out}"):
        read_run(folder)
    shutil.rmtree(init)
    with pytest.raises(InputError, match=f"{whose}no such folder; {way_out}"):
        read_run(folder)
    with pytest.raises(InputError, match=f"run folder {base}: holds a run that began without --init; choose another"):
        run_of(base, base.parent / "data", base)
