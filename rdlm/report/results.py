"""Results as files that say what made them: JSON with command, commit and units, and tables as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdlm.runtime import write_whole
from rdlm.tasks.record import command, commit, compact


def write_result(path: Path, found: Mapping[str, Any], units: Mapping[str, str]) -> Path:
    """Write `found` to `path` with `command`, `commit` (where known) and `units`, whole or not at all.

    Numbers that are not finite become null. Lists of numbers stay on one line.

    Raises:
      InputError: the file cannot be written.
    """
    return write_whole(
        path,
        compact({"command": command(), "commit": commit(), **_plain(found), "units": dict(units)}),
        make_folder=True,
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
    return write_whole(path, out.getvalue(), make_folder=True)


def _plain(tree: Any) -> Any:
    """Dicts, lists and Python numbers only, of six digits."""
    if hasattr(tree, "tolist"):
        tree = tree.tolist()
    if isinstance(tree, Mapping):
        return {str(name): _plain(x) for name, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(x) for x in tree]
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if math.isfinite(tree) else None
    return tree
