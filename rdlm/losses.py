"""Next-token loss of a training step, in f32."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32, Int, Int32

from rdlm.config import IGNORED, InputError, LossConfig, ModelConfig, Remat, TuneConfig
from rdlm.exits import exit_probabilities
from rdlm.model import (
    Bound,
    Params,
    Start,
    Text,
    begin,
    bind_text,
    check_ids,
    coda,
    compute_dtype,
    context,
    core_step,
    embed,
    head,
    inject,
    known,
    positions_of,
    split_steps,
    typed_key,
    vectors,
    with_values,
)
from rdlm.model.blocks import Block, Context
from rdlm.model.network import core_names, gate_logit
from rdlm.recurrence import checkpoints, initial_state, spectral_radius, trajectory, unroll
from rdlm.remat import recomputed
from rdlm.sharding import Layout


class Batch(NamedTuple):
    """A normalised batch. Each int32 [B, L], but `segment_ids` and `sequence_ids` may be None."""

    tokens: Array
    labels: Array
    segment_ids: Array | None
    positions: Array
    sequence_ids: Array | None


def as_batch(batch: Any) -> Batch:
    """A batch from int [B, L+1] (labels are the next tokens) or from a dict (docs/semantics.md, Forward and loss).

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
        # The segment of a row's last label is not known here; the packing has already ignored that label where needed.
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


def likeliest(logits: Float32[Array, "*tokens V"]) -> Int[Array, "*tokens"]:
    """The likeliest token, -1 where the logits are not finite: the argmax of NaN is 0, and so agrees with itself."""
    sound = jnp.isfinite(logits.max(-1)) & ~jnp.isnan(logits).any(-1)  # the maximum may pass over a NaN on a CPU
    return jnp.where(sound, jnp.argmax(logits, axis=-1), -1)


def training_loss(
    logits: Float32[Array, "*tokens V"],
    labels: Int[Array | np.ndarray, "*tokens"],
    vocab_size: int,
    terms: LossConfig,
) -> Float32[Array, "*tokens"]:
    """Cross-entropy with label smoothing and z-loss; 0 where the label is ignored.

    With p = softmax(logits), Z its normaliser and V = vocab_size, a label y costs
    -(1 - label_smoothing) log p_y - label_smoothing / V sum_v log p_v + z_loss log(Z)^2.
    """
    losses, log_z = cross_entropy(logits, labels), jax.nn.logsumexp(logits, axis=-1)
    smoothing = terms.label_smoothing
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (log_z - logits[..., :vocab_size].mean(-1))
    if terms.z_loss:
        losses = losses + terms.z_loss * log_z**2
    return jnp.where(labels != IGNORED, losses, 0.0)


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
) -> Float[Array, "B L {config.state_dim}"] | None:
    """The initial state of a batch: the one given, or noise keyed by (key, sequence, position). None: the prelude's."""
    dtype = compute_dtype(params, config)
    if state is not None:
        return jnp.asarray(state, dtype)
    if config.loop.start == "embedding":
        return None
    key = typed_key(key)
    if batch.sequence_ids is not None:
        rows = key if key.ndim else key[None]
        rows = jnp.broadcast_to(rows, batch.tokens.shape[:1])
        key = jax.vmap(lambda k, ids: jax.vmap(lambda i: jax.random.fold_in(k, i))(ids))(rows, batch.sequence_ids)
    s = initial_state(key, batch.positions, config.state_dim, dtype, config.start_scale)
    return jnp.broadcast_to(s, (*batch.tokens.shape, config.state_dim))


class Depths(NamedTuple):
    """How deep a training step runs.

    n, k: recurrences without and with gradient. max_k: slots compiled for a traced k. rows: (n, k) of every row, int
    [B] each and none above n and k. Rows with fewer recurrences start later, so that all rows finish both phases
    together; the loss of each row is what it would be on its own.
    """

    n: Array | int
    k: Array | int
    max_k: int
    rows: tuple[Array, Array] | None = None


