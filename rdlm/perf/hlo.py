"""Programs compiled for real TPU topologies on a machine that has none: do they fit, and what do they copy?

Needs the package libtpu (extra `aot`). It compiles exactly as a pod's workers would; it proves memory, collectives and
copies, never numerics or speed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from rdlm.config import InputError, one_line

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


def tpu_devices(topology: str) -> list[Any]:
    """Devices to compile for, of a topology such as "v5e:2x2" or "v5p:4x4x4".

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu raises various types
        raise InputError(
            f"topology = {topology!r}: cannot compile for it ({one_line(error)}); install the extra 'aot', and "
            "write one such as v5e:2x2, v5e:16x16 or v5p:4x4x4"
        ) from error


def specs(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes of `tree` (arrays or shapes), placed by `sharding`: what `lower` needs in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


_SCOPES = {
    "recurrence_free": "recurrence_free",
    "transpose(jvp(recurrence_gradient))": "recurrence_backward",
    "recurrence_gradient": "recurrence_forward",
}
LOOPS = ("recurrence_free", "recurrence_forward", "recurrence_backward")
"""The loops of `rdlm.recurrence.unroll`, found in a compiled program by the scopes it names."""
_DECODING_SCOPES = ("recurrence_until", "recurrence_window")
DECODING = ("recurrence", "check", "token")
"""The parts of a token loop: a recurrence, a check of an exit rule, and what a token needs once. The parallel sampler
makes outer steps in place of tokens.
"""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective in a program.

    kind: all-gather, all-reduce, reduce-scatter, all-to-all, ... size: bytes of the whole array on one chip (what a
    gather makes, what a reduction starts from). group: devices that take part. loops: the loops that reach it: those of
    `LOOPS`, or "other".
    """

    kind: str
    size: int
    group: int
    loops: tuple[str, ...]

    @property
    def wire(self) -> float:
        """Bytes that one chip receives, using a ring."""
        share = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            return self.size
        return self.size * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program. Bytes per chip; `peak` is arguments and temporaries, results share the arguments' memory."""

    text: str
    arguments: int
    temporaries: int
    results: int
    shared: int

    @classmethod
    def of(cls, compiled: Any, text: str = "") -> Program:
        """What the compiler says of an executable; its text where operations are to be counted."""
        memory = compiled.memory_analysis()
        return cls(
            text,
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """Bytes one chip needs to run it."""
        return self.arguments + self.temporaries + self.results - self.shared

    def copies(
        self, min_bytes: int, operations: Collection[str] = ("copy", "copy-start", "transpose")
    ) -> collections.Counter[tuple[bool, str]]:
        """Copies and transpositions of at least `min_bytes` bytes: {(inside a loop, shape): how many}.

        operations: others to count, such as "gather".
        """
        found: collections.Counter[tuple[bool, str]] = collections.Counter()
        computations = _computations(self.text)
        looped = _loops_around(computations)
        for name, lines in computations.items():
            for shape, operation in (m.groups() for m in map(_INSTRUCTION.match, lines) if m):
                if operation in operations and _bytes(shape) >= min_bytes:
                    found[name in looped, shape] += 1
        return found

    def collectives(self) -> list[Collective]:
        """All collectives.

        A collective that the compiler spreads over several fused operations, to hide it behind them, counts once, where
        it starts: one that starts before a loop and ends after it does not belong to the loop.

        Raises:
          ValueError: the text holds a collective that was not understood; nothing is silently left out.
        """
        computations = _computations(self.text)
        loops, callers = _loops_around(computations), _fused_by(computations)
        found, parsed = [], 0
        for name, lines in computations.items():
            for match in filter(None, map(_COLLECTIVE.search, lines)):
                parsed += 1
                caller = callers.get(name, "")
                if caller.startswith("async-collective-done") or name.startswith("async_collective_fusion"):
                    continue  # the rest of one that was counted where it starts
                found.append(_collective(match, name, tuple(sorted(loops.get(name, ())))))
        raw = len(_RAW_COLLECTIVE.findall(self.text))
        if raw != parsed:
            raise ValueError(f"{raw} collectives in the program, {parsed} understood")
        return found

    def traffic(self) -> dict[str, int]:
        """Estimated bytes read and written in HBM by one pass of each loop of `LOOPS`, and by all the rest ("once").

        Arguments and results of every operation that is not fused into another (`_moved`). Loops other than the
        recurrences count as often as the compiler knows they run.
        """
        computations = _computations(self.text)
        loops, trips = _loops_around(computations), _known_trips(self.text)
        fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", self.text))
        total: dict[str, int] = dict.fromkeys((*LOOPS, "once"), 0)
        for name in computations:
            if name not in fused:
                inside = [loop for loop in loops.get(name, ()) if loop in LOOPS]
                total[inside[0] if inside else "once"] += _moved(name, computations) * trips.get(name, 1)
        return total

    def decoding_traffic(self) -> dict[str, int]:
        """The same for one token of a token loop: by one recurrence, by one check of an exit rule, and by the rest.

        Of the engine's program: by one tick, by one check, and by one flush. What only some requests ask for (sampling,
        penalties, log-probabilities) is not counted.
        """
        computations = _computations(self.text)
        total = dict.fromkeys(DECODING, 0)
        for name, part, times in self._decoding_parts():
            total[part] += _moved(name, computations) * times
        return total

    def decoding_collectives(self) -> dict[str, list[Collective]]:
        """Collectives of the same parts of a token loop."""
        computations = _computations(self.text)
        found: dict[str, list[Collective]] = {part: [] for part in DECODING}
        for name, part, times in self._decoding_parts():
            found[part] += times * [
                _collective(match) for match in map(_COLLECTIVE.search, computations[name]) if match
            ]
        return found

    def _decoding_parts(self) -> Iterator[tuple[str, str, int]]:
        """(computation, part of a token loop that it belongs to, how often it runs there)."""
        computations, trips = _computations(self.text), _known_trips(self.text)

        def walk(name: str, part: str) -> Iterator[tuple[str, str, int]]:
            yield name, part, trips.get(name, 1)
            for line in computations[name]:
                if body := _BODY.search(line):
                    yield from walk(body[1], "recurrence" if _decoding_recurrence(line) else part)
                elif " conditional(" in line and part != "token":
                    for branch in _branches(line):
                        yield from walk(branch, "token" if "/lanes_flush/" in line else "check")
                elif called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                    yield from walk(called[1], part)

        looped = {body[1] for lines in computations.values() for body in map(_BODY.search, lines) if body}
        outside = [name for name in computations if name not in looped and name.startswith("main")]
        for body in [body[1] for name in outside for body in map(_BODY.search, computations[name]) if body]:
            lanes = any("/lanes_tick/" in line for line in computations[body])
            yield from walk(body, "recurrence" if lanes else "token")


def _collective(match: re.Match[str], name: str = "", loops: tuple[str, ...] = ()) -> Collective:
    """That of a line of the computation `name`."""
    kind, sizes = match["kind"], [_bytes(shape) for shape in _SHAPE.findall(match["shapes"])]
    if match["start"] and kind != "all-reduce":  # its result holds the arguments too, before the results
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[:1]
    group = _group(match.string)
    size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
    kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
    return Collective(kind, size, group, loops)


class DoesNotFit(InputError):
    """A program that needs more memory than a chip has. needed, available: GiB per chip."""

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"the program needs {needed} GiB of {available} GiB per chip: use a smaller batch "
            "(in training also --gather each, --gradient-dtype bfloat16, or more chips)"
        )
        self.needed, self.available = needed, available


def out_of_memory(message: str) -> tuple[float, float] | None:
    """(needed, available) in GiB as a compiler's error says them; None: it is another error."""
    size = r"([\d.]+)([MGT])"
    found = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"Used {size} of {size} hbm", message)
    if found is None:
        return None
    gib = {"M": 1 / 1024, "G": 1.0, "T": 1024.0}
    return float(found[1]) * gib[found[2]], float(found[3]) * gib[found[4]]


