"""Parts, the units of work of preparation, and what a document is before it is encoded.

A part is a few small files, one large file, or a range of one. It is read from front to back, independently of the
others. How files are cut depends on the files alone, never on the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet

from rdlm.config import InputError
from rdlm.data.manifest import Reading
from rdlm.data.prepare.input_files import COMPRESSED, InputFile, Kind, kind_of, opened

Message = dict[str, Any]
"""One message of a conversation: role, content and other fields that a chat template may read."""


class Pair(NamedTuple):
    """A text of which only the second part is scored."""

    prompt: str
    completion: str


Text = str | list[Message] | Pair
"""A document before it is encoded: plain text, the messages of a conversation, or a prompt and its completion."""


class Conversation(list[Message]):
    """Messages, and where they were read."""

    where: str = ""


_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""Roles by their names in ShareGPT's files."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work. `start` and `end` count bytes (text, jsonl), row groups (parquet) or examples (tfds)."""

    kind: Kind
    paths: tuple[str, ...]
    size: int
    """Bytes of input, for progress."""
    start: int = 0
    end: int | None = None
    """None: to the end."""
    split: str = ""
    """Of a TFDS dataset."""


def cut_files(files: Sequence[InputFile], reading: Reading, part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes`; compressed files are never cut.

    Raises:
      InputError: a parquet file is damaged.
    """
    result: list[Part] = []
    small: list[InputFile] = []  # consecutive files of one kind that share a part

    def flush() -> None:
        if small:
            result.append(Part(kind_of(small[0].path), tuple(f.path for f in small), sum(f.bytes for f in small)))
            small.clear()

    for file in files:
        kind = kind_of(file.path)
        by_line = kind == "jsonl" or (kind == "text" and reading.document != "file")
        if file.bytes > part_bytes and kind == "parquet":
            flush()
            result += _row_group_parts(file, part_bytes)
        elif file.bytes > part_bytes and by_line and not file.path.endswith(COMPRESSED):
            flush()
            count = -(-file.bytes // part_bytes)
            edges = itertools.pairwise(file.bytes * i // count for i in range(count + 1))
            result += [Part(kind, (file.path,), end - start, start, end) for start, end in edges]
        else:
            if small and (sum(f.bytes for f in small) + file.bytes > part_bytes or kind != kind_of(small[0].path)):
                flush()
            small.append(file)
    flush()
    return result


def document_of(tree: Mapping[str, Any], reading: Reading, where: str) -> Text:
    """The document of an example. A prompt and a completion that are messages are one conversation.

    Raises:
      InputError: there is no such field, `text_of` refuses its value, or prompt and completion do not go together.
    """
    found = _field_of(tree, "--field", reading.field, where)
    if not reading.prompt_field:
        return found
    prompt = _field_of(tree, "--prompt-field", reading.prompt_field, where)
    if isinstance(prompt, str) and isinstance(found, str):
        return Pair(prompt, found)
    if isinstance(prompt, str) or isinstance(found, str):
        kinds = ["text" if isinstance(x, str) else "messages" for x in (prompt, found)]
        raise InputError(
            f"{where}: {reading.prompt_field!r} is {kinds[0]}, but {reading.field!r} is {kinds[1]}; write both alike"
        )
    if any(message["role"] == "assistant" for message in prompt):
        raise InputError(
            f"{where}: {reading.prompt_field!r} holds words of the assistant, which would be scored; put all messages "
            "into one field and leave out --prompt-field"
        )
    joined = Conversation([*prompt, *found])
    joined.where = where
    return joined


def is_empty(document: Text) -> bool:
    """Whether there is nothing to learn in a document."""
    words = document.completion if isinstance(document, Pair) else document
    return not words or (isinstance(words, str) and words.isspace())


def texts_of(document: Text) -> list[str]:
    """The texts that a document is made of."""
    return [document] if isinstance(document, str) else [x if isinstance(x, str) else x["content"] for x in document]


def _field_of(tree: Mapping[str, Any], flag: str, field: str, where: str) -> str | list[Message]:
    """The value of a field by its name, or `meta.text` for a field within a field. Raises InputError."""
    value: Any = tree
    for name in [field] if field in tree else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            known = [f"{k}.{inner}" for k, v in tree.items() for inner in (v if isinstance(v, Mapping) else ())]
            pairs = "; prompts and completions: --prompt-field prompt --field completion"
            raise InputError(
                f"{where}: no field {field!r}; pass {flag} with one of: {', '.join(map(repr, [*tree, *known]))}"
                f"{pairs * ({'prompt', 'completion'} <= set(tree))}"
            )
        value = value[name]
    return text_of(value, field, where)


def text_of(value: Any, field: str, where: str) -> str | list[Message]:
    """The value of a field as a document.

    Conversations are returned with `role` and `content` in every message, both text: ShareGPT's `from` and `value` are
    read as these, text in parts is joined, and a message that only calls tools has no words. Text that is a JSON list
    of messages, as tables often hold them, is that list.

    Raises:
      InputError: it is neither text nor a list of messages, messages written as text but not as JSON, or not valid
        Unicode.
    """
    value = utf8(value, where) if isinstance(value, bytes) else value
    found: str | list[Message]
    if isinstance(value, str):
        value = _spelled_out(value, f"{where}: field {field!r}")
    if isinstance(value, str):
        found = value
    elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
        found = Conversation(_message(message, f"{where}: {field}[{i}]") for i, message in enumerate(value))
        found.where = where
    else:
        raise InputError(f"{where}: field {field!r} is {type(value).__name__}, neither text nor a list of messages")
    try:
        utf8_of(found)
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise InputError(
            f"{where}: not valid Unicode ({error.reason}); correct it, or pass --bad-documents skip"
        ) from error
    return found


def _spelled_out(text: str, where: str) -> str | list[Message]:
    """The messages that a text spells out as JSON; another text as it is. Raises InputError."""
    if not _LIST_OF_OBJECTS.match(text):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not _PYTHON_MESSAGES.match(text):
            return text
        raise InputError(
            f"{where} holds chat messages as text that is not JSON; write them with json.dumps, or pass "
            "--bad-documents skip"
        ) from error
    is_chat = all(isinstance(message, dict) and {"role", "from"} & set(message) for message in found)
    return found if is_chat else text


_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{.*\}\s*\]\s*\Z", re.DOTALL)
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:")


def utf8_of(text: Text) -> bytes:
    """A document's bytes; those of a conversation or a pair are JSON with sorted keys."""
    return (text if isinstance(text, str) else json.dumps(text, sort_keys=True, ensure_ascii=False)).encode()


def _message(raw: Message, where: str) -> Message:
    message = {name: value for name, value in raw.items() if value is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        said_by = message.pop("from")
        message["role"] = _SHAREGPT.get(said_by, said_by)
    if "content" not in message:
        message["content"] = message.pop("value", "" if message.get("tool_calls") else None)
    if isinstance(message["content"], list):
        parts = [{"text": part} if isinstance(part, str) else part for part in message["content"]]
        other = next((p for p in parts if not isinstance(p, dict) or not isinstance(p.get("text"), str)), None)
        if other is not None:
            kind = other.get("type") if isinstance(other, dict) else type(other).__name__
            raise InputError(f"{where}: content holds a part that is not text ({kind})")
        message["content"] = "".join(part["text"] for part in parts)
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise InputError(f"{where}: {name!r} is missing or not text; correct it, or pass --bad-documents skip")
    return message


def utf8(content: bytes, where: str) -> str:
    """Bytes as text.

    Raises:
      InputError: they are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} {error.start} bytes on); convert it, or pass --bad-documents skip"
        ) from error


def _row_group_parts(file: InputFile, part_bytes: int) -> list[Part]:
    with opened(file.path) as raw:
        metadata = pyarrow.parquet.ParquetFile(raw).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    edges, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > part_bytes:
            edges.append(i)
            filled = 0
        filled += size
    edges.append(len(sizes))
    share = file.bytes // (len(edges) - 1)
    return [Part("parquet", (file.path,), share, start, end) for start, end in itertools.pairwise(edges)]
