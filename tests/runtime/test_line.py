"""The line from process 0 to the others: what it says arrives in order, and nobody waits for who is lost."""

import os
import signal
import subprocess
import sys

import pytest
from test_processes import address  # noqa: F401

SCRIPT = """
import os, sys, time
from rdlm.runtime import run_command, start
from rdlm.runtime.line import Line

def main():
    start("same")
    line = Line()
    if line.index == 0:
        for message in (b"first", b"x" * 100_000, b"last"):
            line.say(message)
        if sys.argv[1] == "closed":
            line.close()
            return
        time.sleep(600)
    while message := line.hear():
        print(len(message), message[:5].decode(), flush=True)
        if line.index == 2 and message == b"last" and sys.argv[1] == "lost":
            os.kill(os.getpid(), 9)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "lost"])
def test_it_ends_with_its_first_process_and_with_any_that_is_lost(how, address):  # noqa: F811
    environment = {"RDLM_COORDINATOR": address, "RDLM_PROCESSES": "3", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    three = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how], env=os.environ | environment | {"RDLM_PROCESS_ID": str(i)}, **pipes
        )
        for i in range(3)
    ]
    try:
        said = [process.communicate(timeout=300) for process in three]
    finally:
        for process in three:
            process.kill()
    codes = [process.returncode for process in three]
    assert said[1][0].splitlines() == ["5 first", "100000 xxxxx", "4 last"], said[1]
    if how == "closed":
        assert codes == [0, 0, 0], said
    else:
        assert codes == [1, 1, -signal.SIGKILL], said
        lines = [f"error: process {i} of 3 has failed or is gone; start all of them again" for i in (2, 0)]
        assert [err.splitlines()[-1] for _, err in said[:2]] == lines
