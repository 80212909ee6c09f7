"""``gemify bench vectors``: what writing, indexing and searching many vectors costs, and what an index misses.

    exact    float16 vectors, every one compared
    flat, sq, pq, rq    the same vectors behind an IVF index: as they are, in 8 bits, as codes, in 1 bit a number
    binary   signs alone are kept, behind an IVF index

Written and searched as `gemify embed-corpus` and `search` do it, partitions probed and candidates rescored included. The
nearest are those among the float32 vectors that were written. Every step runs in a process of its own, whose peak
memory is taken; the exact neighbours are found while writing, and not timed. Beside the seconds of the clock stand those
of the processor, over all cores: on a busy machine they are the ones to compare.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gemify.bench.mixture import Mixture
from gemify.io.directory import Directory
from gemify.retrieval.bulk.lance_writer import commit, table, vacuum, write_part
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import Passage
from gemify.retrieval.corpus_format import CorpusMeta, table_uri
from gemify.retrieval.vector_table import Corpus

KINDS = ("exact", "flat", "sq", "pq", "rq", "binary")
_K = 10
_PART = 16_384  # vectors made and written at a time
_WARM = 5
_QUERIES = 2**32  # the number of the part that questions are of


@dataclass(frozen=True)
class Vectors:
    """What is measured on."""

    count: int
    dim: int
    seed: int
    queries: int

    def questions(self) -> np.ndarray:
        return Mixture(self.dim, self.seed).part(_QUERIES, self.queries)


def bench_vectors(
    *,
    count: int = 1_000_000,
    dim: int = 576,
    queries: int = 200,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    directory: Path | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """The record: what writing takes for each precision, and a row of figures for each kind of search."""
    if dim % 8:
        raise ValueError(f"dim must be a multiple of 8 (a bit a number), got {dim}")
    if wrong := [kind for kind in kinds or () if kind not in KINDS]:
        raise ValueError(f"unknown kind {wrong[0]!r}: choose from {', '.join(KINDS)}")
    wanted, asked = Vectors(count, dim, seed, queries), [kind for kind in KINDS if kind in (kinds or KINDS)]
    report: dict[str, Any] = {"count": count, "dim": dim, "queries": queries, "seed": seed, "k": _K}
    report |= {"cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(), "write": {}}
    report["search"] = {}
    root = Path(tempfile.mkdtemp(prefix="gemify-vectors-", dir=directory))
    bar = tqdm(total=2 * len(asked), desc="vectors", unit="step", disable=not show_progress_bar)
    try:
        nearest_NK: Any = None
        for kind in asked:
            precision = "binary" if kind == "binary" else "float16"
            uri = str(root / precision)
            bar.set_postfix_str(kind)
            if precision not in report["write"]:
                report["write"][precision], nearest_NK = _apart(_write, uri, precision, wanted)
            row = _apart(_index, uri, kind) if kind != "exact" else {"disk_bytes": _bytes(Path(uri))}
            bar.update()
            report["search"][kind] = row | _apart(_search, uri, wanted, nearest_NK)
            bar.update()
            if show_progress_bar:
                bar.write(f"{kind}: {report['search'][kind]}", file=sys.stderr)
    finally:
        bar.close()
        shutil.rmtree(root, ignore_errors=True)
    return report


def _apart(step: Callable[..., Any], *given: Any) -> Any:
    """Run a step in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, *given).result()


