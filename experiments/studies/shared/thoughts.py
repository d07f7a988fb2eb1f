"""Continuous thoughts: the hidden state is the next input, instead of a written step (Coconut, Hao et al., 2024).

On scratchpads of the word problem, for a model of fixed depth: every layer runs once. A chain is the word, some
thoughts, then words. One scan makes chains with any number of thoughts, so a curriculum that replaces written steps by
thoughts is one program. Gradients pass through the thoughts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from rdlm.config import ModelConfig
from rdlm.losses import cross_entropy
from rdlm.model import Params, coda, context, core_step, embed, head, inject, vectors
from rdlm.model.blocks import Context
from rdlm.model.cache import cached_bias, stored
from rdlm.tasks.instance import IGNORED


def positions(T: int, coupled: bool) -> np.ndarray:
    """Positions int [2T+1] of the tokens of a scratchpad; coupled: a written product has the position of its letter."""
    return np.concatenate([np.arange(T + 1), np.arange(T)]) if coupled else np.arange(2 * T + 1)


def once(
    params: Params, model: ModelConfig, x: Array, ctx: Context, cached: PyTree = (None, None, None)
) -> tuple[Array, Array, PyTree]:
    """Every layer once from the zero state, over input vectors x [B, L, D] that follow the `cached` keys and values.

    (logits f32 [B, L, V], the hidden states [B, L, D] they are read from, new keys and values).
    """
    past = [None if layers is None else stored(layers) for layers in cached]
    e, prelude = embed(params, model, x, ctx, past[0])
    s, core = core_step(params, model, jnp.zeros_like(x), inject(params, model, e), ctx, past[1])
    (y, _), coda_kv = coda(params, model, s, ctx, past[2])
    return head(params, model, y), y, (prelude, core, coda_kv)


def chain(
    params: Params,
    model: ModelConfig,
    tokens: Array,
    thoughts: int | Array,
    per: int,
    coupled: bool = False,
    forced: bool = False,
    empty: bool = False,
) -> Array:
    """Logits f32 [B, T, V] of thoughts and then words: slot j of the chain is read after its j-th input.

    Input 0 is the word, inputs 1 .. thoughts are the hidden states before them, the others are words.

    Args:
      tokens: int [B, 2T+1], scratchpads.
      thoughts: their number, at most (T-1) // per; may be traced.
      per: steps that each stands for; slot j >= thoughts is the product of the first per * thoughts + j - thoughts + 1.
      coupled: see `positions`.
      forced: the words are those of the scratchpad; otherwise the most likely ones, as a model writes by itself.
      empty: thoughts are zero vectors, a control.
    """
    B, L = tokens.shape
    T = L // 2
    where = jnp.asarray(positions(T, coupled))
    first, y, new_kv = once(
        params, model, vectors(params, model, tokens[:, : T + 2]), context(model, where[: T + 2], None)
    )
    cached = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, T - 1), (0, 0))), new_kv)

    def slot(carry: tuple[PyTree, Array, Array], j: Array) -> tuple[tuple[PyTree, Array, Array], Array]:
        cached, logits, y = carry
        done = per * thoughts + j - thoughts  # the product written last, if this input is a word
        most_likely = jnp.argmax(logits, -1)
        token = jax.lax.dynamic_index_in_dim(tokens, jnp.minimum(T + 1 + done, L - 1), 1) if forced else most_likely
        x = jnp.where(j <= thoughts, jnp.zeros_like(y) if empty else y, vectors(params, model, token))
        at = T + 1 + j
        ctx = context(model, where[at][None], None, cached_bias(L, jnp.full(B, at)))
        logits, y, new_kv = once(params, model, x, ctx, cached)
        cached = jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, at, 1), cached, new_kv)
        return (cached, logits, y), logits[:, 0]

    _, rest = jax.lax.scan(slot, (cached, first[:, -1:], y[:, -1:]), jnp.arange(1, T))
    return jnp.concatenate([first[:, -1:], jnp.swapaxes(rest, 0, 1)], 1)


def chain_loss(params: Params, model: ModelConfig, batch: dict[str, Array], thoughts: int | Array, per: int) -> Array:
    """Mean cross-entropy of the steps that are still written when the first per * thoughts steps are thoughts."""
    tokens, labels = jnp.asarray(batch["tokens"]), jnp.asarray(batch["labels"])
    T = tokens.shape[1] // 2
    logits = chain(params, model, tokens, thoughts, per, forced=True)
    j = jnp.arange(T)
    number = per * thoughts + j - thoughts + 1
    written = (j >= thoughts) & (number <= T)
    wanted = jnp.where(written, labels[:, jnp.minimum(T + number, 2 * T)], IGNORED)
    return cross_entropy(logits, wanted).sum() / (len(tokens) * written.sum())


def stage(step: Array, steps: int, max_thoughts: int, between: tuple[float, float]) -> Array:
    """Thoughts at a training step, int32: grows from 1 to `max_thoughts` between two shares of all `steps`."""
    first, last = between
    share = (step / steps - first) / (last - first)
    return jnp.clip(jnp.floor(1 + share * (max_thoughts - 1)), 0, max_thoughts).astype(jnp.int32)
