"""Result files that say what made them: JSON with command, commit and units, and tables as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdlm.runtime import write_output

Json = dict[str, Any]
"""An object of JSON."""


def write_result(path: Path, found: Mapping[str, Any], units: Mapping[str, str]) -> Path:
    """Write `found` to `path` with `command`, `commit` (where known) and `units`, atomically.

    Numbers that are not finite become null. Lists of numbers stay on one line.

    Raises:
      InputError: the file cannot be written.
    """
    return write_output(
        path,
        compact({"command": command(), "commit": commit(), **_plain(found), "units": dict(units)}),
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of equal keys as CSV; None and numbers that are not finite become empty.

    Raises:
      InputError: the file cannot be written.
    """
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({name: "" if x is None else x for name, x in _plain(row).items()} for row in rows)
    return write_output(path, out.getvalue())


def compact(tree: Any) -> str:
    """JSON with every list of numbers on one line, and a newline at its end."""
    text = json.dumps(tree, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def command() -> str:
    """This command line, without --runs, --results and absolute paths, which say nothing about a result.

    The script is named from `experiments` on.
    """
    parts = Path(sys.argv[0]).parts
    first = parts.index("experiments") if "experiments" in parts else -2
    words = " ".join(["python", "/".join(parts[first:]), *sys.argv[1:]])
    return re.sub(r" --((runs|results)[ =]\S+|[\w-]+[ =]/\S*)", "", words)


def commit() -> str:
    """Commit of the running code."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _plain(tree: Any) -> Any:
    """Dicts, lists and Python numbers only, rounded to six digits."""
    if hasattr(tree, "tolist"):
        tree = tree.tolist()
    if isinstance(tree, Mapping):
        return {str(name): _plain(x) for name, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(x) for x in tree]
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if math.isfinite(tree) else None
    return tree
