"""Chat templates: jinja2. What the assistant says is in `{% generation %}` blocks, or found where there are none."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rdlm.config import InputError, one_line

REFERENCE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|begin_header|>Huginn<|end_header|>\n\n' }}"
    "{% generation %}{{ message['content'] | trim }}{{ '<|end_turn|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ '<|begin_header|>' + message['role'] + '<|end_header|>\n\n' + message['content'] | trim + '<|end_turn|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_header|>Huginn<|end_header|>\n\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""The reference's rules (arXiv 2502.05171), for tokenizers without a template."""

Template = str | list[dict[str, str]] | None
"""`chat_template` of tokenizer_config.json: text, several named ones (the "default" one is used), or none."""

# Unicode reserves these for use inside a program: begin and end of the assistant's words, a mark before every character
# of a message that could be part of a special token, and the end of what the template wrote.
_BEGIN, _END, _GUARD, _REST = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_RESERVED = re.compile(f"[{_BEGIN}{_END}{_GUARD}{_REST}]")
_ASKED, _SAID = {"role": "user", "content": "a"}, "qj"  # a conversation to see how the template writes one
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


def render(
    template: Template,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
    special: Sequence[str],
    find_spans: bool = False,
) -> str:
    """A conversation as text that `runs` can split again. Plain text may be added to it.

    Args:
      template: see `Template`.
      messages: {"role": ..., "content": ...}; other fields are passed to the template as well.
      add_generation_prompt: end with the header of the assistant's reply.
      bos_token: for the template.
      eos_token: for the template.
      special: all special tokens of the tokenizer.
      find_spans: mark what the assistant says also where the template has no `{% generation %}` blocks, and remove the
        marks around replies that say nothing.

    Raises:
      InputError: no messages, one without role or content, a template that is invalid or refuses them, or spans that
        cannot be found.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages: expected a list of {{'role': ..., 'content': ...}}, got {type(messages).__name__}")
    if not messages:
        raise InputError("messages: at least one is needed")
    chosen, guarded = _chosen(template, special), []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{i}]: expected {{'role': ..., 'content': ...}}, got {type(message).__name__}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise InputError(f"messages[{i}]: {field!r} is missing or not text")
        # A role, which is a word, is often part of a special token that the template builds, such as <|user|>.
        role = _guard(message["role"], special, edges=not re.fullmatch(r"[\w -]*", message["role"]))
        if message.get("tool_calls") and "tool_calls" not in chosen:
            message = {**message, "content": _with_calls(message["content"], message["tool_calls"], f"messages[{i}]")}
        guarded.append({**_guarded(message, special, f"messages[{i}]"), "role": role})

    written = _writer(chosen, bos_token, eos_token, tuple(special))
    text = written.text(guarded, add_generation_prompt)
    if not find_spans:
        return text + _REST
    if _GENERATION.search(chosen):
        return _without_empty_spans(text, special) + _REST
    pieces, done = [], 0
    for i, message in enumerate(guarded):
        if message["role"] == "assistant" and _says_something(message):
            begin, end = _turn(text, guarded, i, written)
            if not done <= begin <= end:
                raise InputError(
                    f"chat template {' '.join(chosen.split())[:60]!r}: does not write the start of a conversation as "
                    f"the start of the whole, so what the assistant says in message {i} cannot be found; put "
                    "{% generation %} and {% endgeneration %} around it in the template"
                )
            pieces += [text[done:begin], _BEGIN, text[begin:end], _END]
            done = end
    return _without_empty_spans("".join([*pieces, text[done:]]), special) + _REST


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a reply has words, or other content that a template may write (tool calls, thoughts)."""
    return any(value.strip() if isinstance(value, str) else value for name, value in message.items() if name != "role")


def _without_empty_spans(text: str, special: Sequence[str]) -> str:
    """`text` without the marks around replies of white space and special tokens alone: an empty reply is no lesson."""
    return re.sub(f"{_BEGIN}((?:\\s|{_pattern(tuple(special)).pattern})*){_END}", r"\1", text)


