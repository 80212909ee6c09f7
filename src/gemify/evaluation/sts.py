"""Spearman correlation of cosine similarity with human scores on sentence pairs (STS)."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.stats import spearmanr


class Encoder(Protocol):
    """Anything that embeds texts as sentence-transformers does."""

    def encode(self, inputs: list[str], *, batch_size: int = 32) -> Any: ...


@dataclass(frozen=True)
class Pair:
    sentence1: str
    sentence2: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from JSON lines with ``sentence1``, ``sentence2`` and ``score`` (.jsonl or .jsonl.gz)."""
    if not path.is_file():
        raise ValueError(f"no such file of STS pairs: {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    pairs = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    pairs.append(_pair(line, f"{path} line {number}"))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not readable as text: {error}") from error
    if len(pairs) < 2:
        raise ValueError(f"{path} holds {len(pairs)} pairs: a correlation needs at least two")
    return pairs


def _pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
        return Pair(str(row["sentence1"]), str(row["sentence2"]), float(row["score"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: expected JSON with sentence1, sentence2 and score ({type(error).__name__})"
        ) from error


def spearman(encoder: Encoder, pairs: list[Pair], *, batch_size: int = 64) -> float:
    """100 times Spearman's rho, MTEB's STS metric (cosine)."""
    texts = [t for p in pairs for t in (p.sentence1, p.sentence2)]
    vectors = np.asarray(encoder.encode(texts, batch_size=batch_size), dtype=np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12
    cosine = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    return float(100.0 * spearmanr(cosine, [p.score for p in pairs]).statistic)
