"""Metrics and logs: what operators see, and what they do not."""

import io
import json
import logging

import httpx
import pytest
from rich.console import Console

from service.access import Keys, Scope
from service.logs import configure_logs
from service.telemetry import STAGES
from tests.service.conftest import free_port, running
from tests.service.plates import FakeEngine, well_files
from tests.service.test_routes import adapted, predicted


@pytest.fixture
def logs():
    """What is logged as JSON, line by line; the log is left as it was."""
    root, kept = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level)
    text = io.StringIO()
    stop = configure_logs("json", Console(file=text))

    def lines():
        stop()
        return [json.loads(line) for line in text.getvalue().splitlines()]

    yield lines
    stop()
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])


def test_metrics_tell_stages_routes_and_what_answers_but_no_tenant_batch_or_well(client, bundle):
    adapted(client, "SECRETPLATE")
    predicted(client, ["E05"], batch="SECRETPLATE")
    client.get("/nowhere/SECRETPLATE")
    text = client.get("/metrics").text
    for stage in STAGES:
        assert f'anchorwell_stage_seconds_count{{stage="{stage}"}}' in text
    assert 'anchorwell_requests_total{method="POST",route="/batches/{batch_id}/controls",status="201"} 1.0' in text
    assert 'route="none",status="404"' in text
    assert f'bundle="{bundle.digest[:12]}",precision="fp32",provider="CPUExecutionProvider"' in text
    assert "SECRETPLATE" not in text
    assert "E05" not in text


def test_metrics_need_a_key_of_their_own_or_their_own_port(settings, storage):
    port = free_port()
    keys = Keys(storage.records)
    _, lims = keys.create("lab", [Scope.READ, Scope.WRITE, Scope.ADMIN])
    _, scraper = keys.create("operators", [Scope.METRICS])
    with running(settings.model_copy(update={"metrics_port": port}), FakeEngine(), storage) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": f"Bearer {lims}"}).status_code == 403
        assert "anchorwell_engine" in client.get("/metrics", headers={"Authorization": f"Bearer {scraper}"}).text
        assert "anchorwell_engine" in httpx.get(f"http://127.0.0.1:{port}/metrics").text


def test_every_request_is_a_line_of_json_with_its_id_and_no_secret(client, storage, logs):
    _, token = Keys(storage.records).create("lab", [Scope.READ])
    headers = {"Authorization": f"Bearer {token}", "X-Request-ID": "lims-7"}
    client.get("/batches/P1", headers=headers)
    client.get("/health/live")
    (line,) = [line for line in logs() if line["logger"] == "anchorwell.requests"]
    assert (line["request_id"], line["method"], line["route"]) == ("lims-7", "GET", "/batches/{batch_id}")
    assert (line["status"], line["level"]) == (404, "INFO")
    assert line["seconds"] >= 0
    assert token not in json.dumps(logs())


def test_an_unexpected_error_is_logged_with_its_reference(client, engine, logs):
    engine.measure = lambda *_: 1 / 0
    body = client.post("/batches/P1/controls", files=well_files(["A01", "B01", "C01", "D01"])).json()
    (line,) = [line for line in logs() if line["level"] == "ERROR"]
    assert body["reference"] in line["message"]
    assert "ZeroDivisionError" in line["exc_info"]
