"""Every refusal has OpenAI's form and status: what cannot be honoured, keys, limits, sizes, time, and no more room."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gemify.engine.requests import QueueFullError
from running_server import FAILURES, Served, serving, tiny_gem

ASK: list[Any] = [{"role": "user", "content": "hello"}]
CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    return tiny_gem(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(gem: Any) -> Iterator[Served]:
    with serving(gem, max_body_bytes=100_000, max_texts=10, max_prompts=4, body_timeout=1.0) as running:
        yield running


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The facts of an OpenAI error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    (facts,) = response.json().values()
    assert set(facts) == {"message", "type", "param", "code"}
    assert facts["message"]
    assert "\n" not in facts["message"]
    return facts


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {"messages": ASK, "functions": [{}]}, "functions", "use tools"),
        (CHAT, {"messages": ASK, "modalities": ["audio"]}, "modalities", "text"),
        (CHAT, {"messages": ASK, "audio": {"voice": "x"}}, "audio", "text"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "reads text only",
        ),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'system'"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": "hello"}, "messages", "list"),
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": ASK, "n": 17}, "n", "less than or equal to 16"),
        (CHAT, {"messages": ASK, "n": True}, "n", "integer"),
        (CHAT, {"messages": ASK, "max_tokens": "5"}, "max_tokens", "integer"),
        (CHAT, {"messages": ASK, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (CHAT, {"messages": ASK, "max_tokens": 5000}, None, "this model takes 1024 in all"),
        (CHAT, {"messages": ASK, "temperature": 2.5}, "temperature", "less than or equal to 2"),
        (CHAT, {"messages": ASK, "top_p": -0.1}, "top_p", "greater than or equal to 0"),
        (CHAT, {"messages": ASK, "stop": [""]}, "stop", "at least one character"),
        (CHAT, {"messages": ASK, "stop": ["x"] * 17}, "stop", "up to 16"),
        (CHAT, {"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        (CHAT, {"messages": ASK, "logit_bias": {"1": 101}}, "logit_bias", "-100..100"),
        (CHAT, {"messages": ASK, "logit_bias": {"999999": 1}}, None, "0..319"),
        (CHAT, {"messages": ASK, "top_logprobs": 3}, None, "needs logprobs"),
        (CHAT, {"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        (CHAT, {"messages": ASK, "stream_options": {"include_usage": True}}, None, "needs stream"),
        (CHAT, {"messages": ASK, "gemify": {"search": {}}}, None, "no index"),
        (CHAT, {"messages": ASK, "gemify": {"magic": 1}}, "gemify.magic", "not permitted"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "forwards"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, None, "at least 1 without echo"),
        (CHAT, {"messages": ASK, "echo": True}, "echo", "yourself"),
        (CHAT, {"messages": ASK, "stop_token_ids": [320]}, None, "0..319"),
        (CHAT, {"messages": ASK, "max_tokens": 2, "min_tokens": 3}, None, "min_tokens must lie in 0..2"),
        (TEXT, {"prompt": "a", "best_of": 3, "n": 2}, "best_of", "choose one"),
        (TEXT, {"prompt": ["a"] * 5}, "prompt", "at most 4 prompts"),
        (TEXT, {"prompt": []}, "prompt", "not empty"),
        (TEXT, {"prompt": ""}, None, "no tokens"),
        (TEXT, {"prompt": [320]}, None, "0..319"),
        (TEXT, {"prompt": [-1]}, "prompt", "at least 0"),
        (TEXT, {"prompt": [2**70]}, "prompt", "token id"),
        (TEXT, {"prompt": [1.0]}, "prompt", "token id"),
        (EMBED, {"input": None}, "input", "got null"),
        (EMBED, {"input": []}, "input", "not empty"),
        (EMBED, {"input": [[]]}, "input", "not empty"),
        (EMBED, {"input": ["a", 1]}, "input", "item 1 must be a string"),
        (EMBED, {"input": [[1], "a"]}, "input", "item 1 must be an array"),
        (EMBED, {"input": [[1, True]]}, "input", "item 1 must be a token id"),
        (EMBED, {"input": ["a"] * 11}, "input", "at most 10 texts"),
        (EMBED, {"input": [[999_999]]}, None, "0..319"),
        (EMBED, {"input": "word " * 200}, None, "embeds up to 511"),
        (EMBED, {"input": "word " * 10_000}, None, "cut it up"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 10_000}]}, None, "cut it up"),
        (EMBED, {"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        (EMBED, {"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        (EMBED, {"input": {"text": "a"}}, "input", "got an object"),
        ("/v1/recover", {"input": ""}, "input", "at least 1"),
        ("/v1/recover", {"input": "a", "max_tokens": 0}, "max_tokens", "greater"),
    ],
)
def test_what_cannot_be_done_is_said(served: Served, path: str, body: Any, param: str | None, words: str) -> None:
    facts = error(served.post(path, body), 404 if words == "no index" else 400)
    assert words in facts["message"]
    assert facts["param"] == param


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "stop": None,
        "parallel_tool_calls": True,
    }
    unknown = {"user": "ann", "metadata": {"a": 1}, "chat_template_kwargs": {}, "parallel_tool_calls": True}
    body = {"messages": ASK, "max_tokens": 2, "n": None, "seed": None, **harmless, **unknown}
    assert served.post(CHAT, body).status_code == 200
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 1, "suffix": None, "echo": False}).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"   \n", "empty"),
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"[]", "must be a JSON object, got an array"),
        (b'"text"', "must be a JSON object, got a string"),
        (b'{"input": NaN}', "NaN is no JSON number"),
        (b'{"input": "a", "dimensions": -Infinity}', "-Infinity is no JSON number"),
        (b'{"input": "a", "input": "b"}', "'input' occurs twice"),
        (b'{"input": "\\ud800"}', "lone surrogate"),
        (b'{"input": ["a", "\\udfffb"]}', "lone surrogate"),
        (b'{"\\ud800": 1, "input": "a"}', "lone surrogate"),
        (b'{"input": "\xff\xfe"}', "not UTF-8"),
        ("{'input': 'ä'}".encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf" + b'{"input": "a"}', "not JSON"),
        (b'{"input": "a\x00b"}', "not JSON"),
        (b'{"input": [' + b"9" * 5000 + b"]}", "not JSON"),
        (b'{"input": ' + b"[" * 33 + b"1" + b"]" * 33 + b"}", "nested deeper than 32"),
        (b'{"input": ' + b"[" * 40_000 + b"}", "nested deeper"),
        (b'{"a":' * 15_000, "nested deeper"),
        (b'{"input": "a"} {"input": "b"}', "not JSON"),
    ],
)
def test_json_is_read_with_suspicion(served: Served, content: bytes, words: str) -> None:
    with served.http() as http:
        facts = error(http.post(EMBED, content=content, headers={"content-type": "application/json"}), 400)
    assert words in facts["message"]
    assert facts["code"] == "invalid_json"


def test_numbers_out_of_all_range(served: Served) -> None:
    head = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, '
    with served.http() as http:
        for tail in (b'"temperature": 1e999}', b'"seed": 99999999999999999999}', b'"logit_bias": {"1": 1e999}}'):
            error(http.post(CHAT, content=head + tail, headers={"content-type": "application/json"}), 400)
        assert http.post(
            CHAT, content=head + b'"seed": -9223372036854775808}', headers={"content-type": "application/json"}
        ).is_success


def test_other_statuses(served: Served) -> None:
    with served.http() as http:
        assert "no route GET /v1/nothing" in error(http.get("/v1/nothing"), 404)["message"]
        assert error(http.get("/page/../app.py"), 404)
        assert error(http.get("/page/%2e%2e%2fapp.py"), 404)
        refused = http.get(CHAT)
        assert "does not take GET, but POST" in error(refused, 405)["message"]
        assert refused.headers["allow"] == "POST"
        error(http.put("/v1/models", json={}), 405)
        error(http.post(EMBED, content=b'{"input": "a"}'), 415)
        error(http.post(EMBED, content=b"input=a", headers={"content-type": "application/x-www-form-urlencoded"}), 415)
        zipped = {"content-type": "application/json", "content-encoding": "gzip"}
        error(http.post(EMBED, content=b"\x1f\x8b", headers=zipped), 415)
        large = b'{"input": "' + b"a" * 100_000 + b'"}'
        error(http.post(EMBED, content=large, headers={"content-type": "application/json"}), 413)

        def pieces() -> Iterator[bytes]:
            for _ in range(20):
                yield b" " * 10_000

        error(http.post(EMBED, content=pieces(), headers={"content-type": "application/json"}), 413)

        def slowly() -> Iterator[bytes]:
            yield b'{"input": '
            time.sleep(1.5)
            yield b'"a"}'

        error(http.post(EMBED, content=slowly(), headers={"content-type": "application/json"}), 408)
        assert http.post(
            EMBED, json={"input": "a"}, headers={"content-type": "application/json; charset=utf-8"}
        ).is_success


def test_request_ids_come_back(served: Served) -> None:
    with served.http() as http:
        assert http.get("/health", headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
        for odd in ("a b", "x" * 65, 'a"b', ""):
            assert http.get("/health", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req-")
        assert http.get("/health").headers["x-content-type-options"] == "nosniff"


def test_no_cors_unless_asked(gem: Any, served: Served) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served.http() as http:
        assert http.options(EMBED, headers=asked).status_code == 405
        answer = http.post(EMBED, json={"input": "a"}, headers={"origin": "https://a.example"})
        assert not any(name.startswith("access-control") for name in answer.headers)
    with serving(gem, cors_origins=("https://a.example",)) as open_served, open_served.http() as http:
        assert http.options(EMBED, headers=asked).headers["access-control-allow-origin"] == "https://a.example"
        answer = http.post(EMBED, json={"input": "a"}, headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = http.post(EMBED, json={"input": "a"}, headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_keys(gem: Any) -> None:
    keys = {"ann": "secret-of-ann", "bob": "secret-of-bob"}
    with serving(gem, keys=keys) as served:
        for key in keys.values():
            assert served.client(key).embeddings.create(model="tiny", input="a").data
        with pytest.raises(openai.AuthenticationError, match="not known here") as raised:
            served.client("secret-of-ben").embeddings.create(model="tiny", input="a")
        assert raised.value.code == "invalid_api_key"
        with served.http() as http:
            for given in (
                {},
                {"authorization": "secret-of-ann"},
                {"authorization": "Basic secret-of-ann"},
                {"authorization": "Bearer \xff\xfe"},
            ):
                headers: Any = [(k.encode(), v.encode("latin-1")) for k, v in given.items()]
                refused = http.post(EMBED, json={"input": "a"}, headers=headers)
                error(refused, 401)
                assert refused.headers["www-authenticate"] == "Bearer"
            for path in ("/metrics", "/v1/models", "/v1/stats", "/openapi.json", "/v1/nothing"):
                error(http.get(path), 401)
                assert http.get(path, headers={"authorization": "bearer secret-of-bob"}).status_code in (200, 404)
            for path in ("/health", "/ready"):
                assert http.get(path).is_success


def test_requests_a_minute_are_each_keys_own(gem: Any) -> None:
    with serving(gem, keys={"ann": "secret-of-ann", "bob": "secret-of-bob"}, requests_per_minute=2) as served:
        ann, bob = ({"authorization": f"Bearer secret-of-{name}"} for name in ("ann", "bob"))
        assert [served.post(EMBED, {"input": "a"}, **ann).status_code for _ in range(3)] == [200, 200, 429]
        refused = served.post(EMBED, {"input": "a"}, **ann)
        assert "more than 2 requests a minute" in error(refused, 429)["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert served.post(EMBED, {"input": "a"}, **bob).status_code == 200
        with served.http() as http:
            assert http.get("/v1/stats", headers=ann).is_success  # looking is not asking


def test_tokens_a_minute(gem: Any) -> None:
    with serving(gem, tokens_per_minute=30) as served:
        assert served.post(EMBED, {"input": "a" * 20}).status_code == 200
        refused = served.post(EMBED, {"input": "a" * 20})
        assert "more than 30 tokens a minute" in error(refused, 429)["message"]
        assert int(refused.headers["retry-after"]) <= 60
        # An answer's tokens count too, when it has been written.
        assert served.post(TEXT, {"prompt": "a", "max_tokens": 12, "logit_bias": {"40": 100}}).status_code == 200
        error(served.post(EMBED, {"input": "a"}), 429)


def test_no_more_room(gem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(gem) as served:

        def full(*_: Any, **__: Any) -> None:
            raise QueueFullError(2048, retry_after=7.0)

        monkeypatch.setattr(served.engine, "embed", full)
        refused = served.post(EMBED, {"input": "a"})
        assert error(refused, 429)["code"] == "queue_full"
        assert refused.headers["retry-after"] == "7"
        monkeypatch.undo()
        threading.Thread(target=served.engine.stop).start()
        served.wait_until(lambda: served.post(EMBED, {"input": "a"}).status_code == 503)
        refused = served.post(CHAT, {"messages": ASK})
        assert error(refused, 503)["code"] == "stopping"
        assert refused.headers["retry-after"]
        assert error(served.post(CHAT, {"messages": ASK, "stream": True}), 503)
        with served.http() as http:
            assert http.get("/ready").status_code == 503


def test_an_engines_own_failure_is_500_and_says_nothing(gem: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with serving(gem) as served:

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("hello is the secret prompt")

        monkeypatch.setattr(served.engine, "generate", broken)
        facts = error(served.post(CHAT, {"messages": ASK}), 500)
        assert "secret" not in facts["message"]
        assert facts["type"] == "server_error"
        monkeypatch.undo()
        assert served.post(CHAT, {"messages": ASK, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(("raised", "words"), FAILURES)
def test_a_stream_that_fails_midway_says_so(
    gem: Any, monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    with serving(gem) as served:
        served.fail_midway(monkeypatch, raised)
        chunks = iter(served.client().chat.completions.create(model="tiny", messages=ASK, stream=True))
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "so far"]
        with pytest.raises(openai.APIError, match=words) as told:
            next(chunks)
        assert "secret" not in str(told.value)
        error(served.post(CHAT, {"messages": ASK}), 400 if isinstance(raised, ValueError) else 500)


def test_a_request_has_its_time(gem: Any) -> None:
    with serving(gem, timeout=0.3) as served:
        long = {"prompt": "a", "max_tokens": 1000, "logit_bias": {"40": 100}}
        assert error(served.post(TEXT, long), 504)["code"] == "timeout"
        with served.http() as http, http.stream("POST", TEXT, json={**long, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert '"code": "timeout"' in lines[-1]
        served.wait_until(
            lambda: served.engine.stats().cancelled_requests == 2 and served.engine.stats().num_running_seqs == 0
        )
        assert served.post(EMBED, {"input": "a"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_place(gem: Any, stream: bool) -> None:
    with serving(gem, engine={"max_num_seqs": 1}) as served:
        long = {"prompt": "a", "max_tokens": 1000, "logit_bias": {"40": 100}, "stream": stream}
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            asking = asyncio.create_task(_first_line(http, long))
            if stream:
                await asking
            else:
                while served.engine.stats().num_running_seqs == 0:
                    await asyncio.sleep(0.005)
                asking.cancel()
        await asyncio.to_thread(served.wait_until, lambda: served.engine.stats().cancelled_requests == 1)
        assert served.engine.stats().generation_tokens < 1000
        answer = await asyncio.to_thread(served.post, TEXT, {"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200


async def _first_line(http: httpx.AsyncClient, body: Any) -> None:
    async with http.stream("POST", TEXT, json=body) as response:
        async for _ in response.aiter_lines():
            return
