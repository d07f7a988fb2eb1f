"""Text to token ids and back: byte-level BPE, any local tokenizer.json, chat templates."""

from rdlm.tokenizer.tokenizer import DecodeStream, Tokenizer
from rdlm.tokenizer.training import SPECIAL_TOKENS

__all__ = ["SPECIAL_TOKENS", "DecodeStream", "Tokenizer"]
