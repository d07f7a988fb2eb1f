"""Loss against depth: every depth from one unroll."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import InputError, ModelConfig
from rdlm.losses import IGNORED, as_batch, losses_by_depth
from rdlm.model import Params


class DepthCurve(NamedTuple):
    """Mean loss at several depths.

    depths: recurrences r. nats: mean cross-entropy per scored token. bits_per_byte: the same per byte of text.
    tokens, bytes: how many were scored.
    """

    depths: tuple[int, ...]
    nats: list[float]
    bits_per_byte: list[float]
    tokens: int
    bytes: int


@functools.partial(jax.jit, static_argnames=("config", "depths"))
def _sums(params: Params, config: ModelConfig, batch: dict[str, Array], depths: tuple[int, ...], token_bytes: Array):
    labelled = as_batch(batch)
    scored = labelled.labels != IGNORED
    losses = losses_by_depth(params, config, labelled, depths, jax.random.key(0))
    size = jnp.where(scored, token_bytes[jnp.where(scored, labelled.labels, 0)], 0)
    return losses.sum((1, 2)), scored.sum(), size.sum()


def depth_curve(
    params: Params,
    config: ModelConfig,
    batches: Iterable[dict[str, Any]],
    depths: tuple[int, ...],
    token_bytes: np.ndarray,
    place: Callable[[Any], Any] = lambda batch: batch,
    stop: Callable[[], bool] = lambda: False,
) -> DepthCurve | None:
    """Loss at each depth over `batches`, from one unroll to the deepest. Sums are kept in float64.

    Args:
      params, config: the model.
      batches: dicts as `rdlm.data.PackedData.batches` yields them.
      depths: increasing recurrences.
      token_bytes: int [V], bytes of text behind each token.
      place: puts a batch onto devices.
      stop: polled between batches; when true the result is None.

    Raises:
      InputError: depths that are not increasing, or nothing to score.
    """
    if not depths or list(depths) != sorted(set(depths)) or depths[0] < 1:
        raise InputError(f"depths = {tuple(depths)}: must be increasing recurrences, each at least 1")
    sums, count, size = np.zeros(len(depths)), 0, 0
    table = jnp.asarray(token_bytes)
    for batch in batches:
        if stop():
            return None
        s, c, b = _sums(params, config, place(batch), tuple(depths), table)
        sums, count, size = sums + np.asarray(s, np.float64), count + int(c), size + int(b)
    if not count:
        raise InputError("validation: there is no label to score")
    nats = (sums / count).tolist()
    return DepthCurve(tuple(depths), nats, (sums / math.log(2) / max(size, 1)).tolist(), count, size)
