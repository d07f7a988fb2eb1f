"""Chat templates: jinja2. What the assistant says is in `{% generation %}` blocks, or found where there are none."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rdlm.config import InputError

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

# Unicode reserves these for use inside a program: begin and end of the assistant's words, and a mark that keeps special
# tokens spelled out in a message from being read as such.
_BEGIN, _END, _GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = re.compile(f"[{_BEGIN}{_END}{_GUARD}]")
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
    """A conversation as text that `runs` can split again.

    Args:
      template: see `Template`.
      messages: {"role": ..., "content": ...}; other fields are passed to the template as they are.
      add_generation_prompt: end with the header of the assistant's reply.
      bos_token: for the template.
      eos_token: for the template.
      special: all special tokens of the tokenizer.
      find_spans: mark what the assistant says also where the template has no `{% generation %}` blocks.

    Raises:
      InputError: no messages, one without role or content, a template that is invalid or refuses them, or spans that
        cannot be found.
    """
    if not messages:
        raise InputError("messages: at least one is needed")
    guarded = []
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise InputError(f"messages[{i}]: {field!r} is missing or not text")
            if _RESERVED.search(message[field]):
                raise InputError(f"messages[{i}]: {field!r} holds U+FDD0, U+FDD1 or U+FDD2, which are not characters")
        words = {field: _pattern(tuple(special)).sub(_guard, message[field]) for field in ("role", "content")}
        guarded.append({**message, **words})
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if template is None:
        template = REFERENCE
        missing = [t for t in ("<|begin_header|>", "<|end_header|>", "<|end_turn|>") if t not in special]
        if missing:
            raise InputError(f"tokenizer: has no special token {missing[0]!r}, which the chat template needs")

    def written(count: int, prompt: bool) -> str:
        try:
            return _compiled(template).render(
                messages=guarded[:count], add_generation_prompt=prompt, bos_token=bos_token, eos_token=eos_token
            )
        except jinja2.TemplateError as error:
            raise InputError(f"chat template: {' '.join(str(error).split())}") from error

    text = written(len(guarded), add_generation_prompt)
    if not find_spans or _GENERATION.search(template):
        return text
    pieces, done = [], 0
    for i, message in enumerate(guarded):
        if message["role"] == "assistant":
            prompt, whole = written(i, True), written(i + 1, False)
            end = _reply_end(text, prompt, [whole, whole.rstrip().removesuffix(eos_token)], message["content"], special)
            if not done <= len(prompt) <= end:
                raise InputError(
                    f"chat template {' '.join(template.split())[:60]!r}: the start of a conversation is not written as "
                    f"the start of the whole (message {i}), so what the assistant says cannot be found; put "
                    "{% generation %} and {% endgeneration %} around it in the template"
                )
            pieces += [text[done : len(prompt)], _BEGIN, text[len(prompt) : end], _END]
            done = end
    return "".join([*pieces, text[done:]])


def _reply_end(text: str, prompt: str, until: Sequence[str], content: str, special: Sequence[str]) -> int:
    """Where in `text` the reply to `prompt` ends, 0 if that is not clear.

    Args:
      text: the conversation.
      prompt: the conversation before the reply.
      until: the conversation up to the reply; without the end token, which some templates write after the last message.
      content: of the reply.
      special: all special tokens.
    """
    for whole in until:
        if text.startswith(whole) and whole.startswith(prompt):
            return len(whole)
    if text.startswith(prompt):  # some templates write the last reply otherwise than earlier ones
        ended = re.compile(rf"\s*{re.escape(content.strip())}\s*(?:{_pattern(tuple(special)).pattern})")
        if match := ended.match(text, len(prompt)):
            return match.end()
    return 0


def runs(text: str, special: Sequence[str]) -> Iterator[tuple[bool, str, list[tuple[int, int]]]]:
    """Rendered text as special tokens and the text between them.

    Yields:
      Whether it is a special token; the token or the text; the spans of the assistant's words in it, as (begin, end).
    """
    speaking = False
    for i, piece in enumerate(re.split(f"({_pattern(tuple(special)).pattern})", text)):
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
        if plain:
            yield False, plain, spans


def _guard(match: re.Match[str]) -> str:
    return match[0][0] + _GUARD + match[0][1:]


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
