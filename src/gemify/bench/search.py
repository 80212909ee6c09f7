"""`gemify bench search`: milliseconds that a search takes in a store, apart from embedding the query."""

from __future__ import annotations

import itertools
import time
from typing import get_args

import numpy as np

from gemify.bench.timing import Report, make_report, peak_memory_mb, percentiles, rows_table, run_in_turn
from gemify.model.gem import GemModel
from gemify.retrieval.index import GemIndex, Mode

_WARMUP = 5


def bench_search(
    gem: GemModel, index: GemIndex, *, queries: int = 200, k: int = 10, show_progress_bar: bool = True
) -> Report:
    """Search in every mode with the beginnings of stored passages. ValueError for an empty store."""
    step = max(1, len(index) // queries)
    texts = [p.text for p in itertools.islice(index.passages(), 0, None, step)][:queries]
    if not texts:
        raise ValueError("the store is empty: index something")
    words = [" ".join(text.split()[:8]) for text in texts]
    start = time.perf_counter()
    vectors_ND = np.asarray(gem.encode_query(words))
    embed_seconds = time.perf_counter() - start
    asked = list(zip(words, vectors_ND, strict=True))
    asked = asked[:_WARMUP] + asked

    def search(number: int, mode: Mode) -> None:
        text, vector = asked[number]
        index.search(text, k=k, mode=mode, vector=vector)

    runs = run_in_turn(
        {mode: lambda number, mode=mode: search(number, mode) for mode in get_args(Mode)},  # type: ignore[misc]
        rounds=len(words),
        warmup=len(asked) - len(words),
        description="search",
        show_progress_bar=show_progress_bar,
    )
    settings = {"passages": len(index), "precision": index.store.meta.precision, "queries": len(words), "k": k}
    figures = {
        mode: {key: round(1000 * s, 1) for key, s in percentiles(run.seconds).items()} for mode, run in runs.items()
    }
    return make_report(
        settings,
        [{"name": mode, **{f"{key}_ms": ms for key, ms in row.items()}} for mode, row in figures.items()],
        embed_ms_per_query=round(1000 * embed_seconds / len(words), 1),
        peak_memory_mb=peak_memory_mb(),
    )


COLUMNS = {"name": ("search", ""), "p50_ms": ("p50 (ms)", ""), "p95_ms": ("p95 (ms)", ""), "p99_ms": ("p99 (ms)", "")}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    head = (
        f"{s['passages']:,} passages ({s['precision']}), {s['queries']} queries; embedding"
        f" {report['embed_ms_per_query']} ms per query (in batches); peak memory {report['peak_memory_mb']:,} MB"
    )
    return f"{head}\n\n{rows_table(report['rows'], COLUMNS)}"
