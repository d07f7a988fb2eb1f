"""What a batch of prompts asks for: checked, and spread over rows as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int32

from rdlm.config import InputError, ModelConfig, Sampling
from rdlm.decode.passes import PREFILL_EXITS, next_power
from rdlm.decode.sampling import SamplingArrays, as_arrays, per_row
from rdlm.exits import ExitRule
from rdlm.model import check_depth, check_ids, check_rule, typed_key


class Request(NamedTuple):
    """What a batch of prompts asks for, as arrays: no value recompiles. Shapes [B]."""

    num_steps: Array
    min_steps: Array
    check_every: Array
    init_scale: Array
    keys: Array
    sampling: SamplingArrays
    rule: ExitRule | None


def as_requests(
    config: ModelConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    num_steps: Any = None,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Any = 0,
    check_every: int = 1,
    sampling: Sampling = Sampling(),
    warm_start: Any = False,
    init_scale: float = 1.0,
    key: ArrayLike | None = None,
) -> tuple[Request, list[Int32[np.ndarray, "_"]]]:
    """Refuse what cannot be served, in one line that names the request; spread the rest over rows.

    Arguments as in `rdlm.generate`. Returns (request of len(prompts) rows, the prompts).

    Raises:
      InputError: see `rdlm.generate`.
    """
    if len(prompts) == 0:
        raise InputError("prompts: at least one is needed")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    rows = [_ids(p, i) for i, p in enumerate(prompts)]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise InputError(f"prompts[{i}]: must be a non-empty 1-D sequence of token ids, got shape {row.shape}")
        if not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompts[{i}]: token ids must be integers, got {row.dtype}")
        check_ids(f"prompts[{i}]", row, config)
        if row.size + max_new_tokens > config.max_length:
            raise InputError(
                f"prompts[{i}]: {row.size} tokens + max_new_tokens = {max_new_tokens} exceed "
                f"config.max_length = {config.max_length}"
            )
    if prefill_exit not in PREFILL_EXITS:
        raise InputError(f"prefill_exit = {prefill_exit!r}: must be one of {', '.join(PREFILL_EXITS)}")
    if warm_start not in (False, "normalized", "raw"):
        raise InputError(f"warm_start = {warm_start!r}: must be False, 'normalized' or 'raw'")
    check_rule(exit_rule, len(rows), min_steps, check_every)
    B = len(rows)
    depth = per_row(config.mean_recurrence if num_steps is None else num_steps, B, "num_steps", np.int32)
    check_depth(depth)
    least = per_row(min_steps, B, "min_steps", np.int32)
    arrays = as_arrays(sampling, B)
    if key is None and np.any(np.asarray(arrays.temperature) > 0):
        raise InputError("Sampling.temperature > 0 needs key=jax.random.key(seed)")
    keys = typed_key(key)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != B):
        raise InputError(f"key: expected one key or {B}, got shape {keys.shape}")
    # Thresholds (and weights) always have a row each, so that one for all and one per prompt share a compiled program.
    rule = None if exit_rule is None else exit_rule.by_row(B)
    request = Request(
        jnp.asarray(depth), jnp.asarray(least), jnp.full(B, check_every, jnp.int32),
        jnp.full(B, init_scale, jnp.float32),
        jnp.broadcast_to(keys, (B,)), arrays, rule,
    )  # fmt: skip
    return request, [row.astype(np.int32) for row in rows]


def _ids(prompt: Any, i: int) -> np.ndarray:
    try:
        return np.asarray(prompt)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"prompts[{i}]: must be a non-empty 1-D sequence of token ids, not nested lists") from error


def padded(rows: Sequence[Int32[np.ndarray, "_"]], most: int) -> tuple[Int32[np.ndarray, "{len(rows)} L"], list[int]]:
    """Prompts as one array, padded on the right to a length that many batches share, and their lengths."""
    lengths = [row.size for row in rows]
    tokens = np.zeros((len(rows), min(next_power(max(lengths), 16), most)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths
