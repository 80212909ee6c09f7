"""The bench measures what it says, on a tiny model; what does not fit is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemify import GemModel
from gemify.bench.rag import PIPELINES, SecondEncoder, bench_rag, make_documents, matches, to_markdown
from gemify.bench.retrieval import read_questions

PASSAGES = [{"_id": f"p{i}", "text": f"passage {i} says that {word} is number {i}"} for i, word in enumerate("abcdef")]


def write(directory: Path, corpus: list[dict[str, Any]], queries: list[dict[str, Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    with gzip.open(directory / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in corpus)
    (directory / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    return directory


QUERIES = [{"text": f"what is {i}?", "answers": [f"number {i}"], "passage": f"p{i}"} for i in range(6)]


def test_every_pipeline_is_measured_and_exact_ones_are_exact(gem: GemModel, tmp_path: Path) -> None:
    passages, questions = read_questions(write(tmp_path / "qa", PASSAGES, QUERIES), 2)
    assert [q.passage for q in questions] == ["p0", "p3"]
    encoder = SecondEncoder("ones", lambda texts: np.eye(len(texts), 6, dtype=np.float32))
    report = bench_rag(
        gem,
        passages=passages,
        questions=questions,
        lengths=[60, 120],
        second_encoder=encoder,
        bits=32,
        max_new_tokens=4,
        show_progress_bar=False,
    )
    for length in (60, 120):
        rows = {row["name"]: row for row in report["rows"] if row["document_tokens"] == length}
        assert list(rows) == [pipeline.name for pipeline in PIPELINES]
        assert rows["query cached, document"]["equal_answers"] == 100
        assert rows["document cached, query"]["equal_answers"] == 100
        assert rows["document cached, query"]["computed_tokens"] < rows["document, query"]["computed_tokens"] - length
        assert rows["document, query"]["stored_bytes"] == 4 * 32
        assert rows["document cached, query"]["stored_bytes"] > 1000 * length / 10
        assert rows["both cached (concatenated)"]["divergence_nats"] >= 0
        assert rows["no retrieval"]["recall_at_1"] == 0
    assert "| document cached, query | 120 |" in to_markdown(report)
    json.dumps(report)


def test_some_pipelines_bring_those_they_are_compared_with(gem: GemModel, tmp_path: Path) -> None:
    passages, questions = read_questions(write(tmp_path / "qa", PASSAGES, QUERIES), 1)
    options: dict[str, Any] = {"lengths": [40], "max_new_tokens": 2, "show_progress_bar": False}
    report = bench_rag(gem, passages=passages, questions=questions, only=["query cached, document"], **options)
    assert [row["name"] for row in report["rows"]] == ["generation alone", "query, document", "query cached, document"]
    with pytest.raises(ValueError, match="unknown pipeline 'magic': choose from 'no retrieval'"):
        bench_rag(gem, passages=passages, questions=questions, only=["magic"], **options)


def test_documents_have_their_length_and_begin_with_their_passage(gem: GemModel) -> None:
    documents = list(make_documents(gem, PASSAGES, 90))
    for passage, document in zip(PASSAGES, documents, strict=True):
        assert document.text.startswith(passage["text"])
        assert len(gem.tokenizer(document.text, add_special_tokens=False)["input_ids"]) == 90
    with pytest.raises(ValueError, match="in all, documents of 9999 are wanted"):
        list(make_documents(gem, PASSAGES, 9999))


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("It was the Panthers' defence.", ["Panthers defence"], True),
        ("308 points", ["308"], True),
        ("1308 points", ["308"], False),
        ("An Apple", ["apple"], True),
        ("nothing", ["", "!"], False),
    ],
)
def test_a_match_is_a_gold_answer_in_whole_words(said: str, gold: list[str], right: bool) -> None:
    assert matches(said, gold) is right


def test_what_does_not_fit_is_named(gem: GemModel, tmp_path: Path) -> None:
    passages, questions = read_questions(write(tmp_path / "qa", PASSAGES, QUERIES), None)
    with pytest.raises(ValueError, match="documents of 5000 tokens do not fit: this model takes 1024"):
        bench_rag(gem, passages=passages, questions=questions, lengths=[5000])
    with pytest.raises(ValueError, match=r"has no corpus\.jsonl"):
        read_questions(tmp_path, None)
    with pytest.raises(ValueError, match="name a passage 'p9'"):
        read_questions(write(tmp_path / "lost", PASSAGES, [{**QUERIES[0], "passage": "p9"}]), None)
    with pytest.raises(ValueError, match="row 1: no column 'answers'"):
        read_questions(write(tmp_path / "short", PASSAGES, [{"text": "?", "passage": "p0"}]), None)
    for answers in ("yes", {"text": ["yes"]}):
        with pytest.raises(ValueError, match="'answers' must be a list, got"):
            read_questions(write(tmp_path / "odd", PASSAGES, [{**QUERIES[0], "answers": answers}]), None)
    (tmp_path / "qa" / "queries.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match="row 1: not JSON"):
        read_questions(tmp_path / "qa", None)
