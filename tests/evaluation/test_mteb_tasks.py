"""Embedding tasks from local files, run by mteb over toy encoders; the figures are worked out again here by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

import tiny_data
from gemify.evaluation.mteb_runner import instruction_of, is_finished, run_task
from gemify.evaluation.mteb_tasks import LOCAL_TASKS, TASK_TYPES, make_task
from gemify.evaluation.results import ModelEntry, ResultStore
from tiny_data import Topics, Trigrams

SUBJECT = ModelEntry("toy/encoder", "r1")
Score = Callable[..., float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.write(tmp_path_factory.mktemp("data") / "all")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Data to break."""
    return tiny_data.write(tmp_path / "mine")


@pytest.fixture
def score(data: Path, tmp_path: Path) -> Score:
    def run(name: str, encoder: Any, *, root: Path = data, limit: int | None = None, **options: Any) -> float:
        task = make_task(name, root, limit=limit)
        if task.metadata.type == "Clustering":
            task.max_documents_per_cluster = 256  # mteb draws 16,384, with repetition
        with threadpool_limits(1):  # two threads of scikit-learn's wait for each other on a busy machine
            return run_task(encoder, task, SUBJECT, ResultStore(tmp_path / "out"), **options)

    return run


def cosines(pairs: list[tuple[str, str]]) -> np.ndarray:
    toy = Trigrams()
    return np.array([toy.one(a) @ toy.one(b) for a, b in pairs])


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_every_local_task_runs(name: str, score: Score, data: Path, tmp_path: Path) -> None:
    got = score(name, Trigrams())
    assert np.isfinite(got)
    assert 0.0 <= got <= 100.0
    store = ResultStore(tmp_path / "out")
    assert is_finished(store, SUBJECT, name)
    assert store.scores(SUBJECT)[name]["score"] == pytest.approx(got, abs=1e-3)
    again = Trigrams()
    assert score(name, again) == pytest.approx(got, abs=1e-3)  # mteb rounds in its files
    assert again.asked == []  # what is there is not run again
    (result,) = mteb.ResultCache(cache_path=tmp_path / "out").load_results().model_results
    assert (result.model_name, result.model_revision) == (SUBJECT.name, SUBJECT.revision)
    assert [(r.task_name, 100 * r.get_score()) for r in result.task_results] == [(name, pytest.approx(got, abs=1e-3))]
    assert make_task(name, data).metadata.type == TASK_TYPES[name]


@pytest.mark.parametrize(("name", "file"), [("STSBenchmark", "test"), ("STSBenchmarkDev", "dev")])
def test_sts_is_spearman_of_cosines(name: str, file: str, data: Path, score: Score) -> None:
    rows = tiny_data.read_rows(data / f"mteb/sts/STSBenchmark.{file}.jsonl.gz")
    expected = spearmanr(cosines([(r["sentence1"], r["sentence2"]) for r in rows]), [r["score"] for r in rows])
    assert 20 < 100 * expected.statistic < 99  # a figure that means something
    assert score(name, Trigrams()) == pytest.approx(100 * expected.statistic, abs=1e-4)


def test_retrieval_is_ndcg_of_title_and_text(data: Path, score: Score) -> None:
    toy = Trigrams()
    corpus = tiny_data.read_rows(data / "mteb/nfcorpus/corpus.jsonl.gz")
    documents_ND = np.stack([toy.one(f"{d['title']} {d['text']}") for d in corpus])
    gains = []
    for name in tiny_data.NAMES:
        order = np.argsort(-(documents_ND @ toy.one(tiny_data.text(name, 77, words=3))))[:10]
        hits = [corpus[i]["_id"].startswith(f"D-{name}-") for i in order]
        ideal = sum(1 / np.log2(at + 2) for at in range(4))
        gains.append(sum(hit / np.log2(at + 2) for at, hit in enumerate(hits)) / ideal)
    assert score("NFCorpus", toy) == pytest.approx(100 * np.mean(gains), abs=1e-3)


