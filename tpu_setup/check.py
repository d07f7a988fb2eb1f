"""check.py SCRIPT ARGS...: read a command line as SCRIPT would, and refuse what it refuses, without running it.

With a BUCKET, folders to write must be in runs/, which is in it: another one would go with the TPU.
"""

import os
import runpy
import sys

import rdlm.runtime
from rdlm.config import RunConfig, require

FOLDERS = ("out", "runs", "run_dir", "results")
"""Arguments of commands that name a folder to write."""

parse = rdlm.runtime.parse_arguments


def parse_only(*args, **options):
    """`rdlm.runtime.parse_arguments`, which ends the process once a command line is found right."""
    parsed = parse(*args, **options)
    named = {name: str(getattr(parsed, name, None) or "") for name in FOLDERS}
    if isinstance(parsed, RunConfig):
        named["run_dir"] = parsed.folder
    for name, folder in named.items():
        inside = os.path.abspath(folder).startswith(os.path.abspath("runs") + os.sep)
        fix = "must be in runs/, which is in the bucket; another folder goes with the TPU"
        require(not folder or inside or not os.environ.get("BUCKET"), name, folder, fix)
    sys.exit(0)


if __name__ == "__main__":
    rdlm.runtime.parse_arguments = parse_only
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
