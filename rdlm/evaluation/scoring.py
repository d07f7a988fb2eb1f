"""Log-likelihoods of continuations, at every depth from one unroll or with an exit rule.

Questions and lm-eval's likelihood requests both use this: pairs of token ids in, log-likelihoods out. Requests of
similar lengths share a batch, and batches share a few compiled shapes. Requests whose inputs are equal share a row:
those that differ only in their last token, such as the letters A, B, C, D after one question.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import InputError, ModelConfig, require
from rdlm.config.model import is_count
from rdlm.exits import ExitRule
from rdlm.model import Params, bind_text, check_ids, check_rule, coda, forward, head, known, start_from, text_from
from rdlm.recurrence import check_depths, checkpoints

Pair = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Context and continuation, token ids; neither is empty."""

_MAX_LOGITS = 2**28  # elements of a batch's logits if a rule reads all of them: 1 GiB in f32


class Scores(NamedTuple):
    """What `score` returns, for N pairs at R depths (R = 1 with an exit rule).

    log_likelihood f64 [R, N]: of the continuation, in nats. greedy bool [R, N]: every token of it is the likeliest.
    length int [N]: input tokens. recurrences f64 [R, N]: their mean recurrences. checks f64 [N]: mean number of times
    the exit rule read the logits of one. steps: with an exit rule, the recurrences of each, int32 [length] per pair.
    """

    log_likelihood: np.ndarray
    greedy: np.ndarray
    recurrences: np.ndarray
    checks: np.ndarray
    length: np.ndarray
    steps: list[np.ndarray] | None


def score(
    params: Params,
    config: ModelConfig,
    pairs: Sequence[Pair],
    depths: Sequence[int],
    *,
    exit_rule: ExitRule | None = None,
    init_scale: float = 1.0,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Log-likelihoods of continuations, all depths from one unroll to the deepest.

    The logits are those of `rdlm.forward` over the context and the continuation without its last token. If these are
    more than config.max_length, the context is cut on the left (`cut_pair` keeps its begin token). The initial state
    depends on the position alone, so all choices of a question have the same.

    Args:
      params, config: the model.
      pairs: contexts and continuations.
      depths: increasing recurrences; with an exit rule one number, the maximum of a token.
      exit_rule: stops every token on its own, in one parallel pass.
      init_scale: of the initial state; 0.0 is the zero state.
      tokens_per_batch: padding included. More takes more memory and is faster on a TPU.
      progress: called with the number of finished pairs.

    Raises:
      InputError: no pairs, an empty side, ids out of range, a continuation longer than the model reads, wrong depths,
        or logits that are not finite.
    """
    depths = check_depths(depths)
    check_rule(exit_rule, 1)
    if exit_rule is not None and len(depths) != 1:
        raise InputError(f"depths = {depths}: an exit rule takes one, the maximum recurrences")
    require(is_count(tokens_per_batch), "tokens_per_batch", tokens_per_batch, "must be a whole number, at least 1")
    scaled = isinstance(init_scale, numbers.Real) and 0 <= init_scale < 1e30
    require(scaled, "init_scale", init_scale, "must be a finite number, not negative")
    init_scale = float(init_scale)
    rows = _rows(pairs, config)
    if exit_rule is not None:
        tokens_per_batch = min(tokens_per_batch, max(1, _MAX_LOGITS // config.rows))
    R, N, done = len(depths), len(pairs), 0
    steps = None if exit_rule is None else [np.zeros(0, np.int32)] * N
    out = Scores(np.zeros((R, N)), np.zeros((R, N), bool), np.zeros((R, N)), np.zeros(N), np.zeros(N, int), steps)
    for batch in _batches(rows, config, tokens_per_batch):
        if exit_rule is None:
            found = _by_depth(params, config, batch.arrays, depths, init_scale)
            _fill(out, batch.rows, depths, found)
        else:
            found, *effort = _by_exit(params, config, batch.arrays, exit_rule, jnp.int32(depths[0]), init_scale)
            _fill(out, batch.rows, depths, found, *map(np.asarray, effort))
        done += sum(len(row.pairs) for row in batch.rows)
        progress(done)
    lost = np.argwhere(np.isnan(out.log_likelihood))
    if len(lost):
        row, i = lost[0].tolist()
        at = f"r = {depths[row]}" if exit_rule is None else f"exit rule {exit_rule.kind}"
        raise InputError(f"pairs[{i}]: the logits are not finite at {at} (in all: {len(lost)} of {R * N} scores)")
    return out


def is_cut(pair: Pair, config: ModelConfig) -> bool:
    """Whether `score` has to cut the context of this pair."""
    return sum(map(len, pair)) > config.max_length + 1


def cut_pair(pair: Pair, config: ModelConfig, begin: int) -> Pair:
    """The pair as the model can read it, its context cut on the left as by `cut_left`."""
    room = config.max_length + 1 - len(pair[1])
    return (cut_left(np.asarray(pair[0], np.int32), room, begin), pair[1]) if room > 0 else pair


def cut_left(tokens: np.ndarray, room: int, begin: int) -> np.ndarray:
    """The last `room` tokens, the first of them the begin token if `tokens` starts with it."""
    if len(tokens) <= room:
        return tokens
    if tokens[0] != begin or room < 2:
        return tokens[-room:]
    return np.concatenate([tokens[:1], tokens[-(room - 1) :]])


@dataclasses.dataclass
class _Row:
    """One input, and the pairs that share it."""

    tokens: np.ndarray
    labels: list[np.ndarray]  # the continuations, all of one length
    pairs: list[int]  # their indices


class _Arrays(NamedTuple):
    """B rows of L tokens, with C scored positions and K continuations each.

    tokens int32 [B, L]; segment_ids int32 [B, L], 0 for padding; at int32 [B, C]: the scored positions, of which
    `scored` bool [B, C] are real; labels int32 [B, K, C].
    """

    tokens: Array
    segment_ids: Array
    at: Array
    labels: Array
    scored: Array


class _Batch(NamedTuple):
    rows: list[_Row]
    arrays: _Arrays


def _rows(pairs: Sequence[Pair], config: ModelConfig) -> list[_Row]:
    listed = isinstance(pairs, Sequence) and not isinstance(pairs, (str, bytes))
    require(listed, "pairs", pairs, "must be a list of pairs")
    if not pairs:
        raise InputError("pairs: there is nothing to score")
    found: dict[tuple[bytes, int], _Row] = {}
    for i, pair in enumerate(pairs):
        first, second = _two_lists(pair, f"pairs[{i}]")
        if not first.size or not second.size:
            side = "continuation" if first.size else "context"
            raise InputError(f"pairs[{i}]: the {side} has no tokens; a score needs at least one on each side")
        if second.size > config.max_length:
            raise InputError(
                f"pairs[{i}]: a continuation of {second.size} tokens exceeds config.max_length = {config.max_length}"
            )
        tokens = np.concatenate([first, second])[-(config.max_length + 1) : -1]
        row = found.setdefault((tokens.tobytes(), second.size), _Row(tokens, [], []))
        row.labels.append(second)
        row.pairs.append(i)
    rows = list(found.values())
    check_ids("pairs", np.concatenate([np.concatenate([row.tokens, *row.labels]) for row in rows]), config)
    return rows


def _two_lists(pair: Pair, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of both sides, as int64: they are in range only after `check_ids`."""
    try:
        before, after = (np.asarray(side) for side in pair)
        right = all(x.ndim == 1 and (not x.size or x.dtype.kind in "iu") for x in (before, after))
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        raise InputError(f"{where}: must be a context and a continuation, each a list of token ids")
    return before.astype(np.int64), after.astype(np.int64)


def _size(n: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= n), n)


