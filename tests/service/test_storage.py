"""Records and blobs that belong together; and how a flushed Redis is rebuilt from the object storage."""

import shutil
import time
from datetime import timedelta

import pytest
import redis

from service.blobs import FileBlobs, _bounds, memory_blobs, open_object_blobs
from service.errors import BlobMissingError, StartError, StoreLostError, StoreUnavailableError
from service.journal import Journal
from service.records import Commit, Derived
from service.records_redis import RedisRecords
from service.storage import lab_of, open_storage
from tests.service.conftest import emptied
from tests.service.s3 import s3


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
    rebuilt.rebuild(Journal(lab.blobs).entries(), lab_of(lab.blobs))
    rebuilt.close()
    assert lab.records.scan("") == before, "and nothing was started anew"
    lab.records.commit(Commit({"part/t/P3/0": b"z"}, scope="t/P3"))
    assert max(sequence for sequence, _ in Journal(lab.blobs).entries()) == 8
    assert [name for name in lab.blobs.names("journal/t/P1") if not name.endswith("7")] == [], "deleted is deleted"
    with pytest.raises(StartError, match="already"):
        RedisRecords(redis_url).rebuild([], "another")
    lab.close()


def test_a_commit_whose_journal_entry_failed_is_not_acknowledged_but_made_safe_later(tmp_path, redis_url, monkeypatch):
    lab = open_storage(tmp_path / "lab", emptied(redis_url))
    with monkeypatch.context() as patched:
        patched.setattr(FileBlobs, "put", lambda *_: (_ for _ in ()).throw(StoreUnavailableError("no disk")))
        with pytest.raises(StoreUnavailableError, match="no disk"):
            lab.records.commit(Commit({"a": b"1"}))
        with pytest.raises(StoreUnavailableError, match="no disk"):
            lab.records.secure()
    assert Journal(lab.blobs).entries() == []
    lab.records.secure()
    ((_, entry),) = Journal(lab.blobs).entries()
    assert entry.changes == {"a": b"1"}
    shutil.rmtree(tmp_path / "lab")
    lab.close()
