"""Counters of the service in Prometheus' format; they record nothing of an upload."""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from capgen_utils.apps.serve.queueing import Done

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Observer:
    """Counters of one service.

    Args:
        waiting: returns how many images wait for the model.

    Attributes:
        registry: all counters.
        left: counts clients that disconnected before their answer.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        common: dict[str, Any] = {"namespace": "capgen", "registry": self.registry}
        self._requests = Counter(
            "requests",
            "Answers by route, method and status",
            ["route", "method", "status"],
            **common,
        )
        self._seconds = Histogram(
            "request_seconds", "Time to an answer", ["route"], buckets=_SECONDS, **common
        )
        self.left = Counter(
            "clients_left", "Clients that disconnected before their answer", **common
        )
        self._batch = Histogram(
            "batch_images", "Images per batch", buckets=(1, 2, 4, 8, 16, 32, 64), **common
        )
        self._waited = Histogram(
            "queue_seconds", "Time in the queue, per image", buckets=_SECONDS, **common
        )
        self._model = Histogram(
            "model_seconds", "Time of the model, per batch", buckets=_SECONDS, **common
        )
        Gauge("queue_images", "Images waiting", **common).set_function(waiting)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answer; ``route`` is a declared route, never a path from a client."""
        known = method if method in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ran(self, done: Sequence[Done]) -> None:
        """Count a batch."""
        self._batch.observe(len(done))
        self._model.observe(done[0].seconds)
        for each in done:
            self._waited.observe(each.waited)
