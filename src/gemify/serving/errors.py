"""Errors: a status and ``{"error": {message, type, param, code}}``, as OpenAI has it.

Under /v1/messages the same with ``"type": "error"`` and Anthropic's types.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from gemify.engine.requests import EngineStoppingError, QueueFullError
from gemify.retrieval.lance import StoreLockedError, StoreUnavailableError

logger = logging.getLogger("gemify.serving")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class ApiError(HTTPException):
    """An error response. It is an HTTPException so that the framework's body reading does not swallow it.

    Args:
        status: HTTP status.
        message: one line: what was got, what is allowed, what to do.
        param: the request's field that is wrong.
        code: a name of the error, for programs.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def to_body(self, path: str) -> bytes:
        """Return the body of the response to a request for ``path``."""
        return error_body(self.status_code, str(self.detail), param=self.param, code=self.code, path=path)


def bad_request(message: str, param: str | None = None, *, code: str | None = "invalid_value") -> ApiError:
    """Make an error 400: the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported_parameter(param: str, message: str) -> ApiError:
    """Make an error 400: OpenAI has this parameter and this server does not."""
    return ApiError(400, f"{param} is not supported here: {message}", param=param, code="unsupported_parameter")


def too_many_requests(message: str, retry_after_s: float, *, code: str = "rate_limit_exceeded") -> ApiError:
    """Make an error 429: the client may try again after ``retry_after_s`` seconds."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def service_stopping() -> ApiError:
    """Make an error 503: the server accepts no more requests."""
    return ApiError(
        503, "the server is stopping: ask again when it is back", code="stopping", headers={"Retry-After": "5"}
    )


def timeout_error(timeout_s: float) -> ApiError:
    """Make an error 504: the answer took longer than ``timeout_s`` seconds."""
    return ApiError(504, f"the answer took longer than {timeout_s:g} s: ask for less at a time", code="timeout")


def from_engine_error(error: Exception) -> ApiError:
    """Return the response to an error of the engine or the index; one that is the server's own is raised again."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return too_many_requests(str(error), error.retry_after, code="queue_full")
    if isinstance(error, EngineStoppingError):
        return service_stopping()
    if isinstance(error, StoreUnavailableError):
        logger.error(str(error))  # it names a path of this machine
        return ApiError(503, "the index cannot be read now: see the server's log", code="store_unavailable")
    if isinstance(error, StoreLockedError):
        message = "the store is being written by another process: try again when it has ended"
        return ApiError(503, message, code="store_busy", headers={"Retry-After": "10"})
    if isinstance(error, ValueError):
        return bad_request(str(error))
    if isinstance(error, FloatingPointError):
        return ApiError(500, str(error), code="not_finite")
    raise error


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None, path: str = ""
) -> bytes:
    """Return the body of an error response, in ASCII: the message may quote anything that a client has sent."""
    kind = _TYPES.get(status, "invalid_request_error")
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    if path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/"):
        body["error"]["type"] = _ANTHROPIC_TYPES.get(status, kind)
        body["type"] = "error"
    return json.dumps(body, ensure_ascii=True).encode("ascii")


def json_name(value: Any) -> str:
    """Return JSON's name of a value's type, with its article."""
    return _JSON_NAMES.get(type(value), type(value).__name__)