def test_reranking_is_mean_average_precision(data: Path, score: Score) -> None:
    class Far(Trigrams):  # blurred, so that it is not always right
        width = 7

    toy, precisions = Far(), []
    for row in tiny_data.read_rows(data / "mteb/wikiqa_rerank/test.jsonl.gz"):
        texts = [*row["positive"], *row["negative"]]
        scores = [toy.one(row["query"]) @ toy.one(text) for text in texts]
        precisions.append(average_precision_score([1] * len(row["positive"]) + [0] * len(row["negative"]), scores))
    assert 0.3 < np.mean(precisions) < 0.99
    assert score("WikiQAReranking", toy) == pytest.approx(100 * np.mean(precisions), abs=1e-3)


def test_pair_classification_is_the_best_average_precision(data: Path, score: Score) -> None:
    rows = tiny_data.read_rows(data / "mteb/mrpc/test.jsonl.gz")
    toy, labels = Trigrams(), [r["label"] for r in rows]
    found = cosines([(r["sent1"], r["sent2"]) for r in rows])
    city = [-np.abs(toy.one(r["sent1"]) - toy.one(r["sent2"])).sum() for r in rows]
    expected = max(average_precision_score(labels, found), average_precision_score(labels, city))
    assert score("MRPC", Trigrams()) == pytest.approx(100 * expected, abs=0.01)


@pytest.mark.parametrize("name", ["NFCorpus", "WikiQAReranking", "Banking77Classification", "CLINC150", "Banking77Dev"])
def test_who_knows_the_topics_is_always_right(name: str, score: Score) -> None:
    assert score(name, Topics()) == pytest.approx(100.0)


@pytest.mark.parametrize("name", [n for n in LOCAL_TASKS if n.startswith("STC2")])
def test_clusters_of_topics_are_found(name: str, score: Score) -> None:
    assert score(name, Topics()) == pytest.approx(100.0)


@pytest.mark.parametrize("name", ["Banking77Classification", "Banking77Dev"])
def test_classification_beats_chance(name: str, score: Score) -> None:
    assert score(name, Trigrams()) > 60  # four labels: chance is 25


def test_the_development_split_holds_out_every_fourth_row_of_each_label(data: Path) -> None:
    task = make_task("Banking77Dev", data)
    task.load_data()
    train, test = (task.dataset[name]["text"] for name in ("train", "test"))
    rows = [r["text"] for r in tiny_data.read_rows(data / "mteb/banking77/train.jsonl.gz")]
    assert sorted([*train, *test]) == sorted(rows)
    assert sorted(test) == sorted(tiny_data.text(name, n) for name in tiny_data.NAMES for n in (3, 7, 11))


def test_documents_nobody_has_are_no_target(data: Path) -> None:
    task = make_task("NFCorpus", data)
    task.load_data()
    split = task.dataset["default"]["test"]
    assert split["relevant_docs"] == {f"Q-{n}": {f"D-{n}-{i}": 1 for i in range(4)} for n in tiny_data.NAMES}
    assert split["queries"]["id"] == [f"Q-{n}" for n in tiny_data.NAMES]  # Q-lost asks only for what is not there


# Wrong names and broken files


def one_line(name: str, root: Path | None) -> str:
    with pytest.raises(ValueError) as error:
        make_task(name, root).load_data()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_names_are_answered_with_a_suggestion(data: Path) -> None:
    assert "'STSBenchmark'" in one_line("STSBenchmrk", None)
    said = one_line("STSBenchmrk", data)
    assert "STSBenchmark" in said
    assert "--data" in said
    assert "--data" in one_line("CLINC150", None)  # not on the hub
    assert "leave out --data" in one_line("SICK-R", data)


def test_a_missing_file_is_named_before_anything_runs(mine: Path) -> None:
    path = mine / "mteb/banking77/test.jsonl.gz"
    path.unlink()
    with pytest.raises(ValueError, match=f"Banking77Classification needs {path}, which does not exist"):
        make_task("Banking77Classification", mine)
    make_task("Banking77Dev", mine)  # needs the training rows only


