"""How likely the tokens of a prompt are, each after those before it: one parallel pass, as in evaluation."""

from __future__ import annotations

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm.config import ModelConfig
from rdlm.decode.passes import next_power
from rdlm.decode.program import copies_of, fetched, program
from rdlm.decode.sampling import Likeliest, likeliest, log_probability
from rdlm.exits import ExitRule
from rdlm.model import Params, forward, known
from rdlm.serve.depth import DepthChoice, Depths


class PromptScores(NamedTuple):
    """Of all tokens of a prompt but the first."""

    log_probs: list[float]
    likeliest: list[list[tuple[int, float]]]  # (token, log-probability) of the 20 likeliest at each


def score_prompt(params: Params, config: ModelConfig, prompt: np.ndarray, depth: DepthChoice) -> PromptScores:
    """The scores of a prompt at a depth. The initial states are those of evaluation, whatever the request's seed.

    Args:
      params, config: the model.
      prompt: int32 [L].
      depth: when its tokens stop.
    """
    size, n = min(next_power(len(prompt), 16), config.max_length), len(prompt)
    tokens = np.zeros((copies_of(params), size), np.int32)
    tokens[:, :n] = prompt
    rule = None if depth.name == "none" else depth.rule
    steps = jnp.int32(depth.num_steps), jnp.int32(depth.min_steps)
    out = _scores(params, config, jnp.asarray(tokens), jnp.int32(n), rule, *steps)
    log_probs, top = jax.tree.map(lambda x: x[0], fetched(out))
    pairs = [list(zip(*row, strict=True)) for row in zip(*(x[: n - 1].tolist() for x in top), strict=True)]
    return PromptScores(log_probs[: n - 1].tolist(), [[(i, p) for i, p in row if i >= 0] for row in pairs])


def packed(prompt: np.ndarray, depth: DepthChoice) -> bytes:
    """What other hosts need for `score_prompt`."""
    numbers = [np.asarray(leaf).item() for leaf in jax.tree.leaves(depth.rule)]
    head = depth.name, depth.kind, depth.num_steps, depth.min_steps, numbers
    return json.dumps(head).encode() + b"\n" + prompt.tobytes()


def unpacked(message: bytes, depths: Depths) -> tuple[np.ndarray, DepthChoice]:
    """What `packed` was given, by a server of these depths."""
    head, _, prompt = message.partition(b"\n")
    name, kind, num_steps, min_steps, numbers = json.loads(head)
    structure: jax.tree_util.PyTreeDef
    leaves, structure = jax.tree.flatten(depths.rule(kind))
    rule = structure.unflatten(np.asarray(x, np.result_type(like)) for x, like in zip(numbers, leaves, strict=True))
    return np.frombuffer(prompt, np.int32), DepthChoice(name, kind, num_steps, rule, min_steps)


@program("config")
def _scores(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    length: Array,
    rule: ExitRule | None,
    num_steps: Array,
    min_steps: Array,
) -> tuple[Array, Likeliest]:
    """(ln p of the next token f32 [B, L], the likeliest next tokens [B, L, .]) of tokens [B, L]."""
    B, L = tokens.shape
    segments = jnp.broadcast_to(jnp.arange(L) < length, (B, L)).astype(jnp.int32)
    least = 0 if rule is None or rule.every_check else min_steps  # such a rule must be known to see every recurrence
    out = forward(params, config, tokens, num_steps, segment_ids=segments, exit_rule=rule, min_steps=least)
    logits, following = known(config, out.logits).reshape(B * L, -1), jnp.roll(tokens, -1, axis=1).reshape(-1)
    found = log_probability(logits, following), likeliest(logits, jnp.ones(B * L, bool))
    return jax.tree.map(lambda x: x.reshape(B, L, *x.shape[1:]), found)
