"""HTTP connections: uvicorn's, with an end to patience, OpenAI's error body for what is no HTTP, and a soft shutdown."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemify.serving.errors import error_body

_PATIENCE = 30.0
"""Seconds in which a request's head must have arrived, or a reader must have read something of what waits for it."""
_LAST_CALL = 1.0
"""Seconds that an idle connection has for one more request after a shutdown has begun."""


class HttpProtocol(H11Protocol):
    """One client's connection."""

    _patience: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._ending and self._is_answering:
            self.cycle.keep_alive = False
        if self._is_answering:
            self._stop_waiting()
        elif self._patience is None:
            self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def shutdown(self) -> None:
        """End when the answer under way has been sent; one that is idle may still ask, as its request may be on the way."""
        if self._is_answering or self.transport.is_closing():
            super().shutdown()
            return
        self._ending = True
        self._unset_keepalive_if_required()
        self._stop_waiting()
        self._patience = self.loop.call_later(_LAST_CALL, self._give_up)

    def send_400_response(self, msg: str) -> None:
        """For bytes that are no HTTP. If an answer is under way, its client gets no second one."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        body = error_body(400, "this is no HTTP request that can be read", code="invalid_http")
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
        if self._is_answering:  # its body broke off
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _be_patient(self) -> None:
        self._patience = self.loop.call_later(_PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _watch_reader(self) -> None:
        self._stop_watching()
        self._reading = self.loop.call_later(_PATIENCE, self._require_reading, self.transport.get_write_buffer_size())

    def _stop_watching(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _require_reading(self, before: int) -> None:
        """Closing would wait for a reader that reads nothing, with all that it was sent, and the server's end with it."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch_reader()

    def _give_up(self) -> None:
        self._patience = None
        if not self._is_answering:
            self.transport.close()
