"""Keys and values of prompts that were read, for later prompts that begin with the same tokens.

A prompt is kept in blocks of as many tokens as an engine reads at once. A block is found by a hash of its tokens, of
all tokens before it and of all else that its keys and values depend on, so that it holds, to the bit, what reading the
tokens again would give. Blocks are copied into the cache of a request, which may then write whatever it likes.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from rdlm.config import ModelConfig
from rdlm.decode.requests import Request
from rdlm.model.cache import Cache, NewKV, append, entries


class _Block(NamedTuple):
    new_kv: NewKV
    depth: Array  # int32 [1, C], recurrences of its tokens
    steps: np.ndarray  # the same on the host, [C]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.new_kv, self.depth)))


class PromptCache:
    """Blocks of `size` tokens, `max_bytes` of them in all; those that were not used for longest leave first."""

    def __init__(self, config: ModelConfig, size: int, max_bytes: int):
        self._size, self._max_bytes = size, max_bytes
        self._random = config.loop.start == "noise" or config.test_time_noise > 0
        self._blocks: collections.OrderedDict[bytes, _Block] = collections.OrderedDict()  # the latest used last
        self.bytes = 0
        """That are kept."""

    def names(self, prompt: np.ndarray, request: Request) -> list[bytes]:
        """Names of the whole blocks of a prompt, in order. request: one row, as far as it concerns the prompt."""
        keys = jax.random.key_data(request.keys) if self._random else ()
        name = hashlib.sha256()
        for leaf in jax.device_get(jax.tree.leaves((request.depth, request.init_scale, keys))):
            name.update(np.asarray(leaf).tobytes())
        names = []
        for end in range(self._size, prompt.size + 1, self._size):
            name.update(prompt[end - self._size : end].tobytes())
            names.append(name.digest())
        return names

    def fill(self, cache: Cache, names: list[bytes]) -> tuple[Cache, list[np.ndarray]]:
        """Copy the longest known beginning into an empty cache of one row: (cache, recurrences of each block's tokens).

        cache: donated.
        """
        known = 0
        while known < len(names) and names[known] in self._blocks:
            known += 1
        for name in reversed(names[:known]):  # a beginning is of use without what follows, not the other way round
            self._blocks.move_to_end(name)
        found = [self._blocks[name] for name in names[:known]]
        for i, block in enumerate(found):
            cache = _put(cache, block.new_kv, block.depth, jnp.int32(i * self._size))
        return cache, [block.steps for block in found]

    def keep(self, name: bytes, cache: Cache, start: int, steps: np.ndarray) -> None:
        """Keep the block that begins at `start` of a cache of one row; steps int32 [size]."""
        if name in self._blocks or not self._max_bytes:
            return
        new_kv, depth = _take(cache, jnp.int32(start), self._size)
        block = _Block(new_kv, depth, steps)
        self._blocks[name] = block
        self.bytes += block.bytes
        while self.bytes > self._max_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].bytes


_take = jax.jit(entries, static_argnames="count")


@functools.partial(jax.jit, donate_argnames="cache")
def _put(cache: Cache, new_kv: NewKV, depth: Int[Array, "1 C"], start: Int[Array, ""]) -> Cache:
    return append(cache, new_kv, depth, jnp.int32(cache.sets), start, jnp.full(1, depth.shape[1], jnp.int32))
