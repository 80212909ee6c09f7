"""Server-sent events: an answer in pieces, ended with ``[DONE]``, given up when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemify.serving.asking import Asking, ClientGone, while_there
from gemify.serving.errors import ApiError, error_body, of_engine

logger = logging.getLogger("gemify.serving")


class EventStream(Response):
    """Sends chunks as they are made; cancels their jobs at the end, whatever the end is."""

    media_type = "text/event-stream"

    def __init__(self, asking: Asking, chunks: AsyncGenerator[dict[str, Any], None], *, timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._asking, self._chunks, self._timeout = asking, chunks, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._asking:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await while_there(receive, self._send(send), self._timeout)
            except ClientGone:
                scope.setdefault("gemify.notes", {})["gone"] = True
            except Exception as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):  # a client that reads nothing is not waited for
                        await _say(send, _told(error, scope), last=True)
            finally:
                await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        async for chunk in self._chunks:
            await _say(send, json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8"))
        await _say(send, b"[DONE]", last=True)


async def _say(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": not last})


def _told(error: Exception, scope: Scope) -> bytes:
    """An error as an event: the status has been sent already."""
    with contextlib.suppress(Exception):
        error = of_engine(error)
    if not isinstance(error, ApiError):
        logger.error("stream failed", exc_info=error, extra={"request": scope.get("gemify.id")})
        return error_body(500, "the server failed at this request: see its log", code="internal_error")
    scope.setdefault("gemify.notes", {})["error"] = error.code or error.status_code
    return error.body
