"""Every published family against vectors from public code: forward, decoding, gradients, round trips."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script
from golden_cases import ACTIVATIONS, GOLDEN, GRADIENTS, LOGITS, LOSS, cases, model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import rdlm
from rdlm.config import Block, InputError, Loop, LossConfig, ModelConfig, preset
from rdlm.hf import load_huggingface, save_huggingface, table
from rdlm.hf.names import to_theirs
from rdlm.model.blocks import normalise

PLAIN = ("llama", "olmo2", "qwen2", "qwen3", "gemma3")
RETROFITS = ("retro_llama", "retro_olmo")
NOISY = (*RETROFITS, "parcae")
FAMILIES = (*PLAIN, "ouro", "nanbeige", "hrm_text", *NOISY)


forward = jax.jit(rdlm.forward, static_argnames=("config", "select"))
gradient = jax.jit(jax.value_and_grad(rdlm.loss), static_argnames=("config", "steps"))
start = jax.jit(rdlm.prefill, static_argnames=("config", "capacity", "max_steps"))
step = jax.jit(rdlm.decode_step, static_argnames="config")


def family(name):
    return model(f"families/{name}")


def arrays(name, case):
    return cases(f"families/{name}")[case]["arrays"]


def loops(name, case):
    return cases(f"families/{name}")[case].get("loops")


@pytest.mark.parametrize("name", [*PLAIN, "nanbeige", "hrm_text"])
def test_logits_of_models_without_noise(name):
    params, config = family(name)
    given = arrays(name, "forward")
    np.testing.assert_allclose(forward(params, config, given["input_ids"]).logits, given["logits"], **LOGITS)


@pytest.mark.parametrize("name", PLAIN)
def test_positions_are_rotary_ones(name):
    params, config = family(name)
    given = arrays(name, "forward_positions")
    out = forward(params, config, given["input_ids"], positions=given["position_ids"])
    np.testing.assert_allclose(out.logits, given["logits"], **LOGITS)


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_every_loop_of_ouro(r):
    params, config = family("ouro")
    given = arrays("ouro", "forward")
    out = forward(params, config, given["input_ids"], r)
    np.testing.assert_allclose(out.latents, given["states"][r - 1], **ACTIVATIONS)
    np.testing.assert_allclose(out.logits, given["logits"][r - 1], **LOGITS)


@pytest.mark.parametrize("r", [1, 2])
def test_both_stacks_after_every_high_cycle(r):
    params, config = family("hrm_text")
    given, low = arrays("hrm_text", "forward"), config.loop.low_cycles
    out = forward(params, config, given["input_ids"], r)
    np.testing.assert_allclose(out.latents, given["z_high"][r - 1], **ACTIVATIONS)
    halves = np.split(out.state, 2, axis=-1)
    np.testing.assert_allclose(halves, [given["z_high"][r - 1], given["z_low"][low * r - 1]], **ACTIVATIONS)


def test_every_low_cycle():
    params, config = family("hrm_text")
    given, n = arrays("hrm_text", "forward"), config.core_layers
    outputs = rdlm.analysis.capture(params, config, given["input_ids"], 2, layers=True).layers
    calls = outputs[:, n - 1 :: n]  # the last block of each call; its norm follows
    low = normalise(calls[:, :-1].reshape(given["z_low"].shape), None, config.norm_eps)
    np.testing.assert_allclose(low, given["z_low"], **ACTIVATIONS)


@pytest.mark.parametrize("name", RETROFITS)
@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_retrofits_at_every_depth(name, r):
    params, config = family(name)
    given = arrays(name, "forward")
    out = forward(params, config, given["input_ids"], r, state=given["input_states"])
    np.testing.assert_allclose(out.latents, given[f"latent_states_r{r}"], **ACTIVATIONS)
    np.testing.assert_allclose(out.logits, given[f"logits_r{r}"], **LOGITS)


@pytest.mark.parametrize("name", RETROFITS)
def test_retrofits_from_zero_and_at_other_positions(name):
    params, config = family(name)
    zero = arrays(name, "forward_zero_state")
    state = np.zeros((*zero["input_ids"].shape, config.embed_dim), np.float32)
    out = forward(params, config, zero["input_ids"], 3, state=state)
    np.testing.assert_allclose(out.logits, zero["logits_r3"], **LOGITS)
    moved = arrays(name, "forward_positions")
    out = forward(params, config, moved["input_ids"], 2, state=moved["input_states"], positions=moved["position_ids"])
    np.testing.assert_allclose(out.logits, moved["logits_r2"], **LOGITS)


@pytest.mark.parametrize("case", ["forward_loops1", "forward_loops4", "forward_other_norm"])
def test_other_loops_of_nanbeige(case):
    params, config = family("nanbeige")
    if case == "forward_other_norm":
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, close=False))
    given = arrays("nanbeige", case)
    out = forward(params, config, given["input_ids"], loops("nanbeige", case))
    np.testing.assert_allclose(out.logits, given["logits"], **LOGITS)


DECODED = [(n, "decode") for n in (*PLAIN, "ouro", "nanbeige", "hrm_text")] + [
    (n, c) for n in NOISY for c in ("decode_r2", "decode_r5")
]


@pytest.mark.parametrize(("name", "case"), DECODED)
def test_cached_decoding_token_for_token(name, case):
    params, config = family(name)
    given = arrays(name, case)
    prompt, expected = given["input_ids"], given["sequences"][0]
    n, r = prompt.shape[1], cases(f"families/{name}")[case].get("num_steps", config.mean_recurrence)
    states = given.get("input_states")
    state = None if states is None else states[:, :n]
    out, cache = start(params, config, prompt, r, state=state, capacity=len(expected), max_steps=r)
    logits = out.logits[:, -1]
    for i, token in enumerate(expected[n:]):
        np.testing.assert_allclose(logits[0], given["step_logits"][i], **LOGITS)
        assert int(jnp.argmax(logits)) == token
        if n + i + 1 < len(expected):
            state = None if states is None else states[:, n + i]
            out, cache = step(params, config, cache, np.array([token]), jnp.int32(r), state=state)
            logits = out.logits


@pytest.mark.parametrize("name", [*PLAIN, "ouro", "nanbeige", "hrm_text"])
def test_generate_gives_the_same_tokens(name):
    params, config = family(name)
    given = arrays(name, "decode")
    n, expected = given["input_ids"].shape[1], given["sequences"][0]
    out = rdlm.generate(params, config, [given["input_ids"][0]], max_new_tokens=len(expected) - n)
    np.testing.assert_array_equal(out.tokens[0], expected[n:])


# Prompts whose tokens see each other.


def test_a_prefix_in_forward():
    params, config = family("hrm_text")
    given = arrays("hrm_text", "forward_prefix")
    counts = given["token_type_ids"].sum(1)
    out = forward(params, config, given["input_ids"], prefix=counts)
    np.testing.assert_allclose(out.logits, given["logits"], **LOGITS)
    assert np.abs(forward(params, config, given["input_ids"]).logits - given["logits"]).max() > 0.1  # control


def test_a_prefix_in_cached_decoding():
    params, config = family("hrm_text")
    given = arrays("hrm_text", "decode_prefix")
    prompt, sequence = given["input_ids"], given["sequences"][0]
    n = prompt.shape[1]
    out, cache = start(params, config, prompt, prefix=n, capacity=len(sequence))
    np.testing.assert_allclose(out.logits[0, -1], given["step_logits"][0], **LOGITS)
    out, _ = step(params, config, cache, sequence[None, n:-1])
    np.testing.assert_allclose(out.logits[0], given["step_logits"][1:], **LOGITS)


def test_generate_and_the_engine_ask_for_a_prefix_by_prompt():
    params, config = family("hrm_text")
    kinds = {name: arrays("hrm_text", name) for name in ("decode", "decode_prefix")}
    prompts, wanted = [x["input_ids"][0] for x in kinds.values()], [False, True]
    new = 8
    expected = [x["sequences"][0][7 : 7 + new].tolist() for x in kinds.values()]
    assert expected[1] != rdlm.generate(params, config, prompts[1:], max_new_tokens=new).tokens[0].tolist()
    out = rdlm.generate(params, config, [*prompts, [5] * 3], max_new_tokens=new, prefix=[*wanted, True])
    assert [x.tolist() for x in out.tokens[:2]] == expected
    engine = rdlm.Engine(params, config, lanes=2, max_new_tokens=new, capacity=64)
    served = [engine.submit(p, prefix=w) for p, w in zip(prompts, wanted, strict=True)]
    engine.run()
    assert [s.tokens for s in served] == expected


def test_what_a_prefix_needs():
    params, config = family("hrm_text")
    tokens = np.array([[1, 2, 3]])
    with pytest.raises(InputError, match="prefix: every token of this model sees only"):
        rdlm.forward(*family("llama"), tokens, prefix=2)
    with pytest.raises(InputError, match="prefix: every token of this model sees only"):
        rdlm.generate(*family("llama"), [[1, 2]], max_new_tokens=1, prefix=True)
    with pytest.raises(InputError, match="prefix = 4: must be at most the length 3"):
        rdlm.forward(params, config, tokens, prefix=4)
    with pytest.raises(InputError, match="prefix: cannot be had with segment_ids"):
        rdlm.forward(params, config, tokens, prefix=2, segment_ids=np.ones((1, 3), np.int32))
    with pytest.raises(InputError, match="prefix = 3: must be true or false"):
        rdlm.generate(params, config, [[1, 2]], max_new_tokens=1, prefix=3)


@pytest.mark.parametrize("name", [*PLAIN, "nanbeige", "hrm_text", *NOISY])
def test_loss_and_gradients(name):
    params, config = family(name)
    given = arrays(name, "train")
    steps = tuple(cases(f"families/{name}")["train"].get("num_steps", (0, config.mean_recurrence)))
    batch = {"tokens": given["input_ids"], "labels": given["labels"]}
    value, grads = gradient(params, config, batch, steps=steps, state=given.get("input_states"))
    assert abs(value - given["loss"]) <= LOSS
    assert_gradients(name, config, grads)


def assert_gradients(name, config, grads):
    flat = {tuple(k.key for k in path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    expected = load_file(GOLDEN / "families" / name / "grads.safetensors")
    metadata = json.loads((GOLDEN / "families" / name / "cases.json").read_text())
    untrained = metadata["cases"]["train"].get("no_gradient", ())
    assert expected.keys() | set(untrained) == table(config).keys()
    for key, entry in table(config).items():
        g = flat[entry.path]
        if key in untrained:
            assert not g.any()
            continue
        theirs = to_theirs(g if entry.at is None else g[entry.at], entry)
        assert np.linalg.norm(theirs) == pytest.approx(metadata["gradient_norms"][key], rel=GRADIENTS), key
        rows = expected[key]
        part = theirs if theirs.shape == rows.shape else theirs[: metadata["gradient_rows"]]
        assert np.linalg.norm(part - rows) <= GRADIENTS * metadata["gradient_norms"][key], key


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_keeps_every_bit(name, tmp_path):
    params, config = family(name)
    save_huggingface(tmp_path / "out", params, config)
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / "families" / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before.keys() - {"freqs_cis"}:  # derived
        assert before[key].tobytes() == after[key].tobytes(), key
        assert before[key].shape == after[key].shape, key
    again, config_again = load_huggingface(tmp_path / "out")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("name", [*PLAIN, "hrm_text"])
def test_fields_come_back_as_the_type_they_had(name, tmp_path):
    """For classes of transformers, which since version 5 refuses 24.0 as a whole number."""
    save_huggingface(tmp_path / "out", *family(name))
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (GOLDEN / "families" / name, tmp_path / "out")
    )
    common = before.keys() & after.keys()
    assert {"hidden_size", "n_embd", "vocab_size"} & common
    assert {k: type(before[k]) for k in common} == {k: type(after[k]) for k in common}


@pytest.mark.parametrize("name", PLAIN)
def test_both_spellings_of_a_config_are_read(name, tmp_path):
    source = GOLDEN / "families" / name
    (tmp_path / "config.json").write_text((source / "config_v5.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    assert load_huggingface(tmp_path)[1] == family(name)[1]


def test_transformers_5_counts_all_blocks_that_run(tmp_path):
    """num_hidden_layers is then one number of layers for every call, beside num_layers_per_stack."""
    change = {
        "num_hidden_layers": 2 * 2 * (3 + 1),
        "num_layers_per_stack": 2,
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    assert load_huggingface(edited(tmp_path, "hrm_text", change))[1] == family("hrm_text")[1]


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"L_bp_cycles": None}, "loop.low_backprop", (2,)),
        ({"L_bp_cycles": []}, "loop.low_backprop", (1,)),
        ({"L_bp_cycles": [0, 3]}, "loop.low_backprop", (0, 3)),
        ({"embedding_scale": None, "initializer_range": 0.04}, "embed_scale", 25.0),
        ({"prefix_lm": False}, "prefix_attention", False),
    ],
)
def test_fields_of_two_stacks_and_their_defaults(change, field, value, tmp_path):
    config = load_huggingface(edited(tmp_path, "hrm_text", change))[1]
    for part in field.split("."):
        config = getattr(config, part)
    assert config == value


def test_gradients_through_all_low_calls_are_written_as_counts(tmp_path):
    params, config = family("hrm_text")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, low_backprop=()))
    save_huggingface(tmp_path / "out", params, config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["L_bp_cycles"] == [3, 3]
    assert load_huggingface(tmp_path / "out")[1].loop.low_backprop == (3, 3)


# Controls: each of these is another function, and the vectors notice it.


def wrong_logits(name, change):
    params, config = family(name)
    params, config = change(jax.tree.map(np.array, params), config)
    given = arrays(name, "forward")
    r, state = (2, given["input_states"]) if name in NOISY else (None, None)
    expected = given.get("logits", given.get("logits_r2"))
    expected = expected[-1] if expected.ndim == 4 else expected
    return np.abs(forward(params, config, given["input_ids"], r, state=state).logits - expected).max()


def flipped(params, config):
    Q = config.head_dim
    for j in range(config.core_layers):
        qkv = params[f"core_{j}"]["attn"]["qkv"]
        heads = qkv.reshape(qkv.shape[0], -1, Q)
        params[f"core_{j}"]["attn"]["qkv"] = np.concatenate([heads[..., ::2], heads[..., 1::2]], -1).reshape(qkv.shape)
    return params, config


def swapped(params, config):
    for j in range(config.core_layers):
        params[f"core_{j}"]["mlp"]["fc"] = params[f"core_{j}"]["mlp"]["fc"][::-1]
    return params, config


def based(params, config):
    return params, dataclasses.replace(config, rope_base=2 * config.rope_base)


def unwindowed(params, config):
    return params, dataclasses.replace(config, attention_window=100)


def one_base(params, config):
    return params, dataclasses.replace(config, window_rope_base=None)


@pytest.mark.parametrize("change", [unwindowed, one_base])
def test_control_windows_and_their_rotary_base_show(change):
    assert wrong_logits("gemma3", change) > 0.01


def exchanged(params, config):
    for j in range(config.core_layers):
        params[f"core_{j}"], params[f"low_{j}"] = params[f"low_{j}"], params[f"core_{j}"]
    return params, config


def ungated(params, config):
    for block in params.values():
        if isinstance(block, dict):
            grouped = block["attn"]["qkv"].reshape(config.embed_dim, config.kv_heads, 4, -1)
            block["attn"]["qkv"] = np.ascontiguousarray(grouped[:, :, :3]).reshape(config.embed_dim, -1)
    return params, dataclasses.replace(config, block=dataclasses.replace(config.block, output_gate=False))


def one_cycle_less(params, config):
    return params, dataclasses.replace(config, loop=dataclasses.replace(config.loop, low_cycles=2))


@pytest.mark.parametrize("change", [exchanged, ungated, one_cycle_less])
def test_control_stacks_gate_and_low_cycles_show(change):
    assert wrong_logits("hrm_text", change) > 0.1


@pytest.mark.parametrize("counts", [(1,), (3,)])
def test_control_the_low_calls_with_gradient_show(counts):
    params, config = family("hrm_text")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, low_backprop=counts))
    given = arrays("hrm_text", "train")
    batch = {"tokens": given["input_ids"], "labels": given["labels"]}
    with pytest.raises(AssertionError):
        assert_gradients("hrm_text", config, gradient(params, config, batch, steps=(0, 2))[1])


def test_forward_and_loss_have_the_same_gradient():
    """With traced depths too, and counted from the last recurrence."""
    params, config = family("hrm_text")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, low_backprop=(0, 2)))
    tokens = arrays("hrm_text", "train")["input_ids"]

    def by_forward(params, n, k):
        log_p = jax.nn.log_softmax(rdlm.forward(params, config, tokens[:, :-1], (n, k)).logits)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    ours = jax.jit(jax.grad(by_forward))(params, jnp.int32(1), jnp.int32(2))
    theirs = gradient(params, config, tokens, steps=(1, 2))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def unnormed(params, config):
    return params, dataclasses.replace(config, block=dataclasses.replace(config.block, qk_norm="none"))


@pytest.mark.parametrize(
    ("name", "change"), [(n, c) for n in FAMILIES for c in (flipped, swapped, based) if n != "parcae" or c != swapped]
)
def test_control_another_layout_or_base_shows(name, change):
    assert wrong_logits(name, change) > 0.01


@pytest.mark.parametrize("name", ["olmo2", "qwen3", "retro_olmo"])
def test_control_a_dropped_norm_shows(name):
    assert wrong_logits(name, unnormed) > 0.1


# The exit gate.


@pytest.mark.parametrize("case", ["forward", "forward_more_loops"])
def test_exit_distribution(case):
    params, config = family("ouro")
    given = arrays("ouro", case)
    p = rdlm.analysis.exit_distribution(params, config, given["input_ids"], loops("ouro", case))
    np.testing.assert_allclose(p, given["exit_pdf"], atol=5e-6)
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("q", ["0.2", "0.4", "0.6", "0.8", "0.95"])
def test_selection_by_the_gate_is_the_hubs(q):
    params, config = family("ouro")
    given = arrays("ouro", f"exit_q{q}")
    out = forward(params, config, given["input_ids"], exit_rule=rdlm.exits.gate(float(q)), select=True)
    np.testing.assert_array_equal(out.steps, given["exit_steps"] + 1)
    np.testing.assert_allclose(out.logits, given["logits"], **LOGITS)


def test_the_gate_is_a_real_exit():
    """A row's first token exits where the hub selects. Its state and keys are frozen then, so later tokens differ."""
    params, config = family("ouro")
    given = arrays("ouro", "exit_q0.6")
    out = forward(params, config, given["input_ids"], exit_rule=rdlm.exits.gate(0.6))
    np.testing.assert_array_equal(out.steps[:, 0], given["exit_steps"][:, 0] + 1)
    np.testing.assert_allclose(out.logits[:, 0], given["logits"][:, 0], **LOGITS)
    assert np.abs(out.logits - given["logits"]).max() > 0.01
    assert (forward(params, config, given["input_ids"], exit_rule=rdlm.exits.gate(1.0)).steps == 4).all()


