"""Keys, tenants, scopes and calls: who gets what, and that nothing of one tenant shows to another."""

import itertools
import json

import pytest

from service.access import Access, Keys, Scope
from service.audit import verify
from service.digests import content_digest
from service.errors import InvalidRequestError, StoreUnavailableError, UnauthorizedError
from service.records import MemoryRecords
from service.storage import Storage
from tests.service.conftest import running
from tests.service.plates import CONTROL_WELLS, FakeEngine, plane, tiff, well_files
from tests.service.test_jobs import Clock

PLANE = tiff(plane("secret"))
BATCH = "SECRET-PLATE"
MAP = b"well,role,compound\nA01,control,SECRET-COMPOUND\nE05,treated,SECRET-DRUG\n"

CALLS = {
    "list batches": (Scope.READ, "GET", "/batches", {}),
    "batch": (Scope.READ, "GET", "/batches/{batch}", {}),
    "images": (Scope.READ, "GET", "/batches/{batch}/images", {}),
    "platemap": (Scope.READ, "GET", "/batches/{batch}/platemap", {}),
    "predictions": (Scope.READ, "GET", "/batches/{batch}/predictions", {}),
    "csv": (Scope.READ, "GET", "/batches/{batch}/predictions?format=csv", {}),
    "jobs": (Scope.READ, "GET", "/jobs", {}),
    "job": (Scope.READ, "GET", "/jobs/{job}", {}),
    "model": (Scope.READ, "GET", "/model", {}),
    "predict": (Scope.WRITE, "POST", "/batches/{batch}/predict", {"files": well_files(["E05"])}),
    "predict staged": (Scope.WRITE, "POST", "/batches/{batch}/predict", {"json": {"staged": True, "wells": ["E06"]}}),
    "delete job": (Scope.WRITE, "DELETE", "/jobs/{job}", {}),
    "delete": (Scope.WRITE, "DELETE", "/batches/{batch}", {}),
    "webhooks": (Scope.ADMIN, "GET", "/webhooks", {}),
    "delete webhook": (Scope.ADMIN, "DELETE", "/webhooks/{webhook}", {}),
    "metrics": (Scope.METRICS, "GET", "/metrics", {}),
}
MAKING = {
    "controls": (Scope.WRITE, "POST", "/batches/{batch}/controls", {"files": well_files(CONTROL_WELLS)}),
    "put platemap": (Scope.WRITE, "PUT", "/batches/{batch}/platemap", {"content": MAP}),
    "put image": (
        Scope.WRITE,
        "PUT",
        "/batches/{batch}/images/E06/1/DNA",
        {"content": PLANE, "headers": {"Content-Digest": content_digest(PLANE)}},
    ),
    "webhook": (Scope.ADMIN, "POST", "/webhooks", {"json": {"url": "https://lims.example/SECRET"}}),
}
"""Calls that make what is not there: another tenant's do not meet those of the first."""
OF_A_THING = [name for name, (_, _, path, _) in CALLS.items() if "{" in path]
SCOPES = [frozenset(chosen) for count in range(1, 5) for chosen in itertools.combinations(Scope, count)]


class Spied:
    """Records that note which keys are looked at."""

    def __init__(self, records):
        self._records = records
        self.touched = []

    def read(self, keys):
        self.touched += keys
        return self._records.read(keys)

    def scan(self, prefix, after="", limit=1000):
        self.touched.append(prefix)
        return self._records.scan(prefix, after, limit)

    def commit(self, commit):
        self.touched += [*commit.changes, *commit.expected, *commit.cleared]
        self._records.commit(commit)

    def __getattr__(self, name):
        return getattr(self._records, name)


@pytest.fixture
def lab(settings, storage):
    """Tenant A with a batch, a plate map, an answer, a job and a webhook; and records that are watched."""
    spied = Spied(storage.records)
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), Storage(spied, storage.blobs)) as client:
        keys = Keys(storage.records)
        _, owner = keys.create("owner", list(Scope))
        headers = {"Authorization": f"Bearer {owner}"}
        names = {"batch": BATCH}
        for scope, method, path, options in MAKING.values():
            assert scope in Scope
            sent = {**options, "headers": {**options.get("headers", {}), **headers}}
            answer = client.request(method, path.format(**names), **sent)
            assert answer.is_success, answer.text
        names["webhook"] = answer.json()["webhook_id"]
        client.post(f"/batches/{BATCH}/predict", files=well_files(["E05"]), headers=headers)
        later = {**headers, "Prefer": "respond-async"}
        names["job"] = client.post(f"/batches/{BATCH}/predict", files=well_files(["E07"]), headers=later).json()["job_id"]
        client.spied, client.keys, client.names, client.owner = spied, keys, names, headers
        yield client


def asked(lab, call, headers, names=None):
    _, method, path, options = {**CALLS, **MAKING}[call]
    sent = {**options, "headers": {**options.get("headers", {}), **headers}}
    return lab.request(method, path.format(**(names or lab.names)), **sent)


