"""What goes wrong, in OpenAI's words: a status and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from gemify.engine.requests import EngineStopping, QueueFull

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


class ApiError(HTTPException):
    """An answer that is an error. (Of the framework's class, so that what reads bodies lets it through.)"""

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

    @property
    def body(self) -> bytes:
        return error_body(self.status_code, str(self.detail), param=self.param, code=self.code)


def bad_request(message: str, param: str | None = None, *, code: str | None = "invalid_value") -> ApiError:
    """The asker's fault: 400."""
    return ApiError(400, message, param=param, code=code)


def unsupported_parameter(param: str, message: str) -> ApiError:
    """A parameter that OpenAI has and this server cannot honour."""
    return ApiError(400, f"{param} is not supported here: {message}", param=param, code="unsupported_parameter")


def too_many_requests(message: str, retry_after: float, *, code: str = "rate_limit_exceeded") -> ApiError:
    """Too much at the moment: 429, and when to come again."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def service_stopping() -> ApiError:
    return ApiError(
        503, "the server is stopping: ask again when it is back", code="stopping", headers={"Retry-After": "5"}
    )


def from_engine_error(error: Exception) -> ApiError:
    """What the engine refused or failed at."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return too_many_requests(str(error), error.retry_after, code="queue_full")
    if isinstance(error, EngineStopping):
        return service_stopping()
    if isinstance(error, ValueError):
        return bad_request(str(error))
    raise error


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    facts: dict[str, Any] = {
        "message": message,
        "type": _TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code,
    }
    return json.dumps({"error": facts}, ensure_ascii=True).encode("ascii")
