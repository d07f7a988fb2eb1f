"""How the processes of a run come together: the roll call, and what it says when one is missing or different."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

import rdlm.runtime.processes as processes
import rdlm.runtime.roll_call as rolls
from rdlm.config import InputError
from rdlm.runtime import StartError, agree, exchange, start, together
from rdlm.runtime.processes import HEARTBEAT_SECONDS
from rdlm.runtime.roll_call import roll_call


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def called(address, greetings, count, timeout=30):
    """The outcome for each process (index, greeting) that takes part: None or its exception."""

    def one(mine):
        try:
            roll_call(address, count, *mine, timeout)
        except (InputError, StartError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(greetings)) as pool:
        return list(pool.map(one, greetings))


def greeting(process, **changes):
    return process, {"host": f"host{process}", "code": "c", "configuration": "a"} | changes


def test_all_arrive_in_any_order(address):
    assert called(address, [greeting(i) for i in (2, 1, 0, 3)], 4) == [None] * 4


def test_the_missing_are_named_on_every_process(address):
    found = called(address, [greeting(0), greeting(2)], 4, timeout=1)
    assert all(isinstance(error, StartError) for error in found)
    for error in found:
        assert str(error).startswith(f"process 1, 3 of 4 did not come to {address} within 1 s")
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"code": "other"}, "has another code than process 0 (host0): copy it again (tpu_setup/setup.sh)"),
     ({"configuration": "other"}, "has another configuration than process 0 (host0): give all the same arguments")],
)  # fmt: skip
def test_a_process_that_differs_is_refused_on_every_process(changes, words, address):
    found = called(address, [greeting(0), greeting(1), greeting(2, **changes)], 3)
    assert all(isinstance(error, InputError) for error in found)
    assert {str(error) for error in found} == {f"process 2 (host2) {words}"}


def test_whoever_else_knocks_is_ignored(address):
    host, port = address.split(":")
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(called, address, [greeting(0)], 2)
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n",
            b"[7, {}]\n",
            b"[1, 5]\n",
            b"[1, {}]\n",
            b'{"process": 7}\n',
            b"",
        ):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection((host, int(port)), timeout=5) as line:
                        line.sendall(noise)
                    break
                except ConnectionRefusedError:  # the lead is not there yet
                    time.sleep(0.01)
        assert called(address, [greeting(1)], 2) == [None]
        assert lead.result() == [None]


def test_without_process_0_the_others_say_where_they_asked(address, monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(rolls.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(rolls.time, "sleep", lambda seconds: None)
    [error] = called(address, [greeting(1)], 2, timeout=20)
    assert isinstance(error, StartError)
    assert str(error).startswith(f"process 1 of 2: no answer from process 0 at {address} within 20 s")


def test_another_program_at_the_port_of_process_0_is_ignored(address, monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(rolls.time, "sleep", lambda seconds: None)
    with socket.create_server(("", int(address.split(":")[1]))) as server, ThreadPoolExecutor(1) as pool:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as line:
                        line.sendall(b"5\n")

        pool.submit(answer)
        monkeypatch.setattr(rolls.time, "monotonic", lambda: next(clock))
        [error] = called(address, [greeting(1)], 2, timeout=20)
        server.shutdown(socket.SHUT_RDWR)
    assert isinstance(error, StartError)


def test_a_port_in_use_is_one_line(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        [error] = called(address, [greeting(0)], 2)
    assert isinstance(error, StartError)
    assert "cannot be opened" in str(error)


def test_a_missing_device_is_an_error_and_not_the_end_of_a_later_program(monkeypatch):
    def no_devices():
        raise RuntimeError("no devices")

    timers = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax, "process_count", no_devices)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(threading.Timer, "start", lambda self: timers.append(self))
    with pytest.raises(RuntimeError, match="no devices"):
        processes._join("localhost:1", 1, 0, "", 60)
    [timer] = timers
    assert timer.finished.is_set()  # cancelled


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RDLM_PROCESSES": "2"}, "RDLM_COORDINATOR is not set, but RDLM_PROCESSES is"),
        ({"RDLM_COORDINATOR": "a:1", "RDLM_PROCESSES": "2"}, "RDLM_PROCESS_ID is not set"),
        ({"RDLM_COORDINATOR": "a", "RDLM_PROCESSES": "2", "RDLM_PROCESS_ID": "0"}, "RDLM_COORDINATOR = 'a': must be"),
        (
            {"RDLM_COORDINATOR": "a:1", "RDLM_PROCESSES": "2", "RDLM_PROCESS_ID": "2"},
            "must be less than RDLM_PROCESSES",
        ),
        ({"RDLM_COORDINATOR": "a:1", "RDLM_PROCESSES": "two", "RDLM_PROCESS_ID": "0"}, "RDLM_PROCESSES = 'two'"),
        ({"RDLM_START_TIMEOUT": "5m"}, "RDLM_START_TIMEOUT = '5m'"),
        ({"RDLM_START_TIMEOUT": "1" * 5000}, "RDLM_START_TIMEOUT = '1111.*at most 9 digits"),
        ({"RDLM_PROFILER_PORT": "99999"}, "RDLM_PROFILER_PORT = 99999: a port is at most 65535"),
        *(
            ({"RDLM_COORDINATOR": address, "RDLM_PROCESSES": "2", "RDLM_PROCESS_ID": index}, words)
            for index in "01"
            for address, words in (
                ("a:99999", "RDLM_COORDINATOR = 'a:99999': a port is at most 65535"),
                ("a:0", "RDLM_COORDINATOR = 'a:0': must be HOST:PORT"),
                ("a:" + "9" * 5000, "must be HOST:PORT"),
            )
        ),
    ],
)
def test_wrong_environment_is_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        start()


def test_a_process_alone_needs_none_of_it():
    start("anything")
    assert exchange("text") == ["text"]
    assert together(lambda: 3) == 3
    with pytest.raises(InputError, match="mine"):
        together(refuse)


def refuse():
    raise InputError("mine")


TOGETHER = """
import json, sys
from rdlm.config import InputError
from rdlm.runtime import exchange, run_command, start, together

