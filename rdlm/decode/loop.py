"""The token loop: how far a batch of requests is, and one more token for every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Int32, Key

from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode.passes import continuation, run_pass
from rdlm.decode.program import program
from rdlm.decode.requests import Request, WarmStart
from rdlm.decode.sampling import Likeliest, adjusted, choose, finite, likeliest, log_probability, no_likeliest, stops
from rdlm.model import Params, Pass, Start, Text, compute_dtype, known, start_from
from rdlm.model.cache import Cache, allocate

_STREAM = 0x746F6B65  # separates the randomness of tokens from that of initial states


class Progress(NamedTuple):
    """State of the token loop."""

    cache: Cache
    token: Array  # int32 [B], the last one chosen, not yet processed
    warm: Array | None  # [B, 1, state_dim], the state it starts from; None: from noise
    tokens: Array  # int32 [B, N], made so far
    steps: Array  # int32 [B, N], recurrences of the pass that gave each of them
    log_probs: Array  # f32 [B, N], see `log_probability`
    likeliest: Likeliest  # at the position of `token`, if a row wants it
    count: Array  # type: ignore[assignment]  # int32 [B], how many; hides tuple.count, which nobody needs
    done: Array  # bool [B]
    failed: Array  # bool [B], done because the logits of its next token were not finite
    present: Array  # bool [B, V], tokens of prompt and output; V = vocab_size
    passes: Array  # int32 [1], sequential core recurrences so far


class Sizes(NamedTuple):
    """Static sizes of the arrays of a token loop."""

    policy: CachePolicy
    sets: int  # core sets that the cache keeps
    capacity: int  # positions of the cache
    tokens: int  # N, new tokens per row


@program("config", "sizes", "prefill_exit", "warm_start")
def begin(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    request: Request,
    sizes: Sizes,
    prefill_exit: str,
    warm_start: WarmStart,
) -> tuple[Progress, Int32[Array, "B L"]]:
    """Prefill, and choose the first token: (progress, steps of each token of the prompt)."""
    B = len(tokens)
    empty = allocate(config, sizes.policy, sizes.sets, B, sizes.capacity, compute_dtype(params, config))
    prefix = jnp.where(request.prefix, lengths, 0) if config.prefix_attention else None
    text = continuation(config, empty, tokens, lengths, first=True, prefix=prefix)
    depth = request.depth._replace(rule=None) if prefill_exit == "never" else request.depth
    start = request_start(params, config, text, request)
    done, cache = run_pass(params, config, text, start, depth, empty, prefill_exit == "together", last_only=True)
    V = config.vocab_size
    present = jnp.zeros((B, V), bool)
    present = present.at[jnp.arange(B)[:, None], jnp.where(text.valid, tokens, V)].set(True, mode="drop")
    return _first_token(config, done, cache, request, lengths, present, sizes.tokens, warm_start), done.steps


@program("config", "warm_start", donate="cache")
def read_chunk(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, "B C"],
    count: Int[Array, "B"],
    present: Bool[Array, "B V"],
    request: Request,
    warm_start: WarmStart,
) -> tuple[Progress, Int32[Array, "B C"]]:
    """Prefill the next chunk of prompts: (progress if it is the last one, steps of each of its tokens).

    Args:
      params, config: the model.
      cache: of the chunks before; with `coda_sets`, if a rule reads logits. It keeps every recurrence that tokens run,
        or the result is not that of `begin`.
      tokens, count: the chunk, and how many tokens of each row are real.
      present: the tokens of the whole prompts.
      request: as for `begin`, which also serves what this cannot: prefix attention, and exits of a prompt together.
      warm_start: as for `begin`.
    """
    text = continuation(config, cache, tokens, count)
    start = request_start(params, config, text, request)
    done, cache = run_pass(params, config, text, start, request.depth, cache, last_only=True)
    return _first_token(config, done, cache, request, count, present, 1, warm_start), done.steps


def _first_token(
    config: ModelConfig,
    done: Pass,
    cache: Cache,
    request: Request,
    lengths: Int[Array, "B"],
    present: Bool[Array, "B V"],
    most: int,
    warm_start: WarmStart,
) -> Progress:
    """The token loop after the first of `most` tokens, which a pass over `lengths` tokens of each row has given."""
    B, last = len(lengths), (lengths - 1)[:, None]
    table = jnp.zeros((B, most), jnp.int32)
    progress = Progress(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        warm=_warm(config, done, last, warm_start),
        tokens=table,
        steps=table,
        log_probs=jnp.zeros((B, most), jnp.float32),
        likeliest=no_likeliest(B),
        count=jnp.zeros(B, jnp.int32),
        done=jnp.zeros(B, bool),
        failed=jnp.zeros(B, bool),
        present=present,
        passes=done.ran[None],
    )
    steps = jnp.take_along_axis(done.steps, last, axis=1)[:, 0]
    return emit(progress, request, known(config, done.logits[:, 0]), steps)


def progress_shapes(params: Params, config: ModelConfig, request: Request, sizes: Sizes) -> Progress:
    """Shapes of what `begin` returns, from shapes of params; nothing is computed."""
    B = len(request.keys)
    tokens, lengths = jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)
    return jax.eval_shape(
        lambda params, request: begin(params, config, tokens, lengths, request, sizes, "never", False)[0],
        params,
        request,
    )


def request_start(
    params: Params, config: ModelConfig, text: Text, request: Request, state: Array | None = None
) -> Start:
    """The initial states that a request asks for, or `state`."""
    return start_from(params, config, text, request.keys, state, request.init_scale)


def _warm(config: ModelConfig, done: Pass, index: Array, kind: WarmStart) -> Array | None:
    """The state [B, 1, state_dim] that a token passes on to the next, at `index` [B, 1]."""
    if not kind:
        return None
    states = done.latents if kind == "normalized" and config.loop.bridge else done.state
    return jnp.take_along_axis(states, index[..., None], axis=1)


def token_keys(request: Request, index: Int[Array, "B"]) -> Key[Array, "B"]:
    """Keys for choosing token `index` of each row."""
    return jax.vmap(lambda k, j: jax.random.fold_in(jax.random.fold_in(k, _STREAM), j))(request.keys, index)


def emit(p: Progress, request: Request, logits: Float[Array, "B V"], steps: Int[Array, "B"]) -> Progress:
    """Choose a token for every row that is not done, and write it down; a row without finite logits is done."""
    wanted = adjusted(logits, p.tokens, p.count, request.sampling)
    token = choose(wanted, p.present, request.sampling, token_keys(request, p.count))
    rows, failed = jnp.arange(len(token)), ~p.done & ~finite(logits)
    done = p.done | failed
    where = jnp.where(done, p.tokens.shape[1], p.count)
    return p._replace(
        token=token,
        tokens=p.tokens.at[rows, where].set(token, mode="drop"),
        steps=p.steps.at[rows, where].set(steps, mode="drop"),
        log_probs=p.log_probs.at[rows, where].set(log_probability(logits, token), mode="drop"),
        likeliest=likeliest(logits, request.likeliest),
        count=p.count + ~done,
        present=p.present.at[rows, token].set(True),
        done=done | stops(token, request.sampling),
        failed=p.failed | failed,
    )


class Made(NamedTuple):
    """L tokens that may follow those of each row."""

    tokens: Array  # int32 [B, L]
    logits: Array  # f32 [B, L, V], from which each was chosen
    steps: Array  # int32 [B, L], recurrences of the pass that gave them


def extend(p: Progress, request: Request, made: Made, keep: Int[Array, "B"], max_tokens: Int[Array, ""]) -> Progress:
    """Write down the first `keep` of these tokens of every row that is not done.

    A stop token, `max_tokens` in all, or logits that are not finite end a row earlier. The cache stays as it is.
    """
    tokens, logits, steps = made
    L, V, rows = tokens.shape[1], logits.shape[-1], jnp.arange(len(tokens))
    index = jnp.arange(L)[None]
    keep = jnp.minimum(keep, max_tokens - p.count)
    sound = jnp.cumprod(finite(logits).astype(jnp.int32), axis=1).sum(1)  # tokens before logits that are not finite
    failed = ~p.done & (sound < keep)
    keep = jnp.minimum(keep, sound)
    stopping = jax.vmap(lambda t: stops(t, request.sampling), in_axes=1, out_axes=1)(tokens) & (index < keep[:, None])
    first_stop = jnp.where(stopping.any(1), jnp.argmax(stopping, axis=1) + 1, L + 1)
    failed = failed & (first_stop > keep)
    keep = jnp.where(p.done, 0, jnp.minimum(keep, first_stop))
    slots = jnp.where(index < keep[:, None], p.count[:, None] + index, p.tokens.shape[1])
    seen = jnp.where(index < keep[:, None], tokens, V)
    last = jnp.take_along_axis(tokens, jnp.maximum(keep - 1, 0)[:, None], axis=1)[:, 0]
    count = p.count + keep
    return p._replace(
        token=jnp.where(keep > 0, last, p.token),
        tokens=p.tokens.at[rows[:, None], slots].set(tokens, mode="drop"),
        steps=p.steps.at[rows[:, None], slots].set(steps, mode="drop"),
        log_probs=p.log_probs.at[rows[:, None], slots].set(log_probability(logits, tokens), mode="drop"),
        count=count,
        present=p.present.at[rows[:, None], seen].set(True, mode="drop"),
        done=p.done | stopping.any(1) | failed | (count >= max_tokens),
        failed=p.failed | failed,
    )


def until(limit: Int[Array, ""], one_round: Callable[[Progress], Progress], progress: Progress) -> Progress:
    """Repeat `one_round` until every row is done or has at least `limit` tokens."""
    return lax.while_loop(lambda p: jnp.any(~p.done & (p.count < limit)), one_round, progress)


@program("config", "warm_start", donate="progress")
def decode_tokens(
    params: Params,
    config: ModelConfig,
    progress: Progress,
    request: Request,
    limit: Int[Array, ""],
    max_tokens: Int[Array, ""],
    warm_start: WarmStart,
) -> Progress:
    """Make tokens until every row is done or has `limit` of them."""

    def one(p: Progress) -> Progress:
        text = continuation(config, p.cache, p.token[:, None], jnp.where(p.done, 0, 1))
        start = request_start(params, config, text, request, p.warm)
        done, cache = run_pass(params, config, text, start, request.depth, p.cache)
        p = p._replace(
            cache=cache,
            passes=p.passes + done.ran,
            warm=_warm(config, done, jnp.zeros_like(text.tokens), warm_start),
        )
        p = emit(p, request, known(config, done.logits[:, 0]), done.steps[:, 0])
        return p._replace(done=p.done | (p.count >= max_tokens))

    return until(limit, one, progress)
