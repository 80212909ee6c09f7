"""`gemify bench peers`: the same chats and texts to `gemify serve` and to what one would run in its place.

    gemify                   gemify serve, chats and embeddings
    llama.cpp                its own server on a GGUF file, chats and embeddings (mean of the last layer)
    sentence-transformers    an embedding server of another encoder

Each is a process of its own on the same cores, started anew in each round, in turn. Figures are medians of the rounds.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from gemify.bench.serve import MemoryWatch, Request, Server, running, send_timed, traffic
from gemify.bench.timing import Report, make_report, plot_rows, rows_table, run_in_turn
from gemify.model.base import starter_gguf

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LLAMA_CPP_SERVER = str(Path(__file__).with_name("llama_cpp_server.py"))


@dataclass(frozen=True)
class Peer:
    """A server to compare."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python, without the port."""
    python: str = sys.executable
    ready: str = "/ready"
    """Route that answers 200 once it serves."""
    chats: bool = True


def list_peers(
    model: str,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    llama_cpp: str | None = None,
    gguf: Path | None = None,
    encoder: str | None = None,
    clients: int = 16,
) -> list[Peer]:
    """The servers to compare.

    Args:
        model: A GEM or a base, as `gemify serve` takes it.
        dtype: Of our weights.
        quantize: Bits of our weights.
        llama_cpp: Interpreter of an environment with xllamacpp. None: without llama.cpp.
        gguf: File for llama.cpp. None: the starter's.
        encoder: Directory or name of a sentence-transformers model. None: without one.
        clients: Slots of llama.cpp.

    Raises:
        ValueError: There is no such file or interpreter.
    """
    ours = ["gemify", "serve", "--model", model, "--dtype", dtype, "--served-model-name", "bench"]
    peers = [Peer("gemify", ("-m", *ours, "--quantize", quantize))]
    if llama_cpp is not None:
        if shutil.which(llama_cpp) is None:
            raise ValueError(f"{llama_cpp} is no interpreter: give --llama-cpp one with xllamacpp")
        gguf = gguf or starter_gguf()
        if gguf is None or not gguf.is_file():
            raise ValueError(f"llama.cpp needs a GGUF file, and got {gguf}: give --gguf")
        command = (_LLAMA_CPP_SERVER, "--gguf", str(gguf), "--slots", str(clients))
        peers.append(Peer("llama.cpp", command, python=llama_cpp, ready="/health"))
    if encoder is not None:
        server = ("-m", "gemify.bench.encoder_server", "--encoder", encoder, "--dtype", "float32")
        peers.append(Peer("sentence-transformers", server, chats=False))
    return peers


def bench_peers(
    peers: Sequence[Peer],
    *,
    requests: int = 64,
    clients: int = 16,
    max_tokens: int = 48,
    threads: int | None = None,
    rounds: int = 2,
    show_progress_bar: bool = True,
) -> Report:
    """Start each server in turn, and send it one chat at a time, ``clients`` chats at a time, texts, and all mixed."""
    threads = threads or torch.get_num_threads()
    sent = traffic(requests, max_tokens=max_tokens)
    chats, texts = ([r for r in sent if r.kind == kind] for kind in ("chat", "embed"))
    if not chats or not texts:
        raise ValueError(f"{requests} requests hold no {'embedding' if chats else 'chat'}: send more")
    runs = run_in_turn(
        {p.name: lambda _, p=p: _measure(p, chats, texts, clients, threads) for p in peers},  # type: ignore[misc]
        rounds=rounds,
        description="peers",
        show_progress_bar=show_progress_bar,
    )
    rows = [
        {"name": name, **{key: statistics.median(r[key] for r in run.results) for key in run.results[0]}}
        for name, run in runs.items()
    ]
    settings = {"requests": requests, "clients": clients, "max_tokens": max_tokens, "threads": threads}
    commands = {peer.name: list(peer.command) for peer in peers}
    return make_report(
        {**settings, "rounds": rounds, "commands": commands}, rows, runs={n: r.results for n, r in runs.items()}
    )


def _measure(
    peer: Peer, chats: Sequence[Request], texts: Sequence[Request], clients: int, threads: int
) -> dict[str, float]:
    start = time.perf_counter()
    with running(peer.command, python=peer.python, threads=threads, ready=peer.ready) as server:
        figures = {"start_seconds": time.perf_counter() - start, "start_cpu_seconds": _cpu_seconds(server)}
        with MemoryWatch([server]) as memory:
            if peer.chats:
                one, many = chats[: max(1, len(chats) // 4)], chats
                figures["one_stream"] = _rate(server, one, 1)
                figures["streams"] = _rate(server, many, clients)
            figures["embedded"] = _rate(server, texts, clients)
            if peer.chats:
                mixed = random.Random(0).sample([*chats, *texts], len(chats) + len(texts))
                seconds, _ = asyncio.run(send_timed(mixed, (server.url, server.url), clients))
                figures["mixed"] = len(mixed) / seconds
    return {**figures, "peak_memory_mb": memory.peak / 1e6}


def _cpu_seconds(server: Server) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def _rate(server: Server, requests: Sequence[Request], clients: int) -> float:
    """Tokens a second, after one request of warm-up."""
    urls = server.url, server.url
    asyncio.run(send_timed(requests[:1], urls, 1))
    seconds, replies = asyncio.run(send_timed(requests, urls, clients))
    return sum(reply.tokens for reply in replies) / seconds


COLUMNS = {
    "name": ("server", ""),
    "start_seconds": ("start (s)", ".1f"),
    "start_cpu_seconds": ("start, processor (s)", ".1f"),
    "one_stream": ("one stream (tokens/s)", ".1f"),
    "streams": ("all streams (tokens/s)", ".1f"),
    "embedded": ("embedding (tokens/s)", ",.0f"),
    "mixed": ("mixed (requests/s)", ".2f"),
    "peak_memory_mb": ("peak memory (MB)", ",.0f"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    return rows_table(report["rows"], COLUMNS)


def plot(report: Report, key: str = "embedded") -> Figure:
    """A bar for each server, and its rounds as points."""
    rows = [row for row in report["rows"] if key in row]
    return plot_rows(
        {**report, "rows": rows},
        key,
        COLUMNS[key][0],
        points=lambda row: [run[key] for run in report["runs"][row["name"]]],
    )
