"""A response in server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemify.serving.dispatch import ClientDisconnectedError, EngineClient, run_until_disconnect
from gemify.serving.errors import ApiError, error_body, from_engine_error
from gemify.serving.protocol.responses import ApiModel
from gemify.serving.state import get_request_state

logger = logging.getLogger("gemify.serving")


class EventStreamResponse(Response):
    """Server-sent events: chunks, then ``[DONE]`` unless they have names.

    However it ends, the engine's requests are cancelled then.

    Args:
        client: the engine's requests.
        chunks: what is sent.
        timeout_s: seconds that the response may take.
        keep_alive_s: seconds of silence after which a comment is sent, so that no proxy closes the connection.
        names_events: whether the chunks have names.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        client: EngineClient,
        chunks: AsyncGenerator[ApiModel, None],
        *,
        timeout_s: float,
        keep_alive_s: float,
        names_events: bool = False,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._client, self._chunks, self._timeout_s = client, chunks, timeout_s
        self._keep_alive_s, self._last_sent = keep_alive_s, 0.0
        self._names_events, self._num_sent = names_events, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        with self._client:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await run_until_disconnect(receive, self._send_chunks(send), self._timeout_s)
            except ClientDisconnectedError:
                get_request_state(scope).log_fields["disconnected"] = True
            except Exception as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):  # do not wait for a client that reads nothing
                        await self._send_error(send, _to_error_body(error, scope))
            finally:
                await self._chunks.aclose()

    async def _send_chunks(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        keeping_alive = asyncio.create_task(self._send_comments(send))
        try:
            async for chunk in self._chunks:
                await _send_event(send, chunk.to_json(), name=chunk.event)
                self._last_sent = clock()
                self._num_sent += 1
        finally:
            keeping_alive.cancel()
            await asyncio.wait([keeping_alive])
        if self._names_events:
            await send({"type": "http.response.body", "body": b""})
        else:
            await _send_event(send, b"[DONE]", last=True)

    async def _send_comments(self, send: Send) -> None:
        """Send a comment, which clients skip, whenever nothing was sent for a while."""
        clock = asyncio.get_running_loop().time
        while True:
            if (left_s := self._last_sent + self._keep_alive_s - clock()) > 0:
                await asyncio.sleep(left_s)
                continue
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            self._last_sent = clock()

    async def _send_error(self, send: Send, body: bytes) -> None:
        if not self._names_events:
            await _send_event(send, body, last=True)
            return
        facts = {"type": "error", **json.loads(body), "sequence_number": self._num_sent}
        await _send_event(send, json.dumps(facts).encode("ascii"), name="error", last=True)


async def _send_event(send: Send, data: bytes, *, name: str | None = None, last: bool = False) -> None:
    head = b"" if name is None else b"event: " + name.encode("ascii") + b"\n"
    await send({"type": "http.response.body", "body": head + b"data: " + data + b"\n\n", "more_body": not last})


def _to_error_body(error: Exception, scope: Scope) -> bytes:
    """Return the event of an error; the response's status has been sent already."""
    request = get_request_state(scope)
    with contextlib.suppress(Exception):
        error = from_engine_error(error)
    if not isinstance(error, ApiError):
        logger.error("stream failed", exc_info=error, extra={"fields": {"request": request.id}})
        message = "the server failed at this request: see its log"
        return error_body(500, message, code="internal_error", path=scope["path"])
    request.log_fields["error"] = error.code or error.status_code
    return error.to_body(scope["path"])
