"""Inputs for tests of corpora: rows of differing words in every kind of file, and a corpus read back."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from gemify.model.encode import ThroughputMeter

WORDS = ["owls", "tides", "stone", "bees", "paper", "moon", "river", "seven", "green", "wind"]


def row(number: int) -> dict[str, Any]:
    """A row that no other is like."""
    words = [WORDS[(number * 3 + j * (number % 7 + 1)) % len(WORDS)] for j in range(3 + number % 11)]
    return {"_id": f"d{number}", "title": f"On {words[0]}" if number % 3 else "", "text": f"{' '.join(words)} {number}"}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_parquet(path: Path, rows: list[Any], *, group: int = 17) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that a file's name tells."""
    import pyarrow as pa

    kind = path.name.split(".")[1]
    if kind in ("csv", "tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0], delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue().encode()
    elif kind == "json":
        content = json.dumps(rows, indent=1).encode()
    else:
        content = "".join(json.dumps(one) + "\n" for one in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def write_inputs(root: Path, count: int = 150) -> list[Path]:
    """Rows over a plain, a compressed and a Parquet file, whose ends are not those of shards."""
    root.mkdir(parents=True, exist_ok=True)
    rows, third = [row(n) for n in range(count)], count // 3
    return [
        write_jsonl(root / "a.jsonl", rows[: third + 3]),
        write_jsonl(root / "b.jsonl.gz", rows[third + 3 : 2 * third]),
        write_parquet(root / "c.parquet", rows[2 * third :]),
    ]


def read_back(uri: Path) -> Any:
    """All that a corpus holds, in its order, as Arrow: by pylance itself."""
    import lance

    return lance.dataset(str(uri / "corpus.lance")).to_table()


def vectors_of(table: Any) -> np.ndarray:
    """The vectors of rows read back."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


class Words:
    """A model whose vectors are known from the words alone; it may fail now and then."""

    def __init__(self, dimension: int = 16, name: str = "words") -> None:
        self.meter, self.dimension, self.fingerprint = ThroughputMeter(), dimension, name
        self.embedded: list[str] = []
        self.failures: list[BaseException] = []

    def get_embedding_dim(self) -> int:
        return self.dimension

    def encode_query(self, inputs: str, **_: Any) -> np.ndarray:
        return self.encode_document([inputs])[0]

    def encode_document(self, inputs: Any, **_: Any) -> np.ndarray:
        if self.failures:
            raise self.failures.pop()
        self.embedded.extend(inputs)
        seeds = [[WORDS.index(w) if w in WORDS else len(w) + 99 for w in text.split()] or [0] for text in inputs]
        rows = [sum(np.random.default_rng(s).normal(size=self.dimension) for s in one) for one in seeds]
        return np.stack(rows).astype("f4")
