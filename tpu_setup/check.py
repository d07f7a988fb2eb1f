"""check.py RUNS SCRIPT ARGS...: read a command line as SCRIPT would, and refuse what it refuses, without running it.

RUNS: also refuse folders to write that are not below this one, because they would go with the TPU; empty: any folder.
"""

import os
import runpy
import sys

import rdlm.runtime
from rdlm.config import RunConfig, require

FOLDERS = ("out", "runs", "run_dir", "results")
"""Arguments of commands that name a folder to write."""


def parse_only(runs):
    """`rdlm.runtime.parse_arguments`, which ends the process once a command line is found right."""
    parse = rdlm.runtime.parse_arguments

    def parse_and_stop(*args, **options):
        parsed = parse(*args, **options)
        named = {name: str(getattr(parsed, name, None) or "") for name in FOLDERS}
        if isinstance(parsed, RunConfig):
            named["run_dir"] = parsed.folder
        for name, folder in named.items():
            inside = os.path.abspath(folder).startswith(os.path.abspath(runs) + os.sep)
            fix = f"must be in {runs}/, which is in the bucket; another folder goes with the TPU"
            require(not runs or not folder or inside, name, folder, fix)
        sys.exit(0)

    return parse_and_stop


if __name__ == "__main__":
    rdlm.runtime.parse_arguments = parse_only(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
