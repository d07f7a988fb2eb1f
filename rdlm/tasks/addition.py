"""Addition of several numbers, column by column as on paper, units first.

Input `BOS 7 5 9 = 2 0 8 = 0 0 0 =`: the units of all operands, then the tens, ..., and a last column of zeros for the
carry. The label at each `=` is the digit of the sum. Its difficulty is one plus the number of consecutive columns
before it that pass a carry on, that is, whose outgoing carry depends on the incoming one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rdlm.config import require
from rdlm.tasks.instance import Instance, generator, integer, scored


@dataclasses.dataclass(frozen=True)
class Addition:
    """`operands` numbers of `digits` digits. Tokens: the ten digits, then `=`, then BOS."""

    operands: int = 3
    """Numbers to add, 2 to 9, so that a carry has one digit."""
    digits: int = 8
    """Digits of each number; the sum has one more."""
    passing: float = 0.0
    """Share of the columns that are redrawn until they pass a carry on; 1 makes all columns one chain."""

    def __post_init__(self) -> None:
        integer("Addition.operands", self.operands, 2, 9)
        integer("Addition.digits", self.digits, 1)
        require(0 <= self.passing <= 1, "Addition.passing", self.passing, "must be between 0 and 1")

    @property
    def vocab_size(self) -> int:
        """Digits, `=` and BOS."""
        return 12

    def instance(self, seed: int, index: int) -> Instance:
        """Uniform digits, apart from `passing`: int32 [(digits + 1)(operands + 1) + 1]. Raises InputError."""
        rng = generator(seed, index)
        columns = rng.integers(0, 10, (self.digits + 1, self.operands))
        columns[-1] = 0
        wanted = rng.random(self.digits) < self.passing
        tokens, answers, carry, chain = [11], {}, 0, 0
        for i, column in enumerate(columns):
            while i < self.digits and wanted[i] and not self._passes(column):
                column = rng.integers(0, 10, self.operands)
            tokens += [*column.tolist(), 10]
            alone = int(column.sum())
            answers[len(tokens) - 1] = (alone + carry) % 10, 1 + chain
            carry, chain = (alone + carry) // 10, chain + 1 if self._passes(column) else 0
        return scored(tokens, answers)

    def _passes(self, column: np.ndarray) -> bool:
        """Whether the outgoing carry depends on the incoming one."""
        return column.sum() // 10 != (column.sum() + self.operands - 1) // 10
