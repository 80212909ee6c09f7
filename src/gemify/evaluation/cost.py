"""What encoding costs: tokens a second, milliseconds a query, peak memory, in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from typing import Any

from gemify.model.base import parse_dtype

_QUERIES = 30


def measure_encoding_cost(
    model: str, texts: Sequence[str], *, base: str | None, dtype: str, device: str | None
) -> dict[str, Any]:
    """Encode texts in bulk and some of them one by one, in a process of its own.

    Returns:
        The cell of the report. Peak memory is that process's: model, tokenizer and encoding together.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=_measure, args=(results, model, list(texts), base, dtype, device))
    worker.start()
    worker.join()
    if worker.exitcode:
        raise ValueError(f"measuring the cost of {model} failed in its own process (exit code {worker.exitcode})")
    value: dict[str, Any] = results.get()
    return value


def _measure(results: Any, model: str, texts: list[str], base: str | None, dtype: str, device: str | None) -> None:
    import torch

    from gemify.model.gem import GemModel

    gem = GemModel.from_pretrained(model, base=base, dtype=parse_dtype(dtype), device=device)
    gem.encode(texts[:8])  # the first calls set things up
    gem.encode(texts)
    report = gem.meter.report()
    milliseconds = []
    for text in texts[:_QUERIES]:
        start = time.perf_counter()
        gem.encode(text)
        milliseconds.append(1000.0 * (time.perf_counter() - start))
    results.put(
        {
            **report,
            "texts_per_second": round(report["texts"] / max(report["seconds"], 1e-9), 2),
            "milliseconds_a_query": round(statistics.median(milliseconds), 2),
            "milliseconds_a_query_p95": round(sorted(milliseconds)[int(0.95 * (len(milliseconds) - 1))], 2),
            "threads": torch.get_num_threads(),
            "device": gem.device.type,
        }
    )
