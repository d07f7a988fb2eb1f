"""Next-token loss of a training step, in f32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32, Int, Int32

from rdlm.config import IGNORED, InputError, ModelConfig
from rdlm.model import (
    Params,
    check_ids,
    coda,
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
from rdlm.model.blocks import Context
from rdlm.recurrence import Step, Weights, checkpoints, initial_state, unroll, unroll_for_training
from rdlm.remat import PLAIN, Plan


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


def _integers(name: str, value: Any) -> Int32[Array, "..."]:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name}: expected integers, got {array.dtype}")
    return jnp.asarray(array, jnp.int32)


def cross_entropy(
    logits: Float32[Array, "*tokens V"], labels: Int[Array | np.ndarray, "*tokens"]
) -> Float32[Array, "*tokens"]:
    """-log softmax(logits)[label]; 0 where the label is ignored."""
    scored = labels != IGNORED
    at_label = jnp.take_along_axis(logits, jnp.where(scored, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - at_label, 0.0)


def is_likeliest(
    logits: Float32[Array, "*tokens V"], labels: Int[Array | np.ndarray, "*tokens"]
) -> Bool[Array, "*tokens"]:
    """Whether no other token's logit reaches the label's; False where the label is ignored.

    A count of the logits that reach it: CPUs do that many times faster than an argmax.
    """
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
    return ((logits >= at_label).sum(-1) == 1) & (labels != IGNORED)


def batch_state(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    state: Float[ArrayLike, "B L D"] | None,
    key: Array | None,
) -> Float[Array, "B L {config.embed_dim}"]:
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
    state: Float[ArrayLike, "B L D"] | None = None,
    key: Array | None = None,
    max_k: int | None = None,
    rows: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    plan: Plan = PLAIN,
    flash: bool = False,
) -> Float32[Array, "B L"]:
    """Cross-entropy of every token after `steps` = r or (n, k) recurrences; 0 where ignored.

    Args:
      params, config, batch, state, key: as in `loss`.
      steps: r or (n, k).
      max_k: slots compiled for a traced k (default backprop_depth).
      rows: (n, k) of every row, none above those of `steps`. A shallower row waits: its own n steps end
        where the others' do, and its own k too, so that its loss is the one it would have alone.
      plan: how activations and weights are held.
      flash: use the fused attention kernel (TPU; one device, or inside `jax.shard_map`).
    """
    n, k = split_steps(steps, config)
    ctx = context(config, batch.positions, batch.segment_ids, flash=flash)
    s = batch_state(params, config, batch, state, key)
    e, _ = embed(params, config, batch.tokens, ctx, plan=plan)
    injected = inject(params, config, e, plan)
    s = _unrolled(
        params, config, injected, ctx, s, (n, k), config.backprop_depth if max_k is None else max_k, rows, plan
    )
    (y, _), _ = coda(params, config, s, ctx, plan=plan)
    return head_losses(params, config, y, batch.labels, plan)


def _unrolled(
    params: Params, config: ModelConfig, injected: Array, ctx: Context, s: Array, steps: tuple[Any, Any], max_k: int,
    rows: tuple[Array, Array] | None, plan: Plan,
) -> Array:  # fmt: skip
    """The state after n + k recurrences, held as `plan` says."""
    n, k = steps
    names = ["adapter", *(f"core_{j}" for j in range(config.core_layers))]
    stored = {name: params[name] for name in names}
    once = plan.gather != "each"
    inside = plan.fetched() if once else plan

    def fetch(stored: Any) -> Any:
        return {name: plan.fetch(name, x) for name, x in stored.items()} if once else stored

    def give_back(gradient: Any) -> Any:
        if not once:
            return gradient
        back: Any = {}
        for name, g in gradient.items():  # one after the other, which needs less memory
            back[name] = plan.give_back(name, jax.lax.optimization_barrier((g, back))[0])
        return back

    def step(whole: Any, injected: Array, constants: Any, s: Array, i: Array) -> Array:
        ctx, n, k, rows = constants
        new, _ = core_step(whole, config, s, injected, ctx, plan=inside)
        if rows is None:
            return new
        running = jnp.where(i < n, i >= n - rows[0], i - n >= k - rows[1])
        return jnp.where(running[:, None, None], new, s)

    constants = (ctx, n, k, rows)
    slots = k if isinstance(k, int) else max_k
    if slots == 0:
        whole = fetch(stored)
        return unroll(lambda s, i: step(whole, injected, constants, s, i), s, n, 0)
    weights = Weights(fetch, give_back, plan.gather == "weights_once", plan.sum_dtype)
    return unroll_for_training(step, stored, injected, constants, s, n, k, slots, weights, plan.remat)


LOGITS_AT_ONCE = 2**26
"""Most logits a training step holds at a time (256 MiB); more are made, used and made again in parts."""


def head_losses(
    params: Params, config: ModelConfig, y: Float[Array, "B L D"], labels: Int[Array, "B L"], plan: Plan = PLAIN
) -> Float32[Array, "B L"]:
    """Cross-entropies of y, never more than about `LOGITS_AT_ONCE` logits held at once."""
    tokens = labels.size
    parts = -(-tokens * config.rows // LOGITS_AT_ONCE)
    name = "wte" if config.tie_embeddings else "head"
    whole = {"wte": params["wte"], name: plan.fetch(name, params[name])}
    if parts <= 1:
        return cross_entropy(head(whole, config, y), labels)
    size = -(-tokens // parts)
    fill = size * parts - tokens
    flat = jnp.pad(y.reshape(tokens, -1), ((0, fill), (0, 0))).reshape(parts, size, -1)
    wanted = jnp.pad(labels.reshape(-1), (0, fill), constant_values=IGNORED).reshape(parts, size)

    @jax.checkpoint
    def part(y: Array, labels: Array) -> Array:
        return cross_entropy(head(whole, config, y), labels)

    losses = jax.lax.map(lambda part_of: part(*part_of), (flat, wanted))
    return losses.reshape(-1)[:tokens].reshape(labels.shape)


def loss(
    params: Params,
    config: ModelConfig,
    batch: Any,
    *,
    steps: Any,
    state: Float[ArrayLike, "B L D"] | None = None,
    key: Array | None = None,
    max_k: int | None = None,
    plan: Plan = PLAIN,
) -> Float32[Array, ""]:
    """Mean cross-entropy over the scored labels of the batch (contract, "Forward and loss").

    Args:
      params, config: the model.
      batch: int [B, L+1] or a dict; see `as_batch`.
      steps: r or (n, k): n recurrences without gradient, k with. With k = 0 the gradients of prelude, adapter and
        core are exact zeros.
      state: initial state; wins over `key`.
      key: one key, or one per row.
      max_k, plan: see `token_losses`.
    """
    batch = as_batch(batch)
    check_ids("batch: tokens", batch.tokens, config)
    if not isinstance(batch.labels, jax.core.Tracer):
        check_ids(f"batch: labels (ignored ones are {IGNORED})", batch.labels[batch.labels != IGNORED], config)
    losses = token_losses(params, config, batch, steps=steps, state=state, key=key, max_k=max_k, plan=plan)
    return losses.sum() / jnp.maximum((batch.labels != IGNORED).sum(), 1)


def scores_by_depth(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    depths: tuple[int, ...],
    key: Array | None = None,
    flash: bool = False,
) -> tuple[Float32[Array, "{len(depths)} B L"], Bool[Array, "{len(depths)} B L"]]:
    """Cross-entropies and whether the label is the likeliest token, at each depth.

    One unroll, no gradient. flash: as in `token_losses`.
    """
    step, s, ctx = setup(params, config, batch, None, key, flash)

    def read(s: Array) -> tuple[Array, Array]:
        logits, _ = readout(params, config, s, ctx)
        return cross_entropy(logits, batch.labels), is_likeliest(logits, batch.labels)

    return checkpoints(step, s, depths, read)


def setup(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    state: Float[ArrayLike, "B L D"] | None,
    key: Array | None,
    flash: bool = False,
) -> tuple[Step, Float[Array, "B L D"], Context]:
    """(step(s, i) -> s, the initial state, the context) of a batch; arguments as in `token_losses`."""
    ctx = context(config, batch.positions, batch.segment_ids, flash=flash)
    s = batch_state(params, config, batch, state, key)
    injected = inject(params, config, embed(params, config, batch.tokens, ctx)[0])
    return (lambda s, i: core_step(params, config, s, injected, ctx)[0]), s, ctx
