"""How a command ends."""

import subprocess
import sys
import time

import pytest

ENDS = """
import threading, time
from rdlm.runtime import RunError, run_command

def main():
    print("some output")
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise {error}

run_command(main)
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (r'RunError("the disk\nis full")', "the disk is full"),
        (
            'RuntimeError("RESOURCE_EXHAUSTED: 5")',
            "out of memory (RESOURCE_EXHAUSTED: 5); ask for less at a time",
        ),
        ("MemoryError()", "out of memory (MemoryError); ask for less at a time"),
    ],
)
def test_a_failed_run_does_not_wait_for_its_threads(error, line):
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", ENDS.replace("{error}", error)], capture_output=True, text=True)
    assert time.monotonic() - began < 50
    assert (found.returncode, found.stdout, found.stderr) == (1, "some output\n", f"error: {line}\n")
