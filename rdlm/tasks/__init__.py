"""Procedural tasks on which depth shows: difficulty is a parameter, answers are exact.

Instances are functions of (seed, index), so data are endless, repeatable and the same on any machine:

task = WordProblem("S3", length=16)
batch(task, seed=0, index=7, size=64)      # on the fly: tokens, labels, difficulty, int32 [64, 17]
Source(task, seed=1, size=1000)[42]        # a random-access source of the same
"""

from rdlm.tasks.addition import Addition
from rdlm.tasks.expressions import Expression
from rdlm.tasks.instance import IGNORED, Instance, Source, Task, batch
from rdlm.tasks.mazes import Maze
from rdlm.tasks.pointers import PointerChasing
from rdlm.tasks.reachability import Reachability
from rdlm.tasks.sudoku import Sudoku
from rdlm.tasks.words import Scratchpad, WordProblem

__all__ = [
    "IGNORED",
    "Addition",
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
]
