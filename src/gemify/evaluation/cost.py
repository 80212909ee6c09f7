"""What encoding costs (tokens a second, milliseconds a query, peak memory), and what a task will cost.

A task's tokens are estimated at four characters a token, only for the estimate before a long run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from gemify.evaluation.lm_eval_tasks import HELD_OUT, local_file
from gemify.evaluation.mteb_tasks import LOCAL_TASKS
from gemify.io.rows import read_rows
from gemify.model.base import Loading

_QUERIES = 30


def measure_encoding_cost(
    model: str, texts: Sequence[str], *, base: str | None, **loading: Unpack[Loading]
) -> dict[str, Any]:
    """Encode texts in bulk and some of them one by one, in a process of its own.

    Returns:
        The cell of the report. Peak memory is that process's: model, tokenizer and encoding together.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=_measure, args=(results, model, list(texts), base, loading))
    worker.start()
    worker.join()
    if worker.exitcode:
        raise ValueError(f"measuring the cost of {model} failed in its own process (exit code {worker.exitcode})")
    value: dict[str, Any] = results.get()
    return value


def _measure(results: Any, model: str, texts: list[str], base: str | None, loading: Loading) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command does in its own process
    import torch

    from gemify.model.gem import GemModel

    gem = GemModel.from_pretrained(model, base=base, **loading)
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


_UNKNOWN = 200_000.0
_HEADERS = 57 * 600.0  # MMLU's five solved questions of each subject


def estimate_vector_tokens(name: str, data: Path | None, *, limit: int | None) -> float:
    """Estimate the tokens that an embedding task encodes."""
    if data is not None and name in LOCAL_TASKS:
        tokens = 0.0
        for file in LOCAL_TASKS[name].files:
            rows, size = _size(data / file)
            tokens += size / 4 * _share(rows, limit)
        return tokens
    import mteb

    statistics: Any = mteb.get_task(name).metadata.descriptive_stats or {}
    tokens = 0.0
    for split in statistics.values():
        rows = int(split.get("num_samples") or 1)
        tokens += float(split.get("number_of_characters") or 4 * _UNKNOWN) / 4 * _share(rows, limit)
    return tokens or _UNKNOWN


def estimate_language_tokens(name: str, data: Path | None, *, limit: int | None) -> float:
    """Estimate the tokens that a language benchmark runs, every shared prefix once."""
    file = local_file(name)
    if data is None or name == HELD_OUT or file is None:
        return _UNKNOWN
    rows, size = _size(data / file)
    per_subject = 57 if name == "mmlu" else 1
    return size / 4 * _share(rows, None if limit is None else limit * per_subject) + (_HEADERS if name == "mmlu" else 0)


def _share(rows: int, limit: int | None) -> float:
    return 1.0 if limit is None else min(1.0, limit / max(1, rows))


@functools.cache
def _size(path: Path) -> tuple[int, int]:
    """Rows and characters of a file."""
    rows = characters = 0
    with contextlib.suppress(OSError, ValueError):  # a broken file says so when its task is run
        for row in read_rows(path, format="text"):
            rows += 1
            characters += len(row.raw)
    return rows, characters
