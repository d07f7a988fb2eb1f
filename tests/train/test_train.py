"""Training: one program for every depth, resume to the same numbers, the same losses on any mesh."""

import dataclasses
import functools
import importlib
import json
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import Flips

import rdlm.train.loop
from rdlm import sharding
from rdlm.checkpoint import load_checkpoint, read_config, saved_steps, write_config
from rdlm.config import PRESETS, InputError, MeshConfig
from rdlm.evaluation.depth import depth_curve
from rdlm.losses import Depths, as_batch, batch_state, token_losses
from rdlm.optim import optimizer
from rdlm.train import Trainer, draw_depth, init_state, layout_of, state_shardings, train_step
from rdlm.train.metrics import MetricsWriter, read_metrics

NANO = PRESETS["nano"]
ROOT = Path(__file__).parents[2]


def rows(step, batch=8, length=32):
    """A batch that is a function of the step."""
    tokens = np.random.default_rng(step).integers(0, NANO.model.vocab_size, (batch, length + 1)).astype(np.int32)
    ids = np.arange(batch, dtype=np.int32)[:, None] + np.zeros((1, length), np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "sequence_ids": ids}


def test_one_program_serves_200_steps_of_sampled_depth():
    tx = optimizer(NANO.optimizer, 200)
    run = dataclasses.replace(NANO, steps=200)
    state = init_state(run, tx)
    step_fn = jax.jit(functools.partial(train_step, run, tx), donate_argnums=0)
    depths = set()
    for step in range(200):
        state, metrics = step_fn(state, rows(step, batch=1, length=8))
        depths.add((int(metrics["n"]), int(metrics["k"])))
    assert step_fn._cache_size() == 1
    assert len(depths) >= 8, "the draws must really differ"
    assert {k for _, k in depths} == {1, 2}


def test_the_depth_draw_is_a_function_of_seed_and_step():
    draw = lambda run, step: tuple(int(x) for x in draw_depth(run, jnp.int32(step)))  # noqa: E731
    first = [draw(NANO, step) for step in range(30)]
    assert first == [draw(NANO, step) for step in range(30)]
    assert first != [draw(dataclasses.replace(NANO, seed=1), step) for step in range(30)]
    assert len(set(first)) > 5


@functools.cache
def programs_on(mesh_config, devices):
    """(mesh, a function that makes the first state, the train step) on so many devices."""
    mesh = sharding.make_mesh(mesh_config, NANO.model, jax.devices()[:devices])
    tx = optimizer(NANO.optimizer, NANO.steps)
    _, shardings = state_shardings(NANO, tx, mesh)
    init_fn = jax.jit(functools.partial(init_state, NANO, tx), out_shardings=shardings)
    run = dataclasses.replace(NANO, mesh=mesh_config)
    step_fn = jax.jit(functools.partial(train_step, run, tx, layout=layout_of(run, mesh)), donate_argnums=0)
    return mesh, init_fn, step_fn


