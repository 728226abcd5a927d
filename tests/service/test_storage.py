"""Records and blobs that belong together; and how a flushed Redis is rebuilt from the object storage."""

import shutil
import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import redis

from model.layout import PlaneKey
from service import audit, journal
from service.app import compose
from service.blobs import FileBlobs, _bounds, memory_blobs, open_object_blobs
from service.deeds import Deed
from service.errors import BlobMissingError, StartError, StoreLostError, StoreUnavailableError
from service.jobs import Asked, Jobs
from service.journal import Journal
from service.records import Commit, Derived
from service.records_redis import RedisRecords
from service.storage import Storage, lab_of, open_storage, rebuild_records
from service.store import BatchRecord, Change, StagedPlane, new_blob
from tests.service.conftest import emptied, inline_decoder, running, wait_until
from tests.service.plates import CONTROL_WELLS, well_files
from tests.service.s3 import s3
from tests.service.test_jobs import Nothing
from tests.service.test_store import A01, NEW, NOW, control, staged_plane


@pytest.fixture(params=["files", "objects"])
def blobs(request, tmp_path):
    return FileBlobs(tmp_path / "blobs") if request.param == "files" else memory_blobs()


def test_blobs_are_put_got_listed_and_deleted(blobs):
    blobs.put("t/one/a", b"1")
    blobs.put_all({"t/one/b": b"2", "t/two/c": b"3"})
    blobs.put("t/one/a", b"4")
    assert blobs.get("t/one/a") == b"4"
    assert blobs.names("t/one/") == ["t/one/a", "t/one/b"]
    with blobs.local("t/two/c") as path:
        assert path.read_bytes() == b"3"
    blobs.delete(["t/one/a", "t/one/b", "t/nothing"])
    assert blobs.names() == ["t/two/c"]
    with pytest.raises(BlobMissingError):
        blobs.get("t/one/a")
    with pytest.raises(BlobMissingError), blobs.local("t/one/a"):
        pass
    blobs.put("t/one/a", b"5")
    assert blobs.get("t/one/a") == b"5"


def test_a_full_or_missing_disk_is_told_as_such_without_the_paths_of_this_machine(tmp_path, caplog):
    (tmp_path / "file").write_text("where a directory should be")
    kept = FileBlobs(tmp_path / "blobs")
    kept.put("a", b"1")
    for refused in (
        lambda: FileBlobs(tmp_path / "file" / "blobs").put("a", b"1"),
        lambda: kept.put("a/b", b"1"),
        lambda: kept.get("a/b"),
    ):
        with pytest.raises(StoreUnavailableError) as told:
            refused()
        assert str(tmp_path) not in told.value.detail
    with pytest.raises(BlobMissingError) as missing:
        kept.get("b")
    assert str(tmp_path) not in missing.value.detail
    assert str(tmp_path) in caplog.text, "but it is logged"


def test_object_storage_that_hangs_is_told_as_such_and_nothing_more_is_begun(monkeypatch):
    patience = {"timeout": timedelta(milliseconds=200), "allow_http": True}
    retries = {"max_retries": 1, "retry_timeout": timedelta(milliseconds=200)}
    with s3(monkeypatch) as server:
        blobs = open_object_blobs("s3://lab/kept", client_options=patience, retry_config=retries)
        blobs.put("a", b"1")
        server.goes_on.clear()
        start = time.monotonic()
        for hangs in (
            lambda: blobs.put("b", b"2"),
            lambda: blobs.get("a"),
            lambda: blobs.names("a"),
            lambda: blobs.delete(["a"]),
            lambda: blobs.put_all({str(number): b"x" for number in range(1000)}),
        ):
            with pytest.raises(StoreUnavailableError):
                hangs()
        assert time.monotonic() - start < 10
        server.goes_on.set()
        blobs.put("c", b"3")
        assert blobs.get("c") == b"3"


def test_no_call_of_object_storage_takes_more_than_half_a_minute(monkeypatch):
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_PROXY_URL", "http://proxy:8080")
    bounds = _bounds("s3://lab/kept")
    assert bounds["client_options"]["timeout"] + bounds["retry_config"]["retry_timeout"] < timedelta(seconds=30)
    assert bounds["client_options"]["allow_http"] == "true", "what the environment sets goes on to count"
    assert bounds["client_options"]["proxy_url"] == "http://proxy:8080"
    monkeypatch.setenv("AWS_TIMEOUT", "5s")
    assert _bounds("s3://lab/kept")["client_options"]["timeout"] == "5s"