def _write(uri: str, precision: str, wanted: Vectors) -> tuple[dict[str, Any], np.ndarray]:
    """What writing took, and the rows nearest to each question [queries, 10]."""
    directory, mixture, questions_QD = Directory(uri), Mixture(wanted.dim, wanted.seed), wanted.questions()
    meta = CorpusMeta("synthetic", "", wanted.dim, precision=precision, keep_text=False)  # type: ignore[arg-type]
    scores_QK = np.full((wanted.queries, _K), -np.inf, np.float32)
    rows_QK = np.zeros((wanted.queries, _K), np.int64)
    parts: list[str] = []
    seconds = cpu = 0.0
    for number, first in enumerate(range(0, wanted.count, _PART)):
        vectors_ND = mixture.part(number, min(_PART, wanted.count - first))
        here_QN = np.concatenate([scores_QK, questions_QD @ vectors_ND.T], axis=1)
        known_QN = np.concatenate(
            [rows_QK, np.broadcast_to(first + np.arange(len(vectors_ND)), (wanted.queries, len(vectors_ND)))], axis=1
        )
        best_QK = np.argpartition(-here_QN, _K, axis=1)[:, :_K]
        scores_QK, rows_QK = (np.take_along_axis(a, best_QK, axis=1) for a in (here_QN, known_QN))
        passages = [Passage(str(row), "", "") for row in range(first, first + len(vectors_ND))]
        begin, began = time.perf_counter(), time.process_time()
        shard = Shard(number, "synthetic", first, len(passages), 0, "")
        parts += write_part(directory, meta, shard, table(meta, passages, vectors_ND))
        if first + _PART >= wanted.count:
            commit(directory, meta, parts, name="synthetic")
        seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - began
    facts = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "disk_bytes": _bytes(Path(uri))}
    return {**facts, "peak_memory_mb": _peak()}, rows_QK


def _index(uri: str, kind: str) -> dict[str, Any]:
    begin, began = time.perf_counter(), time.process_time()
    Corpus.open(uri).build_indexes("flat" if kind == "binary" else kind)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - began
    vacuum(Directory(uri))
    return {
        "build_seconds": round(seconds, 1),
        "build_cpu_seconds": round(cpu, 1),
        "build_memory_mb": _peak(),
        "index_bytes": _bytes(Path(table_uri(uri), "_indices")),
        "disk_bytes": _bytes(Path(uri)),
    }


def _search(uri: str, wanted: Vectors, nearest_QK: np.ndarray) -> dict[str, Any]:
    corpus, questions_QD = Corpus.open(uri), wanted.questions()
    took: dict[str, list[float]] = {"": [], "cpu_": []}
    found = []
    for at in itertools.chain(range(min(_WARM, wanted.queries)), range(wanted.queries)):
        begin, began = time.perf_counter(), time.process_time()
        hits = corpus.vector_search(questions_QD[at], _K)
        took[""].append(1000 * (time.perf_counter() - begin))
        took["cpu_"].append(1000 * (time.process_time() - began))
        found.append(len({int(hit.id) for hit in hits} & set(nearest_QK[at].tolist())) / _K)
    quantiles = {
        f"{clock}p{q}_ms": round(float(np.percentile(times[-wanted.queries :], q)), 1)
        for clock, times in took.items()
        for q in (50, 99)
    }
    recall = round(float(np.mean(found[-wanted.queries :])), 4)
    return {**quantiles, "recall_at_10": recall, "search_memory_mb": _peak()}


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _peak() -> int:
    """MiB that this process has held at most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [f"{report['count']:,} vectors of {report['dim']} numbers, {report['cores']} cores", ""]
    for precision, w in report["write"].items():
        lines.append(
            f"written in {precision}: {w['seconds']:,.1f} s ({w['cpu_seconds']:,.1f} of the processor),"
            f" {w['disk_bytes'] / 1e6:,.0f} MB, peak memory {w['peak_memory_mb']:,} MB"
        )
    heads = ("build, s", "processor, s", "memory, MB", "index, MB", "search p50, ms", "p99", "processor p50, ms", "p99")
    lines += ["", "| | " + " | ".join(heads) + " | recall@10 | memory, MB |", "|---" * (len(heads) + 3) + "|"]
    names = ("build_seconds", "build_cpu_seconds", "build_memory_mb", "index_mb", "p50_ms", "p99_ms", "cpu_p50_ms")
    for kind, row in report["search"].items():
        row = row | ({"index_mb": round(row["index_bytes"] / 1e6)} if "index_bytes" in row else {})
        said = [row.get(name, "") for name in (*names, "cpu_p99_ms", "recall_at_10", "search_memory_mb")]
        lines.append(f"| {kind} | " + " | ".join(map(str, said)) + " |")
    return "\n".join(lines)
