"""Ctrl-C and SIGTERM as a wish to stop, granted where it does no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The work was stopped by a signal; what was committed stays."""


class Wish:
    """Whether a signal asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.asked:
            raise Stopped("stopped by a signal: what is committed stays, run the same command again to go on")


@contextlib.contextmanager
def stop_signals() -> Iterator[Wish]:
    """Take the first signal as a wish; a second one acts as ever. In other threads than the main one signals are left."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        wish.asked = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield wish
    finally:
        restore()
