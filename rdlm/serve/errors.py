"""What a client is told when something is wrong: OpenAI's error object."""

from __future__ import annotations

import re
from typing import Any

from fastapi.exceptions import RequestValidationError

from rdlm.config import InputError, one_line

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: for the client: one line without paths or prompts.
      param: the request's field that is wrong, if one is.
      code: a word for programs.
      retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> APIError:
    """A field with a wrong value."""
    return APIError(400, f"{param}: {message}", param, "invalid_value")


def from_input_error(error: InputError, param: str | None = None) -> APIError:
    """What the library refuses, as an answer."""
    return APIError(400, one_line(error), param, "invalid_value")


def from_validation(error: RequestValidationError) -> APIError:
    """The first field that pydantic refuses."""
    found = error.errors()
    here = [e for e in found if e["loc"][:2] == found[0]["loc"][:2]]  # a field of several types has an error for each
    first = max(here, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return APIError(400, "body: is not JSON", None, "invalid_json")
    param = _field(first["loc"])
    if not param:
        return APIError(400, "body: must be a JSON object, sent with Content-Type: application/json", None, "no_object")
    if first["type"] == "missing":
        return APIError(400, f"{param}: is missing", param, "missing")
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = f" = {value!r}" if isinstance(value, (int, float)) and len(repr(value)) < 40 else ""
    return APIError(400, f"{param}{shown}: {message[:1].lower()}{message[1:]}", param, "invalid_value")


def _field(loc: tuple[int | str, ...]) -> str:
    """('body', 'messages', 0, 'content') -> messages[0].content; words that name no field are left out."""
    found = ""
    for part in loc:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part != "body" and re.fullmatch("[a-z_]+", part) and part not in ("str", "int", "list", "bool"):
            found += f".{part}" if found else part
    return found
