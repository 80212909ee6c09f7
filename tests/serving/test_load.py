"""Mixed load on a server of its own process: nothing lost, nothing wrong, memory flat."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from load_mix import Answer, Call, mix, send, wrong

import tiny_models
from gemify import GemModel
from gemify.bench.serve import MemoryWatch, Server, running
from running_server import Served, serving
from tiny_gems import make_gem

TUNES: dict[str, dict[str, Any]] = {
    "gated": {"special_tokens": 2},
    "embedding_lora": {"special_tokens": 0, "attention": "bidirectional"},
}


def idle_stats(server: Server) -> dict[str, Any]:
    """The statistics once nothing runs any more."""
    for _ in range(600):
        stats: dict[str, Any] = httpx.get(f"{server.url}/v1/stats", timeout=60).json()
        running_or_waiting = [stats[name] for name in ("num_running_seqs", "num_waiting_seqs", "num_waiting_texts")]
        if not any(running_or_waiting) and stats["num_running_requests"] == 1:  # this one
            return stats
        time.sleep(0.1)
    raise AssertionError(f"something runs for ever: {stats}")


def require_right(
    gem: GemModel, alone: Served, server: Server, calls: Sequence[Call], answers: Sequence[Answer | str], before: Any
) -> None:
    """Fail if a call was answered wrongly, or if the engine's books do not balance."""
    kinds = collections.Counter(call.kind for call in calls)
    guided = [a for c, a in zip(calls, answers, strict=True) if c.kind in ("structured", "tools")]
    finished = sum(isinstance(answer, Answer) and answer.finished for answer in guided)
    print(f"\n{dict(kinds)}; {finished} of {len(guided)} guided answers ended by themselves", flush=True)
    assert list(wrong(gem, alone, calls, answers)) == []
    assert finished > 0.8 * len(guided)
    after = idle_stats(server)
    ended = {name: after[name] - before[name] for name in ("finished_seqs", "cancelled_requests", "failed_requests")}
    assert ended["failed_requests"] == 0
    assert ended["finished_seqs"] + ended["cancelled_requests"] == len(calls) - kinds["embed"] - kinds["rerank"]


@pytest.mark.parametrize("tune", TUNES)
def test_a_mixed_load_is_answered_right(tmp_path: Path, one_thread: None, tune: str) -> None:
    gem = make_gem(tiny_models.save(tmp_path / "base"), tune=tune, **TUNES[tune])
    gem.save_pretrained(tmp_path / "gem")
    spaces = {str(gem.tokenizer(c, add_special_tokens=False)["input_ids"][-1]): -100 for c in " \n\t\r"}
    calls = mix(250, max_tokens=10, guided_tokens=250, options={"logit_bias": spaces})
    with (
        running(["-m", "gemify", "serve", "--model", str(tmp_path / "gem")], threads=1) as server,
        serving(gem, engine={"prefix_cache_bytes": 0}) as alone,
    ):
        before = idle_stats(server)
        answers = asyncio.run(send(calls, server.url, clients=32))
        require_right(gem, alone, server, calls, answers, before)


@pytest.mark.long
@pytest.mark.real
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["starter", "starter-gated"])
def test_2000_requests_from_32_clients(name: str, starter: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "guided_tokens": 80, "options": {}}
    calls = mix(2000, **options)
    with running(["-m", "gemify", "serve", "--model", name]) as server:
        asyncio.run(send(mix(64, seed=1, **options), server.url, clients=32))
        before = idle_stats(server)
        with MemoryWatch([server]) as memory:
            start = time.perf_counter()
            answers = asyncio.run(send(calls, server.url, clients=32))
            print(f"\n{len(answers)} requests in {time.perf_counter() - start:.0f} s", flush=True)
        quarter = len(memory.seen) // 4
        early, late = max(memory.seen[quarter : 2 * quarter]), max(memory.seen[-quarter:])
        print(f"memory after a quarter {early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB", flush=True)
        gem = GemModel.from_pretrained(name)
        with serving(gem, engine={"prefix_cache_bytes": 0}) as alone:
            require_right(gem, alone, server, calls, answers, before)
    assert late < 1.05 * early
