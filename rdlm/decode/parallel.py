"""The parallel sampler: a window of unfinished tokens per prompt, refined together (docs/parallel.md, 2510.14961).

Ordinary decoding gives one position r recurrences, then begins the next. Here every outer step gives `inner`
recurrences to all positions of the window, draws the token after each of them again, and lets new positions enter
behind. Positions that are done leave at the front: their keys and values go to the cache, and the tokens they gave are
final. The front of the window always stands on a final token.

A window has a static size. Its arrays move along with it, so offset 0 is the front; rows differ in how many of the
offsets they use. Nothing of a row depends on another.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Int32, PyTree

from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig, Parallel
from rdlm.decode.loop import Made, Progress, extend, request_start, token_keys
from rdlm.decode.passes import continuation
from rdlm.decode.program import fetched, program
from rdlm.decode.requests import Request, RequestOptions, WarmStart, check_unadjusted
from rdlm.decode.sampling import choose, finite
from rdlm.exits import ExitRule, Observation
from rdlm.model import Params, Text, check_depth, compute_dtype, known
from rdlm.model.cache import KeyValue, NewKV, append, stored, stored_dtype, zeros
from rdlm.model.network import begin, coda, core_step, embed, gate_logit, head, inject, with_values

ONE_SET = CachePolicy(recurrences=1)
"""Positions of a window stand at different recurrences, so a query cannot ask for those of its own number."""
MAX_OUTER_STEPS = 4096
"""After which a row with freeze = "last" is given up; "prefix" is bound to end."""
_NOISE, _FILLER = 0x776E6F69, 0x66696C6C  # separate their randomness from that of tokens and initial states


@dataclasses.dataclass(frozen=True)
class ParallelUsage:
    """What the parallel sampler spent after the first token of each prompt; arrays are int32, one value per prompt."""

    outer_steps: np.ndarray
    tokens_forward: np.ndarray  # recurrences of single positions, the unused rest of the window not counted
    standing_waves: np.ndarray  # outer steps after which the window had no room for all of `headway`
    frozen: list[np.ndarray]  # per prompt, tokens that each outer step made final


class Window(NamedTuple):
    """W positions of each row behind those in the cache."""

    tokens: Array  # int32 [B, W], the first is final and the others are guesses
    size: Array  # int32 [B], offsets in use
    states: Array  # [B, W, state_dim]
    embedded: Array | None  # [B, W, D], average of the prelude's outputs, if there is one
    ran: Array  # int32 [B, W], recurrences since a position entered; 0: it enters now
    settled: Array  # int32 [B, W], recurrences since its token changed
    rule: PyTree  # state of the rule
    outer_steps: Array  # int32 [B]
    tokens_forward: Array  # int32 [B]
    standing_waves: Array  # int32 [B]
    frozen_at: Array  # int32 [B, N], the outer step that made each token final


class Wave(NamedTuple):
    """State of the sampler."""

    progress: Progress
    window: Window


def with_rule(config: ModelConfig, parallel: Parallel, options: RequestOptions) -> RequestOptions:
    """The options with the sampler's own rule, unless they have one; the prompt does not stop by it.

    Raises:
      InputError: two rules, or a threshold that the rule cannot have.
    """
    if options.exit_rule is not None:
        if (parallel.rule, parallel.threshold) != (None, None):
            raise InputError("exit_rule: parallel has a rule or threshold of its own; leave one of them out")
        return options
    if parallel.rule == "fixed":
        num_steps = config.mean_recurrence if options.num_steps is None else options.num_steps
        check_depth(num_steps)
        rule: ExitRule = exits.fixed(np.asarray(num_steps) if parallel.threshold is None else parallel.threshold)
    else:
        rule = exits.named(parallel.rule or "latent_diff", parallel.threshold)
    return dataclasses.replace(options, exit_rule=rule, prefill_exit="never")


def check_parallel(
    config: ModelConfig, parallel: Parallel, policy: CachePolicy, options: RequestOptions, num_steps: np.ndarray
) -> None:
    """Refuse what the sampler cannot serve, of options that are fine otherwise.

    Raises:
      InputError: a cache of several recurrences, penalties, or a rule that cannot be asked every `inner` recurrences.
    """
    sampling, rule, inner, min_steps = options.sampling, options.exit_rule, parallel.inner, int(np.min(num_steps))
    if policy.recurrences not in (None, 1) or policy.lookup != "latest":
        raise InputError(f"parallel: keeps one recurrence per token, not {policy}; use CachePolicy(recurrences=1)")
    if inner > min_steps:
        raise InputError(f"Parallel.inner = {inner}: must be at most num_steps = {min_steps}")
    if options.warm_start == "normalized":
        raise InputError("warm_start = 'normalized': with parallel, states are passed on as they are: use 'raw'")
    if np.any(np.asarray(options.check_every) != 1):
        raise InputError(f"check_every = {options.check_every!r}: parallel asks its rule every Parallel.inner")
    if rule is not None and (rule.gated or (rule.every_check and inner > 1)):
        raise InputError(f"exit_rule: {rule.kind} cannot be asked every {inner} recurrences; use latent_diff")
    if config.test_time_noise:
        raise InputError("parallel: cannot be combined with the model's test_time_noise; use Parallel.noise")
    check_unadjusted("parallel", sampling)
    if np.any(np.asarray(sampling.repetition_penalty) != 1):
        raise InputError("parallel: cannot be combined with Sampling.repetition_penalty; leave one of them out")


@program("config", "parallel")
def open_window(params: Params, config: ModelConfig, progress: Progress, request: Request, parallel: Parallel) -> Wave:
    """The window behind a prefill: one position, that of the first new token."""
    shape = (len(progress.token), parallel.window)
    dtype, numbers, row = compute_dtype(params, config), jnp.zeros(shape, jnp.int32), jnp.zeros(shape[0], jnp.int32)
    states = jnp.zeros((*shape, config.state_dim), dtype)
    window = Window(
        tokens=numbers.at[:, 0].set(progress.token),
        size=row + 1,
        states=states,
        embedded=jnp.zeros((*shape, config.embed_dim), dtype) if parallel.ema else None,
        ran=numbers,
        settled=numbers,
        rule=_rule(request).init(states, config.vocab_size),
        outer_steps=row,
        tokens_forward=row,
        standing_waves=row,
        frozen_at=jnp.zeros_like(progress.tokens),
    )
    return Wave(progress, window)


@program("config", "parallel", "warm_start", donate="wave")
def advance(
    params: Params,
    config: ModelConfig,
    wave: Wave,
    request: Request,
    limit: Int[Array, ""],
    max_tokens: Int[Array, ""],
    parallel: Parallel,
    warm_start: WarmStart,
) -> Wave:
    """Outer steps until every row is done or has at least `limit` tokens, never over `max_tokens`."""
    step = _OuterStep(params, config, request, parallel, bool(warm_start))

    def unfinished(wave: Wave) -> Array:
        p, w = wave
        behind = ~p.done & (p.count < limit)
        return jnp.any(behind if parallel.freeze == "prefix" else behind & (w.outer_steps < MAX_OUTER_STEPS))

    return lax.while_loop(unfinished, lambda wave: step(wave, max_tokens), wave)


def require_progress(wave: Wave, parallel: Parallel) -> None:
    """Refuse to go on with a row that `advance` gave up."""
    p, w = wave
    done, outer_steps, count = fetched((p.done, w.outer_steps, p.count))
    given_up = ~done & (outer_steps >= MAX_OUTER_STEPS)
    for row in np.flatnonzero(given_up if parallel.freeze == "last" else []):
        raise InputError(
            f"Parallel.freeze = 'last': {MAX_OUTER_STEPS} outer steps gave prompts[{row}] only {int(count[row])} "
            "tokens; raise Parallel.threshold, or use 'prefix', which always ends"
        )


def usage(window: Window, count: Int[np.ndarray, "B"]) -> ParallelUsage:
    """The counters of the first rows, which have `count` tokens each, the first of them from the prefill."""
    counters = window.outer_steps, window.tokens_forward, window.standing_waves, window.frozen_at
    steps, forward, waves, at = (x[: len(count)] for x in fetched(counters))
    frozen = [np.bincount(row[1:n], minlength=k).astype(np.int32) for row, n, k in zip(at, count, steps, strict=True)]
    return ParallelUsage(steps, forward, waves, frozen)


def _rule(request: Request) -> ExitRule:
    assert request.depth.rule is not None
    return request.depth.rule


@dataclasses.dataclass(frozen=True)
class _OuterStep:
    """One outer step of all rows that are not done."""

    params: Params
    config: ModelConfig
    request: Request
    parallel: Parallel
    warm: bool

    @property
    def offsets(self) -> Int32[Array, "1 W"]:
        """0 .. W - 1."""
        return jnp.arange(self.parallel.window)[None]

    def __call__(self, wave: Wave, max_tokens: Int[Array, ""]) -> Wave:
        """The wave after it."""
        p, w = wave
        w = w._replace(size=jnp.where(p.done, 0, w.size))
        text = continuation(self.config, p.cache, w.tokens, w.size)
        text = text._replace(context=with_values(self.params, self.config, text.tokens, text.context))
        w, logits, new_kv = self.refine(p, w, text)
        # A token is always drawn with the same key: it changes only where its distribution does.
        drawn = jax.vmap(lambda x, j: self.draw(p, x, j), (1, 0), 1)(logits, self.offsets[0])
        w, frozen = self.check(w, logits, drawn)
        cache = append(p.cache, new_kv, w.ran, jnp.int32(self.parallel.inner), p.cache.length, frozen)
        longer = extend(p, self.request, Made(drawn, logits, w.ran), frozen, max_tokens)
        rows, new = jnp.arange(len(drawn))[:, None], self.offsets < (longer.count - p.count)[:, None]
        slots = jnp.where(new, p.count[:, None] + self.offsets, p.tokens.shape[1])
        w = w._replace(
            outer_steps=w.outer_steps + ~p.done,
            tokens_forward=w.tokens_forward + w.size * self.parallel.inner,
            frozen_at=w.frozen_at.at[rows, slots].set(w.outer_steps[:, None], mode="drop"),
        )
        longer = longer._replace(cache=cache, passes=p.passes + self.parallel.inner)
        return Wave(longer, self.slide(w, text, drawn, frozen))

    def refine(self, p: Progress, w: Window, text: Text) -> tuple[Window, Float[Array, "B W V"], NewKV]:
        """`inner` recurrences of the window, and what they read: (window, logits, keys and values)."""
        params, config, ctx, ema = self.params, self.config, text.context, self.parallel.ema
        e, prelude_kv = embed(params, config, text.tokens, ctx, stored(p.cache.prelude))
        if w.embedded is not None:
            e = (1 - ema) * e + ema * w.embedded
            w = w._replace(embedded=e)
        s, rule = self.entered(w, text, e)
        injected, cached_kv = inject(params, config, e), stored(p.cache.core, jnp.int32(0))

        def recur(_: Array, carry: tuple[Array, tuple[KeyValue, ...]]) -> tuple[Array, tuple[KeyValue, ...]]:
            return core_step(params, config, carry[0], injected, ctx, cached_kv)

        dtype = stored_dtype(p.cache.policy, e.dtype)
        no_kv = tuple(zeros(config, text.tokens.shape, dtype) for _ in range(config.core_calls))
        with jax.named_scope("recurrence_window"):
            s, core_kv = lax.fori_loop(0, self.parallel.inner, recur, (s, no_kv))
        (y, _), coda_kv = coda(params, config, s, ctx, stored(p.cache.coda))
        new_kv = NewKV(prelude_kv, jax.tree.map(lambda x: x[None], core_kv), coda_kv)
        return w._replace(states=s, rule=rule), known(config, head(params, config, y)), new_kv

    def entered(self, w: Window, text: Text, e: Float[Array, "B W D"]) -> tuple[Float[Array, "B W S"], PyTree]:
        """(States at the start of the outer step: those of new positions made, noise mixed in; state of the rule)."""
        parallel, fresh = self.parallel, w.ran == 0
        start = self.start(text, e, self.request)
        if self.warm:  # the published code's continuous compute
            behind = jnp.roll(w.states, parallel.headway, axis=1)
            start = jnp.where((self.offsets >= parallel.headway)[..., None], behind, start)
        s = jnp.where(fresh[..., None], start, w.states)
        rule = exits.seen_only(fresh, _rule(self.request).init(s, self.config.vocab_size), w.rule)
        if parallel.noise:
            keys = jax.vmap(lambda k, i: jax.random.fold_in(jax.random.fold_in(k, _NOISE), i))
            noise = self.start(text, e, self.request._replace(keys=keys(self.request.keys, w.outer_steps)))
            share = parallel.noise / (1.0 + (w.ran if parallel.schedule == "damped" else jnp.zeros_like(w.ran)))
            s = ((1 - share[..., None]) * s + share[..., None] * noise).astype(s.dtype)
        return s, rule

    def start(self, text: Text, e: Float[Array, "B W D"], request: Request) -> Float[Array, "B W S"]:
        """Initial states, as in ordinary decoding."""
        made = request_start(self.params, self.config, text, request).s
        return begin(self.params, self.config, e) if made is None else made

    def draw(self, p: Progress, logits: Float[Array, "B V"], j: Int[Array, ""]) -> Int32[Array, "B"]:
        """The token after offset j of every row."""
        return choose(logits, p.present, self.request.sampling, token_keys(self.request, p.count + j))

    def check(
        self, w: Window, logits: Float[Array, "B W V"], drawn: Int[Array, "B W"]
    ) -> tuple[Window, Int32[Array, "B"]]:
        """(The window after its rule was asked, how many positions leave at the front)."""
        config, rule, depth = self.config, _rule(self.request), self.request.depth.per_token(drawn.shape)
        ran = w.ran + self.parallel.inner
        same = self.from_front(w, drawn)[:, :-1] == w.tokens
        settled = jnp.where(same, w.settled + self.parallel.inner, 0)
        seen = Observation(
            w.states, logits if rule.needs_logits else None, ran, gate_logit(self.params, config, w.states)
        )
        state, value = exits.update(rule, w.rule, seen)
        in_use = self.offsets < w.size[:, None]
        done = exits.exits(rule, value) & (ran > depth.min_steps) & in_use
        if self.parallel.freeze == "last":
            frozen = jnp.max(jnp.where(done, self.offsets, 0), axis=1)
            # Without finite logits a position is never done. When nothing else can leave, it ends its prompt.
            broken = ~finite(logits[:, :2]) & in_use[:, :2]
            frozen = jnp.maximum(frozen, jnp.max(jnp.where(broken, self.offsets[:, :2] + 1, 0), axis=1))
        else:  # never a position that thought about another token than the one it has now
            done = (done | (settled >= depth.num_steps)) & (settled > 0) & in_use
            frozen = jnp.cumprod(done.astype(jnp.int32), axis=1).sum(1)
        return w._replace(ran=ran, settled=settled, rule=state), frozen

    def from_front(self, w: Window, drawn: Int[Array, "B W"]) -> Int32[Array, "B W+1"]:
        """The tokens from the front of the window on, as they are now."""
        return jnp.concatenate([w.tokens[:, :1], drawn], axis=1)

    def slide(self, w: Window, text: Text, drawn: Int[Array, "B W"], frozen: Int[Array, "B"]) -> Window:
        """The window without its first `frozen` positions, and with new ones at its end."""
        W, headway = self.parallel.window, self.parallel.headway
        room = W + (frozen if self.parallel.freeze == "prefix" else 0)
        source = self.offsets + frozen[:, None]  # where each position stands before it moves
        kept = source < w.size[:, None]
        rows = jnp.arange(len(drawn))[:, None]

        def moved(x: Array) -> Array:
            return x[rows, jnp.minimum(source, W - 1)]

        tokens = self.from_front(w, drawn)[rows, jnp.minimum(source, W)]
        if headway > 1:  # nobody has a guess yet of what follows the first new position
            tokens = jnp.where(source <= w.size[:, None], tokens, self.fillers(text.positions[:, :1] + source))
        return w._replace(
            tokens=tokens,
            size=jnp.minimum(w.size + headway, room) - frozen,
            states=moved(w.states),
            embedded=None if w.embedded is None else jnp.where(kept[..., None], moved(w.embedded), 0),
            ran=jnp.where(kept, moved(w.ran), 0),
            settled=jnp.where(kept, moved(w.settled), 0),
            rule=jax.tree.map(moved, w.rule),
            standing_waves=w.standing_waves + ((w.size > 0) & (w.size + headway > room)),
        )

    def fillers(self, positions: Int[Array, "B W"]) -> Int32[Array, "B W"]:
        """Random tokens."""

        def one(key: Array, position: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(key, _FILLER), position)
            return jax.random.randint(key, (), 0, self.config.vocab_size)

        return jax.vmap(jax.vmap(one, (None, 0)))(self.request.keys, positions)
