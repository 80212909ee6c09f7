"""Every score orders a task's candidates; the figure of the vectors is that of `gemify eval`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mteb")

import tiny_data
import tiny_models
from gemify import GemModel
from gemify.bench.rerank import bench_rerank, standardize, to_markdown
from gemify.bench.timing import rows_by_name
from gemify.evaluation.mteb_runner import run_task
from gemify.evaluation.mteb_tasks import make_task
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.retrieval.rerank import LmReranker
from tiny_gems import make_gem


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.write(tmp_path_factory.mktemp("data") / "all")


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemModel:
    return make_gem(tiny_models.save(tmp_path_factory.mktemp("model") / "base"))


@pytest.mark.parametrize("name", ["WikiQAReranking", "NFCorpus"])
def test_vectors_score_as_in_an_evaluation(name: str, data: Path, gem: GemModel, tmp_path: Path) -> None:
    report = bench_rerank(gem, make_task(name, data), prior=True, show_progress_bar=False)
    rows = rows_by_name(report)
    expected = run_task(gem, make_task(name, data), ModelEntry("toy/gem", "r1"), ResultStore(tmp_path))
    assert rows["bi"]["score"] == pytest.approx(expected, abs=0.01)
    assert list(rows)[:3] == ["bi", "lm", "lm - prior"]
    assert len({row["score"] for row in rows.values()}) > 2
    assert rows["lm"]["ms"] > 0
    assert to_markdown(report).count("\n") == 3 + len(rows)


def test_the_odds_order_the_candidates(data: Path, gem: GemModel) -> None:
    task = make_task("WikiQAReranking", data)
    found = rows_by_name(bench_rerank(gem, task, show_progress_bar=False))["lm"]["score"]
    split = task.dataset["default"]["test"]
    texts = dict(zip(split["corpus"]["id"], split["corpus"]["text"], strict=True))
    reciprocal_ranks = []
    for query, text in zip(split["queries"]["id"], split["queries"]["text"], strict=True):
        candidates = split["top_ranked"][query]  # the first one is right, the others are not
        scores = LmReranker(gem)(text, [texts[name] for name in candidates])
        reciprocal_ranks.append(1 / (1 + int((scores > scores[0]).sum())))
    assert found == pytest.approx(100 * np.mean(reciprocal_ranks), abs=0.01)


def test_scores_are_standardized() -> None:
    made = standardize(np.array([1.0, 2.0, 6.0]))
    assert made.mean() == pytest.approx(0)
    assert made.std() == pytest.approx(1)
    assert standardize(np.array([3.0, 3.0])).tolist() == [0, 0]


def test_a_task_without_candidates_is_refused(data: Path, gem: GemModel) -> None:
    with pytest.raises(ValueError, match="Banking77Classification is of type Classification: give a task of type"):
        bench_rerank(gem, make_task("Banking77Classification", data))
