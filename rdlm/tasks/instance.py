"""Instances of tasks as functions of (seed, index), and batches of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol, SupportsIndex

import numpy as np
from jaxtyping import Int, Int32

from rdlm.config import IGNORED, InputError, require

TEST_STREAM = 1_000_000
"""Stream of test instances; training seeds are below it."""


class Instance(NamedTuple):
    """One problem with its answers. Each int32 [L].

    tokens: the problem. labels: the correct answer at scored positions, IGNORED elsewhere; labels are not shifted, so
    no answer is part of the input. difficulty: of each answer, at least 1; 0 where the label is ignored.
    """

    tokens: np.ndarray
    labels: np.ndarray
    difficulty: np.ndarray


class Task(Protocol):
    """A family of problems: a frozen dataclass whose fields set the difficulty."""

    @property
    def vocab_size(self) -> int:
        """Number of token and label ids; the same for every difficulty of the family."""

    def instance(self, seed: int, index: int) -> Instance:
        """Problem number `index` of stream `seed`."""


def generator(seed: int, index: int) -> np.random.Generator:
    """The random generator of one instance.

    Raises:
      InputError: a negative seed or index.
    """
    require(seed >= 0, "seed", seed, "must not be negative")
    require(index >= 0, "index", index, "must not be negative")
    return np.random.default_rng((seed, index))


def integer(field: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Refuse anything but an integer in [minimum, maximum]. Raises InputError."""
    allowed = (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= minimum
        and (maximum is None or value <= maximum)
    )
    bounds = f"an integer of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
    require(allowed, field, value, f"must be {bounds}")


def batch(tasks: Task | Sequence[Task], seed: int, index: int, size: int) -> dict[str, Int32[np.ndarray, "{size} L"]]:
    """Batch number `index` of stream `seed`: tokens, labels, difficulty.

    Rows are the instances index * size, ..., index * size + size - 1, so no two batches of a stream share an instance.
    Several tasks of one family take turns. Shorter rows are padded with token 0 and ignored labels; the model is
    causal, so padding after an instance does not affect it.

    Raises:
      InputError: a size below 1, no task, tasks of different vocabularies, a negative seed or index.
    """
    family: list[Task] = list(tasks) if isinstance(tasks, Sequence) else [tasks]
    integer("batch size", size, 1)
    require(len({task.vocab_size for task in family}) == 1, "tasks", family, "must be one or more of one family")
    numbers = range(index * size, (index + 1) * size)
    rows = [family[i % len(family)].instance(seed, i) for i in numbers]
    longest = max(len(row.tokens) for row in rows)

    def padded(name: str, fill: int) -> np.ndarray:
        out = np.full((size, longest), fill, np.int32)
        for row, instance in zip(out, rows, strict=True):
            value = getattr(instance, name)
            row[: len(value)] = value
        return out

    return {"tokens": padded("tokens", 0), "labels": padded("labels", IGNORED), "difficulty": padded("difficulty", 0)}


class Source:
    """The first `size` instances of a stream as a random-access source of dicts, like `tfds.data_source`."""

    def __init__(self, task: Task, seed: int, size: int):
        """Raises InputError for a size below 1 or a negative seed."""
        integer("source size", size, 1)
        require(seed >= 0, "seed", seed, "must not be negative")
        self.task, self.seed, self.size = task, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> dict[str, Int32[np.ndarray, "L"]]:
        """Instance `index`: tokens, labels, difficulty."""
        i = operator.index(index)
        if not -self.size <= i < self.size:
            raise IndexError(f"index {index}: the source has {self.size} instances")
        return self.task.instance(self.seed, i % self.size)._asdict()


def scored(tokens: Sequence[int] | Int[np.ndarray, "L"], answers: dict[int, tuple[int, int]]) -> Instance:
    """An instance from its tokens and {position: (label, difficulty)}."""
    made = np.asarray(tokens, np.int32)
    labels, difficulty = np.full(len(made), IGNORED, np.int32), np.zeros(len(made), np.int32)
    for position, (label, hard) in answers.items():
        labels[position], difficulty[position] = label, hard
    if not len(made):
        raise InputError("an instance needs at least one token")
    return Instance(made, labels, difficulty)
