"""The official client gets what the library computes: every route of OpenAI's, whole and streamed."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI

from gemify import GemModel
from gemify.serving.auth import ANONYMOUS
from running_server import Served, serving, tiny_gem

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
TEXTS = ["a cat", "a longer text about a dog and a cat", "Ünïcödé 猫 🐈", "a cat"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    with serving(tiny_gem(tmp_path_factory.mktemp("model"))) as running:
        yield running


@pytest.fixture(scope="module")
def gem(served: Served) -> GemModel:
    return served.gem


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


def chat_ids(gem: GemModel, messages: list[Any]) -> list[int]:
    text = gem.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return gem.tokenizer(str(text), add_special_tokens=False)["input_ids"]


def written(gem: GemModel, prompt: str | list[Any], tokens: int) -> str:
    """The library's greedy answer."""
    prefill = gem.prefill(prompt) if isinstance(prompt, str) else gem.prefill_chat(prompt)
    return gem.generate(prefill, max_new_tokens=tokens, do_sample=False)


def normalize(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# CreateEmbeddingResponse


def test_embeddings_are_the_librarys(client: OpenAI, gem: GemModel) -> None:
    got = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    vectors = np.array([d.embedding for d in got.data])
    np.testing.assert_allclose(vectors, normalize(gem.encode(TEXTS)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert [d.index for d in got.data] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, gem.tokenizer(TEXTS)["input_ids"]))
    single = client.embeddings.create(model="tiny", input=TEXTS[1], encoding_format="float")
    np.testing.assert_allclose(single.data[0].embedding, vectors[1], atol=1e-5)


def test_base64_is_the_same_numbers(served: Served) -> None:
    as_floats = served.post("/v1/embeddings", {"input": TEXTS, "encoding_format": "float"}).json()
    as_base64 = served.post("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}).json()
    for a, b in zip(as_floats["data"], as_base64["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(b["embedding"]), dtype="<f4")
        assert np.array_equal(decoded, np.array(a["embedding"], dtype=np.float32))
    plain = served.post("/v1/embeddings", {"input": TEXTS}).json()
    assert plain == as_floats


def test_token_ids_are_texts(client: OpenAI, gem: GemModel) -> None:
    rows = gem.text_tokenizer(TEXTS, max_tokens=None)
    by_ids = client.embeddings.create(model="tiny", input=rows)
    by_text = client.embeddings.create(model="tiny", input=TEXTS)
    one = client.embeddings.create(model="tiny", input=rows[1])
    for a, b in zip(by_ids.data, by_text.data, strict=True):
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-6)
    np.testing.assert_allclose(one.data[0].embedding, by_text.data[1].embedding, atol=1e-6)
    assert by_ids.usage == by_text.usage


def test_dimensions_cut_and_scale(client: OpenAI, gem: GemModel) -> None:
    got = client.embeddings.create(model="tiny", input=TEXTS, dimensions=8)
    np.testing.assert_allclose([d.embedding for d in got.data], normalize(gem.encode(TEXTS)[:, :8]), atol=1e-5)
    with pytest.raises(openai.BadRequestError, match=r"dimensions must lie in 1\.\.32, got 33"):
        client.embeddings.create(model="tiny", input="a", dimensions=33)


def test_a_special_tokens_name_is_text(client: OpenAI, gem: GemModel) -> None:
    text = f"before {gem.config.special_tokens[0]} after"
    got = client.embeddings.create(model="tiny", input=text, encoding_format="float")
    np.testing.assert_allclose(got.data[0].embedding, normalize(gem.encode(text)), atol=1e-5)
    spelled = len(gem.tokenizer(text, split_special_tokens=True)["input_ids"])
    assert got.usage.prompt_tokens == spelled > len(gem.tokenizer(text)["input_ids"])
    asked = [{"role": "user", "content": text}]
    chat = client.chat.completions.create(model="tiny", messages=asked, max_tokens=1)  # type: ignore[arg-type]
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(chat_ids(gem, [{"role": "user", "content": "x"}])) - 1 + spelled


# Chat


def test_greedy_chat_is_the_librarys(client: OpenAI, gem: GemModel) -> None:
    got = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, temperature=0)
    assert got.choices[0].message.content == written(gem, CHAT, 12)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(chat_ids(gem, CHAT)), 12)
    assert got.usage.total_tokens == got.usage.prompt_tokens + 12


def test_content_in_parts_and_other_words(client: OpenAI) -> None:
    params: Any = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    plain = client.chat.completions.create(messages=CHAT, **params)
    said = client.chat.completions.create(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "ann"}],  # type: ignore[list-item,misc]
        user="ann",
        **params,
    )
    assert said.choices[0].message.content == plain.choices[0].message.content
    newer = client.chat.completions.create(messages=CHAT, **params | {"max_completion_tokens": 3})
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "n": 2},
        {"temperature": 1.2, "top_p": 0.9, "seed": 5, "n": 3},
        {"temperature": 1, "seed": 7, "frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    ],
)
def test_a_stream_is_the_whole_in_pieces(client: OpenAI, options: dict[str, Any]) -> None:
    params: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 10, **options}
    whole = client.chat.completions.create(**params)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    logprobs: list[Any] = []
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **params):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
            logprobs += choice.logprobs.content or [] if choice.logprobs else []
        usage = chunk.usage
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    if "logprobs" in options:
        assert whole.choices[0].logprobs is not None
        assert logprobs == whole.choices[0].logprobs.content


