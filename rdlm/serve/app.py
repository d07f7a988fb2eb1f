"""The HTTP interface: OpenAI's paths, health, tokenization."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rdlm.config import InputError
from rdlm.runtime import versions
from rdlm.serve.answers import Json, Writer
from rdlm.serve.errors import APIError, from_input_error, from_validation, wrong
from rdlm.serve.guard import Guard
from rdlm.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generate,
    TokenizeBody,
    Wanted,
    check_fields,
    encode_chat,
    encode_texts,
    grammar_of,
    understand,
)
from rdlm.serve.service import Call, Service, reads_too_slowly

_PAGE, _DOCS = (Path(__file__).with_name(name) for name in ("page.html", "docs.html"))
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(service: Service) -> ASGIApp:
    """The application that serves `service`; its lifespan starts and stops the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="rdlm",
        version=versions()["rdlm"],
        description=__doc__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    app.add_api_route("/", page, include_in_schema=False)
    app.add_api_route("/docs", docs, include_in_schema=False)
    app.add_api_route("/metrics", metrics)
    for path, probe in (("/health", health), ("/ready", ready)):
        app.add_api_route(path, probe)
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/tokenizer_info", tokenizer_info)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    errors: Any = {status: {"description": "An error object"} for status in (400, 401, 404, 413, 429, 500, 503)}
    for path, endpoint in _POSTS.items():
        app.add_api_route(path, endpoint, methods=["POST"], responses={**errors, 422: {"description": "Never"}})
    return Guard(app, service.keys, service.options, service.metrics.http)


async def page(request: Request) -> Response:
    """A chat in the browser: one file that asks for nothing from elsewhere."""
    return HTMLResponse(_PAGE.read_bytes(), headers={"Content-Security-Policy": _POLICY})


async def docs(request: Request) -> Response:
    """All paths and fields, for people; as self-contained."""
    return HTMLResponse(_DOCS.read_bytes(), headers={"Content-Security-Policy": _POLICY})


