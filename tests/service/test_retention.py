"""What is forgotten in time, and what is not."""

import os
from datetime import UTC, datetime, timedelta

import pytest

from service.audit import entries, verify
from service.deeds import Deed
from service.idempotency import PREFIX
from service.jobs import Asked, Jobs
from service.retention import EVERY, JOBS_KEPT_FOR, ORPHANS_KEPT_FOR, Retention
from service.settings import TenantRules
from service.store import Change
from tests.service.plates import well_files
from tests.service.test_jobs import Clock, Nothing, effect
from tests.service.test_store import A01, NEW, also, control, staged_plane

RULES = {"mine": TenantRules(keep_days=90), "brief": TenantRules(keep_staged_days=7)}


@pytest.fixture
def clock():
    clock = Clock()
    clock.at = datetime.now(UTC)
    return clock


@pytest.fixture
def retention(any_storage, clock):
    jobs = Jobs(any_storage, lambda *_: None, Nothing(), clock)
    return Retention(any_storage, jobs, lambda tenant: RULES.get(tenant, TenantRules()), clock)


def begin(storage, tenant, at):
    """A batch with a control and a staged plane."""
    store, plane = storage.of(tenant), staged_plane(b"abc")
    store.commit(NEW, Change(at, controls=[control(A01)]), also())
    plane = type(plane)(**{**vars(plane), "staged_at": at.isoformat()})
    store.stage(store.batch("P1"), plane, b"abc", at, also())
    return store


def test_batches_and_staged_planes_go_when_their_tenant_says_so(retention, any_storage, clock):
    mine, brief, others = (begin(any_storage, tenant, clock()) for tenant in ("mine", "brief", "other"))
    for days, there in ((6, (1, 1, 1)), (2, (1, 0, 1)), (83, (0, 0, 1))):
        clock.advance(days=days)
        retention.sweep()
        assert tuple(len(store.staged("P1")) for store in (mine, brief, others)) == there
    assert [len(store.batch_ids()) for store in (mine, brief, others)] == [0, 1, 1]
    assert any_storage.blobs.names("batches/mine") == []
    assert len(any_storage.blobs.names("batches/brief")) == 1
    assert mine.usage.kept_bytes() == 0
    told = [(entry["by"], entry["tenant"], entry["action"]) for entry in entries(any_storage.records)]
    assert told[-2:] == [("retention", "brief", "plane.forgotten"), ("retention", "mine", "batch.deleted")]
    assert verify(any_storage.records).fault is None


def test_a_batch_that_changes_is_kept(retention, any_storage, clock):
    store = begin(any_storage, "mine", clock())
    clock.advance(days=60)
    store.commit(store.batch("P1"), Change(clock(), treated=frozenset({"E05"})), also())
    clock.advance(days=60)
    retention.sweep()
    assert store.batch_ids() == ["P1"]


def test_jobs_go_a_month_after_their_end_and_open_ones_stay(retention, clock):
    jobs = retention.jobs
    open_job, done = (f"job/t/{jobs.put(Deed('t'), 'controls', 'P1', Asked({})).job_id}" for _ in range(2))
    effect(jobs, done)
    clock.advance(days=JOBS_KEPT_FOR.days - 1)
    retention.sweep()
    assert len(jobs.all("t").jobs) == 2
    clock.advance(days=2)
    retention.sweep()
    assert [f"job/t/{job.job_id}" for job in jobs.all("t").jobs] == [open_job]


def test_answers_to_repeated_requests_go_after_a_week(client, storage, clock):
    headers = {"Idempotency-Key": "k"}
    jobs = client.app.state.served.later.jobs
    assert client.post("/batches/P1/controls", files=well_files(["A01"]), headers=headers).status_code == 201
    retention = Retention(storage, jobs, lambda _: TenantRules(), clock)
    clock.advance(days=6)
    retention.sweep()
    assert len(storage.records.scan(PREFIX)) == 1
    clock.advance(days=2)
    retention.sweep()
    assert storage.records.scan(PREFIX) == []


def test_files_that_no_record_names_go_after_a_day_and_all_others_stay(retention, storage, clock):
    sweeping = Retention(storage, Jobs(storage, lambda *_: None, Nothing(), clock), retention.rules, clock)
    store = begin(storage, "other", clock())
    store.put_files({"0a3/of-a-job": b"kept", "0a3/orphan": b"left"})
    sweeping.jobs.put(Deed("other"), "controls", "P1", Asked({}, ("0a3/of-a-job",), 4))
    storage.blobs.put("partial/half", b"wr")
    before = set(storage.blobs.names())
    clock.advance(hours=20)
    sweeping.sweep()
    assert set(storage.blobs.names()) == before
    clock.advance(hours=20)
    sweeping.sweep()
    assert before - set(storage.blobs.names()) == {"batches/other/0a3/orphan", "partial/half"}


def test_somebody_sweeps_every_hour(retention, any_storage, clock):
    jobs = retention.jobs
    retention.look_after()
    effect(jobs, f"job/t/{jobs.put(Deed('t'), 'controls', 'P1', Asked({})).job_id}")
    clock.advance(days=JOBS_KEPT_FOR.days + 1)
    retention.look_after()
    assert jobs.all("t").jobs == ()
    effect(jobs, f"job/t/{jobs.put(Deed('t'), 'controls', 'P1', Asked({})).job_id}")
    clock.advance(seconds=EVERY.total_seconds() - 1)
    Retention(any_storage, jobs, lambda _: TenantRules(), clock).look_after()
    assert len(jobs.all("t").jobs) == 1


def test_age_is_told_by_files_and_objects_alike(any_storage, storage):
    for blobs in (any_storage.blobs, storage.blobs):
        blobs.put("batches/t/0a4/x", b"x")
        assert blobs.older("batches/", datetime.now(UTC) - timedelta(minutes=1)) == []
        assert blobs.older("batches/", datetime.now(UTC) + timedelta(minutes=1)) == ["batches/t/0a4/x"]
    path = storage.blobs._root / "batches/t/0a4/x"
    before = datetime.now(UTC) - ORPHANS_KEPT_FOR
    os.utime(path, (before.timestamp() - 1, before.timestamp() - 1))
    assert storage.blobs.older("batches/", before) == ["batches/t/0a4/x"]
