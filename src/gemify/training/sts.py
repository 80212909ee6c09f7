"""Spearman correlation of cosine similarity with human scores on sentence pairs (STS)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.stats import spearmanr

from gemify.io.rows import load_rows
from gemify.io.vectors import normalize


class Encoder(Protocol):
    """Anything that embeds texts as sentence-transformers does."""

    def encode(self, inputs: list[str], *, batch_size: int = 32) -> Any:
        """Return vectors [N, D] of N texts."""
        ...


@dataclass(frozen=True)
class Pair:
    """Two sentences, and how similar people found them."""

    sentence1: str
    sentence2: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from rows with ``sentence1``, ``sentence2`` and ``score``; ValueError if there are fewer than two."""
    rows = load_rows(path, {"sentence1": str, "sentence2": str, "score": (int, float)})
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} pair: a correlation needs at least two")
    return [Pair(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def spearman(encoder: Encoder, pairs: list[Pair], *, batch_size: int = 64) -> float:
    """Return 100 times Spearman's rho of cosine similarities and scores: MTEB's STS metric."""
    texts = [t for p in pairs for t in (p.sentence1, p.sentence2)]
    vectors = normalize(encoder.encode(texts, batch_size=batch_size), dtype=np.float64)
    cosine = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    return float(100.0 * spearmanr(cosine, [p.score for p in pairs]).statistic)