def end_of_turn(template: Template, bos_token: str, eos_token: str, special: Sequence[str]) -> str | None:
    """The first special token that the template writes after what the assistant says, or None. Arguments as `render`'s.

    Raises:
      InputError: no template can be chosen (see `render`).
    """
    return _writer(_chosen(template, special), bos_token, eos_token, tuple(special)).end_of_turn


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A template and the tokens it needs."""

    template: str
    bos_token: str
    eos_token: str
    special: tuple[str, ...]

    def text(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """The messages as the template writes them; prompt: with the header of a reply. Raises InputError."""
        try:
            return _compiled(self.template).render(
                messages=messages, add_generation_prompt=prompt, bos_token=self.bos_token, eos_token=self.eos_token
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(f"chat template: {one_line(error)}") from error

    def attempt(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str | None:
        """`text`, or None if the template refuses these messages."""
        try:
            return self.text(messages, prompt)
        except InputError:
            return None

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The first special token behind a reply."""
        text = self.attempt([_ASKED, {"role": "assistant", "content": _SAID}], False) or ""
        behind = text.partition(_SAID)[2]
        found = (m[0] for m in _pattern(self.special).finditer(behind) if m[0])
        return next((token for token in found if token != self.bos_token or token == self.eos_token), None)

    @functools.cached_property
    def header(self) -> str:
        """What the template writes before a reply: a text with a special token, or nothing if that is not known."""
        prompt, without = self.attempt([_ASKED], True), self.attempt([_ASKED], False)
        for before in (without or "", (without or "").rstrip().removesuffix(self.eos_token)):
            if prompt and before and prompt.startswith(before):
                header = prompt[len(before) :]
                return header if any(m[0] for m in _pattern(self.special).finditer(header)) else ""
        return ""


_writer = functools.cache(_Writer)


def _turn(text: str, messages: Sequence[Mapping[str, Any]], i: int, written: _Writer) -> tuple[int, int]:
    """Where in `text`, the whole conversation, the reply `messages[i]` begins, and where its end-of-turn token ends.

    It begins behind the prompt for it, and is what the conversation up to it adds to that. Some templates write the
    past otherwise (without thoughts, or not as the last reply): there it begins behind the header of a reply, and must
    be its content. (-1, -1) if neither is so.
    """
    content = str(messages[i]["content"]).strip()
    calls = bool(messages[i].get("tool_calls"))  # which a template writes in its own way
    prompt, whole = written.attempt(messages[:i], True), written.attempt(messages[: i + 1], False)
    begin, limit, joined = -1, len(text), False
    if prompt is not None and text.startswith(prompt):
        begin = len(prompt)
        # Some templates write the end token once, at the end of a conversation.
        for until in [] if whole is None else [whole.rstrip().removesuffix(written.eos_token), whole]:
            if text.startswith(until) and until.startswith(prompt):
                limit, joined = len(until), True
    elif written.header:
        begins = [m.end() for m in re.finditer(re.escape(written.header), text)]
        replies = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if len(begins) - text.endswith(written.header) == len(replies):
            begin = begins[replies.index(i)]
    token = written.end_of_turn
    at = text.find(token, begin, limit) if token and begin >= 0 else -1
    end = limit if at < 0 or token is None else at + len(token)
    said = text[begin : limit if at < 0 else at].strip()
    if joined and (token or calls or said.endswith(content)):  # without a token, what follows may be another header
        return begin, end
    same = calls or (bool(said) >= bool(content) and (said.endswith(content) or content.endswith(said)))
    return (begin, end) if at >= 0 and same else (-1, -1)


