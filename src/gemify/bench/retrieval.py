"""`gemify bench retrieval` and `gemify bench search`.

The first measures recall and mean reciprocal rank of a store on questions whose passage is known, the second the
milliseconds that a search takes, apart from embedding the query.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm.auto import tqdm

from gemify.bench.timing import Report, make_report, peak_memory_mb, percentiles, rows_table, run_in_turn
from gemify.io.rows import find_row_file, load_rows
from gemify.model.gem import GemModel
from gemify.rag.pipeline import GemRag
from gemify.retrieval.index import GemIndex, Mode

_DEPTH = 10


@dataclass(frozen=True)
class Question:
    """A question, the answers that count as right, and the id of the passage that holds them."""

    text: str
    answers: tuple[str, ...]
    passage: str


def read_questions(directory: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[Question]]:
    """Passages and questions of a directory in SQuAD's form: files of rows named corpus and queries.

    ``limit`` questions are taken evenly over the file; None takes all. ValueError names a file or row that does not
    fit.
    """
    passages = load_rows(_data_file(directory, "corpus"), {"_id": (str, int), "text": str})
    rows = load_rows(_data_file(directory, "queries"), {"text": str, "answers": list, "passage": (str, int)})
    questions = [Question(row["text"], tuple(map(str, row["answers"])), str(row["passage"])) for row in rows]
    known = {str(passage["_id"]) for passage in passages}
    if missing := [question.passage for question in questions if question.passage not in known]:
        raise ValueError(f"{directory}: the queries name a passage {missing[0]!r} that the corpus does not hold")
    if limit is not None and limit < len(questions):
        questions = [questions[i * len(questions) // limit] for i in range(limit)]
    return passages, questions


def _data_file(directory: Path, name: str) -> Path:
    if (path := find_row_file(directory, name)) is None:
        raise ValueError(f"{directory} has no {name}.jsonl (or .csv, .parquet, ...): give a directory in SQuAD's form")
    return path


def bench_retrieval(
    gem: GemModel, index: GemIndex, questions: Sequence[Question], *, show_progress_bar: bool = True
) -> Report:
    """Recall at 1, 5 and 10 and MRR (0 below rank 10), in percent, of every way to search.

    The store must be of a .jsonl file whose rows have the ids that the questions name. A row counts at its best chunk.
    *In the prompt* means the question's vector from inside the prompt that is answered, as `gemify ask` takes it.
    """
    if not questions:
        raise ValueError("no question given: the data has none")
    texts = [q.text for q in questions]
    alone_ND = np.asarray(gem.encode_query(texts))
    rag = GemRag(gem, index)
    bar = tqdm(texts, desc="questions in the prompt", unit="question", disable=not show_progress_bar)
    in_prompt_ND = np.stack([rag.embed_question(text) for text in bar])
    searches: dict[str, tuple[Mode, np.ndarray | None]] = {
        "full text (BM25)": ("fts", None),
        "vector": ("vector", alone_ND),
        "vector, question in the prompt": ("vector", in_prompt_ND),
        "hybrid": ("hybrid", alone_ND),
        "hybrid, question in the prompt": ("hybrid", in_prompt_ND),
    }
    rows = [
        {"name": name, **measure_retrieval(index, questions, mode=mode, vectors_ND=vectors_ND)}
        for name, (mode, vectors_ND) in searches.items()
    ]
    return make_report({"questions": len(questions), "passages": len(index)}, rows)


def measure_retrieval(
    index: GemIndex, questions: Sequence[Question], *, mode: Mode, vectors_ND: np.ndarray | None = None
) -> dict[str, float]:
    """Recall and MRR of one way to search. ``vectors_ND``: the questions' own."""
    ranks = []
    for at, question in enumerate(questions):
        vector = None if vectors_ND is None else vectors_ND[at]
        passages = index.search(question.text, k=3 * _DEPTH, mode=mode, vector=vector)
        rows = list(dict.fromkeys(passage.location for passage in passages))[:_DEPTH]
        row = f"row {question.passage}"
        ranks.append(rows.index(row) + 1 if row in rows else 0)
    rank_N = np.asarray(ranks)
    shares = {f"recall_at_{k}": float(np.mean((rank_N > 0) & (rank_N <= k))) for k in (1, 5, _DEPTH)}
    shares["mrr"] = float(np.mean([1 / rank if rank else 0.0 for rank in ranks]))
    return {name: round(100 * share, 1) for name, share in shares.items()}


COLUMNS = {
    "name": ("search", ""),
    "recall_at_1": ("recall@1", ""),
    "recall_at_5": ("recall@5", ""),
    "recall_at_10": ("recall@10", ""),
    "mrr": ("MRR", ""),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    return rows_table(report["rows"], COLUMNS)


_WARMUP = 5


def bench_search(
    gem: GemModel, index: GemIndex, *, queries: int = 200, k: int = 10, show_progress_bar: bool = True
) -> Report:
    """Search in every mode with the beginnings of stored passages. ValueError for an empty store."""
    step = max(1, len(index) // queries)
    texts = [p.text for p in itertools.islice(index.passages(), 0, None, step)][:queries]
    if not texts:
        raise ValueError("the store is empty: index something")
    words = [" ".join(text.split()[:8]) for text in texts]
    start = time.perf_counter()
    vectors_ND = np.asarray(gem.encode_query(words))
    embed_seconds = time.perf_counter() - start
    asked = list(zip(words, vectors_ND, strict=True))
    asked = asked[:_WARMUP] + asked

    def search(number: int, mode: Mode) -> None:
        text, vector = asked[number]
        index.search(text, k=k, mode=mode, vector=vector)

    runs = run_in_turn(
        {mode: lambda number, mode=mode: search(number, mode) for mode in get_args(Mode)},  # type: ignore[misc]
        rounds=len(words),
        warmup=len(asked) - len(words),
        description="search",
        show_progress_bar=show_progress_bar,
    )
    settings = {"passages": len(index), "precision": index.store.meta.precision, "queries": len(words), "k": k}
    figures = {
        mode: {key: round(1000 * s, 1) for key, s in percentiles(run.seconds).items()} for mode, run in runs.items()
    }
    return make_report(
        settings,
        [{"name": mode, **{f"{key}_ms": ms for key, ms in row.items()}} for mode, row in figures.items()],
        embed_ms_per_query=round(1000 * embed_seconds / len(words), 1),
        peak_memory_mb=peak_memory_mb(),
    )


SEARCH_COLUMNS = {"name": ("search", ""), **{f"p{p}_ms": (f"p{p} (ms)", "") for p in (50, 95, 99)}}


def search_table(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    head = (
        f"{s['passages']:,} passages ({s['precision']}), {s['queries']} queries; embedding"
        f" {report['embed_ms_per_query']} ms per query (in batches); peak memory {report['peak_memory_mb']:,} MB"
    )
    return f"{head}\n\n{rows_table(report['rows'], SEARCH_COLUMNS)}"