def test_no_folder_is_made_for_a_mistyped_path(tmp_path):
    with pytest.raises(StartError, match="there is no folder"):
        open_storage(tmp_path / "no" / "such")
    assert not list(tmp_path.iterdir())


def test_a_new_lab_is_founded_once_and_found_again(tmp_path, redis_url):
    for url in (None, emptied(redis_url)):
        folder = tmp_path / str(url is None)
        first = open_storage(folder, url)
        first.records.commit(Commit({"a": b"1"}))
        first.close()
        again = open_storage(folder, url)
        assert again.records.read(["a"]) == [b"1"]
        assert lab_of(again.blobs) == lab_of(first.blobs)
        again.close()


def test_records_and_images_of_different_labs_are_never_used_together(tmp_path, redis_url):
    one = open_storage(tmp_path / "one", emptied(redis_url))
    one.records.commit(Commit({"a": b"1"}))
    one.close()
    open_storage(tmp_path / "two").close()
    with pytest.raises(StartError, match="images of another"):
        open_storage(tmp_path / "two", redis_url)
    with pytest.raises(StartError, match="images are not there"):
        open_storage(tmp_path / "three", redis_url)


def test_an_embedded_lab_whose_records_file_is_gone_is_lost_not_empty(tmp_path):
    first = open_storage(tmp_path / "lab")
    first.records.commit(Commit({"a": b"1"}))
    first.close()
    for file in (tmp_path / "lab").glob("records.db*"):
        file.unlink()
    again = open_storage(tmp_path / "lab")
    with pytest.raises(StoreLostError, match="backup"):
        again.records.read(["a"])
    again.close()


def test_a_flushed_redis_is_rebuilt_from_the_journal_with_all_that_was_committed(tmp_path, redis_url):
    lab = open_storage(tmp_path / "lab", emptied(redis_url))
    counted = Derived("audit/end", lambda now: {"audit/end": str(int(now or b"0") + 1).encode()})
    for number in range(5):
        lab.records.commit(Commit({f"part/t/P1/{number}": b"x", "batch/t/P1": b"1"}, derived=(counted,), scope="t/P1"))
    lab.records.commit(Commit({"part/t/P2/0": bytes(range(256)), "idempotency/t/k": b"y"}, scope="t/P2"))
    lab.records.commit(Commit({"batch/t/P1": None}, cleared=("part/t/P1/",), derived=(counted,), scope="t/P1"))
    before = [item for item in lab.records.scan("") if not item[0].startswith("idempotency/")]
    with redis.Redis.from_url(redis_url) as server:
        server.flushdb()
    with pytest.raises(StoreLostError):
        lab.records.check()
    rebuilt = RedisRecords(redis_url)
    rebuilt.rebuild(Journal(lab.blobs).entries(), lab_of(lab.blobs), "name")
    rebuilt.close()
    assert lab.records.scan("") == before, "and nothing was started anew"
    lab.records.commit(Commit({"part/t/P3/0": b"z"}, scope="t/P3"))
    assert max(sequence for sequence, _ in Journal(lab.blobs).entries()) > 8
    (gone,) = lab.blobs.names("journal/t/P1")
    assert "0007-gone-" in gone, "deleted is deleted"
    with pytest.raises(StartError, match="already"):
        RedisRecords(redis_url).rebuild([], "another", "name")
    lab.close()


def test_a_redis_of_before_a_restore_is_not_taken_for_the_labs(tmp_path, redis_url):
    first, second = emptied(redis_url), emptied(f"{redis_url.rpartition('/')[0]}/1")
    lab = open_storage(tmp_path / "lab", first)
    lab.records.commit(Commit({"a": b"1"}))
    lab.close()
    assert rebuild_records(tmp_path / "lab", second, None) == 1
    lab = open_storage(tmp_path / "lab", second)
    assert lab.records.read(["a"]) == [b"1"]
    lab.close()
    with pytest.raises(StartError, match="before its records were restored into another"):
        open_storage(tmp_path / "lab", first)
    emptied(first)
    assert rebuild_records(tmp_path / "lab", first, None) == 1
    open_storage(tmp_path / "lab", first).close()
    with pytest.raises(StartError, match="before its records were restored into another"):
        open_storage(tmp_path / "lab", second)
    emptied(second)


