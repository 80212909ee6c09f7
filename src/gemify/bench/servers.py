"""Servers as processes (start, wait until ready, watch their memory, stop), and mixed traffic for them.

The same chats and embeddings are sent to each server by concurrent clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import psutil


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: str

    def memory_bytes(self) -> int:
        """Memory of the process with its part of shared memory (PSS; RSS where that is unknown)."""
        process = psutil.Process(self.process.pid)
        try:
            memory: Any = process.memory_full_info()
        except psutil.AccessDenied:
            memory = process.memory_info()
        return int(getattr(memory, "pss", memory.rss))


@contextlib.contextmanager
def running(arguments: Sequence[str], *, threads: int | None = None, timeout: float = 300.0) -> Iterator[Server]:
    """Run ``python -m <arguments> --port N`` with ``threads`` of arithmetic until the block ends; waits for /ready."""
    port = _free_port()
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", *arguments, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"http://127.0.0.1:{port}", process, "")
        try:
            _wait_until_ready(server, log, command, timeout)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class MemoryWatch:
    """The maximum memory of some servers together, measured twice a second."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.peak = 0
        self.seen: list[int] = []
        self._servers, self._stop = servers, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.seen.append(sum(server.memory_bytes() for server in self._servers))
            self.peak = max(self.peak, self.seen[-1])
            if self._stop.wait(0.5):
                return


def _wait_until_ready(server: Server, log: object, command: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    output: bytes = log.read()  # type: ignore[attr-defined]
    last = output.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
    raise ValueError(f"the server did not start ({' '.join(command[1:])}): {last[0]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Kind = Literal["chat", "embed"]
_SUBJECTS = (
    "a lighthouse", "rain", "bread", "a compass", "chess", "a violin", "the moon", "a bridge", "glass", "tea",
    "a library", "a volcano", "paper", "a clock", "wool", "a river", "salt", "a telescope", "honey", "an island", "ink",
    "a kite", "copper", "a garden", "ice", "a train", "clay", "a map", "silk", "an orchard", "fog", "a harbour",
)  # fmt: skip
_QUESTIONS = (
    "In one sentence, what is {}?",
    "Tell me something surprising about {}.",
    "Write two lines of verse on {}.",
)
_TEXTS = (
    "{} was the first thing that came to her mind",
    "a short history of {} and of the people who lived with it",
    "what should one know about {} before winter",
    "how much does {} cost, and where can it be found",
)


@dataclass(frozen=True)
class Request:
    """One request. ``texts``: a question, or texts to embed."""

    kind: Kind
    texts: tuple[str, ...]
    max_tokens: int = 0


@dataclass
class Reply:
    """The reply to a request, and its times in seconds."""

    request: Request
    first: float
    """Until the first piece of an answer; of embeddings, until all of them."""
    total: float
    answer: str = ""
    vectors: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    """Generated, or embedded."""
    error: str = ""


def traffic(requests: int, *, chats: float = 0.5, max_tokens: int = 24, seed: int = 0) -> list[Request]:
    """Chats of one question, and embeddings of one text (searches) or of eight (documents), mixed."""
    rng = random.Random(seed)
    mixed = []
    for _ in range(requests):
        if rng.random() < chats:
            mixed.append(Request("chat", (rng.choice(_QUESTIONS).format(rng.choice(_SUBJECTS)),), max_tokens))
        else:
            count = 1 if rng.random() < 0.75 else 8
            mixed.append(
                Request("embed", tuple(rng.choice(_TEXTS).format(rng.choice(_SUBJECTS)) for _ in range(count)))
            )
    return mixed


async def send(
    requests: Sequence[Request], chat_url: str, embed_url: str, *, clients: int, timeout: float = 600.0
) -> list[Reply]:
    """Send requests by ``clients`` at a time, each of which waits for a reply before its next request.

    Returns:
        All replies, in the order of the requests.
    """
    replies: list[Reply | None] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def client() -> None:
        async with httpx.AsyncClient(timeout=timeout) as http:
            for at in numbers:
                request = requests[at]
                start = time.perf_counter()
                try:
                    if request.kind == "chat":
                        replies[at] = await _chat(http, chat_url, request, start)
                    else:
                        replies[at] = await _embed(http, embed_url, request, start)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    seconds = time.perf_counter() - start
                    replies[at] = Reply(request, seconds, seconds, error=f"{type(error).__name__}: {error}")

    await asyncio.gather(*(client() for _ in range(clients)))
    return [reply for reply in replies if reply is not None]


async def _chat(http: httpx.AsyncClient, url: str, request: Request, start: float) -> Reply:
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": request.texts[0]}],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, pieces, tokens, ended = 0.0, [], 0, False
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                break
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    pieces.append(text)
    if not ended:
        raise ValueError("the stream broke off")
    total = time.perf_counter() - start
    return Reply(request, first or total, total, answer="".join(pieces), tokens=tokens)


async def _embed(http: httpx.AsyncClient, url: str, request: Request, start: float) -> Reply:
    response = await http.post(f"{url}/v1/embeddings", json={"model": "bench", "input": list(request.texts)})
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}: {response.content[:200]!r}")
    body = response.json()
    seconds = time.perf_counter() - start
    return Reply(
        request,
        seconds,
        seconds,
        vectors=[row["embedding"] for row in body["data"]],
        tokens=body["usage"]["prompt_tokens"],
    )
