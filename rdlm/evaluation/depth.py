"""Quality against depth: every fixed depth from one unroll, and exit rules with their cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from rdlm.config import InputError, ModelConfig, require
from rdlm.exits import ExitRule
from rdlm.losses import IGNORED, as_batch, batch_state, cross_entropy, is_likeliest, scores_by_depth
from rdlm.model import Params, forward
from rdlm.recurrence import check_depths
from rdlm.sharding import SPLIT, Layout


class DepthCurve(NamedTuple):
    """Mean loss at several depths.

    depths: recurrences r. nats: mean cross-entropy per scored token. bits_per_byte: the same per byte of text.
    tokens, bytes: how many were scored; 0 bytes if that is not known. accuracy: share of scored tokens whose label is
    the likeliest; () if unknown.
    """

    depths: tuple[int, ...]
    nats: list[float]
    bits_per_byte: list[float]
    tokens: int
    bytes: int
    accuracy: tuple[float, ...] = ()


class ExitScore(NamedTuple):
    """Quality and cost when every token stops on its own.

    nats, bits_per_byte, accuracy, tokens: as in `DepthCurve`. recurrences: mean over all tokens but padding, scored or
    not. checks: mean number of times the rule read a token's logits. max_steps: maximum recurrences of a token.
    """

    nats: float
    bits_per_byte: float
    accuracy: float
    recurrences: float
    checks: float
    max_steps: int
    tokens: int


@functools.partial(jax.jit, static_argnames=("config", "depths", "layout"))
def _sums(
    params: Params,
    config: ModelConfig,
    batch: dict[str, Array],
    depths: tuple[int, ...],
    token_bytes: Array,
    layout: Layout | None = None,
) -> tuple[Array, ...]:
    """Sums over a batch: losses [R] and right tokens [R] at each depth, scored labels, their bytes."""
    if layout is None:
        labelled = as_batch(batch)
        losses, right = scores_by_depth(params, config, labelled, depths, jax.random.key(0))
        return losses.sum((1, 2)), right.sum((1, 2)), *_scored(labelled.labels, token_bytes)

    def mine(params: Params, batch: dict[str, Array], token_bytes: Array) -> tuple[Array, ...]:
        # Weights are gathered once for all depths. Rows run one by one, so only the logits of one row are in memory.
        full = layout.full(params)

        def one(row: dict[str, Array]) -> tuple[Array, ...]:
            labelled = as_batch({name: x[None] for name, x in row.items()})
            losses, right = scores_by_depth(full, config, labelled, depths, jax.random.key(0), layout.flash)
            return losses.sum((1, 2)), right.sum((1, 2)), *_scored(labelled.labels, token_bytes)

        return jax.lax.psum(jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch)), SPLIT)

    every, rows = PartitionSpec(), PartitionSpec(SPLIT)
    spread = jax.shard_map(
        mine,
        mesh=layout.mesh,
        in_specs=(layout.parameter_parts, jax.tree.map(lambda _: rows, batch), every),
        out_specs=every,
        axis_names=set(layout.manual),
        check_vma=False,
    )
    return spread(params, batch, token_bytes)


def _scored(labels: Array, token_bytes: Array) -> tuple[Array, Array]:
    """Number of scored labels, and of their bytes: f32, NaN where those of a label are not known."""
    scored = labels != IGNORED
    size = jnp.where(scored, token_bytes[jnp.where(scored, labels, 0)], 0)
    return scored.sum(), jnp.where((size < 0).any(), jnp.nan, size.sum().astype(jnp.float32))


def depth_curve(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, Any]],
    depths: tuple[int, ...],
    token_bytes: np.ndarray,
    place: Callable[[Any], Any] = lambda batch: batch,
    stop: Callable[[], bool] = lambda: False,
    layout: Layout | None = None,
) -> DepthCurve | None:
    """Loss and accuracy at each depth over `batches`, from one unroll to the deepest, with sums in float64.

    Args:
      params, config: the model.
      batches: dicts as `rdlm.data.PackedData.batches` yields them.
      depths: increasing recurrences.
      token_bytes: int [V], bytes of text of each token, -1 where unknown, which makes bits per byte NaN; so do zeros
        alone, as for a task.
      place: puts a batch onto devices.
      stop: called between batches; if it returns true, the result is None.
      layout: the mesh and the shards, if parameters and rows are split.

    Raises:
      InputError: depths that are not increasing, or nothing to score.
    """
    depths = check_depths(depths)
    table = jnp.asarray(token_bytes)
    total: list[np.ndarray] = [np.zeros(())] * 4
    for batch in batches:
        if stop():
            return None
        total = _add(total, _sums(params, config, place(batch), depths, table, layout))
    nats, right = total[:2]
    tokens, size = (float(x) for x in total[2:])
    _require_labels(tokens)
    known = 0 if math.isnan(size) else int(size)
    bits = [bits_per_byte(x, size) for x in nats.tolist()]
    return DepthCurve(
        tuple(depths), (nats / tokens).tolist(), bits, int(tokens), known, tuple((right / tokens).tolist())
    )


@functools.partial(jax.jit, static_argnames=("config",))
def _exit_sums(
    params: Params, config: ModelConfig, batch: dict[str, Array], rule: ExitRule, max_steps: Array, token_bytes: Array
) -> tuple[tuple[Array, ...], Array]:
    """Sums over a batch (losses, right tokens, recurrences, checks, tokens, scored labels, bytes), and max steps."""
    labelled = as_batch(batch)
    s0 = batch_state(params, config, labelled, None, jax.random.key(0))
    tokens, segments, positions = labelled.tokens, labelled.segment_ids, labelled.positions
    out = forward(
        params, config, tokens, max_steps, state=s0, segment_ids=segments, positions=positions, exit_rule=rule
    )
    assert out.checks is not None  # with a rule, checks are counted
    nats, right = cross_entropy(out.logits, labelled.labels).sum(), is_likeliest(out.logits, labelled.labels).sum()
    ran = out.steps.sum(), out.checks.sum(), (out.steps > 0).sum()
    return (nats, right, *ran, *_scored(labelled.labels, token_bytes)), out.steps.max()


def exit_score(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, Any]],
    rule: ExitRule,
    max_steps: int,
    token_bytes: np.ndarray,
) -> ExitScore:
    """Loss, accuracy and cost with an exit rule, over the same labels and initial states as `depth_curve`.

    Every token stops on its own, after at most `max_steps` recurrences, in one parallel pass (`rdlm.forward`). Another
    threshold or another `max_steps` does not recompile.

    Raises:
      InputError: `max_steps` below 1, or nothing to score.
    """
    require(max_steps >= 1, "max_steps", max_steps, "must be at least 1")
    table, deepest = jnp.asarray(token_bytes), 0
    total: list[np.ndarray] = [np.zeros(())] * 7
    for batch in batches:
        sums, steps = _exit_sums(params, config, batch, rule, jnp.int32(max_steps), table)
        total, deepest = _add(total, sums), max(deepest, int(steps))
    nats, right, steps, checks, ran, tokens, size = (float(x) for x in total)
    _require_labels(tokens)
    bits = bits_per_byte(nats, size)
    return ExitScore(nats / tokens, bits, right / tokens, steps / ran, checks / ran, deepest, int(tokens))


def _add(total: Sequence[np.ndarray], part: Sequence[Array]) -> list[np.ndarray]:
    return [a + np.asarray(b, np.float64) for a, b in zip(total, part, strict=True)]


def _require_labels(tokens: float) -> None:
    if not tokens:
        raise InputError("validation: there is no label to score")


def bits_per_byte(nats: float, size: float) -> float:
    """Of a sum of losses over texts of `size` bytes; NaN if that is not known."""
    return nats / math.log(2) / size if size else math.nan
