"""Tokenizers in GGUF files, rebuilt with the package tokenizers.

A file holds the vocabulary and the merges or scores, but only the name of what splits a text before them.
"""

from __future__ import annotations

from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from rdlm.config import InputError, ModelConfig, one_line
from rdlm.hf.fields import Fields

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens; others are ordinary."""

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens: in tokenizer_config.json -> in a GGUF file."""

ENDS = ("eos", "eot", "eom")
"""Ends of texts, turns and messages."""


class Rebuilt(NamedTuple):
    """A tokenizer, its tokenizer_config.json, and the ids for generation_config.json."""

    backend: tokenizers.Tokenizer
    config: Fields
    ids: Fields


def _by_bytes(splits: list[pre_tokenizers.PreTokenizer], words: bool) -> pre_tokenizers.PreTokenizer:
    """`splits`, then bytes. words: also split into words, as GPT-2 does."""
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PRE_TOKENIZERS = {
    "gpt-2": _by_bytes([], words=True),
    "smollm": _by_bytes([pre_tokenizers.Digits(individual_digits=True)], words=True),
    "llama-bpe": _by_bytes([_split(_LLAMA_3)], words=False),
    "qwen2": _by_bytes([_split(_QWEN_2)], words=False),
}
"""By the name in a GGUF file (tokenizer.ggml.pre)."""

WHOLE_WORDS = ("llama-bpe",)
"""Those after which a word that is in the vocabulary is one token, whatever the merges are."""


def rebuild(metadata: Fields, config: ModelConfig, where: str) -> Rebuilt:
    """The tokenizer in a file's metadata.

    Args:
      metadata: of the file.
      config: of its model.
      where: the file, for error messages.

    Raises:
      InputError: no tokenizer, or one of a kind that rdlm does not know, damaged, or larger than the model.
    """
    given = {key.removeprefix("tokenizer.ggml."): v for key, v in metadata.items() if key.startswith("tokenizer.ggml.")}
    tokens, kind = given.get("tokens"), given.get("model")
    if not isinstance(tokens, list) or kind not in _MODELS:
        known = " or ".join(map(repr, _MODELS))
        raise InputError(f"{where}: tokenizer.ggml.model = {kind!r}: must be {known}, with tokens")
    if len(tokens) > config.vocab_size:
        raise InputError(f"{where}: tokenizer.ggml.tokens: {len(tokens)}, but the model has {config.vocab_size} rows")
    for key, of in {"token_type": list, "scores": list, "add_bos_token": bool, "chat_template": str}.items():
        if given.get(key) is not None and not isinstance(given[key], of):
            raise InputError(f"{where}: tokenizer.ggml.{key} = {str(given[key])[:40]}: must be of type {of.__name__}")
    types = given.get("token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.token_type: {len(types)} for {len(tokens)} tokens")
    named = {role: _named(given, f"{theirs}_token_id", tokens, where) for role, theirs in ROLES.items()}
    if named["eos"] is None:
        raise InputError(f"{where}: tokenizer.ggml.eos_token_id is missing")
    backend = _MODELS[kind](given, named, where)
    # Tokens are added in the order of their ids; those that are in the vocabulary keep their ids.
    added = {token: kind for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    backend.add_tokens([AddedToken(t, normalized=False, special=kind != USER_DEFINED) for t, kind in added.items()])
    begins = given.get("add_bos_token", kind == "llama" or given.get("pre") in WHOLE_WORDS) and named["bos"] is not None
    if begins:
        bos = str(named["bos"])
        backend.post_processor = processors.TemplateProcessing(
            f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1", [(bos, given["bos_token_id"])]
        )
    settings: Fields = {
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": token for role, token in named.items() if token is not None},
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    ends = {given[f"{end}_token_id"] for end in ENDS if _named(given, f"{end}_token_id", tokens, where) is not None}
    ids = {f"{role}_token_id": given[f"{ROLES[role]}_token_id"] for role in ("bos", "pad") if named[role] is not None}
    ids["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
    return Rebuilt(backend, settings, ids)


def _named(given: Fields, key: str, tokens: list[str], where: str) -> str | None:
    """The token whose id is under `key`."""
    i = given.get(key)
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.{key} = {i!r}: must be one of the {len(tokens)} ids")
    return tokens[i]


def _byte_level(given: Fields, named: Fields, where: str) -> tokenizers.Tokenizer:
    """BPE on bytes, as GPT-2's: merges are stored."""
    pre = given.get("pre")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(
            f"{where}: tokenizer.ggml.pre = {pre!r}: how this pre-tokenizer splits a text is not known to rdlm, only "
            f"{known}"
        )
    vocabulary = {token: i for i, token in enumerate(given["tokens"])}
    try:
        merges = [tuple(merge.split(" ")) for merge in given.get("merges") or ()]
        model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{where}: tokenizer.ggml.merges: damaged ({one_line(error)})") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(given: Fields, named: Fields, where: str) -> tokenizers.Tokenizer:
    """BPE on characters with bytes for unknown ones, as Llama 2's: the better the score, the earlier the merge."""
    tokens, scores = given["tokens"], given.get("scores") or ()
    if len(scores) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.scores: {len(scores)} for {len(tokens)} tokens")
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if given.get(key):
            raise InputError(f"{where}: tokenizer.ggml.{key} is set: rdlm does not build it")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (scores[i], token[:at], token[at:])
        for token, i in vocabulary.items()
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(
        vocabulary, [merge[1:] for merge in merges], unk_token=named["unk"], fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    space = given.get("add_space_prefix", True)
    replaced: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *replaced] if space else replaced)
    read: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if space else read)
    return backend


_MODELS = {"gpt2": _byte_level, "llama": _sentence_piece}
