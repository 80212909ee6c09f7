"""A thread that does one kind of work, a step at a time: takes in what is asked for, and publishes its counts."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from gemify.engine.requests import Job, Stopping

# Threads that OpenMP keeps for a thread that no longer needs them.
#
# GNU's OpenMP library, which torch's Linux builds bring, counts all threads it keeps. With more of them than cores its
# threads no longer wait actively between two operations, and a pass of many small ones takes a quarter longer.

_HARD = 2  # omp_pause_hard


@functools.cache
def _library() -> Any:
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    try:
        return ctypes.CDLL(str(found[0])) if found else None
    except OSError:
        return None


def release_threads() -> bool:
    """Let go of the threads kept for the calling thread; its next parallel operation makes new ones. Whether it could."""
    pause = getattr(_library(), "omp_pause_resource_all", None)
    return pause is not None and pause(_HARD) == 0


logger = logging.getLogger(__name__)

J = TypeVar("J", bound=Job)


class Work(Protocol[J]):
    """`Writing` or `Embedding`."""

    waiting: deque[J]

    @property
    def busy(self) -> bool: ...
    def step(self) -> None: ...
    def drop_all(self, error: Exception) -> None: ...
    def counts(self) -> dict[str, int]: ...


class Worker(Generic[J]):
    """Runs a `Work`'s steps while it has any.

    Args:
        lock: held during each step.
        threads: of torch's arithmetic, asked before each step.
    """

    def __init__(self, work: Work[J], name: str, *, lock: Any, threads: Callable[[], int]) -> None:
        self.work, self.lock = work, lock
        self.busy = False
        """Whether there is work, as others may ask at any time."""
        self._threads = threads
        self._change = threading.Condition()
        self._new: list[J] = []  # accepted, not yet seen by the thread
        self._counts = work.counts()
        self._seconds = 0.0
        self._waiting = 0
        self._stopping = self._dropping = False
        self._thread = threading.Thread(target=self._run, name=f"gemify-{name}")

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Texts or answers not begun."""
        with self._change:
            return self._waiting + sum(job.units for job in self._new)

    def accept(self, job: J) -> None:
        with self._change:
            if self._stopping or not self.alive:
                raise Stopping
            self._new.append(job)
            self.busy = True
            self._change.notify()

    def refuse(self) -> None:
        """Take no more, and end when what was accepted is done."""
        with self._change:
            self._stopping = True
            self._change.notify()

    def join(self, timeout: float | None) -> bool:
        """Wait for the end; after ``timeout`` seconds drop what is left. Whether all was done."""
        if self._thread.ident is None:  # never started
            return True
        self._thread.join(timeout)
        done = not self.alive
        self._dropping = True
        self._thread.join()
        return done

    def counts(self) -> tuple[dict[str, int], float]:
        """As of the last step: the work's counts, and the seconds it computed."""
        with self._change:
            return dict(self._counts), self._seconds

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                start = time.perf_counter()
                with self.lock:
                    if (threads := self._threads()) != torch.get_num_threads():
                        torch.set_num_threads(threads)
                        release_threads()
                    try:
                        self.work.step()
                    except Exception as error:  # jobs' own are told by the work: this is ours, and ends no thread
                        logger.exception("a step failed")
                        self.work.drop_all(error)
                self._publish(time.perf_counter() - start)

    def _wait(self) -> bool:
        """Take in what was asked for, waiting for it if there is nothing else to do. False: the end."""
        with self._change:
            while not (self._new or self.work.busy or self._stopping):
                self.busy = False
                release_threads()
                self._change.wait()
            self.work.waiting.extend(self._new)
            self._new.clear()
            self._waiting = units(self.work.waiting)
        if self._dropping:
            self.work.drop_all(Stopping())
            self._publish(0.0)
        self.busy = self.work.busy
        return self.busy or not self._stopping

    def _publish(self, seconds: float) -> None:
        waiting = units(self.work.waiting)
        with self._change:
            self._counts, self._waiting = self.work.counts(), waiting
            self._seconds += seconds


def units(jobs: Sequence[Job] | deque[Any]) -> int:
    """How many texts or answers some jobs are."""
    return sum(job.units for job in jobs)
