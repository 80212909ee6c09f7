"""Servers as processes: start them, wait until they are ready, watch their memory, stop them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
