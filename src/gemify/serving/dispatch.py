"""A job's events, brought from the engine's thread into the event loop, and cancelled when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from gemify.engine.requests import Closed, Event, Failed, Finished, Job, Piece, Vectors
from gemify.serving.errors import ApiError, of_engine

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody reads the answer."""


class Starts(Protocol):
    """One of the engine's verbs, its arguments but the listener given."""

    def __call__(self, listener: Callable[[Event], None]) -> Job: ...


class Asking:
    """One request's jobs. Leave it (``with``), and what is unfinished is cancelled."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self._open = 0

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            job.cancel()

    def start(self, verb: Starts) -> None:
        """Ask the engine; ApiError where it refuses."""
        number = len(self.jobs)

        def listener(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has gone
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        try:
            self.jobs.append(verb(listener))
        except Exception as error:
            raise of_engine(error) from error
        self._open += 1

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished | Vectors]]:
        """What the jobs say, and the number of the job that says it, until all are closed."""
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Closed):
                self._open -= 1
            elif isinstance(event, Failed):
                raise of_engine(event.error)
            else:
                yield number, event

    @property
    def prompt_tokens(self) -> int:
        return sum(job.prompt_tokens for job in self.jobs)

    @property
    def reused_tokens(self) -> int:
        return sum(job.reused_tokens for job in self.jobs)


async def while_there(receive: Receive, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Do the work unless the client goes away (`ClientGone`) or it takes too long (ApiError 504)."""
    watching = asyncio.ensure_future(_gone(receive))
    working = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({watching, working}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if watching in done:
            raise ClientGone
        raise too_slow(timeout)
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


def too_slow(timeout: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {timeout:g} s: ask for less at a time", code="timeout")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
