"""The tokenizer: any local tokenizer.json, its special ids, the bytes of its tokens and its identity."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tokenizers

from rdlm.config import InputError, local_path, one_line
from rdlm.tokenizer import chat, training
from rdlm.tokenizer.training import Config

_LONG = 2**19  # characters; longer texts are encoded in pieces of about this size
_ENCODED_AT_ONCE = 2**22  # characters
_LINE_START = re.compile(r"\n(?=[^\W_])")
_GENERATION = "generation_config.json"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class _Decoding(NamedTuple):
    """How the bytes of a token are found."""

    by_byte: bool  # every character of a token stands for a byte, as in byte-level BPE
    space: str | None  # what stands for a space
    byte_fallback: bool  # tokens such as <0x0A> are bytes
    drops_first_space: bool  # of a text


class Tokenizer:
    """Encodes and decodes text; has special ids, the bytes of every token, and an identity (`hash`).

    Text that looks like a special token is encoded as ordinary text: special tokens exist as ids only.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Config, where: str = "tokenizer") -> None:
        """Wrap a loaded `tokenizers.Tokenizer` and the content of its tokenizer_config.json.

        Raises:
          InputError: the config names no eos_token, or a token that is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._config = backend, config
        self.eos_id = self._special("eos_token", where)
        self.bos_id = self._special("bos_token", where) if config.get("bos_token") else self.eos_id
        self.pad_id = self._special("pad_token", where) if config.get("pad_token") else self.eos_id
        self.adds_bos = config.get("add_bos_token") is not False  # before a text, unless told otherwise

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_ids: Literal["first", "last"] = "first") -> Tokenizer:
        """Learn a byte-level BPE of exactly `vocab_size` entries, special tokens included. Deterministic.

        Args:
          texts: to learn from.
          vocab_size: entries.
          special_ids: "first": ids 0 to 5; "last": the last 32 ids, some of them reserved, as in the reference (65504
            to 65535 of 65536).

        Raises:
          InputError: `vocab_size` cannot hold 256 bytes and the special tokens, or the texts are too few to fill it.
        """
        return cls(*training.train(texts, vocab_size, special_ids))

    @classmethod
    def bytes_only(cls) -> Tokenizer:
        """One token per byte and no training: ids 0 to 255 in byte order, then the reference's 32 special tokens."""
        return cls(*training.bytes_only())

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json from a local folder, of this library or any other.

        Without a bos_token, as in many folders, documents begin with the eos_token.

        Raises:
          InputError: a file is missing or invalid, or no eos_token is named.
        """
        place = local_path(folder)
        text = _read(place, "tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{folder}/tokenizer.json: not a tokenizer ({error}); copy it again") from error
        name = "tokenizer_config.json"
        if not (place / name).exists() and (place / "special_tokens_map.json").exists():
            name = "special_tokens_map.json"  # older folders have only this one
        config = _read_object(place, name)
        if (place / "special_tokens_map.json").exists():  # where some folders name what the config does not
            others = _read_object(place, "special_tokens_map.json")
            config = others | {key: value for key, value in config.items() if value is not None}
        if (place / "chat_template.json").exists():  # its place in folders of processors, and in newer folders
            config |= {"chat_template": _read_object(place, "chat_template.json").get("chat_template")}
        if (place / "chat_template.jinja").exists():
            config |= {"chat_template": _read(place, "chat_template.jinja")}
        if (place / _GENERATION).exists():
            config |= {_GENERATION: _read_object(place, _GENERATION)}
            ends = config[_GENERATION].get("eos_token_id")
            if not all(isinstance(i, int) for i in (ends if isinstance(ends, list) else [ends or 0])):
                raise InputError(f"{folder}/{_GENERATION}: eos_token_id = {ends!r}: must be an id, or a list of ids")
        return cls(backend, config, where=f"{folder}/{name}")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by Hugging Face tools.

        And generation_config.json, if there was one.

        Raises:
          InputError: the folder cannot be written.
        """
        folder = local_path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
            config = {key: value for key, value in self._config.items() if key != _GENERATION}
            files = {"tokenizer_config.json": config, _GENERATION: self._config.get(_GENERATION)}
            for name, tree in files.items():
                if tree is not None:
                    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
                    (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def encode(self, text: str, bos: bool | None = None, eos: bool = False) -> np.ndarray:
        """Token ids of `text`, int32 [n], after bos_id and before eos_id if these are True.

        bos = None: after bos_id, unless tokenizer_config.json says `add_bos_token: false`.

        Raises:
          InputError: `text` is not valid Unicode (it holds a lone surrogate).
        """
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None, eos: bool = False) -> list[np.ndarray]:
        """`encode` of every text, on all cores; long texts in pieces, with the same result in less memory."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(f"texts: expected a list of texts, got {type(texts).__name__}")
        for text in texts:
            _check_text(text)
        pieces = [(i, piece) for i, text in enumerate(texts) for piece in self._pieces_of(text)]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        while pieces:
            size, count = 0, 0
            while count < len(pieces) and (not count or size < _ENCODED_AT_ONCE):
                size, count = size + len(pieces[count][1]), count + 1
            try:
                encodings = self._plain.encode_batch_fast([p for _, p in pieces[:count]], add_special_tokens=False)
            except TypeError as error:  # of a str, the library's way to refuse this
                raise InputError("text: not valid Unicode, it holds half of a surrogate pair; correct it") from error
            for (i, _), encoding in zip(pieces[:count], encodings, strict=True):
                found[i].append(np.array(encoding.ids, np.int32))
            del pieces[:count]
        bos = self.adds_bos if bos is None else bos
        before, after = [np.array([self.bos_id], np.int32)] * bos, [np.array([self.eos_id], np.int32)] * eos
        return [np.concatenate([*before, *parts, *after, np.zeros(0, np.int32)]) for parts in found]

    def encode_chat(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> np.ndarray:
        """A conversation as the tokenizer's chat template writes it, int32 [n].

        A tokenizer without a template uses the reference's (`chat.REFERENCE`): every message is header, role, header
        end, two line breaks, stripped content, end of turn; the first follows the begin token. Special tokens spelled
        out in a message stay text.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": ...}.
          reply: end with the assistant's header, for the model to continue; False: end with the end token.

        Raises:
          InputError: no messages, one without role or content, a template that refuses them, or a tokenizer without
            the special tokens of the template.
        """
        return self.encode_written(self.write_chat(messages, reply))[0]

    def encode_conversation(
        self, messages: Sequence[Mapping[str, str]], reply: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_chat` and, bool [n], which tokens are the assistant's: those in `{% generation %}` blocks.

        Where a template has none: what each of its messages adds to the prompt for it, up to the end-of-turn token.

        Raises:
          InputError: as `encode_chat`, or the template does not write the start of a conversation as it begins the
            whole.
        """
        return self.encode_written(self.write_chat(messages, reply, find_spans=True))

    def encode_completion(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """A prompt as `encode` gives it, its completion and eos_id, int32 [n]; and which are not the prompt's.

        Where tokens of the joined text reach over the border, both parts are encoded alone, as in generation.

        Raises:
          InputError: as `encode`.
        """
        before, both, after = self.encode_batch([prompt, prompt + completion, completion])
        if not np.array_equal(both[: len(before)], before):
            both = np.concatenate([before, after[int(self.adds_bos) :]])
        ids = np.append(both, np.int32(self.eos_id))
        return ids, np.arange(len(ids)) >= len(before)

    def write_chat(self, messages: Sequence[Mapping[str, str]], reply: bool = True, *, find_spans: bool = False) -> str:
        """`encode_chat` as text. Only `encode_written` reads special tokens out of it.

        Special tokens spelled out in a message carry a mark that keeps them text.
        """
        bos_token, eos_token = self._ends
        return chat.render(
            self._config.get("chat_template"),
            messages,
            add_generation_prompt=reply,
            bos_token=bos_token,
            eos_token=eos_token,
            special=list(self.special_ids),
            find_spans=find_spans,
        )

    def encode_written(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text that begins with the result of `write_chat`, and which of them are the assistant's."""
        _check_text(text)
        ids: list[int] = []
        scored: list[bool] = []
        for special, run, spans in chat.runs(text, list(self.special_ids)):
            if special:
                ids.append(self.special_ids[run])
                scored.append(bool(spans))
                continue
            encoding = self._plain.encode(run, add_special_tokens=False)
            ids += encoding.ids
            scored += [any(start < b and end > a for a, b in spans) for start, end in encoding.offsets]
        return np.array(ids, np.int32), np.array(scored, bool)

    def decode(
        self, ids: Iterable[int], skip_special: bool = True, *, after: Iterable[int] = (), stop: Sequence[str] = ()
    ) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are skipped.

        Args:
          ids: of the tokens.
          skip_special: leave special tokens out.
          after: ids that come before, whose text is left out: a space between the two belongs to the result.
          stop: the text ends before the first of these.

        Raises:
          InputError: an empty stop string.
        """
        stream = self.decode_stream(skip_special, after=after, stop=stop)
        return stream.push(*_ids(ids)) + stream.end()

    def decode_stream(
        self, skip_special: bool = True, *, after: Iterable[int] = (), stop: Sequence[str] = ()
    ) -> DecodeStream:
        """A decoder for ids that arrive one at a time; arguments as those of `decode`."""
        return DecodeStream(self, skip_special, after, stop)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token within a text; of a special token, those of its name; b"" outside the vocabulary."""
        if not self._is_text(token, skip_special=False):
            return b""
        if self.pieces is not None:
            return self.pieces[token]
        return self._backend.decode([token], skip_special_tokens=False).encode()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the number of entries, unless the vocabulary has holes."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def check_fits(self, vocab_size: int, where: str | Path) -> None:
        """Raise InputError unless a model of `vocab_size` entries, in `where`, has all ids of this tokenizer."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"{where}: its tokenizer has {self.vocab_size} entries, the model only {vocab_size}, so it is another "
                "model's; put the model's own tokenizer there"
            )

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token by its text."""
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in sorted(added.items()) if token.special}
        for i in (self.bos_id, self.eos_id, self.pad_id):  # special by their role, however they were added
            special.setdefault(str(self._backend.id_to_token(i)), i)
        others = self._config.get("additional_special_tokens")
        for token in others if isinstance(others, list) else []:
            text = _content(token)
            if isinstance(text, str) and (found := self._backend.token_to_id(text)) is not None:
                special.setdefault(text, found)
        return {text: i for text, i in special.items() if not self._is_byte(text)}

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Where a generated text ends: eos_id, the end of the assistant's turn, what generation_config.json names."""
        found = {self.eos_id, self._end_of_turn}
        named = self._config.get(_GENERATION, {}).get("eos_token_id")
        for i in named if isinstance(named, list) else [named]:
            if i is not None and 0 <= i < self.vocab_size:
                found.add(i)
        return tuple(sorted(found))

    @property
    def _end_of_turn(self) -> int:
        """The first special token that the chat template writes after what the assistant says, or eos_id."""
        try:
            found = chat.end_of_turn(self._config.get("chat_template"), *self._ends, list(self.special_ids))
        except InputError:  # none
            found = None
        return self.eos_id if found is None else self.special_ids[found]

    @property
    def _ends(self) -> tuple[str, str]:
        """The begin token and the end token, as templates write them."""
        return str(self._backend.id_to_token(self.bos_id)), str(self._backend.id_to_token(self.eos_id))

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of everything that decides encoding and decoding: equal hashes mean interchangeable tokenizers.

        Padding, truncation and the post-processor, which `encode` never uses, are left out; so is the file's layout.
        """
        canonical = json.dumps([self._used, *self._roles], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def added_to(self, other: Tokenizer) -> list[str] | None:
        """Special tokens that this tokenizer has beyond those of `other`, by id; None if the two differ otherwise.

        Texts begin, end and are padded as with `other`, or with such a token.
        """
        size = other.vocab_size
        new = sorted((i, text) for text, i in self.special_ids.items() if i >= size)
        mine, theirs = self._used, other._used
        for tree in (mine, theirs):
            tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < size]
        roles = all(a == b or a >= size for a, b in zip(self._roles, other._roles, strict=True))
        complete = [i for i, _ in new] == list(range(size, self.vocab_size))
        return [text for _, text in new] if mine == theirs and roles and complete else None

    @property
    def _roles(self) -> tuple[int, int, int]:
        return self.bos_id, self.eos_id, self.pad_id

    @property
    def _used(self) -> Config:
        """What of tokenizer.json decides encoding and decoding here."""
        return {name: x for name, x in self._tree.items() if name not in ("padding", "truncation", "post_processor")}

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text in each token, int32 [vocab_size]; 0 for special tokens.

        The bytes of a text are the sum over its tokens, so bits per byte = nats / ln 2 / sum of `token_bytes[labels]`.
        Text is what `decode` gives back, and a space that the tokenizer puts before a text counts. All zeros if the
        tokenizer does not say what the bytes of a token are; -1 for the token of unknown characters.
        """
        if self.pieces is None:
            return np.zeros(self.vocab_size, np.int32)
        lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        lengths[list(self.special_ids.values())] = 0
        if self._loses_characters:
            lengths[self._backend.token_to_id(str(self._unknown))] = -1
        return lengths

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """Encodes text: never into special tokens, which have a text here that none holds."""
        tree, special = self._tree, {*self.special_ids, *([self._unknown] if self._unknown else [])}
        if not self._reached(tree, special):  # reading a large vocabulary again takes seconds
            self._backend.encode_special_tokens = True
            return self._backend
        model, names = tree["model"], {token: f"\ufdd0{token}\ufdd0" for token in special}
        for token in tree["added_tokens"]:
            if token["content"] in special:
                token |= {"content": names[token["content"]], "special": True, "normalized": False}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # unigram
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
            if model["byte_fallback"]:  # a spelled <0x0A> stays text too
                cut = {"type": "Split", "pattern": {"Regex": f"<(?={_BYTE.pattern[1:]})"}, "behavior": "Isolated"}
                steps = [step for step in (tree["pre_tokenizer"], cut | {"invert": False}) if step]
                tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        if "merges" in model:
            model["merges"] = [[a, b] for a, b in model["merges"] if not special & {a, b, a + b}]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        plain = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": None}))
        plain.encode_special_tokens = True
        return plain

    @staticmethod
    def _reached(tree: Config, special: set[str]) -> bool:
        """Whether a text could be encoded into special tokens that it spells."""
        model = tree["model"]
        if model["type"] != "BPE" or model["ignore_merges"]:
            return True
        merged = any(not special.isdisjoint((a, b, a + b)) for a, b in model["merges"])
        single = any(len(token) == 1 and token in model["vocab"] for token in special)
        matched = any(token["content"] in special and not token["special"] for token in tree["added_tokens"])
        return merged or single or matched

    @property
    def _tree(self) -> Config:
        """A copy of what tokenizer.json holds."""
        return json.loads(self._backend.to_str())

    @functools.cached_property
    def _unknown(self) -> str | None:
        """The token of characters that are not in the vocabulary, if there is one."""
        model = self._tree["model"]
        if model.get("unk_id") is not None:
            return model["vocab"][model["unk_id"]][0]
        unknown = model.get("unk_token")
        return unknown if unknown and self._backend.token_to_id(unknown) is not None else None

    @property
    def _loses_characters(self) -> bool:
        """Whether some characters become the unknown token."""
        vocab = self._backend.get_vocab(with_added_tokens=False)
        bytes_known = self._tree["model"].get("byte_fallback") and all(f"<0x{b:02X}>" in vocab for b in range(256))
        by_byte = self._decoding is not None and self._decoding.by_byte
        return self._unknown is not None and not bytes_known and not by_byte

    @functools.cached_property
    def _decoding(self) -> _Decoding | None:
        """How tokens become text, if each of them by itself does."""
        decoder = self._tree["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        if "ByteLevel" in kinds:
            return _Decoding(True, None, False, False)
        space, drops = None, False
        for step in steps:
            if step.get("type") == "Metaspace":
                space, drops = step["replacement"], step.get("prepend_scheme", "always") != "never"
            elif step.get("type") == "Replace":
                pattern = step["pattern"].get("String")
                if pattern is None or step["content"] != " ":
                    return None
                space = pattern
            elif step.get("type") == "Strip":
                if (step["content"], step["start"] > 1, step["stop"]) != (" ", False, 0):
                    return None
                drops = drops or step["start"] == 1
            elif step.get("type") not in ("ByteFallback", "Fuse"):
                return None
        return _Decoding(False, space, "ByteFallback" in kinds, drops)

    @functools.cached_property
    def pieces(self) -> list[bytes] | None:
        """The bytes of every token (special tokens: of their text), or None if its neighbours decide as well."""
        how = self._decoding
        if how is None:
            return None
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        byte_of = {character: byte for byte, character in enumerate(training.characters_of_bytes())}
        pieces = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if how.by_byte and token not in added and all(c in byte_of for c in token):
                pieces[i] = bytes(byte_of[c] for c in token)
            elif how.byte_fallback and _BYTE.fullmatch(token):
                pieces[i] = bytes([int(token[3:5], 16)])
            else:
                pieces[i] = (token.replace(how.space, " ") if how.space else token).encode()
        return pieces

    def _pieces_of(self, text: str) -> Iterator[str]:
        """`text`, if it is long, cut at line starts that are also boundaries of the pre-tokenizer."""
        start = 0
        while self._may_cut and len(text) - start > _LONG:
            at = next((m.end() for m in _LINE_START.finditer(text, start + _LONG) if self._cuts(text, m.end())), None)
            if at is None:
                break
            yield text[start:at]
            start = at
        yield text[start:] if start else text

    def _cuts(self, text: str, at: int) -> bool:
        first = max(at - 100, 0)
        words = self._backend.pre_tokenizer.pre_tokenize_str(text[first : at + 100])
        return any(begin == at - first for _, (begin, _) in words)

    @functools.cached_property
    def _may_cut(self) -> bool:
        # A piece must be encoded alone as it is within the text: no prefix, no normalisation.
        tree, how = self._tree, self._decoding
        plain = how is not None and how.by_byte and tree["normalizer"] is None and tree["pre_tokenizer"] is not None
        prefix = '"add_prefix_space": true' in json.dumps(tree["pre_tokenizer"])
        return plain and not prefix and not any("\n" in token["content"].strip("\n") for token in tree["added_tokens"])

    def _is_text(self, i: int, skip_special: bool) -> bool:
        # A model with a padded embedding can produce ids beyond the vocabulary, which have no text.
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
        if self._is_byte(token):
            raise InputError(f"{where}: {name} = {token!r} is also a byte of ordinary text; name another token")
        if name == "eos_token" and token == self._unknown and self._loses_characters:
            raise InputError(f"{where}: {name} = {token!r} also stands for unknown characters; name another token")
        return found

    def _is_byte(self, token: str) -> bool:
        """Whether a token is one byte of any text. An added token of that spelling has the same id."""
        if len(token) != 1 or token not in training.characters_of_bytes():
            return False
        return self._decoding is not None and self._decoding.by_byte


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"text: expected text, got {type(text).__name__}; give a str")


def _ids(ids: Iterable[int]) -> list[int]:
    try:
        return [operator.index(i) for i in ids]
    except TypeError as error:
        raise InputError(f"ids = {one_line(ValueError(ids))}: must be a list of integers") from error


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no {name} there; give a folder that holds a saved tokenizer") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}/{name}: cannot be read ({error})") from error