def largest_batch(peak: Callable[[int], float], limit: float, start: int = 1) -> int:
    """The largest batch that fits, found with few tries; 0: not even one.

    Args:
      peak: GiB that a batch needs of the `limit`; raises `DoesNotFit`.
      start: the batch to begin with.
    """
    fits: dict[int, float] = {}
    too_large: int | None = None  # the smallest that does not fit
    batch = start
    while True:
        try:
            fits[batch] = peak(batch)
        except DoesNotFit:
            too_large = batch
        largest = max(fits, default=0)
        if too_large == largest + 1:
            return largest
        if too_large is not None:
            batch = (largest + too_large) // 2
        elif len(fits) == 1:
            batch = largest + 1
        else:  # every sequence takes about the same, until the compiler saves memory at the expense of time
            each = (fits[largest] - fits[min(fits)]) / (largest - min(fits))
            guess = largest + int((limit - fits[largest]) / each) if each > 0 else 2 * largest
            batch = max(largest + 1, guess)


def compile_program(lowered: Any) -> Program:
    """Compile what `jax.jit(f).lower(...)` returned.

    Raises:
      DoesNotFit: says how much it needs and has.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Large programs cannot be asked for their text, so the compiler writes it down as it goes.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            found = out_of_memory(str(error))
            if found is None:
                raise
            raise DoesNotFit(*found) from error
        text = "\n".join(path.read_text() for path in sorted(pathlib.Path(folder).glob("*.after_optimizations.txt")))
    return Program.of(compiled, text)


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


def _calls(computations: dict[str, list[str]]) -> dict[str, set[str]]:
    """The computations that each one calls."""
    calls: dict[str, set[str]] = {}
    for name, lines in computations.items():
        text = "\n".join(lines)
        called = re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", text)
        calls[name] = {*called, *_branches(text)}
    return calls


def _branches(text: str) -> list[str]:
    """The computations of which conditionals choose one."""
    groups = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", text)
    return [branch.strip().lstrip("%") for group in groups for branch in group.split(",")]


def _loops_around(computations: dict[str, list[str]]) -> dict[str, set[str]]:
    """Of every computation the loops that reach it: names of `LOOPS`, or "other"."""
    calls = _calls(computations)
    around: dict[str, set[str]] = collections.defaultdict(set)
    for lines in computations.values():
        for line in lines:
            body = _BODY.search(line)
            if body is None:
                continue
            label = _loop(line)
            todo = [body[1]]
            while todo:
                name = todo.pop()
                if label not in around[name]:
                    around[name].add(label)
                    todo += calls.get(name, ())
    return around


def _loop(line: str) -> str:
    """The loop of `LOOPS` that a line with a `while` is, or "other"."""
    return next((loop for scope, loop in _SCOPES.items() if scope in line), "other")


def _decoding_recurrence(line: str) -> bool:
    """Whether a line with a `while` is the loop over the recurrences of a token, or of a window."""
    return any(scope in line for scope in _DECODING_SCOPES)


def _fused_by(computations: dict[str, list[str]]) -> dict[str, str]:
    """Of every computation that an instruction fuses, the name of that instruction."""
    found = {}
    for lines in computations.values():
        for match in filter(None, map(_RESULT.match, lines)):
            for called in _CALLED.findall(match.string):
                found[called] = match["name"]
    return found


def _known_trips(text: str) -> dict[str, int]:
    """Trip counts known to the compiler, by loop body; without the recurrences, which callers count themselves."""
    lines = [line for line in text.splitlines() if "known_trip_count" in line]
    lines = [line for line in lines if _loop(line) == "other" and not _decoding_recurrence(line)]
    found = [re.search(r"body=%?([\w.\-]+).*?known_trip_count\D+(\d+)", line) for line in lines]
    return {match[1]: int(match[2]) for match in found if match}


_TOLD = re.compile(r'"bytes_accessed":"?(\d+)')


def _moved(name: str, computations: dict[str, list[str]]) -> int:
    """Estimated bytes that one pass of a computation reads and writes in HBM; arrays in fast memory left out.

    Of an array that is only sliced, or updated in place, the slice or the update counts.
    """
    sizes: dict[str, int] = {}
    moved = 0
    for match in filter(None, map(_RESULT.match, computations[name])):
        operation, arguments = match["operation"], _arguments(match)
        sizes[match["name"]] = _in_hbm(match["shape"])
        given = [sizes.get(argument, 0) for argument in arguments]
        called = _CALLED.search(match.string)
        if operation in _FREE or operation.endswith("-done"):
            continue
        if operation == "custom-call" and (told := _TOLD.search(match.string)):  # a kernel that says what it reads
            moved += int(told[1]) + sizes[match["name"]]
        elif operation == "copy-start":  # its result holds the source too
            moved += sizes[match["name"]]
        elif operation in ("fusion", "async-start") and called:
            reads = [size and _read(called[1], i, computations) for i, size in enumerate(given)]
            moved += sum(size if read is None else min(size, read) for size, read in zip(given, reads, strict=True))
            moved += _written(called[1], computations)
        elif operation in _SLICES:
            moved += sizes[match["name"]] + (_size(match["shape"]) if given[0] else 0)
        elif operation in _UPDATES:
            moved += 2 * given[1 if operation == "dynamic-update-slice" else -1]
        else:
            moved += sizes[match["name"]] + sum(given)
    return moved


def _read(name: str, index: int, computations: dict[str, list[str]]) -> int | None:
    """Bytes that a fused computation reads of its parameter `index`; None: all of it."""
    found = list(filter(None, map(_RESULT.match, computations[name])))
    same = {m["name"] for m in found if m["operation"] == "parameter" and f"parameter({index})" in m.string}
    total = 0
    for match in found:
        arguments = _arguments(match)
        if not same.intersection(arguments):
            continue
        called = _CALLED.search(match.string)
        first = arguments[0] in same and not same.intersection(arguments[1:])
        if match["operation"] == "bitcast" and not _is_root(match):
            same.add(match["name"])
        elif match["operation"] == "fusion" and called:
            parts = [_read(called[1], i, computations) for i, argument in enumerate(arguments) if argument in same]
            if None in parts:
                return None
            total += sum(part or 0 for part in parts)
        elif match["operation"] in _SLICES and first:
            total += _size(match["shape"])
        elif match["operation"] not in _UPDATES or not first:
            return None
    return total


def _written(name: str, computations: dict[str, list[str]]) -> int:
    """Bytes that a fused computation writes in HBM."""
    found = {m["name"]: m for m in map(_RESULT.match, computations[name]) if m}

    def written(match: re.Match[str]) -> int:
        arguments = [found[argument] for argument in _arguments(match) if argument in found]
        called = _CALLED.search(match.string)
        if match["operation"] == "tuple":
            return sum(map(written, arguments))
        if match["operation"] == "bitcast" and _in_hbm(match["shape"]):
            return written(arguments[0])
        if match["operation"] == "fusion" and called and _in_hbm(match["shape"]):
            return _written(called[1], computations)
        if match["operation"] in _UPDATES and _in_hbm(match["shape"]):
            return _size(arguments[1 if match["operation"] == "dynamic-update-slice" else -1]["shape"])
        return 0 if match["operation"] == "parameter" else _in_hbm(match["shape"])

    return written(next(filter(_is_root, found.values())))


def _is_root(match: re.Match[str]) -> bool:
    return match.string.lstrip().startswith("ROOT")


def _arguments(match: re.Match[str]) -> list[str]:
    """Names of the arguments of an operation."""
    return re.findall(r"%([\w.\-]+)", match.string[match.end() :].split("), ")[0])


def _size(shape: str) -> int:
    return sum(map(_bytes, _SHAPE.findall(shape)))


def _in_hbm(shape: str) -> int:
    return _size(_FAST.sub("", shape))


def _group(line: str) -> int:
    """How many devices take part in the collective of a line.

    Raises:
      ValueError: its groups are written in a way that is not known here.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", meshed[2]))
    if "source_target_pairs" in line:
        return 2
    raise ValueError(f"collective with unknown groups: {line.strip()[:300]}")


_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_SHAPE = re.compile(r"\w+\[[\d,]*\]")
_FAST = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (?P<shapes>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_RAW_COLLECTIVE = re.compile(rf"[ =](?:{_KINDS})(?:-start)?\(%")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<operation>[a-z][\w\-]*)\(")
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "iota",
    "optimization-barrier",
    "after-all",
    "partition-id",
    "replica-id",
}
"""Operations that move nothing themselves."""


def _bytes(shape: str) -> int:
    dtype, sizes = shape.rstrip("]").split("[")
    return math.prod(map(int, filter(None, sizes.split(",")))) * _ITEM.get(dtype, 4)
