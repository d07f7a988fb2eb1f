"""What an experiment leaves behind: finished parts that are not done again, intervals, JSON that says what made it."""

from __future__ import annotations

import json
import resource
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rdlm.config import InputError
from rdlm.report.results import compact
from rdlm.runtime import write_output

# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def remembered(path: Path, made_by: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`make()`, or what it returned when `path` was written; the file appears whole or not at all.

    Args:
      path: a JSON file.
      made_by: everything that determines the result; kept beside it. A field that is None is one that was never set, so
        that results outlive new options.
      make: the work.

    Raises:
      InputError: the file holds a result of something else.
    """
    made_by = _set(json.loads(json.dumps(made_by)))  # as it will be read: tuples are lists
    if path.exists():
        known = json.loads(path.read_text())
        before = _set(known["made_by"])
        for name in {**made_by, **before}:
            old, new = before.get(name), made_by.get(name)
            if old != new:
                raise InputError(
                    f"{path}: holds a result with {name} = {old!r}, not {new!r}; delete it or choose other --runs"
                )
        return known["result"]
    result = make()
    write_output(path, compact({"made_by": made_by, "result": result}))
    return result


def _set(tree: Any) -> Any:
    """`tree` without entries that are None."""
    return {k: _set(x) for k, x in tree.items() if x is not None} if isinstance(tree, dict) else tree


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by Student's t); the width of one value is NaN.

    Raises:
      InputError: no values, or more than ten.
    """
    if not 1 <= len(values) <= len(_T) + 1:
        raise InputError(f"interval of {len(values)} values: must be of 1 to {len(_T) + 1}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, float("nan")
    return mean, _T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def rounded(values: Any) -> list[float]:
    """To four digits."""
    return [round(float(x), 4) for x in values]


def processor_seconds() -> float:
    """Processor time of this process so far, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
