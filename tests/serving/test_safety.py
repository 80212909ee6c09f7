"""What one hostile client could do to the others, or to the machine: found in review, each with its test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gemify.serving import server
from gemify.serving.errors import ApiError
from gemify.serving.request_body import read_json
from running_server import Served, serving, tiny_gem

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, TEXT = "/v1/embeddings", "/v1/completions"
ENDLESS = {"prompt": "a", "max_tokens": 900, "logit_bias": {"40": 100}}


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    return tiny_gem(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(gem: Any) -> Iterator[Served]:
    with serving(gem) as running:
        yield running


def test_a_cold_request_leaves_the_others_their_answers(served: Served) -> None:
    others: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: others.append(served.post(TEXT, ENDLESS)))
    thread.start()
    served.wait_until(lambda: served.engine.stats().num_running_seqs)
    assert served.post(TEXT, {"prompt": "b", "temperature": 1e-40}).status_code == 200
    thread.join(60)
    assert others[0].json()["usage"]["completion_tokens"] == 900


def test_many_fields_and_one_of_them_twice() -> None:
    fields = ",".join(f'"{i}":0' for i in range(400_000))
    with pytest.raises(ApiError, match="the field 'twice' occurs twice"):
        read_json(f'{{{fields},"twice":0,"twice":0}}'.encode(), 32)


def test_no_name_of_a_part_of_the_page_is_an_error_of_ours(served: Served) -> None:
    with served.http() as http:
        for name in ("a" * 300 + ".js", "%00.js", "..%2fpage.py", "%2e%2e", "a" * 5000 + ".css", "page.py"):
            assert http.get(f"/page/{name}").status_code == 404
        assert http.get("/page/page.js").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1].evil.example", "[evil.example]"]
)
def test_a_web_page_cannot_come_in_by_a_name_of_its_own(served: Served, host: str) -> None:
    """DNS rebinding: a page's own name that suddenly means this machine."""
    with served.http() as http:
        refused = http.post(EMBED, json={"input": "a"}, headers={"Host": host})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "unknown_host"
        assert http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "gemify", "10.0.0.3", "a.localhost", ""])
def test_names_that_only_a_user_or_a_proxy_can_have_chosen(served: Served, host: str) -> None:
    with served.http() as http:
        assert http.post(EMBED, json={"input": "a"}, headers={"Host": host}).status_code == 200


def test_with_keys_any_name_will_do(gem: Any) -> None:
    with serving(gem, keys={"ann": "a-key-of-the-test"}) as served:
        headers = {"Host": "models.example", "Authorization": "Bearer a-key-of-the-test"}
        assert served.post(EMBED, {"input": "a"}, **headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_finished_in_time_is_told_at_a_stop(gem: Any, stream: bool) -> None:
    got: list[httpx.Response] = []
    with serving(gem, stop_timeout=0.2) as served:
        body = ENDLESS | {"prompt": ["a"] * 64, "n": 16, "stream": stream}  # minutes
        thread = threading.Thread(target=lambda: got.append(served.post(TEXT, body)))
        thread.start()
        served.wait_until(lambda: served.engine.stats().num_running_seqs)
    thread.join(300)  # a step of 1,024 texts takes a while on a busy machine
    assert got[0].status_code == (200 if stream else 503)
    last = got[0].text.rstrip().removesuffix("data: [DONE]").rstrip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "stopping"


def test_a_reader_that_reads_nothing_does_not_keep_the_server_from_its_end(
    gem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENT_TIMEOUT_S", 0.3)
    with serving(gem) as served:
        body = json.dumps({"input": [str(i) for i in range(2048)]}).encode()
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        peer.connect(served.address)
        peer.sendall((head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 12)  # more than sockets take
        served.wait_until(lambda: served.engine.stats().embedded_texts >= 2048)
        served.wait_until(lambda: not served.app.state.gemify.metrics.in_flight_now)
    assert not served.engine.stats().alive  # the server has stopped, although nobody has read
    peer.close()


def test_large_bodies_are_held_up_to_a_bound(gem: Any) -> None:
    large = json.dumps({"input": "a", "user": "x" * 60_000}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with serving(gem, max_body_bytes=100_000, max_bodies_bytes=100_000) as served:
        state = served.app.state.gemify
        with served.connect() as peer:
            peer.sendall(head + b"Content-Length: %d\r\n\r\n" % len(large) + large[:-1])
            served.wait_until(lambda: state.body_bytes == len(large) - 1)
            with served.http() as http:
                refused = http.post(EMBED, content=large, headers={"Content-Type": "application/json"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert served.post(EMBED, {"input": "a"}).status_code == 200
            peer.sendall(large[-1:])
            assert peer.recv(65536).startswith(b"HTTP/1.1 200")
        served.wait_until(lambda: not state.body_bytes)


def test_a_stop_string_is_not_as_long_as_a_book(served: Served) -> None:
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 2, "stop": "x" * 1000}).status_code == 200
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 2, "stop": ["x" * 1001]}).status_code == 400


def test_what_was_refused_costs_no_tokens(gem: Any) -> None:
    with serving(gem, tokens_per_minute=500) as served:
        for _ in range(3):
            assert served.post(TEXT, {"prompt": [5] * 300, "max_tokens": 5000}).status_code == 400
        assert served.post(TEXT, {"prompt": [5] * 300, "max_tokens": 1}).status_code == 200
        assert served.post(TEXT, {"prompt": [5] * 300, "max_tokens": 1}).status_code == 429
