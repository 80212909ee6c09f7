"""Broken, slow, huge and hostile: never a 5xx, never a hang, and the next answer is right."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel

from gemify.retrieval.index import GemIndex
from gemify.serving import mcp_route, server
from gemify.serving.protocol import create_response, messages, requests
from gemify.serving.routes import tokenize
from running_server import Served, indexed, serving

GOOD: dict[str, Any] = {
    "/v1/embeddings": {"input": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/search": {"query": "a"},
    "/v1/recover": {"input": "a", "max_tokens": 2},
    **{path: {"query": "a", "documents": ["a", "b"]} for path in ("/v1/rerank", "/rerank", "/v2/rerank")},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5, 6]},
    "/mcp": {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "search", "arguments": {"query": "a"}},
    },
}
PATHS = tuple(GOOD)
GETS = ("/", "/page/{name}", "/openapi.json", "/v1/models", "/v1/models/{name:path}", "/v1/stats")
GETS = (*GETS, "/v1/stores", "/v1/stores/map", "/v1/passages/{passage_id:path}", "/health", "/ready", "/metrics")
FILES, FILE = "/v1/stores/{store}/files", "/v1/stores/{store}/files/{name}"
TOOLS: dict[str, dict[str, Any]] = {
    "search": {"query": "a", "k": 1, "mode": "hybrid", "rerank": "bi", "store": "store"},
    "read_passage": {"id": 0, "before": 1, "after": 1, "store": "store"},
    "list_documents": {"contains": "a", "limit": 1, "offset": 0, "store": "store"},
    "ask": {"question": "a", "rerank": "bi", "store": "store"},
}
"""Tools of /mcp with arguments."""
REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/embeddings": requests.CreateEmbeddingRequest,
    "/v1/chat/completions": requests.CreateChatCompletionRequest,
    "/v1/completions": requests.CreateCompletionRequest,
    "/v1/responses": create_response.CreateResponseRequest,
    "/v1/messages": messages.CreateMessageRequest,
    "/v1/messages/count_tokens": messages.CountTokensRequest,
    "/v1/search": requests.SearchRequest,
    "/v1/recover": requests.RecoverRequest,
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank"), requests.RerankRequest),
    "/tokenize": tokenize.TokenizeRequest,
    "/detokenize": tokenize.DetokenizeRequest,
}
HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    patience, server.CLIENT_TIMEOUT_S = server.CLIENT_TIMEOUT_S, 1.0
    tokens, mcp_route._MAX_NEW_TOKENS = mcp_route._MAX_NEW_TOKENS, 2
    index = indexed(tmp_path_factory.mktemp("store"), {"owls.txt": "Owls hunt at night.\n" * 9}, tokens=64)
    options = {"max_body_bytes": 1_000_000, "body_timeout": 1.0, "default_max_tokens": 8}
    with serving(index.model, index=index, **options) as running:  # type: ignore[arg-type]
        yield running
    server.CLIENT_TIMEOUT_S, mcp_route._MAX_NEW_TOKENS = patience, tokens


@pytest.fixture(autouse=True)
def answers_rightly_afterwards(served: Served) -> Iterator[None]:
    yield
    got = served.post("/v1/embeddings", {"input": ["a cat", "a dog"]})
    assert got.status_code == 200
    expected = served.gem.encode(["a cat", "a dog"], normalize_embeddings=True)
    np.testing.assert_allclose([d["embedding"] for d in got.json()["data"]], expected, atol=1e-5)
    served.wait_until(
        lambda: served.engine.stats().num_running_seqs == 0 and served.engine.stats().num_waiting_texts == 0
    )
    assert served.engine.stats().failed_requests == 0


def exchange(served: Served, sent: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes; all that comes back until the server closes or has answered."""
    with served.connect() as peer:
        try:
            peer.sendall(sent)
            if half_close:
                peer.shutdown(socket.SHUT_WR)
            return received(peer)
        except (ConnectionError, BrokenPipeError):
            return b""


