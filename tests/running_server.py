"""A server in a thread of this process, for tests to ask with real clients over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

import tiny_models
from gemify import GemModel
from gemify.engine.engine import Engine
from gemify.engine.requests import Done, EngineRequest, Failed, TokenDelta
from gemify.retrieval.index import GemIndex
from gemify.serving.app import create_app
from gemify.serving.auth import KeyRing
from gemify.serving.server import Server, listen
from gemify.serving.settings import ServerSettings
from tiny_gems import make_gem

FAILURES = [(RuntimeError("secret"), "see its log"), (ValueError("too odd"), "too odd")]
"""Errors of an engine, and what a client reads of them."""


class Served:
    """A running server's address, its parts, and clients for it."""

    def __init__(self, engine: Engine, settings: ServerSettings, app: Any, address: tuple[str, int]) -> None:
        self.engine, self.settings, self.app, self.address = engine, settings, app, address
        self.gem: GemModel = engine.gem
        scheme = "http" if settings.ssl_certfile is None else "https"
        self.url = f"{scheme}://{address[0]}:{address[1]}"

    def client(self, key: str = "no key is needed", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def async_client(self, key: str = "no key is needed") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body, headers=headers)

    def wait_until(self, true: Any) -> None:
        """Wait for something that must come; the tests' own limit of time ends it otherwise."""
        for _ in range(6000):
            if true():
                return
            time.sleep(0.01)
        raise AssertionError("it never came")

    def fail_midway(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        """Let every answer begin and then fail."""

        def failing(ids: Any, sampling: Any, listener: Any, **_: Any) -> EngineRequest:
            for event in (TokenDelta(0, "so far"), Failed(error), Done()):
                listener(event)
            return EngineRequest(listener)

        monkeypatch.setattr(self.engine, "generate", failing)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)


@contextmanager
def serving(
    gem: GemModel, *, index: Any = None, keys: dict[str, str] | None = None, engine: Any = None, **options: Any
) -> Iterator[Served]:
    settings = ServerSettings(**{"port": 0, "served_model_name": "tiny", **options})
    engine = Engine(gem, **(engine or {}))
    indexes = index if isinstance(index, dict) else {} if index is None else {"store": index}
    app = create_app(engine, settings, indexes, keys=KeyRing((keys or {}).items()))
    with listen(settings) as listener:
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        address = listener.getsockname()[:2]
        thread.start()
        served = Served(engine, settings, app, address)
        try:
            served.wait_until(lambda: server.started or not thread.is_alive())
            served.wait_until(lambda: app.state.gemify.ready or not thread.is_alive())
            assert thread.is_alive(), "the server did not start"
            yield served
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"


def indexed(root: Path, corpus: dict[str, str], *, tokens: int) -> GemIndex:
    """An index of some files, by a tiny GEM."""
    for name, text in corpus.items():
        (root / name).write_text(text)
    index = GemIndex.open(root / "store", tiny_gem(root / "model"), tokens=tokens, overlap=8)
    index.add([root / name for name in corpus])
    return index


def tiny_gem(directory: Path, chat_template: str | None = None) -> GemModel:
    """A tiny GEM with a chat template (None: the tiny base's), its trained weights made large so that they matter."""
    gem = make_gem(tiny_models.save(directory / "base"))
    gem.tokenizer.chat_template = chat_template or gem.tokenizer.chat_template
    return gem
