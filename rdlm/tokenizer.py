"""Text to token ids and back: byte-level BPE, and any local tokenizer.json."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rdlm.config import InputError

BEGIN_TEXT, END_TEXT, PAD = "<|begin_text|>", "<|end_text|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN_TEXT, END_TEXT, "<|begin_header|>", "<|end_header|>", "<|end_turn|>", PAD)
"""The reference's special tokens (spec section 7); a tokenizer trained here gives them the ids 0 to 5."""

# Where text is cut before merging: a word with the space before it, one digit, one punctuation mark (with the space
# before it), runs of newlines, other blanks. Digits stay single so that numbers are spelt the same everywhere.
_SPLIT = r" ?\p{L}[\p{L}\p{M}]*|\p{N}|\n+| ?[^\s\p{L}\p{N}]|[^\S\n]+(?!\S)|[^\S\n]+"
_LONGEST_TOKEN = 32  # bytes, as the reference


_CHAT_TOKENS = ("<|begin_header|>", "<|end_header|>", "<|end_turn|>")


class Tokenizer:
    """Encodes and decodes text; knows its special ids, the bytes of every token, and its own identity (`hash`).

    Text that looks like a special token is ordinary text when encoded: only ids make special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], where: str = "tokenizer") -> None:
        """Wrap a loaded `tokenizers.Tokenizer` and the content of its tokenizer_config.json.

        Raises:
          InputError: the config names no bos_token or eos_token, or one that is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # i.e. "<|end_text|>" inside a document is nine harmless pieces of text
        self._backend, self._config = backend, config
        self.bos_id = self._special("bos_token", where)
        self.eos_id = self._special("eos_token", where)
        self.pad_id = self._special("pad_token", where) if config.get("pad_token") else self.eos_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE of exactly `vocab_size` entries, special tokens included. Deterministic.

        Raises:
          InputError: `vocab_size` cannot hold 256 bytes and the special tokens, or the texts are too few to fill it.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise InputError(
                f"vocab_size = {vocab_size}: must be at least {least}: 256 bytes, {len(SPECIAL_TOKENS)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once teaches nothing
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=_LONGEST_TOKEN,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        reached = backend.get_vocab_size()
        if reached != vocab_size:
            raise InputError(
                f"vocab_size = {vocab_size}: these texts yield only {reached}; give more text or ask for at most that"
            )
        # Other readers of the folder add the same token that `encode` adds by default.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN_TEXT} $A", special_tokens=[(BEGIN_TEXT, backend.token_to_id(BEGIN_TEXT))]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN_TEXT,
            "eos_token": END_TEXT,
            "pad_token": PAD,
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (BEGIN_TEXT, END_TEXT, PAD)],
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend, config)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json from a local folder, ours or anyone's.

        Raises:
          InputError: a file is missing or not what its name says, or bos_token/eos_token are missing.
        """
        texts = {}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            try:
                texts[name] = (Path(folder) / name).read_text(encoding="utf-8")
            except FileNotFoundError as error:
                raise InputError(f"{folder}: no {name} there; give a folder that holds a saved tokenizer") from error
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{folder}/{name}: cannot be read ({error})") from error
        try:
            backend = tokenizers.Tokenizer.from_str(texts["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{folder}/tokenizer.json: not a tokenizer ({error}); copy it again") from error
        try:
            config = json.loads(texts["tokenizer_config.json"])
        except json.JSONDecodeError as error:
            raise InputError(f"{folder}/tokenizer_config.json: not JSON ({error}); copy it again") from error
        if not isinstance(config, dict):
            raise InputError(f"{folder}/tokenizer_config.json: expected an object, found {type(config).__name__}")
        return cls(backend, config, where=f"{folder}/tokenizer_config.json")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by Hugging Face tools.

        Raises:
          InputError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
            text = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Token ids of `text`, int32 [n], with bos_id before and eos_id after it if asked.

        Raises:
          InputError: `text` is not valid Unicode (it holds a lone surrogate).
        """
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True, eos: bool = False) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:  # raised for lone surrogates as well as for things that are not str
            raise InputError(f"text: cannot be encoded ({error}); give valid Unicode strings") from error
        before, after = [self.bos_id] * bos, [self.eos_id] * eos
        return [np.array(before + e.ids + after, np.int32) for e in encodings]

    def encode_chat(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> np.ndarray:
        """A conversation as the reference's chat template writes it (spec section 7), int32 [n].

        Every message is header, role, header end, two line breaks, stripped content, end of turn; the first follows the
        begin token. Special tokens spelled out in a message stay text.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": ...}; the assistant is written as Huginn.
          reply: end with the assistant's header, for the model to go on; False: end with the end token.

        Raises:
          InputError: no messages, one without role or content, or a tokenizer without the special tokens.
        """
        if not messages:
            raise InputError("messages: at least one is needed")
        missing = [name for name in _CHAT_TOKENS if name not in self.special_ids]
        if missing:
            raise InputError(f"tokenizer: has no special token {missing[0]!r}, which the chat template needs")
        begin_header, end_header, end_turn = (self.special_ids[name] for name in _CHAT_TOKENS)

        def text(words: str) -> list[int]:
            return self.encode(words, bos=False).tolist()

        def header(role: str) -> list[int]:
            return [begin_header, *text("Huginn" if role == "assistant" else role), end_header]

        ids = [self.bos_id]
        for i, message in enumerate(messages):
            for field in ("role", "content"):
                if not isinstance(message.get(field), str):
                    raise InputError(f"messages[{i}]: {field!r} is missing or not text")
            ids += [*header(message["role"]), *text("\n\n" + message["content"].strip()), end_turn]
        ids += [*header("assistant"), *text("\n\n")] if reply else [self.eos_id]
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        kept = [i for i in map(int, ids) if self._is_text(i, skip_special)]
        if self._pieces is None:
            return self._backend.decode(kept, skip_special_tokens=False)
        return b"".join(self._pieces[i] for i in kept).decode("utf-8", "replace")

    def decode_stream(self, skip_special: bool = True) -> DecodeStream:
        """A decoder for ids that arrive one at a time."""
        return DecodeStream(self, skip_special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the number of entries, unless the vocabulary has holes."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token by its text."""
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in sorted(added.items()) if token.special}
        for i in (self.bos_id, self.eos_id, self.pad_id):  # special by their role, however they were added
            special.setdefault(str(self._backend.id_to_token(i)), i)
        return special

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of what decides how text becomes ids and back: equal hashes, interchangeable tokenizers.

        Layout of the file, padding, truncation and the post-processor, which `encode` never uses, do not count.
        """
        tree = json.loads(self._backend.to_str())
        for unused in ("padding", "truncation", "post_processor"):
            tree.pop(unused, None)
        canonical = json.dumps([tree, self.bos_id, self.eos_id, self.pad_id], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text each token stands for, int32 [vocab_size]; special tokens have 0.

        The bytes of a text are the sum over its tokens, so bits per byte = nats / ln 2 / sum of `token_bytes[labels]`.

        Raises:
          InputError: the tokenizer is not byte-level, so that the sum would not be exact.
        """
        if self._pieces is None:
            raise InputError("tokenizer: bits per byte need a byte-level tokenizer (its decoder must be ByteLevel)")
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        lengths[list(self.special_ids.values())] = 0
        return lengths

    @functools.cached_property
    def _pieces(self) -> list[bytes] | None:
        """The bytes of every token (special tokens: of their text), or None if the tokenizer is not byte-level."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        if "ByteLevel" not in [decoder.get("type"), *(d["type"] for d in decoder.get("decoders", []))]:
            return None
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        byte_of = _bytes_of_characters()
        pieces = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            plain = token in added or not all(c in byte_of for c in token)
            pieces[i] = token.encode() if plain else bytes(byte_of[c] for c in token)
        return pieces

    def _is_text(self, i: int, skip_special: bool) -> bool:
        # A model whose embedding is padded can name ids beyond the vocabulary: they stand for nothing.
        return 0 <= i < self.vocab_size and not (skip_special and i in self._special_set)

    @functools.cached_property
    def _special_set(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    def _special(self, name: str, where: str) -> int:
        token = _content(self._config.get(name))
        if not isinstance(token, str):
            raise InputError(f"{where}: names no {name}; add one that is in the vocabulary")
        found = self._backend.token_to_id(token)
        if found is None:
            raise InputError(f"{where}: {name} = {token!r} is not in the vocabulary of tokenizer.json")
        return found


class DecodeStream:
    """Turns ids into text as they arrive; a character split over tokens comes out whole, with its last token.

    What `push` and the final `end` return, joined, is exactly `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # only for tokenizers that are not byte-level
        self._sent = ""

    def push(self, token: int) -> str:
        """Text completed by this token, possibly empty."""
        if not self._tokenizer._is_text(token, self._skip_special):
            return ""
        if self._tokenizer._pieces is not None:
            return self._utf8.decode(self._tokenizer._pieces[token])
        self._ids.append(token)
        return self._fresh(hold="\ufffd")

    def end(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed, or nothing."""
        return self._utf8.decode(b"", final=True) + (self._fresh() if self._ids else "")

    def _fresh(self, hold: str | None = None) -> str:
        # Other decoders look at neighbouring tokens, so decode all of them and return what is new.
        text = self._tokenizer.decode(self._ids, skip_special=False)
        if hold and text.endswith(hold):
            return ""
        fresh, self._sent = text[len(self._sent) :], text
        return fresh


def _content(token: Any) -> Any:
    """A token as tokenizer_config.json writes it: text, or an object with its text under `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: Latin-1 where printable, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
