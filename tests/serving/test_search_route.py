"""The index behind the server: /v1/search finds what the library finds, chats answer from it as `gemify ask` does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from gemify.rag.pipeline import GemRag, RagSettings
from gemify.retrieval.index import GemIndex
from gemify.retrieval.rerank import rerank_index
from running_server import Served, indexed, serving
from tiny_gems import make_gem

CORPUS = {
    "birds.md": "# Birds\n\nOwls hunt at night.\n\n# Bees\n\nBees dance.\n",
    "sea.txt": "Tides follow the moon.\n",
    "stone.txt": "Granite is old and hard.\n",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemIndex:
    return indexed(tmp_path_factory.mktemp("rag"), CORPUS, tokens=48)


@pytest.fixture(scope="module")
def served(index: GemIndex) -> Iterator[Served]:
    assert index.model is not None
    with serving(index.model, index=index, keys={"ann": "secret-of-ann"}) as running:  # type: ignore[arg-type]
        yield running


KEY = {"authorization": "Bearer secret-of-ann"}


@pytest.mark.parametrize("mode", ["vector", "fts", "hybrid"])
def test_search_is_the_librarys(served: Served, index: GemIndex, mode: Any) -> None:
    got = served.post("/v1/search", {"query": "owls hunt", "k": 2, "mode": mode}, **KEY).json()
    expected = index.search("owls hunt", k=2, mode=mode)
    assert [d["id"] for d in got["data"]] == [p.id for p in expected]
    assert [d["score"] for d in got["data"]] == pytest.approx([p.score for p in expected], abs=1e-5)
    first = {**got["data"][0], "score": 0.0}
    assert first == expected[0].to_json() | {"score": 0.0}
    assert set(first) == {"id", "text", "file", "place", "title", "heading", "score", "meta"}
    assert got["usage"]["prompt_tokens"] == (0 if mode == "fts" else len("owls hunt"))


def test_a_filter_is_one_of_the_index(served: Served, index: GemIndex) -> None:
    where = "kind = 'txt' and file like '%sea%'"
    for mode in ("vector", "hybrid"):
        got = served.post("/v1/search", {"query": "owls hunt", "mode": mode, "filter": where}, **KEY).json()["data"]
        assert [Path(d["file"]).name for d in got] == ["sea.txt"]
        assert got[0]["meta"]["kind"] == "txt"
    body = {
        "messages": [{"role": "user", "content": "owls?"}],
        "max_tokens": 1,
        "gemify": {"search": {"filter": where}},
    }
    sources = served.post("/v1/chat/completions", body, **KEY).json()["gemify"]["sources"]
    assert [Path(s["file"]).name for s in sources] == ["sea.txt"]
    wrong = "language = 'de'"
    refused = served.post("/v1/search", {"query": "owls", "filter": wrong}, **KEY)
    body["gemify"]["search"]["filter"] = wrong  # type: ignore[index]
    for response in (refused, served.post("/v1/chat/completions", body, **KEY)):
        assert response.status_code == 400
        assert "the columns are file (text)" in response.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "filter"


@pytest.mark.parametrize("rerank", ["bi", "lm"])
@pytest.mark.parametrize("mode", ["fts", "hybrid"])
def test_what_is_found_is_sorted_as_the_library_does(served: Served, index: GemIndex, mode: Any, rerank: Any) -> None:
    query = "what is old, and when do owls hunt?"
    body = {"query": query, "k": 2, "mode": mode, "rerank": rerank}
    got = served.post("/v1/search", body, **KEY).json()
    expected = rerank_index(index, rerank, served.gem).search(query, k=2, mode=mode)
    assert [d["id"] for d in got["data"]] == [p.id for p in expected]
    assert [d["score"] for d in got["data"]] == pytest.approx([p.score for p in expected], abs=1e-5)
    assert got["usage"]["prompt_tokens"] > len(query)
    assert served.post("/v1/search", body | {"rerank": "cross"}, **KEY).status_code == 400


def test_a_chat_answers_from_the_passages_that_are_best_after_reranking(served: Served, index: GemIndex) -> None:
    question = "what is old, and when do owls hunt?"
    settings = RagSettings(passages=1, max_new_tokens=10)
    reranked, plain = rerank_index(index, "lm", served.gem), GemRag(served.gem, index, settings=settings)
    expected = GemRag(served.gem, reranked, settings=settings).ask(question)
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 10,
        "temperature": 0,
        "gemify": {"search": {"k": 1, "rerank": "lm"}},
    }
    got = served.post("/v1/chat/completions", body, **KEY).json()
    assert got["choices"][0]["message"]["content"] == expected.text
    assert [s["id"] for s in got["gemify"]["sources"]] == [p.id for p in expected.passages]
    assert expected.passages[0].id != plain.ask(question).passages[0].id  # type: ignore[attr-defined]


def test_a_chat_answers_from_the_index_as_the_library_does(served: Served, index: GemIndex) -> None:
    question = "when do owls hunt?"
    library = GemRag(served.gem, index, settings=RagSettings(passages=2, mode="fts", max_new_tokens=10))
    expected = library.ask(question)
    params: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 10,
        "temperature": 0,
        "extra_body": {"gemify": {"search": {"k": 2, "mode": "fts"}, "return_embedding": True}},
    }
    client = served.client("secret-of-ann")
    got: Any = client.chat.completions.create(**params)
    assert got.choices[0].message.content == expected.text
    assert [s["id"] for s in got.gemify["sources"]] == [p.id for p in expected.passages]  # type: ignore[attr-defined]
    assert np.linalg.norm(got.gemify["embedding"]) == pytest.approx(1.0, abs=1e-5)
    chunks: list[Any] = list(client.chat.completions.create(stream=True, **params))
    assert chunks[0].gemify["sources"] == got.gemify["sources"]
    np.testing.assert_allclose(chunks[0].gemify["embedding"], got.gemify["embedding"], atol=1e-5)
    assert not any(hasattr(chunk, "gemify") for chunk in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text


def test_an_earlier_turn_and_a_system_message_stay(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bees?"},
    ]
    bare = served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}, **KEY).json()
    found = served.post(
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 1, "gemify": {"search": {"k": 1, "mode": "fts"}}},
        **KEY,
    ).json()
    (source,) = found["gemify"]["sources"]
    put_in = f"\n\n[1] {source['heading']}: {source['text']}\n\n"
    assert found["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"] + len(put_in.encode())


@pytest.mark.parametrize(
    "body", [{"query": "   "}, {"query": "a", "k": 0}, {"query": "a", "k": 101}, {"query": "a", "mode": "magic"}, {}]
)
def test_what_cannot_be_searched(served: Served, body: Any) -> None:
    refused = served.post("/v1/search", body, **KEY)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"]


def test_odd_queries_find_something_or_nothing(served: Served) -> None:
    for query in ("\0", '"', "a AND (", "* OR *", "猫", "'; DROP TABLE passages; --", "x" * 20_000):
        for mode in ("vector", "fts", "hybrid"):
            got = served.post("/v1/search", {"query": query, "mode": mode}, **KEY)
            assert got.status_code in (200, 400), (query, mode, got.text)
    last = [{"role": "assistant", "content": "a"}]
    assert served.post("/v1/chat/completions", {"messages": last, "gemify": {"search": {}}}, **KEY).status_code == 400


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(served: Served) -> None:
    with served.http() as http:
        page = http.get("/")
        if page.status_code == 404:
            pytest.skip("the page is not there")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert http.get("/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
        assert http.get("/page/page.css").headers["content-type"] == "text/css; charset=utf-8"


def test_a_store_indexed_anew_is_searched_without_a_restart(tmp_path: Path) -> None:
    """Files are added; then the store is deleted and made again. Every search reads what is there."""
    made = indexed(tmp_path, CORPUS, tokens=48)
    assert made.model is not None
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "quartz.txt").write_text("Quartz is clear.\n")

    with serving(made.model, index=made) as running:  # type: ignore[arg-type]

        def found(query: str, mode: str) -> list[str]:
            data = running.post("/v1/search", {"query": query, "k": 1, "mode": mode}).json()["data"]
            return [passage["text"] for passage in data]

        assert found("quartz", "fts") == []
        GemIndex.open(made.store.uri, made.model, create=False).add([tmp_path / "more"])
        assert found("quartz", "fts") == ["Quartz is clear."]
        assert len(running.http().get("/v1/stores/map").json()["files"]) == 4
        shutil.rmtree(made.store.uri)
        GemIndex.open(made.store.uri, made.model, tokens=48, overlap=8).add([tmp_path / "more"])
        assert found("owls", "fts") == []
        assert found("what is clear?", "vector") == ["Quartz is clear."]
        assert running.http().get("/v1/stores/map").json()["files"] == [str(tmp_path / "more" / "quartz.txt")]


def test_a_store_that_another_model_made_again_is_not_searched(tmp_path: Path) -> None:
    made = indexed(tmp_path, CORPUS, tokens=48)
    other = make_gem(tiny_models.save(tmp_path / "other"), seed=9)
    with serving(made.model, index=made) as running:  # type: ignore[arg-type]
        shutil.rmtree(made.store.uri)
        GemIndex.open(made.store.uri, other, tokens=48, overlap=8).add([tmp_path / "sea.txt"])
        for mode in ("fts", "vector", "hybrid"):
            answer = running.post("/v1/search", {"query": "moon", "mode": mode})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "store_unavailable"
            assert str(tmp_path) not in answer.text
