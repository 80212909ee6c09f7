"""A thread that runs one scheduler, a step at a time: takes in new requests, and publishes the scheduler's counts."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from gemify.engine.requests import EngineRequest, EngineStoppingError

# Threads that OpenMP keeps for a thread that no longer needs them.
#
# GNU's OpenMP library, which torch's Linux builds bring, counts all threads it keeps. With more of them than cores its
# threads no longer wait actively between two operations, and a pass of many small ones takes a quarter longer.

_OMP_PAUSE_HARD = 2


@functools.cache
def _openmp_library() -> ctypes.CDLL | None:
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    try:
        return ctypes.CDLL(str(found[0])) if found else None
    except OSError:
        return None


def release_threads() -> bool:
    """Release OpenMP's threads of the calling thread; its next parallel operation makes new ones.

    Returns:
        Whether the OpenMP library could do it.
    """
    pause = getattr(_openmp_library(), "omp_pause_resource_all", None)
    return pause is not None and pause(_OMP_PAUSE_HARD) == 0


logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=EngineRequest)


class Scheduler(Protocol[RequestT]):
    """A `GenerationScheduler` or an `EmbeddingScheduler`."""

    waiting: deque[RequestT]

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        ...

    def step(self) -> None:
        """Do a little of the work."""
        ...

    def abort_all(self, error: Exception) -> None:
        """Drop all requests; each emits the error."""
        ...

    def counts(self) -> dict[str, int]:
        """Counters since the start."""
        ...


class Worker(Generic[RequestT]):
    """Runs a scheduler's steps while it has work.

    Args:
        scheduler: the work.
        name: of the thread.
        lock: held during each step.
        num_threads: threads of torch's arithmetic, asked before each step.
    """

    def __init__(
        self,
        scheduler: Scheduler[RequestT],
        name: str,
        *,
        lock: AbstractContextManager[object],
        num_threads: Callable[[], int],
    ) -> None:
        self.scheduler, self.lock = scheduler, lock
        self.busy = False
        """Whether there is work; may be read by any thread at any time."""
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._new: list[RequestT] = []  # accepted, not yet seen by the thread
        self._counts = scheduler.counts()
        self._seconds = 0.0
        self._num_waiting = 0
        self._stopping = self._aborting = False
        self._thread = threading.Thread(target=self._run, name=f"gemify-{name}")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Texts or sequences that are not begun."""
        with self._changed:
            return self._num_waiting + _count_items(self._new)

    def add_request(self, request: RequestT) -> None:
        """Queue a request.

        Raises:
            EngineStoppingError: no more are accepted.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise EngineStoppingError
            self._new.append(request)
            self.busy = True
            self._changed.notify()

    def stop_accepting(self) -> None:
        """Accept no more requests, and end the thread when the accepted ones are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread's end; after ``timeout_s`` seconds abort what is left. Return whether all was done."""
        if self._thread.ident is None:  # never started
            return True
        self._thread.join(timeout_s)
        done = not self.alive
        self._aborting = True
        self._thread.join()
        return done

    def counts(self) -> tuple[dict[str, int], float]:
        """The scheduler's counts as of its last step, and the seconds it has computed."""
        with self._changed:
            return dict(self._counts), self._seconds

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                start = time.perf_counter()
                with self.lock:
                    if (threads := self._num_threads()) != torch.get_num_threads():
                        torch.set_num_threads(threads)
                        release_threads()
                    try:
                        self.scheduler.step()
                    except Exception as error:  # the scheduler handles requests' errors; this is its own
                        logger.exception("a step failed")
                        self.scheduler.abort_all(error)
                self._publish(time.perf_counter() - start)

    def _wait_for_work(self) -> bool:
        """Hand new requests to the scheduler, waiting for one if there is no work. False ends the thread."""
        with self._changed:
            while not (self._new or self.scheduler.busy or self._stopping):
                self.busy = False
                release_threads()
                self._changed.wait()
            self.scheduler.waiting.extend(self._new)
            self._new.clear()
            self._num_waiting = _count_items(self.scheduler.waiting)
        if self._aborting:
            self.scheduler.abort_all(EngineStoppingError())
            self._publish(0.0)
        self.busy = self.scheduler.busy
        return self.busy or not self._stopping

    def _publish(self, seconds: float) -> None:
        num_waiting = _count_items(self.scheduler.waiting)
        with self._changed:
            self._counts, self._num_waiting = self.scheduler.counts(), num_waiting
            self._seconds += seconds


def _count_items(requests: Iterable[EngineRequest]) -> int:
    """Count the texts or sequences of some requests."""
    return sum(request.num_items for request in requests)
