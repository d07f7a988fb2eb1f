"""rdlm: recurrent-depth language models in JAX/Flax for TPUs.

    run = rdlm.load("runs/quickstart")
    print(run.generate("Geography", exit_rule=rdlm.exits.kl()).text)

    out = rdlm.forward(run.params, run.config, run.tokenizer.encode("Geography")[None], num_steps=16)

Every room of the library is there after `import rdlm`, such as `rdlm.exits` and `rdlm.analysis`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdlm import (
        analysis,
        checkpoint,
        config,
        data,
        decode,
        evaluation,
        exits,
        folders,
        hf,
        losses,
        model,
        optim,
        perf,
        recurrence,
        remat,
        report,
        run,
        runtime,
        selftest,
        serve,
        sharding,
        tasks,
        tokenizer,
        train,
        tune,
        weights,
    )
    from rdlm.checkpoint import load_checkpoint
    from rdlm.config import CachePolicy, InputError, ModelConfig, Parallel, Sampling, Speculative
    from rdlm.decode import Engine, decode_step, prefill
    from rdlm.decode.generate import generate
    from rdlm.hf import load_huggingface, save_huggingface
    from rdlm.losses import loss
    from rdlm.model import bind, cast, init_params
    from rdlm.model.forward import forward
    from rdlm.model.quantize import quantize
    from rdlm.model.retrofit import retrofit
    from rdlm.model.tensor_parallel import tensor_parallel
    from rdlm.optim import ellis_adam
    from rdlm.run import Run, load

# Rooms and names are imported on first use: a script that only needs `rdlm.config` starts without JAX.
_ROOM_OF = {
    "CachePolicy": "config",
    "Engine": "decode",
    "InputError": "config",
    "ModelConfig": "config",
    "Parallel": "config",
    "Run": "run",
    "Sampling": "config",
    "Speculative": "config",
    "bind": "model",
    "cast": "model",
    "decode_step": "decode",
    "ellis_adam": "optim",
    "forward": "model",
    "generate": "decode",
    "init_params": "model",
    "load": "run",
    "load_checkpoint": "checkpoint",
    "load_huggingface": "hf",
    "loss": "losses",
    "prefill": "decode",
    "quantize": "model",
    "retrofit": "model",
    "save_huggingface": "hf",
    "tensor_parallel": "model",
}
_ROOMS = [room.name for room in pkgutil.iter_modules(__path__)]

__all__ = [*_ROOM_OF, *_ROOMS]


def __getattr__(name: str) -> object:
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"rdlm.{_ROOM_OF[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"rdlm.{name}")
    raise AttributeError(f"module 'rdlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
