"""What a run survives by itself: damaged checkpoints, and losses and gradients that are not finite."""

import dataclasses
import errno
import functools
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import NANO, Flips, cut_short, losses

import rdlm.train.loop
import rdlm.train.step
from rdlm import sharding
from rdlm.checkpoint import Checkpoints, SaveError, as_abstract, saved_steps, write_config
from rdlm.config import FaultsConfig, InputError, MeshConfig
from rdlm.optim import optimizer
from rdlm.train import Trainer, init_state, train_step
from rdlm.train.faults import Faults, first_bad, modules
from rdlm.train.metrics import read_metrics

# Damaged checkpoints

ARRAYS = {"a": np.random.default_rng(0).normal(size=9999).astype(np.float32), "b": np.ones(3, jnp.bfloat16)}


def flip_a_bit(path):
    file = max((p for p in (path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def half_named(path):
    shutil.rmtree(path)
    (path / "params").mkdir(parents=True)


def without_meta(path):
    shutil.rmtree(path / "meta")


@pytest.fixture
def saved(tmp_path):
    """checkpoints() opens a folder that holds the steps 1 to 4; restore(them) -> (result, lines)."""
    state = jax.tree.map(jnp.asarray, ARRAYS)
    with Checkpoints(tmp_path, 9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, {"m": state["a"]}, {"step": step, "streak": step == 2})
            checkpoints.wait()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = [as_abstract(t, jax.tree.map(lambda _: here, t)) for t in (state, {"m": state["a"]})]

    def restore(checkpoints, good=lambda meta: True):
        lines = []
        return checkpoints.restore(*targets, lines.append, good), lines

    return tmp_path, state, restore


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [6, 7]),
        ({"keep_every": 3}, [3, 6, 7]),
        ({"keep_best": 1}, [2, 6, 7]),
        ({"keep_best": 2, "keep_every": 5}, [2, 4, 5, 6, 7]),
    ],
)
def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(options, kept, tmp_path):
    losses = [None, 3.0, 1.0, 4.0, 2.0, None, 5.0, None]
    for steps in (range(1, 4), range(4, 8)):  # a resumed run knows the losses of the first part
        with Checkpoints(tmp_path, 2, **options) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"a": jnp.ones(2)}, {"m": jnp.ones(2)}, {"step": step}, losses[step])
                checkpoints.wait()
    assert saved_steps(tmp_path) == kept


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, half_named, without_meta])
def test_the_newest_whole_checkpoint_is_used_and_the_others_are_set_aside(damage, saved):
    folder, state, restore = saved
    kept = folder / "checkpoints"
    with Checkpoints(folder, 9) as checkpoints:
        assert restore(checkpoints)[0].step == 4
    damage(kept / "4")
    damage(kept / "3")
    with Checkpoints(folder, 9) as checkpoints:
        found, lines = restore(checkpoints)
        assert found.step == 2
        jax.tree.map(np.testing.assert_array_equal, found.params, ARRAYS)
        assert [line.split(": damaged")[0] for line in lines] == ["checkpoint 4", "checkpoint 3"]
        assert all("step 2 is used" in line and "\n" not in line for line in lines)
        assert checkpoints.latest == 2
        # The same step can be saved again, and go bad again: nothing is overwritten.
        checkpoints.save(3, state, {"m": state["a"]}, {"step": 3})
        checkpoints.wait()
        assert restore(checkpoints)[0].step == 3
        damage(kept / "3")
        assert restore(checkpoints)[0].step == 2
        assert {p.name for p in kept.iterdir()} == {"1", "2", "3.damaged", "3.damaged2", "4.damaged"}
        # One that is whole but not good is set aside under another name; without any, the run starts afresh.
        found, lines = restore(checkpoints, good=lambda meta: not meta["streak"])
        assert found.step == 1
        assert "saved while updates were being skipped; it is now 2.abandoned" in lines[0]
        # When nothing is left nothing is touched: whoever reads this may know better.
        damage(kept / "1")
        with pytest.raises(InputError, match=r"checkpoints/1: damaged.*none of \[1\] can be used") as refused:
            restore(checkpoints)
        assert "\n" not in str(refused.value)
        assert (kept / "1").exists()


