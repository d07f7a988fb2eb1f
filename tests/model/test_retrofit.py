"""rdlm.retrofit: a plain model of public code, cut into a recurrent one, against that code's logits and tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import LOGITS, cases, deviation, model

import rdlm
from rdlm.config import InputError, ModelConfig, RotaryScaling, preset
from rdlm.hf.plain import FAMILIES

CUTS = {"llama": (1, 1, 1), "olmo2": (1, 1, 1), "qwen2": (1, 1, 0), "qwen3": (0, 2, 1), "gemma3": (1, 1, 1)}


forward = jax.jit(rdlm.forward, static_argnames="config")


@functools.cache
def vectors(name):
    return cases(f"families/{name}")["forward"]["arrays"]


@functools.cache
def retrofitted(name):
    prelude, core, coda = CUTS[name]
    return rdlm.retrofit(*model(f"families/{name}"), prelude=prelude, core=core, coda=coda)


def worst(params, config, name, r=2):
    """Largest deviation of a logit from the plain model's in public code."""
    given = vectors(name)
    return deviation(forward(params, config, given["input_ids"], r).logits, given["logits"])


@pytest.mark.parametrize("name", CUTS)
def test_logits_are_the_sources_at_every_depth(name):
    params, config = retrofitted(name)
    assert (config.prelude_layers, config.core_layers, config.coda_layers) == CUTS[name]
    plain = model(f"families/{name}")
    given = vectors(name)
    source = forward(*plain, given["input_ids"]).logits
    for r in (1, 2, 8):
        logits = forward(params, config, given["input_ids"], r).logits
        np.testing.assert_allclose(logits, given["logits"], **LOGITS)
        assert deviation(logits, source) <= 1e-5


@pytest.mark.parametrize("name", ["olmo2", "gemma3"])
def test_cached_decoding_gives_the_sources_tokens(name):
    given = cases(f"families/{name}")["decode"]["arrays"]
    n, expected = given["input_ids"].shape[1], given["sequences"][0]
    out = rdlm.generate(*retrofitted(name), given["input_ids"], max_new_tokens=len(expected) - n, num_steps=3)
    np.testing.assert_array_equal(out.tokens[0], expected[n:])


@pytest.mark.parametrize("name", CUTS)
def test_another_adapter_order_or_cut_is_another_model(name):
    params, config = retrofitted(name)
    assert worst(params | {"adapter": params["adapter"][::-1]}, config, name) > 1e-2
    first, *_, last = sorted(x for x in params if x.startswith(("prelude_", "core_", "coda_")))
    assert worst(params | {first: params[last], last: params[first]}, config, name) > 1e-2


def test_windows_stay_with_their_layers():
    """Of the golden Gemma only layer 1 sees everything; without layer 0 it is the first."""
    params, config = model("families/gemma3")
    dropped, cut = rdlm.retrofit(params, config, prelude=0, core=1, coda=1, drop=True)
    assert config.full_attention_layers == (1,)
    assert cut.full_attention_layers == (0,)
    rest = {k: v for k, v in params.items() if not k.startswith("core_")}
    shorter = (
        rest | {"core_0": params["core_1"], "core_1": params["core_2"]},
        dataclasses.replace(config, core_layers=2, full_attention_layers=(0,)),
    )
    tokens = vectors("gemma3")["input_ids"]
    assert deviation(forward(dropped, cut, tokens, 3).logits, forward(*shorter, tokens, 1).logits) <= 1e-5
    wrong = dataclasses.replace(cut, full_attention_layers=(1,))
    assert deviation(forward(dropped, wrong, tokens, 3).logits, forward(*shorter, tokens, 1).logits) > 1e-3


def test_first_and_last_layers_are_kept():
    params, config = model("families/llama")
    cut, _ = rdlm.retrofit(params, config, prelude=1, core=1, coda=0, drop=True)
    assert {k for k in cut if k.endswith("_0")} == {"prelude_0", "core_0"}
    for ours, theirs in (("prelude_0", "core_0"), ("core_0", "core_2")):
        jax.tree.map(np.testing.assert_array_equal, cut[ours], params[theirs])


def test_the_published_start():
    """A uniform adapter, a state of almost no noise, an untied head, and as many parameters as the published model."""
    params, config = model("families/llama")
    D, cut = config.embed_dim, {"prelude": 1, "core": 1, "coda": 1, "adapter": "random"}
    made, config = rdlm.retrofit(params, config, **cut, key=jax.random.key(1))
    bound = 1 / np.sqrt(2 * D)
    assert np.abs(made["adapter"]).max() <= bound
    assert np.std(made["adapter"]) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    again, _ = rdlm.retrofit(*model("families/llama"), **cut, key=jax.random.key(1))
    other, _ = rdlm.retrofit(*model("families/llama"), **cut)
    np.testing.assert_array_equal(made["adapter"], again["adapter"])
    assert deviation(made["adapter"], other["adapter"]) > bound
    np.testing.assert_array_equal(made["head"], params["wte"])
    assert made["head"] is not made["wte"]
    assert config.loop.start_std == pytest.approx(0.008703882797784892)
    assert (config.tie_embeddings, config.loop.bridge, config.mean_recurrence) == (False, False, 32)

    llama = ModelConfig(
        vocab_size=128256, embed_dim=2048, num_heads=32, num_kv_heads=8, mlp_dim=8192, qk_bias=False, embed_scale=1.0,
        prelude_layers=0, core_layers=16, coda_layers=0, mean_recurrence=1, backprop_depth=1, rope_base=5e5,
        rope_scaling=RotaryScaling(32.0, 1.0, 4.0, 8192), block=FAMILIES["llama"].block, loop=FAMILIES["llama"].loop,
    )  # fmt: skip
    abstract = jax.eval_shape(functools.partial(rdlm.init_params, llama), jax.random.key(0))
    cut = functools.partial(rdlm.retrofit, config=llama, prelude=4, core=6, coda=4, drop=True)
    shapes = jax.eval_shape(lambda params: cut(params)[0], abstract)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_385_228_288


def test_wrong_cuts_and_models_are_refused():
    params, config = model("families/llama")
    right = {"prelude": 1, "core": 1, "coda": 1}
    for change, message in (
        ({"prelude": 0}, "0 \\+ 1 \\+ 1 layers: the model has 3"),
        ({"core": 2}, "1 \\+ 2 \\+ 1 layers: the model has only 3"),
        ({"core": 2, "drop": True}, "only 3"),
        ({"core": 0}, "core = 0: must be an integer of at least 1"),
        ({"coda": -1}, "coda = -1"),
        ({"prelude": True}, "prelude = True"),
        ({"config": preset("nano").model}, "recurrent already"),
        ({"config": model("families/ouro")[1]}, "recurrent already"),
        ({"config": dataclasses.replace(config, value_tables=(0,))}, "embeds values by token"),
    ):
        with pytest.raises(InputError, match=message):
            rdlm.retrofit(**{"params": params, "config": config} | right | change)
    with pytest.raises(InputError, match="recurrent already"):
        rdlm.retrofit(*retrofitted("llama"), **right)


def test_bf16_models_keep_their_dtype():
    params, config = model("families/llama")
    made, _ = rdlm.retrofit(rdlm.cast(params, "bfloat16"), config, prelude=1, core=1, coda=1)
    assert {str(x.dtype) for x in jax.tree.leaves(made)} == {"bfloat16"}
    assert jnp.array_equal(made["adapter"][1], jnp.eye(config.embed_dim))
