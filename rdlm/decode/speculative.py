"""Self-speculation: the same model drafts with few recurrences, and verifies from where the drafts stopped.

A drafted token's state after draft_steps recurrences is exactly the state that full-depth decoding passes through, as
long as every recurrence keeps its own keys and values: set i of a token depends on recurrences up to i alone. So
verification runs only the remaining recurrences, on all drafts in parallel, and greedy output equals plain decoding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int, Int32

from rdlm.config import CachePolicy, InputError, ModelConfig, Speculative
from rdlm.decode.loop import Made, Progress, extend, request_start, token_keys, until
from rdlm.decode.passes import continuation, run_pass
from rdlm.decode.program import program
from rdlm.decode.requests import Request, RequestOptions, check_unadjusted
from rdlm.decode.sampling import finite, penalise, probabilities
from rdlm.exits import Depth
from rdlm.model import Params, known
from rdlm.model.cache import Cache, KeyValue, row_widths
from rdlm.model.network import Layers


def check_speculation(
    speculative: Speculative, policy: CachePolicy, options: RequestOptions, num_steps: np.ndarray
) -> None:
    """Refuse what speculation cannot do exactly.

    Raises:
      InputError: a cache that forgets recurrences, an exit rule, a warm start, or drafts deeper than num_steps.
    """
    min_steps, max_steps = int(np.min(num_steps)), int(np.max(num_steps))
    if policy.recurrences is not None and policy.recurrences < max_steps:
        raise InputError(
            f"speculative: needs every recurrence's keys and values; CachePolicy.recurrences = {policy.recurrences} "
            f"keeps fewer than num_steps = {max_steps} (use None)"
        )
    if options.exit_rule is not None:
        raise InputError("speculative: cannot be combined with exit_rule; drafts already take fewer recurrences")
    if options.warm_start:
        raise InputError("speculative: cannot be combined with warm_start; drafts start before their predecessor ends")
    check_unadjusted("speculative", options.sampling)
    if speculative.draft_steps > min_steps:
        raise InputError(
            f"Speculative.draft_steps = {speculative.draft_steps}: must be at most num_steps = {min_steps}"
        )


@program("config", "speculative", donate="progress")
def speculate(
    params: Params,
    config: ModelConfig,
    progress: Progress,
    request: Request,
    limit: Int[Array, ""],
    max_tokens: Int[Array, ""],
    speculative: Speculative,
) -> Progress:
    """Draft and verify until every row is done or has at least `limit` tokens, never over `max_tokens`."""

    def one(p: Progress) -> Progress:
        # Drafts and verification use the randomness and depth of plain decoding's token `count + j`.
        drafts = _draft(params, config, p, request, speculative)
        return _verify(params, config, p, request, max_tokens, speculative, drafts)

    return until(limit, one, progress)


class _Drafts(NamedTuple):
    """L drafted tokens per row."""

    inputs: Array  # int32 [B, L], the tokens they follow
    tokens: Array  # int32 [B, L]
    present: Array  # bool [L, B, V], tokens seen before each
    q: Array  # f32 [B, L, V], the distributions they were drawn from
    states: Array  # [B, L, D], after draft_steps recurrences
    core_kv: Layers  # [S, B, L, .] per core layer: keys and values of those recurrences
    cache: Cache  # with the drafts appended
    passes: Array  # int32 [1]


def _draft(params: Params, config: ModelConfig, p: Progress, request: Request, spec: Speculative) -> _Drafts:
    rows, depth = jnp.arange(len(p.token)), Depth(jnp.int32(spec.draft_steps))

    def one(carry: tuple[Cache, Array, Array, Array], j: Array):
        cache, token, present, passes = carry
        text = continuation(config, cache, token[:, None], jnp.where(p.done, 0, 1))
        done, cache = run_pass(params, config, text, request_start(params, config, text, request), depth, cache)
        logits = known(config, done.logits[:, 0])
        logits = jnp.where(finite(logits)[:, None], logits, 0.0)  # any draft will do: it is verified
        q = _distribution(logits, present, request)
        keys = jax.vmap(jax.random.fold_in, (0, None))(token_keys(request, p.count + j), 1)
        drafted = _draw(q, request, keys)
        seen = present.at[rows, drafted].set(True)
        return (cache, drafted, seen, passes + done.ran), (token, drafted, present, q, done.state[:, 0])

    carry = p.cache, p.token, p.present, p.passes
    (cache, _, _, passes), (inputs, drafts, present, q, states) = lax.scan(one, carry, jnp.arange(spec.lookahead))
    inputs, drafts, q, states = (x.swapaxes(0, 1) for x in (inputs, drafts, q, states))  # [B, L, ...]
    # The drafts' own keys and values, read back from where they were appended.
    where = p.cache.length[:, None] + jnp.arange(spec.lookahead)[None]
    widths = row_widths(config, cache.core[0].k.dtype)
    core_kv = tuple(
        KeyValue(*(x[:, rows[:, None], where, :w] for x, w in zip(layer, widths, strict=True))) for layer in cache.core
    )
    return _Drafts(inputs, drafts, present, q, states, core_kv, cache, passes)


def _verify(
    params: Params,
    config: ModelConfig,
    p: Progress,
    request: Request,
    max_tokens: Array,
    spec: Speculative,
    drafts: _Drafts,
) -> Progress:
    """Run the remaining recurrences of all drafts in parallel, and keep those up to the first refusal."""
    L, start = spec.lookahead, p.cache.length
    cache = _rewind(drafts.cache, start)
    text = continuation(config, cache, drafts.inputs, jnp.where(p.done, 0, L))
    resumed = request_start(params, config, text, request, drafts.states)
    resumed = resumed._replace(ran=jnp.int32(spec.draft_steps), core_kv=drafts.core_kv)
    checked, cache = run_pass(params, config, text, resumed, Depth(request.depth.num_steps), cache)
    logits = known(config, checked.logits)  # [B, L, V]
    accepted, replacement = _accept(logits, drafts, request, p.count, spec)
    matched = jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(1)  # drafts kept, [B]
    index = jnp.arange(L)[None]
    made = jnp.where(index < matched[:, None], drafts.tokens, replacement)
    extended = extend(p, request, Made(made, logits, checked.steps), jnp.minimum(matched + 1, L), max_tokens)
    return extended._replace(
        cache=_rewind(cache, start + extended.count - p.count),
        passes=drafts.passes + checked.ran - spec.draft_steps,
    )


def _accept(
    logits: Float[Array, "B L V"], drafts: _Drafts, request: Request, count: Int[Array, "B"], spec: Speculative
) -> tuple[Bool[Array, "B L"], Int32[Array, "B L"]]:
    """(Accepted?, the token to emit instead at the first refusal).

    Greedy rows: the draft is the argmax (or likely enough, below threshold 1). Sampled rows: with probability
    min(1, p/q), and otherwise a draw from max(p - q, 0) renormalised, which preserves the distribution p exactly.
    """

    def at_draft(x: Array) -> Array:
        return jnp.take_along_axis(x, drafts.tokens[..., None], axis=-1)[..., 0]

    q, L = drafts.q, logits.shape[1]
    target = jax.vmap(lambda x, seen: _distribution(x, seen, request), in_axes=(1, 0), out_axes=1)(
        logits, drafts.present
    )
    greedy = (request.sampling.temperature == 0)[:, None]
    best = jnp.argmax(target, axis=-1)  # greedy rows' target is one-hot
    good = drafts.tokens == best
    if spec.threshold < 1:
        raw = jax.nn.softmax(logits, axis=-1)
        good = good | (at_draft(raw) >= spec.threshold * raw.max(-1))
    keys = jax.vmap(lambda j: token_keys(request, count + j), out_axes=1)(jnp.arange(L))  # [B, L]
    chance = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2))))(keys)
    lucky = chance * at_draft(q) < at_draft(target)
    rest = jnp.maximum(target - q, 0)
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, target)
    redrawn = jax.vmap(jax.vmap(lambda k, w: jax.random.categorical(jax.random.fold_in(k, 3), jnp.log(w))))(keys, rest)
    return jnp.where(greedy, good, lucky), jnp.where(greedy, best, redrawn).astype(jnp.int32)


def _distribution(logits: Float[Array, "B V"], present: Bool[Array, "B V"], request: Request) -> Float32[Array, "B V"]:
    """The distribution a token is drawn from; one-hot at the argmax for greedy rows."""
    s = request.sampling
    best = jnp.argmax(penalise(logits, present, s.repetition_penalty), axis=-1)
    hot = jax.nn.one_hot(best, logits.shape[-1])
    return jnp.where((s.temperature > 0)[:, None], probabilities(logits, present, s), hot)


def _draw(q: Array, request: Request, keys: Array) -> Array:
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.log(q))
    return jnp.where(request.sampling.temperature > 0, drawn, jnp.argmax(q, axis=-1)).astype(jnp.int32)


def _rewind(cache: Cache, length: Array) -> Cache:
    return dataclasses.replace(cache, length=length)
