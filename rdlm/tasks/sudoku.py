"""4x4 Sudoku with exactly one solution.

Input: BOS, the 16 cells row by row (0 is blank), and the 16 cells again. At every blank cell of the second copy the
label is its digit. The difficulty of each answer is the number of blanks in the puzzle.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Int

from rdlm.tasks.instance import Instance, generator, integer, scored


@functools.cache
def grids() -> Int[np.ndarray, "288 16"]:
    """All solutions: every row, column and 2x2 box holds 1, 2, 3, 4."""
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))))
    every = rows[np.indices((24, 24, 24, 24)).reshape(4, -1).T]  # [24^4, row, column]
    columns = every.swapaxes(1, 2)
    boxes = every.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    right = [(np.sort(part, axis=-1) == (1, 2, 3, 4)).all(axis=(1, 2)) for part in (columns, boxes)]
    return every[right[0] & right[1]].reshape(-1, 16)


@dataclasses.dataclass(frozen=True)
class Sudoku:
    """Puzzles with `blanks` blanks. Tokens: 0 (blank), the digits 1 to 4, BOS."""

    blanks: int = 6
    """Blank cells, 1 to 11 (fewer than 4 givens never determine a solution; 12 blanks are possible but rare)."""

    def __post_init__(self) -> None:
        integer("Sudoku.blanks", self.blanks, 1, 11)

    @property
    def vocab_size(self) -> int:
        """Blank, digits and BOS."""
        return 6

    def instance(self, seed: int, index: int) -> Instance:
        """A uniform solution, blanked while it stays unique: int32 [33]. Raises InputError: see `generator`."""
        rng, known = generator(seed, index), grids()
        while True:  # start over if no further cell can be blanked before there are `blanks`
            solution = known[rng.integers(len(known))]
            given = np.ones(16, bool)
            for cell in rng.permutation(16):
                if 16 - given.sum() == self.blanks:
                    break
                given[cell] = False
                if (known[:, given] == solution[given]).all(axis=1).sum() > 1:
                    given[cell] = True
            if 16 - given.sum() == self.blanks:
                break
        cells = np.where(given, solution, 0).tolist()
        answers = {17 + i: (int(solution[i]), self.blanks) for i in range(16) if not given[i]}
        return scored([5, *cells, *cells], answers)
