"""What operators see by stage: metrics for Prometheus. No tenant, batch or well is named.

The only module that knows prometheus_client.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)

from service.observe import Observer
from service.records import Commit, Records

METRICS_TYPE = CONTENT_TYPE_LATEST
STAGES = ("queue", "decode", "preprocess", "infer", "store")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SITES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stages = Histogram(
            "anchorwell_stage_seconds",
            "Time by stage of a request's work",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sites = Histogram(
            "anchorwell_batch_sites", "Sites in one pass of the network", ["graph"], buckets=_SITES, registry=self._registry
        )
        self._requests = Counter(
            "anchorwell_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "anchorwell_request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._engine = Gauge(
            "anchorwell_engine", "What answers", ["provider", "precision", "bundle"], registry=self._registry
        )
        for stage in STAGES:
            self._stages.labels(stage)

    def stage(self, stage: str, seconds: float) -> None:
        """Count time of a stage."""
        self._stages.labels(stage).observe(seconds)

    def sites(self, graph: str, count: int) -> None:
        """Count the sites of one pass."""
        self._sites.labels(graph).observe(count)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request, by its route's template."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def engine(self, provider: str, precision: str, bundle: str) -> None:
        """Say what answers."""
        self._engine.labels(provider, precision, bundle[:12]).set(1)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer on a port of their own; gives what stops that."""
        server, thread = start_http_server(port, host, self._registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class TimedRecords:
    """``Records`` whose time is counted as the stage ``store``."""

    def __init__(self, records: Records, observer: Observer) -> None:
        self._records = records
        self._observer = observer

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        with timed(self._observer, "store"):
            return self._records.read(keys)

    def scan(self, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        with timed(self._observer, "store"):
            return self._records.scan(prefix, after, limit)

    def commit(self, commit: Commit) -> None:
        with timed(self._observer, "store"):
            self._records.commit(commit)

    def secure(self) -> None:
        with timed(self._observer, "store"):
            self._records.secure()

    def compact(self) -> None:
        self._records.compact()

    def check(self) -> None:
        self._records.check()

    def close(self) -> None:
        self._records.close()


@contextmanager
def timed(observer: Observer, stage: str) -> Iterator[None]:
    """Observe the time spent inside."""
    start = time.perf_counter()
    try:
        yield
    finally:
        observer.stage(stage, time.perf_counter() - start)