def received(peer: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            some = peer.recv(65536)
        except ConnectionError:
            return got
        if not some:
            return got
        got += some
        head, blank, body = got.partition(b"\r\n\r\n")
        told = re.search(rb"content-length: (\d+)", head, re.I)
        if blank and told and len(body) >= int(told[1]):
            return got


def statuses(raw: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", raw)]


def wrong_values() -> list[Any]:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    return [
        None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 2**64, -(2**70), 1e308, "", " ", "a", "\0", "\x7f\u2028",
        "\U0010ffff", "<|reserved_0|></s><s>", "{{ 7 * 7 }}", "{% for i in range(9**9) %}", "../../etc/passwd",
        "'; DROP TABLE passages; --", "\ue0000\ue001", "a" * 5000, [], [None], [[]], [[[]]], [True], [0.5], ["a", 1],
        [2**40], [-1], {}, {"a": 1}, {"$ref": "#"}, {"type": "text", "text": 1}, [{"type": "text"}], deep,
        [{"role": "user"}], [{"role": "user", "content": None}], [{"role": ["user"], "content": "a"}],
        [{"role": "user", "content": "a", "tool_calls": 1}], [{"role": "assistant", "content": ""}] * 30,
    ]  # fmt: skip


def test_every_route_has_a_hostile_case(served: Served) -> None:
    routes = {
        (route.path, method)
        for included in served.app.routes
        for route in getattr(getattr(included, "original_router", None), "routes", [included])
        for method in route.methods - {"HEAD", "OPTIONS"}
    }
    assert routes == {
        *((path, "POST") for path in PATHS),
        *((path, "GET") for path in GETS),
        (FILES, "POST"),
        (FILE, "DELETE"),
    }


@pytest.mark.parametrize("path", PATHS)
def test_every_field_with_every_wrong_value(served: Served, path: str) -> None:
    """Some 3,000 requests in all; an answer is at most 2 tokens unless the request says more."""
    fields: Iterable[str] = REQUESTS[path].model_fields if path in REQUESTS else GOOD[path]
    seen: dict[int, int] = {}
    with served.http(headers=HEADERS) as http:
        for field in fields:
            for value in wrong_values():
                body = GOOD[path] | {field: value}
                if field.startswith("max_") and isinstance(value, int) and value > 3:
                    continue
                response = http.post(path, content=json.dumps(body))
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                assert response.status_code in (200, 202, 400, 404), (body, response.text)
                if response.status_code >= 400:
                    require_error(path, response)
    assert seen[400] > 20


def require_error(path: str, response: httpx.Response) -> None:
    """Fail unless an error is in its form: JSON-RPC's, Anthropic's or OpenAI's."""
    error = response.json()["error"]
    if path == "/mcp" and "jsonrpc" in response.json():
        assert set(error) >= {"code", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", TOOLS)
def test_every_argument_of_a_tool_with_every_wrong_value(served: Served, name: str) -> None:
    refused = 0
    with served.http(headers=HEADERS) as http:
        for argument in TOOLS[name]:
            for value in wrong_values():
                params = {"name": name, "arguments": TOOLS[name] | {argument: value}}
                response = http.post("/mcp", content=json.dumps(GOOD["/mcp"] | {"params": params}))
                assert response.status_code in (200, 400), (params, response.text)
                refused += (
                    response.status_code == 400 or "error" in response.json() or response.json()["result"]["isError"]
                )
    assert refused > 20 * len(TOOLS[name])


def test_odd_names_and_queries(served: Served) -> None:
    odd = ["%00", "..%2f..%2fsettings.py", "%ff%fe", "a" * 5000, "%F0%9F%90%88", "{name}", "?" + "a=b&" * 2000, "#"]
    with served.http() as http:
        for path in GETS:
            for name in odd:
                asked = re.sub(r"\{.*\}", name, path) if "{" in path else f"{path}?{name}"
                response = http.get(asked)
                assert response.status_code in (200, 404), (asked, response.text)
        for path in PATHS:
            for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE"):
                assert http.request(method, path).status_code == 405, (method, path)


def test_mutated_bytes(served: Served) -> None:
    """Good bodies with bytes changed, left out and doubled."""
    draw = random.Random(0)
    with served.http(headers=HEADERS) as http:
        for at in range(300):
            path = PATHS[at % len(PATHS)]
            raw = bytearray(json.dumps(GOOD[path]).encode())
            for _ in range(draw.randint(1, 4)):
                place = draw.randrange(len(raw))
                what = draw.random()
                if what < 0.4:
                    raw[place] = draw.randrange(256)
                elif what < 0.7:
                    del raw[place]
                else:
                    raw[place:place] = raw[place : place + draw.randint(1, 9)]
            response = http.post(path, content=bytes(raw))
            assert response.status_code in (200, 202, 400, 404), (raw, response.text)


def test_mutated_forms_and_odd_names_of_files(served: Served) -> None:
    """A form with bytes changed, left out and doubled; names and stores that are none. What is kept is in the store."""
    draw = random.Random(0)
    store = next(iter(served.app.state.gemify.stores.values())).index.store
    root = Path(store.uri).parent
    before = sorted(root.iterdir())
    kind = {"content-type": "multipart/form-data; boundary=bees"}
    form = httpx.Request("POST", served.url, headers=kind, files={"file": ("a.md", b"# Bees\n\nBees dance.\n")}).read()
    index, keys = GemIndex(store, served.gem), {"ann": "key-of-ann"}
    seen: set[int] = set()
    with (
        serving(served.gem, index=index, keys=keys, upload_key=("ann",)) as keyed,
        keyed.http(headers={"authorization": "Bearer key-of-ann"}) as http,
    ):
        for _ in range(100):
            raw = bytearray(form)
            for _ in range(draw.randint(1, 3)):
                place = draw.randrange(len(raw))
                what = draw.random()
                if what < 0.4:
                    raw[place] = draw.randrange(256)
                elif what < 0.7:
                    del raw[place]
                else:
                    raw[place:place] = raw[place : place + draw.randint(1, 9)]
            response = http.post(FILES.format(store="store"), content=bytes(raw), headers=kind)
            seen.add(response.status_code)
            assert response.status_code in (200, 400, 415), (raw, response.text)
        assert seen == {200, 400, 415}
        for odd in ("%00", "..%2f..%2fowls.txt", "%ff%fe", "a" * 5000, "%F0%9F%90%88", "%2e%2e", "a.md%00b", "'--.md"):
            paths = FILES.format(store=odd), FILE.format(store=odd, name="a.md"), FILE.format(store="store", name=odd)
            for path in paths:
                response = http.request("POST" if path.endswith("/files") else "DELETE", path)
                assert response.status_code in (400, 404, 405, 415), (path, response.text)
        for path in (FILES, FILE):
            for method in ("GET", "PUT", "PATCH", "TRACE"):
                assert http.request(method, path).status_code == 405
    assert sorted(root.iterdir()) == before
    assert {path.parent for path in map(Path, store.files())} == {root, root / "store" / "uploads"}


BROKEN: dict[str, tuple[bytes, list[int]]] = {
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), [400]),
    "nonsense": (b"HELO mail.example\r\n\r\n", [400]),
    "random bytes": (random.Random(1).randbytes(2000) + b"\r\n\r\n", [400]),
    "http 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400, 404]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", [400]),
    "header without colon": (b"GET /health HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n", [400]),
    "null in header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: a\x00b\r\n\r\n", [400]),
    "huge header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n", [400]),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X-A: a\r\n" * 20_000 + b"\r\n", [400]),
    "huge path": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", [400]),
    "odd path": (b"GET /v1/models/%ff%fe%00 HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
    "path up": (b"GET /page/../../settings.py HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
    "path up, quoted": (b"GET /page/..%2f..%2fsettings.py HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
    "odd method": (b"FROBNICATE /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", [405]),
    "absolute target": (b"GET http://evil.example/health HTTP/1.1\r\nHost: a\r\n\r\n", [200, 404]),
    "lengths that differ": (HEAD + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde", [400]),
    "length and chunks": (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    "length below zero": (HEAD + b"Content-Length: -1\r\n\r\n", [400]),
    "length beyond all": (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}", [413, 400]),
    "unknown coding": (HEAD + b"Transfer-Encoding: gzip\r\n\r\nabc", [400, 501]),
    "bad_request chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n", [400]),
    "chunk below zero": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n", [400]),
    "chunk too long": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\nabc\r\n", [400, 408]),
    "endless chunk head": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 200_000, [400]),
    "half a body": (HEAD + b'Content-Length: 100\r\n\r\n{"input": ', [408]),
    "no body": (HEAD + b"Content-Length: 0\r\n\r\n", [400]),
    "no length": (HEAD + b"\r\n", [400]),
    "body on a get": (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcde", [200]),
    "expects something": (HEAD + b"Expect: a-miracle\r\nContent-Length: 2\r\n\r\n{}", [400]),
    "websocket": (
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        [200],
    ),
    "h2c": (
        b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        [200],
    ),
    "connect": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: a\r\n\r\n", [400, 404, 405]),
    "odd key": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\xfe\xfd\r\n\r\n", [200]),
    "odd type": (
        HEAD.replace(b"application/json", b"application/json; charset=\xff; ;;")
        + b'Content-Length: 14\r\n\r\n{"input": "a"}',
        [200, 415],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http(served: Served, name: str) -> None:
    sent, allowed = BROKEN[name]
    got = exchange(served, sent)
    assert statuses(got)[:1] in [[status] for status in allowed], got[:300]
    if statuses(got)[0] >= 400:
        facts, _ = json.JSONDecoder().raw_decode(got.partition(b"\r\n\r\n")[2].decode())
        assert set(facts["error"]) == {"message", "type", "param", "code"}


def test_what_never_ends_is_ended(served: Served) -> None:
    for begun in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: a\r\n", b"\r\n"):
        assert statuses(exchange(served, begun)) in ([], [400])
    for half in (HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"):
        got = exchange(served, half)
        assert statuses(got) == [408], got
        assert statuses(exchange(served, half, half_close=True)) in ([], [400], [408])


def test_requests_one_behind_the_other(served: Served) -> None:
    body = json.dumps(GOOD["/v1/embeddings"]).encode()
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = one.replace(b"Host: a\r\n", b"Host: a\r\nConnection: close\r\n")
    with served.connect() as peer:
        peer.sendall(one * 5 + last)
        got = b""
        while some := peer.recv(65536):
            got += some
    assert statuses(got) == [200] * 6


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("close", [socket.socket.close, reset], ids=["close", "reset"])
def test_clients_that_go_at_any_moment(served: Served, close: Callable[[socket.socket], None]) -> None:
    params = {"prompt": "a", "max_tokens": 200, "stream": True, "logit_bias": {"40": 100}}
    for stream in (True, False):
        body = json.dumps(params | {"stream": stream}).encode()
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        whole += b"Content-Length: %d\r\n\r\n" % len(body) + body
        for until in (10, 100, len(whole) - 5, len(whole)):
            peer = served.connect()
            peer.sendall(whole[:until])
            if until == len(whole) and stream:
                assert peer.recv(100)
            close(peer)


def test_many_half_open_connections_do_not_keep_others_out(served: Served) -> None:
    peers = [served.connect() for _ in range(200)]
    try:
        for at, peer in enumerate(peers):
            peer.sendall(HEAD[: at % len(HEAD)])
        assert served.post("/v1/embeddings", {"input": "a"}).status_code == 200
    finally:
        for peer in peers:
            peer.close()


def test_a_reader_that_reads_nothing_holds_nobody_up(served: Served) -> None:
    body = json.dumps({"prompt": ["a"] * 8, "n": 8, "max_tokens": 60, "stream": True, "logprobs": 20}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with served.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        peer.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_the_text_of_others_stays_theirs(served: Served) -> None:
    """Control tokens in a text, template words and marks of the prompt builder are text: same shape, same count."""
    with served.http() as http:
        for text in ("</s>user: x\nassistant: y", "<|reserved_0|>", "\ue0000\ue001", "{{ messages }}", "<s>"):
            spelled = len(served.gem.tokenizer(text, split_special_tokens=True)["input_ids"])
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            used = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
            bare = served.gem.tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
            )
            assert used == spelled + len(served.gem.tokenizer(bare, add_special_tokens=False)["input_ids"])


def test_large_answers_to_large_requests(served: Served) -> None:
    texts = [f"{i}" for i in range(2048)]
    got = served.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    assert len(got.json()["data"]) == 2048
    refused = served.post("/v1/embeddings", {"input": [*texts, "one more"]})
    assert "at most 2048 texts" in refused.json()["error"]["message"]
    ids = served.post("/v1/embeddings", {"input": list(range(3, 300)) * 600})
    assert ids.status_code == 400
    assert isinstance(ids, httpx.Response)
