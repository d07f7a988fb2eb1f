"""generate: prompts in, tokens out, every token with as many recurrences as it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import CachePolicy, InputError, ModelConfig, Sampling, Speculative
from rdlm.decode.loop import Request, begin, decode_tokens
from rdlm.decode.passes import PREFILL_EXITS, next_power
from rdlm.decode.sampling import as_arrays, per_row
from rdlm.decode.speculative import check_speculation, speculate
from rdlm.exits import ExitRule
from rdlm.model import Params, check_depth, check_rule, typed_key


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: np.int32 [n] per prompt, the stop token included. steps: np.int32 [n], recurrences of the pass whose logits
    gave each token. prompt_steps: np.int32 per prompt position. core_passes: sequential core iterations spent.
    """

    tokens: list[np.ndarray]
    steps: list[np.ndarray]
    prompt_steps: list[np.ndarray]
    core_passes: int


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    num_steps: Any = None,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Any = 0,
    check_every: int = 1,
    cache: CachePolicy = CachePolicy(),
    sampling: Sampling = Sampling(),
    warm_start: Literal[False, "normalized", "raw"] = False,
    speculative: Speculative | None = None,
    init_scale: float = 1.0,
    key: Array | None = None,
    on_token: Callable[[int, int, int], None] | None = None,
) -> Generation:
    """Continue prompts of any lengths (contract, "Generate"). A request's tokens and steps do not depend on its batch.

    One program is compiled per (batch size, length bucket, kind of rule), none per value.

    Args:
      params, config: the model.
      prompts: 1-D integer sequences.
      max_new_tokens: most tokens to make per prompt.
      num_steps: recurrences per token (the most of them, with an exit rule): None = config.mean_recurrence, a number,
        or one per prompt.
      exit_rule: lets every token stop on its own; thresholds may be one per prompt.
      prefill_exit: "per_token" (each prompt token on its own), "together" (one exit per prompt, as the reference) or
        "never".
      min_steps, check_every: the rule is asked after min_steps + 1 recurrences, then every check_every.
      cache: which keys and values are kept and read.
      sampling: how tokens are chosen; default greedy.
      warm_start: start a new token's state from its predecessor's last one, after ln_f ("normalized", as the
        reference's plain decoding) or before ("raw", as its adaptive decoding).
      speculative: None, or Speculative(draft_steps, lookahead, threshold).
      init_scale: scale of the initial state; 0.0 is the zero state.
      key: one key for all prompts (equal prompts, equal samples) or one per prompt.
      on_token: called with (prompt index, token, recurrences) as tokens are made.

    Raises:
      InputError (a ValueError): empty prompts, ids out of range, too long, a depth below 1, sampling without a key.
    """
    request, tokens, lengths = _check(
        config, prompts, max_new_tokens, num_steps, exit_rule, prefill_exit, min_steps, check_every, sampling,
        warm_start, init_scale, key,
    )  # fmt: skip
    B, lookahead = len(prompts), 0
    if speculative is not None:
        check_speculation(speculative, cache, request.num_steps, exit_rule, warm_start)
        lookahead = speculative.lookahead
    room = next_power(int(max_new_tokens), 16)
    capacity = next_power(int(max(lengths) + max_new_tokens + lookahead), 64)
    sets = cache.sets(next_power(int(np.max(request.num_steps))))
    progress, prompt_steps = begin(
        params, config, jnp.asarray(tokens), jnp.asarray(lengths), request, cache, sets, capacity, room,
        prefill_exit, warm_start,
    )  # fmt: skip
    most, shown = jnp.int32(max_new_tokens), np.zeros(B, int)
    while True:
        # Without a listener one call makes everything; with one, each call makes the next token of the slowest row.
        waiting = shown[~np.asarray(progress.done)]
        limit = most if on_token is None else jnp.int32(min(waiting, default=0) + 1)
        if speculative is None:
            progress = decode_tokens(params, config, progress, request, limit, most, warm_start)
        else:
            progress = speculate(params, config, progress, request, limit, most, speculative)
        if on_token is None:
            break
        made, now, depth = (np.asarray(x) for x in (progress.count, progress.tokens, progress.steps))
        for b in range(B):
            for j in range(shown[b], made[b]):
                on_token(b, int(now[b, j]), int(depth[b, j]))
        shown = made
        if np.all(np.asarray(progress.done) | (made >= max_new_tokens)):
            break
    made, now, depth, prompt_depth = (
        np.asarray(x) for x in (progress.count, progress.tokens, progress.steps, prompt_steps)
    )
    return Generation(
        [now[b, : made[b]] for b in range(B)],
        [depth[b, : made[b]] for b in range(B)],
        [prompt_depth[b, : lengths[b]] for b in range(B)],
        int(progress.passes),
    )


def _check(
    config, prompts, max_new_tokens, num_steps, rule, prefill_exit, min_steps, check_every, sampling, warm_start,
    init_scale, key,
):  # fmt: skip
    """Refuse what cannot be served, one line per request; spread the rest over rows."""
    if len(prompts) == 0:
        raise InputError("prompts: at least one is needed")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    rows = [np.asarray(p) for p in prompts]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise InputError(f"prompts[{i}]: must be a non-empty 1-D sequence of token ids, got shape {row.shape}")
        if not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompts[{i}]: token ids must be integers, got {row.dtype}")
        if row.min() < 0 or row.max() >= config.rows:
            raise InputError(f"prompts[{i}]: ids must be in [0, {config.rows}), found {row.min()} .. {row.max()}")
        if row.size + max_new_tokens > config.max_length:
            raise InputError(
                f"prompts[{i}]: {row.size} tokens + max_new_tokens = {max_new_tokens} exceed "
                f"config.max_length = {config.max_length}"
            )
    if prefill_exit not in PREFILL_EXITS:
        raise InputError(f"prefill_exit = {prefill_exit!r}: must be one of {', '.join(PREFILL_EXITS)}")
    if warm_start not in (False, "normalized", "raw"):
        raise InputError(f"warm_start = {warm_start!r}: must be False, 'normalized' or 'raw'")
    check_rule(rule, len(rows), min_steps, check_every)
    B = len(rows)
    depth = per_row(config.mean_recurrence if num_steps is None else num_steps, B, "num_steps", np.int32)
    check_depth(depth)
    least = per_row(min_steps, B, "min_steps", np.int32)
    if np.any(least < 0):
        raise InputError(f"min_steps = {min_steps!r}: must not be negative")
    arrays = as_arrays(sampling, B)
    if key is None and np.any(np.asarray(arrays.temperature) > 0):
        raise InputError("Sampling.temperature > 0 needs key=jax.random.key(seed)")
    keys = typed_key(key)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != B):
        raise InputError(f"key: expected one key or {B}, got shape {keys.shape}")
    if rule is not None and np.ndim(rule.threshold) == 0:
        rule = dataclasses.replace(rule, threshold=np.float32(rule.threshold))
    request = Request(
        jnp.asarray(depth), jnp.asarray(least), jnp.int32(check_every), jnp.float32(init_scale),
        jnp.broadcast_to(keys, (B,)), arrays, rule,
    )  # fmt: skip
    lengths = [row.size for row in rows]
    width = min(next_power(max(lengths), 16), config.max_length)
    tokens = np.zeros((B, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return request, tokens, lengths
