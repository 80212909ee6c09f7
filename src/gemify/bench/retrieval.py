"""``gemify bench retrieval``: how well a store finds what is known to answer: recall and mean reciprocal rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gemify.bench.questions import Question
from gemify.model.gem import GemModel
from gemify.rag.pipeline import GemRag
from gemify.retrieval.index import GemIndex, Mode

_DEPTH = 10


def bench_retrieval(
    gem: GemModel, index: GemIndex, questions: Sequence[Question], *, show_progress_bar: bool = True
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 and MRR (0 below rank 10), in percent, of every way to search.

    The store must be of a .jsonl file whose rows have the ids that the questions name. A row counts at its best chunk.
    *In place* means the question's vector from inside the prompt that is answered, as `gemify ask` takes it.
    """
    if not questions:
        raise ValueError("no question given: the data has none")
    texts = [q.text for q in questions]
    alone_ND = np.asarray(gem.encode_query(texts))
    rag = GemRag(gem, index)
    bar = tqdm(texts, desc="questions in place", unit="question", disable=not show_progress_bar)
    in_place_ND = np.stack([rag.embed_question(text) for text in bar])
    ways: dict[str, tuple[Mode, np.ndarray | None]] = {
        "full text (BM25)": ("fts", None),
        "vector": ("vector", alone_ND),
        "vector, question in place": ("vector", in_place_ND),
        "hybrid": ("hybrid", alone_ND),
        "hybrid, question in place": ("hybrid", in_place_ND),
    }
    return {name: measure(index, questions, mode=mode, vectors_ND=vectors) for name, (mode, vectors) in ways.items()}


def measure(
    index: GemIndex, questions: Sequence[Question], *, mode: Mode, vectors_ND: np.ndarray | None = None
) -> dict[str, float]:
    """The figures of one way to search. ``vectors_ND``: the questions' own."""
    ranks = []
    for at, question in enumerate(questions):
        vector = None if vectors_ND is None else vectors_ND[at]
        found = index.search(question.text, k=3 * _DEPTH, mode=mode, vector=vector)
        places = list(dict.fromkeys(passage.location for passage in found))[:_DEPTH]
        wanted = f"row {question.passage}"
        ranks.append(places.index(wanted) + 1 if wanted in places else 0)
    got = np.asarray(ranks)
    shares = {f"recall_at_{k}": float(np.mean((got > 0) & (got <= k))) for k in (1, 5, _DEPTH)}
    shares["mrr"] = float(np.mean([1 / rank if rank else 0.0 for rank in ranks]))
    return {name: round(100 * share, 1) for name, share in shares.items()}


def as_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The report in Markdown."""
    heads = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    lines = ["| | recall@1 | recall@5 | recall@10 | MRR |", "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(str(row[head]) for head in heads) + " |" for name, row in report.items()]
    return "\n".join(lines)