def token_losses(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    depths: Depths,
    state: Float[Array, "B L D"] | None,
    *,
    terms: LossConfig = LossConfig(),
    remat: Remat = "none",
    layout: Layout | None = None,
) -> Float32[Array, "B L"]:
    """Loss of every token after n + k recurrences; 0 where ignored.

    Args:
      params, config, batch: as in `loss`.
      depths: n and k.
      state: initial (`batch_state`); None: what the prelude returns.
      terms: what is added to the cross-entropy.
      remat: what the backward pass recomputes (`config.RecurrenceConfig.remat`).
      layout: how parameters are split over devices, inside `jax.shard_map`: `params` are shards. None: they are full.
    """
    (n, k, max_k, rows), flash = depths, layout is not None and layout.flash
    ctx = context(config, batch.positions, batch.segment_ids, flash=flash)._replace(training=True)

    def full(*names: str) -> Params:
        return params if layout is None else params | layout.full({name: params[name] for name in names})

    def outer(name: str, run: Block) -> Block:
        # Stored, activations and full weights of the prelude would stay in memory through all recurrences.
        run = run if layout is None else layout.block(name, run)
        return run if remat == "none" else jax.checkpoint(run)

    def inner(name: str, run: Block) -> Block:
        run = layout.block(name, run) if layout is not None and layout.gather == "each" else run
        return jax.checkpoint(run) if remat in ("layer", "offload") else run

    def real(x: Array) -> Array:
        # Without padding: whatever was there, such as NaN, would reach gradients of weights and of other tokens.
        seen = batch.segment_ids
        return x if seen is None else jnp.where(jnp.expand_dims(seen != 0, range(2, x.ndim)), x, 0)

    def valued(ctx: Context) -> Context:
        tables = full(*(f"values_{name}" for name in config.value_layers))
        ctx = with_values(tables, config, batch.tokens, ctx)
        return ctx._replace(values=ctx.values and {name: (gate, real(x)) for name, (gate, x) in ctx.values.items()})

    ctx = valued(ctx)
    core = {name: params[name] for name in core_names(config) if name in params}
    weights = (lambda: core) if layout is None else layout.for_recurrences(core)
    embedding = full("wte")
    e, _ = embed(embedding, config, real(vectors(embedding, config, batch.tokens)), ctx._replace(around=outer))
    injected = inject(weights(), config, e)
    start = begin(params, config, e) if state is None else real(state)

    def step(s: Array, i: Array) -> Array:
        new, _ = core_step(weights(), config, s, injected, ctx._replace(around=inner, later=n + k - 1 - i))
        if rows is None:
            return new
        running = jnp.where(i < n, i >= n - rows[0], i - n >= k - rows[1])
        return jnp.where(running[:, None, None], new, s)

    vocabulary = full("wte" if config.tie_embeddings else "head")
    behind = full(*(["C"] if config.loop.linear_bridge else []))

    def latent(s: Array) -> Array:
        return coda(behind, config, s, ctx._replace(around=outer))[0][0]

    outside = start_teacher(params, config, batch, state, terms, layout) if terms.teacher == "start" else None

    def read(s: Array) -> Array:
        return head_losses(vocabulary, config, latent(s), batch.labels, terms, outside)

    def every_state() -> Array:
        slots = k if isinstance(k, int) else max_k
        if (isinstance(n, int) and n) or slots < max(terms.depths, default=1):
            asked = f"loss.depths = {terms.depths}" if terms.depths else f"loss.gate = {terms.gate!r}"
            raise InputError(f"steps = {(n, k)}: {asked} needs (0, k), all with gradient")
        return trajectory(recomputed(step, remat), start, slots)[1:]

    def several(states: Array) -> Array:
        if terms.teacher in ("none", "start"):
            return weighed(jax.lax.map(jax.checkpoint(read), states), terms)
        ys = jax.lax.map(jax.checkpoint(latent), states)
        at = 0 if terms.teacher == "first" else len(ys) - 1

        def taught(y: Array, share: Array) -> Array:
            return head_losses(vocabulary, config, y, batch.labels, terms, Teacher(vocabulary, ys[at], share))

        shares = jnp.full(len(ys), terms.teacher_share).at[at].set(0.0)  # nobody is taught by itself
        return weighed(jax.lax.map(lambda one: jax.checkpoint(taught)(*one), (ys, shares)), terms)

    def gated(states: Array) -> Array:
        gate = gate_logit(full("gate"), config, states if terms.gate == "exit" else jax.lax.stop_gradient(states))
        if gate is None:
            raise InputError(f"loss.gate = {terms.gate!r}: needs a model with an exit gate (loop.gate)")
        combine = exit_loss if terms.gate == "exit" else improvement_loss
        return combine(jax.lax.map(jax.checkpoint(read), states), gate, terms)

    if terms.depths:
        states = every_state()
        last, losses = states[-1], several(states[np.array(terms.depths) - 1])
    elif terms.gate != "none":
        states = every_state()
        last, losses = states[-1], gated(states)
    else:
        last = unroll(step, start, n, k, max_k, remat, learnt_start=config.loop.start == "embedding")
        losses = read(last)
    if terms.stability:
        plain = context(config, batch.positions, batch.segment_ids)  # no kernel whose backward pass is written out
        plain = valued(plain)._replace(around=inner)
        fed = jax.lax.stop_gradient(injected)
        radius = spectral_radius(lambda s: core_step(weights(), config, s, fed, plain)[0], last, RADIUS_ROUNDS)
        losses = (1 - terms.stability) * losses + terms.stability * radius[:, None]
    return losses if terms == LossConfig() else jnp.where(batch.labels != IGNORED, losses, 0.0)


