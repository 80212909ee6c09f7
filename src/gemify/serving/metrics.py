"""Metrics for Prometheus: what the server and the engine count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gemify.engine.engine import EngineStats

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
        self._seconds = Histogram(
            "gemify_http_request_seconds",
            "From a request to the end of its response.",
            ["route"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "gemify_time_to_first_token_seconds",
            "From a prompt to the first token of its answer.",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._in_flight = Gauge("gemify_http_requests_in_flight", "Requests being answered.", registry=registry)
        self.in_flight_now = 0
        """Requests being answered."""
        registry.register(_EngineCollector(stats))

    def start_request(self) -> None:
        """Count a request that has arrived."""
        self.in_flight_now += 1
        self._in_flight.set(self.in_flight_now)

    def finish_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self.in_flight_now -= 1
        self._in_flight.set(self.in_flight_now)
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

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
