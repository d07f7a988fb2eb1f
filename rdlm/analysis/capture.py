"""The latent states of a text after every recurrence and, on request, after every core layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rdlm.config import InputError, ModelConfig
from rdlm.model import Params, bind, check_tokens
from rdlm.model.blocks import SandwichBlock, linear
from rdlm.recurrence import trajectory


class Recurrence(NamedTuple):
    """A model as functions of its latent state alone, with the text closed over.

    s0: [B, L, D]. step(s, i) -> next state: one recurrence, i int32 from 0. layers(s, i) -> [C, B, L, D]: the outputs
    of the C core layers; the last is the next state. read(s) -> logits f32 [B, L, V].
    """

    s0: Array
    step: Callable[[Array, Any], Array]
    layers: Callable[[Array, Any], Array]
    read: Callable[[Array], Array]


class Captured(NamedTuple):
    """states [r+1, B, L, D]: s_0 .. s_r. layers [r, C, B, L, D]: after each core layer of each recurrence, or None."""

    states: Array
    layers: Array | None


def recurrence_of(
    params: Params,
    config: ModelConfig,
    tokens: ArrayLike,
    *,
    state: ArrayLike | None = None,
    key: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> Recurrence:
    """The model over `tokens` int [B, L] as a `Recurrence`. Arguments as in `rdlm.forward`.

    Raises:
      InputError: wrong shapes, ids out of range, more tokens than config.max_length.
    """
    bound = bind(params, config, tokens, state=state, key=key, segment_ids=segment_ids, positions=positions)

    def layers(s: Array, i: Any) -> Array:
        x = linear(bound.noisy(s, i), params["adapter"][0].astype(s.dtype)) + bound.injected
        made = []
        for j in range(config.core_layers):
            out: Any = SandwichBlock(config).apply({"params": params[f"core_{j}"]}, x, bound.text.context)
            made.append(x := out[0])
        return jnp.stack(made)

    return Recurrence(bound.s0, bound.step, layers, lambda s: bound.read(s)[0])


@functools.partial(jax.jit, static_argnames=("config", "r", "layers"))
def _capture(params: Params, config: ModelConfig, tokens: Array, r: int, layers: bool, given: dict[str, Any]):
    of = recurrence_of(params, config, tokens, **given)
    if not layers:
        return Captured(trajectory(of.step, of.s0, r), None)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[Array, Array]:
        within = of.layers(carry[0], i)
        return within[-1], within

    unused = jnp.zeros((config.core_layers, *of.s0.shape), of.s0.dtype)
    states, within = trajectory(step, (of.s0, unused), r)
    return Captured(states, within[1:])


def capture(
    params: Params, config: ModelConfig, tokens: ArrayLike, r: int, *, layers: bool = False, **given: Any
) -> Captured:
    """Every state of `tokens` int [B, L] up to r recurrences.

    Args:
      params, config: the model.
      tokens: int [B, L].
      r: recurrences, at least 1.
      layers: also keep the output of every core layer; takes core_layers times more memory.
      given: state, key, segment_ids, positions, as in `rdlm.forward`.

    Raises:
      InputError: r below 1, wrong shapes, ids out of range, more tokens than config.max_length.
    """
    if r < 1:
        raise InputError(f"r = {r}: at least one recurrence is needed")
    tokens = check_tokens(tokens, config)
    return _capture(params, config, tokens, r, layers, given)
