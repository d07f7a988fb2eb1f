"""What a run survives: signals at any moment, damage, a full disk, other devices, a lost process.

Every story ends in a resumed run whose losses are those of one that nothing happened to.
"""

import contextlib
import functools
import os
import pty
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
import numpy as np
import pytest
from compilation import QUICK
from training_cases import cut_short, losses

from rdlm.checkpoint import load_checkpoint, saved_steps
from rdlm.config import InputError
from rdlm.runtime import stop_signals
from rdlm.runtime.processes import HEARTBEAT_SECONDS
from rdlm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 60


IN_TERMINAL = """
import fcntl, os, sys, termios

os.dup2(os.open(sys.argv[1], os.O_RDWR), 2)
fcntl.ioctl(2, termios.TIOCSCTTY, 0)  # a hang-up of this terminal is told to this session
os.execv(sys.argv[2], sys.argv[2:])
"""


class Runs:
    """Runs of `experiments/train.py nano` in a folder, with compiled programs in common."""

    def __init__(self, folder, data):
        self.folder, self.data, self.started = folder, data, []

    def start(self, run, *arguments, devices=1, terminal=None, **environment):
        """A process of its own; what it says is in .said, unless it has a `terminal`."""
        flags = {
            "--run-dir": [run], "--data.folder": [self.data], "--data.batch-size": [8],
            "--data.validation-fraction": [0.1], "--steps": [STEPS], "--checkpoint.every": [10],
            "--evaluation.every": [40], "--evaluation.batches": [6], "--evaluation.depths": [1, 150],
        }  # fmt: skip
        for word in arguments:
            if str(word).startswith("--"):
                flags[word] = values = []
            else:
                values.append(word)
        command = [sys.executable, ROOT / "experiments/train.py", "nano"]
        command += [word for flag, values in flags.items() for word in (flag, *values)]
        environment |= QUICK | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "RDLM_COMPILE_CACHE": str(self.folder / "compiled"),
        }
        said = self.folder / f"said{len(self.started)}"
        with said.open("w") as file:
            words = [*map(str, command)]
            if terminal:
                words = [sys.executable, "-c", IN_TERMINAL, terminal, *words]
            process = subprocess.Popen(
                words, stderr=file, env=os.environ | environment, cwd=ROOT, start_new_session=terminal is not None
            )
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
def runs(tmp_path_factory, nano_data):
    made = Runs(tmp_path_factory.mktemp("runs"), nano_data)
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
        code, lines = send(process, signal.SIGINT if signal.SIGINT in stop_signals() else signal.SIGTERM)
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
        assert "nothing saved is lost" in lines[-1]
        assert ("make room" in lines[-1]) == os.path.ismount(tmp_path / "disk"), lines
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
def test_when_one_of_two_processes_is_killed_the_other_ends_and_says_why_and_any_number_goes_on(runs, whole):
    folder = runs.folder / "processes"
    for victim, until in ((1, 12), (0, 24)):
        both = runs.two(folder, "--evaluation.depths", 1)
        when(lambda until=until: rows(folder) >= until, *both)
        assert send(both[victim], signal.SIGKILL)[0] == -signal.SIGKILL
        killed = time.monotonic()
        code, lines = ended(both[1 - victim])
        assert time.monotonic() - killed < HEARTBEAT_SECONDS + 30, "JAX's heartbeat, on a busy machine"
        # Either the exchange of gradients fails, or JAX aborts: whichever notices first.
        words = {1: "perhaps because another one is gone", -signal.SIGABRT: "another task died"}
        assert code in words, lines
        assert words[code] in "\n".join(lines)
    alone = runs.start(folder, "--evaluation.depths", 1)
    when(lambda: rows(folder) >= 36, alone)
    assert send(alone, signal.SIGTERM)[0] == 75
    for process in runs.two(folder, "--evaluation.depths", 1):
        code, lines = ended(process)
        assert code == 0, lines
    same(folder, whole)


@pytest.mark.slow
def test_a_run_whose_terminal_closes_is_saved(runs):
    if signal.SIGHUP not in stop_signals():
        pytest.skip("this process ignores it, and so do those that it starts")
    folder, (ours, theirs) = runs.folder / "terminal", pty.openpty()
    process = runs.start(folder, "--steps", 5000, terminal=os.ttyname(theirs))  # or it may be done by then
    os.set_blocking(ours, False)
    while not (folder / "metrics.jsonl").exists() or rows(folder) < 3:
        assert process.poll() is None
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)  # a terminal that nobody reads fills up, and writing to it waits
        time.sleep(0.01)
    os.close(ours)  # a hang-up, and nobody can be told anything from now on
    os.close(theirs)
    assert process.wait(100) == 75
    saved = saved_steps(folder)[-1]
    assert 3 <= saved < 5000
    assert [row[0] for row in losses(folder)] == list(range(saved))


@pytest.mark.slow
def test_of_two_runs_started_at_once_in_one_folder_one_runs_and_one_says_so(runs):
    for i in range(2):
        folder = runs.folder / f"at once {i}"
        both = [runs.start(folder, "--steps", 6, "--checkpoint.every", 1, "--evaluation.every", 99) for _ in range(2)]
        found = sorted((ended(process) for process in both), key=lambda end: end[0])
        assert [code for code, _ in found] == [0, 2], found
        [line] = found[1][1]
        assert line.startswith(f"error: run folder {folder}: ")
        assert line.endswith(" is using it; wait until that ends, or choose another --run-dir")
        assert [row[0] for row in losses(folder)] == list(range(6))
        assert saved_steps(folder)[-1] == 6
        load_checkpoint(folder)
        assert not (folder / ".owner").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_before_training_ends_with_the_code_of_a_preempted_run(number, runs):
    if number not in stop_signals():
        pytest.skip("this process ignores it, and so do those that it starts")
    process = runs.start(runs.folder / "early")

    def caught():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << (stop_signals()[-1] - 1)

    while not caught():
        time.sleep(0.001)
    code, lines = send(process, number)
    assert (code, lines) == (75, ["preempted before training began; run the same command to continue"])


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
