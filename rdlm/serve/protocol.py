"""Bodies of requests: OpenAI's fields, and those for depth. What they ask for, checked."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rdlm.config import InputError, Sampling
from rdlm.decode.sampling import MAX_BIASES, as_arrays
from rdlm.serve.errors import APIError, from_input_error, wrong
from rdlm.serve.grammar import ANY_OBJECT, Grammar
from rdlm.serve.service import Service, new_seed
from rdlm.serve.worker import STOPS, Ask

Id = Annotated[int, Field(ge=0, lt=2**31)]
LONGEST_STOP = 256  # characters


def _prompt(value: object) -> object:
    """A text, texts, token ids, or lists of those; anything else is refused in one sentence."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(x, str) for x in value) or _are_ids(value):
            return value
        if all(isinstance(x, list) and x and _are_ids(x) for x in value):
            return value
    raise ValueError("must be a text, a list of texts, token ids, or lists of token ids, none of them empty")


def _are_ids(value: list[object]) -> bool:
    return all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31 for x in value)


def _stop(value: object) -> object:
    words: Any = [value] if isinstance(value, str) else value
    few = isinstance(words, list) and len(words) <= 16
    if words is None or (few and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in words)):
        return value
    raise ValueError(
        f"must be a text or a list of at most 16 texts, none of them empty or longer than {LONGEST_STOP} characters"
    )


def _bias(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, dict) and len(value) <= MAX_BIASES:
        ids = all(isinstance(i, str) and re.fullmatch("[0-9]{1,9}", i) for i in value)
        if ids and all(type(x) in (int, float) and abs(x) <= 100 for x in value.values()):
            return {str(int(i)): float(x) for i, x in value.items()}
    raise ValueError(f"must be an object of at most {MAX_BIASES} token ids with numbers from -100 to 100")


class StreamOptions(BaseModel):
    """What a stream contains."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """A schema that the answer must follow."""

    model_config = ConfigDict(strict=True, extra="allow")

    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    name: str | None = None
    strict: bool | None = None  # it is always followed


class ResponseFormat(BaseModel):
    """What the answer must be: any text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            need = "needs json_schema, an object with a schema" if self.json_schema is None else "takes no json_schema"
            raise ValueError(f"type {self.type!r} {need}")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema of the answer, if it must follow one."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class Body(BaseModel):
    """Any request about the model. Null is as good as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None


class Generate(Body):
    """What completions and chats share."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_bias)] = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop)] = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    prefix: bool | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    num_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    exit: str | None = None
    threshold: Annotated[float, Field(ge=0)] | None = None
    min_steps: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """The most new tokens, and the field that says so."""
        return "max_tokens", self.max_tokens

    @property
    def num_prompts(self) -> int:
        """How many there are."""
        return 1

    @property
    def log_probs(self) -> bool:
        """Whether the answer says how likely its tokens were."""
        return False

    @property
    def likeliest(self) -> int:
        """How many other tokens it says that of."""
        return 0


class CompletionBody(Generate):
    """POST /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Texts or token ids, one or several."""
        given: Any = self.prompt
        return given if isinstance(given, list) and not isinstance(given[0], int) else [given]

    @property
    def num_prompts(self) -> int:
        """How many there are."""
        return len(self.prompts)

    @property
    def log_probs(self) -> bool:
        """Whether the answer says how likely its tokens were."""
        return self.logprobs is not None

    @property
    def likeliest(self) -> int:
        """How many other tokens it says that of."""
        return self.logprobs or 0


class Part(BaseModel):
    """A part of a message. Only text can be read."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """For a chat template."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatBody(Generate):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """The most new tokens, and the field that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def log_probs(self) -> bool:
        """Whether the answer says how likely its tokens were."""
        return bool(self.logprobs)

    @property
    def likeliest(self) -> int:
        """How many other tokens it says that of."""
        return self.top_logprobs or 0


