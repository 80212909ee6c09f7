"""``gemify bench serve``: one server for both jobs, against one job at a time, and against two servers.

    one          gemify serve: chats and embeddings, mixed
    chat alone   the same server, the chats of the same traffic      (single-job)
    embed alone  the same server, its embeddings
    two          gemify serve for the chats, an embedding server beside it: the same model again, or another encoder

All get the same requests, in rounds (one, alone, two, one, alone, two), on the same cores; two servers get half the
threads each, as two that took all would fight for them. Figures are medians of the rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from gemify.bench.servers import MemoryWatch, Server, running
from gemify.bench.traffic import Reply, Request, send, traffic

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Setup:
    """The servers under comparison."""

    model: str = "starter"
    dtype: str = "float32"
    encoder: str | None = None
    """A sentence-transformers model as the second server; None: the same GEM once more."""
    base: str | None = None

    def serve(self) -> list[str]:
        command = ["gemify", "serve", "--model", self.model, "--dtype", self.dtype, "--served-model-name", "bench"]
        return command + ([] if self.base is None else ["--base", self.base])

    def embed(self) -> list[str]:
        if self.encoder is None:
            return self.serve()
        return ["gemify.bench.encoder_server", "--encoder", self.encoder]


def bench_serve(
    setup: Setup,
    *,
    requests: int = 200,
    clients: int = 16,
    max_tokens: int = 24,
    rounds: int = 2,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """The record: a row of figures for each set-up, and the ratios between them."""
    mixed = traffic(requests, max_tokens=max_tokens)
    alone = {kind: [r for r in mixed if r.kind == kind] for kind in ("chat", "embed")}
    for kind, kept in alone.items():
        if not kept:
            raise ValueError(f"there is no {kind} among {requests} requests: send more")
    plan: list[tuple[str, bool, Sequence[Request]]] = [
        ("one", False, mixed),
        ("chat alone", False, alone["chat"]),
        ("embed alone", False, alone["embed"]),
        ("two", True, mixed),
    ]
    seen: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in plan}
    bar = tqdm(total=rounds * len(plan), desc="serve", unit="load", disable=not show_progress_bar)
    for _ in range(rounds):
        for name, apart, some in plan:
            with _servers(setup, apart=apart) as servers:
                seen[name].append(_load(servers, some, clients))
            bar.update()
    bar.close()
    rows = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in seen.items()}
    one, two = rows["one"], rows["two"]
    ratios = {
        "memory, one / two": one["peak_bytes"] / two["peak_bytes"],
        "requests a second, one / two": one["requests_per_second"] / two["requests_per_second"],
        "seconds, one / chat alone + embed alone": one["seconds"]
        / (rows["chat alone"]["seconds"] + rows["embed alone"]["seconds"]),
    }
    settings = {**vars(setup), "requests": requests, "clients": clients, "max_tokens": max_tokens, "rounds": rounds}
    return {"settings": settings | {"threads": torch.get_num_threads()}, "rows": rows, "ratios": ratios, "runs": seen}


@contextlib.contextmanager
def _servers(setup: Setup, *, apart: bool) -> Iterator[list[Server]]:
    """The server of chats, and that of embeddings (the same, or another)."""
    with contextlib.ExitStack() as stack:
        threads = max(1, torch.get_num_threads() // 2) if apart else None
        servers = [stack.enter_context(running(setup.serve(), threads=threads))]
        if apart:
            servers.append(stack.enter_context(running(setup.embed(), threads=threads)))
        yield servers


def _load(servers: Sequence[Server], requests: Sequence[Request], clients: int) -> dict[str, float]:
    urls = servers[0].url, servers[-1].url
    warm = [r for kind in ("chat", "embed") for r in [next((r for r in requests if r.kind == kind), None)] if r]
    asyncio.run(send(warm, *urls, clients=1))
    with MemoryWatch(servers) as memory:
        seconds, replies = asyncio.run(_timed(requests, urls, clients))
    if failed := [reply for reply in replies if reply.error]:
        raise ValueError(f"{len(failed)} of {len(replies)} requests failed, the first: {failed[0].error}")
    return {"seconds": seconds, "peak_bytes": float(memory.peak)} | _figures(replies, seconds)


async def _timed(requests: Sequence[Request], urls: tuple[str, str], clients: int) -> tuple[float, list[Reply]]:
    loop = asyncio.get_running_loop()
    start = loop.time()
    replies = await send(requests, *urls, clients=clients)
    return loop.time() - start, replies


def _figures(replies: Sequence[Reply], seconds: float) -> dict[str, float]:
    chats = [reply for reply in replies if reply.request.kind == "chat"]
    embeds = [reply for reply in replies if reply.request.kind == "embed"]
    figures = {
        "requests_per_second": len(replies) / seconds,
        "written_tokens_per_second": sum(reply.tokens for reply in chats) / seconds,
        "embedded_tokens_per_second": sum(reply.tokens for reply in embeds) / seconds,
    }
    for name, values in (
        ("first_token", [reply.first for reply in chats]),
        ("embedding", [reply.total for reply in embeds]),
    ):
        for p in _PERCENTILES:
            figures[f"{name}_p{p}"] = _percentile(values, p)
    return figures


def _percentile(values: Sequence[float], p: int) -> float:
    """The smallest value that ``p`` percent do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)] if ordered else 0.0


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "| | seconds | requests/s | tokens/s written | tokens/s embedded | first token p50/p95/p99 (s)"
        " | embedding p50/p95/p99 (s) | peak memory (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        first, embedding = (
            "/".join(f"{row[f'{kind}_p{p}']:.2f}" for p in _PERCENTILES) for kind in ("first_token", "embedding")
        )
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['requests_per_second']:.2f}"
            f" | {row['written_tokens_per_second']:.1f} | {row['embedded_tokens_per_second']:.1f}"
            f" | {first} | {embedding} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join([*lines, "", *(f"{name}: {ratio:.2f}" for name, ratio in report["ratios"].items())])
