"""Both stores keep the same promises."""

import io
import sqlite3
from datetime import UTC, datetime

import numpy as np
import pytest
import redis

from model.layout import SiteKey
from model.statistics import BatchNormStatistics
from service.errors import StartError, StoreUnavailableError
from service.store import Adaptation, Change, ControlSite, RevisionConflictError, image_from_bytes, open_store
from service.store_redis import RedisStore
from service.store_sqlite import SqliteStore
from tests.service.conftest import free_port, redis_server
from tests.service.plates import plane

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
A01, B01 = SiteKey("A01", 1), SiteKey("B01", 12)


def control(key, seed=0):
    site = ControlSite(key, {"DNA": "0" * 64, "ER": f"{seed:064d}"}, "recipe")
    return site, plane((key, seed)).astype(np.float32)[None]


def adaptation(name="s1", bundle="b1"):
    return Adaptation(
        bundle_digest=bundle,
        statistics_id=name,
        statistics=BatchNormStatistics(np.arange(3, dtype=np.float32), np.ones(3, np.float32), sites=2, wells=2),
        control_centre=np.array([0.1, 0.2], np.float32),
        used=(A01, B01),
        left_out=(SiteKey("B01", 13),),
        distance=1.25,
        percentile=50.0,
        out_of_range=False,
        provider="CPUExecutionProvider",
        precision="fp32",
        created_at=NOW,
    )


def test_a_commit_keeps_all_of_a_change_and_reads_back_as_it_was(any_store):
    site, pixels = control(A01)
    any_store.commit("P1", None, Change(NOW, 0.65, [(site, pixels)], frozenset({"E05"}), adaptation()))
    kept = any_store.batch("P1")
    assert kept.controls == {A01: site}
    assert kept.treated == {"E05"}
    assert kept.adaptations == {("b1", "s1")}
    assert (kept.pixel_size_um, kept.changed_at) == (0.65, NOW)
    assert any_store.image("P1", A01).tobytes() == pixels.tobytes()
    read = any_store.adaptation("P1", "b1", "s1")
    assert read.to_bytes() == adaptation().to_bytes()
    assert (read.used, read.left_out, read.wells) == ((A01, B01), (SiteKey("B01", 13),), ("A01", "B01"))


def test_a_batch_keeps_its_plate_and_pixel_size(any_store):
    any_store.commit("P1", None, Change(NOW, 0.65, [control(A01)], plate="BR1"))
    any_store.commit("P1", any_store.batch("P1").revision, Change(NOW, treated=frozenset({"E05"})))
    assert (any_store.batch("P1").plate, any_store.batch("P1").pixel_size_um) == ("BR1", 0.65)


def test_changes_add_up_and_old_statistics_stay(any_store):
    any_store.commit("P1", None, Change(NOW, 0.65, [control(A01)], adaptation=adaptation("s1")))
    any_store.commit("P1", any_store.batch("P1").revision, Change(NOW, controls=[control(B01)], treated=frozenset("C")))
    any_store.commit("P1", any_store.batch("P1").revision, Change(NOW, adaptation=adaptation("s2"), treated=frozenset("D")))
    kept = any_store.batch("P1")
    assert list(kept.controls) == [A01, B01]
    assert kept.treated == {"C", "D"}
    assert kept.adaptations == {("b1", "s1"), ("b1", "s2")}
    assert kept.pixel_size_um == 0.65


def test_a_site_sent_again_takes_the_place_of_the_kept_one(any_store):
    any_store.commit("P1", None, Change(NOW, controls=[control(A01)]))
    site, pixels = control(A01, seed=1)
    any_store.commit("P1", any_store.batch("P1").revision, Change(NOW, controls=[(site, pixels)]))
    assert any_store.batch("P1").controls == {A01: site}
    assert any_store.image("P1", A01).tobytes() == pixels.tobytes()


def test_a_commit_from_another_revision_changes_nothing(any_store):
    any_store.commit("P1", None, Change(NOW, controls=[control(A01)]))
    before = any_store.batch("P1")
    for stale in (None, "another"):
        with pytest.raises(RevisionConflictError):
            any_store.commit("P1", stale, Change(NOW, controls=[control(B01)], treated=frozenset({"E05"})))
    assert any_store.batch("P1") == before


def test_a_batch_made_anew_is_not_taken_for_the_deleted_one(any_store):
    any_store.commit("P1", None, Change(NOW, controls=[control(A01)]))
    old = any_store.batch("P1").revision
    assert any_store.delete("P1") is True
    any_store.commit("P1", None, Change(NOW, controls=[control(B01)]))
    with pytest.raises(RevisionConflictError):
        any_store.commit("P1", old, Change(NOW, treated=frozenset({"E05"})))
    assert list(any_store.batch("P1").controls) == [B01]


def test_a_batch_keeps_its_incarnation_until_it_is_deleted(any_store):
    any_store.commit("P1", None, Change(NOW, controls=[control(A01)]))
    first = any_store.batch("P1")
    any_store.commit("P1", first.revision, Change(NOW, treated=frozenset({"E05"})))
    second = any_store.batch("P1")
    assert (second.incarnation, second.revision != first.revision) == (first.incarnation, True)
    any_store.delete("P1")
    any_store.commit("P1", None, Change(NOW, controls=[control(A01)]))
    assert any_store.batch("P1").incarnation != first.incarnation


