"""Passages and their vectors as parts on the disk, and parts as one table: the only file that knows pylance.

A part is data files that no table refers to yet: the shard's done marker does. `commit` makes the parts of all markers
one Lance table in a single step. Parquet parts are files of their own, and need no commit.
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
from gemify.retrieval.store_meta import Precision
from gemify.retrieval.vector_table import COMMIT_KEY, CorpusMeta, part_name, table_uri

_STORAGE_VERSION = "2.1"  # of Lance files: what LanceDB reads as well


def at_precision(vectors_ND: np.ndarray, precision: Precision) -> np.ndarray:
    """Convert vectors to what a corpus stores.

    Args:
        vectors_ND: Vectors, [N, D].
        precision: The precision. int8 puts the largest number of each vector at 127; binary has a bit a sign.

    Returns:
        Vectors of length 1, [N, D], or [N, D / 8] for binary.
    """
    vectors_ND = normalize(vectors_ND)
    if precision == "binary":
        return np.packbits(vectors_ND > 0, axis=1)
    if precision == "int8":
        largest_N1 = np.abs(vectors_ND).max(axis=1, keepdims=True)
        return np.round(vectors_ND / np.where(largest_N1 == 0, 1, largest_N1) * 127).astype(np.int8)
    return vectors_ND.astype(precision)


def table(meta: CorpusMeta, passages: Sequence[Passage], vectors_ND: np.ndarray) -> Any:
    """Return passages and their vectors as an Arrow table in the schema of the corpus."""
    import pyarrow as pa

    schema = meta.schema()
    stored = at_precision(vectors_ND, meta.precision)
    kind = schema.field("vector").type
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel(), kind.value_type), kind.list_size)
    columns = {"vector": vectors, **{n: [getattr(p, n) for p in passages] for n in schema.names if n != "vector"}}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write_part(directory: Directory, meta: CorpusMeta, shard: Shard, part: Any) -> list[str]:
    """Write a part. A part written twice replaces the first or lies unused.

    Args:
        directory: The corpus.
        meta: Its format.
        shard: The shard whose part it is.
        part: The rows, as `table` gives them.

    Returns:
        References to the part, for the shard's done marker.
    """
    if meta.format == "parquet":
        import pyarrow.parquet as pq

        name = part_name(shard.name)
        with directory.stage(name) as stage:
            pq.write_table(part, stage, filesystem=directory.files, compression="zstd")
        return [name]
    if not part.num_rows:
        return []
    written = _lance().fragment.write_fragments(
        part, table_uri(directory.uri), schema=part.schema, data_storage_version=_STORAGE_VERSION
    )
    if directory.local:  # the marker must not outlive a power cut that the part does not
        for file in (file for fragment in written for file in fragment.files):
            sync(Path(table_uri(directory.path), "data", file.path))
    return [json.dumps(fragment.to_json()) for fragment in written]


def committed(directory: Directory) -> str:
    """Return the name of the last commit, or an empty text before the first."""
    try:
        metadata = _lance().dataset(table_uri(directory.uri)).schema.metadata or {}
    except (ValueError, FileNotFoundError):
        return ""
    return str(metadata.get(COMMIT_KEY, b"").decode())


def commit(directory: Directory, meta: CorpusMeta, parts: Iterable[str], *, name: str) -> None:
    """Make parts the table, in one step.

    Args:
        directory: The corpus.
        meta: Its format.
        parts: References to parts, in the order of the table.
        name: The name of this commit.
    """
    lance = _lance()
    fragments = [lance.FragmentMetadata.from_json(part) for part in parts]
    lance.LanceDataset.commit(
        table_uri(directory.uri), lance.LanceOperation.Overwrite(meta.schema(commit=name), fragments)
    )


def vacuum(directory: Directory) -> None:
    """Delete data files that the table does not refer to: parts of killed runs, and its earlier versions."""
    dataset = _lance().dataset(table_uri(directory.uri))
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)


def _lance() -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # its warnings are for its developers
    import lance

    return lance
