"""Modular arithmetic: the value of every parenthesis of a formula, scored where it closes.

Input `BOS ( ( 3 + 1 ) * ( 4 - 2 ) )`: a random binary tree of operators over digits, everything modulo `modulus`. The
label at a `)` is the value of its parenthesis; its difficulty is the height of that subtree (1: two digits).

Or a chain, `BOS 3 + 1 * 4 - 2`, evaluated from left to right. The label at every digit but the first is the value so
far; its difficulty is the number of operators so far. No factor is 0, so with a prime modulus every answer needs the
one before it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rdlm.config import require
from rdlm.tasks.instance import Instance, generator, integer, scored


@dataclasses.dataclass(frozen=True)
class Expression:
    """Formulas of `operators` operators. Tokens: the digits, then + - * ( ) BOS."""

    operators: int = 6
    """Operators n; the input of a tree has 4 n + 2 tokens."""
    modulus: int = 5
    """Digits are 0 .. modulus-1."""
    nested: bool = True
    """A tree with parentheses; else a chain, of 2 n + 2 tokens."""

    def __post_init__(self) -> None:
        integer("Expression.operators", self.operators, 1, 200)
        integer("Expression.modulus", self.modulus, 2)
        require(isinstance(self.nested, bool), "Expression.nested", self.nested, "must be True or False")

    @property
    def vocab_size(self) -> int:
        """Digits, + - * ( ) and BOS."""
        return self.modulus + 6

    def instance(self, seed: int, index: int) -> Instance:
        """A formula: int32 [L]. A tree splits its operators uniformly. Raises InputError: see `generator`."""
        rng, m = generator(seed, index), self.modulus
        tokens, answers = [m + 5], {}

        def applied(operator: int, a: int, b: int) -> int:
            return ((a + b), (a - b), (a * b))[operator] % m

        if not self.nested:
            value = int(rng.integers(m))
            tokens.append(value)
            for i in range(self.operators):
                operator = int(rng.integers(3))
                digit = int(rng.integers(operator == 2, m))
                tokens += [m + operator, digit]
                value = applied(operator, value, digit)
                answers[len(tokens) - 1] = value, i + 1
            return scored(np.array(tokens), answers)

        def write(operators: int) -> tuple[int, int]:
            """Append a formula to the tokens; returns its (value, height)."""
            if not operators:
                tokens.append(int(rng.integers(m)))
                return tokens[-1], 0
            left = int(rng.integers(operators))
            tokens.append(m + 3)
            a, high = write(left)
            operator = int(rng.integers(3))
            tokens.append(m + operator)
            b, higher = write(operators - 1 - left)
            tokens.append(m + 4)
            answers[len(tokens) - 1] = applied(operator, a, b), 1 + max(high, higher)
            return answers[len(tokens) - 1]

        write(self.operators)
        return scored(np.array(tokens), answers)
