"""Next-token loss of a training step, in f32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import InputError, ModelConfig
from rdlm.model import (
    Params,
    check_ids,
    compute_dtype,
    context,
    core_step,
    embed,
    head,
    inject,
    positions_of,
    readout,
    split_steps,
    typed_key,
)
from rdlm.model import decode as coda
from rdlm.recurrence import checkpoints, initial_state, unroll

IGNORED = -100
"""Label that is not scored."""


class Batch(NamedTuple):
    """A normalised batch. Each int32 [B, L], but `segment_ids` and `sequence_ids` may be None."""

    tokens: Array
    labels: Array
    segment_ids: Array | None
    positions: Array
    sequence_ids: Array | None


def as_batch(batch: Any) -> Batch:
    """A batch from int [B, L+1] (labels are the next tokens) or from a dict (contract, "Forward and loss").

    Labels that would cross a segment border, or that belong to padding (segment 0), are ignored. A dict may carry
    `sequence_ids` [B, L], which give every document its own noise however it is packed.

    Raises:
      InputError: missing or unknown entries, or shapes that differ.
    """
    if not isinstance(batch, dict):
        rows = _integers("batch", batch)
        if rows.ndim != 2 or rows.shape[1] < 2:
            raise InputError(f"batch: expected integers [B, L+1] with L >= 1, got shape {tuple(rows.shape)}")
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    known = ("tokens", "labels", "segment_ids", "positions", "sequence_ids")
    for name in ("tokens", "labels"):
        if batch.get(name) is None:
            raise InputError(f"batch: entry {name!r} is missing")
    for name in batch:
        if name not in known:
            raise InputError(f"batch: unknown entry {name!r}; known: {', '.join(known)}")
    given = {name: _integers(f"batch: {name}", value) for name, value in batch.items() if value is not None}
    tokens, labels, segments = given["tokens"], given["labels"], given.get("segment_ids")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InputError(f"batch: tokens: expected integers [B, L] with L >= 1, got shape {tokens.shape}")
    for name, value in given.items():
        if value.shape != tokens.shape and not (name == "positions" and value.shape == tokens.shape[1:]):
            raise InputError(f"batch: {name} has shape {value.shape}, tokens {tokens.shape}")
    if segments is not None:
        follows = jnp.concatenate([segments[:, 1:] == segments[:, :-1], jnp.ones_like(segments[:, :1], bool)], axis=1)
        # The last label of a row has no segment of its own here; whoever cut the row has already ignored it if needed.
        labels = jnp.where(follows & (segments != 0), labels, IGNORED)
    positions = given.get("positions")
    if positions is None:
        positions = positions_of(tokens, segments)
    return Batch(tokens, labels, segments, positions, given.get("sequence_ids"))


def _integers(name: str, value: Any) -> Array:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name}: expected integers, got {array.dtype}")
    return jnp.asarray(array, jnp.int32)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], f32 [B, L]; 0 where the label is ignored. logits f32 [B, L, V]."""
    scored = labels != IGNORED
    at_label = jnp.take_along_axis(logits, jnp.where(scored, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - at_label, 0.0)


def is_likeliest(logits: Array, labels: Array) -> Array:
    """Whether no other token's logit reaches the label's, bool [B, L]; False where the label is ignored.

    logits f32 [B, L, V]. A count of the logits that reach it: CPUs do that many times faster than an argmax.
    """
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
    return ((logits >= at_label).sum(-1) == 1) & (labels != IGNORED)


def batch_state(params: Params, config: ModelConfig, batch: Batch, state: Array | None, key: Array | None) -> Array:
    """The initial state of a batch: the one given, or noise keyed by (key, sequence, position)."""
    dtype = compute_dtype(params, config)
    if state is not None:
        return jnp.asarray(state, dtype)
    key = typed_key(key)
    if batch.sequence_ids is not None:
        rows = key if key.ndim else key[None]
        rows = jnp.broadcast_to(rows, batch.tokens.shape[:1])
        key = jax.vmap(lambda k, ids: jax.vmap(lambda i: jax.random.fold_in(k, i))(ids))(rows, batch.sequence_ids)
    s = initial_state(key, batch.positions, config.embed_dim, dtype)
    return jnp.broadcast_to(s, (*batch.tokens.shape, config.embed_dim))


def token_losses(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    steps: Any,
    state: Array | None = None,
    key: Array | None = None,
    max_k: int | None = None,
    remat: bool = False,
) -> Array:
    """Cross-entropy of every token, f32 [B, L], after `steps` = r or (n, k) recurrences; 0 where ignored.

    max_k: slots compiled for a traced k (default backprop_depth). remat: see `rdlm.recurrence.unroll`.
    """
    n, k = split_steps(steps, config)
    step, s, ctx = _setup(params, config, batch, state, key)
    s = unroll(step, s, n, k, max_k=max_k or config.backprop_depth, remat=remat)
    (y, _), _ = coda(params, config, s, ctx)
    return cross_entropy(head(params, config, y), batch.labels)


def loss(
    params: Params,
    config: ModelConfig,
    batch: Any,
    *,
    steps: Any,
    state: Array | None = None,
    key: Array | None = None,
    max_k: int | None = None,
    remat: bool = False,
) -> Array:
    """Mean cross-entropy over the scored labels of the batch, f32 scalar (contract, "Forward and loss").

    Args:
      params, config: the model.
      batch: int [B, L+1] or a dict; see `as_batch`.
      steps: r or (n, k): n recurrences without gradient, k with. With k = 0 the gradients of prelude, adapter and
        core are exact zeros.
      state: [B, L, D] initial state; wins over `key`.
      key: one key, or one per row.
      max_k, remat: see `token_losses`.
    """
    batch = as_batch(batch)
    check_ids("batch: tokens", batch.tokens, config)
    if not isinstance(batch.labels, jax.core.Tracer):
        check_ids(f"batch: labels (ignored ones are {IGNORED})", batch.labels[batch.labels != IGNORED], config)
    losses = token_losses(
        params, config, batch, steps=steps, state=state, key=key, max_k=max_k, remat=remat
    )  # fmt: skip
    return losses.sum() / jnp.maximum((batch.labels != IGNORED).sum(), 1)


def scores_by_depth(
    params: Params, config: ModelConfig, batch: Batch, depths: tuple[int, ...], key: Array | None = None
) -> tuple[Array, Array]:
    """Cross-entropies f32 and whether the label is the likeliest token, bool, both [len(depths), B, L], at each depth.

    One unroll, no gradient.
    """
    step, s, ctx = _setup(params, config, batch, None, key)

    def read(s: Array) -> tuple[Array, Array]:
        logits, _ = readout(params, config, s, ctx)
        return cross_entropy(logits, batch.labels), is_likeliest(logits, batch.labels)

    losses, right = zip(*checkpoints(step, s, depths, read), strict=True)
    return jnp.stack(losses), jnp.stack(right)


def _setup(params: Params, config: ModelConfig, batch: Batch, state: Array | None, key: Array | None):
    ctx = context(config, batch.positions, batch.segment_ids)
    s = batch_state(params, config, batch, state, key)
    e, _ = embed(params, config, batch.tokens, ctx)
    injected = inject(params, config, e)
    return (lambda s, i: core_step(params, config, s, injected, ctx)[0]), s, ctx
