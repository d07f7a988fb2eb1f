"""Reachability on lines: which nodes can be reached from the start, which squares of a corridor from a start in it?

Input `BOS a b c d ... s x ? y ? ...`: the arrows a -> b of two equally long chains in random order, the head s of one
chain as the start, then all nodes but the two heads, each followed by `?`. The label at a `?` is yes or no. The
difficulty of a node is the number of arrows between it and the head of its chain, so that yes and no are equally hard
and equally frequent at every difficulty.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rdlm.tasks.instance import Instance, generator, integer, scored


@dataclasses.dataclass(frozen=True)
class Reachability:
    """Two chains of `distance` arrows. Tokens: the names of nodes, then no, yes, `?`, BOS."""

    distance: int = 6
    """Arrows in each chain; there are 2 distance + 2 nodes."""
    names: int = 40
    """Number of names for nodes; every instance draws its own."""

    def __post_init__(self) -> None:
        integer("Reachability.distance", self.distance, 1)
        integer("Reachability.names", self.names, 2 * self.distance + 2)

    @property
    def vocab_size(self) -> int:
        """Names, no, yes, `?` and BOS."""
        return self.names + 4

    def instance(self, seed: int, index: int) -> Instance:
        """Uniform names and orders: int32 [8 distance + 2]. Raises InputError: see `generator`."""
        rng, d = generator(seed, index), self.distance
        no, question, bos = self.names, self.names + 2, self.names + 3
        chains = rng.permutation(self.names)[: 2 * d + 2].reshape(2, d + 1)
        arrows = np.stack([chains[:, :-1].ravel(), chains[:, 1:].ravel()], axis=1)
        tokens = [bos, *rng.permutation(arrows).ravel().tolist(), int(chains[0, 0])]
        answers = {}
        for node in rng.permutation(2 * d):
            chain, far = divmod(int(node), d)
            tokens += [int(chains[chain, far + 1]), question]
            answers[len(tokens) - 1] = (no + (chain == 0), far + 1)
        return scored(tokens, answers)


@dataclasses.dataclass(frozen=True)
class Corridor:
    """A corridor with walls and starts: which open squares can be reached going right from a start?

    Input `BOS . S . . # . .`: open squares, starts and walls, on average one start and one wall. The label at an open
    square is yes or no; its difficulty is its distance from the start or wall that decides, or from BOS (no).
    """

    length: int = 16
    """Squares; the input has one token more."""

    def __post_init__(self) -> None:
        integer("Corridor.length", self.length, 4)

    @property
    def vocab_size(self) -> int:
        """Open, wall, start, no, yes, BOS."""
        return 6

    def instance(self, seed: int, index: int) -> Instance:
        """int32 [length + 1]. Raises InputError: see `generator`."""
        rng = generator(seed, index)
        squares = rng.choice(3, size=self.length, p=[1 - 2 / self.length, 1 / self.length, 1 / self.length])
        answers, reached, far = {}, False, 0
        for i, square in enumerate(squares, start=1):
            far += 1
            if square:
                reached, far = square == 2, 0
            else:
                answers[i] = 3 + int(reached), far
        return scored([5, *squares.tolist()], answers)
