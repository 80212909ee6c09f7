"""vLLM's own HTTP server with gemify's route: chat and vectors from one process. Skipped where there is no vLLM."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_models import child_environment, make_saved_gem, save_base, vllm_python

from gemify import GemModel

FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 4 --block-size 32"
MORE = "--kv-cache-memory-bytes 8000000 --host 127.0.0.1 --served-model-name tiny"


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"} if data else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            text = reply.read()
            return reply.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextlib.contextmanager
def served(gem: Path, base: Path, log: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [vllm_python(), "-m", "gemify.integrations.vllm.server", str(gem), "--base", str(base)]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port), *FLAGS.split(), *MORE.split()],
            stdout=out,
            stderr=out,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                if ask(port, "/health")[0] == 200:
                    break
            time.sleep(1)
        yield port
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # the group that it was started as
        server.wait()


@pytest.fixture(scope="module")
def gem_and_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GemModel, int]]:
    vllm_python()
    home = tmp_path_factory.mktemp("served")
    base = save_base(home / "base")
    gem = make_saved_gem(base, home / "gem")
    with served(home / "gem", base, home / "log.txt") as port:
        yield gem, port


def test_one_server_chats_and_embeds(gem_and_port: tuple[GemModel, int]) -> None:
    gem, port = gem_and_port
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a cat"}], "temperature": 0, "max_tokens": 5}
    before = ask(port, "/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]
    texts = ["a cat on a mat", "", "x", "a longer text than the others"]
    status, reply = ask(port, "/v1/embeddings", {"model": "tiny", "input": texts})
    assert status == 200
    wanted = gem.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose([row["embedding"] for row in reply["data"]], wanted, atol=1e-4)
    assert reply["usage"]["prompt_tokens"] == sum(map(len, texts)) + len(texts)  # a token a byte, and a special one
    assert ask(port, "/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"] == before
    packed = {"input": "x", "encoding_format": "base64", "dimensions": 16}
    (row,) = ask(port, "/v1/embeddings", packed)[1]["data"]
    short = gem.encode(["x"], truncate_dim=16, normalize_embeddings=True)[0]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), short, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "input must be"),
        ({"input": [[1, 2]]}, "input must be"),
        ({"input": ["a", "\ud800"]}, "lone surrogate"),
        ({"input": "x", "model": "other"}, "unknown model"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format must be"),
        ({"input": "x", "dimensions": 129}, "1..128"),
        ({"input": "x", "dimensions": True}, "whole number"),
    ],
)
def test_a_wrong_body_is_refused_in_one_line(
    gem_and_port: tuple[GemModel, int], body: dict[str, Any], says: str
) -> None:
    status, reply = ask(gem_and_port[1], "/v1/embeddings", body)
    assert status == 400
    assert says in reply["error"]["message"]


def test_anything_in_a_chats_own_arguments_does_no_harm(gem_and_port: tuple[GemModel, int]) -> None:
    gem, port = gem_and_port
    for mark in ("mine", ["a", "list"], 3):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a cat"}], "max_tokens": 2}
        assert ask(port, "/v1/chat/completions", {**body, "vllm_xargs": {"gemify": mark}})[0] == 200
    reply = ask(port, "/v1/embeddings", {"input": "a cat"})[1]
    wanted = gem.encode("a cat", normalize_embeddings=True)
    np.testing.assert_allclose(reply["data"][0]["embedding"], wanted, atol=1e-4)
