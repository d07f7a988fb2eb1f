"""The token loop: what a batch of requests asks for, how far it is, and one more token for every row."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Int32, Key

from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode.passes import run_pass
from rdlm.decode.requests import Request
from rdlm.decode.sampling import choose, known_only, stops
from rdlm.model import Params, compute_dtype
from rdlm.model.cache import Cache, allocate

WarmStart = Literal[False, "normalized", "raw"]
"""From where a token's state starts, if not from noise: its predecessor's last one, after ln_f or before."""

_STREAM = 0x746F6B65  # keeps the randomness of tokens apart from that of states


class Progress(NamedTuple):
    """State of the token loop.

    token [B]: last chosen, not yet processed. warm [B, 1, D]: state it starts from, if any. tokens, steps [B, N]: made
    so far. count [B]: how many. done [B]. present [B, V]: tokens seen. passes: core iterations so far.
    """

    cache: Cache
    token: Array
    warm: Array | None
    tokens: Array
    steps: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    done: Array
    present: Array
    passes: Array


@functools.partial(
    jax.jit, static_argnames=("config", "policy", "sets", "capacity", "room", "prefill_exit", "warm_start")
)
def begin(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    request: Request,
    policy: CachePolicy,
    sets: int,
    capacity: int,
    room: int,
    prefill_exit: str,
    warm_start: WarmStart,
) -> tuple[Progress, Int32[Array, "B L"]]:
    """Prefill, and choose the first token: (progress, steps of each token of the prompt)."""
    B, L = tokens.shape
    empty = allocate(config, policy, sets, B, capacity, compute_dtype(params, config))
    done, cache = run_pass(
        params, config, empty, tokens, lengths, first=True, key=request.keys, init_scale=request.init_scale,
        num_steps=request.num_steps, rule=None if prefill_exit == "never" else request.rule,
        min_steps=request.min_steps, check_every=request.check_every, together=prefill_exit == "together",
        last_only=True,
    )  # fmt: skip
    real = jnp.arange(L)[None] < lengths[:, None]
    present = jnp.zeros((B, config.rows), bool)
    present = present.at[jnp.arange(B)[:, None], jnp.where(real, tokens, config.rows)].set(True, mode="drop")
    last = (lengths - 1)[:, None]
    start = Progress(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        warm=None if not warm_start else _warm(done, last, warm_start),
        tokens=jnp.zeros((B, room), jnp.int32),
        steps=jnp.zeros((B, room), jnp.int32),
        count=jnp.zeros(B, jnp.int32),
        done=jnp.zeros(B, bool),
        present=present,
        passes=done.ran,
    )
    steps = jnp.take_along_axis(done.steps, last, axis=1)[:, 0]
    return emit(start, request, known_only(done.logits[:, 0], config.vocab_size), steps), done.steps


def progress_shapes(
    params: Params, config: ModelConfig, request: Request, policy: CachePolicy, sets: int, capacity: int
) -> Progress:
    """Shapes of what `begin` returns, with room for `capacity` tokens; nothing is computed, shapes of params do."""
    B = request.num_steps.shape[0]
    tokens, lengths = jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)
    return jax.eval_shape(
        lambda params, request: begin(
            params, config, tokens, lengths, request, policy, sets, capacity, capacity, "never", False
        )[0],
        params, request,
    )  # fmt: skip


def _warm(done, index: Array, kind: str) -> Array:
    states = done.latents if kind == "normalized" else done.state
    return jnp.take_along_axis(states, index[..., None], axis=1)


def token_keys(request: Request, index: Int[Array, "B"]) -> Key[Array, "B"]:
    """Keys for choosing token `index` of each row."""
    return jax.vmap(lambda k, j: jax.random.fold_in(jax.random.fold_in(k, _STREAM), j))(request.keys, index)


def emit(p: Progress, request: Request, logits: Float[Array, "B V"], steps: Int[Array, "B"]) -> Progress:
    """Choose a token for every row that is not done, and write it down."""
    keys = token_keys(request, p.count)
    token = choose(logits, p.present, request.sampling, keys)
    rows = jnp.arange(len(token))
    where = jnp.where(p.done, p.tokens.shape[1], p.count)
    return p._replace(
        token=token,
        tokens=p.tokens.at[rows, where].set(token, mode="drop"),
        steps=p.steps.at[rows, where].set(steps, mode="drop"),
        count=p.count + ~p.done,
        present=p.present.at[rows, token].set(True),
        done=p.done | stops(token, request.sampling),
    )


@functools.partial(jax.jit, static_argnames=("config", "warm_start"), donate_argnames="progress")
def decode_tokens(
    params: Params,
    config: ModelConfig,
    progress: Progress,
    request: Request,
    limit: Int[Array, ""],
    most: Int[Array, ""],
    warm_start: WarmStart,
) -> Progress:
    """Make tokens until every row is done or has `limit` of them."""

    def go_on(p: Progress) -> Array:
        return jnp.any(~p.done & (p.count < limit))

    def one(p: Progress) -> Progress:
        count = jnp.where(p.done, 0, 1)
        done, cache = run_pass(
            params, config, p.cache, p.token[:, None], count, first=False, state=p.warm, key=request.keys,
            init_scale=request.init_scale, num_steps=request.num_steps, rule=request.rule,
            min_steps=request.min_steps, check_every=request.check_every,
        )  # fmt: skip
        p = p._replace(cache=cache, passes=p.passes + done.ran)
        if warm_start:
            p = p._replace(warm=_warm(done, jnp.zeros((len(count), 1), jnp.int32), warm_start))
        p = emit(p, request, known_only(done.logits[:, 0], config.vocab_size), done.steps[:, 0])
        return p._replace(done=p.done | (p.count >= most))

    return lax.while_loop(go_on, one, progress)
