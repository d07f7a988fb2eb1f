"""Continuous thoughts: a model's hidden state as its next input, in place of a step that it would write down.

As in Coconut (Hao et al. 2024), on scratchpads of the word problem, for a model of fixed depth: every layer runs once.
A chain is the word, some thoughts, then words. One scan makes all chains, whatever their number of thoughts, so a
curriculum that turns one step after the other into thoughts is one program; gradients pass through the thoughts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import ModelConfig
from rdlm.losses import cross_entropy
from rdlm.model import Params, coda, context, core_step, embed, head, inject, vectors
from rdlm.model.cache import cached_bias
from rdlm.tasks.instance import IGNORED


def positions(T: int, coupled: bool) -> np.ndarray:
    """Positions int [2T+1] of the tokens of a scratchpad; coupled: written products take those of their letters."""
    return np.concatenate([np.arange(T + 1), np.arange(T)]) if coupled else np.arange(2 * T + 1)


def once(params: Params, model: ModelConfig, x: Array, ctx: Any, past: Any = (None, None, None)) -> Any:
    """Every layer once from the zero state, over input vectors x [B, L, D] behind the keys and values in `past`.

    (logits f32 [B, L, V], the hidden states [B, L, D] they are read from, own keys and values).
    """
    e, prelude = embed(params, model, x, ctx, past[0])
    s, core = core_step(params, model, jnp.zeros_like(x), inject(params, model, e), ctx, past[1])
    (y, _), coda_kv = coda(params, model, s, ctx, past[2])
    return head(params, model, y), y, (prelude, core, coda_kv)


def chain(
    params: Params, model: ModelConfig, tokens: Array, thoughts: Any, per: int, coupled: bool = False,
    forced: bool = False, empty: bool = False,
) -> Array:  # fmt: skip
    """Logits f32 [B, T, V] of thoughts and then words: slot j of the chain is read behind its j-th input.

    Input 0 is the word, inputs 1 .. thoughts are the hidden states read before them, the others words.

    Args:
      tokens: int [B, 2T+1], scratchpads.
      thoughts: how many, at most (T-1) // per; may be traced.
      per: steps each stands for; slot j >= thoughts is the product of the first per * thoughts + j - thoughts + 1.
      coupled: see `positions`.
      forced: the words are those of the scratchpad; otherwise the likeliest, as a model alone would write.
      empty: thoughts are zero vectors, to see what they are good for.
    """
    B, L = tokens.shape
    T = L // 2
    where = jnp.asarray(positions(T, coupled))
    first, y, own = once(
        params, model, vectors(params, model, tokens[:, : T + 2]), context(model, where[: T + 2], None)
    )
    room = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, T - 1), (0, 0))), own)

    def slot(carry: Any, j: Array) -> tuple[Any, Array]:
        room, logits, y = carry
        done = per * thoughts + j - thoughts  # the product written last, if this input is a word
        likeliest = jnp.argmax(logits, -1)
        token = jax.lax.dynamic_index_in_dim(tokens, jnp.minimum(T + 1 + done, L - 1), 1) if forced else likeliest
        x = jnp.where(j <= thoughts, jnp.zeros_like(y) if empty else y, vectors(params, model, token))
        at = T + 1 + j
        ctx = context(model, where[at][None], None, cached_bias(L, jnp.full(B, at)))
        logits, y, own = once(params, model, x, ctx, room)
        room = jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, at, 1), room, own)
        return (room, logits, y), logits[:, 0]

    _, rest = jax.lax.scan(slot, (room, first[:, -1:], y[:, -1:]), jnp.arange(1, T))
    return jnp.concatenate([first[:, -1:], jnp.swapaxes(rest, 0, 1)], 1)


def chain_loss(params: Params, model: ModelConfig, batch: Any, thoughts: Any, per: int) -> Array:
    """Mean cross-entropy of what is still written when the first per * thoughts steps are thoughts."""
    tokens, labels = jnp.asarray(batch["tokens"]), jnp.asarray(batch["labels"])
    T = tokens.shape[1] // 2
    logits = chain(params, model, tokens, thoughts, per, forced=True)
    j = jnp.arange(T)
    number = per * thoughts + j - thoughts + 1
    written = (j >= thoughts) & (number <= T)
    wanted = jnp.where(written, labels[:, jnp.minimum(T + number, 2 * T)], IGNORED)
    return cross_entropy(logits, wanted).sum() / (len(tokens) * written.sum())


def stage(step: Array, steps: int, most: int, between: tuple[float, float]) -> Array:
    """Thoughts at a training step, int32: the first and the last of `most` come at these shares of all `steps`."""
    first, last = between
    share = (step / steps - first) / (last - first)
    return jnp.clip(jnp.floor(1 + share * (most - 1)), 0, most).astype(jnp.int32)
