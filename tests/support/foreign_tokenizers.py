"""Tokenizers of the kinds that other projects publish, trained on a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from rdlm.tokenizer import Tokenizer

WORDS = ["the cat number 12 sat on the mat", "the café by the old oak", "a naïve owl: 42 mice, and 7 more"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _learned(backend: tokenizers.Tokenizer, trainer: trainers.Trainer) -> tokenizers.Tokenizer:
    backend.train_from_iterator(WORDS * 4, trainer)
    return backend


def _bpe(**options: object) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True, **options))


def _bpe_trainer() -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=320, special_tokens=[*SPECIAL, *BYTES], show_progress=False)


def llama2() -> tokenizers.Tokenizer:
    """Spaces by the normalizer, one before the text; the decoder strips it."""
    backend = _bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _bytes_are_ordinary(_learned(backend, _bpe_trainer()))


def mistral() -> tokenizers.Tokenizer:
    """Spaces by the pre-tokenizer, one before the text."""
    backend = _bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    return _bytes_are_ordinary(_learned(backend, _bpe_trainer()))


def gemma() -> tokenizers.Tokenizer:
    """No space before the text."""
    backend = _bpe()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _bytes_are_ordinary(_learned(backend, _bpe_trainer()))


def t5() -> tokenizers.Tokenizer:
    """Unigram, whose vocabulary holds the special tokens; characters that it does not know are lost."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, initial_alphabet=list("</s>")
    )
    return _learned(backend, trainer)


def bert() -> tokenizers.Tokenizer:
    """WordPiece: how a token is written depends on the one before it."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return _learned(backend, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False))


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {f.__name__: f for f in (llama2, mistral, gemma, t5, bert)}


def _bytes_are_ordinary(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def save(kind: str, folder: Path, **config: object) -> Path:
    """Write a folder as published: tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def load(kind: str, folder: Path, **config: object) -> Tokenizer:
    """`save`, then `Tokenizer.load`."""
    return Tokenizer.load(save(kind, folder, **config))
