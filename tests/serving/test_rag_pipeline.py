"""Answers from the index are `gemify ask`'s token for token, and no token of a question is run twice for them."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import pytest

from gemify import GemModel, GemRag, RagSettings
from gemify.engine.engine import Engine
from gemify.engine.requests import Done, Event, PromptStart, TokenDelta
from gemify.engine.sampling import SamplingParams
from gemify.model.kv_cache import CachedText
from gemify.retrieval.index import GemIndex
from gemify.serving.rag import EngineRunner
from running_server import Served, indexed, serving

CORPUS = {
    "birds.md": "# Birds\n\nOwls hunt at night.\n\n# Bees\n\nBees dance.\n",
    "sea.txt": "Tides follow the moon.\n",
    "stone.txt": "Granite is old and hard.\n",
}
QUESTION = "when do owls hunt?"
FIRST = RagSettings(passages=2, max_new_tokens=10)
LAST = replace(FIRST, order="passages-first")
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemIndex:
    return indexed(tmp_path_factory.mktemp("rag"), CORPUS, tokens=48)


@pytest.fixture(scope="module")
def gem(index: GemIndex) -> GemModel:
    assert isinstance(index.model, GemModel)
    return index.model


@pytest.fixture(scope="module")
def served(gem: GemModel, index: GemIndex) -> Iterator[Served]:
    with serving(gem, index=index, keys={name: f"secret-of-{name}" for name in ("ann", "bob", "cid")}) as running:
        yield running


@pytest.fixture(scope="module")
def keeping(gem: GemModel, index: GemIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    kept = tmp_path_factory.mktemp("kv")
    with serving(gem, index=index, keep_kv=True, kv_bits=32, kv_store=kept / "kv") as running:
        yield running


def body(question: str, *, k: int = 2, mode: str = "hybrid", history: Any = (), **options: Any) -> dict[str, Any]:
    messages = [*history, {"role": "user", "content": question}]
    return {
        "messages": messages,
        "max_tokens": 10,
        "temperature": 0,
        "gemify": {"search": {"k": k, "mode": mode}},
    } | options


def chat(served: Served, key: str = "ann", **asked: Any) -> Any:
    got = served.post("/v1/chat/completions", body(**asked), authorization=f"Bearer secret-of-{key}")
    assert got.status_code == 200, got.text
    return got.json()


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


@contextmanager
def tokens_run(gem: GemModel) -> Iterator[list[int]]:
    """Ids that go through the model's layers, in order, without padding."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        ids_BT = kwargs["input_ids"]
        mask_BT = kwargs["attention_mask"][:, -ids_BT.shape[1] :] if kwargs.get("attention_mask") is not None else 1
        seen.extend(ids_BT[(ids_BT * 0 + mask_BT).bool()].tolist())

    hook = gem.lm.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("max_tokens", [1, 10])
@pytest.mark.parametrize("stream", [False, True])
def test_a_question_is_run_once(served: Served, gem: GemModel, max_tokens: int, stream: bool) -> None:
    question = f"{max_tokens} {stream} {'Z' * 7} owls?"
    letter = gem.tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    asked = body(question, max_tokens=max_tokens, logprobs=True)
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    with tokens_run(gem) as run:
        got = served.post("/v1/chat/completions", asked, authorization="Bearer secret-of-ann")
    assert got.status_code == 200, got.text
    usage = got.json()["usage"] if not stream else json.loads(got.text.split("data: ")[-2])["usage"]
    prompt, cached, answer = (
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
    )
    assert len(run) == prompt - cached + gem.config.k + answer - 1  # the last token is not run
    assert run[: prompt - cached].count(letter) == 7
    assert cached < prompt - len(question), "the question itself is new"
    library = GemRag(
        gem, served.app.state.gemify.require_store(None).index, settings=replace(FIRST, max_new_tokens=max_tokens)
    )
    conversation = library.conversation()
    assert prompt == len(conversation.prepare(question).ids)


