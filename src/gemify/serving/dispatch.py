"""A job's events, brought from the engine's thread into the event loop, and cancelled when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from gemify.engine.requests import (
    Completion,
    Done,
    EmbeddingOutput,
    EngineRequest,
    Event,
    Failed,
    PrefillOutput,
    TokenDelta,
)
from gemify.serving.errors import ApiError, from_engine_error

T = TypeVar("T")


class ClientDisconnected(Exception):
    """Nobody reads the answer."""


class SubmitFn(Protocol):
    """One of the engine's verbs, its arguments but the listener given."""

    def __call__(self, listener: Callable[[Event], None]) -> EngineRequest: ...


class EngineClient:
    """One request's jobs. Leave it (``with``), and what is unfinished is cancelled."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[EngineRequest] = []
        self._open = 0

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        for request in self.requests:
            request.cancel()

    def submit(self, submit: SubmitFn) -> None:
        """Ask the engine; ApiError where it refuses."""
        number = len(self.requests)

        def listener(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has gone
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        try:
            self.requests.append(submit(listener))
        except Exception as error:
            raise from_engine_error(error) from error
        self._open += 1

    async def events(self) -> AsyncIterator[tuple[int, TokenDelta | Completion | EmbeddingOutput]]:
        """What the jobs say, and the number of the job that says it, until all are closed."""
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Done):
                self._open -= 1
            elif isinstance(event, Failed):
                raise from_engine_error(event.error)
            elif not isinstance(event, PrefillOutput):
                yield number, event

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        return sum(request.cached_tokens for request in self.requests)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Do the work unless the client goes away (`ClientDisconnected`) or it takes too long (ApiError 504)."""
    watching = asyncio.ensure_future(_gone(receive))
    working = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({watching, working}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if watching in done:
            raise ClientDisconnected
        raise timeout_error(timeout)
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


def timeout_error(timeout: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {timeout:g} s: ask for less at a time", code="timeout")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
