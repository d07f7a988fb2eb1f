"""Options of a batch of prompts: checked, and spread over rows as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int32

from rdlm.config import InputError, ModelConfig, Sampling
from rdlm.decode.passes import check_prefill_exit, next_power
from rdlm.decode.sampling import SamplingArrays, as_arrays, per_row
from rdlm.exits import Counts, Depth, ExitRule
from rdlm.model import check_depth, check_ids, check_rule, typed_key

Prompt = Sequence[int] | np.ndarray
WarmStart = Literal[False, "normalized", "raw"]
"""From where a token's state starts, if not from noise: its predecessor's last one, after ln_f or before."""


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """How `generate` and the engine serve requests; the fields are arguments of `rdlm.generate`."""

    num_steps: Counts | None = None
    exit_rule: ExitRule | None = None
    prefill_exit: str = "per_token"
    min_steps: Counts = 0
    check_every: int = 1
    sampling: Sampling = Sampling()
    warm_start: WarmStart = False
    init_scale: float = 1.0
    key: ArrayLike | None = None


class Request(NamedTuple):
    """Options of a batch of prompts, as arrays with one row per prompt: no value recompiles."""

    depth: Depth  # of every token
    init_scale: Array  # f32 [B]
    keys: Array  # [B]
    sampling: SamplingArrays


def as_requests(
    config: ModelConfig, prompts: Sequence[Prompt], max_new_tokens: int, options: RequestOptions = RequestOptions()
) -> tuple[Request, list[Int32[np.ndarray, "_"]]]:
    """Check everything, with messages that name the prompt: (request of len(prompts) rows, the prompts).

    Raises:
      InputError: see `rdlm.generate`.
    """
    if len(prompts) == 0:
        raise InputError("prompts: at least one is needed")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    rows = [_ids(config, prompt, f"prompts[{i}]", max_new_tokens) for i, prompt in enumerate(prompts)]
    check_prefill_exit(options.prefill_exit)
    if options.warm_start not in (False, "normalized", "raw"):
        raise InputError(f"warm_start = {options.warm_start!r}: must be False, 'normalized' or 'raw'")
    B, rule = len(rows), options.exit_rule
    check_rule(rule, B, options.min_steps, options.check_every)
    num_steps = config.mean_recurrence if options.num_steps is None else options.num_steps
    num_steps = per_row(num_steps, B, "num_steps", np.int32)
    check_depth(num_steps)
    min_steps = per_row(options.min_steps, B, "min_steps", np.int32)
    sampling = as_arrays(options.sampling, B)
    if options.key is None and np.any(np.asarray(sampling.temperature) > 0):
        raise InputError("Sampling.temperature > 0 needs key=jax.random.key(seed)")
    keys = typed_key(options.key)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != B):
        raise InputError(f"key: expected one key or {B}, got shape {keys.shape}")
    depth = Depth(
        jnp.asarray(num_steps),
        # Thresholds always have a row each, so that one for all and one per prompt share a compiled program.
        None if rule is None else rule.by_row(B),
        jnp.asarray(min_steps),
        jnp.full(B, options.check_every, jnp.int32),
    )
    scale = jnp.full(B, options.init_scale, jnp.float32)
    return Request(depth, scale, jnp.broadcast_to(keys, (B,)), sampling), rows


def _ids(config: ModelConfig, prompt: Prompt, name: str, max_new_tokens: int) -> Int32[np.ndarray, "_"]:
    try:
        row = np.asarray(prompt)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"{name}: must be a non-empty 1-D sequence of token ids, not nested lists") from error
    if row.ndim != 1 or row.size == 0:
        raise InputError(f"{name}: must be a non-empty 1-D sequence of token ids, got shape {row.shape}")
    if not np.issubdtype(row.dtype, np.integer):
        raise InputError(f"{name}: token ids must be integers, got {row.dtype}")
    check_ids(name, row, config)
    if row.size + max_new_tokens > config.max_length:
        raise InputError(
            f"{name}: {row.size} tokens + max_new_tokens = {max_new_tokens} exceed "
            f"config.max_length = {config.max_length}"
        )
    return row.astype(np.int32)


def not_finite(name: str, made: int) -> InputError:
    """For a request that has no next token, after `made`: its logits are NaN or infinite."""
    return InputError(
        f"{name}: the logits of new token {made + 1} are not finite; either weights are NaN or infinite, or sums "
        "overflow: try rdlm.cast(params, 'float32')"
    )


def padded(
    rows: Sequence[Int32[np.ndarray, "_"]], max_length: int
) -> tuple[Int32[np.ndarray, "{len(rows)} L"], list[int]]:
    """Prompts as one array, padded on the right to a length that many batches share, and their lengths."""
    lengths = [row.size for row in rows]
    tokens = np.zeros((len(rows), min(next_power(max(lengths), 16), max_length)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths
