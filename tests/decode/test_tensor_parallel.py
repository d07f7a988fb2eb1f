"""A model whose heads are split over devices makes the same tokens, and its devices exchange no more than they must."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import EXACT, NEW, TINY, R, crowd, generated, new_engine, outcome, params, serve
from golden_cases import model
from small_runs import saved

import rdlm
from rdlm.config import DataConfig, InputError, Parallel, Sampling, Speculative, TuneConfig
from rdlm.decode.engine import Engine
from rdlm.decode.lanes import advance
from rdlm.model import split, tensor_parallel
from rdlm.tokenizer import Tokenizer
from rdlm.tune import begin
from rdlm.weights import read_huggingface

FAMILIES = {
    "A2": "bias on queries and keys, adapter, tied embeddings",
    "families/retro_olmo": "norms over the width of all heads",
    "families/ouro": "gate, no adapter",
    "families/nanbeige": "a shared cache",
    "families/hrm_text": "two stacks, gated attention",
    "families/parcae": "value embeddings, diagonal injection, linear bridge",
    "families/qwen2": "bias on queries, keys and values",
}
DATA = {"data": DataConfig(sequence_length=24, tokenizer_size=256)}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]


def greedy(params, config, **options):
    given = {"max_new_tokens": 5, "num_steps": min(config.mean_recurrence, 4)} | options
    out = rdlm.generate(params, config, PROMPTS, **given)
    return [[x.tolist() for x in part] for part in (out.tokens, out.steps, out.prompt_steps)], out.log_probs


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_makes_the_same_tokens_on_two_devices(name):
    params, config = model(name)
    wanted, log_probs = greedy(params, config)
    found, close = greedy(*tensor_parallel(params, config, 2))
    assert found == wanted
    for ours, theirs in zip(close, log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


BROKEN = {"summed": lambda x: x, "gathered": lambda x: jnp.tile(x, split.parts()), "rows": lambda t, i: t[i % len(t)]}


@pytest.mark.parametrize("lost", BROKEN)
def test_without_one_of_the_exchanges_tokens_differ(lost, monkeypatch):
    params, config = model("A2")
    wanted, _ = greedy(params, config)
    monkeypatch.setattr(split, lost, BROKEN[lost])
    fresh = dataclasses.replace(config, max_length=config.max_length - len(lost))  # compiles anew
    found, _ = greedy(*tensor_parallel(params, fresh, 2))
    assert found != wanted


@pytest.mark.parametrize("kind", EXACT[:2])
def test_an_engine_on_four_devices_serves_what_generate_makes_on_one(kind):
    # 2 key heads become 4.
    engine = new_engine(kind, tensor=4, prefill_chunk=5, prompt_cache=10**7)
    for seed in (0, 1):
        batch = [dataclasses.replace(ask, leaves=None) for ask in crowd(kind, seed)]
        assert [outcome(s) for s in serve(kind, batch, engine)] == generated(kind, batch)


@pytest.mark.parametrize("options", [{}, {"speculative": Speculative(2, 3)}, {"parallel": Parallel(window=4, inner=2)}])
@pytest.mark.parametrize(("tensor", "data"), [(4, 1), (2, 4)])  # two prompts, and rows that fill up
def test_drafts_and_windows_are_the_same(options, tensor, data):
    wanted, _ = greedy(params(), TINY, num_steps=R, **options)
    assert greedy(*tensor_parallel(params(), TINY, tensor, data), num_steps=R, **options)[0] == wanted


@pytest.mark.parametrize("data", [1, 2])
def test_a_tick_costs_two_sums_a_layer_and_one_gather_and_nothing_among_copies(data):
    config = dataclasses.replace(TINY, core_layers=3)
    placed, wider = tensor_parallel(rdlm.init_params(config, jax.random.key(0)), config, 4, data)
    engine = Engine(placed, wider, lanes=4, max_new_tokens=NEW, num_steps=R)
    counts, number, running = jnp.zeros(4, jnp.int32), jnp.int32(9), engine._running
    lowered = advance.lower(placed, wider, running.lanes, counts, number, number, running.flush, False)
    text = lowered.compile().as_text()
    lines = re.findall(r" (all-\w+|reduce-scatter|collective-permute)\(.*op_name=\"([^\"]*)\"", text)
    everywhere = collections.Counter(kind for kind, name in lines if "/cond/" not in name)
    assert everywhere == {"all-reduce": 2 * 3, "all-gather": 1}
    # A flush, in a branch: two sums for a layer of coda and prelude each and one for the embedding, a gather of the
    # logits and one of the injection.
    branch = collections.Counter(kind for kind, name in lines if "/cond/" in name)
    assert branch == {"all-reduce": 2 * 2 + 1, "all-gather": 2}
    groups = re.findall(r"replica_groups=(\S+), ", text)
    assert set(groups) == {"{{0,1,2,3}}" if data == 1 else "{{0,1,2,3},{4,5,6,7}}"}  # devices of one copy
    assert len(groups) == len(lines)


def test_every_device_holds_its_share():
    config = dataclasses.replace(TINY, num_kv_heads=4)
    placed, same = tensor_parallel(rdlm.init_params(config, jax.random.key(0)), config, 4)
    assert same == config
    attention = placed["core_0"]["attn"]
    assert attention["qkv"].addressable_shards[0].data.size == attention["qkv"].size // 4
    core = Engine(placed, config, lanes=2, max_new_tokens=2)._running.lanes.cache.core[0]
    assert core.k.addressable_shards[0].data.shape[-1] == config.head_dim
    norm = placed["core_0"]["norm_1"]["scale"]
    assert norm.addressable_shards[0].data.shape == norm.shape


def test_a_key_may_be_bound_to_one_device():
    key = jax.device_put(jax.random.key(3), jax.devices()[0])
    options = {"sampling": Sampling(temperature=1.0), "key": key}
    wanted, _ = greedy(params(), TINY, **options)
    assert greedy(*tensor_parallel(params(), TINY, 4), **options)[0] == wanted


def test_the_config_from_before_is_refused():
    placed, _ = tensor_parallel(params(), TINY, 4)
    with pytest.raises(InputError, match="use the config that tensor_parallel returned"):
        greedy(placed, TINY)


def test_what_copies_cannot_share_is_refused():
    for data, most in ((0, 2), (3, 2), (True, 2)):
        with pytest.raises(InputError, match=f"data = {data}: must be a number of copies .* from 1 to {most}"):
            tensor_parallel(params(), TINY, 4, data)
    placed = tensor_parallel(params(), TINY, 1, 4)
    for options, said in (
        ({"lanes": 6}, "lanes = 6: must be a multiple of the 4 copies of the model"),
        ({"lanes": 8, "cache_tokens": 127}, "cache_tokens = 127: .* one lane, 32, for each of 4 copies of the model"),
    ):
        with pytest.raises(InputError, match=said):
            Engine(*placed, **options)


def test_programs_are_compiled_once():
    engine = new_engine(EXACT[0], tensor=2)
    serve(EXACT[0], crowd(EXACT[0], 2), engine)
    compiled = advance._cache_size()
    serve(EXACT[0], crowd(EXACT[0], 3), engine)
    serve(EXACT[0], crowd(EXACT[0], 3), new_engine(EXACT[0], tensor=2))
    assert advance._cache_size() == compiled


def test_quantized_matrices_are_split_with_their_scales():
    small = rdlm.quantize(params(), TINY, "int8", embeddings=True)
    assert greedy(*tensor_parallel(small, TINY, 4))[0] == greedy(small, TINY)[0]


def test_a_run_folder_and_a_hugging_face_folder_are_read_in_parts(tmp_path):
    tokenizer = Tokenizer.bytes_only()
    folder = saved(tmp_path / "run", 320, DATA, tokenizer)
    whole = rdlm.load(folder)
    rdlm.save_huggingface(tmp_path / "hf", whole.params, whole.config)
    tokenizer.save(tmp_path / "hf")
    for place in (folder, tmp_path / "hf"):
        run = rdlm.load(place, tensor=4, data=2)  # 2 heads become 4
        assert run.config.num_heads == 4
        expected = tensor_parallel(whole.params, whole.config, 4, 2)[0]
        jax.tree.map(np.testing.assert_array_equal, run.params, expected)
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), run.params, expected)
        assert all(jax.tree.leaves(same))
        assert (
            run.generate("The capital", max_new_tokens=4).text == whole.generate("The capital", max_new_tokens=4).text
        )


def test_an_accelerator_holds_what_is_read_from_a_hugging_face_folder(tmp_path, monkeypatch):
    params, config = model("families/ouro")
    rdlm.save_huggingface(tmp_path, params, config)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    held, same = read_huggingface(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, held, params)
    for x, y in zip(jax.tree.leaves(held), jax.tree.leaves(params), strict=True):
        assert (x.dtype, x.committed, x.sharding.device_set) == (y.dtype, True, {jax.local_devices()[0]})


def test_what_does_not_divide_is_refused(tmp_path):
    olmo, olmo_config = model("families/retro_olmo")
    pairs = begin(params(), TuneConfig(only=("core",), lora_rank=2), jax.random.key(0))
    cases = [
        (params(), TINY, 0, "tensor = 0: must be a number of devices, from 1 to 8"),
        (params(), TINY, 9, "tensor = 9: must be a number of devices, from 1 to 8"),
        (params(), TINY, True, "tensor = True: must be"),
        (params(), TINY, 5, "tensor = 5: does not divide mlp_dim = 24; use a divisor of it"),
        (params() | pairs, TINY, 2, "has low-rank pairs; merge them"),
        (olmo, dataclasses.replace(olmo_config, num_heads=1, num_kv_heads=1, head_width=16), 2, "norms of this model"),
    ]
    for held, config, devices, said in cases:
        with pytest.raises(InputError, match=re.escape(said)) as error:
            tensor_parallel(held, config, devices)
        assert "\n" not in str(error.value)
    folder = saved(tmp_path / "run", 320, DATA, Tokenizer.bytes_only())
    for devices in (16, 0, True):
        with pytest.raises(InputError, match=f"tensor = {devices}: must be"):
            rdlm.load(folder, tensor=devices)