@pytest.mark.parametrize("scopes", SCOPES, ids=lambda scopes: "+".join(sorted(scopes)))
def test_a_key_does_what_its_scopes_say_and_nothing_else(scopes, lab):
    _, token = lab.keys.create("owner", scopes)
    headers = {"Authorization": f"Bearer {token}"}
    for call, (needed, *_) in {**MAKING, **CALLS}.items():
        lab.spied.touched.clear()
        answer = asked(lab, call, headers)
        if needed in scopes:
            assert answer.status_code not in (401, 403), call
        else:
            assert answer.status_code == 403, call
            looked_at = [key for key in lab.spied.touched if not key.startswith("key/")]
            assert looked_at == [], "refused before anything is looked at: no timing tells what exists"


def test_another_tenant_finds_nothing_and_nothing_of_the_first_is_looked_at(lab):
    _, token = lab.keys.create("stranger", list(Scope))
    headers = {"Authorization": f"Bearer {token}"}
    nowhere = {"batch": "NEVER-WAS-HERE", "job": "never", "webhook": "never"}
    for call in CALLS:
        lab.spied.touched.clear()
        answer = asked(lab, call, headers)
        touched = [key for key in lab.spied.touched if "owner" in key]
        assert touched == [], "what a stranger asks never meets the owner's records: no timing tells what exists"
        assert answer.status_code == (404 if call in OF_A_THING and call != "predict" else answer.status_code), call
        assert answer.status_code not in (401, 403), call
        for secret in ("SECRET-COMPOUND", "SECRET-DRUG", "lims.example"):
            assert secret not in answer.text, call
        absent = asked(lab, call, headers, nowhere)
        same = answer.text.replace(BATCH, "*").replace(lab.names["job"], "*").replace(lab.names["webhook"], "*")
        if call in OF_A_THING:
            assert same == absent.text.replace("NEVER-WAS-HERE", "*").replace("never", "*"), call
    assert asked(lab, "list batches", headers).json() == {"batches": []}
    assert asked(lab, "jobs", headers).json() == {"jobs": []}
    assert asked(lab, "webhooks", headers).json() == {"webhooks": []}


def test_two_tenants_may_use_one_name_one_image_and_one_idempotency_key(lab, storage):
    _, token = lab.keys.create("stranger", list(Scope))
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "same"}
    both = [
        lab.post(f"/batches/{BATCH}/controls", files=well_files(CONTROL_WELLS), headers={**who, "Idempotency-Key": "same"})
        for who in (lab.owner, headers)
    ]
    assert [answer.status_code for answer in both] == [201, 201]
    assert "idempotency-replayed" not in both[1].headers
    folders = {name.split("/")[1] for name in storage.blobs.names("batches")}
    assert folders == {"owner", "stranger"}, "each tenant's files are its own, the same image too"
    assert lab.delete(f"/batches/{BATCH}", headers=headers).status_code == 204
    assert asked(lab, "batch", lab.owner).status_code == 200


@pytest.mark.usefixtures("lab")
def test_every_write_stands_in_the_audit_log_with_who_and_what(storage):
    entries = [json.loads(data) for _, data in storage.records.scan("audit/entry/")]
    actions = [(entry["tenant"], entry["action"], entry["subject"]) for entry in entries]
    assert ("owner", "batch.adapted", BATCH) in actions
    assert ("owner", "platemap.sent", BATCH) in actions
    assert ("owner", "plane.staged", BATCH) in actions
    assert ("owner", "batch.classified", BATCH) in actions
    adapted = next(entry for entry in entries if entry["action"] == "batch.adapted")
    assert len(adapted["digests"]["sha256"]) == 3 * 2 * len(CONTROL_WELLS)
    assert adapted["by"] != "anonymous"
    assert verify(storage.records).fault is None


def test_a_key_is_known_for_seconds_and_while_the_store_is_away():
    clock, records = Clock(), MemoryRecords()
    keys = Keys(records, clock)
    key, token = keys.create("mine", [Scope.READ], days=1)
    access = Access(records, allow_anonymous=False, now=clock)
    header = f"Bearer {token}"
    assert access.caller(header).tenant == "mine"
    read = records.read
    records.read = lambda _: (_ for _ in ()).throw(StoreUnavailableError("Redis is away"))
    clock.advance(seconds=60)
    assert access.caller(header).tenant == "mine"
    records.read = read
    keys.revoke(key.key_id)
    clock.advance(seconds=6)
    with pytest.raises(UnauthorizedError):
        access.caller(header)


def test_a_key_ends_when_it_expires():
    clock, records = Clock(), MemoryRecords()
    _, token = Keys(records, clock).create("mine", [Scope.READ], days=1)
    access = Access(records, allow_anonymous=False, now=clock)
    assert access.caller(f"Bearer {token}").scopes == {Scope.READ}
    clock.advance(days=1)
    with pytest.raises(UnauthorizedError):
        access.caller(f"Bearer {token}")


@pytest.mark.parametrize("tenant", ["", "a/b", "..", "x" * 65, "a b", "\u00e9"])
def test_a_tenant_has_a_name_that_can_stand_in_a_path(tenant):
    with pytest.raises(InvalidRequestError):
        Keys(MemoryRecords()).create(tenant, [Scope.READ])


def test_the_secret_of_a_key_is_kept_nowhere(storage, settings):
    _, token = Keys(storage.records).create("mine", [Scope.READ])
    secret = token.split("_", 2)[2].encode()
    storage.close()
    assert all(secret not in path.read_bytes() for path in settings.data.rglob("*") if path.is_file())
