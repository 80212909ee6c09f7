"""LlamaIndex's own index, query engine and pipeline over one GEM."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters

from gemify import GemModel
from gemify.integrations.llama_index import GemEmbedding, GemLLM, GemRetriever, to_sql
from gemify.retrieval.index import GemIndex
from tiny_gems import make_gem, store_of

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the cat sat on the mat", "a boat on the river", "seven small stones"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir, prompts={"query": "query: "})


@pytest.fixture(scope="module")
def stored(shared_gem: GemModel, tmp_path_factory: pytest.TempPathFactory) -> GemIndex:
    return store_of(shared_gem, tmp_path_factory.mktemp("stored"))


@pytest.fixture
def llm(shared_gem: GemModel) -> GemLLM:
    return GemLLM(gem=shared_gem, temperature=0, max_tokens=12)


@pytest.fixture
def counted_in_its_tokens(shared_gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_tokenizer", None)
    Settings.tokenizer = shared_gem.tokenizer.encode


def test_a_retriever_finds_what_the_index_does(stored: GemIndex) -> None:
    found = GemRetriever(stored, similarity_top_k=2).retrieve("cat mat")
    assert [(n.node_id, n.text, n.score) for n in found] == [
        (p.id, p.text, p.score) for p in stored.search("cat mat", k=2)
    ]
    assert found[0].metadata["kind"] == "md"


@pytest.mark.parametrize(
    ("filters", "years"),
    [
        ([("year", 2024, "==")], {2024}),
        ([("year", 2024, "!="), ("lang", "en", "==")], {2025, 2026}),
        ([("year", [2024, 2026], "in")], {2024, 2026}),
        ([("lang", ["fr", "it's"], "nin"), ("year", 2025, ">=")], {2025, 2026}),
        ([("tags", "odd", "contains")], {2025}),
        ([("tags", ["odd", "none"], "any")], {2025}),
        ([("tags", ["even", "of"], "all")], {2024, 2026}),
        ([("file", "2025.md", "text_match"), ("heading", "CAT", "text_match_insensitive")], {2025}),
        ([("title", None, "is_empty")], set()),
        ([("date", "2025-06-01", "<")], {2024, 2025}),
    ],
)
def test_its_filters_are_the_stores(stored: GemIndex, filters: Any, years: set[int]) -> None:
    listed = [MetadataFilter(key=key, value=value, operator=operator) for key, value, operator in filters]
    found = GemRetriever(stored, filters=MetadataFilters(filters=listed)).retrieve("cat")  # type: ignore[arg-type]
    assert {n.metadata["year"] for n in found} == years


def test_filters_in_filters(stored: GemIndex) -> None:
    one, two = (MetadataFilter(key="year", value=year) for year in (2024, 2025))
    either = MetadataFilters(filters=[one, two], condition=FilterCondition.OR)
    neither = MetadataFilters(filters=[either], condition=FilterCondition.NOT)
    retriever = GemRetriever(stored, filters=MetadataFilters(filters=[neither]))
    assert {n.metadata["year"] for n in asyncio.run(retriever.aretrieve("cat"))} == {2026}
    with pytest.raises(ValueError, match="name of a column"):
        to_sql(MetadataFilters(filters=[MetadataFilter(key="year = 1 or file", value="x")]))
    assert to_sql(MetadataFilters(filters=[])) is None


def test_embeddings_are_the_models_to_the_bit(shared_gem: GemModel) -> None:
    embedding = GemEmbedding(gem=shared_gem)
    assert np.array_equal(np.float32(embedding.get_text_embedding_batch(TEXTS)), shared_gem.encode(TEXTS))
    assert np.array_equal(np.float32(embedding.get_text_embedding("cat")), shared_gem.encode(["cat"])[0])
    assert np.array_equal(np.float32(embedding.get_query_embedding("cat")), shared_gem.encode(["query: cat"])[0])
    assert asyncio.run(embedding.aget_query_embedding("cat")) == embedding.get_query_embedding("cat")
    assert asyncio.run(embedding.aget_text_embedding("cat")) == embedding.get_text_embedding("cat")
    assert asyncio.run(embedding.aget_text_embedding_batch(TEXTS)) == embedding.get_text_embedding_batch(TEXTS)
    short = GemEmbedding(gem=shared_gem, truncate_dim=8, normalize_embeddings=True, embed_batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(short.get_text_embedding_batch(TEXTS), axis=1), 1.0, atol=1e-5)


def test_chat_and_complete_are_the_models(shared_gem: GemModel, llm: GemLLM) -> None:
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "who are you?"},
    ]
    messages = [
        ChatMessage(role="developer", content="Be brief."),
        ChatMessage(role="user", blocks=[TextBlock(text="hel"), TextBlock(text="lo")]),
        ChatMessage(role="model", content="yes?"),
        ChatMessage("who are you?"),
    ]
    expected = shared_gem.chat(plain, **GREEDY)
    answer = llm.chat(messages)
    assert answer.message.content == expected
    prompt = shared_gem.prefill_chat(plain).ids_BT.shape[1]
    usage = {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert answer.raw == {"finish_reason": "length", "usage": usage}
    steps = list(llm.stream_chat(messages))
    assert "".join(s.delta or "" for s in steps) == steps[-1].message.content == expected
    assert steps[-1].raw == answer.raw
    assert len(steps) > 2
    assert asyncio.run(llm.achat(messages)).message.content == expected

    expected = shared_gem.generate("once upon", **GREEDY)
    assert llm.complete("once upon").text == expected
    done = list(llm.stream_complete("once upon"))
    assert "".join(s.delta or "" for s in done) == done[-1].text == expected
    wrapped = GemLLM(gem=shared_gem, temperature=0, max_tokens=12, completion_to_prompt=lambda p: f"once {p}")
    assert wrapped.complete("upon").text == expected
    assert wrapped.complete("once upon", formatted=True).text == expected


def test_llama_indexs_counter_counts_the_models_tokens(llm: GemLLM) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    llm.callback_manager = CallbackManager([counter])
    answer = llm.chat([ChatMessage("hello")])
    list(llm.stream_complete("hello"))
    assert counter.completion_llm_token_count == 24
    assert counter.prompt_llm_token_count == answer.raw["usage"]["prompt_tokens"] + 5


def test_settings_of_a_call(shared_gem: GemModel, llm: GemLLM) -> None:
    warm = GemLLM(gem=shared_gem, temperature=1.5, top_p=0.9, max_tokens=12, seed=3)
    first = warm.complete("hello").text
    assert first == warm.complete("hello").text == list(warm.stream_complete("hello"))[-1].text
    assert first != warm.complete("hello", seed=4).text
    greedy = shared_gem.generate("hello", max_new_tokens=6, do_sample=False)
    assert warm.complete("hello", temperature=0, max_tokens=6).text == greedy
    stop = greedy[2:4]
    stopped = llm.complete("hello", stop=[stop])
    assert stopped.text == greedy[: greedy.find(stop)]
    assert stopped.raw["finish_reason"] == "stop"
    with pytest.raises(ValueError, match="nonsense"):
        llm.complete("hello", nonsense=1)


def test_a_base_without_chat_template_gets_a_transcript(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir))
    gem.tokenizer.chat_template = None
    llm = GemLLM(gem=gem, temperature=0, max_tokens=12)
    assert not llm.metadata.is_chat_model
    expected = gem.generate("user: hello\nassistant: ", **GREEDY)
    assert llm.chat([ChatMessage("hello")]).message.content == expected
    assert list(llm.stream_chat([ChatMessage("hello")]))[-1].message.content == expected


def test_messages_it_cannot_read(llm: GemLLM) -> None:
    with pytest.raises(ValueError, match="got 'tool'"):
        llm.chat([ChatMessage(role=MessageRole.TOOL, content="4")])
    with pytest.raises(ValueError, match="reads text only, the user message has a block of type 'image'"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://x/y.png")])])


def test_nothing_dumps_or_copies_the_model(shared_gem: GemModel, llm: GemLLM) -> None:
    embedding = GemEmbedding(gem=shared_gem)
    for made in (llm, embedding):
        assert "gem" not in made.to_dict()
        assert "gem=" not in repr(made)
        assert len(made.to_json()) < 2000
        assert type(made).from_dict(made.to_dict(), gem=shared_gem).to_dict() == made.to_dict()
        assert "gem" not in type(made).model_json_schema()["properties"]
        for twin in (copy.deepcopy(made), copy.copy(made), made.model_copy()):
            assert twin.gem is shared_gem
        with pytest.raises(ValueError, match=f"{type(made).__name__} holds a loaded model and cannot be pickled"):
            pickle.dumps(made)


@pytest.mark.usefixtures("counted_in_its_tokens")
def test_an_index_and_a_query_engine(shared_gem: GemModel, llm: GemLLM) -> None:
    embedding = GemEmbedding(gem=shared_gem)
    index = VectorStoreIndex.from_documents([Document(text=t) for t in TEXTS], embed_model=embedding)
    template = PromptTemplate("{context_str}\n{query_str}")
    vectors = shared_gem.encode(["query: boat", *TEXTS])
    nearest = TEXTS[int(shared_gem.similarity(vectors[:1], vectors[1:]).argmax())]
    expected = shared_gem.chat([{"role": "user", "content": f"{nearest}\nboat"}], **GREEDY)
    plain, streaming = (
        index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=template, streaming=s)
        for s in (False, True)
    )
    answer = plain.query("boat")
    assert answer.source_nodes[0].text == nearest
    assert str(answer) == expected
    assert "".join(streaming.query("boat").response_gen) == expected


def test_a_pipeline_with_its_cache(shared_gem: GemModel) -> None:
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), GemEmbedding(gem=shared_gem)])
    first, second = (pipeline.run(documents=[Document(text=t, id_=t) for t in TEXTS]) for _ in range(2))
    assert np.array_equal(np.float32([n.embedding for n in first]), shared_gem.encode(TEXTS))
    assert [n.embedding for n in second] == [n.embedding for n in first]


def test_four_threads_on_one_model(shared_gem: GemModel) -> None:
    """Texts that spell the special token among them: they flip a switch of the shared tokenizer."""
    embedding, llm = GemEmbedding(gem=shared_gem), GemLLM(gem=shared_gem, temperature=1.0, max_tokens=8)
    name = shared_gem.config.special_tokens[0]
    texts = [f"text {i} {name if i % 2 else ''}" for i in range(12)]

    def both(i: int) -> Any:
        answer = llm.chat([ChatMessage(texts[i])], seed=i).message.content
        streamed = list(llm.stream_complete(texts[i], seed=i))[-1].text
        return (
            embedding.get_text_embedding_batch(texts[i : i + 3]),
            embedding.get_query_embedding(texts[i]),
            answer,
            streamed,
        )

    alone = [both(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(12))) == alone


@pytest.mark.real
def test_the_starter_finds_and_answers(shipped: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_tokenizer", None)
    Settings.tokenizer = shipped.tokenizer.encode
    texts = ["Zelda keeps bees behind the old mill.", "The museum opens at noon on Sundays.", "Copper conducts heat."]
    index = VectorStoreIndex.from_documents([Document(text=t) for t in texts], embed_model=GemEmbedding(gem=shipped))
    engine = index.as_query_engine(llm=GemLLM(gem=shipped, temperature=0, max_tokens=30), similarity_top_k=1)
    answer = engine.query("When does the museum open?")
    assert answer.source_nodes[0].text == texts[1]
    assert "noon" in str(answer)


@pytest.mark.parametrize("method", ["achat", "acomplete", "astream_chat", "astream_complete", "aget_text_embedding"])
def test_the_event_loop_is_free_while_an_answer_is_made(shared_gem: GemModel, llm: GemLLM, method: str) -> None:
    """The model is lent to another thread until the event loop has run something else."""
    lent, free = threading.Event(), threading.Event()
    in_time = []

    def borrow() -> None:
        with shared_gem.lock:
            lent.set()
            in_time.append(free.wait(30))

    async def ask() -> Any:
        asked = asyncio.create_task(answer())
        await asyncio.sleep(0.01)  # the answer has begun, and waits for the model
        free.set()
        return await asked

    async def answer() -> Any:
        if method == "aget_text_embedding":
            return await GemEmbedding(gem=shared_gem).aget_text_embedding("cat")
        given = [ChatMessage(role="user", content="hi")] if "chat" in method else "the cat"
        got = await getattr(llm, method)(given)
        return [piece async for piece in got][-1] if "stream" in method else got

    other = threading.Thread(target=borrow)
    other.start()
    lent.wait()
    got = asyncio.run(ask())
    other.join()
    assert in_time == [True], "the event loop stood still"
    if "chat" in method:
        assert got.message.content == llm.chat([ChatMessage(role="user", content="hi")]).message.content
    elif "complete" in method:
        assert got.text == llm.complete("the cat").text


def test_an_asynchronous_stream_that_is_dropped_ends(shared_gem: GemModel) -> None:
    async def take_one() -> None:
        llm = GemLLM(gem=shared_gem, temperature=0, max_tokens=400)
        pieces = await llm.astream_complete("the cat")
        async for _ in pieces:
            break
        await pieces.aclose()

    asyncio.run(take_one())
    assert shared_gem.lock.acquire(timeout=30), "the stream still holds the model"
    shared_gem.lock.release()
