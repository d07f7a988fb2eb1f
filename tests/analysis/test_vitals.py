"""Vitals against what they say they are, alarms at their limits, replays of the paper's failed runs, the loop."""

import dataclasses
import functools
import importlib
import itertools
import math
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm.train.loop
from rdlm import losses, sharding
from rdlm.analysis import vitals
from rdlm.checkpoint import saved_steps
from rdlm.config import PRESETS, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from rdlm.model import blocks, context, core_step, embed, init_params, inject, logical_axes
from rdlm.optim import optimizer
from rdlm.recurrence import initial_state
from rdlm.tasks import WordProblem, batch
from rdlm.train import Trainer, init_state, metrics, train_step
from rdlm.train.metrics import Meter, read_metrics

NANO = PRESETS["nano"].model
HEALTHY = {
    "vital_token_correlation": 0.5, "vital_gain": 0.05, "vital_state_drift": 1.0, "vital_residual": 0.02,
    "vital_contraction": 0.2, "vital_loss_r1": 2.1, "vital_loss": 2.0,
}  # fmt: skip


# What the numbers are


@functools.cache
def nano():
    return jax.jit(functools.partial(init_params, NANO))(jax.random.key(0))


def padded():
    """Two rows of 8 tokens; the second ends in three of padding."""
    tokens = np.random.default_rng(0).integers(0, NANO.vocab_size, (8, 9)).astype(np.int32)
    segments = np.ones((8, 8), np.int32)
    segments[1::2, 5:] = 0
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": segments}


