"""Arrays of vectors: scaled to length 1, and written to .npy, .jsonl or .parquet files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemify.io.atomic import atomic_file

FORMATS = (".npy", ".jsonl", ".parquet")


def normalize(vectors: npt.ArrayLike, *, dtype: type[np.floating[Any]] = np.float32) -> np.ndarray:
    """Scale vectors to length 1.

    Args:
        vectors: Vectors along the last axis, [..., D].
        dtype: The type to compute in, which is the result's too.

    Returns:
        An array of the same shape. A zero vector stays zero.
    """
    array = np.asarray(vectors, dtype=dtype)
    lengths = np.linalg.norm(array, axis=-1, keepdims=True)
    return array / np.where(lengths == 0, 1, lengths)


def check_format(path: Path) -> None:
    """Raise ValueError before any work if the ending is none we write, or the directory is missing."""
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: the name must end in one of {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        import pyarrow  # noqa: F401  a missing extra shows now, not after the work
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory, give a file name")


def write_vectors(path: Path, texts: Sequence[str], vectors_ND: np.ndarray, *, metrics: dict[str, Any]) -> None:
    """Write vectors (with their texts, but for .npy) and ``<name>.metrics.json``, both atomically."""
    check_format(path)
    with atomic_file(path) as stage:
        if path.suffix == ".npy":
            with stage.open("wb") as file:
                np.save(file, vectors_ND, allow_pickle=False)
        elif path.suffix == ".jsonl":
            with stage.open("w", encoding="utf-8") as out:
                for text, vector in zip(texts, vectors_ND, strict=True):
                    out.write(json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False) + "\n")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            width = vectors_ND.shape[1]
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1), pa.float32()), width)
            pq.write_table(pa.table({"text": pa.array(list(texts)), "embedding": column}), stage)
    with atomic_file(path.with_name(path.name + ".metrics.json")) as stage:
        stage.write_text(json.dumps(metrics, indent=2) + "\n")
