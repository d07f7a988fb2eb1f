"""The first thing a request meets: API key, size of the body, a line in the log. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rdlm.serve.errors import APIError
from rdlm.serve.options import ServeOptions

LOG = logging.getLogger("rdlm.serve")
_PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds, so not in the log
_COUNTED = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/tokenize", "/v1/detokenize")
_OPEN = ("/", "/docs", "/openapi.json", *_PROBES)  # need no key
_PATIENCE = 16  # limits of a body that are read, since a client that is cut off while it sends reads no answer
_BODY_SECONDS = 60  # in which a body must have come


class Guard:
    """Wraps an application.

    Args:
      app: what it protects.
      keys: API keys, one of which is needed; none: everybody is served.
      options: limits of the server.
      counter: of requests, by path and status.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], options: ServeOptions, counter: Counter):
        self._app, self._keys, self._options, self._counter = app, keys, options, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # unless something is answered
        request_id = f"req-{secrets.token_hex(8)}"
        facts: dict[str, Any] = {}
        scope["rdlm"] = facts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                try:
                    body = await self._read(receive)
                except APIError as error:
                    refusal = error
            if refusal is not None:
                close = {"Connection": "close"} if refusal.status in (408, 413) else {}
                response = JSONResponse(refusal.body(), refusal.status, headers={**refusal.headers, **close})
                await response(scope, receive, answer)
            elif body is not None:
                await self._app(scope, _replay(body, receive), answer)
        finally:
            status = facts.pop("status", status)  # what became of an answer after it had begun with 200
            known = scope["path"] in _COUNTED
            self._counter.labels(scope["path"] if known else "other", str(status)).inc()
            if self._options.access_log and scope["path"] not in _PROBES:
                seconds = round(time.perf_counter() - began, 4)
                line = {"request": request_id, "method": scope["method"], "path": _path(scope), "status": status}
                LOG.info(json.dumps({"time": round(time.time(), 3), **line, "seconds": seconds, **facts}))

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in _OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]  # all, whichever matches
            if scheme.lower() != b"bearer" or not any(matches):
                return APIError(401, "send a valid API key: Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > _PATIENCE * self._options.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> APIError:
        return APIError(413, f"the body has more than {self._options.max_body} bytes", code="body_too_large")

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(part := message.get("body", b""))
                    if size <= self._options.max_body:
                        parts.append(part)
                    if size > _PATIENCE * self._options.max_body or not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise APIError(408, "the body did not come in time", code="body_timeout") from error
        if size > self._options.max_body:
            raise self._too_large()
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application whose request's body has been read already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _path(scope: Scope) -> str:
    """For the log: without the query, and short."""
    return str(scope["path"])[:100]
