"""The latent states of a text after every recurrence and, on request, after every core layer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rdlm.config import InputError, ModelConfig
from rdlm.model import Bound, Params, bind, check_tokens
from rdlm.model.blocks import TransformerBlock
from rdlm.model.network import close, enter
from rdlm.recurrence import trajectory


class Captured(NamedTuple):
    """states [r+1, B, L, D]: s_0 .. s_r. layers [r, C, B, L, D]: after each core layer of each recurrence, or None."""

    states: Array
    layers: Array | None


def core_layers(bound: Bound, s: Array, i: Array | int) -> Array:
    """Outputs [C, B, L, D] of the C core layers in recurrence i from state [B, L, D]; the last is the next state."""
    x = enter(bound.params, bound.config, bound.noisy(s, i), bound.injected)
    made = []
    for j in range(bound.config.core_layers):
        weights = {"params": bound.params[f"core_{j}"]}
        layer = bound.text.context.of_layer(bound.config, "core", j)
        out: Any = TransformerBlock(bound.config).apply(weights, x, layer)
        made.append(x := out[0])
    return jnp.stack([*made[:-1], close(bound.params, bound.config, made[-1])])


@functools.partial(jax.jit, static_argnames=("config", "r", "layers"))
def _capture(params: Params, config: ModelConfig, tokens: Array, r: int, layers: bool, given: dict[str, Any]):
    bound = bind(params, config, tokens, **given)
    if not layers:
        return Captured(trajectory(bound.step, bound.s0, r), None)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[Array, Array]:
        within = core_layers(bound, carry[0], i)
        return within[-1], within

    unused = jnp.zeros((config.core_layers, *bound.s0.shape), bound.s0.dtype)
    states, within = trajectory(step, (bound.s0, unused), r)
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
