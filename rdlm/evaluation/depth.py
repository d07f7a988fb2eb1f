"""Quality against depth: every fixed depth from one unroll, exit rules beside it, and what each of them costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from rdlm.config import InputError, ModelConfig
from rdlm.exits import ExitRule
from rdlm.losses import IGNORED, as_batch, batch_state, cross_entropy, is_likeliest, scores_by_depth
from rdlm.model import Params, forward
from rdlm.recurrence import check_depths
from rdlm.sharding import SPLIT, Layout


class DepthCurve(NamedTuple):
    """Mean loss at several depths.

    depths: recurrences r. nats: mean cross-entropy per scored token. bits_per_byte: the same per byte of text.
    tokens, bytes: how many were scored. accuracy: share of scored tokens whose label is the likeliest; empty where it
    is not known.
    """

    depths: tuple[int, ...]
    nats: list[float]
    bits_per_byte: list[float]
    tokens: int
    bytes: int
    accuracy: tuple[float, ...] = ()


class ExitScore(NamedTuple):
    """Quality and effort when every token stops on its own.

    nats, bits_per_byte, accuracy: as in `DepthCurve`. iterations: mean recurrences over all tokens, scored or not,
    padding left out. looks: mean number of times the rule read a token's logits. most: largest number of recurrences
    that a token took. tokens: how many were scored.
    """

    nats: float
    bits_per_byte: float
    accuracy: float
    iterations: float
    looks: float
    most: int
    tokens: int


@functools.partial(jax.jit, static_argnames=("config", "depths", "layout"))
def _sums(
    params: Params, config: ModelConfig, batch: dict[str, Array], depths: tuple[int, ...], token_bytes: Array,
    layout: Layout | None = None,
):  # fmt: skip
    """Sums over a batch: of losses and of right tokens per depth, of scored labels, of their bytes."""
    if layout is None:
        labelled = as_batch(batch)
        losses, right = scores_by_depth(params, config, labelled, depths, jax.random.key(0))
        return losses.sum((1, 2)), right.sum((1, 2)), *_scored(labelled.labels, token_bytes)

    def mine(params: Params, batch: dict[str, Array], token_bytes: Array) -> Any:
        # All weights are fetched once for all depths; a row at a time, so that logits of one row are all that is held.
        whole = {name: layout.fetch(name, stored) for name, stored in params.items()}

        def one(row: dict[str, Array]) -> Any:
            labelled = as_batch({name: x[None] for name, x in row.items()})
            losses, right = scores_by_depth(whole, config, labelled, depths, jax.random.key(0), layout.flash)
            return losses.sum((1, 2)), right.sum((1, 2)), *_scored(labelled.labels, token_bytes)

        return jax.lax.psum(jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch)), SPLIT)

    every, rows = PartitionSpec(), PartitionSpec(SPLIT)
    spread = jax.shard_map(
        mine, mesh=layout.mesh, in_specs=(layout.parameter_parts, jax.tree.map(lambda _: rows, batch), every),
        out_specs=every, axis_names=set(layout.manual), check_vma=False,
    )  # fmt: skip
    return spread(params, batch, token_bytes)


def _scored(labels: Array, token_bytes: Array) -> tuple[Array, Array]:
    """How many labels are scored, and the bytes behind them."""
    scored = labels != IGNORED
    size = jnp.where(scored, token_bytes[jnp.where(scored, labels, 0)], 0)
    return scored.sum(), size.sum()


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
    """Loss and accuracy at each depth over `batches`, from one unroll to the deepest. Sums are kept in float64.

    Args:
      params, config: the model.
      batches: dicts as `rdlm.data.PackedData.batches` yields them.
      depths: increasing recurrences.
      token_bytes: int [V], bytes of text behind each token (zeros where there is no text: bits per byte become NaN).
      place: puts a batch onto devices.
      stop: polled between batches; when true the result is None.
      layout: how weights travel, where parameters and rows are split over a mesh.

    Raises:
      InputError: depths that are not increasing, or nothing to score.
    """
    depths = check_depths(depths)
    sums, hits, count, size = np.zeros(len(depths)), np.zeros(len(depths)), 0, 0
    table = jnp.asarray(token_bytes)
    for batch in batches:
        if stop():
            return None
        s, h, c, b = _sums(params, config, place(batch), depths, table, layout)
        sums, hits = sums + np.asarray(s, np.float64), hits + np.asarray(h)
        count, size = count + int(c), size + int(b)
    if not count:
        raise InputError("validation: there is no label to score")
    bits = [_bits_per_byte(x, size) for x in sums.tolist()]
    return DepthCurve(tuple(depths), (sums / count).tolist(), bits, count, size, tuple((hits / count).tolist()))


@functools.partial(jax.jit, static_argnames=("config",))
def _exit_sums(
    params: Params, config: ModelConfig, batch: dict[str, Array], rule: ExitRule, most: Array, token_bytes: Array
):
    labelled = as_batch(batch)
    out = forward(
        params, config, labelled.tokens, most, state=batch_state(params, config, labelled, None, jax.random.key(0)),
        segment_ids=labelled.segment_ids, positions=labelled.positions, exit_rule=rule,
    )  # fmt: skip
    assert out.looks is not None  # a rule's looks are counted
    nats, right = cross_entropy(out.logits, labelled.labels).sum(), is_likeliest(out.logits, labelled.labels).sum()
    spent = out.steps.sum(), out.looks.sum(), (out.steps > 0).sum(), out.steps.max()
    return nats, right, *spent, *_scored(labelled.labels, token_bytes)


def exit_score(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, Any]],
    rule: ExitRule,
    most: int,
    token_bytes: np.ndarray,
) -> ExitScore:
    """Loss, accuracy and effort with an exit rule, over the same labels and initial states as `depth_curve`.

    Every token stops on its own, after at most `most` recurrences, in one parallel pass (`rdlm.forward`). Neither
    another threshold nor another `most` compiles anything anew.

    Raises:
      InputError: `most` below 1, or nothing to score.
    """
    if most < 1:
        raise InputError(f"most = {most}: at least one recurrence is needed")
    sums, deepest = np.zeros(7), 0
    table = jnp.asarray(token_bytes)
    for batch in batches:
        nats, right, steps, looks, ran, deep, count, size = _exit_sums(
            params, config, batch, rule, jnp.int32(most), table
        )
        sums += [float(x) for x in (nats, right, steps, looks, ran, count, size)]
        deepest = max(deepest, int(deep))
    nats, right, steps, looks, ran, count, size = sums.tolist()
    if not count:
        raise InputError("validation: there is no label to score")
    bits = _bits_per_byte(nats, int(size))
    return ExitScore(nats / count, bits, right / count, steps / ran, looks / ran, deepest, int(count))


def _bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / size if size else math.nan
