"""generate: prompts in, tokens out, every token with as many recurrences as it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rdlm.config import CachePolicy, ModelConfig, Sampling, Speculative
from rdlm.decode.loop import WarmStart, begin, decode_tokens
from rdlm.decode.passes import next_power
from rdlm.decode.requests import as_requests, padded
from rdlm.decode.speculative import check_speculation, speculate
from rdlm.exits import ExitRule
from rdlm.model import Params


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
    warm_start: WarmStart = False,
    speculative: Speculative | None = None,
    init_scale: float = 1.0,
    key: ArrayLike | None = None,
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
    request, rows = as_requests(
        config, prompts, max_new_tokens, num_steps=num_steps, exit_rule=exit_rule, prefill_exit=prefill_exit,
        min_steps=min_steps, check_every=check_every, sampling=sampling, warm_start=warm_start, init_scale=init_scale,
        key=key,
    )  # fmt: skip
    tokens, lengths = padded(rows, config.max_length)
    B, lookahead = len(rows), 0
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
