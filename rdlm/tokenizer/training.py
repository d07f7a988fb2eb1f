"""New tokenizers: byte-level BPE with the reference's special tokens, and one token per byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rdlm.config import InputError
from rdlm.tokenizer.chat import REFERENCE

BEGIN_TEXT, END_TEXT, PAD = "<|begin_text|>", "<|end_text|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN_TEXT, END_TEXT, "<|begin_header|>", "<|end_header|>", "<|end_turn|>", PAD)
"""The reference's special tokens, in its order (arXiv 2502.05171)."""
_SLOTS = 32  # ids for special tokens at the end of the reference's vocabulary
_LAST = (*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(_SLOTS - len(SPECIAL_TOKENS))))

# Pieces of text that merges never cross: a word or a punctuation mark with the space before it, one digit, runs of
# newlines, other blanks. Digits stay single, so that a number is tokenized in the same way everywhere.
_SPLIT = r" ?\p{L}[\p{L}\p{M}]*|\p{N}|\n+| ?[^\s\p{L}\p{N}]|[^\S\n]+(?!\S)|[^\S\n]+"
_LONGEST_TOKEN = 32  # bytes, as the reference
_LONGEST_WORD = 2048  # characters; training takes time in the square of a word, and no word of a language is longer

Config = dict[str, Any]
"""The content of a tokenizer_config.json."""
Made = tuple[tokenizers.Tokenizer, Config]


def train(texts: Iterable[str], vocab_size: int, special_ids: Literal["first", "last"]) -> Made:
    """See `Tokenizer.train`."""
    if special_ids not in ("first", "last"):
        raise InputError(f"special_ids = {special_ids!r}: must be 'first' or 'last'")
    if not isinstance(vocab_size, int):
        raise InputError(f"vocab_size = {vocab_size!r}: must be an integer")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise InputError(f"texts: expected several texts, got {type(texts).__name__}; give a list of them")
    special = SPECIAL_TOKENS if special_ids == "first" else _LAST
    min_size = 256 + len(special)
    if vocab_size < min_size:
        raise InputError(
            f"vocab_size = {vocab_size}: must be at least {min_size}: 256 bytes, {len(special)} special tokens"
        )
    backend = _empty(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size if special_ids == "first" else vocab_size - len(special),
        min_frequency=2,  # a pair seen once teaches nothing
        special_tokens=list(special) if special_ids == "first" else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    usual = backend.pre_tokenizer
    cut = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{{_LONGEST_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([_words(), cut, _characters()])
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = usual
    if special_ids == "last":
        backend.add_special_tokens(list(special))
    reached = backend.get_vocab_size()
    if reached != vocab_size:
        raise InputError(
            f"vocab_size = {vocab_size}: these texts yield only {reached}; give more text, or at most that size"
        )
    return _finished(backend, special, chat_template=special_ids == "last")


def bytes_only() -> Made:
    """See `Tokenizer.bytes_only`."""
    vocab = {character: byte for byte, character in enumerate(characters_of_bytes())}
    backend = _empty(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(list(_LAST))
    return _finished(backend, _LAST, chat_template=True)


def characters_of_bytes() -> list[str]:
    """The printable character by which byte-level BPE writes each byte: Latin-1 if printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _empty(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_words(), _characters()])
    backend.decoder = decoders.ByteLevel()
    return backend


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")


def _characters() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _finished(backend: tokenizers.Tokenizer, special: tuple[str, ...], *, chat_template: bool) -> Made:
    # Other libraries that read the folder then add the token that `encode` adds by default.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_TEXT} $A", special_tokens=[(BEGIN_TEXT, backend.token_to_id(BEGIN_TEXT))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_TEXT,
        "eos_token": END_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [t for t in special if t not in (BEGIN_TEXT, END_TEXT, PAD)],
        "clean_up_tokenization_spaces": False,
    }
    return backend, config | ({"chat_template": REFERENCE} if chat_template else {})
