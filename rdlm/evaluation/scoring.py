"""How likely is a continuation of a context, at every depth at once or with an exit rule?

Questions and lm-eval's likelihood requests both end here: pairs of token ids in, log-likelihoods out. Requests of
similar lengths share a batch, batches share few compiled shapes, and requests that differ only in their last token
(the letters A, B, C, D behind one question) share a row: their inputs are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import InputError, ModelConfig
from rdlm.exits import ExitRule
from rdlm.model import Params, bind_text, check_ids, check_rule, coda, forward, head, start_from, text_from
from rdlm.recurrence import check_depths, checkpoints

Pair = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Context and continuation, token ids; neither is empty."""

_MOST_LOGITS = 2**28  # elements of one batch's logits where a rule reads all of them: 1 GiB in f32


class Scores(NamedTuple):
    """What `score` returns, for N pairs at R depths (R = 1 with an exit rule).

    log_likelihood f64 [R, N]: of the continuation, in nats. greedy bool [R, N]: every token of it is the likeliest.
    iterations f64 [R, N]: mean recurrences of the tokens that were read for the pair. looks f64 [N]: mean number of
    times the exit rule read a token's logits. length int [N]: tokens that were read. steps: with an exit rule, int32
    recurrences of every one of them per pair.
    """

    log_likelihood: np.ndarray
    greedy: np.ndarray
    iterations: np.ndarray
    looks: np.ndarray
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

    The logits are those of `rdlm.forward` at that depth (or with that rule) over context and continuation without its
    last token; what exceeds config.max_length is cut off on the left. The noise of the initial state is a function of
    the position alone, so that all choices of a question start alike.

    Args:
      params, config: the model.
      pairs: contexts and continuations.
      depths: increasing recurrences; with an exit rule a single one, the most that a token may take.
      exit_rule: None, or lets every token stop on its own, in one parallel pass.
      init_scale: of the initial state; 0.0 is the zero state.
      tokens_per_batch: padding included. Memory grows with it, and speed on a TPU.
      progress: called with the number of pairs done.

    Raises:
      InputError: no pairs, an empty side, ids out of range, a continuation longer than the model reads, or wrong
        depths.
    """
    depths = check_depths(depths)
    check_rule(exit_rule, 1)
    if exit_rule is not None and len(depths) != 1:
        raise InputError(f"depths = {depths}: an exit rule takes one, the most recurrences")
    if tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch = {tokens_per_batch}: must be at least 1")
    rows = _rows(pairs, config)
    if exit_rule is not None:
        tokens_per_batch = min(tokens_per_batch, max(1, _MOST_LOGITS // config.rows))
    R, N, done = len(depths), len(pairs), 0
    out = Scores(
        np.zeros((R, N)), np.zeros((R, N), bool), np.zeros((R, N)), np.zeros(N), np.zeros(N, int),
        None if exit_rule is None else [np.zeros(0, np.int32)] * N,
    )  # fmt: skip
    for batch in _batches(rows, config, tokens_per_batch):
        if exit_rule is None:
            found = _by_depth(params, config, batch.arrays, depths, init_scale)
            _fill(out, batch.rows, depths, found)
        else:
            found, *ran = _by_exit(params, config, batch.arrays, exit_rule, jnp.int32(depths[0]), init_scale)
            _fill(out, batch.rows, depths, found, *(np.asarray(x) for x in ran))
        done += sum(len(row.pairs) for row in batch.rows)
        progress(done)
    return out


@dataclasses.dataclass
class _Row:
    """One input and everything that is asked of its end."""

    tokens: np.ndarray
    labels: list[np.ndarray]  # all of one length: the last tokens of the continuations, shifted by one
    pairs: list[int]


class _Arrays(NamedTuple):
    """B rows of L tokens; C scored positions each, K continuations that share a row.

    tokens int32 [B, L]; segment_ids int32 [B, L], 0 for padding; at int32 [B, C], the positions whose logits are
    read; labels int32 [B, K, C]; scored bool [B, C].
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
    if not pairs:
        raise InputError("pairs: there is nothing to score")
    found: dict[tuple[bytes, int], _Row] = {}
    for i, (before, after) in enumerate(pairs):
        first, second = np.asarray(before, np.int32), np.asarray(after, np.int32)
        if not first.size or not second.size:
            side = "continuation" if first.size else "context"
            raise InputError(f"pairs[{i}]: the {side} has no tokens; a score needs at least one on each side")
        if second.size > config.max_length:
            raise InputError(
                f"pairs[{i}]: a continuation of {second.size} tokens exceeds config.max_length = {config.max_length}"
            )
        whole = np.concatenate([first, second])[-(config.max_length + 1) :]
        tokens = whole[:-1]
        row = found.setdefault((tokens.tobytes(), second.size), _Row(tokens, [], []))
        row.labels.append(second)
        row.pairs.append(i)
    rows = list(found.values())
    check_ids("pairs", np.concatenate([np.concatenate([row.tokens, *row.labels]) for row in rows]), config)
    return rows


def _size(n: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= n), n)


