"""Spans on their way to a collector, over OTLP/HTTP. The only module that knows OpenTelemetry's SDK, which is an extra.

A span leaves with the attributes that are listed here and no others: a path names its batch and well, a query whatever was
sent, a host whatever the client calls it. The route's template tells what was asked.
"""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from service.reports import VERSION

_TOLD = frozenset(
    {
        "error.type",
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "network.protocol.version",
        "url.scheme",
    }
)


class Unnamed(SpanExporter):
    """Exports spans without what could name a tenant, batch, well or key."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_unnamed(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def open_provider() -> TracerProvider:
    """Make what sends spans in the background, as OpenTelemetry's variables say: where to, how many, with which headers."""
    resource = Resource({"service.name": "anchorwell", "service.version": VERSION}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Unnamed(OTLPSpanExporter())))
    return provider


def _unnamed(span: ReadableSpan) -> ReadableSpan:
    """Return a span with the attributes that may be told, and no events or links."""
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={name: value for name, value in (span.attributes or {}).items() if name in _TOLD},
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