def _with_calls(content: str, calls: object, where: str) -> str:
    """A message with its tool calls below, one JSON object a line, for templates that write none. Raises InputError."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise InputError(f"{where}: 'tool_calls' must be a list of objects")
    return "\n".join([content] * bool(content) + [json.dumps(c.get("function", c), ensure_ascii=False) for c in calls])


def _chosen(template: object, special: Sequence[str]) -> str:
    """The text of the template to use. Raises InputError."""
    if isinstance(template, list):
        names = [t.get("name") if isinstance(t, Mapping) else None for t in template]
        if "default" not in names:
            raise InputError(
                f"chat template: none of {', '.join(map(str, names)) or 'an empty list'} is named 'default'; give the "
                "one to use that name in tokenizer_config.json"
            )
        template = template[names.index("default")].get("template")
    elif template is None:
        template = REFERENCE
        missing = [t for t in ("<|begin_header|>", "<|end_header|>", "<|end_turn|>") if t not in special]
        if missing:
            raise InputError(
                f"tokenizer: has no chat template, and no special token {missing[0]!r}, which the reference's needs; "
                "add chat_template to tokenizer_config.json"
            )
    if not isinstance(template, str):
        raise InputError(f"chat template: must be text, not {type(template).__name__}; correct tokenizer_config.json")
    return template


def runs(text: str, special: Sequence[str]) -> Iterator[tuple[bool, str, list[tuple[int, int]]]]:
    """Rendered text as special tokens and the text between them.

    Yields:
      Whether it is a special token; the token or the text; the spans of the assistant's words in it, as (begin, end).
    """
    speaking = False
    written, _, rest = text.partition(_REST)
    pieces = re.split(f"((?<!{_GUARD})(?:{_pattern(tuple(special)).pattern}))", written)
    for i, piece in enumerate(pieces):
        if i % 2:
            yield True, piece, [(0, len(piece))] if speaking else []
            continue
        plain, spans, start = "", [], 0
        for part in re.split(f"({_RESERVED.pattern})", piece):
            if part == _BEGIN:
                speaking, start = True, len(plain)
            elif part == _END:
                spans.append((start, len(plain)))
                speaking = False
            elif part != _GUARD:
                plain += part
        if speaking:
            spans.append((start, len(plain)))
        if i == len(pieces) - 1:
            plain += rest
        if plain:
            yield False, plain, spans


def _guarded(value: Any, special: Sequence[str], where: str) -> Any:
    """JSON with a guard before whatever its texts hold of special tokens. Raises InputError."""
    if isinstance(value, Mapping):
        names = {_guard(k, special, edges=False) if isinstance(k, str) else k: k for k in value}
        return {new: _guarded(value[old], special, f"{where}: {old!r}") for new, old in names.items()}
    if isinstance(value, list | tuple):
        return [_guarded(v, special, where) for v in value]
    if not isinstance(value, str):
        return value
    if _RESERVED.search(value):
        raise InputError(f"{where} holds one of U+FDD0 to U+FDD3, which are not characters")
    if not value.isascii() and (half := re.search("[\ud800-\udfff]", value)):
        raise InputError(f"{where} is not valid Unicode: half of a surrogate pair, {half[0]!r}; correct it")
    return _guard(value, special)


def _guard(text: str, special: Sequence[str], edges: bool = True) -> str:
    """`text` with a guard before every character of a special token in it, so that none of them is read there.

    edges: also of what a special token ends or begins with, at the beginning and the end: what the template writes
    before or after could complete it.
    """
    known, inside = tuple(special), set[int]()
    for match in re.finditer(f"(?=({_pattern(known).pattern}))", text):  # overlapping ones too
        inside.update(range(match.start(1), match.end(1)))
    if edges and text:
        heads, tails, longest = _fragments(known)
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())  # templates strip
        for n in range(1, min(longest, end - begin + 1)):
            if text[begin : begin + n] in tails:
                inside.update(range(begin, begin + n))
            if text[end - n : end] in heads:
                inside.update(range(end - n, end))
    return "".join(_GUARD * (i in inside) + c for i, c in enumerate(text)) if inside else text


@functools.cache
def _fragments(special: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], int]:
    """What special tokens begin with, what they end with, and the length of the longest one."""
    cuts = [(token[:n], token[n:]) for token in special for n in range(1, len(token))]
    return frozenset(a for a, _ in cuts), frozenset(b for _, b in cuts), max(map(len, special), default=0)


@functools.cache
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)
