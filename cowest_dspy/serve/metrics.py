"""What a server counts, as Prometheus reads it at /metrics. No text of a request is in it, and no
label has open ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from cowest_dspy.serve.asking import Answer
from cowest_dspy.serve.breaker import Breaker, State
from cowest_dspy.serve.protocol import Failing

Closed = Literal["late", "displaced", "refused", "unreadable"]
"""Why a connection was closed by the server before its time (connections.py)."""
CODES: Mapping[State, int] = {"closed": 0, "open": 1, "on trial": 2}


class Metrics:
    """The counters of one server, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self._registry}
        buckets = (
            0.005,
            0.01,
            0.025,
            0.05,
            0.1,
            0.25,
            0.5,
            1,
            2.5,
            5,
            10,
            30,
            60,
            120,
            float("inf"),
        )
        self._requests = Counter(
            "cowest_requests", "Chat requests by the HTTP status of their answer", ["status"], **of
        )
        self._seconds = Histogram(
            "cowest_request_seconds",
            "From a chat request's arrival to its answer",
            buckets=buckets,
            **of,
        )
        self._routes = Counter(
            "cowest_routes",
            "Answers by who gave them, and by the fallback",
            ["route", "fallback"],
            **of,
        )
        self._failures = Counter(
            "cowest_model_failures", "Models that gave no usable answer", ["role", "kind"], **of
        )
        self._tokens = Counter(
            "cowest_tokens", "Tokens by model and direction", ["role", "direction"], **of
        )
        self._gone = Counter(
            "cowest_gone", "Requests whose client went away before the answer", **of
        )
        self._sampled = Counter("cowest_sampled", "Live traces: kept, or lost", ["what"], **of)
        self._active = Gauge("cowest_active", "Requests that models are asked for now", **of)
        self._waiting = Gauge("cowest_waiting", "Requests that wait for their turn", **of)
        self._breaker = Gauge("cowest_breaker", "0: closed, 1: open, 2: on trial", ["role"], **of)
        self._connections = Gauge("cowest_connections", "Connections that are open", **of)
        self._closed = Counter(
            "cowest_connections_closed",
            "Connections that the server closed before their time",
            ["why"],
            **of,
        )
        ProcessCollector(**of)

    def watch(
        self,
        active: Callable[[], int],
        waiting: Callable[[], int],
        breakers: Mapping[Failing, Breaker],
    ) -> None:
        """Reads these when it is asked."""
        self._active.set_function(active)
        self._waiting.set_function(waiting)
        for role, breaker in breakers.items():
            self._breaker.labels(role).set_function(lambda breaker=breaker: CODES[breaker.state])

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Reads the number of open connections when it is asked."""
        self._connections.set_function(count)

    def closed(self, why: Closed) -> None:
        """The server closed a connection before its time."""
        self._closed.labels(why).inc()

    def ended(self, status: int, seconds: float) -> None:
        """A chat request was answered."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Who gave an answer, what it took, and which model failed on the way."""
        self._routes.labels(answer.route, answer.fallback or "none").inc()
        for role, kind in answer.failed.items():
            self._failures.labels(role, kind).inc()
        for name, count in answer.tokens.items():
            role, _, direction = name.partition("_")
            self._tokens.labels(role, direction).inc(count)

    def failed(self, role: Failing, kind: str) -> None:
        """A model failed, and there was no answer."""
        self._failures.labels(role, kind).inc()

    def gone(self) -> None:
        """A client did not wait for its answer."""
        self._gone.inc()

    def sampled(self, what: str) -> None:
        """A live trace was "kept" or "lost"."""
        self._sampled.labels(what).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
