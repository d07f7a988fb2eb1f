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
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from rdlm.config import InputError

HBM_BYTES = {"TPU v4": 32, "TPU v5 lite": 15.75, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 31.25, "TPU7x": 94.75}
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
        looped = _reached_from_loops(self.text)
        for computation, shape, operation in _instructions(self.text):
            if operation in ("copy", "copy-start", "transpose") and _bytes(shape) >= least:
                found[computation in looped, shape] += 1
        return found


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


def _instructions(text: str) -> list[tuple[str, str, str]]:
    """(computation, shape of the first result, operation) of every instruction."""
    found, computation = [], ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            found.append((computation, instruction[1], instruction[2]))
    return found


def _reached_from_loops(text: str) -> set[str]:
    """Computations that run inside some while loop."""
    calls: dict[str, set[str]] = collections.defaultdict(set)
    bodies, computation = set(), ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computation = header[1]
            continue
        called = re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", line)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
            called += [name.strip().lstrip("%") for name in group.split(",")]
        calls[computation].update(called)
        bodies.update(re.findall(r"body=%?([\w.\-]+)", line))
    reached, todo = set(), list(bodies)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += calls[name]
    return reached


def _bytes(shape: str) -> int:
    dtype, sizes = shape.rstrip("]").split("[")
    return math.prod(map(int, filter(None, sizes.split(",")))) * _ITEM.get(dtype, 4)


def fits(program: Program, devices: Sequence[Any]) -> bool:
    """Whether one of `devices` has the memory to run the program."""
    return program.peak <= HBM_BYTES[devices[0].device_kind] * 2**30
