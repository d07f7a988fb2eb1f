"""Counts against the published ones and against the arrays they count."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from rdlm.config import PRESETS, Block, CachePolicy, Loop, ModelConfig
from rdlm.config.presets import HUGINN_3P5B, HUGINN_TPU
from rdlm.model import init_params
from rdlm.model.cache import allocate
from rdlm.perf import flops
from rdlm.train import metrics

TINY = ModelConfig(vocab_size=20, embed_dim=12, num_heads=2, mlp_dim=10, prelude_layers=1, core_layers=3, coda_layers=2)
TWO_STACKS = {
    "prelude_layers": 0,
    "coda_layers": 0,
    "qk_bias": False,
    "block": Block(norm_output="none", norm_weight="none", output_gate=True),
    "loop": Loop(injection="none", start="embedding", close=True, bridge=False, low_cycles=2),
}


def count(config):
    """Elements of every parameter array, from shapes alone."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset(name):
    assert flops.parameters(PRESETS[name].model) == count(PRESETS[name].model)


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": False}, {"qk_bias": False}, {"num_kv_heads": 1}, {"padded_vocab_size": 32}, TWO_STACKS],
    ids=str,
)
def test_parameters_of_every_shape(change):
    config = dataclasses.replace(TINY, **change)
    assert flops.parameters(config) == count(config)


@pytest.mark.parametrize(
    ("name", "published"),
    [("ouro_1p4b", 1_434_652_673), ("hrm_text_1b", 1_182_795_264), ("recurrent_llama_1b", 1_385_228_288)],
)
def test_parameters_of_published_shapes(name, published):
    assert flops.parameters(PRESETS[name].model) == published


def test_a_recurrence_of_two_stacks_counts_every_call():
    config = dataclasses.replace(TINY, **TWO_STACKS)
    block, keys, r = 12 * 4 * 12 + 12 * 12 + 3 * 12 * 10, 7, 5
    calls = 3 * (2 + 1)
    assert flops.forward_flops(config, r, keys) == r * calls * (2 * block + 4 * keys * 12) + 2 * 20 * 12
    assert flops.materialised_parameters(config, r) == flops.parameters(config) + (r * calls - 6) * block


def test_parameters_of_the_published_model():
    # The shape in docs/model.md, and the paper's count of the unrolled model.
    assert flops.parameters(HUGINN_3P5B) == 3_564_976_800
    assert flops.block_parameters(HUGINN_3P5B) == 395_398_080
    assert flops.core_parameters(HUGINN_3P5B) == 1_581_592_320
    shapes = jax.eval_shape(lambda key: init_params(HUGINN_3P5B, key), jax.random.key(0))
    parts = {name: math.prod(shapes[name].shape) for name in ("adapter", "wte")}
    assert parts == {"adapter": 55_756_800, "wte": 346_030_080}
    assert flops.parameters(HUGINN_TPU) == pytest.approx(3_564_976_800, rel=0.01)
    for r in (1, 8, 32):
        assert flops.materialised_parameters(HUGINN_3P5B, r) == pytest.approx(3.565e9 + 1.5816e9 * (r - 1), rel=1e-4)
    assert flops.effective_depth(HUGINN_3P5B, 32) == 132


@pytest.mark.parametrize(
    ("keys", "recomputed", "expected"),
    [(0, 0, 172), (4096, 0, 190), (2048.5, 0, 181), (4096, 8, 219)],
    ids=["matmul only", "full attention", "causal attention", "with recomputation"],
)
def test_training_flops_of_the_published_model(keys, recomputed, expected):
    # GFLOP per token at n = 25, k = 8 (with the unsplit adapter).
    work = flops.training_flops(HUGINN_3P5B, 25, 8, keys) + recomputed * flops.core_flops(HUGINN_3P5B, keys)
    assert round(work / 1e9) == expected


def test_mfu_is_counted_with_full_attention_and_without_recomputation(monkeypatch):
    # The published convention, 190 GFLOP per token at n = 25, k = 8, whatever the run recomputes: steps of 7 seconds.
    clock = iter((0.0, 1.0, 8.0, 15.0))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    run, peak = PRESETS["huginn_3p5b"], 256 * 197e12
    assert run.recurrence.remat != "none"
    meter = metrics.Meter(run, peak)
    assert "mfu" not in meter.measure(25, 8)  # it compiles
    tokens = 4096 * 4096
    found, deeper = meter.measure(25, 8), meter.measure(26, 8)
    assert found["tokens_per_second"] == tokens / 7
    assert round(found["mfu"] * peak * 7 / tokens / 1e9) == 190
    # One more recurrence without gradient is one forward pass of the core: 3.7 GFLOP.
    more = (deeper["mfu"] - found["mfu"]) * peak * 7 / tokens
    assert more == pytest.approx(2 * 4 * (395_398_080 - 4 * 5280 - 2 * 5280) + 4 * 5280**2 + 4 * 4 * 4096 * 5280)


