"""Around every request: its id, its key, its place in the log and the counts, and an answer whatever happens."""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemify.serving.dispatch import ClientDisconnected
from gemify.serving.errors import ApiError, error_body, too_many_requests
from gemify.serving.state import AppState

logger = logging.getLogger("gemify.serving")

_OPEN = frozenset({"/", "/health", "/ready"})
_OPEN_BELOW = "/page/"
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGED_BODY = 4096


class RequestMiddleware:
    """ASGI middleware: lets in who may, and keeps the books."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _RequestCycle(self._app, self._state, scope, receive, send).run()


def is_local_host(host: str) -> bool:
    """Whether no web page can have chosen this Host: none, an address, or a name that is not in the public DNS.

    A page's own name may be made to mean this machine (DNS rebinding), and then its scripts may read what we say.
    """
    read = _HOST.fullmatch(host)
    if read is None:
        return False
    name = (read[1] or read[2] or "").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return read[1] is None and ("." not in name or name.endswith(".localhost"))
    return True


class _RequestCycle:
    """One request."""

    def __init__(self, app: ASGIApp, state: AppState, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._state, self._scope = app, state, scope
        self._own_receive, self._own_send = receive, send
        given = Headers(scope=scope).get("x-request-id", "")
        self._id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope["gemify.id"] = self._id
        self._status = 0
        self._body = bytearray()

    async def run(self) -> None:
        began = time.perf_counter()
        self._state.metrics.start_request()
        try:
            self._authorize()
            await self._app(self._scope, self._receive, self._send)
        except ApiError as error:
            await self._refuse(error.status_code, error.body, dict(error.headers or {}))
        except ClientDisconnected:
            self._scope.setdefault("gemify.notes", {})["gone"] = True
            await self._refuse(499, b"")
        except Exception as error:
            logger.error("request failed", exc_info=error, extra={"request": self._id})
            body = error_body(500, "the server failed at this request: see its log", code="internal_error")
            await self._refuse(500, body)
        finally:
            self._log_request(time.perf_counter() - began)

    def _authorize(self) -> None:
        """ApiError for who may not."""
        path, method = str(self._scope["path"]), self._scope["method"]
        if path in _OPEN or path.startswith(_OPEN_BELOW):
            return
        state = self._state
        if state.requires_local_host and not is_local_host(Headers(scope=self._scope).get("host", "")):
            raise ApiError(
                403,
                "the Host header names another site: without API keys this server answers to addresses and local names"
                " only (give it keys, or --allow-no-key)",
                code="unknown_host",
            )
        key = state.keys.authenticate(Headers(scope=self._scope).get("authorization"))
        self._scope["gemify.key"] = key
        if method == "POST":
            if state.metrics.in_flight_now > state.settings.max_requests:
                raise too_many_requests(
                    f"more than {state.settings.max_requests} requests at a time: wait", 1, code="queue_full"
                )
            state.rate_limiter.count_request(key)

    async def _receive(self) -> Message:
        message = await self._own_receive()
        if self._state.settings.log_prompts and len(self._body) < _LOGGED_BODY:
            self._body += message.get("body", b"")[:_LOGGED_BODY]
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self._id.encode("ascii")),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self._own_send(message)

    async def _refuse(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self._status:  # too late to say
            return
        sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        listed = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": listed})
        await self._own_send({"type": "http.response.body", "body": body})

    def _log_request(self, seconds: float) -> None:
        scope = self._scope
        self._state.body_bytes -= scope.get("gemify.bytes", 0)
        route = str(getattr(scope.get("route"), "path", "none"))
        self._state.metrics.finish_request(route, scope["method"], self._status, seconds)
        facts = {
            "request": self._id,
            "key": scope.get("gemify.key"),
            "method": scope["method"][:16],
            "route": route,
            "status": self._status,
            "ms": round(seconds * 1000, 1),
            "notes": scope.get("gemify.notes"),
            "body": self._body.decode("utf-8", "replace") if self._body else None,
        }
        quiet = route in ("/health", "/ready", "/metrics", "/v1/stats") and self._status == 200
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra=facts)
