"""Dispatch to the engine: its events come into the event loop; requests that nobody waits for are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, Self, TypeVar

from starlette.types import Receive

from gemify.engine.requests import (
    Completion,
    Done,
    EmbeddingOutput,
    EngineRequest,
    Event,
    Failed,
    PrefillOutput,
    PromptLogprobs,
    TokenDelta,
)
from gemify.serving.errors import from_engine_error, timeout_error

T = TypeVar("T")
Output = TokenDelta | Completion | PromptLogprobs | EmbeddingOutput | PrefillOutput
"""An event that is no end."""


class ClientDisconnectedError(Exception):
    """The client has closed the connection."""


class SubmitFn(Protocol):
    """One of the engine's methods, all arguments but the listener given."""

    def __call__(self, listener: Callable[[Event], None]) -> EngineRequest:
        """Submit the request."""
        ...


class EngineClient:
    """The engine requests of one HTTP request. Leaving it (``with``) cancels those that are not done."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[EngineRequest] = []
        self._num_open = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel all requests that are not done."""
        for request in self.requests:
            request.cancel()

    def submit(self, submit: SubmitFn) -> None:
        """Submit a request to the engine; ApiError if it refuses."""
        number = len(self.requests)

        def listener(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        try:
            self.requests.append(submit(listener))
        except Exception as error:
            raise from_engine_error(error) from error
        self._num_open += 1

    async def events(self) -> AsyncIterator[tuple[int, TokenDelta | Completion | EmbeddingOutput | PromptLogprobs]]:
        """Yield the number of a request and its event, until all requests are done; ApiError if one fails."""
        async for number, event in self._outputs():
            if not isinstance(event, PrefillOutput):
                yield number, event

    async def prefills(self) -> AsyncIterator[tuple[int, PrefillOutput]]:
        """Yield the number of a prefill and its output, until all requests are done; more may be submitted meanwhile.

        Raises:
            ApiError: a request has failed.
        """
        async for number, event in self._outputs():
            if isinstance(event, PrefillOutput):
                yield number, event

    async def _outputs(self) -> AsyncIterator[tuple[int, Output]]:
        while self._num_open:
            number, event = await self._events.get()
            if isinstance(event, Done):
                self._num_open -= 1
            elif isinstance(event, Failed):
                raise from_engine_error(event.error)
            else:
                yield number, event

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(request.cached_tokens for request in self.requests)


class RequestCancelledError(Exception):
    """The client has gone, or has waited too long."""


class ThreadCalls:
    """Coroutines that a thread waits for, for one HTTP request. Leaving it (``with``) cancels what runs."""

    def __init__(self) -> None:
        self._loop, self._lock = asyncio.get_running_loop(), threading.Lock()
        self._future: Future[Any] | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            if self._future is not None:
                self._future.cancel()

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine in the event loop, from a thread; RequestCancelledError if nobody waits for it any more."""
        with self._lock:
            if self._ended:
                raise RequestCancelledError
            future = self._future = asyncio.run_coroutine_threadsafe(function(*args), self._loop)
        return future.result()


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Await ``work``, but give it up if the client disconnects or the time is over.

    Args:
        receive: the request's channel.
        work: what is awaited.
        timeout_s: seconds it may take.

    Raises:
        ClientDisconnectedError: the client has closed the connection.
        ApiError: 504, the time is over.
    """
    watching = asyncio.ensure_future(_wait_for_disconnect(receive))
    working = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({watching, working}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if watching in done:
            raise ClientDisconnectedError
        raise timeout_error(timeout_s)
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
