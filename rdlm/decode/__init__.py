"""Decoding: prefill, decode_step and generate over an explicit cache."""

from rdlm.decode.generate import Generation, generate
from rdlm.decode.passes import decode_step, prefill
from rdlm.decode.sampling import probabilities

__all__ = ["Generation", "decode_step", "generate", "prefill", "probabilities"]
