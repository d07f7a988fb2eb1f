"""Self-speculation: the same model drafts with few recurrences, and verifies from where the drafts stopped.

A drafted token's state after draft_steps recurrences is exactly the state that full-depth decoding passes through, as
long as every recurrence keeps its own keys and values: set i of a token depends on recurrences up to i alone. So
verification runs only the remaining recurrences, on all drafts in parallel, and greedy output equals plain decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int, Int32

from rdlm.config import CachePolicy, InputError, ModelConfig, Speculative
from rdlm.decode.loop import Progress, token_keys
from rdlm.decode.passes import run_pass
from rdlm.decode.requests import Request
from rdlm.decode.sampling import known_only, penalise, probabilities, stops
from rdlm.exits import ExitRule
from rdlm.model import Params
from rdlm.model.cache import Cache, KeyValue


def check_speculation(
    speculative: Speculative, policy: CachePolicy, num_steps: Any, rule: ExitRule | None, warm_start: Any
) -> None:
    """Refuse what speculation cannot do exactly.

    Raises:
      InputError: a cache that forgets recurrences, an exit rule, a warm start, or drafts deeper than num_steps.
    """
    most = int(np.max(np.asarray(num_steps)))
    if policy.recurrences is not None and policy.recurrences < most:
        raise InputError(
            f"speculative: needs every recurrence's keys and values; CachePolicy.recurrences = {policy.recurrences} "
            f"keeps fewer than num_steps = {most} (use None)"
        )
    if rule is not None:
        raise InputError("speculative: cannot be combined with exit_rule; drafts already take fewer recurrences")
    if warm_start:
        raise InputError("speculative: cannot be combined with warm_start; drafts start before their predecessor ends")
    if speculative.draft_steps > int(np.min(np.asarray(num_steps))):
        raise InputError(
            f"Speculative.draft_steps = {speculative.draft_steps}: must be at most num_steps = "
            f"{int(np.min(np.asarray(num_steps)))}"
        )


@functools.partial(jax.jit, static_argnames=("config", "speculative"), donate_argnames="progress")
def speculate(
    params: Params,
    config: ModelConfig,
    progress: Progress,
    request: Request,
    limit: Int[Array, ""],
    most: Int[Array, ""],
    speculative: Speculative,
) -> Progress:
    """Rounds of drafting and verifying until every row is done or has at least `limit` tokens, never over `most`."""

    def go_on(p: Progress) -> Array:
        return jnp.any(~p.done & (p.count < limit))

    return lax.while_loop(go_on, lambda p: _round(params, config, p, request, most, speculative), progress)


def _round(
    params: Params, config: ModelConfig, p: Progress, request: Request, most: Array, spec: Speculative
) -> Progress:
    B, L, V = p.token.shape[0], spec.lookahead, config.rows
    rows, s, start = jnp.arange(B), request.sampling, p.cache.length
    # Randomness and depth are those of plain decoding's token `count + j`.
    options: dict[str, Any] = {"key": request.keys, "init_scale": request.init_scale}

    def draft(carry: tuple[Cache, Array, Array, Array], j: Array):
        cache, token, present, passes = carry
        done, cache = run_pass(
            params, config, cache, token[:, None], jnp.where(p.done, 0, 1), first=False,
            num_steps=jnp.int32(spec.draft_steps), **options,
        )  # fmt: skip
        q = _distribution(known_only(done.logits[:, 0], config.vocab_size), present, request)
        keys = jax.vmap(jax.random.fold_in, (0, None))(token_keys(request, p.count + j), 1)
        drafted = _draw(q, request, keys)
        return (cache, drafted, present.at[rows, drafted].set(True), passes + done.ran), (
            token, drafted, present, q, done.state[:, 0],
        )  # fmt: skip

    (cache, _, _, passes), (inputs, drafts, presents, q, states) = lax.scan(
        draft, (p.cache, p.token, p.present, p.passes), jnp.arange(L)
    )
    inputs, drafts, states = (x.swapaxes(0, 1) for x in (inputs, drafts, states))  # [B, L, ...]
    # The drafts' own keys and values, read back from where they were appended; then the cache forgets them.
    where = start[:, None] + jnp.arange(L)[None]
    widths = config.key_value_widths
    core = tuple(
        KeyValue(*(x[:, rows[:, None], where, :width] for x, width in zip(layer, widths, strict=True)))
        for layer in cache.core
    )
    cache = _rewind(cache, start)
    checked, cache = run_pass(
        params, config, cache, inputs, jnp.where(p.done, 0, L), first=False, state=states,
        num_steps=request.num_steps, resume=(jnp.int32(spec.draft_steps), core), **options,
    )  # fmt: skip
    logits = known_only(checked.logits, config.vocab_size)  # [B, L, V]
    each = jax.vmap(lambda x, seen: _distribution(x, seen, request), in_axes=(1, 0), out_axes=1)
    target = each(logits, presents)
    q = q.swapaxes(0, 1)
    at = lambda x: jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
    accepted, replacement = _accept(target, q, at, logits, request, p.count, spec, drafts)
    matched = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1)  # drafts kept, [B]
    index = jnp.arange(L)[None]
    made = jnp.where(index < matched[:, None], drafts, replacement)
    keep = jnp.minimum(matched + 1, L)  # tokens this round could emit
    keep = jnp.minimum(keep, most - p.count)
    stopping = jax.vmap(lambda t: stops(t, s), in_axes=1, out_axes=1)(made) & (index < keep[:, None])
    first_stop = jnp.where(stopping.any(1), jnp.argmax(stopping, axis=1) + 1, L + 1)
    keep = jnp.where(p.done, 0, jnp.minimum(keep, first_stop))
    slots = jnp.where(index < keep[:, None], p.count[:, None] + index, p.tokens.shape[1])
    seen = jnp.where(index < keep[:, None], made, V)
    last = jnp.take_along_axis(made, jnp.maximum(keep - 1, 0)[:, None], axis=1)[:, 0]
    count = p.count + keep
    return p._replace(
        cache=_rewind(cache, start + keep),
        token=jnp.where(keep > 0, last, p.token),
        tokens=p.tokens.at[rows[:, None], slots].set(made, mode="drop"),
        steps=p.steps.at[rows[:, None], slots].set(checked.steps, mode="drop"),
        count=count,
        present=p.present.at[rows[:, None], seen].set(True, mode="drop"),
        done=p.done | stopping.any(1) | (count >= most),
        passes=passes + checked.ran - spec.draft_steps,
    )


def _accept(
    target: Float32[Array, "B L V"],
    q: Float32[Array, "B L V"],
    at: Callable[[Array], Array],
    logits: Float[Array, "B L V"],
    request: Request,
    count: Int[Array, "B"],
    spec: Speculative,
    drafts: Int[Array, "B L"],
) -> tuple[Bool[Array, "B L"], Int32[Array, "B L"]]:
    """(Accepted?, what to say instead at the first refusal).

    Greedy rows: the draft is the argmax (or likely enough, below threshold 1). Sampled rows: with probability
    min(1, p/q), and otherwise a draw from max(p - q, 0) renormalised, which preserves the distribution p exactly.
    """
    L = drafts.shape[1]
    greedy = (request.sampling.temperature == 0)[:, None]
    best = jnp.argmax(target, axis=-1)  # greedy rows' target is one-hot
    good = drafts == best
    if spec.threshold < 1:
        raw = jax.nn.softmax(logits, axis=-1)
        good = good | (at(raw) >= spec.threshold * raw.max(-1))
    keys = jax.vmap(lambda j: token_keys(request, count + j), out_axes=1)(jnp.arange(L))  # [B, L]
    chance = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2))))(keys)
    lucky = chance * at(q) < at(target)
    rest = jnp.maximum(target - q, 0)
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, target)
    redrawn = jax.vmap(jax.vmap(lambda k, w: jax.random.categorical(jax.random.fold_in(k, 3), jnp.log(w))))(keys, rest)
    return jnp.where(greedy, good, lucky), jnp.where(greedy, best, redrawn).astype(jnp.int32)


def _distribution(logits: Float[Array, "B V"], present: Bool[Array, "B V"], request: Request) -> Float32[Array, "B V"]:
    """What a token is drawn from; one-hot at the argmax for greedy rows."""
    s = request.sampling
    best = jnp.argmax(penalise(logits, present, s.repetition_penalty), axis=-1)
    hot = jax.nn.one_hot(best, logits.shape[-1])
    return jnp.where((s.temperature > 0)[:, None], probabilities(logits, present, s), hot)


def _draw(q: Array, request: Request, keys: Array) -> Array:
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.log(q))
    return jnp.where(request.sampling.temperature > 0, drawn, jnp.argmax(q, axis=-1)).astype(jnp.int32)


def _rewind(cache: Cache, length: Array) -> Cache:
    return dataclasses.replace(cache, length=length)
