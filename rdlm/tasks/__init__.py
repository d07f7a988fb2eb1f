"""Procedural tasks that need depth: difficulty is a parameter, answers are exact.

Instances are functions of (seed, index), so data are endless, repeatable and the same on any machine:

task = WordProblem("S3", length=16)
batch(task, seed=0, index=7, size=64)      # tokens, labels, difficulty, int32 [64, 17]
Source(task, seed=1, size=1000)[42]        # the same instances as a random-access source
named("s3", 16)                            # the task of a run's config (`data.task`, `data.task_size`)
"""

import functools
from collections.abc import Callable

from rdlm.config import InputError, did_you_mean
from rdlm.tasks.addition import Addition
from rdlm.tasks.expressions import Expression
from rdlm.tasks.instance import IGNORED, Instance, Source, Task, batch
from rdlm.tasks.mazes import Maze
from rdlm.tasks.pointers import PointerChasing
from rdlm.tasks.reachability import Corridor, Reachability
from rdlm.tasks.sudoku import Sudoku
from rdlm.tasks.words import Scratchpad, WordProblem

TASKS: dict[str, Callable[[int], Task]] = {
    "s3": functools.partial(WordProblem, "S3"),
    "s5": functools.partial(WordProblem, "S5"),
    "parity": functools.partial(WordProblem, "Z2"),
    "addition": lambda digits: Addition(3, digits, 0.5),
    "expressions": Expression,
    "chains": lambda operators: Expression(operators, 3, nested=False),
    "pointers": lambda hops: PointerChasing(hops, 12),
    "reachability": Reachability,
    "corridors": Corridor,
    "mazes": Maze,
    "sudoku": Sudoku,
}
"""Tasks by name, as functions of their size."""


def named(name: str, size: int) -> Task:
    """The task called `name` at a size. Raises InputError for an unknown name or a size that the task refuses."""
    if name not in TASKS:
        raise InputError(f"data.task = {name!r}: there is no such task.{did_you_mean(name, TASKS)}")
    return TASKS[name](size)


__all__ = [
    "IGNORED",
    "TASKS",
    "Addition",
    "Corridor",
    "Expression",
    "Instance",
    "Maze",
    "PointerChasing",
    "Reachability",
    "Scratchpad",
    "Source",
    "Sudoku",
    "Task",
    "WordProblem",
    "batch",
    "named",
]
