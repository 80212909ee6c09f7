"""HTTP connections: uvicorn's, with timeouts for slow clients, OpenAI's error body, and a graceful shutdown.

It builds on private members of uvicorn, so pyproject.toml allows tested versions only.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemify.serving.errors import error_body

CLIENT_TIMEOUT_S = 30.0
"""Seconds in which a client must have sent a request's head, or must have read some of what waits for it."""
_SHUTDOWN_GRACE_S = 1.0
"""Seconds in which an idle connection may send one more request after the shutdown has begun."""


class HttpProtocol(H11Protocol):
    """One client's connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _shutting_down = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        if self._shutting_down and self._is_answering:
            self.cycle.keep_alive = False
        if self._is_answering:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start watching whether the client reads what waits for it."""
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        """Stop watching: the client has read enough."""
        self._stop_read_timer()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close after the response under way. An idle connection gets a moment: its request may be on the way."""
        if self._is_answering or self.transport.is_closing():
            super().shutdown()
            return
        self._shutting_down = True
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_SHUTDOWN_GRACE_S, self._close_idle)

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not HTTP, unless a response is under way."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        body = error_body(400, "this is not a valid HTTP request", code="invalid_http")
        headers: Any = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"connection", b"close"),
        ]
        if self._is_answering and self.cycle.response_started:
            self.transport.close()
            return
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self._is_answering:  # its body has ended early
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(CLIENT_TIMEOUT_S, self._close_idle)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_read_timer(self) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(
            CLIENT_TIMEOUT_S, self._check_read, self.transport.get_write_buffer_size()
        )

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _check_read(self, before: int) -> None:
        """Abort the connection if nothing was read. Closing would wait for the client, and the shutdown with it."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._start_read_timer()

    def _close_idle(self) -> None:
        self._head_timer = None
        if not self._is_answering:
            self.transport.close()
