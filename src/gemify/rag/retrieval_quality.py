"""How well an index finds what is known to answer: recall and mean reciprocal rank over questions with their rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemify.rag.index import GemIndex, Mode

_DEPTH = 10


@dataclass(frozen=True)
class Question:
    """A question, and the id of the .jsonl row that answers it."""

    text: str
    row: str


@dataclass(frozen=True)
class Quality:
    """Shares of 1. A row counts at its best chunk; the reciprocal rank is 0 below rank 10."""

    recall_1: float
    recall_5: float
    recall_10: float
    mrr: float
    questions: int


def read_questions(path: Path, *, text_column: str = "text", row_column: str = "passage") -> list[Question]:
    """Questions of a .jsonl or .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Question(row[text_column], str(row[row_column])) for row in rows]


def measure(
    index: GemIndex, questions: Sequence[Question], *, mode: Mode, vectors_ND: np.ndarray | None = None
) -> Quality:
    """Search for every question and see at which rank its row comes. ``vectors_ND``: the questions' own, if known."""
    if not questions:
        raise ValueError("no questions given: give at least one")
    if vectors_ND is None and mode != "fts" and index.model is not None:
        vectors_ND = index.model.encode_query([q.text for q in questions])
    ranks = []
    for at, question in enumerate(questions):
        vector = None if vectors_ND is None or mode == "fts" else vectors_ND[at]
        found = index.search(question.text, k=3 * _DEPTH, mode=mode, vector=vector)
        places = list(dict.fromkeys(passage.place for passage in found))[:_DEPTH]
        wanted = f"row {question.row}"
        ranks.append(places.index(wanted) + 1 if wanted in places else 0)
    got = np.asarray(ranks)
    at_1, at_5, at_10 = (float(np.mean((got > 0) & (got <= k))) for k in (1, 5, _DEPTH))
    return Quality(at_1, at_5, at_10, float(np.mean([1 / r if r else 0.0 for r in ranks])), len(ranks))
