"""``gemify bench search``: milliseconds a search takes in a store, apart from embedding the question."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from tqdm.auto import tqdm

from gemify.model.gem import GemModel
from gemify.retrieval.index import GemIndex, Mode

_WARM = 5


def bench_search(
    gem: GemModel, index: GemIndex, *, queries: int = 200, k: int = 10, show_progress_bar: bool = True
) -> dict[str, Any]:
    """Search with the beginnings of stored passages, in every mode in turn (A B C A B C).

    ValueError for a store that holds nothing.
    """
    step = max(1, len(index) // queries)
    words = [p.text for p in itertools.islice(index.passages(), 0, None, step)][:queries]
    if not words:
        raise ValueError("the store is empty: index something")
    asked = [" ".join(text.split()[:8]) for text in words]
    begin = time.perf_counter()
    vectors_ND = np.asarray(gem.encode_query(asked))
    embed = time.perf_counter() - begin
    modes: tuple[Mode, ...] = get_args(Mode)
    took: dict[str, list[float]] = {mode: [] for mode in modes}
    rounds = list(zip(asked, vectors_ND, strict=True))
    warm = rounds[:_WARM]
    for text, vector in tqdm(warm + rounds, unit="query", disable=not show_progress_bar):
        for mode in modes:
            begin = time.perf_counter()
            index.search(text, k=k, mode=mode, vector=vector)
            took[mode].append(1000 * (time.perf_counter() - begin))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "passages": len(index),
        "precision": index.store.meta.precision,
        "queries": len(asked),
        "embed_ms_a_query": round(1000 * embed / len(asked), 1),
        "peak_memory_mb": round(peak),
        "search_ms": {mode: _quantiles(times[len(warm) :]) for mode, times in took.items()},
    }


def _quantiles(times: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)}


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"{report['passages']:,} passages ({report['precision']}), {report['queries']} queries; embedding"
        f" {report['embed_ms_a_query']} ms a query (in batches); peak memory {report['peak_memory_mb']:,} MB",
        "",
        "| search, ms | p50 | p95 | p99 |",
        "|---|---|---|---|",
    ]
    lines += [f"| {mode} | {q['p50']} | {q['p95']} | {q['p99']} |" for mode, q in report["search_ms"].items()]
    return "\n".join(lines)
