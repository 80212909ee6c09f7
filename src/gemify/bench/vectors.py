"""`gemify bench vectors`: what writing, indexing and searching many vectors costs, and what an index misses.

    exact               float16 vectors, every one compared
    flat, sq, pq, rq    the same vectors behind an IVF index: as they are, in 8 bits, as codes, in 1 bit per number
    binary              only the signs, behind an IVF index

Vectors are written and searched as `gemify embed-corpus` and `search` do it, with partitions probed and candidates
rescored. The true neighbours are those among the float32 vectors that were written; they are found while writing, and
not timed. Every step runs in a process of its own, whose peak memory is taken.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gemify.bench.timing import Report, make_report, peak_memory_mb, percentiles, rows_table, run_in_turn
from gemify.io.directory import Directory
from gemify.io.vectors import normalize
from gemify.retrieval.bulk.lance_writer import commit, table, vacuum, write_part
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import Passage
from gemify.retrieval.vector_table import Corpus, CorpusMeta, table_uri

KINDS = ("exact", "flat", "sq", "pq", "rq", "binary")
_K = 10
_PART_SIZE = 16_384  # vectors made and written at a time
_WARMUP = 5
_QUERY_PART = 2**32  # number of the part that the queries are of
_GROUPS, _SUBGROUPS, _FAMILIES = 64, 32, 12
_RADII = (1.0, 0.8, 0.6, 0.5)


@dataclass(frozen=True)
class Mixture:
    """Synthetic vectors whose neighbours mean something: groups of groups of groups, the same for a seed.

    A vector is the sum of a random direction for its group, a smaller one for its subgroup, one for its family and one
    of its own, scaled to length 1: the nearest are of its family, then of its subgroup, then of its group. The vectors
    of a part depend on the seed and the part's number alone.
    """

    dim: int
    seed: int = 0
    _centres: tuple[np.ndarray, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        counts = (_GROUPS, _GROUPS * _SUBGROUPS, _GROUPS * _SUBGROUPS * _FAMILIES)
        object.__setattr__(self, "_centres", tuple(self._directions(rng, count) for count in counts))

    def part(self, number: int, count: int) -> np.ndarray:
        """Vectors [count, dim], float32, of length 1."""
        rng = np.random.default_rng([self.seed, number])
        family_N = rng.integers(len(self._centres[2]), size=count)
        groups = (family_N // (_SUBGROUPS * _FAMILIES), family_N // _FAMILIES, family_N)
        vectors_ND = _RADII[3] * self._directions(rng, count)
        for radius, centres_ND, at in zip(_RADII, self._centres, groups, strict=False):
            vectors_ND += radius * centres_ND[at]
        return normalize(vectors_ND)

    def _directions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.standard_normal((count, self.dim), dtype=np.float32) / np.float32(self.dim**0.5)


@dataclass(frozen=True)
class VectorSet:
    """The vectors and queries to measure with."""

    count: int
    dim: int
    seed: int
    queries: int

    def query_vectors(self) -> np.ndarray:
        """Queries [queries, dim], float32."""
        return Mixture(self.dim, self.seed).part(_QUERY_PART, self.queries)


def bench_vectors(
    *,
    count: int = 1_000_000,
    dim: int = 576,
    queries: int = 200,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    directory: Path | None = None,
    show_progress_bar: bool = True,
) -> Report:
    """Measure kinds of search (of `KINDS`, default: all) over the same vectors.

    The corpora are written in ``directory`` and deleted again. What writing took stands under ``write``.
    """
    if dim % 8:
        raise ValueError(f"dim must be a multiple of 8 (a bit a number), got {dim}")
    if wrong := [kind for kind in kinds or () if kind not in KINDS]:
        raise ValueError(f"unknown kind {wrong[0]!r}: choose from {', '.join(KINDS)}")
    vectors, chosen = VectorSet(count, dim, seed, queries), [kind for kind in KINDS if kind in (kinds or KINDS)]
    rows: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    root = Path(tempfile.mkdtemp(prefix="gemify-vectors-", dir=directory))
    try:
        nearest_QK: Any = None
        for kind in tqdm(chosen, desc="vectors", unit="kind", disable=not show_progress_bar):
            precision = "binary" if kind == "binary" else "float16"
            uri = str(root / precision)
            if precision not in written:
                written[precision], nearest_QK = _run_apart(_write, uri, precision, vectors)
            row = _run_apart(_index, uri, kind) if kind != "exact" else {"disk_bytes": _bytes(Path(uri))}
            rows.append({"name": kind, **row, **_run_apart(_search, uri, vectors, nearest_QK)})
    finally:
        shutil.rmtree(root, ignore_errors=True)
    settings = {"count": count, "dim": dim, "queries": queries, "seed": seed, "k": _K}
    return make_report(settings, rows, write=written)


def _run_apart(step: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, *arguments).result()


def _write(uri: str, precision: str, vectors: VectorSet) -> tuple[dict[str, Any], np.ndarray]:
    """What writing took, and the rows nearest to each question [queries, 10]."""
    directory, mixture, queries_QD = Directory(uri), Mixture(vectors.dim, vectors.seed), vectors.query_vectors()
    meta = CorpusMeta("synthetic", "", vectors.dim, precision=precision, keep_text=False)  # type: ignore[arg-type]
    scores_QK = np.full((vectors.queries, _K), -np.inf, np.float32)
    rows_QK = np.zeros((vectors.queries, _K), np.int64)
    parts: list[str] = []
    seconds = cpu = 0.0
    for number, first in enumerate(range(0, vectors.count, _PART_SIZE)):
        vectors_ND = mixture.part(number, min(_PART_SIZE, vectors.count - first))
        here_QN = np.concatenate([scores_QK, queries_QD @ vectors_ND.T], axis=1)
        known_QN = np.concatenate(
            [rows_QK, np.broadcast_to(first + np.arange(len(vectors_ND)), (vectors.queries, len(vectors_ND)))], axis=1
        )
        best_QK = np.argpartition(-here_QN, _K, axis=1)[:, :_K]
        scores_QK, rows_QK = (np.take_along_axis(a, best_QK, axis=1) for a in (here_QN, known_QN))
        passages = [Passage(str(row), "", "") for row in range(first, first + len(vectors_ND))]
        begin, began = time.perf_counter(), time.process_time()
        shard = Shard(number, "synthetic", first, len(passages), 0, "")
        parts += write_part(directory, meta, shard, table(meta, passages, vectors_ND))
        if first + _PART_SIZE >= vectors.count:
            commit(directory, meta, parts, name="synthetic")
        seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - began
    facts = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "disk_bytes": _bytes(Path(uri))}
    return {**facts, "peak_memory_mb": peak_memory_mb()}, rows_QK


def _index(uri: str, kind: str) -> dict[str, Any]:
    begin, began = time.perf_counter(), time.process_time()
    Corpus.open(uri).build_indexes("flat" if kind == "binary" else kind)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - began
    vacuum(Directory(uri))
    return {
        "build_seconds": round(seconds, 1),
        "build_cpu_seconds": round(cpu, 1),
        "build_memory_mb": peak_memory_mb(),
        "index_mb": round(_bytes(Path(table_uri(uri), "_indices")) / 1e6),
        "disk_bytes": _bytes(Path(uri)),
    }


def _search(uri: str, vectors: VectorSet, nearest_QK: np.ndarray) -> dict[str, Any]:
    corpus, queries_QD = Corpus.open(uri), vectors.query_vectors()
    warmup = min(_WARMUP, vectors.queries)
    order = [*range(warmup), *range(vectors.queries)]

    def search(number: int) -> float:
        query = order[number]
        hits = corpus.vector_search(queries_QD[query], _K)
        return len({int(hit.id) for hit in hits} & set(nearest_QK[query].tolist())) / _K

    run = run_in_turn({"search": search}, rounds=vectors.queries, warmup=warmup)["search"]
    seconds = percentiles(run.seconds, (50, 99)) | percentiles(run.cpu_seconds, (50, 99), name="cpu_")
    return {
        **{f"{name}_ms": round(1000 * value, 1) for name, value in seconds.items()},
        "recall_at_10": round(float(np.mean(run.results)), 4),
        "search_memory_mb": peak_memory_mb(),
    }


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


COLUMNS = {
    "name": ("index", ""),
    "build_seconds": ("build (s)", ""),
    "build_cpu_seconds": ("CPU (s)", ""),
    "build_memory_mb": ("memory (MB)", ",d"),
    "index_mb": ("index (MB)", ",.0f"),
    "p50_ms": ("search p50 (ms)", ""),
    "p99_ms": ("p99", ""),
    "cpu_p50_ms": ("CPU p50 (ms)", ""),
    "cpu_p99_ms": ("p99", ""),
    "recall_at_10": ("recall@10", ""),
    "search_memory_mb": ("memory (MB)", ",d"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    lines = [f"{s['count']:,} vectors of {s['dim']} numbers, {report['machine']['cores']} cores", ""]
    for precision, w in report["write"].items():
        lines.append(
            f"written in {precision}: {w['seconds']:,.1f} s ({w['cpu_seconds']:,.1f} CPU s),"
            f" {w['disk_bytes'] / 1e6:,.0f} MB, peak memory {w['peak_memory_mb']:,} MB"
        )
    return "\n".join([*lines, "", rows_table(report["rows"], COLUMNS)])