@pytest.mark.parametrize(
    ("name", "file", "row", "said"),
    [
        ("STSBenchmark", "sts/STSBenchmark.test", '{"sentence1": "a", "score": 1}', "row 3: no column 'sentence2'"),
        ("STSBenchmark", "sts/STSBenchmark.test", '{"sentence1": "a"', "row 3: not JSON"),
        ("STSBenchmark", "sts/STSBenchmark.test", '["a"]', "row 3: expected a JSON object"),
        (
            "STS12",
            "sts/STS12.test",
            '{"sentence1": "", "sentence2": "", "score": "5"}',
            "row 3: 'score' must be a number",
        ),
        (
            "STS12",
            "sts/STS12.test",
            '{"sentence1": "", "sentence2": "", "score": true}',
            "row 3: 'score' must be a number",
        ),
        ("CLINC150", "clinc150/train", '{"text": "a", "label": null}', "row 3: 'label' must be text or a whole number"),
        ("MRPC", "mrpc/test", '{"sent1": "a", "sent2": "b", "label": "yes"}', "row 3: 'label' must be a whole number"),
        ("NFCorpus", "nfcorpus/corpus", '{"_id": "D", "text": "b"}', "row 3: no column 'title' (there are _id, text)"),
        ("WikiQAReranking", "wikiqa_rerank/test", '{"query": "a", "positive": "b", "negative": []}', "'positive' must"),
        ("WikiQAReranking", "wikiqa_rerank/test", '{"query": "a", "positive": [1], "negative": ["b"]}', "'positive'"),
        ("STC2Biomedical", "stc2/biomedical_titles", '{"text": 5, "label": 1}', "row 3: 'text' must be text, got int"),
    ],
)
def test_a_broken_row_is_named_with_its_line(mine: Path, name: str, file: str, row: str, said: str) -> None:
    path = mine / f"mteb/{file}.jsonl.gz"
    rows = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join([*rows[:2], row, *rows[2:]]).encode()))
    message = one_line(name, mine)
    assert str(path) in message
    assert said in message


def test_broken_relevance_is_named_with_its_line(mine: Path) -> None:
    path = mine / "mteb/nfcorpus/qrels.test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\n\nQ-cooking\tD-cooking-1\tgood\n")
    assert f"{path} row 3: expected query-id" in one_line("NFCorpus", mine)
    path.write_text("query-id\tcorpus-id\tscore\nQ-cooking\tD-nobody\t1\n")
    assert str(path) in one_line("NFCorpus", mine)


def test_a_label_without_training_rows_is_named(mine: Path) -> None:
    tiny_data.write_rows(mine / "mteb/clinc150/test.jsonl.gz", [{"text": "x", "label": "loans"}])
    said = one_line("CLINC150", mine)
    assert "test.jsonl.gz: label 'loans' does not occur in" in said


def test_truncated_and_mistaken_files_are_named(mine: Path) -> None:
    path = mine / "mteb/sts/STS13.test.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: a damaged .gz file" in one_line("STS13", mine)
    path.write_bytes(b"plain text")
    assert f"{path}: a damaged .gz file" in one_line("STS13", mine)
    path.write_bytes(gzip.compress(b"\xe9\xff"))
    assert f"{path} row 1: not UTF-8 text" in one_line("STS13", mine)
    path.write_bytes(gzip.compress(b"\n"))
    assert f"{path} holds no row" in one_line("STS13", mine)


# A subset run


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("STSBenchmark", 2 * 3),
        ("MRPC", 2 * 3),
        ("STC2Biomedical", 3),
        ("NFCorpus", 3 + 16),  # three queries, and documents up to ten times that
        ("WikiQAReranking", 3 + 3 * 4),
    ],
)
def test_a_limit_cuts(name: str, texts: int, score: Score) -> None:
    toy = Topics()
    assert np.isfinite(score(name, toy, limit=3))
    assert len(toy.asked) == texts


