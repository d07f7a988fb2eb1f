"""Recurrences that a generated answer takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rdlm.config import InputError, ModelConfig
from rdlm.decode import generate
from rdlm.decode.passes import CacheMemory, next_power
from rdlm.exits import Depth, ExitRule
from rdlm.model import Params

_ROWS = 16


def longest_prompt(config: ModelConfig, new_tokens: int) -> int:
    """Maximum tokens of a prompt that `answer_steps` does not cut.

    Raises:
      InputError: more new tokens than the model's max_length holds.
    """
    room = config.max_length - new_tokens - 1
    if new_tokens < 1 or room < 1:
        raise InputError(f"new_tokens = {new_tokens}: must be in [1, config.max_length - 2 = {config.max_length - 2}]")
    return room


def check_memory_of_steps(
    params: Params, config: ModelConfig, exit_rule: ExitRule, max_steps: int, new_tokens: int
) -> None:
    """Refuse now what `answer_steps` would refuse after the answers have been scored, even for short prompts.

    Raises:
      InputError: a cache that does not fit into memory.
    """
    sizes = next_power(max_steps), next_power(new_tokens + 2, 64)
    CacheMemory(params, config, _ROWS, 1, sizes, Depth(max_steps, exit_rule)).require()


def answer_steps(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    exit_rule: ExitRule,
    max_steps: int,
    *,
    new_tokens: int = 32,
    warm_start: Literal[False, "normalized", "raw"] = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Recurrences of `new_tokens` greedy tokens after every prompt, int32 [new_tokens] each.

    The first generated token belongs to the last position of the prompt, so one more is generated and the first is left
    out. With `warm_start` every counted token therefore starts at its predecessor's last state. Prompts of more than
    `longest_prompt` tokens are cut on the left.

    Args:
      params, config: the model.
      prompts: token ids.
      exit_rule: when a token stops.
      max_steps: maximum recurrences of a token.
      new_tokens: counted tokens per prompt.
      warm_start: as in `rdlm.generate`.
      progress: called with the number of finished prompts.

    Raises:
      InputError: more new tokens than the model's max_length holds.
    """
    room = longest_prompt(config, new_tokens)
    cut = [np.asarray(p, np.int32)[-room:] for p in prompts]
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(cut)
    order = sorted(range(len(cut)), key=lambda i: -cut[i].size)  # similar lengths share a program
    for start in range(0, len(order), _ROWS):
        group = order[start : start + _ROWS]
        rows = [cut[i] for i in group] + [cut[group[-1]]] * (_ROWS - len(group))  # one shape, one program
        out = generate(
            params,
            config,
            rows,
            max_new_tokens=new_tokens + 1,
            num_steps=max_steps,
            exit_rule=exit_rule,
            warm_start=warm_start,
        )
        for i, steps in zip(group, out.steps, strict=False):
            found[i] = steps[1:]
        progress(start + len(group))
    return found
