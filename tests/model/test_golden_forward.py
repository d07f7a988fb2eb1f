"""Forward passes against the public reference: logits, latents and intermediates, with controls that must fail."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import ACTIVATIONS, LOGITS, cases, deviation, model, of_kind

import rdlm.model.blocks
from rdlm.hf.names import rotary_buffer
from rdlm.model import context, core_step, embed, forward, inject, network, readout
from rdlm.model.blocks import TransformerBlock, rotary_tables
from rdlm.recurrence import trajectory

DEBUG = of_kind("debug")


compiled = jax.jit(forward, static_argnums=1)


def run(name, case, r, call=compiled):
    """Our forward pass of a golden case at depth r."""
    params, config = model(name)
    arrays = cases(name)[case]["arrays"]
    tokens = arrays["input_ids"]
    state = arrays.get("input_states", np.zeros((*tokens.shape, config.embed_dim), np.float32))
    with jax.default_matmul_precision("highest"):
        return call(params, config, tokens, r, state=state, positions=arrays.get("position_ids")), arrays


@pytest.mark.parametrize(
    ("name", "case", "r"), [(m, c, r) for m, c in of_kind("forward") for r in cases(m)[c]["num_steps"]]
)
def test_logits_and_latents(name, case, r):
    out, arrays = run(name, case, r)
    np.testing.assert_allclose(out.logits, arrays[f"logits_r{r}"], **LOGITS)
    if f"latent_states_r{r}" in arrays:
        np.testing.assert_allclose(out.latents, arrays[f"latent_states_r{r}"], **ACTIVATIONS)
    np.testing.assert_array_equal(out.steps, r)


def test_every_forward_case_is_replayed():
    assert of_kind("forward") == [
        *((m, c) for m in ("A", "A2") for c in ("forward", "forward_zero_state", "forward_positions")),
        ("G_gqa", "forward"),
    ]
    assert DEBUG == [("A", "debug"), ("A2", "debug")]


@functools.cache
def intermediates(name):
    """Our counterparts of a debug case's arrays, by their names there."""
    params, config = model(name)
    arrays = cases(name)["debug"]["arrays"]
    tokens, s0 = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["input_states"])
    ctx = context(config, jnp.arange(tokens.shape[1]), None)
    with jax.default_matmul_precision("highest"):
        e, _ = embed(params, config, tokens, ctx)
        scaled, _ = embed(params, dataclasses.replace(config, prelude_layers=0), tokens, ctx)
        _, seen = TransformerBlock(config).apply(
            {"params": params["prelude_0"]}, scaled, ctx, capture_intermediates=True, mutable=["intermediates"]
        )
        block = seen["intermediates"]
        found = {f"prelude0_norm_{i}": block[f"norm_{i}"]["__call__"][0] for i in (1, 2, 3, 4)}
        found["prelude0_attn"] = block["attn"]["__call__"][0][0]
        found["prelude0_mlp"] = block["mlp"]["__call__"][0]
        found["scaled_embed"] = scaled
        found["prelude_out"] = e
        injected = inject(params, config, e)
        states = trajectory(lambda s, i: core_step(params, config, s, injected, ctx)[0], s0, 4)
        found["core_states"] = states[1:]
        found["logits_r4"] = readout(params, config, states[4], ctx)[0]
    return found


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(m, t) for m, c in DEBUG for t in cases(m)[c]["tensors"] if t not in ("input_ids", "input_states")],
)
def test_intermediates(name, tensor):
    expected = cases(name)["debug"]["arrays"][tensor]
    tolerance = LOGITS if tensor == "logits_r4" else ACTIVATIONS
    np.testing.assert_allclose(intermediates(name)[tensor], expected, **tolerance)


@pytest.mark.parametrize("base", [50000.0, 10000.0])
def test_rotary_angles_are_the_buffers_at_every_position(base):
    # The published model's 4096 positions, where a last-bit difference of a frequency would turn an angle by 2e-4.
    _, config = model("A")
    config = dataclasses.replace(config, embed_dim=192, num_heads=2, max_length=4096, rope_base=base)
    ours = jnp.stack(rotary_tables(jnp.arange(4096), config), -1)
    np.testing.assert_allclose(ours, rotary_buffer(config)[0], atol=2e-6, rtol=0)


# Controls: each of these must leave the reference, or the tests above prove nothing about it.


def half_rotation(x, cos, sin):
    """The other convention: pairs (i, i + Q/2) instead of neighbours."""
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def coda_without_second_norm(params, config, s, ctx, cached_kv=None, frozen_kv=None, active=None):
    z = network._norm(params, "ln_f", config, s)
    y, new_kv = network._blocks(params, config, "coda", z, ctx, cached_kv, frozen_kv, active)
    return (y, z), new_kv


def off(name="A", case="forward", r=4):
    """By how many times the tolerance our logits miss the reference, traced anew."""
    out, arrays = run(name, case, r, call=forward)
    expected = arrays[f"logits_r{r}"]
    return float(np.max(np.abs(out.logits - expected) / (LOGITS["atol"] + LOGITS["rtol"] * np.abs(expected))))


def test_control_nothing_changed():
    assert off() <= 1


def test_control_rotary_convention(monkeypatch):
    monkeypatch.setattr(rdlm.model.blocks, "rotate", half_rotation)
    assert off() > 100


def test_control_second_norm(monkeypatch):
    monkeypatch.setattr(network, "coda", coda_without_second_norm)
    assert off() > 100


def test_control_depth_shifted_by_one():
    for r in (1, 2, 4, 8):
        out, arrays = run("A", "forward", r + 1)
        assert deviation(out.logits, arrays[f"logits_r{r}"]) > 10 * LOGITS["atol"]