def test_a_commit_whose_journal_entry_failed_is_not_acknowledged_but_made_safe_later(tmp_path, redis_url, monkeypatch):
    lab = open_storage(tmp_path / "lab", emptied(redis_url))
    with monkeypatch.context() as patched:
        patched.setattr(FileBlobs, "put", lambda *_: (_ for _ in ()).throw(StoreUnavailableError("no disk")))
        with pytest.raises(StoreUnavailableError, match="no disk"):
            lab.records.commit(Commit({"a": b"1"}))
        with pytest.raises(StoreUnavailableError, match="no disk"):
            lab.records.secure()
    assert list(Journal(lab.blobs).entries()) == []
    lab.records.secure()
    ((_, entry),) = Journal(lab.blobs).entries()
    assert entry.changes == {"a": b"1"}
    shutil.rmtree(tmp_path / "lab")
    lab.close()


# --- acknowledged is in the journal ----------------------------------------------------------------------------------


class Obstructed:
    """Blobs whose journal can be refused, or made to wait."""

    def __init__(self, blobs):
        self.blobs = blobs
        self.refuses = lambda _: False
        self.waits = lambda _: False
        self.goes_on = threading.Event()

    def __getattr__(self, name):
        return getattr(self.blobs, name)

    def put(self, name, data):
        if name.startswith("journal/"):
            if self.refuses(name):
                raise StoreUnavailableError("no disk")
            if self.waits(name):
                self.goes_on.wait(20)
        self.blobs.put(name, data)


@pytest.fixture
def lab(tmp_path, redis_url):
    """A lab's storage at scale whose object storage is obstructed at will."""
    founded = open_storage(tmp_path / "lab", emptied(redis_url))
    founded.close()
    blobs = Obstructed(founded.blobs)
    yield Storage(RedisRecords(redis_url, lab_of(blobs), Journal(blobs)), blobs)
    blobs.goes_on.set()


