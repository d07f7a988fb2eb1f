"""Parcae: diagonal injection, value embeddings by token, and its folders. Decoding and gradients: test_families.py."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import ACTIVATIONS, GOLDEN, LOGITS, LOSS, cases, deviation, model
from safetensors.numpy import load_file, save_file

import rdlm
from rdlm.analysis.vitals import vitals
from rdlm.config import InputError, preset
from rdlm.hf import load_huggingface, model_config, save_huggingface, table
from rdlm.losses import Depths, as_batch, token_losses
from rdlm.model import bind
from rdlm.model.network import diagonal, enter, inject
from rdlm.optim import decay_mask
from rdlm.perf.flops import parameters

SOURCE = GOLDEN / "families/parcae"
FIELDS = json.loads((SOURCE / "config.json").read_text())

forward = jax.jit(rdlm.forward, static_argnames=("config",))
new_model = jax.jit(rdlm.init_params, static_argnums=0)


def parcae():
    return model("families/parcae")


def arrays(case):
    return cases("families/parcae")[case]["arrays"]


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_every_depth(r):
    given = arrays("forward")
    out = forward(*parcae(), given["input_ids"], jnp.int32(r), state=given["input_states"])
    np.testing.assert_allclose(out.state, given[f"states_r{r}"], **ACTIVATIONS)
    np.testing.assert_allclose(out.logits, given[f"logits_r{r}"], **LOGITS)


def test_the_prelude_ends_with_its_norm():
    params, config = parcae()
    given = arrays("forward")
    plain = dataclasses.replace(config, loop=dataclasses.replace(config.loop, injection="add"))
    e = jax.jit(lambda: bind(params, plain, given["input_ids"]).injected)()  # as it is
    np.testing.assert_allclose(e, given["prelude_out"], **ACTIVATIONS)


def test_sequences_with_depths_of_their_own():
    params, config = parcae()
    given = arrays("loss_per_sequence")
    batch = as_batch({"tokens": given["input_ids"], "labels": given["labels"]})

    @jax.jit
    def loss(n, k):
        depths = Depths(n.max(), k.max(), 2, (n, k))
        losses = token_losses(params, config, batch, depths, jnp.asarray(given["input_states"]))
        return losses.sum() / (batch.labels >= 0).sum()

    n, k = jnp.asarray(given["n"]), jnp.asarray(given["k"])
    assert int(k.max()) == 2
    assert abs(loss(n, k) - given["loss"]) <= LOSS
    assert abs(loss(n[::-1], k[::-1]) - given["loss"]) > 10 * LOSS  # control: not the rows' own


# Controls: each of these is another function, and the vectors notice it.


def replaced(part, **changes):
    return lambda params, config: (params, dataclasses.replace(config, **{part: changed(config, part, changes)}))


def changed(config, part, changes):
    return dataclasses.replace(getattr(config, part), **changes)


def swapped_tables(params, config):
    core, coda = params["values_core_1"], params["values_coda_1"]
    swap = {"values_core_1": core | {"table": coda["table"]}, "values_coda_1": coda | {"table": core["table"]}}
    return params | swap, config


def neighbouring_layers(params, config):
    moved = {f"values_{part}_0": params[f"values_{part}_1"] for part in ("prelude", "core", "coda")}
    return params | moved, dataclasses.replace(config, value_tables=(0, 2, 4), value_gates=(0, 2, 4))


@pytest.mark.parametrize(
    "change",
    [
        replaced("loop", entry_norm=False),
        replaced("loop", linear_bridge=False),
        replaced("loop", injection="add"),
        replaced("block", qk_norm="none"),
        replaced("block", activation="silu"),
        swapped_tables,
        neighbouring_layers,
        lambda params, config: (params, dataclasses.replace(config, value_gates=(3, 5))),
    ],
)
def test_control_another_function_shows(change):
    given = arrays("forward")
    out = forward(*change(*parcae()), given["input_ids"], jnp.int32(4), state=given["input_states"])
    assert deviation(out.logits, given["logits_r4"]) > 0.01


# Odd numbers of layers: a table or a gate may be there for nothing.


def odd(**changes):
    counts = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    config = model_config(FIELDS | counts | changes)
    return new_model(dataclasses.replace(config, initial_output="scaled"), jax.random.key(0)), config


@pytest.mark.parametrize(
    ("counts", "tables", "gates"),
    [  # prelude, core, coda, mean_recurrence, mean_backprop_depth
        ((1, 1, 1, 4, 2), (0, 2), (1, 2)),
        ((2, 1, 1, 4, 1), (1, 3), (0, 2, 3)),
        ((1, 2, 2, 3, 2), (0, 2, 4), (1, 3)),
        ((4, 4, 4, 8, 4), (1, 3, 5, 7, 9, 11), (1, 3, 5, 7, 9, 11)),
        ((0, 1, 0, 3, 3), (0,), (0,)),
    ],
)
def test_tables_and_gates_are_counted_differently(counts, tables, gates):
    names = ["n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"]
    names += ["mean_recurrence", "mean_backprop_depth"]
    config = model_config(FIELDS | dict(zip(names, counts, strict=True)))
    assert (config.value_tables, config.value_gates) == (tables, gates)


def test_what_is_there_for_nothing_is_kept_and_not_used(tmp_path):
    params, config = odd()
    assert config.value_layers == ("coda_0",)
    save_huggingface(tmp_path, params, config)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {"value_embeds.0.weight", "value_embeds.2.weight"}
    kept |= {f"transformer.{part}.0.attn.ve_gate.weight" for part in ("core_block", "coda")}
    assert {name for name in stored if "value_embeds" in name or "ve_gate" in name} == kept
    again, same = load_huggingface(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, params, again)
    gradient = jax.jit(jax.grad(lambda params: rdlm.loss(params, config, np.array([[1, 2, 3, 4]]), steps=(1, 1))))
    grads = gradient(params)
    used = {
        name for name in grads if name.startswith("values") and any(np.any(g) for g in jax.tree.leaves(grads[name]))
    }
    assert used == {"values_coda_0"}


@pytest.mark.parametrize("kind", ["linear", "add"])
def test_other_injections_go_both_ways(kind, tmp_path):
    params, config = odd(injection_type=kind)
    assert ("transformer.adapter.adapter.weight" in table(config)) == (kind == "linear")
    save_huggingface(tmp_path, params, config)
    assert load_huggingface(tmp_path)[1] == config
    s, e = jax.random.normal(jax.random.key(1), (2, 1, 3, config.embed_dim))
    read = enter(params, config, s, inject(params, config, e))
    if kind == "add":
        np.testing.assert_allclose(read, s + e)
        return
    A = load_file(tmp_path / "model.safetensors")["transformer.adapter.adapter.weight"]
    np.testing.assert_allclose(read, np.concatenate([s, e], -1) @ A.T, atol=1e-5)  # the state first


# A new model, its decay and its size.


def test_initial_values():
    config = dataclasses.replace(preset("parcae_140m").model, vocab_size=512, embed_dim=96, mlp_dim=128)
    config = dataclasses.replace(config, mean_recurrence=2)
    params = new_model(config, jax.random.key(0))
    decay, gain = diagonal(params)
    np.testing.assert_allclose(decay, math.sqrt(1 / 5), rtol=1e-6)
    np.testing.assert_allclose(gain, math.log(5) / 2, rtol=1e-6)
    assert not params["adapter"]["A_log"].any()
    np.testing.assert_array_equal(params["adapter"]["B"], np.eye(96))
    for part in ("attn", "mlp"):
        assert not params["core_0"][part]["proj"].any()
    assert params["values_core_1"]["table"].std() == pytest.approx(1, rel=0.03)
    for x in (params["wte"], params["C"], params["core_0"]["mlp"]["fc"]):
        assert x.std() == pytest.approx(math.sqrt(2 / (5 * 96)), rel=0.03)


def test_what_carries_the_state_does_not_decay():
    mask = decay_mask(parcae()[0])
    assert not any(jax.tree.leaves([mask["adapter"], mask["C"], mask["ln_e"]]))
    assert all(jax.tree.leaves([mask["values_core_1"], mask["wte"], mask["core_0"]["mlp"]]))


def test_the_published_shape_has_its_parameters():
    assert parameters(preset("parcae_140m").model) == 144_323_136
    params, config = parcae()
    assert parameters(config) == sum(x.size for x in jax.tree.leaves(params))


def test_vitals_see_the_diagonal():
    params, config = parcae()
    found = vitals(params, config, np.arange(12).reshape(2, 6))
    D, (decay, gain) = config.embed_dim, diagonal(params)
    assert found["vital_adapter_state"] == pytest.approx(np.linalg.norm(decay) / D**0.5, rel=1e-5)
    B = load_file(SOURCE / "model.safetensors")["transformer.adapter.B"]
    assert found["vital_adapter_input"] == pytest.approx(np.linalg.norm(gain[:, None] * B) / D**0.5, rel=1e-5)


# What cannot be built is named.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension = 64: rdlm builds only 48"),
        ({"recurrent_intermediation_embedding_dimension": 96}, "recurrent_intermediation_embedding_dimension = 96"),
        ({"recurrent_num_attention_heads": 2}, "recurrent_num_attention_heads = 2"),
        ({"logit_softcap": 30.0}, "logit_softcap = 30.0"),
        ({"number_of_experts": 8}, "number_of_experts = 8"),
        ({"qk_norm": False}, "qk_norm = False"),
        ({"qk_bias": True}, "qk_bias = True"),
        ({"nonlin_name": "SiLU"}, "nonlin_name = 'SiLU'"),
        ({"block_class_name": "SandwichBlock"}, "block_class_name = 'SandwichBlock'"),
        ({"injection_type": "gate"}, "injection_type = 'gate'"),
        ({"injection_type": "linear"}, "transformer.adapter.adapter.weight is missing"),
        ({"init_strategy": "takase"}, "init_strategy = 'takase'"),
        ({"rope_settings": {"use_rope": False}}, "rope_settings.use_rope = False"),
        ({"rope_settings": {"rope_scaling": "yarn"}}, "rope_settings.rope_scaling = 'yarn'"),
        ({"rope_settings": []}, "rope_settings = []"),
        ({"prelude_norm": False}, "transformer.ln_prelude.weight has no place"),
        ({"n_layers_in_coda": 4}, "transformer.coda.2."),
        ({"n_layers_in_prelude": 10**9}, "n_layers_in_prelude = 1000000000: must be at most 10000"),
        ({"n_embd": "48"}, "n_embd = '48'"),
        ({"mean_recurrence": 0}, "mean_recurrence = 0"),
        ({"padded_vocab_size": 64, "vocab_size": 64}, "128 rows"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        ({"mean_backprop_depth": None}, "mean_backprop_depth is missing"),
        ({"tie_embeddings": False, "n_embd": 16}, "16"),
    ],
)
def test_broken_folders_name_the_field(change, words, tmp_path):
    with pytest.raises(InputError) as error:
        load_huggingface(edited(tmp_path, change))
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def edited(folder, change, drop=(), add=None):
    (folder / "config.json").write_text(json.dumps(FIELDS | change))
    tensors = {k: v for k, v in load_file(SOURCE / "model.safetensors").items() if k not in drop}
    save_file(tensors | (add or {}), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", ["transformer.adapter.dt_bias", "value_embeds.3.weight", "transformer.core_block.1.attn.ve_gate.weight"]
)
def test_a_missing_tensor_is_named(name, tmp_path):
    with pytest.raises(InputError, match=f"tensor {name} is missing".replace(".", r"\.")):
        load_huggingface(edited(tmp_path, {}, drop=(name,)))


def test_other_broken_tensors_are_named(tmp_path):
    with pytest.raises(InputError, match=r"value_embeds\.0\.weight has no place"):
        load_huggingface(edited(tmp_path, {}, add={"value_embeds.0.weight": np.zeros((128, 48), np.float32)}))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        load_huggingface(edited(tmp_path, {}, add={"lm_head.weight": np.zeros((128, 48), np.float32)}))


@pytest.mark.parametrize("change", [{"value_gates": (1,)}, {"test_time_noise": 0.1}, {"embed_scale": 2.0}])
def test_a_config_that_its_folder_could_not_give_back_is_refused(change, tmp_path):
    params, config = parcae()
    config = dataclasses.replace(config, **change)
    with pytest.raises(InputError, match=f"{next(iter(change))} = .*: no public format holds this"):
        save_huggingface(tmp_path / "out", params, config)
    assert not (tmp_path / "out").exists()


def test_a_gate_needs_the_channels_that_it_reads():
    with pytest.raises(InputError, match=r"value_gates = .*embed_dim of at least 32"):
        dataclasses.replace(preset("nano").model, embed_dim=16, value_gates=(1,))
    with pytest.raises(InputError, match=r"value_tables = \(3,\): must be of 0 \.\. 2"):
        dataclasses.replace(preset("nano").model, value_tables=(3,))
    with pytest.raises(InputError, match=r"loop\.linear_bridge = True: must be false"):
        dataclasses.replace(preset("nano").model.loop, linear_bridge=True)
