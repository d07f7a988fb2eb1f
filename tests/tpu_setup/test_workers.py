"""Two workers for real: folders of this machine, in which ssh commands are run and two processes train together."""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from compilation import QUICK
from fake_place import ROOT, SETTINGS, TOOLS, Place, copy_of_repository, executable, link_tools, tool_or_skip

from rdlm.config import PRESETS
from rdlm.data.prepare import prepare_embedded

STEPS = 60
QUICK_AND_KEPT = QUICK | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
COMMAND = [
    "experiments/train.py", "nano", "--steps", STEPS, "--checkpoint.every", "50", "--evaluation.every", "1000",
    "--evaluation.batches", "1", "--evaluation.depths", "1", "4", "--data.validation-fraction", "0.2",
]  # fmt: skip
# Stands in for the network: `venv` and `pip` only write down what they were asked, everything else is real.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys, venv"*) exit 0 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "${*:3}" >> "$HOME/pip.log" ;;
  "--version "*) echo "Python 3.11" ;;
  *) PYTHONPATH=$HOME/rdlm exec {python} "$@" ;;
esac
"""
GCSFUSE = """#!/usr/bin/env bash
echo "$*" >> "$HOME/gcsfuse.log"
rmdir "${@: -1}" && ln -s {bucket} "${@: -1}"
"""


def wait_for(condition, process=None, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def told_to_stop(pid):
    """Whether SIGTERM waits for a process that stands still."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return bool(int(status["ShdPnd"], 16) & 1 << (signal.SIGTERM - 1))