def test_weights_alone_are_not_called_damaged(saved):
    folder, _, restore = saved
    for step in "1234":
        shutil.rmtree(folder / "checkpoints" / step / "optimizer")
    with Checkpoints(folder, 9) as checkpoints:
        with pytest.raises(InputError, match=r"holds weights alone.*--init .*--run-dir ANOTHER"):
            restore(checkpoints)
        assert saved_steps(folder) == [1, 2, 3, 4]


# Losses and gradients that are not finite


def test_the_first_module_is_that_of_the_backward_pass():
    grads = {name: {"w": jnp.ones(3)} for name in ("adapter", "coda_0", "core_0", "core_1", "prelude_0", "wte")}
    assert modules(grads) == ["coda_0", "core_1", "core_0", "adapter", "prelude_0", "wte"]
    assert int(first_bad(grads)) == -1
    for name in ("prelude_0", "core_1"):
        grads[name] = {"w": jnp.array([1, jnp.inf, 1])}
        assert modules(grads)[int(first_bad(grads))] == name


def test_faults_count_in_a_row_and_remember_the_first():
    bad = {"skipped": 1, "first_bad": 1, "loss": 2.0, "grad_norm": np.inf, "update_norm": 0.5, "n": 3, "k": 2}
    fine = {"skipped": 0}
    faults = Faults(shift=10)
    for step, values in enumerate([bad, fine, bad, bad, fine, bad]):
        faults = faults.after(step, values, 2, ["coda_0", "core_0"])
    assert (faults.skipped, faults.streak, faults.last) == (3, 2, 3), "what comes after the second in a row is ignored"
    assert faults.first == (
        "step 2: loss 2.0, gradient norm inf, update norm 0.5, depth n = 3, k = 2, "
        "first gradient not finite (backward order): core_0"
    )
    # Batches 12 and 13 (of steps 2 and 3) were bad, 14 was under way.
    back = faults.after_rollback(1)
    assert 1 + back.shift == 15
    assert (back.streak, back.skipped, back.origin) == (0, 3, 1)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of batches marked as poison NaN, in the compiled step; counts how often that is traced."""
    real, traced = rdlm.train.step.gradients, []

    def gradients(run, params, batch, *rest):
        traced.append(1)
        bad = batch["poison"].any()
        batch = {name: x for name, x in batch.items() if name != "poison"}
        spoiled = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), params["core_0"])
        return real(run, params | {"core_0": spoiled}, batch, *rest)

    monkeypatch.setattr(rdlm.train.step, "gradients", gradients)
    return traced


def batch_of(data, poison=False):
    """A batch of 8 rows."""
    rows = np.random.default_rng(data).integers(0, NANO.model.vocab_size, (8, 17)).astype(np.int32)
    ids = np.arange(8, dtype=np.int32)[:, None] + np.zeros((1, 16), np.int32)
    return {"tokens": rows[:, :-1], "labels": rows[:, 1:], "sequence_ids": ids, "poison": np.full(8, poison)}


def test_an_update_that_is_not_finite_changes_nothing_but_the_step(poisoned):
    tx = optimizer(NANO.optimizer, NANO.steps)
    state = init_state(NANO, tx)
    step = jax.jit(functools.partial(train_step, NANO, tx))
    after, metrics = step(state, batch_of(0))
    assert int(metrics["skipped"]) == 0
    skipped, metrics = step(after, batch_of(1, poison=True))
    assert (int(metrics["skipped"]), int(skipped.step)) == (1, 2)
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, skipped[1:], after[1:])
    moved, metrics = step(skipped, batch_of(1))
    assert int(metrics["skipped"]) == 0
    assert not np.array_equal(moved.params["wte"], skipped.params["wte"]), "a good batch must move them"
    rate = jax.jit(rdlm.train.step.schedule(NANO.optimizer, NANO.steps))
    assert metrics["learning_rate"] == rate(1), "the second update, though the third step"
    assert len(poisoned) == 1


def test_an_update_that_overflows_is_skipped_though_its_gradient_is_finite():
    tx = optax.chain(optimizer(NANO.optimizer, NANO.steps), optax.scale(jnp.inf))
    state = init_state(NANO, tx)
    batch = {name: x for name, x in batch_of(0).items() if name != "poison"}
    after, metrics = jax.jit(functools.partial(train_step, NANO, tx))(state, batch)
    assert np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(metrics["update_norm"])
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])


@pytest.fixture
def kept_programs(tmp_path_factory):
    """Trainers of one test share their compiled programs."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


