"""The process: a socket, a model, uvicorn, and a graceful shutdown.

SIGTERM or SIGINT: /ready answers 503; after ``drain_seconds`` no more connections are accepted; accepted requests are
answered; the exit code is 0. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from gemify.engine.engine import Engine
from gemify.serving.app import create_app
from gemify.serving.auth import KeyRing
from gemify.serving.http_protocol import HttpProtocol
from gemify.serving.log_format import set_up_logs
from gemify.serving.rag import kv_store_of
from gemify.serving.settings import KEYS_VARIABLE, ServerSettings
from gemify.serving.state import AppState

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.retrieval.index import GemIndex

logger = logging.getLogger("gemify.serving")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048


def serve(settings: ServerSettings) -> None:
    """Load the model and serve until a signal.

    Raises:
        ValueError: an option, the model or the index is wrong, in one line.
        OSError: a file cannot be read.
    """
    keys = KeyRing.read(settings.api_keys)
    require_keys(settings, keys)
    kv_store_of(settings)
    with listen(settings) as listener:
        gem = _load(settings)
        index = _open_index(settings, gem)
        set_up_logs(log_prompts=settings.log_prompts)
        engine = Engine(
            gem,
            max_num_seqs=settings.max_num_seqs,
            max_queue_size=settings.max_queue_size,
            prefix_cache_bytes=settings.prefix_cache_bytes,
            kv_cache_bytes=settings.kv_cache_bytes,
        )
        app = create_app(engine, settings, index, keys=keys)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logger.info(f"serving {settings.model_name} at http://{shown}:{port}")
        Server(app).run(sockets=[listener])


def require_keys(settings: ServerSettings, keys: KeyRing) -> None:
    """Raise ValueError if other machines could use the server without a key."""
    if not settings.is_local and not len(keys) and not settings.allow_no_key:
        raise ValueError(
            f"--host {settings.host} lets other machines in and there are no API keys: give --api-keys FILE or"
            f" {KEYS_VARIABLE}, or say --allow-no-key"
        )


def listen(settings: ServerSettings) -> socket.socket:
    """Open the socket. It is done before the model is loaded, so that a port in use is an error at once."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"cannot listen at {settings.host}: no such address; --host 127.0.0.1 is this machine"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"cannot listen at {settings.host}:{settings.port}: {reason}; choose another --port"
        ) from error
    return listener


class Server(uvicorn.Server):
    """Uvicorn's server, with our handling of signals.

    Args:
        app: made by `create_app`.
    """

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=30,
        )
        super().__init__(config)
        self._state: AppState = app.state.gemify
        self._stop_at: float | None = None

    async def on_tick(self, counter: int) -> bool:
        """Begin the shutdown when ``drain_seconds`` are over."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, but serve the connections in the backlog, which would be reset otherwise."""
        waiting: list[socket.socket] = []
        for listener in sockets or []:
            listener.listen(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for peer in waiting:
            peer.setblocking(False)
            with contextlib.suppress(OSError):  # gone again
                await loop.connect_accepted_socket(self._connect, peer)
        await asyncio.sleep(0.05)  # those that were accepted a moment ago become connections
        ending = asyncio.create_task(self._abort_in_time())
        await super().shutdown(sockets)
        ending.cancel()

    async def _abort_in_time(self) -> None:
        """Abort what the engine has not finished after ``stop_timeout``. Uvicorn itself waits for every response."""
        if self._state.settings.stop_timeout is not None:
            await asyncio.sleep(self._state.settings.stop_timeout)
            await asyncio.to_thread(self._state.engine.stop, timeout_s=0)

    def _connect(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self.lifespan.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, end the process at the second."""
        if self._state.stopping:
            os._exit(128 + sig)
        self._state.stopping = True
        self._stop_at = time.monotonic() + self._state.settings.drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install our handlers, and raise no signal again afterwards: a graceful shutdown has exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _load(settings: ServerSettings) -> GemModel:
    from gemify.model.gem import GemModel

    loading = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
    if settings.dtype is not None:
        loading["dtype"] = settings.dtype
    return GemModel.from_pretrained(settings.model, base=settings.base, **loading)  # type: ignore[arg-type]


def _open_index(settings: ServerSettings, gem: GemModel) -> GemIndex | None:
    if settings.store is None:
        return None
    from gemify.retrieval.index import GemIndex

    return GemIndex.open(settings.store, gem, create=False)