def test_the_stream_as_it_goes_over_the_wire(served: Served) -> None:
    body = {"messages": CHAT, "max_tokens": 3, "temperature": 0, "stream": True}
    with served.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"
    assert not any('"usage"' in line for line in lines)


def test_stop_strings_end_an_answer(client: OpenAI, gem: GemModel) -> None:
    whole = written(gem, CHAT, 24)
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    assert middle.strip()
    for stop in (middle, ["never to be seen", middle]):
        params: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 24, "temperature": 0, "stop": stop}
        got = client.chat.completions.create(**params).choices[0]
        assert (got.message.content, got.finish_reason) == (whole[: whole.index(middle)], "stop")
        streamed = "".join(
            c.choices[0].delta.content or "" for c in client.chat.completions.create(stream=True, **params)
        )
        assert streamed == got.message.content


def test_logprobs_are_the_models(client: OpenAI, gem: GemModel) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=20
    )
    assert got.choices[0].logprobs is not None
    content = got.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    with torch.no_grad():
        logits_V = gem.lm(torch.tensor([chat_ids(gem, CHAT)])).logits[0, -1]
    logits_V[gem.special_ids] = -torch.inf  # never written
    expected = torch.log_softmax(logits_V.float(), -1)
    assert content[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    np.testing.assert_allclose(
        [t.logprob for t in content[0].top_logprobs], expected.topk(20).values.numpy(), atol=1e-4
    )
    for token in content:
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1 + 1e-6
        assert token.logprob == max(t.logprob for t in token.top_logprobs)
        assert token.bytes is not None
    said = b"".join(bytes(t.bytes or []) for t in content)
    assert said.decode(errors="replace") == got.choices[0].message.content


def test_seeds_repeat_and_answers_differ(client: OpenAI) -> None:
    def ask(**options: Any) -> list[str | None]:
        got = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, **options)
        assert [c.index for c in got.choices] == list(range(options.get("n", 1)))
        return [c.message.content for c in got.choices]

    assert ask(seed=3, n=4) == ask(seed=3, n=4)
    assert len(set(ask(seed=3, n=4))) == 4
    assert ask(seed=3) != ask(seed=4)
    assert ask(seed=3)[0] == ask(seed=3, n=4)[0]
    assert len(set(ask(temperature=0, n=2))) == 1


def test_logit_bias_forces_a_token(client: OpenAI, gem: GemModel) -> None:
    wanted = gem.tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    got = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=5, logit_bias={str(wanted): 100})
    assert got.choices[0].message.content == "QQQQQ"


def test_the_prompts_embedding_comes_with_the_answer(client: OpenAI, gem: GemModel) -> None:
    expected = normalize(gem.embed(gem.prefill_chat(CHAT)).numpy())
    params: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0}
    extra = {"gemify": {"return_embedding": True}}
    got: Any = client.chat.completions.create(extra_body=extra, **params)
    np.testing.assert_allclose(got.gemify["embedding"], expected, atol=1e-5)
    assert got.choices[0].message.content == written(gem, CHAT, 6)
    chunks: list[Any] = list(client.chat.completions.create(stream=True, extra_body=extra, **params))
    np.testing.assert_allclose(chunks[0].gemify["embedding"], expected, atol=1e-5)
    assert not any(hasattr(chunk, "gemify") for chunk in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == written(gem, CHAT, 6)


# CreateCompletionResponse


def test_completions_are_the_librarys(client: OpenAI, gem: GemModel) -> None:
    prompts = ["Once upon", "a time"]
    got = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, temperature=0)
    assert [c.text for c in got.choices] == [written(gem, p, 9) for p in prompts]
    rows = gem.tokenizer(prompts)["input_ids"]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (sum(map(len, rows)), 18)
    by_ids = client.completions.create(model="tiny", prompt=rows, max_tokens=9, temperature=0)
    assert [c.text for c in by_ids.choices] == [c.text for c in got.choices]
    one = client.completions.create(model="tiny", prompt=rows[1], max_tokens=9, temperature=0)
    assert one.choices[0].text == got.choices[1].text
    assert len(client.completions.create(model="tiny", prompt="x", temperature=0).choices[0].text) <= 16


def test_completions_streamed_with_logprobs(client: OpenAI) -> None:
    params: Any = {"model": "tiny", "prompt": ["one", "two"], "n": 2, "max_tokens": 6, "seed": 1, "logprobs": 2}
    whole = client.completions.create(**params)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(stream=True, **params):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.logprobs is not None
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert len(choice.logprobs.tokens or []) == 6
        assert choice.logprobs.top_logprobs is not None
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    bare = client.completions.create(model="tiny", prompt="one", max_tokens=2, logprobs=0, temperature=0)
    assert bare.choices[0].logprobs is not None
    assert bare.choices[0].logprobs.top_logprobs == [{}, {}]