@functools.cache
def losses_on(mesh_config, devices, scale=1.0):
    """Losses of four steps on a mesh of so many devices."""
    (mesh, init_fn, step_fn), losses = programs_on(mesh_config, devices), []
    state = init_fn()
    if scale != 1.0:
        state = state._replace(params=jax.tree.map(lambda x: x * scale, state.params))
    for step in range(4):
        state, metrics = step_fn(state, jax.device_put(rows(step), sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_losses_do_not_depend_on_the_mesh(data, fsdp):
    one = losses_on(MeshConfig(1, 1), 1)
    np.testing.assert_allclose(losses_on(MeshConfig(data, fsdp), 8), one, atol=1e-5, rtol=0)
    if data == 8:
        wrong = losses_on(MeshConfig(data, fsdp), 8, scale=1.01)
        assert np.abs(wrong - one).max() > 1e-4, "a wrong scale must be seen"


# The whole loop, on a corpus that is prepared in milliseconds


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A run of 8 steps on a small text of its own."""
    invent = random.Random(0)
    words = ["".join(invent.choices("aeioubdglmnrst", k=invent.randint(2, 7))) for _ in range(99)]
    texts = [f"{i} " + " ".join(invent.choices(words, k=60)) for i in range(80)]
    monkeypatch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: texts)
    return dataclasses.replace(
        NANO,
        data=dataclasses.replace(NANO.data, folder=str(tmp_path / "data"), batch_size=8, validation_fraction=0.2),
        checkpoint=dataclasses.replace(NANO.checkpoint, every=3),
        evaluation=dataclasses.replace(NANO.evaluation, every=4, batches=1, depths=(1, 2)),
        run_dir=str(tmp_path / "run"),
        steps=8,
    )


def programs(monkeypatch):
    """The list of compiled train steps that trainers will make from now on."""
    made, jit = [], jax.jit

    def noting(function, **options):
        program = jit(function, **options)
        if getattr(function, "func", None) is train_step:
            made.append(program)
        return program

    monkeypatch.setattr(jax, "jit", noting)
    return made


@pytest.mark.slow
def test_a_preempted_run_goes_on_on_another_mesh(small, monkeypatch, tmp_path):
    folder, made, says = tmp_path / "run", programs(monkeypatch), []
    with monkeypatch.context() as patched:
        patched.setattr(rdlm.train.loop, "Preemption", lambda: Flips(6))  # whatever moment of a step that is
        assert Trainer(dataclasses.replace(small, mesh=MeshConfig(1, 8)), says.append).run() == 75
    saved = saved_steps(folder)[-1]
    assert steps_of(folder) == set(range(saved))
    assert 3 < saved < 8
    assert f"saved step {saved}" in says[-1]
    # Saved on eight devices, loaded on one.
    params, config = load_checkpoint(folder)
    assert config == small.model
    assert {len(x.devices()) for x in jax.tree.leaves(params)} == {1}
    assert Trainer(dataclasses.replace(small, mesh=MeshConfig(8, 1)), says.append).run() == 0
    assert f"at step {saved}" in says[-2]
    whole = dataclasses.replace(small, mesh=MeshConfig(8, 1), run_dir=str(tmp_path / "whole"))
    assert Trainer(whole, says.append).run() == 0
    ours, reference = curve(folder), curve(tmp_path / "whole")
    assert [(s, n, k) for s, _, n, k, _ in ours] == [(s, n, k) for s, _, n, k, _ in reference]
    np.testing.assert_allclose([x[1] for x in ours], [x[1] for x in reference], atol=1e-5, rtol=0)
    # Each of the three compiled its step once, on a mesh too.
    assert [program._cache_size() for program in made] == [1, 1, 1]
    # Older checkpoints can still be asked for, and the newest is not one of them.
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(folder, step=saved)[0], params)
    assert not np.array_equal(load_checkpoint(folder)[0]["wte"], params["wte"])
    # A run may become longer, but not another one.
    Trainer(dataclasses.replace(small, steps=20))
    with pytest.raises(InputError, match=r"optimizer.learning_rate = 0.003, not 0.1"):
        Trainer(dataclasses.replace(small, optimizer=dataclasses.replace(small.optimizer, learning_rate=0.1)))
    with pytest.raises(InputError, match=r"steps = 5: .* is already at step 8"):
        Trainer(dataclasses.replace(small, steps=5), says.append).run()


@pytest.mark.parametrize("reads", range(2, 6))
def test_exit_75_means_saved_whenever_the_signal_comes(reads, small, monkeypatch, tmp_path):
    # Between any two looks at the flag. The step itself is a stand-in: this is about the loop.
    def step(config, tx, state, batch, layout, frozen):
        metrics = {name: jnp.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
        metrics |= {"n": jnp.int32(1), "k": jnp.int32(1), "skipped": jnp.int32(0), "first_bad": jnp.int32(-1)}
        return state._replace(step=state.step + 1), metrics

    monkeypatch.setattr(rdlm.train.loop, "train_step", step)
    monkeypatch.setattr(rdlm.train.loop, "Preemption", lambda: Flips(reads))
    says = []
    assert Trainer(dataclasses.replace(small, mesh=MeshConfig(8, 1)), says.append).run() == 75
    saved = saved_steps(tmp_path / "run")
    assert saved
    assert f"saved step {saved[-1]} " in says[-1]
    assert steps_of(tmp_path / "run") == set(range(saved[-1]))


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    write_config(tmp_path, NANO)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "params").mkdir(parents=True)  # named, but never finished
    assert saved_steps(tmp_path) == []
    with pytest.raises(InputError, match="no complete checkpoint yet") as refused:
        load_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_what_is_given_for_a_run_folder_is_named_for_what_it_is(tmp_path):
    run = tmp_path / "runs" / "small"
    (run / "checkpoints" / "7" / "params").mkdir(parents=True)
    (run / "tokenizer").mkdir()
    write_config(run, NANO)
    (run / "metrics.jsonl").write_text("")
    given = {
        run / "config.json": f"is a file; give the folder that holds it, {run}",
        run / "metrics.jsonl": f"is a file; give the folder that holds it, {run}",
        run / "checkpoints": f"it is a part of {run}: give that",
        run / "checkpoints" / "7": f"it is a part of {run}: give that",
        run / "checkpoints" / "7" / "params": f"it is a part of {run}: give that",
        run / "tokenizer": f"it is a part of {run}: give that",
        tmp_path / "runs": "it holds small: give one of them",
    }
    for name, kind in (("manifest", "prepared data"), ("tokenizer", "a tokenizer"), ("adapter_config", "an adapter")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text("{}")
        given[tmp_path / name] = f"it holds {kind}"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    given[tmp_path / "model"] = "a Hugging Face folder; convert it first"
    for path, words in given.items():
        with pytest.raises(InputError, match=re.escape(words)) as refused:
            load_checkpoint(path)
        assert "\n" not in str(refused.value)
    assert read_config(run) == NANO


def steps_of(folder):
    return {row["step"] for row in read_metrics(folder) if "loss" in row}


def curve(folder):
    """What must be equal, of every step."""
    return [(r["step"], r["loss"], r["n"], r["k"], r["grad_norm"]) for r in read_metrics(folder) if "loss" in r]


def test_metrics_drop_what_a_lost_stretch_wrote(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(5):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a kill
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    MetricsWriter(tmp_path, 3).close()
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


DAMAGE = {
    "NUL bytes before a row": (b'\0\0\0{"step": 2, "loss": 1.0}', True),
    "NUL bytes behind a row": (b'{"step": 2, "loss": 1.0}\0', True),
    "NUL bytes alone": (b"\0" * 5000, False),
    "another encoding": ('{"step": 2, "note": "é"}'.encode("latin-1"), False),
    "no step": (b'{"loss": 1.0}', False),
    "a step that is none": (b'{"step": "2"}', False),
    "true for a step": (b'{"step": true}', False),
    "another kind of JSON": (b"[1, 2]", False),
    "a number": (b"3", False),
    "half a row": (b'{"step": 2, "lo', False),
    "two halves": (b'{"step": 2, "lo{"step": 2, "loss": 1.0}', False),
    "an empty line": (b"", False),
    "a long number": (b'{"step": ' + b"9" * 5000 + b"}", False),
    "deep": (b'{"step": ' + b"[" * 100_000, False),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_damaged_metrics_are_set_aside_and_what_can_be_read_is_kept(damage, place, tmp_path):
    (line, read), path, lines = DAMAGE[damage], tmp_path / "metrics.jsonl", []
    rows = [json.dumps({"step": step, "loss": step / 3}).encode() for step in range(4)]
    content = b"".join(row + b"\n" for row in [*rows[:place], line, *rows[place:]])
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"metrics.jsonl: line {place + 1} is damaged") as refused:
        read_metrics(tmp_path)
    assert "\n" not in str(refused.value)
    MetricsWriter(tmp_path, 3, say=lines.append).close()
    assert sorted(row["step"] for row in read_metrics(tmp_path)) == [0, 1, 2, *[2] * read]
    assert sorted(row["loss"] for row in read_metrics(tmp_path)) == [0, 1 / 3, 2 / 3, *[1.0] * read]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert len(lines) == 1
    assert f"damaged in 1 lines, the first is line {place + 1}" in lines[0]
    assert "now metrics.jsonl.damaged" in lines[0]
    MetricsWriter(tmp_path, 3, say=lines.append).close()
    assert len(lines) == 1, "it is mended"
    path.write_bytes(content)
    MetricsWriter(tmp_path, 3, say=lines.append).close()
    assert (tmp_path / "metrics.jsonl.damaged2").exists()


def test_the_depth_curve_is_that_of_separate_evaluations():
    params = init_state(NANO, optimizer(NANO.optimizer, 10)).params
    batches, depths = [rows(step, 2, 16) for step in range(2)], (1, 2, 5)
    size = np.arange(NANO.model.vocab_size) % 5 + 1
    found = depth_curve(params, NANO.model, batches, depths, size)
    labels = np.concatenate([b["labels"].ravel() for b in batches])
    assert (found.tokens, found.bytes) == (labels.size, size[labels].sum())
    depths_of = functools.partial(Depths, k=0, max_k=0)

    @jax.jit
    def at_depth(b, r):
        labelled = as_batch(b)
        start = batch_state(params, NANO.model, labelled, None, jax.random.key(0))
        return token_losses(params, NANO.model, labelled, depths_of(r), start)

    for r, nats, bits in zip(depths, found.nats, found.bits_per_byte, strict=True):
        each = [np.asarray(at_depth(b, r)).sum() for b in batches]
        np.testing.assert_allclose(nats, sum(each) / labels.size, atol=1e-5)
        np.testing.assert_allclose(bits, sum(each) / np.log(2) / size[labels].sum(), atol=1e-5)
    assert abs(found.nats[0] - found.nats[2]) > 1e-4, "depths must differ for this to mean something"
