"""`gemify bench serve`: one server for chat and embeddings, against one job at a time and against two servers.

    one                gemify serve: chats and embeddings, mixed
    chat alone         the same server, the chats of the same traffic
    embeddings alone   the same server, its embeddings
    two                gemify serve for the chats, an embedding server beside it: the same model, or another encoder

All get the same requests in turn on the same cores. Two servers get half the threads each, as two that took all would
compete for them. Figures are medians of the rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemify.bench.servers import MemoryWatch, Reply, Request, Server, running, send, traffic
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
        command = ["gemify", "serve", "--model", self.model, "--dtype", self.dtype, "--served-model-name", "bench"]
        return command + ([] if self.base is None else ["--base", self.base])

    def encoder_command(self) -> list[str]:
        """Arguments of the second server."""
        if self.encoder is None:
            return self.gem_command()
        return ["gemify.bench.encoder_server", "--encoder", self.encoder]


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
        seconds, replies = asyncio.run(_send_timed(requests, urls, clients))
    if failed := [reply for reply in replies if reply.error]:
        raise ValueError(f"{len(failed)} of {len(replies)} requests failed, the first: {failed[0].error}")
    return {"seconds": seconds, "peak_memory_mb": memory.peak / 1e6, **_figures(replies, seconds)}


async def _send_timed(requests: Sequence[Request], urls: tuple[str, str], clients: int) -> tuple[float, list[Reply]]:
    loop = asyncio.get_running_loop()
    start = loop.time()
    replies = await send(requests, *urls, clients=clients)
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
