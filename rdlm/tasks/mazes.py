"""Mazes as text: which open squares are on the path from S to G?

    S . . # .
    # # . # .        a maze of 3 x 3 cells: walls and passages between cells are squares too, 5 x 5 in all
    . . . # .
    . # . # .
    . # . . G

Input: BOS, the rows with a newline after each, and the same rows again. At every open square of the second copy but S
the label is whether it is on the only path from S to G. Its difficulty is its distance from S in steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from rdlm.tasks.instance import Instance, generator, integer, scored

WALL, OPEN, START, GOAL, NEWLINE, NO, YES, BOS = range(8)


def carve(side: int, rng: np.random.Generator) -> Bool[np.ndarray, "{2*side-1} {2*side-1}"]:
    """A spanning tree of side x side cells by random depth-first search, as open squares.

    There is exactly one path between any two open squares.
    """
    square = np.zeros((2 * side - 1, 2 * side - 1), bool)
    here = tuple(int(x) for x in rng.integers(side, size=2))
    square[2 * here[0], 2 * here[1]] = True
    stack = [here]
    while stack:
        y, x = stack[-1]
        around = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        fresh = [(v, u) for v, u in around if 0 <= v < side and 0 <= u < side and not square[2 * v, 2 * u]]
        if not fresh:
            stack.pop()
            continue
        v, u = fresh[rng.integers(len(fresh))]
        square[2 * v, 2 * u] = square[y + v, x + u] = True
        stack.append((v, u))
    return square


def distances(square: Bool[np.ndarray, "n n"], start: tuple[int, int]) -> Int[np.ndarray, "n n"]:
    """Steps from `start` to every open square; -1 for walls."""
    far = np.full(square.shape, -1)
    far[start] = 0
    front = [start]
    while front:
        y, x = front.pop(0)
        for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if 0 <= v < len(square) and 0 <= u < len(square) and square[v, u] and far[v, u] < 0:
                far[v, u] = far[y, x] + 1
                front.append((v, u))
    return far


@dataclasses.dataclass(frozen=True)
class Maze:
    """Mazes of `side` x `side` cells. Tokens: wall, open, S, G, newline, no, yes, BOS."""

    side: int = 3
    """Cells along a side; with n = 2 side - 1 squares the input has 2 n (n + 1) + 1 tokens."""

    def __post_init__(self) -> None:
        integer("Maze.side", self.side, 2, 50)

    @property
    def vocab_size(self) -> int:
        """Squares, newline, answers, BOS."""
        return 8

    def instance(self, seed: int, index: int) -> Instance:
        """A maze with S and G in two different cells: int32 [2 n (n + 1) + 1]. Raises InputError: see `generator`."""
        rng = generator(seed, index)
        square = carve(self.side, rng)
        n = len(square)
        ends = rng.permutation(self.side**2)[:2]
        start, goal = ((int(2 * (c // self.side)), int(2 * (c % self.side))) for c in ends)
        from_start, from_goal = distances(square, start), distances(square, goal)
        text = np.where(square, OPEN, WALL)
        text[start], text[goal] = START, GOAL
        rows = np.concatenate([text, np.full((n, 1), NEWLINE)], axis=1).ravel().tolist()
        answers = {}
        for y, x in np.argwhere(square).tolist():
            if (y, x) != start:
                on_path = from_start[y, x] + from_goal[y, x] == from_start[goal]
                answers[1 + len(rows) + y * (n + 1) + x] = YES if on_path else NO, int(from_start[y, x])
        return scored([BOS, *rows, *rows], answers)
