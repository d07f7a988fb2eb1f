"""Text to token ids and back: byte-level BPE, any local tokenizer.json, chat templates."""

from rdlm.tokenizer.core import Tokenizer
from rdlm.tokenizer.stream import DecodeStream
from rdlm.tokenizer.training import SPECIAL_TOKENS

__all__ = ["SPECIAL_TOKENS", "DecodeStream", "Tokenizer"]