_LENGTHS = tuple(sorted({2**i for i in range(5, 21)} | {3 * 2**i for i in range(4, 20)}))  # 32, 48, 64, 96, 128 ...
_SCORED = (4, 32, 256, 2048, 16384)
_SHARED = (1, 4, 16, 64, 256, 1024, 4096)


def _batches(rows: list[_Row], config: ModelConfig, tokens_per_batch: int) -> list[_Batch]:
    """Rows of one shape together, longest first: what does not fit into memory fails at once."""
    shapes: dict[tuple[int, int, int], list[_Row]] = {}
    for row in rows:
        L = min(_size(row.tokens.size, _LENGTHS), config.max_length)
        C, K = min(_size(row.labels[0].size, _SCORED), L), _size(len(row.labels), _SHARED)
        shapes.setdefault((L, C, K), []).append(row)
    batches = []
    for (L, C, K), group in sorted(shapes.items(), key=lambda item: item[0], reverse=True):
        B = max(1, tokens_per_batch // L)
        B = -(-len(group) // -(-len(group) // B))  # as many batches, but all of about one size: no empty rows
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
def _by_depth(params: Params, config: ModelConfig, batch: _Arrays, depths: tuple[int, ...], scale: Any):
    """(log-likelihoods f32 [R, B, K, C], greedy bool [R, B, K])."""
    # Segments are left out: padding is on the right, where nothing that is scored looks.
    text = text_from(config, batch.tokens)
    bound = bind_text(params, config, text, start_from(params, config, text, None, scale=scale))

    def read(s: Array) -> tuple[Array, Array]:
        (y, _), _ = coda(params, config, s, text.context)
        y = jnp.take_along_axis(y, batch.at[..., None], axis=1)  # the head is for scored positions only
        return _continuations(head(params, config, y), batch)

    return checkpoints(bound.step, bound.s0, depths, read)


@functools.partial(jax.jit, static_argnames=("config",))
def _by_exit(params: Params, config: ModelConfig, batch: _Arrays, rule: ExitRule, most: Array, scale: Any):
    """((log-likelihoods f32 [1, B, K, C], greedy bool [1, B, K]), steps int32 [B, L], looks int32 [B, L])."""
    s = start_from(params, config, text_from(config, batch.tokens), None, scale=scale).s
    out = forward(
        params, config, batch.tokens, most, state=s, segment_ids=batch.segment_ids, exit_rule=rule
    )  # fmt: skip
    found = _continuations(jnp.take_along_axis(out.logits, batch.at[..., None], axis=1), batch)
    return tuple(x[None] for x in found), out.steps, out.looks


def _continuations(logits: Array, batch: _Arrays) -> tuple[Array, Array]:
    """logits [B, C, V] -> log-likelihoods f32 [B, K, C] and greedy bool [B, K] of every continuation."""
    scored = batch.scored[:, None]
    at_label = jnp.take_along_axis(logits[:, None], batch.labels[..., None], axis=-1)[..., 0]
    log_p = at_label - jax.nn.logsumexp(logits, axis=-1)[:, None]
    likeliest = jnp.argmax(logits, axis=-1)[:, None] == batch.labels
    return jnp.where(scored, log_p, 0), (likeliest | ~scored).all(-1)


def _fill(
    out: Scores, rows: list[_Row], depths: tuple[int, ...], found: tuple[Array, Array],
    steps: np.ndarray | None = None, looks: np.ndarray | None = None,
) -> None:  # fmt: skip
    log_p = np.asarray(found[0]).sum(-1, dtype=np.float64)  # long texts have many tokens
    greedy = np.asarray(found[1])
    for b, row in enumerate(rows):
        n = row.tokens.size
        for k, i in enumerate(row.pairs):
            out.log_likelihood[:, i], out.greedy[:, i], out.length[i] = log_p[:, b, k], greedy[:, b, k], n
            if steps is None or looks is None or out.steps is None:
                out.iterations[:, i] = depths
            else:
                out.steps[i] = steps[b, :n]
                out.iterations[:, i], out.looks[i] = steps[b, :n].mean(), looks[b, :n].mean()


def split(encode: Callable[[str], np.ndarray], begin: int, before: str, after: str) -> Pair:
    """Two texts as token ids, cut as lm-eval cuts them: both are encoded as one string, the context also alone.

    Blanks at the end of the context belong to the continuation, because tokenizers tie them to the next word.

    Args:
      encode: text to ids, with the tokenizer's begin token in front or without.
      begin: id that stands for an empty context.
      before, after: context, which may be empty, and continuation.

    Raises:
      InputError: the continuation is swallowed by the context's last token, so that nothing is left to score.
    """
    kept = before.rstrip()
    before, after = kept, before[len(kept) :] + after
    first, whole = encode(before), encode(before + after)
    rest = whole[len(first) :]
    if not len(rest):
        raise InputError(
            f"continuation {after!r}: has no token of its own behind a context that ends in {before[-20:]!r}"
        )
    return first if len(first) else np.array([begin], np.int32), rest
