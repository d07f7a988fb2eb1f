"""The latent states of a text after every recurrence and, on request, after every core layer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rdlm.config import InputError, ModelConfig
from rdlm.model import Bound, Params, bind, check_tokens, core_step
from rdlm.model.blocks import Block
from rdlm.model.cache import KeyValue
from rdlm.model.network import close
from rdlm.recurrence import trajectory


class Captured(NamedTuple):
    """states [r+1, B, L, state_dim]: s_0 .. s_r. layers [r, C, B, L, D]: after each block of a recurrence, or None."""

    states: Array
    layers: Array | None


def core_layers(bound: Bound, s: Array, i: Array | int) -> tuple[Array, Array]:
    """(The state after recurrence i, outputs [C, B, L, D] of the C blocks that it runs, the last one's closed)."""
    made = []

    def kept(name: str, run: Block) -> Block:
        def block(weights: Params, x: Array) -> tuple[Array, KeyValue]:
            out, new_kv = run(weights, x)
            made.append(out)
            return out, new_kv

        return block

    context = bound.text.context._replace(around=kept)
    s, _ = core_step(bound.params, bound.config, bound.noisy(s, i), bound.injected, context)
    return s, jnp.stack([*made[:-1], close(bound.params, bound.config, made[-1])])


@functools.partial(jax.jit, static_argnames=("config", "r", "layers"))
def _capture(params: Params, config: ModelConfig, tokens: Array, r: int, layers: bool, given: dict[str, Any]):
    bound = bind(params, config, tokens, **given)
    if not layers:
        return Captured(trajectory(bound.step, bound.s0, r), None)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[Array, Array]:
        return core_layers(bound, carry[0], i)

    unused = jnp.zeros((config.core_calls, *tokens.shape, config.embed_dim), bound.s0.dtype)
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
      layers: also keep the output of every block that a recurrence runs; takes as many times more memory.
      given: state, key, segment_ids, positions, as in `rdlm.forward`.

    Raises:
      InputError: r below 1, wrong shapes, ids out of range, more tokens than config.max_length.
    """
    if r < 1:
        raise InputError(f"r = {r}: at least one recurrence is needed")
    tokens = check_tokens(tokens, config)
    return _capture(params, config, tokens, r, layers, given)