def _read_object(folder: Path, name: str) -> Config:
    try:
        found = json.loads(_read(folder, name))
    except ValueError as error:  # numbers of thousands of digits too
        raise InputError(f"{folder}/{name}: not JSON ({one_line(error)}); copy it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{folder}/{name}: expected an object, found {type(found).__name__}")
    return found


def _content(token: object) -> object:
    """A token as tokenizer_config.json writes it: text, or an object with its text under `content`."""
    return token.get("content") if isinstance(token, dict) else token


class _Search:
    """Looks for a text in characters that arrive one at a time: all of them cost a constant each, in the mean.

    Knuth, Morris and Pratt, "Fast pattern matching in strings" (1977). After the text has come, nothing may be pushed.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0  # characters of `text` that what has come ends with
        self._shorter = [0]  # of the first n + 1 characters: the longest proper beginning that is also their end
        for character in text[1:]:
            self.push(character)
            self._shorter.append(self.matched)
        self.matched = 0

    def push(self, character: str) -> bool:
        """Whether the text is complete now."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class DecodeStream:
    """Turns ids into text as they arrive; a character split over several tokens is returned with its last token.

    The results of all `push` calls and the final `end`, joined, are exactly `Tokenizer.decode` of the ids
    (`tokenizers.decoders.DecodeStream` has no `end`, so it loses an incomplete character).
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, after: Iterable[int] = (), stop: Sequence[str] = ()
    ) -> None:
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop = {stop!r}: must be a list of texts, none of them empty")
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._stop = [_Search(s) for s in stop]
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string has come."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        how, before = tokenizer._decoding, [i for i in _ids(after) if tokenizer._is_text(i, skip_special)]
        self._drop_space = how is not None and how.drops_first_space and not before
        self._ids = before if how is None else []  # only for tokenizers whose tokens depend on their neighbours
        self._sent = tokenizer._backend.decode(self._ids, skip_special_tokens=False)

    def push(self, *tokens: int) -> str:
        """Text completed by these tokens, possibly empty."""
        fresh = self._decoded(tokens)
        if self.stopped or not self._stop:
            return "" if self.stopped else fresh
        text = self._held + fresh
        for end, character in enumerate(fresh, len(self._held) + 1):
            found = [len(search.text) for search in self._stop if search.push(character)]
            if found:  # the first that is complete, however the text arrives
                self.stopped, self._held = True, ""
                return text[: end - max(found)]
        shown = len(text) - max(search.matched for search in self._stop)
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """The rest of the text when no token follows: U+FFFD for an incomplete character, or nothing."""
        rest = self._utf8.decode(b"", final=True) + (self._fresh() if self._ids else "")
        return "" if self.stopped else self._held + rest

    def _decoded(self, tokens: Sequence[int]) -> str:
        kept = [i for i in _ids(tokens) if self._tokenizer._is_text(i, self._skip_special)]
        pieces = self._tokenizer.pieces
        if pieces is None:
            self._ids += kept
            return self._fresh(hold="\ufffd") if kept else ""
        data = b"".join(pieces[i] for i in kept)
        if self._drop_space and data:
            self._drop_space, data = False, data.removeprefix(b" ")
        return self._utf8.decode(data)

    def _fresh(self, hold: str | None = None) -> str:
        text = self._tokenizer._backend.decode(self._ids, skip_special_tokens=False)
        if hold and text.endswith(hold):
            return ""
        fresh, self._sent = text[len(self._sent) :], text
        return fresh
