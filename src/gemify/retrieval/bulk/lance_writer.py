"""Passages and their vectors -> parts on the disk, and parts -> one table: the only file that knows pylance.

A part is data files that nothing refers to yet. What refers to it is the shard's done marker; `commit` makes the parts
of all markers one Lance table in a single step. Parquet parts are files of their own, and need no commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from gemify.io.atomic import sync
from gemify.io.directory import Directory
from gemify.io.vectors import normalize
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import Passage
from gemify.retrieval.document_store import Precision
from gemify.retrieval.vector_table import TABLE, CorpusMeta

_STORAGE_VERSION = "2.1"  # of Lance files: what LanceDB reads as well


def schema(meta: CorpusMeta) -> Any:
    """Columns and, as metadata, what the corpus says of itself."""
    import pyarrow as pa

    width = meta.dimension // 8 if meta.precision == "binary" else meta.dimension
    kinds = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
    texts = [pa.field(n, pa.string()) for n in ("id", *(("title", "text") if meta.keep_text else ()))]
    return pa.schema([*texts, pa.field("vector", pa.list_(kinds[meta.precision], width))], metadata=meta.metadata)


def at_precision(vectors_ND: np.ndarray, precision: Precision) -> np.ndarray:
    """Vectors of length 1 as they are kept; int8 has the largest number of each vector at 127, binary a bit a sign."""
    vectors_ND = normalize(vectors_ND)
    if precision == "binary":
        return np.packbits(vectors_ND > 0, axis=1)
    if precision == "int8":
        largest_N1 = np.abs(vectors_ND).max(axis=1, keepdims=True)
        return np.round(vectors_ND / np.where(largest_N1 == 0, 1, largest_N1) * 127).astype(np.int8)
    return vectors_ND.astype(precision)


def table(meta: CorpusMeta, passages: Sequence[Passage], vectors_ND: np.ndarray) -> Any:
    """The rows of a part."""
    import pyarrow as pa

    wanted = schema(meta)
    kept = at_precision(vectors_ND, meta.precision)
    kind = wanted.field("vector").type
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(kept.ravel(), kind.value_type), kind.list_size)
    columns = {"vector": vectors, **{n: [getattr(p, n) for p in passages] for n in wanted.names if n != "vector"}}
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def write_part(directory: Directory, meta: CorpusMeta, shard: Shard, part: Any) -> list[str]:
    """Write a part; what refers to it. Written twice, the second one replaces the first or lies unused."""
    if meta.format == "parquet":
        import pyarrow.parquet as pq

        name = f"part-{shard.name}.parquet"
        with directory.stage(name) as stage:
            pq.write_table(part, stage, filesystem=directory.files, compression="zstd")
        return [name]
    if not part.num_rows:
        return []
    written = _lance().fragment.write_fragments(
        part, _table_uri(directory), schema=part.schema, data_storage_version=_STORAGE_VERSION
    )
    if directory.local:  # the marker must not outlive a power cut that the part does not
        for file in (file for fragment in written for file in fragment.files):
            sync(Path(directory.path, f"{TABLE}.lance", "data", file.path))
    return [json.dumps(fragment.to_json()) for fragment in written]


def committed(directory: Directory) -> str:
    """The name of what was committed last, or nothing."""
    try:
        metadata = _lance().dataset(_table_uri(directory)).schema.metadata or {}
    except (ValueError, FileNotFoundError):
        return ""
    return str(metadata.get(b"parts", b"").decode())


def commit(directory: Directory, meta: CorpusMeta, parts: Iterable[str], *, name: str) -> None:
    """Make parts, in their order, the table: all of them or, where this is cut short, none."""
    lance = _lance()
    fragments = [lance.FragmentMetadata.from_json(part) for part in parts]
    described = schema(meta).with_metadata({**meta.metadata, b"parts": name.encode()})
    lance.LanceDataset.commit(_table_uri(directory), lance.LanceOperation.Overwrite(described, fragments))


def vacuum(directory: Directory) -> None:
    """Delete what the table does not refer to: parts of killed runs, and its earlier versions."""
    dataset = _lance().dataset(_table_uri(directory))
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)


def _table_uri(directory: Directory) -> str:
    return f"{directory.uri}/{TABLE}.lance"


def _lance() -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # its warnings are for its developers
    import lance

    return lance