@pytest.mark.parametrize("mode", ["vector", "fts", "hybrid"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("history", [(), HISTORY, HISTORY[1:]])
@pytest.mark.parametrize("kept", [False, True])
def test_answers_are_the_librarys(
    served: Served, keeping: Served, gem: GemModel, index: GemIndex, mode: str, k: int, history: Any, kept: bool
) -> None:
    server, settings = (keeping, LAST) if kept else (served, FIRST)
    library = GemRag(gem, index, settings=replace(settings, passages=k, mode=mode))
    for question in (QUESTION, "what is old?"):
        expected = library.conversation(history).ask(question)
        for _ in range(2):
            got = chat(server, question=question, k=k, mode=mode, history=history)
            assert text_of(got) == expected.text
            assert [s["id"] for s in got["gemify"]["sources"]] == [p.id for p in expected.passages]
        streamed = served.client("secret-of-ann") if not kept else keeping.client()
        asked = body(question, k=k, mode=mode, history=history)
        chunks = streamed.chat.completions.create(
            model="tiny", stream=True, extra_body={"gemify": asked.pop("gemify")}, **asked
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text


def test_a_kept_passage_is_not_run_again(keeping: Served, gem: GemModel, index: GemIndex) -> None:
    store: Path = keeping.settings.kv_store  # type: ignore[assignment]
    question = "are tides kept?"
    (passage,) = GemRag(gem, index, settings=replace(LAST, passages=1)).ask(question).passages
    chat(keeping, question="are tides kept then?", k=1)
    files = set(store.iterdir())
    with tokens_run(gem) as run:
        got = chat(keeping, question=question, k=1, max_tokens=1)
    assert set(store.iterdir()) == files, "it was kept before"
    usage = got["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > len(passage.text)
    assert len(run) == usage["prompt_tokens"] - cached + len(question) + gem.config.k  # the question's own vector


def test_several_clients_at_a_time(served: Served, keeping: Served, gem: GemModel, index: GemIndex) -> None:
    questions = [f"{word} {i}?" for i in range(4) for word in ("owls", "bees", "tides", "granite")]
    for server, settings in ((served, FIRST), (keeping, LAST)):
        library = GemRag(gem, index, settings=settings)
        expected = [library.ask(question).text for question in questions]
        with ThreadPoolExecutor(len(questions)) as threads:
            got = list(threads.map(lambda question: chat(server, question=question), questions))  # noqa: B023
        assert [text_of(answer) for answer in got] == expected
        assert [a["usage"]["prompt_tokens"] for a in got] == [
            len(library.conversation().prepare(question).ids) for question in questions
        ]


def test_several_answers_and_the_embedding_of_one_prompt(served: Served, gem: GemModel, index: GemIndex) -> None:
    expected = GemRag(gem, index, settings=FIRST).ask(QUESTION)
    asked = body(QUESTION, n=3)
    asked["gemify"]["return_embedding"] = True
    got = served.post("/v1/chat/completions", asked, authorization="Bearer secret-of-bob").json()
    assert [choice["message"]["content"] for choice in got["choices"]] == [expected.text] * 3
    ids = GemRag(gem, index, settings=FIRST).conversation().prepare(QUESTION).ids
    prompt = gem.tokenizer.decode(ids)
    vector = gem.embed(gem.prefill(prompt, add_special_tokens=False)).numpy()
    np.testing.assert_allclose(got["gemify"]["embedding"], vector / np.linalg.norm(vector), atol=1e-5)


def test_keys_share_no_prefix(served: Served) -> None:
    question = "what do bees do in the secret garden?"
    first, again, other = (chat(served, key=key, question=question) for key in ("bob", "bob", "cid"))
    cached = [got["usage"]["prompt_tokens_details"]["cached_tokens"] for got in (first, again, other)]
    assert cached[1] > cached[0]
    assert cached[2] == 0
    assert text_of(first) == text_of(other)


def test_tokens_are_charged_once(gem: GemModel, index: GemIndex) -> None:
    tokens = len(GemRag(gem, index, settings=FIRST).conversation().prepare(QUESTION).ids)
    with serving(gem, index=index, tokens_per_minute=tokens) as enough:
        assert enough.post("/v1/chat/completions", body(QUESTION)).status_code == 200
        assert enough.post("/v1/chat/completions", body(QUESTION)).status_code == 429


def test_what_cannot_be_asked(served: Served, gem: GemModel) -> None:
    for asked, words in (
        (body("why? " * 300), "this model takes 1024 in all"),
        (body("why?", max_tokens=1020), "this model takes 1024 in all"),
        (body("  "), "the last message, which must be the user's"),
    ):
        refused = served.post("/v1/chat/completions", asked, authorization="Bearer secret-of-ann")
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]


class Slow:
    """An index whose searches wait until they may go on."""

    def __init__(self, index: GemIndex) -> None:
        self.index, self.searching, self.go_on = index, threading.Event(), threading.Event()

    def search(self, *args: Any, **options: Any) -> Any:
        self.searching.set()
        assert self.go_on.wait(60)
        return self.index.search(*args, **options)


def held(engine: Engine) -> int:
    """Texts with KV that are alive, but for those of the prefix cache."""
    gc.collect()
    cached = {id(text) for _, text in engine.generation_worker.scheduler.prefix_cache._entries.values()}
    return sum(isinstance(thing, CachedText) and id(thing) not in cached for thing in gc.get_objects())


def idle(engine: Engine) -> bool:
    """Whether no generation request runs or waits."""
    stats = engine.stats()
    return stats.num_running_seqs == stats.num_waiting_seqs == 0


@pytest.mark.parametrize("when", ["searching", "answering"])
def test_a_client_that_leaves_frees_everything(gem: GemModel, index: GemIndex, when: str) -> None:
    slow = Slow(index)
    if when == "answering":
        slow.go_on.set()
    with serving(gem, index=slow) as running:
        before = held(running.engine)
        with (
            running.http() as client,
            client.stream("POST", "/v1/chat/completions", json=body(QUESTION, max_tokens=800, stream=True), timeout=60)
            if when == "answering"
            else leaving(running, slow),
        ):
            pass
        slow.go_on.set()
        # A client may leave before its question has begun: it is idle once nothing waits either.
        running.wait_until(lambda: idle(running.engine))
        running.wait_until(lambda: held(running.engine) <= before)
        assert chat(running, question="and now?")["choices"]


@contextmanager
def leaving(running: Served, slow: Slow) -> Iterator[None]:
    """Ask, and leave while the index is searched."""

    def ask() -> None:
        with pytest.raises(httpx.ReadTimeout), running.http() as client:
            client.post("/v1/chat/completions", json=body(QUESTION), timeout=1)

    thread = threading.Thread(target=ask)
    thread.start()
    assert slow.searching.wait(30)
    thread.join(30)
    yield


def test_a_request_that_takes_too_long_is_given_up(gem: GemModel, index: GemIndex) -> None:
    slow = Slow(index)
    with serving(gem, index=slow, timeout=0.5) as running:
        assert running.post("/v1/chat/completions", body(QUESTION)).status_code == 504
        slow.go_on.set()


@pytest.mark.parametrize(
    "settings",
    [FIRST, LAST, *(replace(s, context=context) for s in (FIRST, LAST) for context in ("concatenated", "special"))],
)
def test_every_context_runs_over_an_engine(gem: GemModel, index: GemIndex, settings: RagSettings) -> None:
    expected = GemRag(gem, index, settings=settings).ask(QUESTION)
    engine = Engine(gem)
    engine.start()
    try:
        runner = EngineRunner(
            engine,
            tokenize_query=lambda text: gem.text_tokenizer([text], max_tokens=None)[0],
            charge=lambda tokens: None,
            cache_salt="",
            is_exact=settings.context == "text",
        )
        prepared = GemRag(gem, index, settings=settings, runner=runner).conversation().prepare(QUESTION)
        start = PromptStart(prepared.start) if prepared.start.mask_BT.shape[1] else None
        events: SimpleQueue[Event] = SimpleQueue()
        engine.generate(prepared.ids, SamplingParams(max_tokens=10, temperature=0.0), events.put, start=start)
        text = ""
        while not isinstance(event := events.get(timeout=60), Done):
            text += event.text if isinstance(event, TokenDelta) else ""
        assert text == expected.text
        assert [p.text for p in prepared.passages] == [p.text for p in expected.passages]
    finally:
        engine.stop(timeout_s=0)
