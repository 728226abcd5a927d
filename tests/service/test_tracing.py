"""Traces: sent where OpenTelemetry's variables say, a span for every stage, and nothing that names whose they are."""

import logging
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service import tracing
from service.access import Keys, Scope
from service.app import create_app
from service.settings import Settings
from service.telemetry import STAGES
from service.tracing import UNTRACED, open_tracing
from tests.service.conftest import free_port, running
from tests.service.plates import CONTROL_WELLS, FakeEngine, well_files
from tests.service.test_routes import adapted

SECRETS = ("SECRETPLATE", "E05", "hidden-host", "screening", "SECRETQUERY")


class Collector(BaseHTTPRequestHandler):
    """Takes spans over OTLP/HTTP."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.posts.append((self.path, self.headers["content-type"], body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.posts = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def spans(collector):
    """Every span that was sent."""
    sent = [part for _, _, body in collector.posts for part in ExportTraceServiceRequest.FromString(body).resource_spans]
    return [span for part in sent for scope in part.scope_spans for span in scope.spans]


def attributes(span):
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_request_is_sent_as_a_trace_with_a_span_for_every_stage(collector, tiny_bundle_path, tmp_path):
    settings = Settings(bundle=tiny_bundle_path, data=tmp_path / "data", device="cpu", threads=1)
    with running(settings, workers=True) as client:
        files = well_files(CONTROL_WELLS, size=64)
        assert client.post("/batches/P1/controls", files=files).status_code == 201
        client.get("/health/live")
        client.get("/metrics")
    assert {(path, kind) for path, kind, _ in collector.posts} == {("/v1/traces", "application/x-protobuf")}
    (request,) = [span for span in spans(collector) if not span.parent_span_id]
    assert request.name == "POST /batches/{batch_id}/controls"
    assert attributes(request)["http.response.status_code"] == 201
    stages = [span for span in spans(collector) if span.parent_span_id]
    assert {span.name for span in stages} == set(STAGES)
    assert {(span.trace_id, span.parent_span_id) for span in stages} == {(request.trace_id, request.span_id)}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in stages)
    assert [span.name for span in stages].count("decode") == len(files) / 3, "one for each site"
    assert b"anchorwell" in collector.posts[0][2]


def test_nothing_in_a_trace_names_tenant_batch_well_or_key(collector, settings, storage):
    engine = FakeEngine()
    token = Keys(storage.records).create("screening", [Scope.READ, Scope.WRITE])[1]
    headers = {"Authorization": f"Bearer {token}", "Host": "hidden-host"}
    with running(settings, engine, storage) as client:
        assert client.post("/batches/SECRETPLATE/controls", files=well_files(CONTROL_WELLS), headers=headers).is_success
        engine.classify = lambda *_: 1 / 0
        failed = client.post("/batches/SECRETPLATE/predict", files=well_files(["E05"]), headers=headers)
        client.get("/batches/SECRETPLATE/predictions?format=SECRETQUERY", headers=headers)
        client.get("/nowhere/SECRETPLATE", headers=headers)
        client.request("SECRETPLATE", "/batches", headers=headers)
    assert failed.status_code == 500
    sent = b"".join(body for _, _, body in collector.posts)
    assert b"/batches/{batch_id}/predict" in sent
    assert b"ZeroDivisionError" in sent
    assert [secret for secret in (*SECRETS, token[-20:]) if secret.encode() in sent] == []
    assert len([span for span in spans(collector) if not span.parent_span_id]) == 5


def test_without_the_variable_nothing_is_traced_whatever_fastapi_is_told(monkeypatch, settings, engine, storage):
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    assert open_tracing() is UNTRACED
    app = create_app(settings, engine=engine, storage=storage)
    assert not app._native_telemetry.enabled()
    program = "import sys, service.app, service.tracing as t; t.open_tracing(); print('service.otlp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", "what sends is not even loaded"


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_traces_are_off_where_opentelemetry_is(name, value, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    assert open_tracing() is UNTRACED
    assert caplog.messages == []


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "no http or https address"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1"}, "no http or https address"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf alone"),
    ],
)
def test_variables_that_no_traces_can_be_sent_by_are_told_at_start(variables, words, monkeypatch, caplog):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert open_tracing() is UNTRACED
    (line,) = caplog.messages
    assert line.startswith("OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: ")
    assert words in line


def test_a_missing_extra_is_told_at_start_in_a_line_and_the_service_goes_on(
    collector, monkeypatch, caplog, settings, engine, storage
):
    monkeypatch.delitem(sys.modules, "service.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with running(settings, engine, storage) as client:
        assert client.get("/health/ready").status_code == 200
        adapted(client)
    (told,) = [record for record in caplog.records if "OTEL" in record.message]
    assert (told.levelno, told.exc_info) == (logging.WARNING, None)
    assert "install the extra 'otel'" in told.message
    assert collector.posts == []


def test_a_collector_that_is_away_costs_no_request(monkeypatch, settings, engine, storage):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    with running(settings, engine, storage) as client:
        assert adapted(client)["adapted"]


def test_the_end_waits_for_no_collector_that_hangs(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "4")
    monkeypatch.setattr(tracing, "_CLOSE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        opened = open_tracing()
        opened.provider.get_tracer("anchorwell").start_span("store").end()
        start = time.monotonic()
        opened.close()
        assert time.monotonic() - start < 3


def test_a_stage_outside_a_traced_request_makes_no_span(collector):
    seen = []

    class Counting:
        def stage(self, stage, seconds):
            seen.append((stage, seconds))

        def sites(self, graph, count):
            seen.append((graph, count))

    opened = tracing.open_tracing()
    observer = opened.observing(Counting())
    observer.stage("decode", 0.5)
    observer.sites("measure", 3)
    opened.close()
    assert seen == [("decode", 0.5), ("measure", 3)]
    assert collector.posts == []
