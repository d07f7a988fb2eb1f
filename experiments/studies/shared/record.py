"""What a study leaves behind: finished parts that are not computed again, intervals, results with a picture."""

from __future__ import annotations

import json
import resource
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from rdlm.config import InputError
from rdlm.report import can_draw
from rdlm.report.results import compact, write_result
from rdlm.runtime import write_output

Json = dict[str, Any]
"""What a JSON file holds."""


def remembered(path: Path, made_by: Json, make: Callable[[], Json]) -> Json:
    """`make()`, or its result from when `path` was written. The file is written atomically.

    Args:
      path: a JSON file.
      made_by: everything that determines the result; kept beside it. A field that is None counts as absent, so that
        results outlive new options.
      make: computes the result.

    Raises:
      InputError: the file holds a result of something else.
    """
    made_by = _without_none(json.loads(json.dumps(made_by)))  # as it will be read: tuples are lists
    if path.exists():
        known = json.loads(path.read_text())
        before = _without_none(known["made_by"])
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


def _without_none(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_none(x) for name, x in tree.items() if x is not None}


def publish(path: Path, found: Mapping[str, Any], units: Mapping[str, str], draw: Callable[[Path], None]) -> None:
    """Write results to `path` and, where matplotlib is installed, a picture of them beside it; print both paths."""
    print(f"numbers: {write_result(path, found, units)}")
    if can_draw():
        picture = path.with_suffix(".png")
        draw(picture)
        print(f"picture: {picture}")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by Student's t); the width of one value is NaN.

    Raises:
      InputError: no values.
    """
    if not values:
        raise InputError("interval of 0 values: needs at least one")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return mean, float("nan")
    return mean, float(scipy.stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5


def rounded(values: Iterable[float]) -> list[float]:
    """To four digits."""
    return [round(float(x), 4) for x in values]


def processor_seconds() -> float:
    """Processor time of this process so far, over all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
