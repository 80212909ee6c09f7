"""Seconds, tokens and peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes: device memory on an accelerator, else resident memory."""
    if torch.cuda.is_available() and (used := int(torch.cuda.max_memory_allocated())):
        return used
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class ThroughputMeter:
    """Counts tokens from its construction on."""

    tokens: int = 0
    """Tokens computed, padding included."""
    padding: int = 0
    """How many of them were padding."""
    texts: int = 0
    started: float = field(default_factory=time.perf_counter)
    """When it was made, in seconds of `time.perf_counter`."""

    def report(self) -> dict[str, Any]:
        """Return the counts and the speed as plain numbers: see `throughput`."""
        seconds = time.perf_counter() - self.started
        return {"texts": self.texts, **throughput(self.tokens, self.padding, seconds)}


def throughput(tokens: int, padding: int, seconds: float) -> dict[str, Any]:
    """Compute the speed of a piece of work.

    Args:
        tokens: Tokens computed, padding included.
        padding: How many of them were padding.
        seconds: How long it took.

    Returns:
        tokens (without padding), seconds, tokens_per_second, padding (a share of all tokens) and peak_memory_mb.
    """
    return {
        "tokens": tokens - padding,
        "seconds": round(seconds, 3),
        "tokens_per_second": round((tokens - padding) / max(seconds, 1e-9), 1),
        "padding": round(padding / max(1, tokens), 4),
        "peak_memory_mb": round(peak_memory_bytes() / 2**20, 1),
    }


def format_summary(report: dict[str, Any]) -> str:
    """Return a report of `throughput` as one line for people."""
    return (
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s ({report['tokens_per_second']:,.0f} tokens/s,"
        f" padding {report['padding']:.1%}), peak memory {report['peak_memory_mb']:,.0f} MB"
    )
