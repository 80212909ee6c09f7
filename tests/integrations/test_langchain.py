"""LangChain's own stores, chains and standard tests over one GEM."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from gemify import GemModel
from gemify.integrations.langchain import ChatGem, GemEmbeddings, GemRetriever
from tiny_gems import make_gem, store_of

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the cat sat on the mat", "a boat on the river", "", "seven small stones", "the cat sat on the mat"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir, prompts={"query": "query: "})


@pytest.fixture
def chat(shared_gem: GemModel) -> ChatGem:
    return ChatGem(gem=shared_gem, temperature=0, max_tokens=12)


def test_a_retriever_finds_what_the_index_does(shared_gem: GemModel, tmp_path: Path) -> None:
    index = store_of(shared_gem, tmp_path)
    retriever = GemRetriever(index=index, k=2)
    found = retriever.invoke("cat mat")
    assert [(d.id, d.page_content) for d in found] == [(p.id, p.text) for p in index.search("cat mat", k=2)]
    assert found[0].metadata["kind"] == "md"
    assert Path(found[0].metadata["file"]).is_file()
    of_a_year = asyncio.run(retriever.ainvoke("cat mat", filter="year = 2025", k=9))
    assert {d.metadata["year"] for d in of_a_year} == {2025.0}
    assert GemRetriever(index=index, filter="year < 0").invoke("cat") == []
    assert "GemIndex" not in repr(retriever)
    assert copy.deepcopy(retriever).index is index


def test_embeddings_are_the_models_to_the_bit(shared_gem: GemModel) -> None:
    embeddings = GemEmbeddings(gem=shared_gem)
    assert np.array_equal(np.float32(embeddings.embed_documents(TEXTS)), shared_gem.encode(TEXTS))
    assert np.array_equal(np.float32(embeddings.embed_query("cat")), shared_gem.encode(["query: cat"])[0])
    assert embeddings.embed_documents([]) == []
    assert asyncio.run(embeddings.aembed_query("cat")) == embeddings.embed_query("cat")
    short = GemEmbeddings(gem=shared_gem, truncate_dim=8, normalize_embeddings=True, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(short.embed_documents(TEXTS), axis=1), 1.0, atol=1e-5)
    with pytest.raises(ValueError, match="extra_forbidden"):
        GemEmbeddings(gem=shared_gem, normalise=True)


def test_answers_are_the_models(shared_gem: GemModel, chat: ChatGem) -> None:
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "who are you?"},
    ]
    expected = shared_gem.chat(plain, **GREEDY)
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "hel"}, "lo"]),
        AIMessage("yes?"),
        ChatMessage(role="user", content="who are you?"),
    ]
    answer = chat.invoke(messages)
    assert answer.content == expected
    assert answer.response_metadata["model_name"] == shared_gem.config.base
    assert answer.response_metadata["finish_reason"] == "length"
    prompt = shared_gem.prefill_chat(plain).ids_BT.shape[1]
    assert answer.usage_metadata == {"input_tokens": prompt, "output_tokens": 12, "total_tokens": prompt + 12}
    chunks = list(chat.stream(messages))
    assert len(chunks) > 2
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == expected
    assert whole.usage_metadata == answer.usage_metadata
    assert whole.response_metadata["finish_reason"] == "length"
    assert asyncio.run(chat.ainvoke(messages)).content == expected


def test_settings_of_a_call(shared_gem: GemModel) -> None:
    chat = ChatGem(gem=shared_gem, temperature=1.5, top_p=0.9, max_tokens=12, seed=3)
    first = chat.invoke("hello").content
    assert first == chat.invoke("hello").content == "".join(str(c.content) for c in chat.stream("hello"))
    assert first != chat.invoke("hello", seed=4).content
    greedy = shared_gem.chat([{"role": "user", "content": "hello"}], max_new_tokens=6, do_sample=False)
    assert chat.bind(temperature=0, max_tokens=6).invoke("hello").content == greedy
    stop = greedy[2:4]
    until = greedy[: greedy.find(stop)]
    cold = ChatGem(gem=shared_gem, temperature=0, max_tokens=6)
    stopped = cold.invoke("hello", stop=[stop])
    assert stopped.content == until
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert "".join(str(c.content) for c in cold.stream("hello", stop=[stop])) == until
    assert ChatGem(gem=shared_gem, temperature=0, max_tokens=6, stop=[stop]).invoke("hello").content == until
    by_name = cold.configurable_fields(max_tokens=ConfigurableField(id="length"))
    assert by_name.with_config(configurable={"length": 2}).invoke("hello").content == greedy[:2]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])],
            "reads text only.*block of type 'image_url'",
        ),
        ([ToolMessage("4", tool_call_id="1")], "got 'tool'"),
        ([AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "1"}])], "calls tools"),
    ],
)
def test_messages_it_cannot_read(chat: ChatGem, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.invoke(messages)


def test_tools_and_structured_output_are_refused_with_what_helps(chat: ChatGem) -> None:
    for ask in (chat.bind_tools, chat.with_structured_output):
        with pytest.raises(NotImplementedError, match=r"run `gemify serve`, and langchain-openai's ChatOpenAI"):
            ask({"title": "pet", "description": "A pet.", "type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("setting", "message"), [({"temperature": -1}, "at least 0"), ({"top_p": 0}, "top_p must lie")]
)
def test_settings_out_of_range(chat: ChatGem, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.invoke("hello", **setting)
    with pytest.raises(ValueError, match="nonsense"):
        chat.invoke("hello", nonsense=1)


def test_nothing_dumps_or_copies_the_model(shared_gem: GemModel, chat: ChatGem) -> None:
    embeddings = GemEmbeddings(gem=shared_gem)
    for made in (chat, embeddings):
        assert "gem" not in made.model_dump()
        assert "gem=" not in repr(made)
        assert len(dumps(made)) < 2000
        for twin in (copy.deepcopy(made), copy.copy(made), made.model_copy()):
            assert twin.gem is shared_gem
        with pytest.raises(ValueError, match=f"{type(made).__name__} holds a loaded model and cannot be pickled"):
            pickle.dumps(made)
    json.dumps(chat.asdict() if hasattr(chat, "asdict") else chat.dict())  # the old name is deprecated


def test_a_cache_tells_settings_apart(shared_gem: GemModel) -> None:
    cache = InMemoryCache()
    long, short = (ChatGem(gem=shared_gem, temperature=0, max_tokens=n, cache=cache) for n in (6, 3))
    assert str(long.invoke("hello").content).startswith(str(short.invoke("hello").content))
    assert long.invoke("hello").content != short.invoke("hello").content
    assert long.invoke("hello").content == long.invoke("hello").content


def test_tokens_are_counted_in_the_models_own(chat: ChatGem) -> None:
    assert chat.get_num_tokens("hello") == 5
    kept = trim_messages([HumanMessage("x" * 50), HumanMessage("hello")], max_tokens=30, token_counter=chat)
    assert [m.content for m in kept] == ["hello"]


def test_a_store_and_a_chain(shared_gem: GemModel, chat: ChatGem) -> None:
    store = InMemoryVectorStore(GemEmbeddings(gem=shared_gem))
    store.add_documents([Document(t, metadata={"at": i}) for i, t in enumerate(TEXTS[:4]) if t])
    prompt = ChatPromptTemplate.from_messages([("system", "Use: {context}"), ("human", "{question}")])
    retriever = store.as_retriever(search_kwargs={"k": 1})
    chain = (
        {"context": retriever | (lambda found: found[0].page_content), "question": RunnablePassthrough()}
        | prompt
        | chat
        | StrOutputParser()
    )
    vectors = shared_gem.encode(["query: boat", TEXTS[0], TEXTS[1], TEXTS[3]])
    nearest = [TEXTS[0], TEXTS[1], TEXTS[3]][int(shared_gem.similarity(vectors[:1], vectors[1:]).argmax())]
    expected = shared_gem.chat(
        [{"role": "system", "content": f"Use: {nearest}"}, {"role": "user", "content": "boat"}], **GREEDY
    )
    assert chain.invoke("boat") == expected
    assert "".join(chain.stream("boat")) == expected
    assert chain.batch(["boat"] * 4) == [expected] * 4


def test_four_threads_on_one_model(shared_gem: GemModel) -> None:
    """Texts that spell the special token among them: they flip a switch of the shared tokenizer."""
    embeddings = GemEmbeddings(gem=shared_gem)
    chat = ChatGem(gem=shared_gem, temperature=1.0, max_tokens=8)
    name = shared_gem.config.special_tokens[0]
    texts = [f"text {i} {name if i % 2 else ''}" for i in range(12)]

    def both(i: int) -> Any:
        vectors = embeddings.embed_documents(texts[i : i + 3])
        streamed = "".join(str(c.content) for c in chat.stream(texts[i], seed=i))
        return vectors, embeddings.embed_query(texts[i]), chat.invoke(texts[i], seed=i).content, streamed

    alone = [both(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(12))) == alone


@pytest.mark.real
def test_the_starter_finds_and_answers(shipped: GemModel) -> None:
    store = InMemoryVectorStore(GemEmbeddings(gem=shipped))
    store.add_texts(
        ["Zelda keeps bees behind the old mill.", "The museum opens at noon on Sundays.", "Copper conducts heat."]
    )
    prompt = ChatPromptTemplate.from_template("{context}\n\nAnswer in one short sentence: {question}")
    chain = (
        {
            "context": store.as_retriever(search_kwargs={"k": 1}) | (lambda found: found[0].page_content),
            "question": RunnablePassthrough(),
        }
        | prompt
        | ChatGem(gem=shipped, temperature=0, max_tokens=30)
        | StrOutputParser()
    )
    assert "noon" in chain.invoke("When does the museum open?")
