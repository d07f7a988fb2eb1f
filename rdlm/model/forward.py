"""`bind`: the recurrence over one text as a function of the state. `forward`: the whole model at any depth."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig
from rdlm.exits import Counts, Depth, ExitRule, Observation
from rdlm.model.adaptive import adaptive_pass
from rdlm.model.cache import allocate
from rdlm.model.inputs import (
    NumSteps,
    Start,
    Text,
    Tokens,
    check_type,
    depth_from,
    split_steps,
    start_from,
    text_from,
)
from rdlm.model.network import Params, begin, compute_dtype, core_step, embed, gate_logit, inject, readout, with_values
from rdlm.model.noise import noisy
from rdlm.recurrence import unroll
from rdlm.runtime.memory import require_memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What `forward` returns."""

    logits: Array  # f32 [B, L, V]
    latents: Array  # [B, L, D], what the coda reads: after what stands between core and coda
    steps: Array  # int32 [B, L], recurrences each token ran
    state: Array  # [B, L, state_dim], the latent state after the last recurrence
    checks: Array | None = None  # int32 [B, L], how often the exit rule read a token's logits; None if not counted


@dataclasses.dataclass(frozen=True)
class Bound:
    """A model bound to one text: drivers such as `rdlm.recurrence.unroll` take `step` and `s0`."""

    params: Params
    config: ModelConfig
    text: Text
    s0: Array  # [B, L, state_dim]
    injected: Array  # [B, L, D], what of the injection is the same in all recurrences
    key: Array | None  # of the test-time noise
    total: Array | int | None = None  # recurrences that will run, where gradients depend on it (`Context.later`)

    def step(self, s: Array, i: Array | int) -> Array:
        """Recurrence i (from 0): state -> state, test-time noise included."""
        later = None if self.total is None else self.total - 1 - i
        context = self.text.context._replace(later=later)
        return core_step(self.params, self.config, self.noisy(s, i), self.injected, context)[0]

    def noisy(self, s: Array, i: Array | int) -> Array:
        """The state as it enters recurrence i."""
        return s if self.key is None else noisy(self.params, self.config, s, i, self.key, self.text.positions)

    def read(self, s: Array) -> tuple[Array, Array]:
        """Logits f32 [B, L, V] and latents [B, L, D] of a state."""
        return readout(self.params, self.config, s, self.text.context)


def bind_text(params: Params, config: ModelConfig, text: Text, start: Start) -> Bound:
    """As `bind`, for arguments that have been checked."""
    text = text._replace(context=with_values(params, config, text.tokens, text.context))
    e, _ = embed(params, config, text.tokens, text.context)
    s0 = begin(params, config, e) if start.s is None else start.s
    return Bound(params, config, text, s0, inject(params, config, e), start.key)