def weighed(losses: Float32[Array, "T *tokens"], terms: LossConfig) -> Float32[Array, "*tokens"]:
    """Mean of the losses at `terms.depths`, by their weights."""
    weights = np.array(terms.depth_weights or [1.0] * len(losses), np.float32)
    return jnp.tensordot(weights / weights.sum(), losses, 1)


class Teacher(NamedTuple):
    """Whose predictions a student learns: the head, what it reads, and the share of the divergence in the loss."""

    vocabulary: Params
    y: Float[Array, "*tokens D"]
    share: Float32[Array, ""] | float


def start_teacher(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    state: Float[Array, "B L D"] | None,
    terms: LossConfig,
    layout: Layout | None,
) -> Teacher:
    """The weights that the run began from, `params["teacher"]`, after `terms.teacher_depth` recurrences.

    Raises:
      InputError: they are not there.
    """
    if "teacher" not in params:
        raise InputError("loss.teacher = 'start': needs params['teacher'], the weights that teach")
    own: Params = jax.lax.stop_gradient(params["teacher"])
    if layout is not None:
        layout = dataclasses.replace(layout, tune=TuneConfig())  # which has no low-rank pairs

    def full(*names: str) -> Params:
        return own if layout is None else own | layout.full({name: own[name] for name in names})

    ctx = context(config, batch.positions, batch.segment_ids, flash=layout is not None and layout.flash)
    values = full(*[f"values_{name}" for name in config.value_layers])
    ctx = with_values(values, config, batch.tokens, ctx)._replace(around=None if layout is None else layout.block)
    core = full(*[name for name in core_names(config) if name in own and not name.startswith("core_")])
    e, _ = embed(full("wte"), config, batch.tokens, ctx)
    injected = inject(core, config, e)
    s = begin(own, config, e) if state is None else state
    s = jax.lax.fori_loop(0, terms.teacher_depth, lambda _, s: core_step(core, config, s, injected, ctx)[0], s)
    (y, _), _ = coda(full(*(["C"] if config.loop.linear_bridge else [])), config, s, ctx)
    return Teacher(full("wte" if config.tie_embeddings else "head"), jax.lax.stop_gradient(y), terms.teacher_share)


def divergence(
    teacher: Float32[Array, "*tokens V"], student: Float32[Array, "*tokens V"], temperature: float
) -> Float32[Array, "*tokens"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), without a gradient to the teacher."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def exit_loss(
    losses: Float32[Array, "T *tokens"], gate: Float32[Array, "T *tokens"], terms: LossConfig
) -> Float32[Array, "*tokens"]:
    """sum_t p_t loss_t - gate_entropy H(p), with p_t the probability that the gate stops after recurrence t.

    Stage I of arXiv 2510.25741 (equation 3). gate: its logits.
    """
    p = exit_probabilities(gate)
    return (p * losses + terms.gate_entropy * jax.scipy.special.xlogy(p, p)).sum(0)


def improvement_loss(
    losses: Float32[Array, "T *tokens"], gate: Float32[Array, "T *tokens"], terms: LossConfig
) -> Float32[Array, "*tokens"]:
    """Cross-entropy of the gate against whether recurrence t still lowered the loss, over t = 2 .. T and divided by T.

    Only the gate gets a gradient. Stage II of arXiv 2510.25741.
    """
    wish, stop = wish_to_continue(jax.lax.stop_gradient(losses)), gate[1:]
    return (wish * jax.nn.softplus(stop) + (1 - wish) * jax.nn.softplus(-stop)).sum(0) / len(losses)


