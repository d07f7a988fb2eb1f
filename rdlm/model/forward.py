"""`forward`: the whole model at a depth of your choice, or with per-token exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int32, Key

from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.exits import ExitRule
from rdlm.model.adaptive import adaptive_pass
from rdlm.model.blocks import Context
from rdlm.model.network import (
    Params,
    compute_dtype,
    context,
    core_step,
    embed,
    inject,
    positions_of,
    readout,
)
from rdlm.model.noise import noisy
from rdlm.recurrence import Step, initial_state, unroll


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What `forward` returns.

    logits f32 [B, L, V]; latents [B, L, D], after ln_f; steps int32 [B, L], recurrences each token ran;
    state [B, L, D], the raw latent state before ln_f; looks int32 [B, L], how often an exit rule read a token's logits
    (each costs `flops.check_flops`), None where it is not counted.
    """

    logits: Array
    latents: Array
    steps: Array
    state: Array
    looks: Array | None = None


def typed_key(key: Any) -> Key[Array, "..."]:
    """A typed key array: None is key 0, old-style uint32 keys are wrapped."""
    if key is None:
        return jax.random.key(0)
    if jnp.issubdtype(jnp.asarray(key).dtype if not hasattr(key, "dtype") else key.dtype, jax.dtypes.prng_key):
        return key
    data = jnp.asarray(key, jnp.uint32)
    if data.ndim == 0 or data.shape[-1] != 2:
        raise InputError(f"key = {key!r}: expected a key such as jax.random.key(0), or an array of them")
    return jax.random.wrap_key_data(data)


def check_tokens(tokens: Any, config: ModelConfig, name: str = "tokens") -> Int32[Array, "B L"]:
    """`tokens` as int32; a clear error for wrong ranks, lengths, dtypes and (outside jit) ids."""
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"{name}: expected integers [B, L] with L >= 1, got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.shape[1] > config.max_length:
        raise InputError(f"{name}: length {tokens.shape[1]} exceeds config.max_length = {config.max_length}")
    check_ids(name, tokens, config)
    return jnp.asarray(tokens, jnp.int32)


def check_ids(name: str, ids: Any, config: ModelConfig) -> None:
    """Refuse concrete token ids outside the vocabulary; traced ones pass."""
    if not isinstance(ids, jax.core.Tracer) and np.size(ids):
        least, most = int(np.min(ids)), int(np.max(ids))
        if least < 0 or most >= config.rows:
            raise InputError(f"{name}: ids must be in [0, {config.rows}), found {least} .. {most}")


def check_rule(rule: Any, batch: int, min_steps: Any = 0, check_every: Any = 1) -> None:
    """Refuse what is no exit rule, thresholds that are neither one nor one per row, and impossible schedules."""
    if rule is not None and not isinstance(rule, ExitRule):
        raise InputError(f"exit_rule = {rule!r}: must be a rule such as rdlm.exits.kl()")
    if rule is not None:
        for leaf in rule.thresholds():
            check_shape("exit_rule: threshold", leaf, (), (batch,))
    for name, value, least in (("min_steps", min_steps, 0), ("check_every", check_every, 1)):
        if not isinstance(value, jax.core.Tracer) and np.min(value) < least:
            raise InputError(f"{name} = {value!r}: must be at least {least}")


def split_steps(num_steps: Any, config: ModelConfig) -> tuple[Any, Any]:
    """(n, k) of the contract's num_steps: None, r (traced or not) or a pair.

    Raises:
      InputError: a count that is not positive.
    """
    n, k = num_steps if isinstance(num_steps, (tuple, list)) else (num_steps, 0)
    if n is None:
        n = config.mean_recurrence
    n, k = (_concrete(x) for x in (n, k))
    known = [x for x in (n, k) if isinstance(x, int)]
    if min(known, default=0) < 0 or (len(known) == 2 and n + k < 1):
        raise InputError(f"num_steps = {num_steps!r}: at least one recurrence is needed")
    return n, k


def _concrete(count: Any) -> Any:
    """A count as a Python int, unless it is traced."""
    if isinstance(count, jax.core.Tracer):
        return count
    if np.ndim(count) or not np.issubdtype(np.asarray(count).dtype, np.integer):
        raise InputError(f"num_steps: {count!r} is not a number of recurrences")
    return int(count)


def check_shape(name: str, value: Any, *allowed: tuple[int, ...]) -> None:
    """Refuse an array (None passes) whose shape is not among those `allowed`."""
    if value is not None and jnp.shape(value) not in allowed:
        known = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError(f"{name}: expected shape {known}, got {list(jnp.shape(value))}")


class Start(NamedTuple):
    """Where a pass over a text begins.

    tokens int32 [B, L]; segment_ids int [B, L] or None; positions int [L] or [B, L]; ctx: from `context`; s0 [B, L, D],
    the initial state; key: of the test-time noise.
    """

    tokens: Array
    segment_ids: Array | None
    positions: Array
    ctx: Context
    s0: Array
    key: Array