class Poisoned:
    """Training data some of whose batches are poisoned; writes down which are read."""

    def __init__(self, data, bad):
        self.data, self.bad, self.read = data, bad, []

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, position):
        self.read.append(position)
        return self.data.batch(position) | {"poison": np.full(8, position in self.bad)}


@pytest.mark.slow
@pytest.mark.usefixtures("kept_programs")
def test_a_run_goes_back_and_on_behind_the_bad_data_and_stops_when_that_does_not_help(
    nano_data, poisoned, tmp_path, monkeypatch
):
    def run(name, bad, looks=None):
        config = dataclasses.replace(
            NANO,
            data=dataclasses.replace(NANO.data, folder=str(nano_data), validation_fraction=0.1, batch_size=8),
            checkpoint=dataclasses.replace(NANO.checkpoint, every=3),
            faults=FaultsConfig(patience=2),
            evaluation=dataclasses.replace(NANO.evaluation, every=100, batches=1, depths=(1,)),
            steps=9,
            run_dir=str(tmp_path / name),
        )
        lines = []
        one = sharding.make_mesh(MeshConfig(1, 1), NANO.model, jax.devices()[:1])
        with monkeypatch.context() as patch:
            patch.setattr(sharding, "make_mesh", lambda *_: one)
            if looks is not None:
                patch.setattr(rdlm.train.loop, "Preemption", lambda: Flips(looks))
            trainer = Trainer(config, lines.append)
            trainer.train = Poisoned(trainer.train, bad)
            return trainer.run(), lines, trainer.train.read

    # Steps 4 and 5 are bad, 6 is as well: back to 3, and on with batch 7 instead of 3. One bad batch, 9, is skipped.
    code, lines, read = run("bad", {4, 5, 6, 9})
    assert code == 0
    said = [line for line in lines if "skipped" in line or "rollback" in line]
    assert [line.split(":")[0] for line in said] == [
        "update skipped, 1 in a row", "update skipped, 2 in a row", "rollback to step 3", "update skipped, 1 in a row"
    ]  # fmt: skip
    assert "loss nan" in said[0]
    assert "n = " in said[0]
    assert "continues with batch 7" in said[2]
    rows = [row for row in read_metrics(tmp_path / "bad") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["skipped"] for row in rows] == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert [row["loss"] is None for row in rows] == [step == 5 for step in range(9)]
    assert read[:13] == list(range(13)), "no batch is read twice"
    # The same losses as a run whose data never had the bad ones, but for the noise of the steps.
    expected = losses(tmp_path / "bad")

    # Stopped at any moment it does the same: before, while skipping, when about to go back, after.
    for looks in (5, 6):
        code, lines, _ = run(f"stopped {looks}", {4, 5, 6, 9}, looks)
        assert code == 75, lines
        assert run(f"stopped {looks}", {4, 5, 6, 9})[0] == 0
        assert losses(tmp_path / f"stopped {looks}") == expected
        newest = json.loads((tmp_path / f"stopped {looks}/checkpoints/9/meta/metadata").read_text())["faults"]
        assert (newest["skipped"], newest["shift"], newest["origin"]) == (3, 4, 3)

    # Bad to the end: one attempt, then a diagnosis.
    with pytest.raises(InputError, match=r"again after a rollback to step 3 .* the first was step 3: loss nan") as end:
        run("hopeless", set(range(4, 100)))
    assert "depth n = " in str(end.value)
    assert "first gradient not finite (backward order): coda_0" in str(end.value)
    assert saved_steps(tmp_path / "hopeless") == [3]
    assert len(poisoned) == 6, "each trainer compiles its step once"


@pytest.mark.usefixtures("kept_programs")
def test_a_run_may_go_on_in_other_parts_but_not_as_another(nano_data, tmp_path):
    """On a pod of another size it needs other microbatches, and may hold more or less."""
    data = dataclasses.replace(NANO.data, folder=str(nano_data), validation_fraction=0.1, batch_size=16)
    run = dataclasses.replace(NANO, run_dir=str(tmp_path / "run"), data=data)
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", run)

    def with_recurrence(run, **changed):
        return dataclasses.replace(run, recurrence=dataclasses.replace(run.recurrence, **changed))

    parts = dataclasses.replace(run, data=dataclasses.replace(data, microbatches=2))
    Trainer(parts)
    Trainer(with_recurrence(run, remat="layer"))
    for other in (with_recurrence(run, least=2), dataclasses.replace(run, seed=1)):
        with pytest.raises(InputError, match=r"holds a run with .*choose another --run-dir$"):
            Trainer(other)
    write_config(tmp_path / "run", with_recurrence(run, draw="microbatch"))
    with pytest.raises(InputError, match=r"data\.microbatches = 1, not 2"):  # each part draws its own depth
        Trainer(with_recurrence(parts, draw="microbatch"))


