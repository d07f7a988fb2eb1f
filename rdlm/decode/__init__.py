"""Decoding: prefill, decode_step and generate over an explicit cache; an engine for requests that come and go."""

from rdlm.decode.engine import Engine, Usage
from rdlm.decode.generate import Generation, generate
from rdlm.decode.parallel import ParallelUsage
from rdlm.decode.passes import decode_step, prefill
from rdlm.decode.requests import Constraint
from rdlm.decode.sampling import probabilities

__all__ = [
    "Constraint",
    "Engine",
    "Generation",
    "ParallelUsage",
    "Usage",
    "decode_step",
    "generate",
    "prefill",
    "probabilities",
]
