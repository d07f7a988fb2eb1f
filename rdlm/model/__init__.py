"""The model: three pure functions (embed, core_step, readout), and what is made of them."""

from rdlm.model.adaptive import Pass, adaptive_pass
from rdlm.model.forward import Output, check_depth, check_tokens, forward, split_steps, typed_key
from rdlm.model.network import (
    Params,
    RecurrentDepth,
    cast,
    compute_dtype,
    context,
    core_step,
    decode,
    embed,
    head,
    init_params,
    inject,
    logical_axes,
    positions_of,
    readout,
)
from rdlm.model.noise import noisy

__all__ = [
    "Output",
    "Params",
    "Pass",
    "RecurrentDepth",
    "adaptive_pass",
    "cast",
    "check_depth",
    "check_tokens",
    "compute_dtype",
    "context",
    "core_step",
    "decode",
    "embed",
    "forward",
    "head",
    "init_params",
    "inject",
    "logical_axes",
    "noisy",
    "positions_of",
    "readout",
    "split_steps",
    "typed_key",
]