class Workers(Place):
    """A place whose two workers exist."""

    def __init__(self, folder):
        super().__init__(folder, copy_of_repository(folder / "copy") / "tpu_setup")
        self.settings(**SETTINGS | {"ACCELERATOR_TYPE": "v5litepod-2", "PROFILER_PORT": "0"})
        self.bucket = folder / "bucket"
        self.bucket.mkdir()
        tools = link_tools(folder / "worker-tools", [*TOOLS, "tmux"])
        executable(tools / "python3.11", PYTHON.replace("{python}", sys.executable))
        executable(tools / "gcsfuse", GCSFUSE.replace("{bucket}", str(self.bucket)))
        executable(tools / "mountpoint", '#!/usr/bin/env bash\n[[ -L "${@: -1}" ]]\n')
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.homes = [folder / "worker0", folder / "worker1"]
        shared = {"PATH": str(tools), "JAX_PLATFORMS": "cpu", "TMPDIR": str(folder), "RDLM_PROCESSES": "2"}
        shared |= {"RDLM_COORDINATOR": f"localhost:{port}", "RDLM_START_TIMEOUT": "120"}
        shared |= QUICK_AND_KEPT | {"RDLM_COMPILE_CACHE": str(folder / "compiled")}
        for home in self.homes:
            home.mkdir()
        self.cloud(homes=[str(home) for home in self.homes], real_sleep=0.3)
        self.cloud(environment=[shared | {"RDLM_PROCESS_ID": str(i)} for i in range(2)])

    def rows(self, run="two words"):
        path = self.bucket / "runs" / run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def state(self, worker, name):
        path = self.homes[worker] / ".rdlm/current" / name
        return path.read_text().strip() if path.exists() else ""

    @contextlib.contextmanager
    def paused(self):
        """The processes of the run stand still; a signal that they get meanwhile waits for them."""
        pids = [int(self.state(i, "pid")) for i in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield pids
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def end(self):
        """Whatever a failed test left running."""
        for home in self.homes:
            for path in home.glob(".rdlm/*/pid"):
                if not (path.parent / "exit").exists():
                    try:
                        os.kill(int(path.read_text()), signal.SIGKILL)
                    except (ProcessLookupError, ValueError):
                        continue


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Where invented text lies prepared, for the preset nano."""
    invent = random.Random(0)
    words = ["".join(invent.choices("aeioubdglmnrst", k=invent.randint(2, 7))) for _ in range(99)]
    texts = [f"{i} " + " ".join(invent.choices(words, k=60)) for i in range(200)]
    monkeypatch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: texts)
    folder = tmp_path / "data"
    prepare_embedded(dataclasses.replace(PRESETS["nano"].data, folder=str(folder), validation_fraction=0.2))
    return ["--data.folder", str(folder)]


@pytest.fixture
def workers(tmp_path):
    tool_or_skip("tmux")
    made = Workers(tmp_path)
    yield made
    made.end()


def losses(rows):
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_two_workers_train_stop_and_resume_to_the_losses_of_one(workers, data, tmp_path):
    environment = os.environ | QUICK_AND_KEPT | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path / "copy")}
    alone = subprocess.Popen(
        [sys.executable, *map(str, COMMAND), *data, "--run-dir", str(tmp_path / "alone")],
        cwd=tmp_path / "copy", env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    # From nothing to two workers that see each other.
    assert workers.run("create.sh")[0] == 0
    code, out, err = workers.run("setup.sh")
    assert code == 0, out + err
    assert [line.split()[1:] for line in out.splitlines() if "processes" in line] == [["processes", "2"]] * 2
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path / "copy", capture_output=True, text=True).stdout
    for home in workers.homes:
        assert (home / "rdlm/COMMIT").read_text() == commit
        assert (home / "rdlm/runs").resolve() == (workers.bucket / "runs").resolve()
        asked = (home / "pip.log").read_text().splitlines()
        assert len(asked) == 2
        assert asked[0].endswith("-c constraints.txt -e .[tpu]")
        assert asked[1].endswith("--require-hashes -r requirements-corpus.txt")
        assert (home / "gcsfuse.log").read_text().split()[-2:] == ["my-bucket", str(home / "rdlm-bucket")]
    code, out, _ = workers.run("ssh.sh", "all", "rdlm/tpu_setup/install.sh")
    assert out.count("already installed") == 2
    assert workers.run("mount.sh")[0] == 0
    for home in workers.homes:  # once is enough
        assert len((home / "gcsfuse.log").read_text().splitlines()) == 1
        assert len((home / "pip.log").read_text().splitlines()) == 2

    # Both train, in a folder with a blank in its name; SIGTERM to one of them stops both, saved.
    arguments = [*COMMAND, *data, "--run-dir", "runs/two words"]
    code, _, err = workers.run("run.sh", *arguments)
    assert code == 0, err
    wait_for(lambda: len(workers.rows()) >= 5 or workers.state(0, "exit"))
    with workers.paused() as pids:
        code, _, err = workers.run("setup.sh")
        assert code == 2
        assert "a run is active" in err
        os.kill(pids[1], signal.SIGTERM)
    wait_for(lambda: workers.state(0, "exit") and workers.state(1, "exit"))
    log = workers.run("logs.sh")[1]
    assert [workers.state(i, "exit") for i in range(2)] == ["75", "75"], log
    assert "[0] nano: 45,664 parameters" in log
    assert "on 2 cpu" in log
    assert "preempted: saved step" in log
    assert not [line for line in log.splitlines() if line.startswith("[1]") and "saved" in line], "one speaks for all"
    out = workers.run("status.sh")[1]
    assert out.count("preempted (saved, exit code 75)") == 2
    first = len(losses(workers.rows()))
    assert 5 <= first < STEPS

    # supervise.sh resumes; stop.sh makes it save and exit 75; supervise.sh resumes again, to the end.
    supervisor = workers.start("supervise.sh", *arguments)
    wait_for(lambda: len(losses(workers.rows())) >= first + 5, supervisor)
    with workers.paused() as pids:
        stop = workers.start("stop.sh")
        wait_for(lambda: all(map(told_to_stop, pids)), stop)
        os.kill(supervisor.pid, signal.SIGSTOP)  # or it has resumed, and even ended, the run before stop.sh looks
    out, err = stop.communicate(timeout=400)
    assert stop.returncode == 0, out + err
    assert out.count("preempted (saved, exit code 75)") == 2, out
    assert "still there and billed" in err
    second = len(losses(workers.rows()))
    assert second < STEPS, "stopped too late to mean anything"
    os.kill(supervisor.pid, signal.SIGCONT)
    out, err = supervisor.communicate(timeout=600)
    assert supervisor.returncode == 0, err
    assert place_is_empty(workers)
    starts = [line for line in (workers.homes[0] / ".rdlm/current/log").read_text().splitlines() if "train.py" in line]
    assert len(starts) == 3

    # The same losses as one process that was never stopped.
    assert alone.wait(300) == 0, alone.stderr.read()
    expected = losses(json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines())
    found = losses(workers.rows())
    assert list(found) == list(expected) == list(range(STEPS))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5, rtol=0)
    assert json.loads((workers.bucket / "runs/two words/loss_by_depth.json").read_text()).keys() == {"1", "4"}


def place_is_empty(workers):
    cloud = workers.cloud()
    return not cloud["queue"] and not cloud["node"]


@pytest.mark.slow
def test_what_goes_wrong_on_a_worker_is_said_here(workers, data):
    assert workers.run("create.sh")[0] == 0
    workers.settings(**SETTINGS | {"ACCELERATOR_TYPE": "v5litepod-4", "BUCKET": "''"})
    code, _, err = workers.run("setup.sh")
    assert code == 1
    assert "error: JAX sees 2 devices, not 4" in err
    # Each worker has a folder of its own: training refuses it on both, before anything is saved.
    assert workers.run("run.sh", *COMMAND, *data, "--run-dir", "runs/apart")[0] == 0
    wait_for(lambda: workers.state(0, "exit") and workers.state(1, "exit"))
    code, out, _ = workers.run("status.sh")
    assert code == 0
    for n in range(2):
        assert f"[{n}] train-" in out
    assert out.count("wrong input (exit code 2)") == 2
    assert out.count("run folder runs/apart: process 1 does not see") == 2, out
    # A wrong argument.
    code, _, err = workers.run("run.sh", "experiments/train.py", "nan0")
    assert code == 2
    assert "Did you mean 'nano'?" in err
    # Stopping what does not run only tells how it ended.
    code, out, _ = workers.run("stop.sh")
    assert code == 1
    assert out.count("wrong input") == 2
    # A Python that is too old, and settings that name it.
    code, _, err = workers.run("ssh.sh", "all", "rdlm/tpu_setup/install.sh", "false")
    assert code == 2
    assert err.count("PYTHON = false: not a Python of 3.11 or newer") == 2


def test_a_failed_run_whose_log_ends_in_running_is_not_running(tmp_path):
    state = tmp_path / ".rdlm/old-1"
    state.mkdir(parents=True)
    (state / "exit").write_text("1\n")
    (state / "log").write_text("error: another program is running\n")
    (tmp_path / ".rdlm/current").symlink_to("old-1")
    script = tmp_path / "rdlm/tpu_setup/worker.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tpu_setup/worker.sh", script)
    command = [script, "start", "new-2", "0", "experiments/train.py"]
    done = subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert "nothing is installed" in done.stderr  # it got past the check of the old run


def test_the_copy_leaves_out_what_git_does_not_know(workers):
    copy = workers.scripts.parent
    (copy / "secret.txt").write_text("not for the cloud")
    (copy / "README.md").write_text("changed")
    (copy / "pyproject.toml").unlink()
    shutil.copy(ROOT / "pyproject.toml", copy / "pyproject.toml")
    workers.cloud(queue="ACTIVE", node="READY", replies={"install": [[1, "", "error: stop here"]] * 2})
    history = ["git", "log", "--all", "--oneline"]
    before = subprocess.run(history, cwd=copy, capture_output=True).stdout
    assert workers.run("setup.sh")[0] == 1
    for home in workers.homes:
        assert (home / "rdlm/README.md").read_text() == "changed"
        assert (home / "rdlm/COMMIT").read_text().endswith("+changes\n")
        assert not (home / "rdlm/secret.txt").exists()
    assert before == subprocess.run(history, cwd=copy, capture_output=True).stdout