def test_the_engine_exits_where_generate_does():
    params, config = family("ouro")
    prompts, rule = [[5, 6, 7], [9, 8, 7, 6, 5], [3]], rdlm.exits.gate(0.6)
    alone = [rdlm.generate(params, config, [p], max_new_tokens=6, exit_rule=rule) for p in prompts]
    engine = rdlm.Engine(params, config, lanes=2, max_new_tokens=6, exit_rule=rule)
    requests = [engine.submit(p, max_new_tokens=6) for p in prompts]
    engine.run()
    for request, out in zip(requests, alone, strict=True):
        np.testing.assert_array_equal(request.tokens, out.tokens[0])
        np.testing.assert_array_equal(request.steps, out.steps[0])
    together = rdlm.generate(params, config, prompts, max_new_tokens=6, exit_rule=rule)
    for row, out in zip(together.steps, alone, strict=True):
        np.testing.assert_array_equal(row, out.steps[0])
    assert len({int(s) for out in alone for s in out.steps[0]}) > 1  # or nothing was tested


requests = st.lists(
    st.tuples(st.lists(st.integers(0, 159), min_size=1, max_size=12), st.sampled_from([0.2, 0.5, 0.8, 1.0])),
    min_size=3,
    max_size=3,
)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(requests)
def test_gates_are_exact_in_ragged_batches(batch):
    """Tokens and steps of a prompt depend on nothing beside it. Thresholds are far from every sum, see the vectors."""
    params, config = family("ouro")

    def serve(batch):
        prompts, thresholds = zip(*batch, strict=True)
        rule = rdlm.exits.gate(np.array(thresholds, np.float32))
        out = rdlm.generate(params, config, prompts, max_new_tokens=4, exit_rule=rule)
        return [(t.tolist(), s.tolist()) for t, s in zip(out.tokens, out.steps, strict=True)]

    assert serve(batch) == [serve([request])[0] for request in batch]


