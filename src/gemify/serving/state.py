"""The application's state, shared by all routes, its metrics for Prometheus, and the state of one request."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import HTTPConnection, Request

from gemify.engine.engine import EngineStats
from gemify.engine.grammar import GrammarCompiler
from gemify.retrieval.rerank import YesNoPrompts
from gemify.serving.auth import KeyRing, RateLimiter
from gemify.serving.errors import ApiError, bad_request, too_many_requests
from gemify.serving.map_cache import MapCache
from gemify.serving.protocol.requests import ApiRequest
from gemify.serving.rag import RagService, ServedStore
from gemify.serving.settings import ServerSettings
from gemify.serving.tokenization import RequestTokenizer

if TYPE_CHECKING:
    from starlette.types import Scope

    from gemify.engine.engine import Engine

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_GAUGES = frozenset({"alive", "num_running_seqs", "num_waiting_seqs", "num_waiting_texts", "prefix_cache_bytes"})


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        stats: returns the engine's statistics.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "gemify_http_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        histogram = partial(Histogram, buckets=_BUCKETS_S, registry=registry)
        self._seconds = histogram(
            "gemify_http_request_seconds", "From a request to the end of its response.", ["route"]
        )
        self.time_to_first_token = histogram(
            "gemify_time_to_first_token_seconds", "From a prompt to the first token of its answer."
        )
        self.time_per_output_token = histogram(
            "gemify_time_per_output_token_seconds", "Between two tokens of an answer, its mean."
        )
        self.queue_time = histogram(
            "gemify_request_queue_seconds", "From a prompt to its first pass through the model."
        )
        self._key_requests = Counter(
            "gemify_key_requests", "Requests answered, by the key's name.", ["key", "status"], registry=registry
        )
        self._key_tokens = Counter(
            "gemify_key_tokens", "Tokens of prompts, texts and answers, by the key's name.", ["key"], registry=registry
        )
        self._in_flight = Gauge("gemify_http_requests_in_flight", "Requests being answered.", registry=registry)
        self.in_flight_now = 0
        """Requests being answered."""
        registry.register(_EngineCollector(stats))

    def start_request(self) -> None:
        """Count a request that has arrived."""
        self.in_flight_now += 1
        self._in_flight.set(self.in_flight_now)

    def finish_request(self, route: str, method: str, status: int, seconds: float, key_name: str | None) -> None:
        """Count a request that has been answered. ``key_name`` None: it was not authorized."""
        self.in_flight_now -= 1
        self._in_flight.set(self.in_flight_now)
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if key_name is not None:
            self._key_requests.labels(key_name, str(status)).inc()

    def count_tokens(self, key_name: str, tokens: int) -> None:
        """Count tokens that a key has used."""
        self._key_tokens.labels(key_name).inc(tokens)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's statistics, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield each statistic as a gauge or a counter."""
        for name, value in dataclasses.asdict(self._stats()).items():
            family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield family(f"gemify_engine_{name}", f"The engine's {name.replace('_', ' ')}.", value=float(value))


@dataclass
class AppState:
    """The engine, the index, the settings, and what is known of the clients. `get_state` finds it."""

    engine: Engine
    settings: ServerSettings
    stores: Mapping[str, ServedStore]
    """By their names, the default one first."""
    keys: KeyRing
    rate_limiter: RateLimiter
    metrics: Metrics
    tokenizer: RequestTokenizer
    grammars: GrammarCompiler
    rag: RagService | None
    """None: no store, or no chat template."""
    maps: MapCache
    yes_no_prompts: YesNoPrompts | None
    """None: no chat template, or yes and no are the same tokens."""
    ready: bool = False
    """The model has answered once."""
    stopping: bool = False
    body_bytes: int = 0
    """Bytes of the bodies of all requests that are being answered."""
    started: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def model(self) -> str:
        """What answers call the model."""
        return self.settings.model_names[0]

    @property
    def requires_local_host(self) -> bool:
        """Whether the Host header must be a local name: without keys, a web page must not pass for a local program."""
        return self.settings.is_local and not len(self.keys) and not self.settings.allow_no_key

    def require_model(self, name: str | None) -> None:
        """Raise ApiError 404 unless the request names this server's model, or none."""
        if name is not None and name not in self.settings.model_names:
            known = ", ".join(map(repr, self.settings.model_names))
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not here: this server has {known}",
                param="model",
                code="model_not_found",
            )

    def may_upload(self, key_name: str) -> bool:
        """Whether a key may put files into the stores. Without keys nobody may."""
        return key_name in self.keys and key_name in self.settings.upload_key

    def require_store(self, name: str | None) -> ServedStore:
        """Return the store of a name, None: the first one; ApiError 404 if there is none."""
        if not self.stores:
            raise ApiError(
                404,
                "this server has no index: start it with --store DIR (`gemify index` makes one)",
                code="no_index",
            )
        if name is not None and name not in self.stores:
            known = ", ".join(map(repr, self.stores))
            raise ApiError(
                404, f"no store {name[:200]!r}: this server has {known}", param="store", code="store_not_found"
            )
        return next(iter(self.stores.values())) if name is None else self.stores[name]


@dataclass
class RequestState:
    """What the server knows of one request. `get_request_state` finds it."""

    id: str
    key_name: str | None = None
    """The name of its API key, once it is authorized."""
    body_bytes: int = 0
    ignored_fields: list[str] = field(default_factory=list)
    """Unknown fields of its body."""
    log_fields: dict[str, Any] = field(default_factory=dict)
    """What the log says of it, beside the usual."""


_SCOPE_KEY = "gemify"
_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_LISTED = 20


def get_state(connection: HTTPConnection) -> AppState:
    """Return the state of the application that serves a request."""
    state: AppState = connection.app.state.gemify
    return state


def admit(request: Request, body: ApiRequest) -> AppState:
    """Return the state of the application, for a request that names its model and has no unknown fields.

    Raises:
        ApiError: 404, another model; 400, an unknown field and the option ``strict``.
    """
    state = get_state(request)
    state.require_model(body.model)
    if unknown := [name if _FIELD.fullmatch(name) else "?" for name in body.unknown_fields[:_MAX_LISTED]]:
        if state.settings.strict:
            raise bad_request(f"{unknown[0]} is no field of this request: /openapi.json lists them", unknown[0])
        get_request_state(request.scope).ignored_fields = unknown
    return state


def set_request_state(scope: Scope, state: RequestState) -> None:
    """Keep a request's state in its scope."""
    scope[_SCOPE_KEY] = state


def get_request_state(scope: Scope) -> RequestState:
    """Return the state of a request."""
    state: RequestState = scope[_SCOPE_KEY]
    return state


def get_key_name(request: Request) -> str:
    """Return the name of the key that an authorized request came with."""
    return str(get_request_state(request.scope).key_name)


def add_log_fields(request: Request, **fields: Any) -> None:
    """Add to what the log says of a request."""
    get_request_state(request.scope).log_fields.update(fields)


def reserve_body_bytes(request: Request, size: int) -> None:
    """Count bytes of a body that is held until the request is answered; ApiError 429 if all bodies are too large."""
    state = get_state(request)
    limit = state.settings.max_bodies_bytes
    if state.body_bytes + size > limit:
        raise too_many_requests(f"the bodies of all requests hold {limit:,} bytes already: wait", 1, code="queue_full")
    state.body_bytes += size
    get_request_state(request.scope).body_bytes += size