async def metrics(request: Request) -> Response:
    """Counters and histograms for Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def health(request: Request) -> Response:
    """Status 200 while the engine works."""
    return _state(_service(request).health())


async def ready(request: Request) -> Response:
    """Status 200 while requests are taken."""
    service = _service(request)
    return _state(service.health() or service.admission())


async def models(request: Request) -> Json:
    """The one model."""
    return {"object": "list", "data": [_card(_service(request))]}


async def model(name: str, request: Request) -> Json:
    """The model of this name."""
    service = _service(request)
    if name != service.name:
        raise APIError(404, f"model: there is no {name[:60]!r} here", "model", "model_not_found")
    return _card(service)


async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue a text."""
    return await _generate(request, body, lambda service: encode_texts(service, body.prompts))


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Reply to a chat."""

    async def encode(service: Service) -> list[np.ndarray]:
        return [await encode_chat(service, body.messages)]

    return await _generate(request, body, encode)


async def tokenize(body: TokenizeBody, request: Request) -> Json:
    """Token ids of a text or a chat."""
    service = _service(request)
    check_fields(body, service)
    if (body.prompt is None) == (body.messages is None):
        raise wrong("prompt", "give either a prompt or messages")
    try:
        if body.messages is not None:
            ids = await encode_chat(service, body.messages)
        else:
            bos, text = None if body.add_special_tokens in (None, True) else False, body.prompt or ""
            if bos is False and text in service.tokenizer.special_ids:
                ids = np.asarray([service.tokenizer.special_ids[text]])
            else:
                ids = await asyncio.to_thread(service.tokenizer.encode, text, bos)
    except InputError as error:
        raise from_input_error(error, "prompt") from error
    return {"tokens": ids.tolist(), "count": len(ids), "max_model_len": service.max_context}


async def tokenizer_info(request: Request) -> Json:
    """The texts of the begin and end tokens."""
    tokenizer = _service(request).tokenizer
    names = {token: text for text, token in tokenizer.special_ids.items()}
    return {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}


async def detokenize(body: DetokenizeBody, request: Request) -> Json:
    """The text of token ids."""
    service = _service(request)
    check_fields(body, service)
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)}


_POSTS: dict[str, Callable[..., Any]] = {
    "/v1/completions": completions,
    "/v1/chat/completions": chat_completions,
    "/v1/tokenize": tokenize,
    "/v1/detokenize": detokenize,
    "/tokenize": tokenize,  # where lm-eval looks
    "/detokenize": detokenize,
}


def _service(request: Request) -> Service:
    return request.app.state.service


def _state(problem: APIError | None) -> Response:
    if problem is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": problem.code, **problem.body()}, problem.status, headers=problem.headers)


def _card(service: Service) -> Json:
    found = service.depths.calibrated
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "rdlm",
        "max_model_len": service.max_context,
        "num_steps": service.depths.choose(None, None, None, None).num_steps,
        "max_steps": service.options.max_steps,
        "exits": list(service.depths.offered),
        "calibrated": None if found is None else found.guarantee,
    }


async def _generate(
    request: Request, body: Generate, encode: Callable[[Service], Awaitable[list[np.ndarray]]]
) -> Response:
    """Tokens for a request. encode: its prompts."""
    service = _service(request)
    deadline = asyncio.get_running_loop().time() + service.options.request_timeout
    check_fields(body, service)
    service.require_few(body.num_prompts, body.n or 1)
    ask = understand(service, body, await encode(service))
    if (refusal := service.admission()) is not None:
        raise refusal
    try:
        async with asyncio.timeout_at(deadline):
            grammar = await grammar_of(service, body)
    except TimeoutError as error:
        raise _too_late() from error
    ask = dataclasses.replace(ask, grammar=grammar)
    writer = Writer(ask, Wanted.of(body), service.name, service.tokenizer)
    return _Answer(service, service.open(ask), writer, deadline, stream=bool(body.stream))


class _Answer(Response):
    """The answer to a request for tokens. Whatever ends it, the engine's lanes are freed."""

    def __init__(self, service: Service, call: Call, writer: Writer, deadline: float, stream: bool):
        super().__init__()
        self._service, self._call, self._writer, self._stream = service, call, writer, stream
        self._deadline = deadline  # by the event loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: answer until done, the client leaves, or time is up."""
        gone = asyncio.ensure_future(_left(receive))
        work = asyncio.ensure_future(self._work(scope, receive, send))
        facts, writer = scope["rdlm"], self._writer
        facts["status"] = 500  # unless it is known how the answer ended
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            error = work.result() if work.done() else APIError(499, "the client left", code="client_left")
            facts |= {"status": 200} if error is None else {"status": error.status, "error": error.code}
        finally:
            self._service.close(self._call)
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            facts |= {"prompt_tokens": writer.prompt_tokens, "completion_tokens": writer.completion_tokens}
            facts |= {"mean_steps": writer.usage()["mean_steps"]}

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> APIError | None:
        """Answer; what went wrong, if anything did."""
        try:
            error = await (self._in_pieces(send) if self._stream else self._whole(scope, receive, send))
        except _Stuck:
            error = reads_too_slowly()
        if error is not None:
            self._service.metrics.failed.labels(error.code).inc()
        return error

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> APIError | None:
        error: APIError | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                while not self._writer.done:
                    for index, item in await self._call.take():
                        self._writer.add(index, item)
        except TimeoutError:
            error = _too_late()
        except APIError as failure:
            error = failure
        response = JSONResponse(self._writer.whole()) if error is None else _as_response(error)
        await self._write(response(scope, receive, send))
        return error

    async def _in_pieces(self, send: Send) -> APIError | None:
        call, writer = self._call, self._writer
        error: APIError | None = None
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))
        await self._write(send({"type": "http.response.start", "status": 200, "headers": headers}))
        await self._events(send, writer.openings())
        try:
            while not writer.done:
                async with asyncio.timeout_at(self._deadline):
                    items = await call.take()
                for index, item in items:
                    writer.add(index, item)
                chunks = [writer.chunk(index) for index in dict.fromkeys(index for index, _ in items)]
                await self._events(send, [chunk for chunk in chunks if chunk is not None])
            closing = writer.closing()
            await self._events(send, [] if closing is None else [closing])
        except TimeoutError:
            error = _too_late()
        except APIError as failure:
            error = failure
        if error is not None:
            await self._events(send, [error.body()])
        await self._write(send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}))
        return error

    async def _events(self, send: Send, events: Iterable[Json]) -> None:
        """Server-sent events, all in one piece."""
        data = "".join(f"data: {_json(event)}\n\n" for event in events).encode()
        if data:
            await self._write(send({"type": "http.response.body", "body": data, "more_body": True}))

    async def _write(self, sending: Awaitable[None]) -> None:
        """Wait until the client has taken it; a client that takes too long is left.

        Raises:
          _Stuck: it has taken too long.
        """
        try:
            async with asyncio.timeout(self._service.options.write_timeout):  # wait_for can lose a cancellation
                await sending
        except TimeoutError as error:
            raise _Stuck from error


class _Stuck(Exception):
    """The client does not read, so that nothing more can be said to it."""


def _too_late() -> APIError:
    return APIError(504, "the request took too long", code="timeout")


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def _left(receive: Receive) -> None:
    """Wait until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_response(error: APIError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _as_response(error)


async def _on_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _as_response(from_validation(error))


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "there is nothing at this path", 405: "this path does not take this method", 400: "body: is not JSON"}
    answer = APIError(error.status_code, known.get(error.status_code, "the request cannot be served"))
    answer.headers |= dict(error.headers or {})
    return _as_response(answer)


async def _on_bug(_: Request, error: Exception) -> Response:
    return _as_response(APIError(500, "the server has a bug; its log says more", code="internal_error"))
