"""Logit lens: what does the model predict after each recurrence?"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import InputError, ModelConfig
from rdlm.exits import divergence
from rdlm.losses import cross_entropy
from rdlm.model import Params, bind, check_tokens, known
from rdlm.recurrence import checkpoints


class Lens(NamedTuple):
    """Predictions at N depths.

    depths [N]. top int32 [N, B, L, K]: the K likeliest next tokens; probability f32 [N, B, L, K]: theirs. nats f32
    [N, B, L]: cross-entropy of the labels, 0 where one is ignored. divergence f32 [N, B, L]: KL(deepest || this one),
    in nats.
    """

    depths: tuple[int, ...]
    top: np.ndarray
    probability: np.ndarray
    nats: np.ndarray
    divergence: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "depths", "count"))
def _lens(params: Params, config: ModelConfig, tokens: Array, labels: Array, depths: tuple[int, ...], count: int):
    bound = bind(params, config, tokens)
    states = checkpoints(bound.step, bound.s0, depths, lambda s: s)
    last = jax.nn.log_softmax(known(config, bound.read(states[-1])[0]))

    def at(s: Array):
        logits = known(config, bound.read(s)[0])
        log_p = jax.nn.log_softmax(logits)
        probability, top = jax.lax.top_k(jnp.exp(log_p), count)
        return top, probability, cross_entropy(logits, labels), divergence(last, log_p)

    return jax.lax.map(at, states)


def lens(
    params: Params,
    config: ModelConfig,
    tokens: Array | np.ndarray,
    labels: Array | np.ndarray,
    depths: tuple[int, ...],
    count: int = 3,
) -> Lens:
    """The `count` likeliest next tokens of tokens int [B, L] at each of the increasing `depths`, from one unroll.

    labels: int [B, L], -100 ignored. Depth 0 is the readout of the initial noise.

    Raises:
      InputError: depths that are not increasing, labels of another shape, count outside [1, V], logits that are not
        finite, or as `rdlm.forward`.
    """
    tokens = check_tokens(tokens, config)
    if np.shape(labels) != tokens.shape:
        raise InputError(f"labels: expected shape {list(tokens.shape)}, got {list(np.shape(labels))}")
    if not 1 <= count <= config.vocab_size:
        raise InputError(f"count = {count}: must be in [1, {config.vocab_size}]")
    read = _lens(params, config, tokens, jnp.asarray(labels), tuple(depths), count)
    found = Lens(tuple(depths), *map(np.asarray, read))
    lost = ~np.isfinite(found.probability).all((1, 2, 3))
    if lost.any():
        raise InputError(f"lens: the logits are not finite at r = {depths[int(lost.argmax())]}")
    return found