def start(
    params: Params, config: ModelConfig, tokens: Any, *, state: ArrayLike | None = None, key: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None,
) -> Start:  # fmt: skip
    """Check the arguments of `forward` that describe a text, and fill in what was not given; raises as it does."""
    tokens = check_tokens(tokens, config)
    B, L = tokens.shape
    dtype, key = compute_dtype(params, config), typed_key(key)
    check_shape("segment_ids", segment_ids, (B, L))
    check_shape("positions", positions, (L,), (B, L))
    check_shape("state", state, (B, L, config.embed_dim))
    check_shape("key", key, (), (B,))
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    positions = positions_of(tokens, segment_ids) if positions is None else jnp.asarray(positions)
    if state is None:
        state = initial_state(key, positions, config.embed_dim, dtype)
    s0 = jnp.broadcast_to(jnp.asarray(state, dtype), (B, L, config.embed_dim))
    noise_key = key if config.test_time_noise else jax.random.key(0)
    return Start(tokens, segment_ids, positions, context(config, positions, segment_ids), s0, noise_key)


def stepping(params: Params, config: ModelConfig, begin: Start) -> tuple[Step, Float[Array, "B L D"]]:
    """(step(s, i) -> s, one recurrence over that text, test-time noise included; the injected embedding)."""
    injected = inject(params, config, embed(params, config, begin.tokens, begin.ctx)[0])

    def step(s: Array, i: Array | int) -> Array:
        s = noisy(params, config, s, i, begin.key, begin.positions)
        return core_step(params, config, s, injected, begin.ctx)[0]

    return step, injected


def forward(
    params: Params,
    config: ModelConfig,
    tokens: ArrayLike | Sequence[Sequence[int]],
    num_steps: Any = None,
    *,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    exit_rule: ExitRule | None = None,
    min_steps: Any = 0,
    check_every: Any = 1,
    cache: CachePolicy = CachePolicy(),
) -> Output:
    """Logits and latents of whole sequences (contract, "Forward and loss"). jit-able with `config` and `cache` static.

    Args:
      params, config: the model.
      tokens: int [B, L].
      num_steps: None = config.mean_recurrence; r = r recurrences without gradient into prelude and core; (n, k) = n
        without, then k with gradient (a traced k is at most backprop_depth). With an exit rule, or given as an array
        [B] or [B, L], the most recurrences per row or token.
      state: [B, L, D] initial state; wins over `key`.
      key: one key (the same noise in every row) or keys [B]; None is `jax.random.key(0)`.
      segment_ids: int [B, L]; tokens attend within their segment, 0 is padding.
      positions: int [L] or [B, L]; default: restart at 0 in each segment.
      exit_rule, min_steps, check_every: stop each token on its own; checks happen after recurrences min_steps + 1,
        min_steps + 1 + check_every, ... One parallel pass, see `rdlm.model.adaptive`.
      cache: which sets of keys and values later tokens see of ones that stopped; matters only with exits.

    Raises:
      InputError: wrong shapes, ids out of range, a depth below 1.
    """
    begin = start(
        params, config, tokens, state=state, key=key, segment_ids=segment_ids, positions=positions
    )  # fmt: skip
    check_rule(exit_rule, len(begin.tokens), min_steps, check_every)
    per_token = jnp.ndim(num_steps) > 0 if not isinstance(num_steps, (tuple, list, type(None))) else False
    valid = jnp.ones(begin.tokens.shape, bool) if begin.segment_ids is None else begin.segment_ids != 0
    if exit_rule is not None or per_token:
        if isinstance(num_steps, (tuple, list)):
            raise InputError("num_steps: an exit rule takes a number of recurrences, not a pair (n, k)")
        most = config.mean_recurrence if num_steps is None else num_steps
        check_depth(most)
        result = adaptive_pass(
            params, config, begin.tokens, begin.positions, begin.ctx, begin.s0, valid, num_steps=most, rule=exit_rule,
            min_steps=min_steps, check_every=check_every, policy=cache, key=begin.key,
        )  # fmt: skip
        return Output(result.logits, result.latents, result.steps, result.state, result.looks)
    n, k = split_steps(num_steps, config)
    step, _ = stepping(params, config, begin)
    s = unroll(step, begin.s0, n, k, max_k=config.backprop_depth)
    logits, z = readout(params, config, s, begin.ctx)
    return Output(logits, z, jnp.where(valid, jnp.asarray(n + k, jnp.int32), 0), s)


def check_depth(num_steps: Any, name: str = "num_steps") -> None:
    """Refuse a concrete depth below 1."""
    if not isinstance(num_steps, jax.core.Tracer) and np.min(np.asarray(num_steps)) < 1:
        raise InputError(f"{name} = {num_steps!r}: must be at least 1")
