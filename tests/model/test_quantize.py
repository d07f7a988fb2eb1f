"""rdlm.quantize: 8-bit matrices with a scale per channel, in every place that takes parameters."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import NEW, TINY, R
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_params

import rdlm
from rdlm import exits, sharding
from rdlm.config import Block, InputError, Loop, MeshConfig, ModelConfig, TuneConfig
from rdlm.model import logical_axes, quantization, quantized_specs
from rdlm.tune import SCALE, begin, combine, divide, merge

MODULE = sys.modules["rdlm.model.quantize"]
UNTIED = dataclasses.replace(TINY, tie_embeddings=False, block=Block(gated=False, activation="relu2"))
TWO_STACKS = dataclasses.replace(
    TINY, coda_layers=0, loop=Loop(injection="none", start="embedding", close=True, bridge=False, low_cycles=2)
)
MODELS = {  # model, dtype, whether embeddings are quantized
    "tied": (TINY, "int8", True),
    "not gated": (UNTIED, "float8_e4m3fn", True),
    "two stacks": (TWO_STACKS, "int8", False),
}
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 7)).astype(np.int32)


forward = jax.jit(rdlm.forward, static_argnames="config")
loss = jax.jit(rdlm.loss, static_argnames=("config", "steps"))


@functools.cache
def floats(config: ModelConfig = TINY):
    return rdlm.init_params(config, jax.random.key(0)) if config.low_layers else random_params(config, seed=2)


@functools.cache
def small(config: ModelConfig = TINY, dtype="int8", embeddings=False):
    return rdlm.quantize(floats(config), config, dtype, embeddings)


def widened(params):
    """Float parameters of the same values: every quantized array times its scales."""
    if not isinstance(params, dict):
        return params
    scaled = {n: x.astype(jnp.float32) * params[n + SCALE] for n, x in params.items() if n + SCALE in params}
    return {n: scaled.get(n, widened(x)) for n, x in params.items() if not n.endswith(SCALE)}


def leaves(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def share_of_bound(w, q, scale):
    """Largest |w - q scale| in units of what int8 may do to a channel: half of its largest magnitude / 127."""
    bound = jnp.max(jnp.abs(w), -2, keepdims=True) / 254
    return float(jnp.max(jnp.abs(w - q.astype(jnp.float32) * scale) / jnp.maximum(bound, 1e-30)))


# Values


@settings(max_examples=40)
@given(st.integers(0, 9999), st.floats(-12, 12))
def test_a_value_is_off_by_at_most_half_a_scale(seed, magnitude):
    draw = np.random.default_rng(seed)
    w = draw.standard_normal((2, 5, 7)) * 10 ** (magnitude + draw.uniform(-3, 3, (2, 1, 7)))
    w[0, :, 0] = 0
    w = jnp.asarray(w, jnp.float32)
    q, scale, _ = MODULE._quantized(w, "int8", -2)
    assert (q.dtype, scale.shape) == (jnp.int8, (2, 1, 7))
    assert share_of_bound(w, q, scale) <= 1 + 1e-4
    np.testing.assert_array_equal(q[0, :, 0], 0)  # a channel of zeros stays one
    assert (np.abs(np.asarray(q, int)).max(-2)[1] == 127).all()  # all of the range is used
    q, scale, _ = MODULE._quantized(w, "float8_e4m3fn", -2)
    error = jnp.abs(w - q.astype(jnp.float32) * scale)
    assert (error <= jnp.abs(w) * 2.0**-4 * (1 + 1e-5) + scale * 2.0**-9).all()


def test_control_a_scale_along_the_wrong_axis(monkeypatch):
    w = jnp.asarray([[1.0, 100.0], [0.5, 30.0]])

    def share():
        made = rdlm.quantize({"wte": w, "core_0": {"mlp": {"proj": w}}}, TINY)["core_0"]["mlp"]
        return share_of_bound(w, made["proj"], made["proj" + SCALE])

    assert share() <= 1 + 1e-4
    monkeypatch.setattr(MODULE, "_inputs", lambda path: -1)
    assert share() > 10


@pytest.mark.parametrize("embeddings", [False, True])
def test_adapter_norms_and_biases_stay_as_they_are(embeddings):
    config = dataclasses.replace(UNTIED, block=Block(qkv_bias=True, gated=False))
    before, after = leaves(floats(config)), leaves(small(config, embeddings=embeddings))
    changed = {name for name, x in after.items() if x.dtype == jnp.int8}
    blocks = ("prelude_0", "core_0", "coda_0")
    expected = {f"{block}.{m}" for block in blocks for m in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}
    assert changed == expected | ({"wte", "head"} if embeddings else set())
    assert after.keys() == before.keys() | {name + SCALE for name in changed}
    for name in before.keys() - changed:
        np.testing.assert_array_equal(after[name], before[name])
        assert after[name].dtype == before[name].dtype
    assert quantization(small(config, embeddings=embeddings)) == ("int8", embeddings)
    assert quantization(floats(config)) is None


# Everywhere that parameters go


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss_are_those_of_the_same_values_in_float32(name):
    config, dtype, embeddings = MODELS[name]
    params = small(config, dtype, embeddings)
    for r in (1, 5):
        ours, theirs = (forward(p, config, TOKENS, r).logits for p in (params, widened(params)))
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    labels = np.concatenate([TOKENS, TOKENS[:, :1]], 1)
    ours, theirs = (loss(p, config, labels, steps=(3, 0)) for p in (params, widened(params)))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_control_an_exempt_matrix_is_quantized(monkeypatch):
    monkeypatch.setattr(MODULE, "MATRICES", (*MODULE.MATRICES, "adapter"))
    params = rdlm.quantize(floats(), TINY)
    ours, theirs = (forward(p, TINY, TOKENS, 3).logits for p in (params, widened(params)))
    assert jnp.max(jnp.abs(ours - theirs)) > 0.1


def test_a_low_rank_pair_beside_a_quantized_matrix():
    tune = TuneConfig(lora_rank=2)
    learnt = jax.tree.map(lambda x: x + 0.1, begin(floats(), tune, jax.random.key(0)))
    assert not divide(small(), dataclasses.replace(tune, lora_rank=0, only=("core",)))[0].keys() - {"core_0"}
    ours = forward(combine(learnt, small(), tune), TINY, TOKENS, 3).logits
    theirs = forward(combine(learnt, widened(small()), tune), TINY, TOKENS, 3).logits
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    with pytest.raises(InputError, match=r"merge: proj is quantized \(int8\)"):
        merge(combine(learnt, small(), tune))


def test_activations_keep_their_dtype():
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    for embeddings in (False, True):
        params = rdlm.quantize(rdlm.cast(floats(), "bfloat16"), config, embeddings=embeddings)
        assert jax.eval_shape(lambda p=params: rdlm.forward(p, config, TOKENS, 2)).state.dtype == jnp.bfloat16
        kept = leaves(rdlm.cast(params, jnp.float16))
        scales = {name for name in kept if name.endswith(SCALE)}
        assert {str(kept[name].dtype) for name in scales} == {"float32"}
        assert {str(kept[name.removesuffix(SCALE)].dtype) for name in scales} == {"int8"}
        assert {str(x.dtype) for n, x in kept.items() if n not in scales and n + SCALE not in scales} == {"float16"}


def test_a_request_gets_the_same_alone_in_a_batch_and_from_the_engine():
    params = small(embeddings=True)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3], [35, 8]]
    rule = exits.kl(0.02)
    options = {"max_new_tokens": NEW, "num_steps": R, "exit_rule": rule}
    batch = rdlm.generate(params, TINY, prompts, **options)
    engine = rdlm.Engine(params, TINY, lanes=3, max_new_tokens=NEW, num_steps=R, exit_rule=rule)
    served = [engine.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
    engine.run()
    for i, prompt in enumerate(prompts):
        # The batch of one runs in the same compiled shape.
        alone = rdlm.generate(params, TINY, [prompt, *[[0]] * 3], **options)
        assert batch.tokens[i].tolist() == alone.tokens[0].tolist() == served[i].tokens
        assert batch.steps[i].tolist() == alone.steps[0].tolist() == served[i].steps
        np.testing.assert_array_equal(batch.log_probs[i], alone.log_probs[0])
    assert len({int(n) for steps in batch.steps for n in steps}) > 1, "no token exits early: the rule tests nothing"


def test_drafts_are_verified_with_the_same_weights():
    plain = rdlm.generate(small(), TINY, [[3, 1, 4], [1]], max_new_tokens=NEW, num_steps=R)
    drafts = rdlm.Speculative(draft_steps=2, lookahead=2)
    quick = rdlm.generate(small(), TINY, [[3, 1, 4], [1]], max_new_tokens=NEW, num_steps=R, speculative=drafts)
    assert [x.tolist() for x in plain.tokens] == [x.tolist() for x in quick.tokens]


def test_split_over_devices():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), TINY)
    shapes = jax.eval_shape(lambda: rdlm.quantize(rdlm.init_params(TINY, jax.random.key(0)), TINY, embeddings=True))
    axes = quantized_specs(logical_axes(TINY), embeddings=True)
    specs = sharding.parameter_specs(mesh, axes, shapes)
    assert specs["core_0"]["mlp"]["proj" + SCALE] == jax.sharding.PartitionSpec(None, ("fsdp",))
    params = small(embeddings=True)
    split = jax.device_put(params, sharding.named(mesh, specs))
    assert not split["core_0"]["attn"]["qkv"].sharding.is_fully_replicated
    ours, theirs = (forward(p, TINY, TOKENS, 3).logits for p in (split, params))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


# Refusals


def nan_in(params):
    return params | {"core_0": jax.tree.map(lambda x: x * jnp.nan, params["core_0"])}


def with_value(value):
    """Wide embeddings, of which one number is another: a maximum on CPUs passed over a single NaN there."""
    return {"wte": jax.random.normal(jax.random.key(0), (64, 128)).at[31, 57].set(value)}


PLAIN = dataclasses.replace(TINY, loop=Loop(injection="none", start="embedding", bridge=False), mean_recurrence=1)
REFUSED = {
    "twice": (lambda: rdlm.quantize(small(), TINY), r"quantize: the matrices are quantized \(int8\)"),
    "not finite": (lambda: rdlm.quantize(nan_in(floats()), TINY), "params core_0/attn/proj: has values that are not"),
    "one NaN": (lambda: rdlm.quantize(with_value(jnp.nan), TINY, embeddings=True), "params wte: has values"),
    "one infinity": (lambda: rdlm.quantize(with_value(-jnp.inf), TINY, embeddings=True), "params wte: has val"),
    "export": (lambda: rdlm.save_huggingface("never", small(), TINY), r"export: the matrices are quantized \(int8\)"),
    "retrofit": (
        lambda: rdlm.retrofit(small(dtype="float8_e4m3fn"), PLAIN, prelude=1, core=1, coda=1),
        r"retrofit: the matrices are quantized \(float8_e4m3fn\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_no_gradient_goes_into_it():
    labels = np.concatenate([TOKENS, TOKENS[:, :1]], 1)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(rdlm.loss)(small(), TINY, labels, steps=(1, 1))
