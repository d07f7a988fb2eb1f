"""How a command ends."""

import subprocess
import sys
import time

ENDS = """
import threading, time
from rdlm.runtime import RunError, run_command

def main():
    print("some output")
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise RunError("the disk\\nis full")

run_command(main)
"""


def test_a_failed_run_does_not_wait_for_its_threads():
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert time.monotonic() - began < 50
    assert (found.returncode, found.stdout, found.stderr) == (1, "some output\n", "error: the disk is full\n")
