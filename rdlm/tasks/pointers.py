"""Pointer chasing (p-hop): a map written as shuffled arrows, a start, and the node after each further hop.

Input `BOS a f(a) b f(b) ... x > > >`: the arrows of one cycle through all nodes in random order, a start x, and a `>`
per hop. The label at the h-th `>` is f applied h times to x; its difficulty is h. There are fewer hops than nodes, so
no answer repeats.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rdlm.tasks.instance import Instance, generator, integer, scored


@dataclasses.dataclass(frozen=True)
class PointerChasing:
    """`hops` hops on a cycle of `nodes` nodes. Tokens: the nodes, then `>`, then BOS."""

    hops: int = 8
    """Number of hops, fewer than nodes."""
    nodes: int = 16
    """Nodes N of the cycle; the input has 2 N + 2 + hops tokens."""

    def __post_init__(self) -> None:
        integer("PointerChasing.nodes", self.nodes, 2)
        integer("PointerChasing.hops", self.hops, 1, self.nodes - 1)

    @property
    def vocab_size(self) -> int:
        """Nodes, `>` and BOS."""
        return self.nodes + 2

    def instance(self, seed: int, index: int) -> Instance:
        """A uniform cycle and start: int32 [2 N + 2 + hops]. Raises InputError: see `generator`."""
        rng, hop, bos = generator(seed, index), self.nodes, self.nodes + 1
        cycle = rng.permutation(self.nodes)
        arrows = np.stack([cycle, np.roll(cycle, -1)], axis=1)
        problem = [bos, *rng.permutation(arrows).ravel().tolist(), int(cycle[0])]
        answers = {len(problem) - 1 + h: (int(cycle[h]), h) for h in range(1, self.hops + 1)}
        return scored([*problem, *[hop] * self.hops], answers)