_LENGTHS = tuple(sorted({2**i for i in range(5, 21)} | {3 * 2**i for i in range(4, 20)}))  # 32, 48, 64, 96, 128 ...
_SCORED = (4, 32, 256, 2048, 16384)
_SHARED = (1, 4, 16, 64, 256, 1024, 4096)


def _batches(rows: list[_Row], config: ModelConfig, tokens_per_batch: int) -> list[_Batch]:
    """Batches of rows of one shape, longest first, so that a batch that exceeds memory fails at once."""
    shapes: dict[tuple[int, int, int], list[_Row]] = {}
    for row in rows:
        L = min(_size(row.tokens.size, _LENGTHS), config.max_length)
        C, K = min(_size(row.labels[0].size, _SCORED), L), _size(len(row.labels), _SHARED)
        shapes.setdefault((L, C, K), []).append(row)
    batches = []
    for (L, C, K), group in sorted(shapes.items(), key=lambda item: item[0], reverse=True):
        B = max(1, tokens_per_batch // L)
        B = -(
            -len(group) // -(-len(group) // B)
        )  # the same number of batches, all of about one size, has fewest empty rows
        group = sorted(group, key=lambda row: row.tokens.size, reverse=True)
        for i in range(0, len(group), B):
            batches.append(_Batch(group[i : i + B], _arrays(group[i : i + B], B, L, C, K)))
    return batches


def _arrays(rows: list[_Row], B: int, L: int, C: int, K: int) -> _Arrays:
    tokens, segments = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    at, labels, scored = np.zeros((B, C), np.int32), np.zeros((B, K, C), np.int32), np.zeros((B, C), bool)
    for b, row in enumerate(rows):
        n, c = row.tokens.size, row.labels[0].size
        tokens[b, :n], segments[b, :n] = row.tokens, 1
        at[b, :c], scored[b, :c] = np.arange(n - c, n), True
        labels[b, : len(row.labels), :c] = row.labels
    return _Arrays(*(jnp.asarray(x) for x in (tokens, segments, at, labels, scored)))


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def _by_depth(
    params: Params, config: ModelConfig, batch: _Arrays, depths: tuple[int, ...], scale: float
) -> tuple[Array, Array]:
    """(log-likelihoods f32 [R, B, K, C], greedy bool [R, B, K])."""
    # Without segments: padding is on the right, and attention is causal.
    text = text_from(config, batch.tokens)
    bound = bind_text(params, config, text, start_from(params, config, text, None, scale=scale))

    def read(s: Array) -> tuple[Array, Array]:
        (y, _), _ = coda(params, config, s, bound.text.context)
        y = jnp.take_along_axis(y, batch.at[..., None], axis=1)  # the head runs on scored positions only
        return _continuations(known(config, head(params, config, y)), batch)

    return checkpoints(bound.step, bound.s0, depths, read)


@functools.partial(jax.jit, static_argnames=("config",))
def _by_exit(
    params: Params, config: ModelConfig, batch: _Arrays, rule: ExitRule, max_steps: Array, scale: float
) -> tuple[tuple[Array, Array], Array, Array | None]:
    """((log-likelihoods f32 [1, B, K, C], greedy bool [1, B, K]), steps int32 [B, L], checks int32 [B, L])."""
    s = start_from(params, config, text_from(config, batch.tokens), None, scale=scale).s
    out = forward(params, config, batch.tokens, max_steps, state=s, segment_ids=batch.segment_ids, exit_rule=rule)
    at_scored = jnp.take_along_axis(known(config, out.logits), batch.at[..., None], axis=1)
    log_p, greedy = _continuations(at_scored, batch)
    return (log_p[None], greedy[None]), out.steps, out.checks


def _continuations(logits: Array, batch: _Arrays) -> tuple[Array, Array]:
    """logits [B, C, V] -> log-likelihoods f32 [B, K, C] and greedy bool [B, K] of every continuation."""
    scored = batch.scored[:, None]
    labels = batch.labels[..., None]  # those that are padding of the vocabulary have probability 0
    at_label = jnp.take_along_axis(logits[:, None], labels, axis=-1, mode="fill", fill_value=-jnp.inf)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)[:, None]
    log_p = at_label - total
    finite = jnp.isfinite(total) & (jnp.isfinite(log_p) | jnp.isneginf(at_label))
    log_p = jnp.where(finite, log_p, jnp.nan)
    likeliest = jnp.argmax(logits, axis=-1)[:, None] == batch.labels
    return jnp.where(scored, log_p, 0), (likeliest | ~scored).all(-1)