class TokenizeBody(Body):
    """POST /v1/tokenize: a text or a chat."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /v1/detokenize."""

    tokens: list[Id]


_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "tool_choice",
    "user",
}  # fmt: skip
_FEW, _SHORT = 8, 1000  # texts and their characters, which are encoded sooner than another thread would be asked
_NOTHING: tuple[object, ...] = (None, False, 0, "", "none", "auto")
_UNSERVED: dict[str, tuple[object, ...]] = {  # fields that would change the answer, and values that change nothing
    "audio": (),
    "best_of": (1,),
    "function_call": (),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": (),
    "tools": ([],),
}


def check_fields(body: Body, service: Service) -> None:
    """Refuse another model, what this server cannot do, and, if it shall, fields that it does not know.

    Raises:
      APIError: one of these.
    """
    if body.model is not None and body.model != service.name:
        message = f"model: there is no {body.model[:60]!r} here, only {service.name!r}"
        raise APIError(404, message, "model", "model_not_found")
    for name, value in (body.model_extra or {}).items():
        if name in _UNSERVED:
            if value not in (*_NOTHING, *_UNSERVED[name]):
                raise APIError(400, f"{name}: is not served here; leave it out", name, "unsupported_parameter")
        elif service.options.refuse_unknown and name not in _WITHOUT_EFFECT:
            raise APIError(
                400,
                f"{name[:40]!r}: this server does not know this field; leave it out",
                name[:40],
                "unknown_parameter",
            )


async def encode_chat(service: Service, messages: Sequence[Message]) -> np.ndarray:
    """The prompt of a chat, made in another thread.

    Raises:
      APIError: the chat template refuses it.
    """
    try:
        plain = [message.plain() for message in messages]
        return await asyncio.to_thread(service.tokenizer.encode_chat, plain)
    except InputError as error:
        raise from_input_error(error, "messages") from error
    except RecursionError as error:
        raise wrong("messages", "lists or objects in them are nested too deeply") from error


async def encode_texts(service: Service, prompts: Sequence[str | list[int]]) -> list[np.ndarray]:
    """The prompts of a completion. Long or many texts are encoded in another thread.

    Raises:
      APIError: not valid Unicode.
    """

    def encode() -> list[np.ndarray]:
        return [service.tokenizer.encode(p) if isinstance(p, str) else np.asarray(p, np.int32) for p in prompts]

    texts = [p for p in prompts if isinstance(p, str)]
    try:
        short = len(texts) <= _FEW and sum(map(len, texts)) <= _SHORT
        return encode() if short else await asyncio.to_thread(encode)
    except InputError as error:
        raise from_input_error(error, "prompt") from error


async def grammar_of(service: Service, body: Generate) -> Grammar | None:
    """The grammar of the answers to an admitted request, if they must have one.

    Raises:
      APIError: none can be had, or fields that contradict it.
    """
    schema = None if body.response_format is None else body.response_format.schema_wanted
    if schema is None:
        return None
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise wrong(name, "an answer with a response_format ends when it is complete; leave one of them out")
    return await service.grammar(schema)