def test_the_course_is_that_of_the_states():
    params, rows, key, r = nano(), padded(), jax.random.key(3), NANO.mean_recurrence
    found = jax.device_get(vitals.course(params, NANO, rows, key))
    programs = vitals.course._cache_size()
    again = vitals.course(jax.tree.map(lambda p: p * 1.1, params), NANO, rows, key)
    assert vitals.course._cache_size() == programs
    labelled = losses.as_batch(rows)

    @jax.jit
    def states():
        ctx = context(NANO, labelled.positions, labelled.segment_ids)
        s = initial_state(key, labelled.positions, NANO.embed_dim)
        injected = inject(params, NANO, embed(params, NANO, labelled.tokens, ctx)[0])
        kept = [s]
        for _ in range(r):
            kept.append(core_step(params, NANO, kept[-1], injected, ctx)[0])
        return kept

    kept, here = [np.asarray(s, np.float64) for s in states()], rows["segment_ids"] == 1
    size = lambda s: math.sqrt((s[here] ** 2).mean())  # noqa: E731

    def correlation(s, here):
        """Mean over pairs of different tokens of a row."""
        cosines = []
        for row, valid in zip(s, here, strict=True):
            unit = row[valid] / np.linalg.norm(row[valid], axis=-1, keepdims=True)
            cosines += [unit[a] @ unit[b] for a in range(len(unit)) for b in range(len(unit)) if a != b]
        return np.mean(cosines)

    np.testing.assert_allclose(found.rms, [size(s) for s in kept[1:]], rtol=1e-5)
    np.testing.assert_allclose(found.residual, [size(b - a) / size(a) for a, b in itertools.pairwise(kept)], rtol=1e-4)
    np.testing.assert_allclose(found.correlation, [correlation(s, here) for s in kept[1:]], atol=1e-6)
    whole = [correlation(s, np.ones_like(here)) for s in kept[1:]]
    assert np.abs(found.correlation - whole).max() > 1e-3, "padding must not count"
    at = jax.jit(lambda r: losses.loss(params, NANO, rows, steps=r, key=key))
    np.testing.assert_allclose(found.losses, [at(1), at(r)], rtol=1e-6)
    assert abs(found.losses[0] - found.losses[1]) > 1e-3
    np.testing.assert_allclose(
        found.adapter * math.sqrt(NANO.embed_dim), np.linalg.norm(params["adapter"], axis=(1, 2)), rtol=2e-6
    )
    assert np.abs(np.asarray(again.losses) - found.losses).max() > 1e-3

    values = vitals.vitals(params, NANO, rows, key)
    np.testing.assert_allclose(values["vital_state_drift"], size(kept[r]) / size(kept[r // 2]), rtol=1e-5)
    np.testing.assert_allclose(values["vital_contraction"], found.residual[r - 1] / found.residual[r // 2 - 1])
    np.testing.assert_allclose(values["vital_gain"], 1 - found.losses[1] / found.losses[0], rtol=1e-4)
    once = dataclasses.replace(NANO, mean_recurrence=1, backprop_depth=1)
    assert vitals.vitals(params, once, rows) == {}  # it was never recurrent


def test_vitals_do_not_depend_on_the_mesh():
    mesh = sharding.make_mesh(MeshConfig(2, 4), NANO)
    axes = sharding.named(mesh, sharding.parameter_specs(mesh, logical_axes(NANO), nano()))
    rows = jax.device_put(padded(), sharding.batch_sharding(mesh))
    one, eight = vitals.vitals(nano(), NANO, padded()), vitals.vitals(jax.device_put(nano(), axes), NANO, rows)
    np.testing.assert_allclose(list(eight.values()), list(one.values()), atol=1e-5)
    wrong = vitals.vitals(jax.tree.map(lambda p: p * 1.01, nano()), NANO, padded())
    assert np.abs(np.subtract(list(wrong.values()), list(one.values()))).max() > 1e-3


# Alarms


@pytest.mark.parametrize(
    ("vital", "within", "beyond", "alarm"),
    [
        ("token_correlation", 0.89, 0.91, "hidden-state collapse"),
        ("gain", 0.006, 0.004, "recurrence ignored"),
        ("gain", 0.006, -0.2, "recurrence ignored"),
        ("state_drift", 1.2, 1.3, "state-norm drift"),
        ("state_drift", 0.85, 0.75, "state-norm drift"),
        ("contraction", 0.75, 0.85, "residual not contracting"),
    ],
)
def test_an_alarm_names_the_vital_its_value_and_its_limit(vital, within, beyond, alarm):
    values = HEALTHY | {"vital_residual": 0.1}
    assert vitals.alarms(values | {f"vital_{vital}": within}) == []
    (line,) = vitals.alarms(values | {f"vital_{vital}": beyond})
    assert line.startswith(f"{alarm}: vital_{vital} = {beyond:.3f}"[: len(alarm) + len(vital) + 13])
    assert "limit" in line
    assert "\n" not in line


def test_no_alarm_for_a_settled_state_or_without_vitals():
    # A residual at the noise of its dtype no longer falls; that is no orbit.
    assert vitals.alarms(HEALTHY | {"vital_contraction": 1.1, "vital_residual": 0.01}) == []
    assert vitals.alarms({}) == []


# The paper's failed runs, replayed. Their architectures are not options of the library: tests build them.


def bare_block(self, x, ctx, cached_kv=None, frozen_kv=None, active=None):
    """No norm before attention and MLP, one after each."""
    mixed, new_kv = self.attn(x, ctx, cached_kv, frozen_kv, active)
    x = self.norm_2(mixed + x)
    return self.norm_4(self.mlp(x) + x), new_kv


def pre_norm_block(self, x, ctx, cached_kv=None, frozen_kv=None, active=None):
    """Norms before attention and MLP alone: nothing bounds the sum."""
    mixed, new_kv = self.attn(self.norm_1(x), ctx, cached_kv, frozen_kv, active)
    x = mixed + x
    return self.mlp(self.norm_3(x)) + x, new_kv


@pytest.fixture
def architecture(monkeypatch):
    """architecture(block): blocks are those, embeddings are not scaled, and the adapter is A(s, e) = s + e."""

    def build(block):
        sandwich = blocks.TransformerBlock.__call__

        def call(self, *args):  # the library's own block declares the parameters
            return sandwich(self, *args) if self.is_initializing() else block(self, *args)

        def unscaled(params, config, *args, **options):
            return embed(params | {"wte": params["wte"] * config.embed_dim**-0.5}, config, *args, **options)

        def added(params, config, *args, **options):
            both = jnp.stack([jnp.eye(config.embed_dim)] * 2)
            return core_step(params | {"adapter": both}, config, *args, **options)

        monkeypatch.setattr(blocks.TransformerBlock, "__call__", call)
        for module in (losses, importlib.import_module("rdlm.model.forward")):
            monkeypatch.setattr(module, "embed", unscaled)
            monkeypatch.setattr(module, "core_step", added)
            monkeypatch.setattr(module, "inject", lambda params, config, e, *args: e)
        vitals.course.clear_cache()

    yield build
    vitals.course.clear_cache()


TOY = ModelConfig(
    vocab_size=7, embed_dim=32, num_heads=4, mlp_dim=64, prelude_layers=1, core_layers=1, coda_layers=1,
    rope_base=1e4, mean_recurrence=8, backprop_depth=4,
)  # fmt: skip


def trained(steps, rate):
    """Vitals of the toy model after so many steps on word problems over S3, which depth does help with."""
    task, size = WordProblem("S3", 16), 16
    run = RunConfig(
        model=TOY, steps=steps,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=20, cooldown_steps=steps // 4, weight_decay=0.01),
        data=DataConfig(tokenizer_size=7, sequence_length=17, batch_size=size),
    )  # fmt: skip
    ids = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], (size, 17))

    def rows(seed, step):
        made = batch((task,), seed, step, size)
        return {"tokens": made["tokens"], "labels": made["labels"], "sequence_ids": ids}

    tx = optimizer(run.optimizer, steps)
    state = jax.jit(functools.partial(init_state, run, tx))()
    step_fn = jax.jit(functools.partial(train_step, run, tx), donate_argnums=0)
    for step in range(steps):
        state, _ = step_fn(state, rows(0, step))
    return vitals.vitals(state.params, TOY, rows(1, 0))


def names(values):
    """Names of the alarms that sound."""
    assert all(math.isfinite(x) for x in values.values())
    return {line.partition(":")[0] for line in vitals.alarms(values)}


@pytest.mark.slow
def test_the_good_recipe_trips_no_alarm():
    values = trained(120, 2e-3)
    assert names(values) == set(), values


@pytest.mark.slow
def test_the_first_failed_run_collapses(architecture):
    # At this scale the rate decides: the library's own block collapses too at a rate of 0.1, fifty times the good one.
    architecture(bare_block)
    values = trained(40, 0.3)
    assert names(values) == {"hidden-state collapse", "recurrence ignored"}, values
    assert values["vital_token_correlation"] > 0.98


@pytest.mark.slow
def test_the_second_failed_run_ignores_its_recurrence(architecture):
    # With the learnt adapter a pre-norm model of this size goes on to use its state (gain 0.08 after 150 steps at a
    # rate of 0.01), so this takes A(s, e) = s + e along from the first run: every recurrence adds the same again.
    architecture(pre_norm_block)
    values = trained(80, 0.03)
    assert names(values) == {"recurrence ignored", "state-norm drift"}, values
    assert values["vital_loss"] < 1.7  # it has learnt something: ln 6 = 1.79 knows nothing of the word


# In the loop


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """loop(vitals, **alarms): a run of 6 steps that validates every 2, with those vitals; (exit code, what it said)."""
    invent = random.Random(0)
    words = ["".join(invent.choices("aeioubdglmnrst", k=invent.randint(2, 7))) for _ in range(99)]
    texts = [f"{i} " + " ".join(invent.choices(words, k=60)) for i in range(80)]
    monkeypatch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: texts)

    def step(config, tx, state, batch, layout, frozen):  # a stand-in: this is about the loop
        found = {name: jnp.float32(1) for name in ("loss", "grad_norm", "learning_rate")} | {
            "skipped": jnp.array(False)
        }
        return state._replace(step=state.step + 1), found | {"n": jnp.int32(1), "k": jnp.int32(1)}

    monkeypatch.setattr(rdlm.train.loop, "train_step", step)
    nano = PRESETS["nano"]

    def run(values, **alarms):
        monkeypatch.setattr(rdlm.train.loop, "vitals", lambda params, config, batch: values)
        says = []
        config = dataclasses.replace(
            nano,
            data=dataclasses.replace(nano.data, folder=str(tmp_path / "data"), batch_size=8, validation_fraction=0.2),
            evaluation=dataclasses.replace(nano.evaluation, every=2, batches=1, depths=(1,)),
            checkpoint=dataclasses.replace(nano.checkpoint, every=100),
            alarms=dataclasses.replace(nano.alarms, **alarms),
            run_dir=str(tmp_path / "run"), steps=6,
        )  # fmt: skip
        return Trainer(config, says.append).run(), [line for line in says if "ALARM" in line or "an alarm" in line]

    return run


def test_an_alarm_warns_or_stops_and_saves(loop, tmp_path):
    folder, ill = tmp_path / "run", HEALTHY | {"vital_gain": 0.001}

    def alarmed():
        return {row["step"] + 1: row["alarms"] for row in read_metrics(folder) if "alarms" in row}

    code, says = loop(ill, action="stop", start=3)
    assert code == 3
    assert saved_steps(folder) == [4]  # after the first validation that counts, and only then
    assert list(alarmed()) == [4]
    (line,) = alarmed()[4]
    assert line.startswith("recurrence ignored: vital_gain = 0.0010, limit 0.005")
    assert says[0] == f"step 4  ALARM  {line}"
    assert "saved step 4" in says[1]
    assert {row["step"] + 1 for row in read_metrics(folder) if row.get("vital_gain") == 0.001} == {2, 4}
    # The same run may go on past it, and the last validation warns too.
    code, says = loop(ill, action="warn", start=3)
    assert code == 0
    assert list(alarmed()) == [4, 6]
    assert len(says) == 1


def test_healthy_vitals_stop_nothing(loop, tmp_path):
    assert loop(HEALTHY, action="stop", start=0) == (0, [])
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] + 1 for row in rows if row.get("vital_gain") == 0.05] == [2, 4, 6]
    assert not [row for row in rows if "alarms" in row]


# Speed and memory


def test_the_meter_tells_percentiles_and_memory(monkeypatch):
    clock = iter(np.cumsum([0.0] + [1.0] * 90 + [5.0] * 10 + [2.0]).tolist())
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    meter = Meter(PRESETS["nano"], peak=1e12)
    seen = [meter.measure(2, 2) for _ in range(101)]
    assert "step_seconds_p50" not in seen[0]  # the first step compiles
    assert (seen[50]["step_seconds_p50"], seen[50]["step_seconds_p95"]) == (1.0, 1.0)
    assert (seen[-1]["step_seconds_p50"], seen[-1]["step_seconds_p95"]) == (1.0, 5.0)
    assert "hbm_bytes" not in seen[-1]  # a CPU does not tell

    def device(now, peak):
        return types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": now, "peak_bytes_in_use": peak, "other": 1})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(3, 9), device(4, 8)])
    assert metrics.device_memory() == {"hbm_bytes": 4, "hbm_peak_bytes": 9}
