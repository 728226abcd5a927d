"""The interface as it is described: nothing vague, every operation answers as it says, and schemathesis finds no fault."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import schemathesis
import uvicorn

from service.access import Keys, Scope
from service.app import create_app
from service.digests import content_digest
from tests.service.conftest import free_port, wait_until
from tests.service.plates import CONTROL_WELLS, FakeEngine, plane, tiff, well_files

PLANE = tiff(plane("seed"))
BATCH = "BR00116991"


@pytest.fixture(scope="module")
def served(bundle, tmp_path_factory):
    """The app on a port of its own, with a key, a batch of every kind of thing, a job and a webhook."""
    from service.settings import Settings

    port = free_port()
    settings = Settings(bundle=bundle.path, data=tmp_path_factory.mktemp("api") / "data", device="cpu", threads=1, port=port)
    app = create_app(settings, engine=FakeEngine())
    _, token = Keys(app.state.served.batches.storage.records).create("default", list(Scope))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: _is_ready(url))
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as client:
        client.post(f"/batches/{BATCH}/controls", files=well_files(CONTROL_WELLS)).raise_for_status()
        client.post(f"/batches/{BATCH}/predict", files=well_files(["E05"])).raise_for_status()
        client.put(f"/batches/{BATCH}/platemap", content=b"well,role\nA01,control\nE05,treated\n").raise_for_status()
        yield client, token
    server.should_exit = True
    thread.join(60)


def _is_ready(url):
    try:
        return httpx.get(f"{url}/health/ready").status_code in (200, 401)
    except httpx.TransportError:
        return False


def seeded(client):
    """A request that is answered 2xx for every operation."""
    job = client.post(f"/batches/{BATCH}/predict", files=well_files(["F05"]), headers={"Prefer": "respond-async"}).json()
    hook = client.post("/webhooks", json={"url": "https://lims.example/events"}).json()
    client.post("/batches/gone/controls", files=well_files(["A01"]))
    place = {"batch_id": BATCH}
    digest = {"Content-Digest": content_digest(PLANE)}
    return {
        ("POST", "/batches/{batch_id}/controls"): (place, {"files": well_files(CONTROL_WELLS)}),
        ("POST", "/batches/{batch_id}/predict"): (place, {"files": well_files(["E05"])}),
        ("PUT", "/batches/{batch_id}/images/{well}/{site}/{channel}"): (
            {**place, "well": "E05", "site": "1", "channel": "DNA"},
            {"content": PLANE, "headers": digest},
        ),
        ("GET", "/batches/{batch_id}/images"): (place, {}),
        ("PUT", "/batches/{batch_id}/platemap"): (place, {"content": b"well,role\nA01,control\nE05,treated\n"}),
        ("GET", "/batches/{batch_id}/platemap"): (place, {}),
        ("GET", "/batches/{batch_id}/predictions"): (place, {}),
        ("GET", "/batches"): ({}, {}),
        ("GET", "/batches/{batch_id}"): (place, {}),
        ("DELETE", "/batches/{batch_id}"): ({"batch_id": "gone"}, {}),
        ("GET", "/jobs"): ({}, {}),
        ("GET", "/jobs/{job_id}"): ({"job_id": job["job_id"]}, {}),
        ("DELETE", "/jobs/{job_id}"): ({"job_id": job["job_id"]}, {}),
        ("POST", "/webhooks"): ({}, {"json": {"url": "https://lims.example/other", "events": ["job.failed"]}}),
        ("GET", "/webhooks"): ({}, {}),
        ("DELETE", "/webhooks/{webhook_id}"): ({"webhook_id": hook["webhook_id"]}, {}),
        ("GET", "/model"): ({}, {}),
        ("GET", "/health/live"): ({}, {}),
        ("GET", "/health/ready"): ({}, {}),
        ("GET", "/metrics"): ({}, {}),
    }


def test_every_operation_answers_as_it_is_described(served):
    client, _ = served
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    requests = seeded(client)
    assert set(requests) == operations
    for (method, path), (place, options) in requests.items():
        request = client.build_request(method, path.format(**place), **options)
        request.read()
        answer = client.send(request)
        assert answer.is_success, (method, path, answer.text)
        schema[path][method].validate_response(schemathesis.Response.from_httpx(answer, verify=False))


TOLD = {"properties", "additionalProperties", "$ref", "anyOf", "oneOf", "allOf"}


def bare_objects(value, place=""):
    """Places of schemas that say no more than that something is an object, or nothing at all."""
    if isinstance(value, dict):
        says_object = value.get("type") == "object" and not set(value) & TOLD
        open_object = value.get("additionalProperties") in (True, {}) and "properties" not in value
        if says_object or open_object or (place.endswith(("/schema", "/items")) and not value):
            yield place
        for name, inner in value.items():
            yield from bare_objects(inner, f"{place}/{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from bare_objects(inner, f"{place}/{number}")


def test_no_schema_is_a_bare_object(served):
    client, _ = served
    assert list(bare_objects(client.get("/openapi.json").json())) == []


CONFIG = """
# No schema can say what a TIFF shows, or that a digest is that of the body: such requests may be refused.
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "406", "409", "413", "422", "429", "5xx"]
"""


def test_schemathesis_finds_no_fault(served, tmp_path):
    client, token = served
    examples = os.environ.get("ANCHORWELL_SCHEMATHESIS_EXAMPLES", "8")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", f"{client.base_url}/openapi.json", "--checks", "all",
            "--header", f"Authorization: Bearer {token}", "--max-examples", examples, "--seed", "1", "--continue-on-failure",
            "--suppress-health-check", "all", "--generation-deterministic", "--report", "junit", "--report-dir", tmp_path,
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6_000:]


def test_the_page_about_the_interface_needs_no_other_host(client):
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert source.startswith("/"), source
        assert client.get(source).status_code == 200


def test_a_client_can_be_generated_that_has_keys_plain_names_and_plate_maps(client):
    told = client.get("/openapi.json").json()
    operations = {operation["operationId"]: operation for path in told["paths"].values() for operation in path.values()}
    assert {
        "send_controls",
        "predict",
        "send_image",
        "send_platemap",
        "list_batches",
        "get_predictions",
    } <= operations.keys()
    assert told["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert operations["predict"]["security"] == [{"HTTPBearer": []}]
    assert "application/octet-stream" in operations["send_platemap"]["requestBody"]["content"]
