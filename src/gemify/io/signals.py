"""Ctrl-C and SIGTERM as requests to stop, obeyed where stopping does no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any


class StopRequestedError(Exception):
    """A signal stopped the work. Committed work stays."""


class StopFlag:
    """Whether a signal asked to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def raise_if_set(self) -> None:
        """Raise `StopRequestedError` if a signal came."""
        if self.is_set:
            raise StopRequestedError(
                "stopped by a signal: what is committed stays, run the same command again to go on"
            )


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one has its usual effect."""
    flag = StopFlag()

    def set_flag(number: int, frame: FrameType | None) -> None:
        flag.is_set = True
        restore()

    with signal_handlers({signal.SIGINT: set_flag, signal.SIGTERM: set_flag}) as restore:
        yield flag


@contextlib.contextmanager
def signal_handlers(handlers: Mapping[int, Any]) -> Iterator[Callable[[], None]]:
    """Install signal handlers for a block. Outside the main thread handlers stay as they are.

    Yields:
        A function that restores the earlier handlers before the block ends.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in handlers} if main else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield restore
    finally:
        restore()