@pytest.fixture
def server(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        yield client


def flush_and_restore(lab, server, tmp_path, redis_url):
    server.flushdb()
    rebuild_records(tmp_path / "lab", redis_url, None)
    lab.records.check()


def stage(lab, site):
    plane, batch = PlaneKey("E05", site, "DNA"), lab.of("mine").batch("P1") or BatchRecord("P1")
    kept = StagedPlane(plane, "0" * 64, 3, new_blob(b"abc", "0a1"), NOW.isoformat())
    lab.of("mine").stage(batch, kept, b"abc", NOW, Deed("mine").done("staged", "P1", {}))


def test_nothing_is_acknowledged_before_what_it_stands_on_is_in_the_journal(lab, server, tmp_path, redis_url):
    lab.blobs.refuses = lambda name: name.endswith("0001")
    for site in (1, 2):
        with pytest.raises(StoreUnavailableError, match="no disk"):
            stage(lab, site)
    lab.blobs.refuses = lambda _: False
    stage(lab, 3)
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert lab.of("mine").batch("P1") is not None
    assert [plane.key.site for plane in lab.of("mine").staged("P1")] == [1, 2, 3]
    verdict = audit.verify(lab.records)
    assert (verdict.entries, verdict.fault) == (3, None)


def test_a_flush_before_everything_was_in_the_journal_leaves_a_whole_beginning(lab, server, tmp_path, redis_url):
    stage(lab, 1)
    lab.blobs.refuses = lambda name: name.endswith("0002")
    for site in (2, 3, 4):
        with pytest.raises(StoreUnavailableError):
            stage(lab, site)
    lab.blobs.refuses = lambda _: False
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert [plane.key.site for plane in lab.of("mine").staged("P1")] == [1]
    assert (audit.verify(lab.records).entries, audit.verify(lab.records).fault) == (1, None)
    stage(lab, 5)
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert [plane.key.site for plane in lab.of("mine").staged("P1")] == [1, 5]
    assert audit.verify(lab.records).fault is None


def test_what_a_process_left_behind_is_brought_to_the_journal_by_the_next_that_starts(lab, tmp_path, redis_url):
    lab.blobs.refuses = lambda _: True
    with pytest.raises(StoreUnavailableError):
        lab.records.commit(Commit({"a": b"1"}))
    again = open_storage(tmp_path / "lab", redis_url)
    again.close()
    ((_, entry),) = Journal(again.blobs).entries()
    assert entry.changes == {"a": b"1"}


def test_a_service_starts_although_what_was_left_behind_cannot_be_made_safe_yet(lab, tmp_path, redis_url, monkeypatch):
    lab.blobs.refuses = lambda _: True
    with pytest.raises(StoreUnavailableError):
        lab.records.commit(Commit({"a": b"1"}))
    monkeypatch.setattr(FileBlobs, "put", lambda *_: (_ for _ in ()).throw(StoreUnavailableError("no disk")))
    again = open_storage(tmp_path / "lab", redis_url)
    assert again.records.read(["a"]) == [b"1"]
    again.close()


def test_what_is_left_behind_is_looked_after(lab, settings, engine):
    composition = compose(settings, engine=engine, storage=lab, decoder=inline_decoder(settings))
    lab.blobs.refuses = lambda _: True
    with pytest.raises(StoreUnavailableError):
        lab.records.commit(Commit({"a": b"1"}))
    lab.blobs.refuses = lambda _: False
    composition.look_after()
    ((_, entry),) = Journal(lab.blobs).entries()
    assert entry.changes == {"a": b"1"}
    composition.end()


def test_an_answer_is_not_repeated_before_its_change_is_in_the_journal(lab, settings, engine):
    with running(settings, engine, lab) as client:

        def ask():
            return client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers={"Idempotency-Key": "k"})

        lab.blobs.refuses = lambda _: True
        assert [ask().status_code, ask().status_code] == [503, 503]
        lab.blobs.refuses = lambda _: False
        answer = ask()
        assert (answer.status_code, answer.headers["idempotency-replayed"]) == (201, "true")
        assert any("batch/default/P1" in entry.changes for _, entry in Journal(lab.blobs).entries())


def test_object_storage_that_hangs_holds_up_neither_other_commits_in_redis_nor_readiness(lab, settings, engine):
    def write(name):
        lab.records.commit(Commit({name: b"1"}, derived=(Deed("mine").done("test", name, {}).derived), scope=name))

    lab.blobs.waits = lambda _: True
    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    with running(settings, engine, lab) as client:
        for writer in writers:
            writer.start()
        wait_until(lambda: lab.records.read(["a", "b", "c"]) == [b"1"] * 3)
        assert client.get("/health/ready").status_code == 200
        assert all(writer.is_alive() for writer in writers), "but nothing is acknowledged"
        lab.blobs.goes_on.set()
        for writer in writers:
            writer.join()
    assert audit.verify(lab.records).fault is None
    assert {scope for _, entry in Journal(lab.blobs).entries() for scope in entry.changes} >= {"a", "b", "c"}


def test_readiness_is_told_while_every_thread_waits_for_object_storage(lab, settings, engine):
    asked = {"url": "https://example.org/events", "events": ["job.failed"]}
    lab.blobs.waits = lambda _: True
    with running(settings, engine, lab) as client:
        posts = [threading.Thread(target=client.post, args=("/webhooks",), kwargs={"json": asked}) for _ in range(50)]
        for post in posts:
            post.start()
        wait_until(lambda: len(lab.records.scan("webhook/")) >= 40)
        told = []
        probe = threading.Thread(target=lambda: told.append(client.get("/health/ready").status_code))
        probe.start()
        wait_until(lambda: told == [200], timeout_s=5)
        lab.blobs.goes_on.set()
        for thread in (probe, *posts):
            thread.join()


def test_a_job_that_ended_stays_ended_after_its_batch_was_deleted_and_redis_restored(
    lab, server, settings, engine, tmp_path, redis_url
):
    with running(settings, engine, lab) as client:
        headers = {"Prefer": "respond-async"}
        place = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=headers).headers["location"]
        wait_until(lambda: client.get(place).json()["state"] == "done")
        assert client.delete("/batches/P1").status_code == 204
        before = client.get(place).json()
        flush_and_restore(lab, server, tmp_path, redis_url)
        assert client.get(place).json() == before
        assert client.get("/batches/P1").status_code == 404


