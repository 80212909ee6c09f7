"""Recall and MRR are counted by rows, for every way to search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bag_of_words import BagOfWords
from gemify import GemModel
from gemify.bench.retrieval import Question, bench_retrieval, measure_retrieval, to_markdown
from gemify.bench.timing import rows_by_name
from gemify.retrieval.index import GemIndex


def corpus(path: Path, count: int) -> Path:
    rows = [{"_id": f"r{i}", "text": f"thing{i} " * 6} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_quality_is_counted_by_rows(tmp_path: Path, bag: BagOfWords) -> None:
    index = GemIndex.open(tmp_path / "s", bag, tokens=16, overlap=0)
    index.add(corpus(tmp_path / "corpus.jsonl", 15))
    questions = [Question("thing3", (), "r3"), Question("thing4", (), "r9")]
    words = measure_retrieval(index, questions, mode="fts")
    assert words == {"recall_at_1": 50, "recall_at_5": 50, "recall_at_10": 50, "mrr": 50}
    vectors = np.asarray(bag.encode_query([q.text for q in questions]))
    assert measure_retrieval(index, questions, mode="vector", vectors_ND=vectors)["recall_at_1"] == 50


def test_every_way_to_search_is_measured(tmp_path: Path, gem: GemModel) -> None:
    index = GemIndex.open(tmp_path / "s", gem, tokens=48, overlap=0)
    index.add(corpus(tmp_path / "corpus.jsonl", 4))
    report = bench_retrieval(gem, index, [Question("thing2", (), "r2")], show_progress_bar=False)
    rows = rows_by_name(report)
    assert rows["full text (BM25)"]["mrr"] == 100
    assert list(rows)[1:] == ["vector", "vector, question in the prompt", "hybrid", "hybrid, question in the prompt"]
    assert to_markdown(report).count("\n") == 1 + len(rows)
