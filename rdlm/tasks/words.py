"""Word problems over small groups: the product of all letters so far, after every letter.

Input `BOS g1 ... gT`; the label at g_t is g1 g2 ... g_t, of difficulty t. Over a solvable group a shallow network has
shortcuts (parity of a sum). Over S5 the problem is complete for NC1, so no network of fixed depth is believed to solve
it at every length.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal

import numpy as np

from rdlm.config import require
from rdlm.tasks.instance import IGNORED, Instance, generator, integer

Group = Literal["Z2", "S3", "S5"]
DEGREE: dict[str, int] = {"Z2": 2, "S3": 3, "S5": 5}


@functools.cache
def elements(group: str) -> tuple[tuple[int, ...], ...]:
    """The permutations of a group, in the order of their ids (lexicographic; the identity is 0)."""
    return tuple(itertools.permutations(range(DEGREE[group])))


@functools.cache
def product(group: str) -> np.ndarray:
    """int [G, G]: id of the product a b = "first a, then b" of elements a and b."""
    known = elements(group)
    index = {p: i for i, p in enumerate(known)}
    return np.array([[index[tuple(b[x] for x in a)] for b in known] for a in known])


@functools.cache
def letters(group: str) -> tuple[int, ...]:
    """Ids of the letters of words: the transposition (0 1) and the cycle (0 1 ... d-1), which generate S_d.

    Over Z2, where both are the same, the identity and the transposition: words of bits, products are prefix parities.
    """
    degree, index = DEGREE[group], {p: i for i, p in enumerate(elements(group))}
    transposition = index[1, 0, *range(2, degree)]
    return (0, transposition) if degree == 2 else (transposition, index[*range(1, degree), 0])


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """Words of `length` letters over `group`. Tokens: the group's elements (letters and answers alike), then BOS."""

    group: Group = "S3"
    """S3 (6 elements), S5 (120), or Z2: prefix parity."""
    length: int = 16
    """Letters T; the tokens are one more."""

    def __post_init__(self) -> None:
        require(self.group in DEGREE, "WordProblem.group", self.group, f"must be one of {', '.join(DEGREE)}")
        integer("WordProblem.length", self.length, 1)

    @property
    def vocab_size(self) -> int:
        """Elements and BOS."""
        return len(elements(self.group)) + 1

    def instance(self, seed: int, index: int) -> Instance:
        """A word of uniform letters: tokens, labels, difficulty int32 [T+1]. Raises InputError: see `generator`."""
        table = product(self.group)
        word = np.array(letters(self.group))[generator(seed, index).integers(0, 2, self.length)]
        tokens = np.concatenate([[len(table)], word]).astype(np.int32)
        labels = np.full(self.length + 1, IGNORED, np.int32)
        so_far = 0
        for t, g in enumerate(word.tolist(), start=1):
            labels[t] = so_far = table[so_far, g]
        return Instance(tokens, labels, np.arange(self.length + 1, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class Scratchpad:
    """S3 words followed by their products: `BOS g1 .. gT BOS p1 .. p(T-1)`, p_t = g1 .. gt.

    The label at the second BOS is p1, at p_t it is p_(t+1); the difficulty of p_t is t. Unlike in other tasks, answers
    are part of the input: in a test the model reads the ones it wrote itself.
    """

    length: int = 16
    """Letters T; there are 2 T + 1 tokens."""
    first: int = 1
    """Number of the first product that is scored."""

    def __post_init__(self) -> None:
        integer("Scratchpad.length", self.length, 1)
        integer("Scratchpad.first", self.first, 1, self.length)

    @property
    def vocab_size(self) -> int:
        """As for words."""
        return WordProblem("S3", self.length).vocab_size

    def instance(self, seed: int, index: int) -> Instance:
        """Word number `index` of stream `seed`, the same as `WordProblem` makes: int32 [2T+1]. Raises InputError."""
        tokens, products, number = WordProblem("S3", self.length).instance(seed, index)
        unscored = number[1:] < self.first
        before = np.zeros(self.length + 1, np.int32)
        return Instance(
            np.concatenate([tokens, tokens[:1], products[1:-1]]),
            np.concatenate([np.full_like(before, IGNORED), np.where(unscored, IGNORED, products[1:])]),
            np.concatenate([before, np.where(unscored, 0, number[1:])]),
        )
