"""generate: prompts in, tokens out, every token with as many recurrences as it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rdlm.config import CachePolicy, InputError, ModelConfig, Parallel, Sampling, Speculative
from rdlm.decode.hosts import require_same
from rdlm.decode.loop import Sizes, begin, decode_tokens
from rdlm.decode.parallel import (
    ONE_SET,
    ParallelUsage,
    advance,
    check_parallel,
    open_window,
    require_progress,
    usage,
    with_rule,
)
from rdlm.decode.passes import CacheMemory, next_power
from rdlm.decode.program import copies_of, fetched, host, on_several_hosts
from rdlm.decode.requests import (
    Constraint,
    Constraints,
    Prompt,
    RequestOptions,
    WarmStart,
    as_requests,
    check_rows,
    not_finite,
    padded,
)
from rdlm.decode.speculative import check_speculation, speculate
from rdlm.exits import Counts, ExitRule
from rdlm.model import Params
from rdlm.model.inputs import check_callable, check_type
from rdlm.runtime import together
from rdlm.runtime.memory import require_memory


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry per prompt (per sample, if several were asked for)."""

    tokens: list[np.ndarray]  # int32 [n], the stop token included
    steps: list[np.ndarray]  # int32 [n], recurrences of the pass whose logits gave each token
    prompt_steps: list[np.ndarray]  # int32, per prompt position
    core_passes: int  # sequential core recurrences of the whole batch, or of the slowest copy of the model
    log_probs: list[np.ndarray]  # f32 [n], ln p of each token by the model: before penalty, temperature and filters
    parallel: ParallelUsage | None = dataclasses.field(default=None, kw_only=True)  # None without `parallel`


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    num_steps: Counts | None = None,
    exit_rule: ExitRule | None = None,
    prefill_exit: str = "per_token",
    min_steps: Counts = 0,
    check_every: int = 1,
    cache: CachePolicy = CachePolicy(),
    sampling: Sampling = Sampling(),
    warm_start: WarmStart = False,
    speculative: Speculative | None = None,
    parallel: Parallel | None = None,
    init_scale: float = 1.0,
    prefix: bool | Sequence[bool] = False,
    key: ArrayLike | None = None,
    samples: int = 1,
    on_token: Callable[[int, int, int], object] | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
) -> Generation:
    """Continue prompts of any lengths (docs/semantics.md, Generate). Tokens and steps do not depend on other prompts.

    One program is compiled per (batch size, length bucket, kind of rule, settings of `speculative` and `parallel`,
    whether there is a `constraint`), none per other value.

    Args:
      params, config: the model.
      prompts: 1-D integer sequences.
      max_new_tokens: maximum per prompt.
      num_steps: recurrences per token (the maximum, with an exit rule): None = config.mean_recurrence, a number,
        or one per prompt.
      exit_rule: lets every token stop on its own; thresholds may be one per prompt.
      prefill_exit: "per_token" (each prompt token on its own), "together" (one exit per prompt, as the reference) or
        "never".
      min_steps, check_every: checks happen after min_steps + 1 recurrences, then every check_every.
      cache: which keys and values are kept and read.
      sampling: how tokens are chosen; default greedy.
      warm_start: start a new token's state from its predecessor's last one, after ln_f ("normalized", as the
        reference's plain decoding) or before ("raw", as its adaptive decoding).
      speculative: None, or Speculative(draft_steps, lookahead, threshold).
      parallel: None, or Parallel(window, inner, ...): refine a window of tokens together (docs/parallel.md). An
        `exit_rule` then also says when a position of the window is done, and the cache keeps one recurrence.
      init_scale: scale of the initial state; 0.0 is the zero state.
      prefix: the tokens of a prompt see each other in both directions; only models with `prefix_attention`.
      key: one key for all prompts (equal prompts, equal samples) or one per prompt.
      samples: continuations of each prompt, with different randomness; those of a prompt follow each other in all
        results, and the first is the one of samples=1.
      on_token: called with (prompt index, token, recurrences) as tokens are made; a true result ends that prompt.
      constraint: says which tokens may come next, as in `Engine.submit`; for several prompts or samples a list with one
        or None for each.

    Raises:
      InputError (a ValueError): empty prompts, ids out of range, too long, a depth below 1, sampling without a key, or
        logits that are not finite (`rdlm.Engine` ends the request concerned and serves the others).
    """
    options = RequestOptions(
        num_steps, exit_rule, prefill_exit, min_steps, check_every, sampling, warm_start, init_scale, key, prefix
    )
    check_type("config", config, ModelConfig)
    check_type("cache", cache, CachePolicy)
    check_callable("on_token", on_token)
    for name, other in (("speculative", speculative), ("parallel", parallel)):
        if constraint is not None and other is not None:
            raise InputError(f"constraint: cannot be combined with {name}; leave one of them out")
    options = dataclasses.replace(options, any_shape=constraint is not None)
    if parallel is not None:
        check_type("parallel", parallel, Parallel)
        if speculative is not None:
            raise InputError("parallel: cannot be combined with speculative; leave one of them out")
        options = with_rule(config, parallel, options)
    asked = functools.partial(as_requests, config, prompts, max_new_tokens, options, samples)
    request, rows = together(asked) if on_several_hosts(params) else asked()
    tokens, lengths = padded(rows, config.max_length)
    if on_several_hosts(params):
        ways = {"config": config, "cache": cache, "prefill_exit": prefill_exit, "warm_start": warm_start}
        ways |= {"speculative": speculative, "parallel": parallel}
        asks = {"on_token": on_token is not None, "constraint": constraint is not None}
        given = {"prompts": (tokens, lengths), "max_new_tokens": int(max_new_tokens), "options": request}
        require_same(given | asks | {name: repr(way) for name, way in ways.items()})
    # Every copy of the model has as many rows; those that fill up are like the first, and done.
    real, copies = len(rows), copies_of(params)
    each = np.concatenate([np.arange(real), np.zeros(-real % copies, int)])
    if copies > 1:
        check_rows(request.depth, real)
    if len(each) > real:
        request, tokens, lengths = jax.tree.map(lambda x: x[each], request), tokens[each], [lengths[i] for i in each]
    max_steps, lookahead, width = request.depth.num_steps, 0, tokens.shape[1]
    max_new_tokens = int(max_new_tokens)
    if speculative is not None:
        check_type("speculative", speculative, Speculative)
        check_speculation(speculative, cache, options, np.asarray(max_steps))
        lookahead = speculative.lookahead
    if parallel is not None:
        check_parallel(config, parallel, cache, options, np.asarray(max_steps))
        cache = dataclasses.replace(ONE_SET, dtype=cache.dtype)
        lookahead, width = parallel.window, max(width, parallel.window)
        parallel = dataclasses.replace(parallel, rule=None, threshold=None)  # in the request: they compile nothing
    fewest = 1 if config.mean_recurrence == 1 else 8  # a plain model never asks for more
    sizes = Sizes(
        cache,
        cache.sets(next_power(int(np.max(max_steps)), fewest)),
        next_power(int(max(lengths) + max_new_tokens + lookahead), 64),
        next_power(int(max_new_tokens), 16),
    )
    kept, all_logits = (sizes.sets, sizes.capacity), parallel is not None
    batch = len(each) // copies
    memory = CacheMemory(params, config, batch, width, kept, request.depth, all_logits, policy=cache)
    if parallel is None:
        memory.require()
    else:
        require_memory(
            f"Parallel.window = {parallel.window}, for {len(rows)} prompts and a cache of {sizes.capacity} positions",
            memory.bytes,
            "use a smaller window, make fewer new tokens, or give fewer or shorter prompts",
            hosts=on_several_hosts(params),
        )
    constraints = None if constraint is None else Constraints(constraint, real, options)
    if constraints is not None:
        request = constraints.restrict(request, range(real), config.vocab_size)
    request = jax.device_put(request)  # once for all calls
    progress, prompt_steps = begin(
        params, config, host(tokens), host(lengths, np.int32), request, sizes, options.prefill_exit, warm_start
    )
    if len(each) > real:
        progress = progress._replace(done=jnp.asarray(fetched(progress.done) | (np.arange(len(each)) >= real)))
    wave = None if parallel is None else open_window(params, config, progress, request, parallel)
    max_tokens, shown, most = jnp.int32(max_new_tokens), np.zeros(len(each), int), np.full(len(each), max_new_tokens)
    at_once = on_token is None and constraints is None
    while True:
        # One call makes everything, unless somebody asks before each token: then it makes that of the slowest row.
        behind = shown[~fetched(progress.done)]
        limit = max_tokens if at_once else jnp.int32(min(behind, default=0) + 1)
        if parallel is not None and wave is not None:
            wave = advance(
                params, config, wave._replace(progress=progress), request, limit, max_tokens, parallel, warm_start
            )
            require_progress(wave, parallel)
            progress = wave.progress
        elif speculative is None:
            progress = decode_tokens(params, config, progress, request, limit, max_tokens, warm_start)
        else:
            progress = speculate(params, config, progress, request, limit, max_tokens, speculative)
        count, made, steps = fetched((progress.count, progress.tokens, progress.steps))
        if at_once:
            break
        count = np.minimum(count, most)
        for b in range(real):
            for j in range(shown[b], count[b]):
                if on_token is not None and on_token(b, int(made[b, j]), int(steps[b, j])):
                    most[b] = count[b] = j + 1
                    break
        shown = count
        ended = fetched(progress.done) | (count >= most)
        progress = progress._replace(done=jnp.asarray(ended))
        if ended.all():
            break
        if constraints is not None:
            latest = {int(b): int(made[b, count[b] - 1]) for b in np.flatnonzero(~ended)}
            request = jax.device_put(constraints.follow(request, latest, config.vocab_size))
    for row in np.flatnonzero(fetched(progress.failed)[:real]):
        raise not_finite(f"prompts[{row}]", int(count[row]))

    def rows_of(table: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(table[:real], sizes, strict=True)]

    count = count[:real]
    read, passes, log_probs = fetched((prompt_steps, progress.passes, progress.log_probs))
    return Generation(
        rows_of(made, count),
        rows_of(steps, count),
        rows_of(read, lengths[:real]),
        int(np.max(passes)),
        rows_of(log_probs, count),
        parallel=None if wave is None else usage(wave.window, count),
    )
