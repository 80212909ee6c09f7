"""Threads that OpenMP keeps for a thread that no longer needs them.

GNU's OpenMP library, which torch's Linux builds bring, counts all threads it keeps. With more of them than cores its
threads no longer wait actively between two operations, and a pass of many small ones takes a quarter longer.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

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
