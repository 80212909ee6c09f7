"""How fast the store is, apart from embedding: python tests/rag/store_speed.py DIRECTORY [ROWS [PRECISION]]."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemify.retrieval.chunking import Chunk
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import fuse
from gemify.retrieval.store_meta import StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord

DIMENSION, PORTION, TOPICS = 576, 2000, 500


def main(directory: str, count: int = 100_000, precision: str = "float32") -> None:
    chance = 1 / np.arange(1, 20_001)
    words, rng = np.array([f"word{i}" for i in range(20_000)]), np.random.default_rng(0)
    topics = rng.normal(size=(TOPICS, DIMENSION))
    store = Store.create(directory, StoreMeta("random", "random", DIMENSION, precision))  # type: ignore[arg-type]
    kept = np.memmap(Path(directory) / "oracle.f4", "f4", "w+", shape=(count, DIMENSION))
    begin = writing = time.perf_counter()
    writing = 0.0
    for first in range(0, count, PORTION):
        listed = [" ".join(w) for w in rng.choice(words, (PORTION, 40), p=chance / chance.sum())]
        # a topic and noise of 1.5 times its length: nearer and farther neighbours, as texts have
        vectors = topics[rng.integers(0, TOPICS, PORTION)] + 1.5 * rng.normal(size=(PORTION, DIMENSION))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        kept[first : first + PORTION] = vectors
        rows = [
            ChunkRow("f", "v", Chunk(first + i, t, "", "", f"row {first + i}", 40, t)) for i, t in enumerate(listed)
        ]
        now = time.perf_counter()
        store.append(rows, vectors)
        writing += time.perf_counter() - now
    now = time.perf_counter()
    store.commit([FileRecord("f", "h", "v", 1, 1.0, count)])
    store.optimize()
    facts = {"rows": count, "precision": precision, "append_s": writing, "finish_s": time.perf_counter() - now}
    facts["peak_MB_writing"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    queries = topics[rng.integers(0, TOPICS, 50)] + 1.5 * rng.normal(size=(50, DIMENSION))
    asked = [" ".join(w) for w in rng.choice(words, (50, 6), p=chance / chance.sum())]
    reader = Store.open(directory)
    facts["vector_ms"] = timed(lambda i: reader.vector_search(queries[i], 10))
    facts["fts_ms"] = timed(lambda i: reader.text_search(asked[i], 10))
    facts["hybrid_ms"] = timed(
        lambda i: fuse(
            [[h.id for h in reader.vector_search(queries[i], 50)], [h.id for h in reader.text_search(asked[i], 50)]]
        )
    )
    found = [{h.id for h in reader.vector_search(query, 10)} for query in queries]
    true = [{f"v-{i}" for i in np.argsort(-(kept @ query.astype("f4")))[:10]} for query in queries]
    facts["recall_10"] = float(np.mean([len(a & b) / 10 for a, b in zip(found, true, strict=True)]))
    facts["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    facts["disk_MB"] = sum(f.stat().st_size for f in Path(directory).rglob("*.lance*") if f.is_file()) / 1e6
    facts["total_s"] = time.perf_counter() - begin
    sys.stdout.write(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}) + "\n")


def timed(search: Callable[[int], object]) -> dict[str, float]:
    search(0)
    taken = []
    for number in range(50):
        begin = time.perf_counter()
        search(number)
        taken.append(1000 * (time.perf_counter() - begin))
    return {"p50": round(float(np.median(taken)), 1), "p95": round(float(np.quantile(taken, 0.95)), 1)}


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:3]), *sys.argv[3:4])
