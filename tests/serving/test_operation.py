"""What operators need: names of the model, a path behind a proxy, TLS, streams that stay open in silence."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from anthropic import Anthropic, DefaultHttpxClient
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import NotFoundError, OpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from typer.testing import CliRunner

import gemify.serving.server as server_module
import gemify.serving.settings as settings_module
from gemify import GemModel
from gemify.cli.main import app
from gemify.serving.server import Server, listen
from gemify.serving.settings import ServerSettings
from running_server import Served, indexed, serving, tiny_gem

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemModel:
    return tiny_gem(tmp_path_factory.mktemp("model"))


# Names of the model


def test_the_model_has_every_name_and_answers_with_the_first(gem: GemModel) -> None:
    with serving(gem, served_model_name="mine, gpt-4o,org/mine") as served:
        client = served.client()
        assert [model.id for model in client.models.list()] == ["mine", "gpt-4o", "org/mine"]
        for name in ("mine", "gpt-4o", "org/mine"):
            assert client.models.retrieve(name).id == name
            assert client.embeddings.create(model=name, input="a").model == "mine"
            assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=1).model == "mine"
        with pytest.raises(NotFoundError, match="'other' is not here: this server has 'mine', 'gpt-4o', 'org/mine'"):
            client.embeddings.create(model="other", input="a")


def test_names_are_repeated_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("gemify.serving.server.serve", given.append)
    arguments = ["serve", "--served-model-name", "a", "--served-model-name", "b,c"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert given[0].model_names == ("a", "b", "c")
    assert ServerSettings(model=str(tmp_path)).model_names == (tmp_path.name,)


def test_stores_have_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("gemify.serving.server.serve", given.append)
    (tmp_path / "my notes").mkdir()
    arguments = ["serve", "-s", "manual=/indexes/v2=b", "-s", str(tmp_path / "my notes"), "-s", "s3://bucket/a/law/"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    named = {"manual": "/indexes/v2=b", "my-notes": str(tmp_path / "my notes"), "law": "s3://bucket/a/law/"}
    assert list(given[0].stores.items()) == list(named.items())
    monkeypatch.setenv("GEMIFY_STORE", "a=/x, /y/b")
    assert ServerSettings.load({}).stores == {"a": "/x", "b": "/y/b"}
    (tmp_path / "serve.yaml").write_text("store: [c=/z, /y/d]")
    monkeypatch.delenv("GEMIFY_STORE")
    assert ServerSettings.load({}, tmp_path / "serve.yaml").stores == {"c": "/z", "d": "/y/d"}
    with pytest.raises(ValueError, match="--store: two stores have the name 'b': give NAME=DIR with another name"):
        ServerSettings.load({"store": ("/x/b", "b=/y")})


# Behind a proxy


@contextmanager
def proxy(target: str, prefix: str, *, strips: bool) -> Iterator[str]:
    """A reverse proxy that serves ``target`` under a prefix, and nothing else. Its own address."""

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path
        if path != prefix and not path.startswith(f"{prefix}/"):
            return StreamingResponse(iter([b"another site"]), 404)
        sent = (path.removeprefix(prefix) or "/") if strips else path
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}
        client = httpx.AsyncClient(base_url=target, timeout=60)
        asked = client.build_request(request.method, sent, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)

        async def parts() -> AsyncIterator[bytes]:
            async for part in answer.aiter_raw():
                yield part
            await client.aclose()

        kept = {k: v for k, v in answer.headers.items() if k not in ("transfer-encoding", "connection")}
        return StreamingResponse(parts(), answer.status_code, kept)

    site = Starlette()
    site.add_route("/{path:path}", forward, methods=["GET", "POST"])
    with listen(ServerSettings(port=0)) as listener:
        server = uvicorn.Server(uvicorn.Config(site, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        host, port = listener.getsockname()[:2]
        thread.start()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.mark.parametrize("strips", [True, False], ids=["stripped", "kept"])
def test_everything_works_under_a_prefix(tmp_path: Path, strips: bool) -> None:
    index = indexed(tmp_path, {"birds.md": "# Birds\n\nOwls hunt at night.\n"}, tokens=48)
    assert isinstance(index.model, GemModel)
    with (
        serving(index.model, index=index, keys={"ann": "secret-of-ann"}, root_path="/gem/one/") as served,
        proxy(served.url, "/gem/one", strips=strips) as site,
        httpx.Client(base_url=f"{site}/gem/one/", timeout=60, follow_redirects=True) as http,
    ):
        key = {"authorization": "Bearer secret-of-ann"}
        page = http.get("")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        if not strips:
            assert str(httpx.get(f"{site}/gem/one", follow_redirects=True).url) == f"{site}/gem/one/"
        for link in ("page/page.js", "page/page.css", "page/icon.svg", "health", "ready"):
            assert str(page.url.join(link)) == f"{site}/gem/one/{link}"
            assert http.get(link).status_code == 200, link
        assert http.get("v1/models").status_code == 401
        assert http.get("openapi.json", headers=key).json()["servers"] == [{"url": "/gem/one"}]
        client = OpenAI(base_url=f"{site}/gem/one/v1", api_key="secret-of-ann", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, temperature=0)
        parts = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, temperature=0, stream=True)
        said = "".join(part.choices[0].delta.content or "" for part in parts)
        assert said == whole.choices[0].message.content
        found = http.post("v1/search", json={"query": "owls", "mode": "fts"}, headers=key).json()
        assert "Owls hunt" in found["data"][0]["text"]
        missing = http.post("v1/messages/none", json={}, headers=key)
        assert missing.json() == {
            "type": "error",
            "error": {**missing.json()["error"], "type": "not_found_error", "code": "unknown_url"},
        }
        assert "no route POST /v1/messages/none" in missing.json()["error"]["message"]
        asyncio.run(_search_by_mcp(f"{site}/gem/one/mcp", key))
        assert 'route="/v1/chat/completions"' in http.get("metrics", headers=key).text
        assert httpx.get(f"{site}/gem/oneself/health").status_code == 404


async def _search_by_mcp(url: str, headers: dict[str, str]) -> None:
    mcp = pytest.importorskip("mcp", reason="mcp is not installed: pip install 'gemify[mcp]'")
    from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client

    async with (
        create_mcp_http_client(headers=headers) as http,
        mcp.Client(streamable_http_client(url, http_client=http)) as client,
    ):
        found = await client.call_tool("search", {"query": "owls", "mode": "fts"})
        assert "Owls hunt" in found.structured_content["passages"][0]["text"]


@pytest.mark.parametrize(
    "path", ["gemify", "https://a.example/gem", "/a//b", "/a b", "/a?b", "/a/./..", "/\N{SNOWMAN}"]
)
def test_a_prefix_is_a_path(path: str) -> None:
    with pytest.raises(ValueError, match="--root-path must be a path such as /gemify, got "):
        ServerSettings.load({"root_path": path})


@pytest.mark.parametrize("path", ["/v1", "/v1/gem", "/page/", "/mcp", "/rerank", "/health"])
def test_a_prefix_hides_no_route(path: str) -> None:
    """A proxy may strip it: what stays would be another path."""
    with pytest.raises(ValueError, match="--root-path must not begin with /"):
        ServerSettings.load({"root_path": path})


def test_the_first_parts_of_all_routes_are_known(gem: GemModel) -> None:
    with serving(gem) as served:
        paths = {route.path for route in served.app.routes if hasattr(route, "path")}
    assert {path.split("/")[1] for path in paths} - {""} <= settings_module._FIRST_PARTS


# TLS


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate that signs itself for this machine's address, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gemify")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(exist_ok=True)
    pem, unlocked = serialization.Encoding.PEM, serialization.NoEncryption()
    (directory / "cert.pem").write_bytes(made.public_bytes(pem))
    (directory / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unlocked))
    locked = serialization.BestAvailableEncryption(b"a password")
    (directory / "locked.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    (directory / "both.pem").write_bytes((directory / "key.pem").read_bytes() + made.public_bytes(pem))
    return directory / "cert.pem", directory / "key.pem"


def test_a_silent_peer_of_the_backlog_does_not_hold_up_the_stop(
    gem: GemModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 0.2)
    cert, key = certificate(tmp_path)
    with serving(gem, ssl_certfile=cert, ssl_keyfile=key) as served:
        server = Server(served.app)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(OSError, match=r"handshake is taking longer than 0\.2 seconds"):
            asyncio.run(asyncio.wait_for(server._accept(theirs), 20))


@pytest.mark.parametrize("apart", [True, False], ids=["two files", "one file"])
def test_clients_trust_the_certificate(gem: GemModel, tmp_path: Path, apart: bool) -> None:
    cert, key = certificate(tmp_path)
    files = {"ssl_certfile": cert, "ssl_keyfile": key} if apart else {"ssl_certfile": tmp_path / "both.pem"}
    trusting = ssl.create_default_context(cafile=cert)
    with serving(gem, **files) as served:
        assert served.url.startswith("https://")
        with httpx.Client(base_url=served.url, verify=trusting, timeout=60) as http:
            assert http.get("/ready").json() == {"status": "ready"}
            client = served.client(http_client=http)
            parts = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True)
            assert [part.choices[0].finish_reason for part in parts][-1] == "length"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(served.url)
        with pytest.raises(httpx.HTTPError):
            httpx.get(served.url.replace("https", "http"))


def test_a_wrong_certificate_is_a_line_before_the_model_is_loaded(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    _, other = certificate(tmp_path / "other")
    locked = tmp_path / "locked.pem"
    (tmp_path / "text.pem").write_text("no certificate")
    for files, words in (
        ((cert, tmp_path / "none.pem"), f"No such file or directory: '{tmp_path}/none.pem'"),
        ((tmp_path / "none.pem", key), f"No such file or directory: '{tmp_path}/none.pem'"),
        ((cert, tmp_path), f"Is a directory: '{tmp_path}'"),
        ((cert, None), f"{cert} and {cert} are no certificate and its unencrypted key in PEM"),
        ((cert, other), f"{cert} and {other} are no certificate and its unencrypted key in PEM: key values mismatch"),
        ((cert, locked), f"{cert} and {locked} are no certificate and its unencrypted key in PEM"),
        ((tmp_path / "text.pem", key), f"text.pem and {key} are no certificate and its unencrypted key in PEM"),
    ):
        arguments = ["serve", "--model", "/none", "--ssl-certfile", str(files[0])]
        arguments += [] if files[1] is None else ["--ssl-keyfile", str(files[1])]
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, done.stdout) == (2, ""), (files, done.stderr)
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="ssl_keyfile needs ssl_certfile"):
        ServerSettings.load({"ssl_keyfile": key})


# Comments in streams

SHAPES = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    "/v1/completions": {"prompt": "hello", "max_tokens": 3},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/v1/messages": {"model": "tiny", "messages": HELLO, "max_tokens": 3},
}
COMMENT = b": keep-alive\n\n"


@pytest.fixture(scope="module")
def quick_comments(gem: GemModel) -> Iterator[Served]:
    with serving(gem, sse_keep_alive_seconds=0.02) as running:
        yield running


@contextmanager
def silence(served: Served) -> Iterator[threading.Event]:
    """The engine does nothing until the event is set."""
    paused, goes_on = threading.Event(), threading.Event()

    def pause() -> None:
        with served.engine.paused():
            paused.set()
            goes_on.wait(60)

    pausing = threading.Thread(target=pause)
    pausing.start()
    assert paused.wait(60)
    try:
        yield goes_on
    finally:
        goes_on.set()
        pausing.join(60)


@pytest.mark.parametrize("path", SHAPES)
def test_a_silent_stream_sends_comments(quick_comments: Served, path: str) -> None:
    """They come between events, and none after the last."""
    asked = {**SHAPES[path], "stream": True}
    with (
        quick_comments.http() as http,
        silence(quick_comments) as goes_on,
        http.stream("POST", path, json=asked) as answer,
    ):
        parts, said = answer.iter_raw(), b""
        while said.count(COMMENT) < 3:
            said += next(parts)
        goes_on.set()
        said += b"".join(parts)
    events = [event for event in said.split(b"\n\n") if event and event != COMMENT.strip()]
    assert all(event.startswith((b"data: ", b"event: ")) for event in events)
    assert not said.endswith(COMMENT)
    last = {"/v1/responses": b"event: response.incomplete", "/v1/messages": b"event: message_stop"}
    assert events[-1].startswith(last.get(path, b"data: [DONE]"))


def spying_client(http: Any, on_comment: Callable[[], None]) -> Any:
    """A client of httpx, or of its successor, that says when an answer's third comment has come."""

    class Watched(http.SyncByteStream):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            self._inner, self._count = inner, 0

        def __iter__(self) -> Iterator[bytes]:
            for part in self._inner:
                before, self._count = self._count, self._count + part.count(COMMENT)
                if before < 3 <= self._count:
                    on_comment()
                yield part

        def close(self) -> None:
            self._inner.close()

    class Spy(http.HTTPTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            answer = super().handle_request(request)
            answer.stream = Watched(answer.stream)
            return answer

    return http.Client(transport=Spy(), timeout=60)


def _openai_chat(url: str, on_comment: Callable[[], None]) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="any", http_client=spying_client(httpx, on_comment), max_retries=0)
    parts = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, temperature=0, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def _openai_responses(url: str, on_comment: Callable[[], None]) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="any", http_client=spying_client(httpx, on_comment), max_retries=0)
    with client.responses.stream(model="tiny", input="hello", max_output_tokens=5, temperature=0) as events:
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def _anthropic_messages(url: str, on_comment: Callable[[], None]) -> str:
    http = importlib.import_module(DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])  # httpx, or httpx2
    client = Anthropic(base_url=url, api_key="any", http_client=spying_client(http, on_comment), max_retries=0)
    greedy = {"temperature": 0}
    with client.messages.stream(model="tiny", messages=HELLO, max_tokens=5, extra_body=greedy) as events:
        return "".join(events.text_stream)


@pytest.mark.parametrize("ask", [_openai_chat, _openai_responses, _anthropic_messages])
def test_clients_skip_comments(quick_comments: Served, ask: Callable[[str, Callable[[], None]], str]) -> None:
    chat = {"messages": HELLO, "max_tokens": 5, "temperature": 0}
    expected = quick_comments.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]
    seen = threading.Event()
    with silence(quick_comments) as goes_on:

        def on_comment() -> None:
            seen.set()
            goes_on.set()

        said = ask(quick_comments.url, on_comment)
    assert seen.is_set(), "no comment came"
    assert said == expected