def test_what_images_take_is_counted_anew_when_redis_is_restored(lab, server, tmp_path, redis_url):
    for tenant in ("mine", "other"):
        store = lab.of(tenant)
        store.commit(NEW, Change(NOW, controls=[control(A01)]), Deed(tenant).done("test", "P1", {}))
        store.stage(store.batch("P1"), staged_plane(b"abc"), b"abc", NOW, Deed(tenant).done("test", "P1", {}))
    lab.of("other").delete(lab.of("other").batch("P1"), Deed("other").done("test", "P1", {}))
    jobs = Jobs(lab, lambda *_: None, Nothing())
    jobs.put(Deed("other"), "controls", "P1", Asked({}, ("0a1/image",), 5))
    before = lab.of("mine").usage.kept_bytes(), lab.of("other").usage.kept_bytes()
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert (lab.of("mine").usage.kept_bytes(), lab.of("other").usage.kept_bytes()) == before
    assert before == (lab.of("mine").batch("P1").control_bytes + 3, 5)


def test_a_commit_that_is_under_way_while_redis_is_flushed_is_not_acknowledged(lab, server, tmp_path, redis_url):
    told = []

    def write():
        with pytest.raises(StoreUnavailableError, match="flushed") as refusal:
            lab.records.commit(Commit({"a": b"1"}))
        told.append(refusal.value)

    stage(lab, 1)
    lab.blobs.waits = lambda _: True
    writer = threading.Thread(target=write)
    writer.start()
    wait_until(lambda: lab.records.read(["a"]) == [b"1"])
    flush_and_restore(lab, server, tmp_path, redis_url)
    lab.blobs.goes_on.set()
    writer.join()
    assert len(told) == 1


def test_a_journal_is_merged_when_everything_is_in_it_and_once_an_hour(lab, server, tmp_path, redis_url, monkeypatch):
    monkeypatch.setattr(journal, "MERGED_FROM", 4)
    lab.blobs.refuses = lambda name: name.endswith("0002")
    for site in range(1, 3):
        with suppress(StoreUnavailableError):
            stage(lab, site)
    lab.blobs.refuses = lambda _: False
    for site in range(3, 7):
        stage(lab, site)
    lab.records.compact()
    merged = lab.blobs.names("journal/batch/mine/P1")
    assert [name[-8:] for name in merged] == ["snapshot"]
    for site in range(7, 12):
        stage(lab, site)
    lab.records.compact()
    assert len(lab.blobs.names("journal/batch/mine/P1")) == 6, "an hour has not gone by"
    server.delete("anchorwell:v3:compacted")
    lab.records.compact()
    assert len(lab.blobs.names("journal/batch/mine/P1")) == 1
    before = lab.records.scan("")
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert lab.records.scan("") == before
    assert audit.verify(lab.records).fault is None


@pytest.mark.parametrize("name", ["lab", "journal", "job", "webhook", "delivery", "keys", "key", "partial", "batches"])
def test_a_tenant_may_be_named_as_something_of_the_stores_own(lab, server, tmp_path, redis_url, name):
    stage(lab, 1)
    rows = dict.fromkeys(("job/mine/1", "webhook/mine/2", "delivery/mine/3", "key/4"), b'{"size": 0}')
    for key, value in rows.items():
        lab.records.commit(Commit({key: value}, scope=key))
    for batch_id in ("mine", "4", "P1"):
        lab.of(name).stage(BatchRecord(batch_id), staged_plane(b"abc"), b"abc", NOW, Deed(name).done("staged", batch_id, {}))
    for batch_id in ("mine", "4"):
        lab.of(name).delete(lab.of(name).batch(batch_id), Deed(name).done("deleted", batch_id, {}))
    flush_and_restore(lab, server, tmp_path, redis_url)
    assert lab.of("mine").batch_ids() == lab.of(name).batch_ids() == ["P1"]
    assert lab.records.read(list(rows)) == list(rows.values())
    assert lab_of(lab.blobs) is not None
