"""Every wrong argument ends in one line that names it."""

import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "wrong_arguments.py"


def test_every_wrong_argument_is_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=500)
    *wrong, count = done.stdout.splitlines()
    assert wrong == []
    assert int(count.split()[0]) > 500
    assert done.returncode == 0
