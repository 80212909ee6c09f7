"""Middleware around every request: id, authorization, log line, metrics, and an error response whatever happens.

A log line is one JSON object, on stderr. Clients' texts are not in it unless --log-prompts asks for it.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import secrets
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemify.serving.dispatch import ClientDisconnectedError
from gemify.serving.errors import ApiError, error_body, too_many_requests
from gemify.serving.state import RequestState, get_state, set_request_state

logger = logging.getLogger("gemify.serving")

_OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_OPEN_PREFIX = "/page/"
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_LOGGED_BYTES = 4096
_STATUS_DISCONNECTED = 499


class RequestMiddleware:
    """ASGI middleware that handles each HTTP request in a `_RequestCycle`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root_path = get_state(HTTPConnection(scope)).settings.root_path
        if root_path and scope["path"] == root_path:  # the page's links are relative
            await RedirectResponse(f"{root_path}/")(scope, receive, send)
            return
        if root_path and scope["path"].startswith(f"{root_path}/"):  # a proxy may strip it
            scope = {**scope, "path": scope["path"].removeprefix(root_path)}
        await _RequestCycle(self._app, scope, receive, send).run()


def is_local_host(host: str) -> bool:
    """Whether a Host header is empty, an address, or a name outside the public DNS.

    A public name may be made to mean this machine (DNS rebinding), and then a web page's scripts read what we answer.
    """
    parts = _HOST.fullmatch(host)
    if parts is None:
        return False
    name = (parts[1] or parts[2] or "").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return parts[1] is None and ("." not in name or name.endswith(".localhost"))
    return True


class _RequestCycle:
    """One request, from its arrival to its log line."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope = app, scope
        self._wrapped_receive, self._wrapped_send = receive, send
        self._state = get_state(HTTPConnection(scope))
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self._request = RequestState(given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
        set_request_state(scope, self._request)
        self._status = 0
        self._body = bytearray()

    async def run(self) -> None:
        """Handle the request."""
        start = time.perf_counter()
        self._state.metrics.start_request()
        try:
            self._authorize()
            await self._app(self._scope, self._receive, self._send)
        except ApiError as error:
            await self._respond(error.status_code, error.to_body(self._scope["path"]), dict(error.headers or {}))
        except ClientDisconnectedError:
            self._request.log_fields["disconnected"] = True
            await self._respond(_STATUS_DISCONNECTED, b"")
        except Exception as error:
            logger.error("request failed", exc_info=error, extra={"fields": {"request": self._request.id}})
            message = "the server failed at this request: see its log"
            body = error_body(500, message, code="internal_error", path=self._scope["path"])
            await self._respond(500, body)
        finally:
            self._log_request(time.perf_counter() - start)

    def _authorize(self) -> None:
        """Raise ApiError unless the request may be answered: Host, API key, load and rate limit."""
        path, method = str(self._scope["path"]), self._scope["method"]
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return
        state = self._state
        if state.requires_local_host and not is_local_host(self._headers.get("host", "")):
            raise ApiError(
                403,
                "the Host header names another site: without API keys this server answers to addresses and local names"
                " only (give it keys, or --allow-no-key)",
                code="unknown_host",
            )
        self._request.key_name = state.keys.authenticate(self._credentials())
        if method not in ("GET", "HEAD", "OPTIONS"):
            limit = state.settings.max_requests
            if state.metrics.in_flight_now > limit:
                raise too_many_requests(f"more than {limit} requests at a time: wait", 1, code="queue_full")
            state.rate_limiter.count_request(self._request.key_name)

    def _credentials(self) -> str | None:
        """Return the Authorization header; without one, what it would be with the key of Anthropic's header."""
        key = self._headers.get("x-api-key")
        return self._headers.get("authorization") or (f"Bearer {key}" if key else None)

    async def _receive(self) -> Message:
        message = await self._wrapped_receive()
        if self._state.settings.log_prompts and len(self._body) < _MAX_LOGGED_BYTES:
            self._body += message.get("body", b"")[:_MAX_LOGGED_BYTES]
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self._request.id.encode("ascii")),
                (b"x-content-type-options", b"nosniff"),
            ]
            if ignored := self._request.ignored_fields:
                message["headers"].append((b"x-gemify-ignored", ", ".join(ignored).encode("ascii")))
        await self._wrapped_send(message)

    async def _respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an error response, unless a response has begun."""
        if self._status:
            return
        sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        listed = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": listed})
        await self._wrapped_send({"type": "http.response.body", "body": body})

    def _log_request(self, seconds: float) -> None:
        """Release the body's memory, count the request and write its log line."""
        self._state.body_bytes -= self._request.body_bytes
        route = str(getattr(self._scope.get("route"), "path", "none"))
        self._state.metrics.finish_request(route, self._scope["method"], self._status, seconds, self._request.key_name)
        fields = {
            "request": self._request.id,
            "key": self._request.key_name,
            "method": self._scope["method"][:16],
            "route": route,
            "status": self._status,
            "ms": round(seconds * 1000, 1),
            **self._request.log_fields,
            "body": self._body.decode("utf-8", "replace") if self._body else None,
        }
        quiet = route in ("/health", "/ready", "/metrics", "/v1/stats") and self._status == 200
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON, with the fields of ``extra={"fields": {...}}``.

    Args:
        log_prompts: also log the messages of exceptions, which may quote a prompt.
    """

    def __init__(self, *, log_prompts: bool = False) -> None:
        super().__init__()
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)[-12:]
            line["traceback"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
            if self._log_prompts:
                line["error_message"] = str(error)
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up_logs(*, log_prompts: bool) -> None:
    """Give the server's loggers, and uvicorn's, this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(log_prompts=log_prompts))
    for name in ("gemify.serving", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
