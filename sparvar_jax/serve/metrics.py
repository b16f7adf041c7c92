"""What a server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PICTURES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server; several may live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._answers = Counter(
            "sparvar_requests", "Requests for pictures by status.", ["status"], registry=registry
        )
        self._pictures = Counter(
            "sparvar_pictures", "Pictures drawn by plan.", ["plan"], registry=registry
        )
        self._batch = Histogram(
            "sparvar_batch_pictures", "Pictures of a batch.", buckets=PICTURES, registry=registry
        )
        self._queued = Histogram(
            "sparvar_queue_seconds",
            "Seconds of a picture in the queue.",
            buckets=SECONDS,
            registry=registry,
        )
        self._drawn = Histogram(
            "sparvar_draw_seconds",
            "Seconds of a batch until its pictures are on the host.",
            buckets=SECONDS,
            registry=registry,
        )
        self._waiting = Gauge("sparvar_waiting", "Pictures in the queue.", registry=registry)
        self._drawing = Gauge("sparvar_drawing", "Pictures being drawn.", registry=registry)

    def watch(self, batcher: Any) -> None:
        """Show the queue of a batcher."""
        self._waiting.set_function(lambda: batcher.waiting)
        self._drawing.set_function(lambda: batcher.drawing)

    def answered(self, status: int | str) -> None:
        """A request ended: with a status, or because its client has gone."""
        self._answers.labels(status=str(status)).inc()

    def begun(self, tickets: Sequence[Any], now: float | None = None) -> None:
        """A batch leaves the queue."""
        now = time.perf_counter() if now is None else now
        self._batch.observe(len(tickets))
        for ticket in tickets:
            self._queued.observe(now - ticket.since)

    def drawn(self, tickets: Sequence[Any], seconds: float) -> None:
        """A batch is on the host."""
        self._drawn.observe(seconds)
        self._pictures.labels(plan=tickets[0].bucket.plan).inc(len(tickets))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
