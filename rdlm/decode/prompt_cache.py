"""Keys and values of prompts that were read, for later prompts that begin with the same tokens.

A prompt is kept in the chunks in which an engine reads it. A chunk is found by a hash of its tokens, of all tokens
before it and of all else that its keys and values depend on, so that it holds, to the bit, what reading the tokens
again would give. Chunks are copied into the cache of a request, which may then write whatever it likes.
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


class _Chunk(NamedTuple):
    new_kv: NewKV
    depth: Array  # int32 [B, C], recurrences of its tokens
    steps: np.ndarray  # the same on the host, [C]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.new_kv, self.depth)))


class PromptCache:
    """Chunks of `size` tokens, `max_bytes` in all. Those that were not used for longest leave first."""

    def __init__(self, config: ModelConfig, size: int, max_bytes: int):
        self._size, self._max_bytes = size, max_bytes
        self._random = config.loop.start == "noise" or config.test_time_noise > 0
        self._chunks: collections.OrderedDict[bytes, _Chunk] = collections.OrderedDict()  # the latest used last
        self.bytes = 0
        """That are kept."""

    def names(self, prompt: np.ndarray, request: Request) -> list[bytes]:
        """Names of the whole chunks of a prompt, in order. request: one row, as far as it concerns the prompt."""
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
        """Copy the longest known beginning into an empty cache of one prompt.

        cache: donated.

        Returns:
          cache, recurrences of each chunk's tokens.
        """
        known = 0
        while known < len(names) and names[known] in self._chunks:
            known += 1
        self._use(names[:known])
        found = [self._chunks[name] for name in names[:known]]
        for i, chunk in enumerate(found):
            cache = _put(cache, chunk.new_kv, chunk.depth, np.int32(i * self._size))
        return cache, [chunk.steps for chunk in found]

    def keep(self, names: list[bytes], cache: Cache, steps: np.ndarray) -> None:
        """Keep the last of the chunks `names` that a cache of one prompt begins with.

        steps: int32 [size], recurrences of its tokens.
        """
        if not self._max_bytes:
            return
        if names[-1] not in self._chunks:
            new_kv, depth = _take(cache, np.int32((len(names) - 1) * self._size), self._size)
            self._chunks[names[-1]] = chunk = _Chunk(new_kv, depth, steps)
            self.bytes += chunk.bytes
        self._use(names)
        while self.bytes > self._max_bytes:
            self.bytes -= self._chunks.popitem(last=False)[1].bytes

    def _use(self, names: list[bytes]) -> None:
        """Note that these chunks of one prompt are in use, the first as the latest: the others are lost without it."""
        for name in reversed(names):
            if name in self._chunks:
                self._chunks.move_to_end(name)


_take = jax.jit(entries, static_argnames="count")


@functools.partial(jax.jit, donate_argnames="cache")
def _put(cache: Cache, new_kv: NewKV, depth: Int[Array, "B C"], start: Int[Array, ""]) -> Cache:
    rows, count = depth.shape
    return append(cache, new_kv, depth, jnp.int32(cache.sets), start, jnp.full(rows, count, jnp.int32))