def test_a_limit_cuts_test_rows_and_keeps_every_label_to_train_on(data: Path) -> None:
    whole, cut = make_task("Banking77Classification", data), make_task("Banking77Classification", data, limit=5)
    whole.load_data()
    cut.load_data()
    assert len(cut.dataset["test"]) == 5
    assert set(cut.dataset["test"]["text"]) <= set(whole.dataset["test"]["text"])
    assert set(cut.dataset["test"]["label"]) == set(cut.dataset["train"]["label"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_a_limited_classification_is_never_taken_for_a_binary_one(limit: int, score: Score) -> None:
    """With rows of two labels only, mteb asks scikit-learn for figures that need a positive one."""
    assert score("CLINC150", Topics(), limit=limit) == pytest.approx(100.0)


def test_a_limited_corpus_keeps_what_is_looked_for(mine: Path) -> None:
    many = [{"_id": f"X{n}", "title": "", "text": f"{n}"} for n in range(100)]
    path = mine / "mteb/nfcorpus/corpus.jsonl.gz"
    tiny_data.write_rows(path, [*many, *tiny_data.read_rows(path)])
    task = make_task("NFCorpus", mine, limit=2)
    task.load_data()
    split = task.dataset["default"]["test"]
    assert len(split["queries"]) == len(split["relevant_docs"]) == 2
    wanted = {d for documents in split["relevant_docs"].values() for d in documents}
    assert wanted <= set(split["corpus"]["id"])
    assert 20 <= len(split["corpus"]) <= 20 + len(wanted)


# Instructions


@pytest.mark.parametrize("name", ["STSBenchmark", "Banking77Classification", "MRPC", "STC2Biomedical"])
def test_an_instruction_stands_before_every_text(name: str, score: Score, data: Path) -> None:
    toy = Trigrams()
    score(name, toy, instructions=True)
    wanted = instruction_of(make_task(name, data)).rstrip(".:")
    assert wanted
    assert {prompt for _, prompt in toy.asked} == {f"{wanted}: "}


@pytest.mark.parametrize("name", ["NFCorpus", "WikiQAReranking"])
def test_in_retrieval_an_instruction_stands_before_queries_only(name: str, score: Score, data: Path) -> None:
    toy = Trigrams()
    score(name, toy, instructions=True)
    if name == "NFCorpus":
        queries = {tiny_data.text(topic, 77, words=3) for topic in tiny_data.NAMES}
    else:
        queries = {row["query"] for row in tiny_data.read_rows(data / "mteb/wikiqa_rerank/test.jsonl.gz")}
    prompts = dict(toy.asked)
    assert {text for text, prompt in prompts.items() if prompt} == queries
    (prompt,) = {prompt for prompt in prompts.values() if prompt}
    assert prompt.startswith("Given a question, retrieve ")
    assert prompt.endswith(": ")
    assert len(prompts) > len(queries)


def test_without_instructions_nothing_is_put_before_a_text(score: Score) -> None:
    toy = Trigrams()
    score("STSBenchmark", toy)
    assert {prompt for _, prompt in toy.asked} == {None}


def test_a_models_own_prompts_are_its_own_business(score: Score) -> None:
    """Queries and documents go to the methods of these names where an encoder has them."""

    class Sided(Topics):
        def encode_query(self, inputs: list[str], **options: Any) -> np.ndarray:
            self.asked += [(text, "query") for text in inputs]
            return Topics().encode(inputs)

        def encode_document(self, inputs: list[str], **options: Any) -> np.ndarray:
            self.asked += [(text, "document") for text in inputs]
            return Topics().encode(inputs)

    toy = Sided()
    assert score("NFCorpus", toy) == pytest.approx(100.0)
    sides = {side for _, side in toy.asked}
    assert sides == {"query", "document"}
    assert sum(side == "query" for _, side in toy.asked) == 4


def test_a_result_cut_short_by_a_kill_is_measured_again(score: Score, tmp_path: Path) -> None:
    first = score("STS12", Trigrams())
    path = tmp_path / "out/results/toy__encoder/r1/STS12.json"
    path.write_bytes(path.read_bytes()[:100])
    assert not is_finished(ResultStore(tmp_path / "out"), SUBJECT, "STS12")
    assert score("STS12", Trigrams()) == pytest.approx(first)
    assert json.loads(path.read_text())["task_name"] == "STS12"
