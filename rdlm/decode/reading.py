"""Long prompts, which an engine reads chunk by chunk, each into a cache of its own, between the tokens of others."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.decode.loop import Progress, Sizes, read_chunk
from rdlm.decode.passes import CacheMemory
from rdlm.decode.program import copies_of, devices_of, fetched, host, local_config, program
from rdlm.decode.prompt_cache import PromptCache
from rdlm.decode.requests import Request, RequestOptions, stacked
from rdlm.exits import Depth, ExitRule
from rdlm.model import Params, compute_dtype
from rdlm.model.cache import Cache, allocate, cache_bytes, stored_dtype


@program("config", "sizes", "coda_sets")
def _empty(params: Params, config: ModelConfig, sizes: Sizes, coda_sets: bool) -> Cache:
    """The cache of one prompt, for each copy of the model."""
    return allocate(config, sizes.policy, sizes.sets, 1, sizes.capacity, compute_dtype(params, config), coda_sets)


def usual_chunk(lanes: int) -> int:
    """Tokens of a prompt that take about as long to read as two tokens of every lane."""
    return max(2 * lanes, 32 if jax.default_backend() == "cpu" else 128)


def least_prompt_cache(
    params: Params,
    config: ModelConfig,
    policy: CachePolicy,
    sizes: tuple[int, int],
    chunk: int,
    rule: ExitRule | None,
) -> int:
    """Bytes of the keys and values of a chunk: a prompt cache of fewer would hold nothing.

    Args:
      params, config: the model.
      policy: of the cache, which says its dtype.
      sizes: core sets and positions of a lane.
      chunk: tokens that are read at once.
      rule: of the tokens of prompts.
    """
    sets, capacity = sizes
    return prompt_bytes(params, config, policy, sets, min(chunk, capacity), _has_coda_sets(rule))


def prompt_bytes(
    params: Params, config: ModelConfig, policy: CachePolicy, sets: int, tokens: int, coda_sets: bool
) -> int:
    """Bytes, on all devices, of the keys and values of so many tokens of a prompt."""
    here, dtype = local_config(params, config), stored_dtype(policy, compute_dtype(params, config))
    return devices_of(params) * cache_bytes(here, sets, 1, tokens, dtype, coda_sets)


def _has_coda_sets(rule: ExitRule | None) -> bool:
    """Whether the cache of a prompt that is read in chunks has them."""
    return rule is not None and rule.needs_logits


class Setup(NamedTuple):
    """What all parts of an engine share."""

    params: Params
    config: ModelConfig
    options: RequestOptions
    idle: Request  # one row, for a lane that has no other
    sizes: Sizes


@dataclasses.dataclass
class Reading:
    """A prompt of which a part has been read, in B rows that are the same: one for each copy of the model."""

    prompt: np.ndarray  # int32
    row: Request  # as far as it concerns the tokens of the prompt
    present: Array  # bool [B, V], the tokens of the whole prompt
    cache: Cache  # of this prompt alone
    names: list[bytes]  # of its chunks in the prompt cache
    chunks: list[np.ndarray]  # int32, recurrences of the tokens of each chunk that has been read

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return sum(map(len, self.chunks))


class Reader:
    """Reads prompts.

    Args:
      setup: of the engine.
      chunk: most tokens that are read at once; where chunks would change results, prompts are read at once.
      prompt_cache: bytes of chunks that are kept for later prompts.

    Raises:
      InputError: a prompt cache that would hold nothing.
    """

    def __init__(self, setup: Setup, *, chunk: int, prompt_cache: int):
        params, config, options, idle, sizes = setup
        self._params, self._config, self._sizes, self._options = params, config, sizes, options
        self._depth = self._in_prompt(idle.depth)
        self._coda_sets = _has_coda_sets(self._depth.rule)
        self._copies = copies_of(params)
        self._exact = sizes.policy.recurrences is None and options.prefill_exit != "together"
        self.chunk = chunk if self._exact else sizes.capacity
        """Most tokens that are read at once."""
        if prompt_cache:
            self._check(prompt_cache)
        self.kept = PromptCache(config, self.chunk, prompt_cache)

    def _check(self, prompt_cache: int) -> None:
        if not self._exact:
            raise InputError(
                f"prompt_cache = {prompt_cache}: this engine reads prompts at once; leave out "
                'CachePolicy(recurrences) and prefill_exit="together", or the prompt cache'
            )
        sizes = self._sizes.sets, self._sizes.capacity
        policy, rule = self._sizes.policy, self._depth.rule
        least = least_prompt_cache(self._params, self._config, policy, sizes, self.chunk, rule)
        if prompt_cache < least:
            raise InputError(
                f"prompt_cache = {prompt_cache}: give 0, or at least {least}, the bytes of a chunk of a prompt"
            )

    def _in_prompt(self, depth: Depth) -> Depth:
        """The depth of a prompt's tokens."""
        return depth._replace(rule=None) if self._options.prefill_exit == "never" else depth

    def begin(self, prompt: np.ndarray, request: Request) -> Reading:
        """A prompt, of which what the prompt cache holds has been read.

        Raises:
          InputError: too little memory.
        """
        config, sizes, coda_sets = self._config, self._sizes, self._coda_sets
        where = sizes.sets, sizes.capacity
        memory = CacheMemory(
            self._params, config, 1, self.chunk, where, self._depth, coda_sets=coda_sets, policy=sizes.policy
        )
        memory.require()
        row = request._replace(depth=self._in_prompt(request.depth))
        present = np.zeros((self._copies, config.vocab_size), bool)
        present[:, prompt] = True
        cache = _empty(self._params, config, sizes, coda_sets)
        names = self.kept.names(prompt, row)
        # The last token is always read: what follows depends on its logits.
        cache, chunks = self.kept.fill(cache, names[: (prompt.size - 1) // self.chunk])
        return Reading(prompt, stacked([row] * self._copies), host(present), cache, names, chunks)

    def read(self, reading: Reading) -> Progress | None:
        """Read the next chunk: the token loop after the first new token, once the whole prompt has been read."""
        start = reading.length
        chunk = reading.prompt[start : start + self.chunk]
        tokens = np.zeros((self._copies, self.chunk), np.int32)
        tokens[:, : chunk.size] = chunk
        count = host([chunk.size] * self._copies, np.int32)
        given = host(tokens), count, reading.present, reading.row, self._options.warm_start
        progress, steps = read_chunk(self._params, self._config, reading.cache, *given)
        reading.cache = progress.cache
        steps, failed = fetched((steps, progress.failed))
        reading.chunks.append(steps[0, : chunk.size])
        if failed[0]:
            return progress
        if chunk.size == self.chunk:
            self.kept.keep(reading.names[: len(reading.chunks)], reading.cache, reading.chunks[-1])
        return progress if reading.length == reading.prompt.size else None
