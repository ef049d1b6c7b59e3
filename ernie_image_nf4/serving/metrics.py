"""What ``/metrics`` tells, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "ernie_image_"
SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one engine, in a registry of their own.

    Attributes:
        registry: With all of them.
        pictures: Pictures drawn.
        restarts: Workers that died.
        waiting: Pictures that wait.
        batch_sizes: Pictures that were drawn together.
        seconds: From a request's arrival to its last picture.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}requests", "Requests by what became of them", ["outcome"], registry=self.registry
        )
        self.pictures = Counter(f"{PREFIX}pictures", "Pictures drawn", registry=self.registry)
        self.restarts = Counter(f"{PREFIX}worker_deaths", "Workers that died", registry=self.registry)
        self.waiting = Gauge(f"{PREFIX}waiting_pictures", "Pictures that wait", registry=self.registry)
        self.batch_sizes = Histogram(
            f"{PREFIX}batch_size", "Pictures drawn together", buckets=range(1, 9), registry=self.registry
        )
        self.seconds = Histogram(
            f"{PREFIX}request_seconds", "Arrival to last picture", buckets=SECONDS, registry=self.registry
        )

    def finished(self, outcome: str) -> None:
        """Count a request: ``drawn``, ``dropped``, or the name of its error."""
        self._requests.labels(outcome).inc()
