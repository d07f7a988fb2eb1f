"""Programs compiled for real TPU topologies on a machine that has none: do they fit, and what do they copy?

Needs the package libtpu (extra `aot`). It compiles exactly as a pod's workers would; it proves memory, collectives and
copies, never numerics or speed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from rdlm.config import InputError

HBM_GIB = {"TPU v4": 32, "TPU v5 lite": 15.75, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 31.25, "TPU7x": 94.75}
"""GiB a program may use on one chip, by `device_kind`, as the compiler counts them."""

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


def tpu_devices(topology: str) -> list[Any]:
    """Devices to compile for, of a topology such as "v5e:2x2" or "v5p:4x4x4".

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu raises what it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"topology = {topology!r}: cannot compile for it ({reason}); install the extra 'aot', and write one such "
            "as v5e:2x2, v5e:16x16 or v5p:4x4x4"
        ) from error


def specs(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes of `tree` (arrays or shapes), placed by `sharding`: what `lower` needs in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program. Bytes per chip; `peak` is arguments and temporaries, results share the arguments' memory."""

    text: str
    arguments: int
    temporaries: int
    results: int
    shared: int

    @property
    def peak(self) -> int:
        """Bytes one chip needs to run it."""
        return self.arguments + self.temporaries + self.results - self.shared

    def copies(self, least: int) -> collections.Counter[tuple[bool, str]]:
        """Copies and transpositions of at least `least` bytes: {(inside a loop, shape): how many}."""
        found: collections.Counter[tuple[bool, str]] = collections.Counter()
        computations = _computations(self.text)
        looped = _reached_from_loops(computations)
        for name, lines in computations.items():
            for shape, operation in (m.groups() for m in map(_INSTRUCTION.match, lines) if m):
                if operation in ("copy", "copy-start", "transpose") and _bytes(shape) >= least:
                    found[name in looped, shape] += 1
        return found


def limit(device: Any) -> float:
    """GiB that a program may use on a chip like `device`.

    Raises:
      InputError: a chip whose memory is not known here.
    """
    if device.device_kind not in HBM_GIB:
        raise InputError(f"{device.device_kind}: its memory is not known; known are {', '.join(HBM_GIB)}")
    return HBM_GIB[device.device_kind]


def compile_program(lowered: Any) -> Program:
    """Compile what `jax.jit(f).lower(...)` returned.

    Raises:
      InputError: it does not fit; says how much it needs and has.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if found is None:
            raise
        raise InputError(f"the program needs {found[1]} GiB of {found[2]} GiB per chip: use a smaller batch") from error
    memory = compiled.memory_analysis()
    return Program(
        compiled.as_text(), memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
    )  # fmt: skip


_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = \(?(\w+\[[\d,]*\])\S*.*? ([\w\-]+)\(")


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of a program."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found[header[1]] = []
        else:
            lines.append(line)
    return found


def _reached_from_loops(computations: dict[str, list[str]]) -> set[str]:
    """Names of those that run inside some while loop."""
    calls: dict[str, set[str]] = {}
    todo: list[str] = []
    for name, lines in computations.items():
        text = "\n".join(lines)
        called = re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", text)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", text):
            called += [branch.strip().lstrip("%") for branch in group.split(",")]
        calls[name] = set(called)
        todo += re.findall(r"body=%?([\w.\-]+)", text)
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += calls.get(name, ())
    return reached


def _bytes(shape: str) -> int:
    dtype, sizes = shape.rstrip("]").split("[")
    return math.prod(map(int, filter(None, sizes.split(",")))) * _ITEM.get(dtype, 4)
