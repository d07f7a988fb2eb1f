"""rdlm: recurrent-depth language models in JAX/Flax for TPUs.

params, config = rdlm.load_checkpoint("runs/quickstart")
out = rdlm.forward(params, config, tokens, 16)
text = rdlm.generate(params, config, prompts, max_new_tokens=64, exit_rule=rdlm.exits.kl())
"""

from __future__ import annotations

import importlib
from typing import Any

# Names are imported on first use: a script that only needs `rdlm.config` starts without JAX.
_HOME = {
    "CachePolicy": "config",
    "Engine": "decode",
    "InputError": "config",
    "ModelConfig": "config",
    "Sampling": "config",
    "Speculative": "config",
    "cast": "model",
    "decode_step": "decode",
    "ellis_adam": "optim",
    "forward": "model",
    "generate": "decode",
    "init_params": "model",
    "load_checkpoint": "checkpoint",
    "load_huggingface": "hf",
    "loss": "losses",
    "prefill": "decode",
    "save_huggingface": "hf",
}
_ROOMS = (
    "analysis", "checkpoint", "config", "data", "decode", "evaluation", "exits", "hf", "losses", "model", "optim",
    "perf", "recurrence", "remat", "report", "runtime", "sharding", "tasks", "tokenizer", "train",
)  # fmt: skip

__all__ = [*_HOME, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"rdlm.{_HOME[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"rdlm.{name}")
    raise AttributeError(f"module 'rdlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