def wish_to_continue(losses: Float32[Array, "T *tokens"]) -> Float32[Array, "T-1 *tokens"]:
    """sigmoid(50 (max(0, loss_{t-1} - loss_t) - 0.005)), for t = 2 .. T (arXiv 2510.25741)."""
    return jax.nn.sigmoid(50 * (jnp.maximum(losses[:-1] - losses[1:], 0) - 0.005))


RADIUS_ROUNDS = 4
"""Power iterations of the stability penalty; each costs about a recurrence without gradient."""

LOGITS_AT_ONCE = 2**26
"""Maximum number of logits held at a time in training (256 MiB); larger sets are computed, and recomputed, in parts."""


def head_losses(
    params: Params,
    config: ModelConfig,
    y: Float[Array, "B L D"],
    labels: Int[Array, "B L"],
    terms: LossConfig = LossConfig(),
    teacher: Teacher | None = None,
) -> Float32[Array, "B L"]:
    """Losses of y, never more than about `LOGITS_AT_ONCE` logits of it held at once."""

    def losses_of(y: Array, labels: Array, guide: Array | None) -> Array:
        logits = head(params, config, y)
        if terms == LossConfig():
            return cross_entropy(logits, labels)
        losses = training_loss(logits, labels, config.vocab_size, terms)
        if teacher is None or guide is None:
            return losses
        guided = known(config, jax.lax.stop_gradient(head(teacher.vocabulary, config, guide)))
        apart = divergence(guided, known(config, logits), terms.temperature)
        return jnp.where(labels != IGNORED, (1 - teacher.share) * losses + teacher.share * apart, 0.0)

    guide = None if teacher is None else teacher.y
    tokens = labels.size
    parts = -(-tokens * config.rows // LOGITS_AT_ONCE)
    if parts <= 1:
        return losses_of(y, labels, guide)
    size = -(-tokens // parts)
    padding = size * parts - tokens

    def split(y: Array) -> Array:
        return jnp.pad(y.reshape(tokens, -1), ((0, padding), (0, 0))).reshape(parts, size, -1)

    wanted = jnp.pad(labels.reshape(-1), (0, padding), constant_values=IGNORED).reshape(parts, size)
    every = split(y), wanted, None if guide is None else split(guide)
    losses = jax.lax.map(lambda part_of: jax.checkpoint(losses_of)(*part_of), every)
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
    remat: Remat = "none",
    terms: LossConfig = LossConfig(),
) -> Float32[Array, ""]:
    """Mean cross-entropy over the scored labels of the batch (docs/semantics.md, Forward and loss), and `terms`.

    Args:
      params, config: the model.
      batch: int [B, L+1] or a dict; see `as_batch`.
      steps: r or (n, k): n recurrences without gradient, k with. With k = 0 the gradients of prelude, adapter and
        core are exact zeros.
      state: initial state; wins over `key`.
      key: one key, or one per row.
      max_k: slots compiled for a traced k (default backprop_depth).
      remat: see `token_losses`.
      terms: z-loss, label smoothing, several depths with or without a teacher, and the objectives of an exit gate;
        off by default.
    """
    batch = as_batch(batch)
    check_ids("batch: tokens", batch.tokens, config)
    if not isinstance(batch.labels, jax.core.Tracer):
        check_ids(f"batch: labels (ignored ones are {IGNORED})", batch.labels[batch.labels != IGNORED], config)
    depths = Depths(*split_steps(steps, config), config.backprop_depth if max_k is None else max_k)
    start = batch_state(params, config, batch, state, key)
    losses = token_losses(params, config, batch, depths, start, terms=terms, remat=remat)
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
    bound = bind_batch(params, config, batch, key, flash)

    def read(s: Array) -> tuple[Array, Array]:
        logits, _ = bound.read(s)
        return cross_entropy(logits, batch.labels), is_likeliest(logits, batch.labels)

    return checkpoints(bound.step, bound.s0, depths, read)


def bind_batch(params: Params, config: ModelConfig, batch: Batch, key: Array | None, flash: bool = False) -> Bound:
    """The model bound to a batch: initial states as in `loss`, and no test-time noise. flash: as in `token_losses`."""
    segments = batch.segment_ids
    valid = jnp.ones(batch.tokens.shape, bool) if segments is None else segments != 0
    text = Text(batch.tokens, batch.positions, valid, context(config, batch.positions, segments, flash=flash))
    return bind_text(params, config, text, Start(batch_state(params, config, batch, None, key)))
