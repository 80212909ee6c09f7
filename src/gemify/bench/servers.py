"""Servers as processes of their own: started, waited for, their memory watched, stopped."""

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

    def bytes_held(self) -> int:
        """Memory of its own, and its part of what it shares with other processes (PSS; RSS where that is unknown)."""
        watched = psutil.Process(self.process.pid)
        try:
            memory: Any = watched.memory_full_info()
        except psutil.AccessDenied:
            memory = watched.memory_info()
        return int(getattr(memory, "pss", memory.rss))


@contextlib.contextmanager
def running(arguments: Sequence[str], *, threads: int | None = None, timeout: float = 300.0) -> Iterator[Server]:
    """``python -m <arguments> --port N``, ready to answer. ``threads``: of its arithmetic."""
    port = _free_port()
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", *arguments, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"http://127.0.0.1:{port}", process, "")
        try:
            _wait(server, log, command, timeout)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class MemoryWatch:
    """The most memory that some servers hold together, looked at twice a second."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.peak = 0
        self.seen: list[int] = []
        self._servers, self._end = servers, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.seen.append(sum(server.bytes_held() for server in self._servers))
            self.peak = max(self.peak, self.seen[-1])
            if self._end.wait(0.5):
                return


def _wait(server: Server, log: object, command: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    said: bytes = log.read()  # type: ignore[attr-defined]
    last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing said"]
    raise ValueError(f"the server did not start ({' '.join(command[1:])}): {last[0]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
