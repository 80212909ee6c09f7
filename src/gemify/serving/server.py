"""The process: a socket, a model, uvicorn, and a graceful shutdown.

SIGTERM or SIGINT: /ready answers 503; after ``drain_seconds`` no more connections are accepted; accepted requests are
answered; the exit code is 0. A second signal ends the process at once.

HTTP connections are uvicorn's, with timeouts for slow clients and OpenAI's error body. `HttpProtocol` builds on private
members of uvicorn, so pyproject.toml allows tested versions only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemify.engine.engine import Engine
from gemify.serving.app import create_app
from gemify.serving.auth import KeyRing
from gemify.serving.errors import error_body
from gemify.serving.middleware import set_up_logs
from gemify.serving.rag import kv_store_of
from gemify.serving.settings import KEYS_VARIABLE, ServerSettings
from gemify.serving.state import AppState

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.retrieval.index import GemIndex

CLIENT_TIMEOUT_S = 30.0
"""Seconds in which a client must have sent a request's head, or must have read some of what waits for it."""
_SHUTDOWN_GRACE_S = 1.0
"""Seconds in which an idle connection may send one more request after the shutdown has begun."""
_HANDSHAKE_S = 5.0
"""Seconds in which a connection of the backlog must have shaken hands (TLS) after the shutdown has begun."""


class HttpProtocol(H11Protocol):
    """One client's connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _shutting_down = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        if self._shutting_down and self._is_answering:
            self.cycle.keep_alive = False
        if self._is_answering:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start watching whether the client reads what waits for it."""
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        """Stop watching: the client has read enough."""
        self._stop_read_timer()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close after the response under way. An idle connection gets a moment: its request may be on the way."""
        if self._is_answering or self.transport.is_closing():
            super().shutdown()
            return
        self._shutting_down = True
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_SHUTDOWN_GRACE_S, self._close_idle)

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not HTTP, unless a response is under way."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.close()
            return
        body = error_body(400, "this is not a valid HTTP request", code="invalid_http")
        headers: Any = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"connection", b"close"),
        ]
        if self._is_answering and self.cycle.response_started:
            self.transport.close()
            return
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self._is_answering:  # its body has ended early
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(CLIENT_TIMEOUT_S, self._close_idle)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_read_timer(self) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(
            CLIENT_TIMEOUT_S, self._check_read, self.transport.get_write_buffer_size()
        )

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _check_read(self, before: int) -> None:
        """Abort the connection if nothing was read. Closing would wait for the client, and the shutdown with it."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._start_read_timer()

    def _close_idle(self) -> None:
        self._head_timer = None
        if not self._is_answering:
            self.transport.close()


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
    for uri in settings.stores.values() or (None,):
        kv_store_of(settings, uri)
    with listen(settings) as listener:
        gem = _load(settings)
        indexes = _open_indexes(settings, gem)
        set_up_logs(log_prompts=settings.log_prompts)
        engine = Engine(
            gem,
            max_num_seqs=settings.max_num_seqs,
            max_queue_size=settings.max_queue_size,
            prefix_cache_bytes=settings.prefix_cache_bytes,
            kv_cache_bytes=settings.kv_cache_bytes,
        )
        app = create_app(engine, settings, indexes, keys=keys)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        scheme = "http" if settings.ssl_certfile is None else "https"
        logger.info(f"serving {settings.model_names[0]} at {scheme}://{shown}:{port}{settings.root_path}")
        Server(app).run(sockets=[listener])


def require_keys(settings: ServerSettings, keys: KeyRing) -> None:
    """Raise ValueError if other machines could use the server without a key, or a key that may upload is not there."""
    for name in settings.upload_key:
        if name not in keys:
            raise ValueError(f"--upload-key {name}: there is no API key of this name in --api-keys or {KEYS_VARIABLE}")
    if not settings.is_local and not len(keys) and not settings.allow_no_key:
        raise ValueError(
            f"--host {settings.host} lets other machines in and there are no API keys: give --api-keys FILE or"
            f" {KEYS_VARIABLE}, or say --allow-no-key"
        )


def require_certificate(settings: ServerSettings) -> None:
    """Raise ValueError or OSError if the files for TLS do not serve."""
    if settings.ssl_certfile is None:
        return
    for path in (settings.ssl_certfile, settings.ssl_keyfile or settings.ssl_certfile):
        path.read_bytes()  # OpenSSL's errors name no file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=lambda: "")
    except ssl.SSLError as error:
        key = settings.ssl_keyfile or settings.ssl_certfile
        raise ValueError(
            f"{settings.ssl_certfile} and {key} are no certificate and its unencrypted key in PEM:"
            f" {(error.reason or str(error)).lower().replace('_', ' ')}"
        ) from error


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
        settings: ServerSettings = app.state.gemify.settings
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
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
        ending = asyncio.create_task(self._abort_in_time())
        await asyncio.gather(*map(self._accept, waiting), return_exceptions=True)  # some are gone again
        await asyncio.sleep(0.05)  # those that were accepted a moment ago become connections
        await super().shutdown(sockets)
        ending.cancel()

    async def _accept(self, peer: socket.socket) -> None:
        """Serve a connection of the backlog. One that does not shake hands is given up."""
        peer.setblocking(False)
        tls: dict[str, Any] = {}
        if self.config.ssl is not None:
            tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": _HANDSHAKE_S}
        await asyncio.get_running_loop().connect_accepted_socket(self._connect, peer, **tls)

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
    loading["quantize"] = settings.quantize
    if settings.dtype is not None:
        loading["dtype"] = settings.dtype
    return GemModel.from_pretrained(settings.model, base=settings.base, max_length=settings.max_length, **loading)  # type: ignore[arg-type]


def _open_indexes(settings: ServerSettings, gem: GemModel) -> dict[str, GemIndex]:
    from gemify.retrieval.index import GemIndex

    return {name: GemIndex.open(uri, gem, create=False) for name, uri in settings.stores.items()}