def test_forward_flops_are_twice_the_matrix_elements_touched():
    # By hand: 2 per element of every matrix a token passes, 4 * D per key it attends to in every layer.
    config, r, keys = TINY, 5, 7
    block = 12 * 3 * 12 + 12 * 12 + 3 * 12 * 10
    layers = config.prelude_layers + r * config.core_layers + config.coda_layers
    by_hand = layers * (2 * block + 4 * keys * 12) + r * 2 * (2 * 12 * 12) + 2 * 20 * 12
    assert flops.forward_flops(config, r, keys) == by_hand


def test_cache_bytes_of_the_published_model():
    # 21,120 bytes per token and slot in bf16: 2 + 4r + 2 slots, or 20 at four kept recurrences. Each of 5,280 columns
    # takes 5,376, whole tiles of 128.
    assert flops.key_value_bytes(HUGINN_3P5B, itemsize=2) == 21_120
    for policy, r, slots in ((CachePolicy(), 32, 132), (CachePolicy(recurrences=4), 32, 20), (CachePolicy(), 1, 8)):
        assert flops.cache_bytes(HUGINN_3P5B, policy, r, batch=1, capacity=1, itemsize=2) == 21_504 * slots


@pytest.mark.parametrize(
    "policy",
    [CachePolicy(), CachePolicy(lookup="skip"), CachePolicy(4), CachePolicy(1), CachePolicy(4, dtype="int8")],
)
@pytest.mark.parametrize(
    "change",
    [{}, {"num_kv_heads": 1}, {"num_kv_heads": 1, "qk_bias": False}, {"embed_dim": 1056, "num_heads": 11}, TWO_STACKS],
    ids=str,
)
def test_cache_bytes_are_those_of_the_arrays(policy, change):
    config, r, batch, capacity = dataclasses.replace(TINY, **change), 6, 3, 16
    for dtype in ("float32", "bfloat16"):
        cache = jax.eval_shape(lambda d=dtype: allocate(config, policy, policy.sets(r), batch, capacity, d))
        arrays = jax.tree.leaves((cache.prelude, cache.core, cache.coda))
        size = np.dtype(dtype).itemsize if dtype == "float32" else 2
        assert sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) == flops.cache_bytes(
            config, policy, r, batch, capacity, size
        )


@pytest.mark.parametrize("policy", [CachePolicy(1), CachePolicy(1, dtype="int8")], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, tie_embeddings=False, num_kv_heads=1)])
def test_one_recurrence_and_one_check_read_every_matrix_and_the_cache_once(config, policy):
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    if not config.tie_embeddings:
        del shapes["wte"]  # of which a token needs one row
    matrices = sum(math.prod(x.shape) for path, x in jax.tree.leaves_with_path(shapes) if "norm" not in str(path))
    biases = sum(math.prod(x.shape) for path, x in jax.tree.leaves_with_path(shapes) if "bias" in str(path))
    norms = config.embed_dim  # ln_f
    token = flops.Decoding(batch=5, depth=1, checks=1, capacity=7)
    cache = flops.cache_bytes(config, policy, 1, 5, 7, 2)
    assert token.total(token.parts(config, 2, policy)) == 2 * (matrices - biases - norms) + cache


def test_depth_checks_and_rows_cost_what_they_read():
    one, (D, F, V) = flops.Decoding(1, 3, 2, 0), (12, 10, 20)
    core, coda = 3 * (4 * D * D + 3 * D * F) + D * D, 2 * (4 * D * D + 3 * D * F)
    parts = one.parts(TINY, 2)
    assert one.total(parts) - one._replace(depth=2).total(parts) == 2 * core
    assert one.total(parts) - one._replace(checks=1).total(parts) == 2 * (coda + V * D)
    assert one._replace(batch=9).parts(TINY, 2) == parts, "rows share the weights"
    small = one.parts(TINY, 2, matrices=1)
    assert small["recurrence"] == core + D * D, "the adapter stays as it is"
    assert small["check"] == coda + 2 * V * D, "so does the head"
    assert one.flops(TINY) == flops.forward_flops(TINY, 3, 0) + flops.check_flops(TINY, 0)


@pytest.mark.parametrize(
    ("sizes", "axes", "share"),
    [
        ((1, 1, 1), 2, 0),
        ((2, 1, 1), 2, 1 / 4),
        ((2, 2, 1), 2, 1 / 2),
        ((4, 4, 1), 2, 1 / 2),  # its corners
        ((16, 16, 1), 2, 1),
        ((2, 2, 1), 3, 1 / 3),
        ((4, 4, 4), 3, 1),
        ((4, 4, 2), 3, 1 / 2),
    ],
)
def test_links_of_the_chip_with_fewest_neighbours(sizes, axes, share):
    assert flops.links(list(np.ndindex(sizes)), axes) == share
