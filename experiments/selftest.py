"""Does this machine compute the right thing, and how fast? For a fresh TPU VM, a GPU or a CPU; at most ten minutes.

    python experiments/selftest.py
    python experiments/selftest.py --quick --out runs/quick

Compares logits and tokens with a forward pass in NumPy, on every device; every kernel with its plain twin; and the bits
of two runs. Trains `small` and the largest preset that fits, its memory beside what the compiler predicts; decodes
beside the roofline; times all-gather and all-reduce where there are several chips. Speeds are judged by the chip's
datasheet, elsewhere by matrix products and copies in the same run: keep the machine free of other work. One page to
paste into a bug report, as text, JSON and HTML.

Exit codes: 0 nothing failed, 1 something did and is named, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rdlm import runtime
from rdlm.config import require
from rdlm.runtime import parse_arguments, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """What to check."""

    out: Path = Path("runs/selftest")
    """Folder for report.txt, report.json and report.html."""
    minutes: float = 10.0
    """The larger preset trains only if it fits in what is left of them."""
    quick: bool = False
    """Small shapes, and no expectations of speed: numbers alone, in a minute."""


def main() -> int:
    args = parse_arguments(Args, prog="selftest.py", description=__doc__)
    require(0 < args.minutes < 1e6, "minutes", args.minutes, "must be above 0")
    began = time.monotonic()
    runtime.start()
    import jax  # after `start`, which must come before anything touches a device

    from rdlm import selftest
    from rdlm.report import write_result
    from rdlm.report.page import checks_page

    usual = selftest.CPU if jax.default_backend() == "cpu" else selftest.CHIP
    say = runtime.to_stderr if runtime.is_first() else lambda line: None
    mine = selftest.every_check(selftest.QUICK if args.quick else usual, began + 60 * args.minutes, say)
    texts = runtime.exchange(json.dumps([dataclasses.asdict(check) for check in mine]))
    for i, text in enumerate(texts[1:], 1):  # of other processes only what failed
        others = [selftest.Check(**fields) for fields in json.loads(text)]
        found = [dataclasses.replace(x, name=f"process {i}: {x.name}") for x in others if x.verdict == "FAILED"]
        mine += found
    failed = [check.name for check in mine if check.verdict == "FAILED"]
    if runtime.is_first():
        rows, facts = [check.cells() for check in mine], runtime.versions()
        facts |= {"load of the machine": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"}
        words = f"{len(mine)} checks in {time.monotonic() - began:.0f} s. "
        words += f"{len(failed)} FAILED: {'; '.join(failed)}." if failed else "None failed."
        text = "\n".join(["rdlm self-test", words, "", *columns(rows), "", *columns(list(facts.items())), ""])
        checks = [dataclasses.asdict(check) | {"verdict": check.verdict} for check in mine]
        print(text, end="")  # first: the files may be impossible to write
        runtime.write_output(args.out / "report.txt", text)
        runtime.write_output(args.out / "report.html", checks_page("rdlm self-test", words, facts, rows))
        write_result(args.out / "report.json", {"failed": failed, "versions": facts, "checks": checks}, {})
        print(f"report: {args.out}/report.txt, report.json, report.html")
    return runtime.EXIT_FAILED if failed else runtime.EXIT_DONE


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of aligned cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    run_command(main)
