"""`gemify bench rerank`: how well a task's candidates are ordered by vectors, by yes and no, and by both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gemify.bench.timing import Report, make_report, rows_table
from gemify.io.vectors import normalize
from gemify.model.gem import GemModel
from gemify.retrieval.rerank import LmReranker

METRICS = {"Reranking": ("MAP", "map"), "Retrieval": ("nDCG@10", "ndcg_cut_10")}
"""Name and trec_eval's name of the metric of each type of task."""
WEIGHTS = (0.5, 0.2)
"""Of the language model's odds, in weighted sums of z-scores."""


def bench_rerank(
    gem: GemModel, task: Any, *, depth: int = 100, prior: bool = False, show_progress_bar: bool = True
) -> Report:
    """Order each query's candidates by every score, and measure MAP (reranking tasks) or nDCG@10 (retrieval tasks).

    Args:
        gem: The model.
        task: A reranking or retrieval task, from `gemify.evaluation.mteb_tasks.make_task`.
        depth: Candidates of a retrieval task: so many of the best by vectors.
        prior: Also subtract each passage's odds under an empty question, which runs all prompts twice.
        show_progress_bar: Whether to show a progress bar on stderr.

    Raises:
        ValueError: The task is of another kind.
    """
    from pytrec_eval import RelevanceEvaluator

    kind = str(task.metadata.type)
    if kind not in METRICS:
        raise ValueError(f"{task.metadata.name} is of type {kind}: give a task of type {' or '.join(METRICS)}")
    task.load_data()
    data = next(iter(task.dataset.values()))[task.metadata.eval_splits[0]]
    queries = {row["id"]: row["text"] for row in data["queries"]}
    corpus = {row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]}
    start = time.perf_counter()
    cosines_QN = _cosines(gem, queries, corpus, show_progress_bar)
    bi_seconds, lm_seconds, passages = time.perf_counter() - start, 0.0, 0
    ids, reranker, ranked = list(corpus), LmReranker(gem), data.get("top_ranked") or {}
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for query, cosine_N in zip(tqdm(queries, desc="queries", disable=not show_progress_bar), cosines_QN, strict=True):
        chosen = set(ranked.get(query, ()))
        at = [i for i, name in enumerate(ids) if name in chosen] if chosen else np.argsort(-cosine_N)[:depth].tolist()
        texts = [corpus[ids[i]] for i in at]
        start = time.perf_counter()
        odds_N = reranker(queries[query], texts)
        lm_seconds, passages = lm_seconds + time.perf_counter() - start, passages + len(texts)
        scores = {"bi": cosine_N[at], "lm": odds_N}
        if prior:
            scores["lm - prior"] = odds_N - reranker("", texts)
        for name in list(scores)[1:]:
            for weight in WEIGHTS:
                fused = (1 - weight) * standardize(scores["bi"]) + weight * standardize(scores[name])
                scores[f"{1 - weight:g} bi + {weight:g} ({name})"] = fused
        for name, score_N in scores.items():
            runs.setdefault(name, {})[query] = {ids[i]: float(s) for i, s in zip(at, score_N, strict=True)}
    evaluator = RelevanceEvaluator({query: dict(data["relevant_docs"][query]) for query in queries}, {METRICS[kind][1]})
    milliseconds = {"bi": 1000 * bi_seconds / len(corpus), "lm": 1000 * lm_seconds / max(1, passages)}
    rows = []
    for name, run in runs.items():
        values = [measured[METRICS[kind][1]] for measured in evaluator.evaluate(run).values()]
        rows.append({"name": name, "score": round(100 * float(np.mean(values)), 2), "ms": milliseconds.get(name)})
    settings = {"task": task.metadata.name, "metric": METRICS[kind][0], "queries": len(queries), "passages": passages}
    return make_report(settings | {"corpus": len(corpus)}, rows)


def _cosines(gem: GemModel, queries: Mapping[str, str], corpus: Mapping[str, str], bar: bool) -> np.ndarray:
    """Cosines [Q, N] of every query and document."""
    documents_ND = normalize(np.asarray(gem.encode_document(list(corpus.values()), show_progress_bar=bar)))
    queries_QD = normalize(np.asarray(gem.encode_query(list(queries.values()))))
    cosines_QN: np.ndarray = queries_QD @ documents_ND.T
    return cosines_QN


def standardize(scores_N: np.ndarray) -> np.ndarray:
    """Scores with mean 0 and deviation 1; zeros if all are equal."""
    centred_N = scores_N - scores_N.mean()
    deviation = float(centred_N.std())
    return centred_N / deviation if deviation else centred_N


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    head = f"{s['task']}: {s['queries']} queries, {s['passages']:,} passages scored of {s['corpus']:,}"
    columns = {"name": ("score", ""), "score": (s["metric"], ".2f"), "ms": ("ms a passage", ".1f")}
    return f"{head}\n\n{rows_table(report['rows'], columns)}"