# Models, and all at once


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gemify"
    for ask in (
        lambda: client.models.retrieve("gpt-5/large"),
        lambda: client.embeddings.create(model="gpt-5", input="a"),
        lambda: client.chat.completions.create(model="gpt-5", messages=CHAT),
    ):
        with pytest.raises(openai.NotFoundError, match="the model 'gpt-5") as raised:
            ask()
        assert raised.value.code == "model_not_found"


async def test_both_jobs_at_once(served: Served, gem: GemModel) -> None:
    client = served.async_client()
    texts = [f"text number {i} " + "word " * (i % 7) for i in range(24)]
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(12)]

    async def streamed(messages: list[Any]) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=10, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    answers, vectors = await asyncio.gather(
        asyncio.gather(*map(streamed, chats)),
        asyncio.gather(*(client.embeddings.create(model="tiny", input=t) for t in texts)),
    )
    assert answers == [written(gem, messages, 10) for messages in chats]
    np.testing.assert_allclose([v.data[0].embedding for v in vectors], normalize(gem.encode(texts)), atol=1e-5)
    await client.close()


def test_recovery_is_the_librarys(served: Served, gem: GemModel) -> None:
    got = served.post("/v1/recover", {"input": "hello there", "max_tokens": 12}).json()
    assert got["output"] == gem.recover("hello there", max_new_tokens=12)
    assert got["input_tokens"] == len(gem.tokenizer("hello there", add_special_tokens=False)["input_ids"])
    assert 0 <= got["matching_tokens"] <= min(got["input_tokens"], got["output_tokens"])


HISTOGRAMS = (
    "gemify_time_to_first_token_seconds",
    "gemify_time_per_output_token_seconds",
    "gemify_request_queue_seconds",
    'gemify_http_request_seconds{route="/v1/completions"}',
)


def test_what_a_key_used_and_what_answers_took_is_counted(served: Served) -> None:
    def counted() -> dict[str, float]:
        lines = served.http().get("/metrics").text.splitlines()
        found = (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        return {re.sub(r"(_sum|_count)({.*})$", r"\2\1", name): float(value) for name, value in found}

    before = counted()
    body = {"prompt": "ab", "max_tokens": 4, "temperature": 0, "logit_bias": {"40": 100}}
    usage = served.post("/v1/completions", body).json()["usage"]
    after = counted()
    name = ANONYMOUS
    tokens = f'gemify_key_tokens_total{{key="{name}"}}'
    assert after[tokens] - before.get(tokens, 0) == usage["total_tokens"]
    requests = f'gemify_key_requests_total{{key="{name}",status="200"}}'
    assert after[requests] > before.get(requests, 0)
    took = {name: after[f"{name}_sum"] - before[f"{name}_sum"] for name in HISTOGRAMS}
    assert all(after[f"{name}_count"] == before[f"{name}_count"] + 1 for name in HISTOGRAMS)
    first, token, queue, whole = took.values()
    assert 0 < queue < first < first + 3 * token < whole
    served.post("/v1/completions", {**body, "prompt": ["ab", "cd"], "n": 2})
    served.post("/v1/completions", {**body, "max_tokens": 0, "echo": True, "logprobs": 1})
    more = counted()
    counts = [more[f"{name}_count"] - after[f"{name}_count"] for name in HISTOGRAMS]
    assert counts == [2, 4, 3, 2], "a first token a request, an answer's tokens, a prompt's wait, a request"


def test_the_grafana_board_asks_for_metrics_that_exist(served: Served) -> None:
    served.post("/v1/embeddings", {"input": "a"})  # counters of keys and routes appear with their first request
    board = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text())
    asked = {name for p in board["panels"] for t in p["targets"] for name in re.findall(r"gemify_\w+", t["expr"])}
    there = set(re.findall(r"^(gemify_\w+)", served.http().get("/metrics").text, re.MULTILINE))
    assert asked
    assert asked <= there


def test_stats_metrics_and_health(served: Served) -> None:
    before = served.http().get("/v1/stats").json()
    served.post("/v1/embeddings", {"input": ["a", "b"]})
    served.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "temperature": 0, "logit_bias": {"40": 100}})
    served.wait_until(lambda: served.engine.stats().generation_tokens >= before["generation_tokens"] + 3)
    after = served.http().get("/v1/stats").json()
    assert after["embedded_texts"] == before["embedded_texts"] + 2
    assert (after["model"], after["dimensions"], after["has_index"], after["ready"]) == ("tiny", 32, False, True)
    lines = served.http().get("/metrics").text.splitlines()
    assert f"gemify_engine_embedded_texts_total {float(after['embedded_texts'])}" in lines
    assert any(
        line.startswith('gemify_http_requests_total{method="POST",route="/v1/embeddings",status="200"}')
        for line in lines
    )
    assert "gemify_http_requests_in_flight 1.0" in lines  # this one
    assert served.http().get("/health").json() == {"status": "ok"}
    assert served.http().get("/ready").json() == {"status": "ready"}