def _fill(
    out: Scores,
    rows: list[_Row],
    depths: tuple[int, ...],
    found: tuple[Array, Array],
    steps: np.ndarray | None = None,
    checks: np.ndarray | None = None,
) -> None:
    """Write what was found for a batch into `out`."""
    log_p = np.asarray(found[0]).sum(-1, dtype=np.float64)
    greedy = np.asarray(found[1])
    for b, row in enumerate(rows):
        n = row.tokens.size
        for k, i in enumerate(row.pairs):
            out.log_likelihood[:, i], out.greedy[:, i], out.length[i] = log_p[:, b, k], greedy[:, b, k], n
            if steps is None or checks is None or out.steps is None:
                out.recurrences[:, i] = depths
            else:
                out.steps[i] = steps[b, :n]
                out.recurrences[:, i], out.checks[i] = steps[b, :n].mean(), checks[b, :n].mean()


def split(encode: Callable[[str], np.ndarray], begin: int, before: str, after: str) -> Pair:
    """Context and continuation as token ids, split as in lm-eval: encoded as one string, and the context alone.

    Spaces at the end of the context go to the continuation, because tokenizers join them to the next word.

    Args:
      encode: text to ids, with or without the begin token.
      begin: id that stands for an empty context.
      before, after: context, which may be empty, and continuation.

    Raises:
      InputError: the continuation is part of the context's last token, so nothing is left to score.
    """
    kept = before.rstrip()
    before, after = kept, before[len(kept) :] + after
    first, whole = encode(before), encode(before + after)
    rest = whole[len(first) :]
    if not len(rest):
        raise InputError(
            f"continuation {after!r}: has no token of its own after a context that ends in {before[-20:]!r}"
        )
    return first if len(first) else np.array([begin], np.int32), rest
