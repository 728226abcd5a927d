"""Traces of requests, sent over OTLP/HTTP when OpenTelemetry's own variables name a collector; a span for every stage.

Without those variables nothing is made. What runs in the background belongs to no request, and leaves no trace.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fastapi.telemetry import TelemetryConfig
from opentelemetry.trace import Tracer, TracerProvider, get_current_span

from service.observe import Observer
from service.requests import QUIET

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CLOSE_S = 5.0
"""How long the end of the service waits for a collector."""

log = logging.getLogger("anchorwell")


@dataclass(frozen=True)
class Traced:
    """An ``Observer`` that makes a span of each stage of a request that is traced, ended as it is told of it.

    The planes of a site are decoded and scaled in turn: its two spans tell how long each took, and not when.
    """

    observer: Observer
    tracer: Tracer

    def stage(self, stage: str, seconds: float) -> None:
        """Count time of a stage, in the trace of the request that this belongs to."""
        self.observer.stage(stage, seconds)
        if get_current_span().is_recording():
            end = time.time_ns()
            self.tracer.start_span(stage, start_time=end - round(seconds * 1e9)).end(end)

    def sites(self, graph: str, count: int) -> None:
        """Count the sites of one pass."""
        self.observer.sites(graph, count)


@dataclass(frozen=True)
class Tracing:
    """Where traces go: nowhere without a provider."""

    provider: TracerProvider | None = None
    close: Callable[[], None] = lambda: None
    """Sends what was not sent yet, when that is soon done, and ends."""

    def observing(self, observer: Observer) -> Observer:
        """Have stages traced beside what an observer does."""
        return observer if self.provider is None else Traced(observer, self.provider.get_tracer("anchorwell"))

    def requests(self) -> TelemetryConfig:
        """What FastAPI traces: requests, but for those that ask how the service is."""
        return {
            "tracer_provider": self.provider,
            "tracing": self.provider is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": _is_quiet,
        }


UNTRACED = Tracing()


def open_tracing() -> Tracing:
    """Send traces where the variables say; when they cannot be sent, say why and go on without."""
    endpoint = _first(ENDPOINTS)
    if not endpoint or _first(("OTEL_SDK_DISABLED",)) == "true" or _first(("OTEL_TRACES_EXPORTER",)) == "none":
        return UNTRACED
    fault = _fault(endpoint)
    if fault is None:
        try:
            from service.otlp import open_provider  # noqa: PLC0415 (the extra 'otel' need not be installed)
        except ImportError:
            fault = "install the extra 'otel' (opentelemetry-sdk, opentelemetry-exporter-otlp-proto-http)"
        else:
            provider = open_provider()
            return Tracing(provider, partial(_within, _CLOSE_S, provider.shutdown))
    log.warning("%s is set, but no traces are sent: %s", next(name for name in ENDPOINTS if os.environ.get(name)), fault)
    return UNTRACED


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do something, and wait for its end that long."""
    thread = threading.Thread(target=work, name="tracing", daemon=True)
    thread.start()
    thread.join(seconds)


def _fault(endpoint: str) -> str | None:
    """What is wrong with the variables."""
    protocol = _first(_PROTOCOLS) or "http/protobuf"
    if protocol != "http/protobuf":
        return f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, and they go by http/protobuf alone"
    try:
        parts = urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    return None if known else "it is no http or https address"


def _first(names: tuple[str, ...]) -> str:
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def _is_quiet(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in QUIET
