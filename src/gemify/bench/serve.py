"""`gemify bench serve`: one server for chat and embeddings, against one job at a time and against two servers.

    one                gemify serve: chats and embeddings, mixed
    chat alone         the same server, the chats of the same traffic
    embeddings alone   the same server, its embeddings
    two                gemify serve for the chats, an embedding server beside it: the same model, or another encoder

All get the same requests in turn on the same cores. Two servers get half the threads each, as two that took all would
compete for them. Figures are medians of the rounds.
Servers are processes: started, waited for until ready, their memory watched, stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
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
import torch

from gemify.bench.timing import Report, make_report, percentiles, rows_by_name, rows_table, run_in_turn


@dataclass(frozen=True)
class ServerSettings:
    """The servers to compare."""

    model: str = "starter"
    dtype: str = "float32"
    encoder: str | None = None
    """A sentence-transformers model for the second server. None: the same GEM once more."""
    base: str | None = None

    def gem_command(self) -> list[str]:
        """Arguments of `gemify serve`."""
        command = [
            "-m",
            "gemify",
            "serve",
            "--model",
            self.model,
            "--dtype",
            self.dtype,
            "--served-model-name",
            "bench",
        ]
        return command + ([] if self.base is None else ["--base", self.base])

    def encoder_command(self) -> list[str]:
        """Arguments of the second server."""
        if self.encoder is None:
            return self.gem_command()
        return ["-m", "gemify.bench.encoder_server", "--encoder", self.encoder]


def bench_serve(
    servers: ServerSettings,
    *,
    requests: int = 200,
    clients: int = 16,
    max_tokens: int = 24,
    rounds: int = 2,
    show_progress_bar: bool = True,
) -> Report:
    """Send the same traffic, ``clients`` requests at a time, to each arrangement of servers."""
    mixed = traffic(requests, max_tokens=max_tokens)
    chats, embeddings = ([r for r in mixed if r.kind == kind] for kind in ("chat", "embed"))
    if not chats or not embeddings:
        raise ValueError(f"{requests} requests hold no {'embedding' if chats else 'chat'}: send more")

    def load(sent: Sequence[Request], *, two: bool = False) -> dict[str, float]:
        with _start(servers, two=two) as started:
            return _measure_load(started, sent, clients)

    runs = run_in_turn(
        {
            "one": lambda _: load(mixed),
            "chat alone": lambda _: load(chats),
            "embeddings alone": lambda _: load(embeddings),
            "two": lambda _: load(mixed, two=True),
        },
        rounds=rounds,
        description="serve",
        show_progress_bar=show_progress_bar,
    )
    settings = {**vars(servers), "requests": requests, "clients": clients, "max_tokens": max_tokens, "rounds": rounds}
    rows = [
        {"name": name, **{key: statistics.median(r[key] for r in run.results) for key in run.results[0]}}
        for name, run in runs.items()
    ]
    report = make_report(settings, rows, runs={name: run.results for name, run in runs.items()})
    by_name = rows_by_name(report)
    one, two = by_name["one"], by_name["two"]
    alone = by_name["chat alone"]["seconds"] + by_name["embeddings alone"]["seconds"]
    report["ratios"] = {
        "memory, one / two": one["peak_memory_mb"] / two["peak_memory_mb"],
        "requests per second, one / two": one["requests_per_second"] / two["requests_per_second"],
        "seconds, one / chat alone + embeddings alone": one["seconds"] / alone,
    }
    return report


@contextlib.contextmanager
def _start(settings: ServerSettings, *, two: bool) -> Iterator[list[Server]]:
    """The server of chats and that of embeddings, which may be the same."""
    with contextlib.ExitStack() as stack:
        threads = max(1, torch.get_num_threads() // 2) if two else None
        servers = [stack.enter_context(running(settings.gem_command(), threads=threads))]
        if two:
            servers.append(stack.enter_context(running(settings.encoder_command(), threads=threads)))
        yield servers


def _measure_load(servers: Sequence[Server], requests: Sequence[Request], clients: int) -> dict[str, float]:
    urls = servers[0].url, servers[-1].url
    first_of_kind = {r.kind: r for r in reversed(requests)}
    asyncio.run(send(list(first_of_kind.values()), *urls, clients=1))
    with MemoryWatch(servers) as memory:
        seconds, replies = asyncio.run(send_timed(requests, urls, clients))
    return {"seconds": seconds, "peak_memory_mb": memory.peak / 1e6, **_figures(replies, seconds)}


async def send_timed(requests: Sequence[Request], urls: tuple[str, str], clients: int) -> tuple[float, list[Reply]]:
    """Seconds, and the replies, all of which succeeded."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    replies = await send(requests, *urls, clients=clients)
    if failed := [reply for reply in replies if reply.error]:
        raise ValueError(f"{len(failed)} of {len(replies)} requests failed, the first: {failed[0].error}")
    return loop.time() - start, replies


def _figures(replies: Sequence[Reply], seconds: float) -> dict[str, float]:
    chats = [reply for reply in replies if reply.request.kind == "chat"]
    embeddings = [reply for reply in replies if reply.request.kind == "embed"]
    return {
        "requests_per_second": len(replies) / seconds,
        "generated_tokens_per_second": sum(reply.tokens for reply in chats) / seconds,
        "embedded_tokens_per_second": sum(reply.tokens for reply in embeddings) / seconds,
        **percentiles([reply.first for reply in chats], name="first_token_"),
        **percentiles([reply.total for reply in embeddings], name="embedding_"),
    }


COLUMNS = {
    "name": ("servers", ""),
    "seconds": ("seconds", ".1f"),
    "requests_per_second": ("requests/s", ".2f"),
    "generated_tokens_per_second": ("tokens/s generated", ".1f"),
    "embedded_tokens_per_second": ("tokens/s embedded", ".1f"),
    **{f"first_token_p{p}": (f"first token p{p} (s)", ".2f") for p in (50, 95, 99)},
    **{f"embedding_p{p}": (f"embedding p{p} (s)", ".2f") for p in (50, 95, 99)},
    "peak_memory_mb": ("peak memory (MB)", ",.0f"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    ratios = "\n".join(f"{name}: {ratio:.2f}" for name, ratio in report["ratios"].items())
    return f"{rows_table(report['rows'], COLUMNS)}\n\n{ratios}"


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
def running(
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    threads: int | None = None,
    ready: str = "/ready",
    timeout: float = 300.0,
) -> Iterator[Server]:
    """Run ``python <arguments> --port N`` with ``threads`` of arithmetic until the block ends.

    Waits until its route ``ready`` answers 200.
    """
    port = _free_port()
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryFile() as log:
        command = [python, *arguments, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"http://127.0.0.1:{port}", process, "")
        try:
            _wait_until_ready(server, ready, log, command, timeout)
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


def _wait_until_ready(server: Server, ready: str, log: object, command: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(server.url + ready, timeout=5).status_code == 200:
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
