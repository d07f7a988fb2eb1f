"""What a run survives: damage, a full disk, poisoned batches, signals at any moment, other devices, a lost process.

Every story ends in a resumed run whose losses are those of one that nothing happened to.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm.train.loop
import rdlm.train.step
from rdlm import sharding
from rdlm.checkpoint import Checkpoints, as_abstract, load_checkpoint, saved_steps
from rdlm.config import PRESETS, FaultsConfig, InputError, MeshConfig
from rdlm.data import prepare
from rdlm.metrics import read_metrics
from rdlm.optim import optimizer
from rdlm.train import Trainer, init_state, train_step
from rdlm.train.faults import Faults, first_bad, modules

ROOT = Path(__file__).parent.parent
NANO = PRESETS["nano"]
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where invented text lies prepared, for the preset nano."""
    folder = tmp_path_factory.mktemp("survive") / "data"
    invent = random.Random(0)
    words = ["".join(invent.choices("aeioubdglmnrst", k=invent.randint(2, 7))) for _ in range(99)]
    texts = [f"{i} " + " ".join(invent.choices(words, k=60)) for i in range(200)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rdlm.data.prepare"), "_documents", lambda data: texts)
        prepare(dataclasses.replace(NANO.data, folder=str(folder), validation_fraction=0.1))
    return folder


def losses(folder):
    """Of every step, with everything else that must be equal."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return [(r["step"], r["loss"], r["n"], r["k"], r["grad_norm"], r["learning_rate"]) for r in rows]


# Damaged checkpoints

ARRAYS = {"a": np.random.default_rng(0).normal(size=9999).astype(np.float32), "b": np.ones(3, jnp.bfloat16)}


def flip_a_bit(path):
    file = max((p for p in (path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut_short(path, item="optimizer"):
    for file in (path / item).rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])


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


# Losses and gradients that are not finite


def test_the_first_module_is_that_of_the_backward_pass():
    grads = {name: {"w": jnp.ones(3)} for name in ("adapter", "coda_0", "core_0", "core_1", "prelude_0", "wte")}
    assert modules(grads) == ["coda_0", "core_1", "core_0", "adapter", "prelude_0", "wte"]
    assert int(first_bad(grads)) == -1
    for name in ("prelude_0", "core_1"):
        grads[name] = {"w": jnp.array([1, jnp.inf, 1])}
        assert modules(grads)[int(first_bad(grads))] == name


def test_faults_count_in_a_row_and_remember_the_first():
    fine, bad = {"skipped": 0}, {"skipped": 1, "first_bad": 1, "loss": 2.0, "grad_norm": np.inf, "n": 3, "k": 2}
    faults = Faults(shift=10)
    for step, values in enumerate([bad, fine, bad, bad, fine, bad]):
        faults = faults.after(step, values, 2, ["coda_0", "core_0"])
    assert (faults.skipped, faults.streak, faults.last) == (3, 2, 3), "what comes after the second in a row is ignored"
    assert faults.first == (
        "step 2: loss 2.0, gradient norm inf, depth n = 3, k = 2, first gradient not finite (backward order): core_0"
    )
    # Batches 12 and 13 (of steps 2 and 3) were bad, 14 was under way.
    back = faults.back_at(1)
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


@pytest.mark.usefixtures("quick_compile")
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


class Flips:
    """Stands in for SIGTERM: comes after so many looks."""

    def __init__(self, looks):
        self.left = looks

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    def restore(self):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile", "kept_programs")
def test_a_run_goes_back_and_on_behind_the_bad_data_and_stops_when_that_does_not_help(
    data, poisoned, tmp_path, monkeypatch
):
    def run(name, bad, looks=None):
        config = dataclasses.replace(
            NANO,
            data=dataclasses.replace(NANO.data, folder=str(data), validation_fraction=0.1, batch_size=8),
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
    said = [line for line in lines if "skipped" in line or "going back" in line]
    assert [line.split(":")[0] for line in said] == [
        "update skipped, 1 in a row", "update skipped, 2 in a row", "going back to step 3", "update skipped, 1 in a row"
    ]  # fmt: skip
    assert "loss nan" in said[0]
    assert "n = " in said[0]
    assert "going on with batch 7" in said[2]
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
    with pytest.raises(InputError, match=r"again after going back to step 3 .* the first was step 3: loss nan") as end:
        run("hopeless", set(range(4, 100)))
    assert "depth n = " in str(end.value)
    assert "first gradient not finite (backward order): coda_0" in str(end.value)
    assert saved_steps(tmp_path / "hopeless") == [3]
    assert len(poisoned) == 6, "each trainer compiles its step once"


@pytest.mark.usefixtures("quick_compile", "kept_programs")
def test_a_learning_rate_that_rises_again_is_said(data, tmp_path, monkeypatch):
    # The step itself is a stand-in: this is about what a run says when it starts.
    def step(config, tx, state, batch, layout):
        metrics = {name: jnp.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
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
            data=dataclasses.replace(NANO.data, folder=str(data), validation_fraction=0.1, batch_size=8),
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


# Real processes and signals


class Runs:
    """Runs of `experiments/train.py nano` in a folder, with compiled programs in common."""

    def __init__(self, folder, data):
        self.folder, self.data, self.started = folder, data, []

    def start(self, run, *arguments, devices=1, **environment):
        """A process of its own; what it says is in .said."""
        command = [
            sys.executable, ROOT / "experiments/train.py", "nano", "--run-dir", run, "--data.folder", self.data,
            "--data.batch-size", 8, "--data.validation-fraction", 0.1, "--steps", STEPS, "--checkpoint.every", 10,
            "--evaluation.every", 40, "--evaluation.batches", 6, "--evaluation.depths", 1, 150, *arguments,
        ]  # fmt: skip
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # these compile more than they run
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "RDLM_COMPILE_CACHE": str(self.folder / "compiled"),
        }
        said = self.folder / f"said{len(self.started)}"
        with said.open("w") as file:
            process = subprocess.Popen([*map(str, command)], stderr=file, env=os.environ | environment, cwd=ROOT)
        process.said = said
        self.started.append(process)
        return process

    def two(self, run, *arguments):
        """Two processes that train together."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            together = {"RDLM_COORDINATOR": f"localhost:{free.getsockname()[1]}", "RDLM_PROCESSES": "2"}
        return [self.start(run, *arguments, **together, RDLM_PROCESS_ID=str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    made = Runs(tmp_path_factory.mktemp("runs"), data)
    yield made
    for process in made.started:  # what a failed test left
        process.kill()


@pytest.fixture(scope="module")
def whole(runs):
    """The run that nothing happens to."""
    process = runs.start(runs.folder / "whole")
    assert process.wait(500) == 0, process.said.read_text()
    assert [row[0] for row in losses(runs.folder / "whole")] == list(range(STEPS))
    return runs.folder / "whole"


def when(condition, *processes):
    """Return once the processes train and `condition` holds."""
    deadline = time.monotonic() + 500  # one of two processes may have to compile alone, on a busy machine
    while not (all("compiled programs" in p.said.read_text() for p in processes[:1]) and condition()):
        assert time.monotonic() < deadline, "it does not happen"
        for process in processes:
            assert process.poll() is None, process.said.read_text()
        time.sleep(0.002)


def send(process, number):
    """Send a signal; returns (exit code, lines of stderr)."""
    process.send_signal(number)
    return ended(process)


def ended(process):
    code = process.wait(500)
    return code, process.said.read_text().splitlines()


def rows(folder):
    return len(losses(folder))


def same(folder, whole):
    """To 1e-5 in the losses, exactly in the draws."""
    ours, theirs = losses(folder), losses(whole)
    assert [(s, n, k) for s, _, n, k, *_ in ours] == [(s, n, k) for s, _, n, k, *_ in theirs]
    np.testing.assert_allclose([x[1] for x in ours], [x[1] for x in theirs], atol=1e-5, rtol=0)


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 12 MB at `folder`, where this machine allows it: yields fill(process), free()."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    filler = folder / "filler"

    def fill(process):
        if not mounted:  # the kernel refuses to make files larger instead
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill, lambda: filler.unlink(missing_ok=True)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_whatever_happens_to_it_a_run_ends_with_the_same_bits(runs, whole, tmp_path):
    with small_disk(tmp_path / "disk") as (fill, free):
        folder = tmp_path / "disk" / "run"
        kept = folder / "checkpoints"
        start = functools.partial(runs.start, folder)
        # Killed at a random moment, and while it saves.
        process = start()
        moment = random.SystemRandom().uniform(0, 0.1)
        when(lambda: rows(folder), process)
        time.sleep(moment)
        assert send(process, signal.SIGKILL)[0] == -signal.SIGKILL
        process = start()
        when(lambda: list(kept.glob("*.orbax-checkpoint-tmp")), process)
        assert send(process, signal.SIGKILL)[0] == -signal.SIGKILL
        # Asked to stop while it trains.
        process = start()
        when(lambda: rows(folder) > max(saved_steps(folder), default=0) + 2, process)
        code, lines = send(process, signal.SIGTERM)
        stopped = saved_steps(folder)[-1]
        assert (code, lines[-1].partition(";")[0]) == (75, f"preempted: saved step {stopped} in {folder}")
        assert stopped < 40, "or there is no evaluation left to stop in"
        # Asked to stop while it evaluates.
        process = start()
        when(lambda: rows(folder) == 40, process)
        code, lines = send(process, signal.SIGTERM)
        assert (code, lines[-1].partition(";")[0]) == (75, f"preempted: saved step 40 in {folder}")
        assert f"resuming {folder} at step {stopped}" in lines
        assert not [row for row in read_metrics(folder) if "validation_loss_r1" in row]
        # The newest checkpoint is damaged, then the disk is full.
        cut_short(kept / "40", "params")
        instead = saved_steps(folder)[-2]
        with pytest.raises(InputError, match=rf"checkpoints/40: damaged .* ask for step {instead}"):
            load_checkpoint(folder)
        with pytest.raises(InputError, match="step = 3: not saved"):
            load_checkpoint(folder, step=3)
        process = start()
        when(lambda: rows(folder) == 40 and (kept / "40.damaged").exists(), process)
        fill(process)
        before = saved_steps(folder)
        code, lines = ended(process)
        assert code == 1, lines
        assert sum("checkpoint 40: damaged" in line and f"step {instead} is used" in line for line in lines) == 1
        assert lines[-1].startswith(f"error: run folder {folder}: "), lines
        assert "make room" in lines[-1]
        assert "Traceback" not in "\n".join(lines)
        assert saved_steps(folder) == before
        free()
        code, lines = ended(start())
        assert code == 0, lines
        assert losses(folder) == losses(whole), f"killed {moment} s after the first row, stopped at {stopped}"
        assert (folder / "loss_by_depth.json").read_text() == (whole / "loss_by_depth.json").read_text()
        jax.tree.map(np.testing.assert_array_equal, load_checkpoint(folder)[0], load_checkpoint(whole)[0])
        assert (kept / "40.damaged").exists()


@pytest.mark.slow
def test_four_devices_then_one_then_eight(runs, whole):
    folder = runs.folder / "devices"
    for devices, mesh, until in ((4, ("--mesh.fsdp", 2), 12), (1, (), 30), (8, ("--mesh.fsdp", 8), None)):
        process = runs.start(folder, *mesh, "--evaluation.depths", 1, devices=devices)
        if until:
            when(lambda until=until: rows(folder) >= until, process)
            process.send_signal(signal.SIGTERM)
        code, lines = ended(process)
        assert code == (75 if until else 0), lines
        assert any(f"on {devices} cpu" in line for line in lines)
    same(folder, whole)


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_says_so_and_any_number_goes_on(runs, whole):
    folder = runs.folder / "processes"
    for victim, until in ((1, 12), (0, 24)):
        both = runs.two(folder, "--evaluation.depths", 1)
        when(lambda until=until: rows(folder) >= until, *both)
        assert send(both[victim], signal.SIGKILL)[0] == -signal.SIGKILL
        code, lines = ended(both[1 - victim])
        assert code == 1, lines
        assert lines[-1].startswith(f"error: process {victim} ({socket.gethostname()}) is gone")
        assert "Traceback" not in "\n".join(lines)
    alone = runs.start(folder, "--evaluation.depths", 1)
    when(lambda: rows(folder) >= 36, alone)
    assert send(alone, signal.SIGTERM)[0] == 75
    for process in runs.two(folder, "--evaluation.depths", 1):
        code, lines = ended(process)
        assert code == 0, lines
    same(folder, whole)


def test_a_signal_before_training_ends_with_the_code_of_a_preempted_run(runs):
    process = runs.start(runs.folder / "early")

    def caught():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << (signal.SIGTERM - 1)

    while not caught():
        time.sleep(0.001)
    code, lines = send(process, signal.SIGTERM)
    assert (code, lines) == (75, ["preempted before training began; run the same command to go on"])


COMPILED = """
import jax
from rdlm.runtime import compiled_programs, start

start()
hits, misses = [], []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(1) if name.endswith("/cache_hits") else None)
jax.monitoring.register_event_listener(lambda name, **_: misses.append(1) if name.endswith("/cache_misses") else None)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(len(hits), len(misses), compiled_programs())
"""


def test_a_second_process_takes_compiled_programs_from_disk(tmp_path):
    def run(*command, **environment):
        always = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HOME": str(tmp_path)}
        environment = {k: v for k, v in os.environ.items() if k != "RDLM_COMPILE_CACHE"} | always | environment
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True).stdout

    default = tmp_path / ".cache/rdlm/compiled"
    found = [run("-c", COMPILED).split() for _ in range(2)]
    assert found[0][0] == "0"
    assert int(found[0][1]) > 0
    assert found[1] == [found[0][1], "0", str(default)]
    other = tmp_path / "other"
    assert run("-c", COMPILED, RDLM_COMPILE_CACHE=str(other)).split() == ["0", found[0][1], str(other)]
    assert run("-c", COMPILED, RDLM_COMPILE_CACHE="off").split() == ["0", "0", "off"]
    report = run("-m", "rdlm.runtime", JAX_COMPILATION_CACHE_DIR=str(other))
    assert [line.split() for line in report.splitlines() if "compiled" in line] == [
        ["compiled", "programs", str(other)]
    ]  # fmt: skip