# Saves that fail


def test_a_save_that_cannot_begin_leaves_no_thread_that_waits_for_it(tmp_path):
    state, before = jax.tree.map(jnp.asarray, ARRAYS), set(threading.enumerate())
    with Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.save(1, state, {"m": state["a"]}, {"step": 1})
        checkpoints.wait()
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        (tmp_path / "checkpoints").write_text("not a folder")
        with pytest.raises(
            SaveError, match=r"could not be saved \(Not a directory: .*when that is mended, run the same"
        ):
            checkpoints.save(2, state, {"m": state["a"]}, {"step": 2})
    for thread in set(threading.enumerate()) - before:  # the interpreter waits for those that are no daemons
        if not thread.daemon:
            thread.join(10)
            assert not thread.is_alive(), thread


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (ValueError("RESOURCE_EXHAUSTED: Error writing local file [OS error 28: No space left on device]"), True),
        (PermissionError(errno.EPERM, "Operation not permitted", "/x"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EFBIG, "File too large"), False),
        (ValueError("Error parsing object member"), False),
        (RuntimeError(), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else repr(value),
)
def test_only_a_full_disk_is_told_to_make_room(error, full, tmp_path):
    line = str(SaveError(tmp_path, "a checkpoint", error))
    assert ("make room, then run the same command again" in line) == full
    assert "\n" not in line
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert ("make room" in str(SaveError(tmp_path, "a checkpoint", wrapped))) == full


def new_run(nano_data, folder, **changed):
    data = dataclasses.replace(NANO.data, folder=str(nano_data), validation_fraction=0.1, batch_size=16)
    return dataclasses.replace(NANO, run_dir=str(folder), data=data, **changed)


def test_a_new_run_that_is_refused_leaves_no_folder(nano_data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise InputError("no data")

    monkeypatch.setattr(rdlm.train.loop, "open_data", refuse)
    with pytest.raises(InputError, match="no data"):
        Trainer(new_run(nano_data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_when_the_tokenizer_is_saved_is_no_wrong_input(nano_data, tmp_path, monkeypatch):
    trainer = Trainer(new_run(nano_data, tmp_path / "run"))
    write_text = Path.write_text

    def full(path, *rest, **options):
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *rest, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Trainer, "_run", lambda self: self.folder.open(self.tokenizer, 0, print))
    with pytest.raises(SaveError, match="No space left on device"):
        trainer.run()


def test_a_learning_rate_that_rises_again_is_said(nano_data, tmp_path, monkeypatch):
    # The step itself is a stand-in: this is about what a run says when it starts.
    def step(config, tx, state, batch, layout, frozen):
        metrics = {name: jnp.float32(1) for name in ("loss", "grad_norm", "update_norm", "learning_rate")}
        metrics |= {"n": jnp.int32(1), "k": jnp.int32(1), "skipped": jnp.int32(0), "first_bad": jnp.int32(-1)}
        return state._replace(step=state.step + 1), metrics

    one = sharding.make_mesh(MeshConfig(1, 1), NANO.model, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)
    monkeypatch.setattr(rdlm.train.loop, "train_step", step)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: None)  # as if stopped in the last evaluation

    def says(steps):
        lines = []
        config = dataclasses.replace(
            NANO,
            data=dataclasses.replace(NANO.data, folder=str(nano_data), validation_fraction=0.1, batch_size=8),
            optimizer=dataclasses.replace(NANO.optimizer, learning_rate=0.5, warmup_steps=2, cooldown_steps=2),
            steps=steps,
            run_dir=str(tmp_path / "run"),
        )
        assert Trainer(config, lines.append).run() == 75
        return [line for line in lines if "learning rate" in line]

    assert says(6) == says(6) == []
    assert says(12) == [
        "the learning rate rises again, from 0 to 0.5: with steps = 6 the run had begun to cool down, "
        "with steps = 12 it does so later"
    ]
    assert says(12) == []