def test_a_gate_needs_a_model_that_has_one_and_every_check():
    with pytest.raises(InputError, match="has no exit gate"):
        rdlm.forward(*family("llama"), np.array([[1, 2]]), 2, exit_rule=rdlm.exits.gate(0.5))
    with pytest.raises(InputError, match="min_steps = 0"):
        rdlm.forward(*family("ouro"), np.array([[1, 2]]), exit_rule=rdlm.exits.gate(0.5), min_steps=1)
    rule = rdlm.exits.twice(rdlm.exits.gate(0.5))
    with pytest.raises(InputError, match="check_every = 1"):
        rdlm.forward(*family("ouro"), np.array([[1, 2]]), exit_rule=rule, check_every=2)
    with pytest.raises(InputError, match="select: needs an exit_rule"):
        rdlm.forward(*family("ouro"), np.array([[1, 2]]), select=True)


def gate_objective(case, terms):
    params, config = family("ouro")
    given = arrays("ouro", case)
    batch = {"tokens": given["input_ids"], "labels": given["labels"]}
    value, grads = gated(params, config, batch, steps=(0, 4), terms=terms)
    assert abs(value - given["loss"]) <= LOSS
    return config, given, grads


gated = jax.jit(jax.value_and_grad(rdlm.loss), static_argnames=("config", "steps", "terms"))


