"""One process at a time in a folder: by the kernel's lock, and by a heartbeat where there is none."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

import rdlm.runtime.owner as owner
from rdlm.config import InputError
from rdlm.runtime import RunError, owned

LINE = r"^run folder .+: process \d+ on .+ is using it; wait until that ends, or choose another$"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(owner, "FIRST_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(owner, "SILENT_SECONDS", 0.3)


@pytest.fixture
def without_locks(monkeypatch):
    """As in a mounted bucket."""

    def refuse(handle, operation):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)


def own(folder, lines=None):
    return owned(folder, "choose another", (lines if lines is not None else []).append)


def left_behind(folder, **changes):
    """The file of an owner that was killed."""
    found = {**owner._machine(), "pid": os.getpid(), "token": "theirs", "beat": 7, "time": time.time()} | changes
    (folder / owner.FILE).write_text(json.dumps(found))


def test_the_second_is_refused_and_the_first_leaves_nothing(tmp_path):
    with own(tmp_path) as check:
        with pytest.raises(InputError, match=LINE), own(tmp_path):
            pass
        check()
        assert json.loads((tmp_path / owner.FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())
    with own(tmp_path):
        pass


@pytest.mark.usefixtures("without_locks")
def test_where_there_are_no_locks_the_heartbeat_says_that_the_owner_lives(tmp_path):
    lines = []
    with own(tmp_path) as check:
        with pytest.raises(InputError, match=LINE), own(tmp_path, lines):
            pass
        check()
    assert len(lines) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_locks")
def test_two_that_start_at_the_same_moment_do_not_both_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_wait_for_silence", lambda *_: None)  # both have looked before either wrote
    stayed, refused, met = [], [], threading.Barrier(2)

    def run():
        met.wait()
        with own(tmp_path) as check:
            met.wait()
            time.sleep(0.3)
            try:
                check()
                stayed.append(True)
            except RunError as error:
                refused.append(str(error))
            met.wait()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stayed == [True]
    assert "has taken it over" in refused[0]


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({}, False),  # a killed process of this machine: its lock is gone
        ({"host": "another"}, True),  # perhaps alive, where its lock is not seen
        ({"boot": "before the power cut"}, True),
        ({"host": "another", "time": 0}, False),
    ],
)
def test_the_folder_of_a_dead_owner_is_taken_over(changes, waits, tmp_path):
    left_behind(tmp_path, **changes)
    lines = []
    with own(tmp_path, lines):
        assert json.loads((tmp_path / owner.FILE).read_text())["token"] != "theirs"
    assert len(lines) == waits
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", '{"pid": "x", "time": "late"}'])
def test_a_damaged_file_does_not_keep_anybody_out(content, tmp_path):
    (tmp_path / owner.FILE).write_text(content)
    with own(tmp_path):
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_dead_process_of_this_machine_needs_no_lock_to_be_known_as_dead(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left_behind(tmp_path, pid=dead.pid)
    lines = []
    with own(tmp_path, lines):
        pass
    assert not lines


def test_whoever_is_taken_over_notices_and_leaves_the_file_to_the_new_owner(tmp_path):
    with own(tmp_path) as check:
        left_behind(tmp_path, host="another")
        time.sleep(0.3)
        with pytest.raises(RunError, match=r"run folder .+: process \d+ on another has taken it over"):
            check()
    assert json.loads((tmp_path / owner.FILE).read_text())["token"] == "theirs"