def understand(service: Service, body: Generate, prompts: list[np.ndarray]) -> Ask:
    """What a body asks for, but for the grammar of the answers.

    Raises:
      APIError: something that is not served.
    """
    field = "messages" if isinstance(body, ChatBody) else "prompt"
    limits = []
    name, wanted = body.limit
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    if wanted == 0 and not echo:
        raise wrong(name, "must be at least 1; only with echo = true it may be 0")
    for prompt in prompts:
        most, room = service.max_context, service.max_context - len(prompt)
        if len(prompt) == 0:
            raise wrong(field, "has no tokens")
        if room < (wanted != 0):
            message = f"has {len(prompt)} tokens, but at most {most - (wanted != 0)} fit into the context of {most}"
            message += "" if wanted == 0 else " with one new token"
            raise APIError(400, f"{field}: {message}", field, "context_length_exceeded")
        if wanted is not None and wanted > room:
            message = f"{wanted} and {len(prompt)} tokens of the prompt exceed the context of {most}"
            raise APIError(400, f"{name}: {message}", name, "context_length_exceeded")
        if (largest := int(prompt.max())) >= service.run.config.vocab_size:
            raise wrong(field, f"{largest} is no token; ids are below {service.run.config.vocab_size}")
        limits.append(room if wanted is None else wanted)
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options", "needs stream = true")
    if body.likeliest and not body.log_probs:
        raise wrong("top_logprobs", "needs logprobs = true")
    highest = service.options.max_priority
    if body.priority is not None and body.priority > highest:
        raise wrong("priority", f"{body.priority} is more than the {highest} that this server allows (--max-priority)")
    if body.prefix and not service.run.config.prefix_attention:
        raise wrong("prefix", "every token of this model sees only those before it; leave it out")
    if body.prefix and echo and body.log_probs:
        raise wrong("prefix", "the tokens of such a prompt have no log-probabilities; leave out echo or logprobs")
    depth = service.depths.choose(body.num_steps, body.exit, body.threshold, body.min_steps)
    tokenizer, words = service.tokenizer, [body.stop] if isinstance(body.stop, str) else body.stop or []
    special = [tokenizer.special_ids[word] for word in words if word in tokenizer.special_ids]
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    ends = () if body.ignore_eos else tokenizer.end_ids
    stop_ids = tuple(dict.fromkeys((*ends, *special, *(body.stop_token_ids or ()))))
    if body.min_tokens and len(stop_ids) > STOPS:
        raise wrong("min_tokens", f"is served with at most {STOPS} tokens that stop, and here are {len(stop_ids)}")
    for prompt_limit in limits:
        if (body.min_tokens or 0) > prompt_limit:
            raise wrong("min_tokens", f"{body.min_tokens} is more than the {prompt_limit} tokens that may be made")
    biases = tuple((int(i), x) for i, x in (body.logit_bias or {}).items())
    for token, _ in biases:
        if token >= service.run.config.vocab_size:
            raise wrong("logit_bias", f"{token} is no token; ids are below {service.run.config.vocab_size}")
    seed = body.seed
    if seed is None:
        seed = new_seed() if temperature > 0 else 0
    sampling = Sampling(
        temperature=temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        min_p=float(body.min_p or 0.0),
        repetition_penalty=1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
        presence_penalty=float(body.presence_penalty or 0.0),
        frequency_penalty=float(body.frequency_penalty or 0.0),
        min_tokens=body.min_tokens or 0,
        logit_bias=biases,
    )
    _check_sampling(sampling)
    return Ask(
        prompts=prompts,
        limits=limits,
        samples=body.n or 1,
        depth=depth,
        sampling=sampling,
        seed=seed,
        stop=tuple(word for word in words if word not in tokenizer.special_ids),
        stop_ids=stop_ids,
        likeliest=body.likeliest,
        prefix=bool(body.prefix),
        priority=body.priority or 0,
        scores=echo and body.log_probs,
    )


def _check_sampling(sampling: Sampling) -> None:
    """Refuse now what the engine would, such as numbers that its float32 cannot tell from 0."""
    try:
        as_arrays(sampling, 1)
    except InputError as error:
        message = str(error).removeprefix("Sampling.")
        raise from_input_error(InputError(message), message.split(" ")[0]) from error


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How an answer is to be written down."""

    chat: bool
    log_probs: bool
    token_ids: bool
    usage: bool  # at the end of a stream
    echo: bool  # the prompt comes first

    @classmethod
    def of(cls, body: Generate) -> Wanted:
        """As the body says."""
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        echo = isinstance(body, CompletionBody) and bool(body.echo)
        return cls(isinstance(body, ChatBody), body.log_probs, bool(body.return_token_ids), usage, echo)