def test_the_objective_of_all_exits():
    config, _, grads = gate_objective("train", LossConfig(gate="exit", gate_entropy=0.1))
    assert_gradients("ouro", config, grads)


def test_the_objective_of_the_gate_alone():
    _, given, grads = gate_objective("gate_train", LossConfig(gate="improvement"))
    np.testing.assert_allclose(grads["gate"]["w"], given["grad_gate_weight"][0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads["gate"]["bias"], given["grad_gate_bias"][0], rtol=1e-4)
    assert not any(np.any(g) for g in jax.tree.leaves(grads | {"gate": {}}))


def test_what_a_gate_objective_needs():
    ouro = dataclasses.replace(preset("ouro_1p4b"), loss=LossConfig(gate="exit"))
    for change in ({"recurrence": preset("nano").recurrence}, {"model": preset("nano").model}):
        with pytest.raises(InputError, match=r"loss\.gate = 'exit': needs"):
            dataclasses.replace(ouro, data=preset("nano").data, **change)
    with pytest.raises(InputError, match="no curriculum"):
        dataclasses.replace(ouro, recurrence=dataclasses.replace(ouro.recurrence, curriculum_steps=10))
    for steps in (4, (2, 2)):
        with pytest.raises(InputError, match="all with gradient"):
            rdlm.loss(*family("ouro"), np.array([[1, 2, 3]]), steps=steps, terms=LossConfig(gate="exit"))
    optimizer = dataclasses.replace(ouro.optimizer, weight_decay=0.1)
    with pytest.raises(InputError, match=r"optimizer\.weight_decay"):
        dataclasses.replace(ouro, loss=LossConfig(gate="improvement"), optimizer=optimizer)


# What cannot be built is named.


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"model_type": "parcae"}, "model_type = 'parcae'"),
        ("llama", {"model_type": "loopformer"}, "model_type = 'loopformer': the time of a step modulates its blocks"),
        ("llama", {"model_type": "iquestloopcoder"}, "the second pass reads keys of the first through a gate"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"head_dim": 12}, "self_attn.q_proj.weight"),
        ("llama", {"head_dim": 15}, "head_dim = 15"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"layer_types": 5}, "layer_types = 5"),
        ("llama", {"layer_types": ["full_attention"]}, "must name num_hidden_layers = 3"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "must be an object with numbers"),
        ("llama", {"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000"),
        ("gemma3", {"rope_parameters": 5}, "rope_parameters = 5"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("nanbeige", {"loop_loss_weights": "abc"}, "loop_loss_weights = 'abc'"),
        ("nanbeige", {"skip_loop_final_norm": "false"}, "skip_loop_final_norm = 'false'"),
        ("ouro", {"total_ut_steps": None}, "total_ut_steps is missing"),
        ("llama", {"vocab_size": 161}, "vocab_size = 161"),
        ("llama", {"num_hidden_layers": 4}, "model.layers.3."),
        ("llama", {"num_hidden_layers": 2}, "model.layers.2."),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"intermediate_size": "80"}, "intermediate_size = '80'"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3", {"model_type": "llama"}, "_norm.weight has no place"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3", {"sliding_window": 0}, "attention_window = 0"),
        ("ouro", {"total_ut_steps": 0}, "total_ut_steps = 0"),
        ("nanbeige", {"enable_mhc": True}, "enable_mhc = True"),
        ("nanbeige", {"loop_share_kv": True}, "loop_share_kv = True"),
        ("nanbeige", {"pretraining_tp": 2}, "pretraining_tp = 2"),
        ("hrm_text", {"L_cycles": None}, "L_cycles is missing"),
        ("hrm_text", {"L_cycles": 0}, "L_cycles = 0"),
        ("hrm_text", {"H_cycles": 0}, "H_cycles = 0"),
        ("hrm_text", {"L_bp_cycles": 2}, "L_bp_cycles = 2"),
        ("hrm_text", {"L_bp_cycles": [1, 2, 3]}, "L_bp_cycles = [1, 2, 3]"),
        ("hrm_text", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("hrm_text", {"mlp_bias": True}, "mlp_bias = True"),
        ("hrm_text", {"embedding_scale": 0.0}, "embedding_scale = 0.0"),
        ("hrm_text", {"num_layers_per_stack": 3}, "model.L_module.layers.2."),
        ("hrm_text", {"num_key_value_heads": 2}, "gqkv_proj.weight: shape"),
        ("hrm_text", {"model_type": "llama"}, "tensor model.norm.weight is missing"),
        ("retro_llama", {"initial_state_mode": "skip-adapter"}, "initial_state_mode = 'skip-adapter'"),
        ("retro_llama", {"injection_type": "add"}, "injection_type = 'add'"),
        ("retro_llama", {"n_layers_in_recurrent_block": 3, "n_layers": 5}, "transformer.core_block.2."),
    ],
)  # fmt: skip
def test_broken_folders_name_the_field(name, change, words, tmp_path):
    folder = edited(tmp_path, name, change)
    with pytest.raises(InputError) as error:
        load_huggingface(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def edited(tmp_path, name, change=None, drop=(), add=None):
    source = GOLDEN / "families" / name
    fields = json.loads((source / "config.json").read_text()) | (change or {})
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in fields.items() if v is not None or k not in (change or {})})
    )
    tensors = {k: v for k, v in load_file(source / "model.safetensors").items() if k not in drop}
    save_file(tensors | (add or {}), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "drop"),
    [
        ("ouro", "model.early_exit_gate.weight"),
        ("hrm_text", "model.z_L_init"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("olmo2", "model.norm.weight"),
        ("retro_olmo", "transformer.core_block.1.attn.k_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(name, drop, tmp_path):
    with pytest.raises(InputError, match=f"tensor {re.escape(drop)} is missing"):
        load_huggingface(edited(tmp_path, name, drop=(drop,)))


@pytest.mark.parametrize("name", ["ouro", "gemma3", "hrm_text", "retro_olmo", "parcae"])
def test_by_way_of_a_run_folder(name, tmp_path, monkeypatch):
    for source, target in ((GOLDEN / "families" / name, "run"), (tmp_path / "run", "back")):
        monkeypatch.setattr(sys, "argv", ["convert_huggingface.py", str(source), str(tmp_path / target), "--verify"])
        assert script("convert_huggingface").main() == 0
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / "families" / name, tmp_path / "back"))
    before.pop("freqs_cis", None), after.pop("freqs_cis", None)  # derived
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


TINY = ModelConfig(vocab_size=20, embed_dim=12, num_heads=2, mlp_dim=10, coda_layers=0, max_length=16)
ONCE = Loop(injection="none", start="embedding", bridge=False)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("block.activation", {"block": Block(activation="gelu_tanh")}),
        ("block.norm_weight", {"block": Block(norm_weight="offset")}),
        ("block.qk_norm", {"block": Block(qk_norm="width"), "qk_bias": False}),
        ("embed_scale", {"embed_scale": 2.0}),
        ("head_dim", {"head_width": 8}),
        ("loop.start", {"loop": Loop(start="embedding")}),
        ("loop.start_std", {"loop": Loop(start_std=0.1)}),
        ("loop.bridge", {"loop": Loop(bridge=False)}),
        ("loop.close", {"loop": Loop(close=True, bridge=False)}),
        ("loop.start_std", {"block": Block(norm_output="none"), "qk_bias": False}),
        ("combination", {"block": Block(norm_output="none"), "loop": ONCE, "qk_bias": False}),
    ],
)
def test_a_config_without_a_public_format_is_refused(field, change, tmp_path):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(InputError, match="no public format") as error:
        save_huggingface(tmp_path / "out", rdlm.init_params(config, jax.random.key(0)), config)
    assert field in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_window_has_a_rotary_base_of_its_own_though_no_layer_sees_everything():
    params, config = family("gemma3")
    windowed = dataclasses.replace(config, full_attention_layers=())
    expected = dataclasses.replace(windowed, rope_base=config.window_rope_base, window_rope_base=None)
    tokens = arrays("gemma3", "forward")["input_ids"]
    ours, theirs = (forward(params, c, tokens).logits for c in (windowed, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
