"""What every family can do: the table of docs/families.md, made with small models of public code."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import model

import rdlm
from rdlm import sharding
from rdlm.analysis.vitals import vitals
from rdlm.config import CachePolicy, InputError, MeshConfig, Speculative, preset
from rdlm.recurrence import unroll
from rdlm.train import gradients, layout_of

COLUMNS = {
    "Huginn": ("A2",),
    "retrofit": ("families/retro_olmo",),
    "Ouro": ("families/ouro",),
    "Nanbeige": ("families/nanbeige",),
    "HRM-Text": ("families/hrm_text",),
    "Parcae": ("families/parcae",),
    "plain": ("families/qwen2",),
}

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
NANO = preset("nano")


def small(name):
    """A golden model; of three blocks two, of two stacks one block each, since every call of a block is compiled."""
    params, config = model(name)
    blocks = 1 if config.low_layers else min(config.core_layers, 2)
    kept = {part: x for part, x in params.items() if not (part.startswith("core_") and int(part[5:]) >= blocks)}
    if config.low_layers:
        kept = {part: x for part, x in kept.items() if part != "low_1"}
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, low_cycles=2))
    return kept, dataclasses.replace(config, core_layers=blocks)


def depth_of(config):
    return min(config.mean_recurrence, 4)


def greedy(params, config, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 5, "num_steps": depth_of(config)} | options
    out = rdlm.generate(params, config, prompts, **options)
    return [x.tolist() for x in out.tokens], [x.tolist() for x in out.steps]


def forward(params, config):
    tokens = np.array([PROMPTS[1]])

    @jax.jit
    def expected(r):
        bound = rdlm.bind(params, config, tokens)
        return bound.read(unroll(bound.step, bound.s0, r, 0))[0]

    logits = jax.jit(lambda r: rdlm.forward(params, config, tokens, r).logits)
    for r in (1, 2, 5):
        np.testing.assert_allclose(logits(r), expected(r), atol=1e-5)


def exits(params, config):
    rule = rdlm.exits.latent_diff(0.5)
    together = greedy(params, config, exit_rule=rule, num_steps=6)
    beside_itself = [greedy(params, config, [p, p], exit_rule=rule, num_steps=6) for p in PROMPTS]  # compiles nothing
    assert together == ([t[0] for t, _ in beside_itself], [s[0] for _, s in beside_itself])


def gate(params, config):
    _, steps = greedy(params, config, exit_rule=rdlm.exits.gate(0.5))
    assert min(map(min, steps)) < config.mean_recurrence


def policies(params, config):
    shared = greedy(params, config, cache=CachePolicy(recurrences=1))
    full = greedy(params, config, cache=CachePolicy(lookup="skip"))
    assert full == greedy(params, config)
    assert len(shared[0]) == len(full[0])


def warm_start(params, config):
    assert greedy(params, config, warm_start="normalized")[1] == greedy(params, config)[1]


def prefix(params, config):
    together = greedy(params, config, prefix=True)
    assert together[0] != greedy(params, config)[0]
    assert together[0] == [greedy(params, config, [p, p], prefix=True)[0][0] for p in PROMPTS]


def engine(params, config):
    served = rdlm.Engine(params, config, lanes=2, max_new_tokens=5, num_steps=depth_of(config))
    requests = [served.submit(p, max_new_tokens=5) for p in PROMPTS]
    served.run()
    assert [list(r.tokens) for r in requests] == greedy(params, config)[0]


def speculation(params, config):
    drafted = greedy(params, config, speculative=Speculative(1, 2))
    assert drafted[0] == greedy(params, config)[0]


def run_of(config, mesh):
    config = dataclasses.replace(config, mean_recurrence=depth_of(config), backprop_depth=min(depth_of(config), 2))
    data = dataclasses.replace(NANO.data, batch_size=8, tokenizer_size=config.vocab_size, sequence_length=8)
    return dataclasses.replace(NANO, model=config, data=data, mesh=MeshConfig(**mesh))


@functools.cache
def step_on(run, devices):
    """Loss and gradient of a training step as one program."""
    placed = sharding.make_mesh(run.mesh, run.model, jax.devices()[:devices])
    return jax.jit(functools.partial(gradients, run, layout=layout_of(run, placed)))


def step_of(params, config, devices, mesh):
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (8, 9))
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "labels": jnp.asarray(tokens[:, 1:])}
    return jax.device_get(step_on(run_of(config, mesh), devices)(params, batch, jnp.int32(1)))


def training(params, config):
    value, grads, (n, _) = step_of(params, config, 1, {"data": 1})
    assert np.isfinite(value)
    silent = {path[0].key for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)}
    expected = {"gate", "low_start"}  # one learns from a loss of its own, the other is constant
    if config.loop.start == "embedding" and n > 0:
        expected |= {"wte"}
    assert silent <= expected


def sharded(params, config):
    value, grads, _ = step_of(params, config, 1, {"data": 1})
    split_value, split, _ = step_of(params, config, 8, {"data": 2, "fsdp": 4})
    assert abs(value - split_value) < 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1e-3))


def analysis(params, config):
    tokens = np.array([PROMPTS[1]])
    captured = rdlm.analysis.capture(params, config, tokens, 3, layers=True)
    np.testing.assert_allclose(captured.layers[:, -1], captured.states[1:, ..., : config.embed_dim], atol=1e-6)
    looped = config.mean_recurrence > 1
    assert bool(vitals(params, config, np.arange(12).reshape(2, 6))) == looped


def export(params, config, tmp_path):
    rdlm.save_huggingface(tmp_path, params, config)
    again, same = rdlm.load_huggingface(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, params, again)


ROWS = {
    "forward at any depth": forward,
    "exit rules, batch-exact": exits,
    "exit gate": gate,
    "cache policies": policies,
    "generate, warm start": warm_start,
    "prompts that see themselves": prefix,
    "engine": engine,
    "speculative decoding": speculation,
    "training with depth draws": training,
    "sharded training": sharded,
    "analysis": analysis,
    "export": export,
}


def documented():
    """{row: {column: "yes" or "no"}} of the page."""
    page = (Path(__file__).parents[2] / "docs/families.md").read_text().partition("<!-- capabilities -->")[2]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row: dict(zip(lines[0][1:], cells, strict=True)) for row, *cells in lines[2:]}


def test_the_page_has_these_rows_and_columns():
    assert list(documented()) == list(ROWS)
    assert all(list(cells) == list(COLUMNS) for cells in documented().values())


# One family after the other: its rows share programs.
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("column", "name"), [(c, n) for c, names in COLUMNS.items() for n in names])
def test_the_table(row, column, name, tmp_path):
    params, config = small(name)
    options = {"tmp_path": tmp_path} if row == "export" else {}
    if documented()[row][column] == "yes":
        ROWS[row](params, config, **options)
    else:
        with pytest.raises(InputError) as error:
            ROWS[row](params, config, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["A2", "families/hrm_text"])
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(name):
    params, config = small(name)
    cases = [{"exit_rule": rdlm.exits.latent_diff(0.5), "num_steps": 6}] + [{"prefix": True}] * config.prefix_attention
    for options in cases:
        alone = [greedy(params, config, [p], **options) for p in PROMPTS]
        assert greedy(params, config, **options) == ([t[0] for t, _ in alone], [s[0] for _, s in alone])
