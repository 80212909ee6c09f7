"""A map of a store: its passages as points in the plane, by the principal components of their vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from gemify.io.vectors import normalize
from gemify.retrieval.document_store import Store
from gemify.retrieval.vector_table import Corpus

MAX_POINTS = 20_000
"""Passages of a larger store that are not drawn are evenly spread over its table."""


@dataclass(frozen=True)
class StoreMap:
    """Passages in two dimensions: near means alike."""

    ids: tuple[str, ...]
    """Of the N passages that are drawn."""
    points_N2: np.ndarray
    """Their places, float32; the vectors that they stand for have length 1."""
    files: tuple[str, ...]
    """The files they are of, the one with the most passages first."""
    file_of_N: np.ndarray
    """The number of each passage's file in ``files``."""
    num_passages: int
    """Of the store, drawn or not."""
    explained_variance: float
    """The share of the vectors' variance that the two dimensions have, 0 to 1."""


def draw_map(store: Store | Corpus, *, max_points: int = MAX_POINTS) -> StoreMap:
    """Draw a map of a store or a corpus, the same each time.

    Args:
        store: read, not changed.
        max_points: most passages to draw.

    Raises:
        ValueError: the store is damaged.
    """
    ids, file_names, vectors_ND = store.sample_vectors(max_points)
    points_N2, explained = project(vectors_ND)
    files = tuple(name for name, _ in Counter(file_names).most_common())
    numbers = {name: number for number, name in enumerate(files)}
    file_of_N = np.array([numbers[name] for name in file_names], dtype=np.int64)
    return StoreMap(tuple(ids), points_N2, files, file_of_N, len(store), explained)


def project(vectors_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Project vectors on their first two principal components.

    Args:
        vectors_ND: they are scaled to length 1 first.

    Returns:
        Places [N, 2], and the share of the variance that they have. A component's largest entry is positive.
    """
    if len(vectors_ND) == 0:
        return np.zeros((0, 2), dtype=np.float32), 1.0
    centred_ND = normalize(vectors_ND)
    centred_ND -= centred_ND.mean(axis=0)
    variances, axes_DD = np.linalg.eigh((centred_ND.T @ centred_ND).astype(np.float64))
    axes_D2 = axes_DD[:, ::-1][:, :2]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(axis=0), range(axes_D2.shape[1])])
    points_N2 = np.zeros((len(vectors_ND), 2), dtype=np.float32)
    points_N2[:, : axes_D2.shape[1]] = centred_ND @ axes_D2
    total = float(variances.sum())
    return points_N2, float(variances[::-1][:2].sum()) / total if total > 1e-9 else 1.0
