"""GET /metrics: what the server and the engine count, in Prometheus' words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_GAUGES = frozenset({"alive", "num_running_seqs", "num_waiting_seqs", "num_waiting_texts", "prefix_cache_bytes"})


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("gemify_http_requests", "Requests answered.", ["route", "method", "status"], **made)
        self._seconds = Histogram(
            "gemify_http_request_seconds", "From a request to its answer's end.", ["route"], buckets=_SECONDS, **made
        )
        self.first_token = Histogram(
            "gemify_first_token_seconds", "From a prompt to the first of its answer.", buckets=_SECONDS, **made
        )
        self.in_flight = Gauge("gemify_http_requests_in_flight", "Requests being answered.", **made)
        self.in_flight_now = 0
        self._registry.register(_EngineCounts(stats))

    def start_request(self) -> None:
        self.in_flight_now += 1
        self.in_flight.set(self.in_flight_now)

    def finish_request(self, route: str, method: str, status: int, seconds: float) -> None:
        self.in_flight_now -= 1
        self.in_flight.set(self.in_flight_now)
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCounts(Collector):
    """The engine's own numbers, read when asked for."""

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, value in plain_stats(self._stats()).items():
            said = name.replace("_", " ")
            if isinstance(value, dict):
                family = CounterMetricFamily(f"gemify_engine_{name}", f"The engine's {said}.", labels=["kind"])
                for kind, number in value.items():
                    family.add_metric([str(kind)], float(number))
                yield family
            elif name in _GAUGES:
                yield GaugeMetricFamily(f"gemify_engine_{name}", f"The engine's {said}.", value=float(value))
            else:
                yield CounterMetricFamily(f"gemify_engine_{name}", f"The engine's {said}.", value=float(value))


def plain_stats(stats: Any) -> dict[str, Any]:
    """The engine's statistics as plain numbers, and objects of them."""
    return {
        name: value for name, value in dataclasses.asdict(stats).items() if isinstance(value, bool | int | float | dict)
    }