def bind(
    params: Params,
    config: ModelConfig,
    tokens: Tokens,
    *,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
) -> Bound:
    """Bind a model to a text. `unroll(bound.step, bound.s0, n, k)` runs it, `bound.read` gives logits and latents.

    Arguments as in `forward`; raises as it does.
    """
    text = text_from(config, tokens, segment_ids, positions)
    return bind_text(params, config, text, start_from(params, config, text, key, state))


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Tokens,
    num_steps: NumSteps = None,
    *,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    prefix: ArrayLike | None = None,
    exit_rule: ExitRule | None = None,
    min_steps: Counts = 0,
    check_every: Counts = 1,
    cache: CachePolicy = CachePolicy(),
    select: bool = False,
) -> Output:
    """Logits and latents of whole sequences (docs/semantics.md, Forward and loss).

    jit-able with `config` and `cache` static.

    Args:
      params, config: the model.
      tokens: int [B, L].
      num_steps: None = config.mean_recurrence; r = r recurrences without gradient into prelude and core; (n, k) = n
        without, then k with gradient (a traced k is at most backprop_depth). With an exit rule, or given as an array
        [B] or [B, L], the maximum per row or token.
      state: [B, L, config.state_dim] initial state; wins over `key`.
      key: one key (the same noise in every row) or keys [B]; None is `jax.random.key(0)`.
      segment_ids: int [B, L]; tokens attend within their segment, 0 is padding.
      positions: int [L] or [B, L]; default: restart at 0 in each segment.
      prefix: int [] or [B], tokens at the start of each row that see each other in both directions; only models with
        `prefix_attention`.
      exit_rule, min_steps, check_every: stop each token on its own; checks happen after recurrences min_steps + 1,
        min_steps + 1 + check_every, ... One parallel pass, see `rdlm.model.adaptive`.
      cache: which sets of keys and values later tokens see of ones that stopped, which matters only with exits; and
        their `dtype`. Rounded ones have no gradient.
      select: all tokens run all recurrences, and the rule only chooses which state of each is read. For comparison
        with models whose own code does that; the rule must not read logits.

    Raises:
      InputError: wrong shapes, ids out of range, a depth below 1.
    """
    text = text_from(config, tokens, segment_ids, positions, prefix)
    check_type("cache", cache, CachePolicy)
    text = text._replace(context=text.context._replace(rounded=cache.dtype is not None))
    B, L = text.tokens.shape
    if not isinstance(text.tokens, jax.core.Tracer):
        require_memory(f"logits of {B} x {L} tokens", 4 * B * L * config.rows, "give fewer rows at a time")
    start = start_from(params, config, text, key, state)
    per_token = isinstance(num_steps, (np.ndarray, Array)) and num_steps.ndim > 0
    if select and (exit_rule is None or exit_rule.needs_logits):
        raise InputError("select: needs an exit_rule that reads no logits, such as exits.gate or exits.latent_diff")
    if exit_rule is None and not per_token:
        depth_from((B, L), 1, None, min_steps, check_every)
        n, k = split_steps(num_steps, config)
        bound = dataclasses.replace(bind_text(params, config, text, start), total=n + k)
        learnt = config.loop.start == "embedding"
        s = unroll(bound.step, bound.s0, n, k, max_k=config.backprop_depth, learnt_start=learnt)
        return Output(*bound.read(s), jnp.where(text.valid, jnp.asarray(n + k, jnp.int32), 0), s)
    if isinstance(num_steps, (tuple, list)):
        raise InputError("num_steps: an exit rule takes a number of recurrences, not a pair (n, k)")
    max_steps = config.mean_recurrence if num_steps is None else num_steps
    depth = depth_from((B, L), max_steps, exit_rule, min_steps, check_every)
    if select:
        assert exit_rule is not None
        bound = bind_text(params, config, text, start)
        s, steps = _selected(bound, depth.per_token(text.tokens.shape), exit_rule)
        return Output(*bound.read(s), jnp.where(text.valid, steps, 0), s)
    # Without a limit on sets, "latest" reads a stopped token at its deepest set: one set is enough.
    empty = allocate(config, cache, cache.recurrences or 1, B, 0, compute_dtype(params, config))
    done = adaptive_pass(params, config, text, start, depth, empty)
    return Output(done.logits, done.latents, done.steps, done.state, done.checks)


def _selected(bound: Bound, depth: Depth, rule: ExitRule) -> tuple[Array, Array]:
    """(Of every token the state [B, L, D] at which `rule` exits, its recurrences); no state is frozen meanwhile."""
    params, config = bound.params, bound.config

    def step(carry: tuple[Array, Array, Array, Array, PyTree], i: Array) -> tuple[Array, Array, Array, Array, PyTree]:
        s, chosen, steps, active, state = carry
        s = bound.step(s, i)
        due = active & depth.due(i + 1)
        new, value = exits.update(rule, state, Observation(s, None, i + 1, gate_logit(params, config, s)))
        chosen, steps = jnp.where(active[..., None], s, chosen), steps + active
        stop = due & exits.exits(rule, value) | (steps >= depth.num_steps)
        return s, chosen, steps, active & ~stop, exits.seen_only(due, new, state)

    shape = bound.text.tokens.shape
    s, state = bound.s0, rule.init(bound.s0, config.vocab_size)
    begin = s, s, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), state
    last = jax.lax.fori_loop(0, jnp.max(depth.num_steps), lambda i, carry: step(carry, i), begin)
    return last[1], last[2]
