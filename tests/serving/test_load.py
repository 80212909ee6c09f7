"""Mixed load on a server of its own process: nothing lost, nothing wrong, memory flat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from gemify import GemModel
from gemify.bench.serve import MemoryWatch, Reply, Request, Server, running, send, traffic
from tiny_gems import make_gem


def wrong(gem: GemModel, replies: list[Reply]) -> list[str]:
    """What differs from the library's own answers and embeddings."""
    found = [f"{reply.request}: {reply.error}" for reply in replies if reply.error]
    answers: dict[Request, str] = {}
    for reply in replies:
        if reply.request.kind == "chat" and not reply.error:
            if reply.request not in answers:
                messages = [{"role": "user", "content": reply.request.texts[0]}]
                answers[reply.request] = gem.chat(messages, max_new_tokens=reply.request.max_tokens, do_sample=False)
            if reply.answer != answers[reply.request]:
                found.append(f"{reply.request}: {reply.answer!r} is not {answers[reply.request]!r}")
    embedded = [reply for reply in replies if reply.request.kind == "embed" and not reply.error]
    texts = sorted({text for reply in embedded for text in reply.request.texts})
    vectors = dict(zip(texts, gem.encode(texts, normalize_embeddings=True), strict=True))
    for reply in embedded:
        expected = np.stack([vectors[text] for text in reply.request.texts])
        if not np.allclose(reply.vectors, expected, atol=1e-5):
            found.append(f"{reply.request}: off by {np.abs(np.asarray(reply.vectors) - expected).max():.1e}")
    return found


@pytest.fixture(scope="module")
def tiny_gem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GemModel]:
    directory = tmp_path_factory.mktemp("load")
    gem = make_gem(tiny_models.save(directory / "base"), special_tokens=2)
    gem.save_pretrained(directory / "gem")
    return directory / "gem", gem


@pytest.fixture(scope="module")
def tiny_server(tiny_gem: tuple[Path, GemModel]) -> Iterator[Server]:
    command = ["gemify", "serve", "--model", str(tiny_gem[0]), "--served-model-name", "bench"]
    with running(command, threads=1) as server:
        yield server


def test_a_mixed_load_is_answered_right(tiny_server: Server, tiny_gem: tuple[Path, GemModel]) -> None:
    sent = traffic(300, max_tokens=10)
    replies = asyncio.run(send(sent, tiny_server.url, tiny_server.url, clients=32))
    assert len(replies) == 300
    assert wrong(tiny_gem[1], replies) == []


@pytest.mark.long
@pytest.mark.real
@pytest.mark.timeout(3600)
def test_2000_requests_from_32_clients(shipped: GemModel) -> None:
    with running(["gemify", "serve", "--model", "starter", "--served-model-name", "bench"]) as server:
        asyncio.run(send(traffic(64, max_tokens=16, seed=1), server.url, server.url, clients=32))
        with MemoryWatch([server]) as memory:
            start = time.perf_counter()
            replies = asyncio.run(send(traffic(2000, max_tokens=16), server.url, server.url, clients=32))
            print(f"\n{len(replies)} requests in {time.perf_counter() - start:.0f} s", flush=True)
    quarter = len(memory.seen) // 4
    early, late = max(memory.seen[quarter : 2 * quarter]), max(memory.seen[-quarter:])
    print(f"memory after a quarter {early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB")
    assert len(replies) == 2000
    assert wrong(shipped, replies) == []
    assert late < 1.05 * early