def test_a_deleted_batch_leaves_nothing(any_store):
    any_store.commit("P1", None, Change(NOW, 0.65, [control(A01)], frozenset({"E05"}), adaptation()))
    any_store.commit("P2", None, Change(NOW, controls=[control(A01)]))
    assert any_store.batch_ids() == ["P1", "P2"]
    assert any_store.delete("P1") is True
    assert any_store.delete("P1") is False
    assert any_store.batch("P1") is None
    assert any_store.image("P1", A01) is None
    assert any_store.adaptation("P1", "b1", "s1") is None
    assert any_store.batch_ids() == ["P2"]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_tenants_do_not_see_each_other(kind, tmp_path, request):
    if kind == "sqlite":
        mine, other = (SqliteStore(str(tmp_path / "both.db"), tenant=tenant) for tenant in ("mine", "other"))
    else:
        url = request.getfixturevalue("redis_url")
        mine, other = (RedisStore(url, tenant=tenant) for tenant in ("mine", "other"))
    mine.commit("P1", None, Change(NOW, controls=[control(A01)]))
    assert other.batch("P1") is None
    assert other.batch_ids() == []
    assert other.delete("P1") is False
    assert mine.batch_ids() == ["P1"]
    mine.close()
    other.close()


def test_a_sqlite_file_of_a_newer_release_is_refused(tmp_path):
    path = tmp_path / "new.db"
    SqliteStore(str(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE schema_version SET version = 99")
    db.close()
    with pytest.raises(StartError, match="schema 99"):
        SqliteStore(str(path))


def test_no_folder_is_made_for_a_mistyped_path(tmp_path):
    with pytest.raises(StartError, match="there is no folder"):
        open_store(f"sqlite:///{tmp_path}/no/such/s.db")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_store_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(StartError, match="cannot be opened"):
        SqliteStore(str(path))


def test_sqlite_syncs_every_commit(tmp_path):
    store = SqliteStore(str(tmp_path / "s.db"))
    with store._connection() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    store.close()


def test_redis_keys_carry_version_and_tenant(redis_url):
    with redis.Redis.from_url(redis_url) as server:
        server.flushdb()
        store = RedisStore(redis_url)
        store.commit("P1", None, Change(NOW, 0.65, [control(A01)], frozenset({"E05"}), adaptation()))
        keys = {key.decode() for key in server.scan_iter()}
    parts = ("head", "controls", "images", "treated", "adaptations")
    assert keys == {
        "anchorwell:schema",
        "anchorwell:v1:default:batches",
        *(f"anchorwell:v1:default:batch:P1:{part}" for part in parts),
    }
    store.close()


def test_a_redis_that_could_lose_writes_is_refused(redis_url):
    with redis.Redis.from_url(redis_url) as server:
        server.config_set("appendfsync", "everysec")
        with pytest.raises(StartError, match="appendfsync always"):
            RedisStore(redis_url)
        server.config_set("appendfsync", "always")


def test_a_redis_of_a_newer_release_is_refused(redis_url):
    with redis.Redis.from_url(redis_url) as server:
        server.flushdb()
        server.set("anchorwell:schema", 99)
        with pytest.raises(StartError, match="schema 99"):
            RedisStore(redis_url)
        server.flushdb()


def test_a_redis_that_is_not_there_is_told_as_such():
    with pytest.raises(StartError, match="cannot be used"):
        RedisStore("redis://127.0.0.1:1/0")


def test_a_redis_without_memory_left_refuses_a_change_whole(redis_url):
    with redis.Redis.from_url(redis_url) as server:
        server.flushdb()
        store = RedisStore(redis_url)
        store.commit("P1", None, Change(NOW, controls=[control(A01)]))
        before = store.batch("P1")
        server.config_set("maxmemory", "1")
        with pytest.raises(StoreUnavailableError, match="Redis failed"):
            store.commit("P1", before.revision, Change(NOW, controls=[control(B01)], treated=frozenset({"E05"})))
        server.config_set("maxmemory", "0")
    assert store.batch("P1") == before
    store.close()


def test_what_redis_acknowledged_survives_its_death(tmp_path):
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with redis_server(tmp_path, port) as process:
        store = RedisStore(url)
        store.commit("P1", None, Change(NOW, 0.65, [control(A01)], frozenset({"E05"}), adaptation()))
        before = store.batch("P1")
        store.close()
        process.kill()
    with redis_server(tmp_path, port):
        store = RedisStore(url)
        assert store.batch("P1") == before
        store.close()


@pytest.mark.parametrize("url", ["postgres://host/db", "anchorwell.db", "sqlite:///", "sqlite://file.db"])
def test_another_kind_of_store_is_refused(url):
    with pytest.raises(StartError, match="a store is"):
        open_store(url)


def test_a_store_url_opens_its_store(tmp_path, redis_url):
    for url, kind in ((f"sqlite:///{tmp_path}/s.db", SqliteStore), (redis_url, RedisStore)):
        store = open_store(url)
        assert isinstance(store, kind)
        store.check()
        store.close()


def test_kept_arrays_are_never_pickles():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        image_from_bytes(buffer.getvalue())