def make():
    if said[0] == "first" and sys.argv[1] == "1":
        raise InputError("folder = 'x': is full")

def main():
    global said
    start("same")
    said = exchange(sys.argv[2])
    print(json.dumps(said), flush=True)
    together(make)

run_command(main)
"""


HEARTBEAT = 10  # of the test: long enough for a busy machine

FAILS = f"""
import sys
import rdlm.runtime.processes
from rdlm.runtime import exchange, run_command, start

rdlm.runtime.processes.HEARTBEAT_SECONDS = {HEARTBEAT}

def main():
    start("same")
    exchange("both are there")
    if sys.argv[1] == "1":
        raise ValueError("a bug")
    exchange("this waits for the other one")

run_command(main)
"""


def two_processes(script, address, words):
    """Two processes that run `script` together, each with its number and word as arguments."""
    environment = {"RDLM_COORDINATOR": address, "RDLM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(i), word], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | environment | {"RDLM_PROCESS_ID": str(i)},
        )
        for i, word in enumerate(words)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_talk_and_refuse_together(address):
    for i, process in enumerate(two_processes(TOGETHER, address, ["first", "é second"])):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 2, err
        assert json.loads(out.splitlines()[-1]) == ["first", "é second"]
        expected = "error: " + ("process 1: " if i == 0 else "") + "folder = 'x': is full"
        assert err.splitlines()[-1] == expected


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_within_a_minute(address):
    waits, fails = two_processes(FAILS, address, ["", ""])
    _, err = fails.communicate(timeout=240)
    assert fails.returncode == 1
    assert "ValueError: a bug" in err
    failed = time.monotonic()
    _, err = waits.communicate(timeout=240)
    assert time.monotonic() - failed < HEARTBEAT + 30, "JAX's heartbeat, on a busy machine"
    assert HEARTBEAT_SECONDS + 30 <= 60
    assert waits.returncode not in (0, 2, 75)
    assert "another task died" in err


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"a: rows": 1}, {"a: rows": 2}, "process 1: a: rows = 2, but on process 0 a: rows = 1"),
        ({"a": 1, "b": 2}, {"a": 1}, "process 1: nothing, but on process 0 b = 2"),
        ({"file 0": "x"}, {"file 0": "x", "file 1": "y"}, 'process 1: file 1 = "y", but on process 0 nothing'),
        (dict.fromkeys(map(str, range(3000)), 0), {str(i): int(i == 2500) for i in range(3000)}, "process 1: 2500 = 1"),
        ({"a": 1}, {"a": 1}, None),
        ({}, {}, None),
    ],
)
def test_processes_agree_or_all_name_the_first_difference(first, second, says, monkeypatch):
    both, said = threading.Barrier(2, timeout=20), [{}, {}]
    calls = threading.local()

    def exchange(text):
        number = calls.count = getattr(calls, "count", 0) + 1
        said[calls.index][number] = text
        both.wait()
        return [texts[number] for texts in said]

    monkeypatch.setattr(processes, "exchange", exchange)
    found = [None, None]

    def process(index, things):
        calls.index = index
        try:
            agree(things)
        except InputError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=process, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert (found[0] is None) == (says is None)
    assert says is None or found[0].startswith(says)
