"""Every kind of records keeps the same promises."""

import socket
import sqlite3
import threading
from contextlib import suppress

import anyio
import pytest
import redis
from anyio.to_thread import run_sync

from service import audit
from service.blobs import memory_blobs
from service.deeds import Deed
from service.errors import AnsweredBefore, StartError, StoreLostError, StoreUnavailableError
from service.idempotency import Idempotency
from service.journal import Journal
from service.records import Commit, ConflictError, Derived, scan_all
from service.records_redis import RedisRecords, durability_warnings
from service.records_sqlite import SqliteRecords
from tests.service.conftest import emptied, free_port, redis_server, wait_until


def test_a_commit_changes_all_its_records_or_none(records):
    records.commit(Commit({"a": b"1", "b": b"2"}))
    with pytest.raises(ConflictError):
        records.commit(Commit({"a": b"9", "c": b"9"}, expected={"b": b"another"}))
    with pytest.raises(ConflictError):
        records.commit(Commit({"a": b"9"}, expected={"b": None}))
    assert records.read(["a", "b", "c"]) == [b"1", b"2", None]
    records.commit(Commit({"a": None, "c": b"3"}, expected={"a": b"1", "c": None}))
    assert records.read(["a", "b", "c"]) == [None, b"2", b"3"]


def test_values_are_bytes_of_any_kind(records):
    value = bytes(range(256)) * 300
    records.commit(Commit({"a": value, "empty": b""}))
    assert records.read(["a", "empty"]) == [value, b""]
    records.commit(Commit({"a": b""}, expected={"a": value, "empty": b""}))
    assert records.read(["a"]) == [b""]


def test_a_scan_is_in_order_and_in_pages(records):
    keys = ["p/a", "p/a/1", "p/b", "p/\u00e9", "p0", "o/z"]
    records.commit(Commit({key: key.encode() for key in keys}))
    assert [key for key, _ in records.scan("p/")] == ["p/a", "p/a/1", "p/b", "p/\u00e9"]
    assert records.scan("p/", after="p/a", limit=1) == [("p/a/1", b"p/a/1")]
    assert [key for key, _ in scan_all(records, "p/", page=1)] == ["p/a", "p/a/1", "p/b", "p/\u00e9"]
    assert records.scan("q/") == []


def test_what_is_cleared_goes_before_what_is_written(records):
    records.commit(Commit({"p/a": b"1", "p/b": b"2", "p0": b"3"}))
    records.commit(Commit({"p/c": b"4"}, cleared=("p/",)))
    assert [key for key, _ in records.scan("p")] == ["p/c", "p0"]
    assert records.read(["p/a"]) == [None]


def test_a_refused_commit_clears_nothing(records):
    records.commit(Commit({"p/a": b"1"}))
    with pytest.raises(ConflictError):
        records.commit(Commit({}, expected={"p/a": b"2"}, cleared=("p/",)))
    assert records.read(["p/a"]) == [b"1"]


def test_derived_changes_of_many_threads_all_count(records):
    def count():
        for _ in range(25):
            records.commit(Commit({}, derived=(Derived("n", lambda now: {"n": str(int(now or b"0") + 1).encode()}),)))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records.read(["n"]) == [b"100"]


def test_one_of_many_writers_wins(records):
    won = []

    def write(name):
        try:
            records.commit(Commit({"a": name.encode()}, expected={"a": None}))
            won.append(name)
        except ConflictError:
            pass

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert records.read(["a"]) == [won[0].encode()]


# --- SQLite ----------------------------------------------------------------------------------------------------------


def test_a_sqlite_file_of_another_release_is_refused(tmp_path):
    path = tmp_path / "new.db"
    SqliteRecords(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE schema_version SET version = 99")
    db.close()
    with pytest.raises(StartError, match="schema 99"):
        SqliteRecords(path)


def test_a_file_that_is_no_store_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(StartError, match="cannot be opened"):
        SqliteRecords(path)


def test_sqlite_syncs_every_commit(tmp_path):
    opened = SqliteRecords(tmp_path / "s.db")
    with opened._connection() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    opened.close()


def test_a_sqlite_file_without_the_labs_records_is_lost_not_empty(tmp_path):
    opened = SqliteRecords(tmp_path / "s.db", lab="one")
    for look in (
        lambda: opened.read(["a"]),
        lambda: opened.scan("a"),
        lambda: opened.commit(Commit({"a": b"1"})),
        opened.check,
    ):
        with pytest.raises(StoreLostError):
            look()
    opened.close()


# --- Redis -----------------------------------------------------------------------------------------------------------


def test_redis_keys_carry_the_version(redis_url):
    opened = RedisRecords(emptied(redis_url))
    opened.commit(Commit({"batch/mine/P1": b"1"}))
    with redis.Redis.from_url(redis_url) as server:
        keys = {key.decode() for key in server.scan_iter()}
    assert keys == {"anchorwell:schema", "anchorwell:v3:index", "anchorwell:v3:record:batch/mine/P1"}
    opened.close()


def test_a_redis_that_could_lose_writes_is_told_with_what_could_be_lost(redis_url):
    assert durability_warnings(redis_url) == []
    with redis.Redis.from_url(redis_url) as server:
        server.config_set("appendfsync", "everysec")
        (warning,) = durability_warnings(redis_url)
        server.config_set("appendfsync", "always")
    assert "appendfsync everysec, not always" in warning
    assert "the last second of acknowledged uploads" in warning


def test_a_redis_of_another_release_is_refused(redis_url):
    with redis.Redis.from_url(emptied(redis_url)) as server:
        server.set("anchorwell:schema", 99)
        with pytest.raises(StartError, match="schema 99"):
            RedisRecords(redis_url)
        server.flushdb()


def test_a_redis_that_is_not_there_is_told_as_such():
    with pytest.raises(StartError, match="cannot be used"):
        RedisRecords("redis://127.0.0.1:1/0")


@pytest.mark.parametrize("url", ["postgres://host/db", "redis+sentinel://host:1/", "redis+sentinel://host/name"])
def test_a_url_that_names_no_redis_is_refused(url):
    with pytest.raises(StartError, match="cannot be used"):
        RedisRecords(url)


def test_a_redis_without_memory_left_refuses_a_commit_whole(redis_url):
    opened = RedisRecords(emptied(redis_url))
    opened.commit(Commit({"a": b"1"}))
    with redis.Redis.from_url(redis_url) as server:
        server.config_set("maxmemory", "1")
        with pytest.raises(StoreUnavailableError, match="Redis failed"):
            opened.commit(Commit({"a": b"2", "b": b"2"}))
        server.config_set("maxmemory", "0")
    assert opened.read(["a", "b"]) == [b"1", None]
    opened.close()


def test_what_redis_acknowledged_survives_its_death_and_needs_no_new_connection(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port) as process:
        opened = RedisRecords(f"redis://127.0.0.1:{port}/0")
        opened.commit(Commit({"a": b"1"}))
        process.kill()
        process.wait(20)
        with pytest.raises(StoreUnavailableError):
            opened.read(["a"])
    with redis_server(tmp_path, port):
        with pytest.raises(StoreUnavailableError, match="a moment ago"):
            opened.read(["a"])
        wait_until(lambda: is_read(opened))
        assert opened.read(["a"]) == [b"1"]
        opened.close()


def is_read(records):
    try:
        return records.read(["a"])
    except StoreUnavailableError:
        return False


def test_a_flushed_redis_is_lost_not_empty(redis_url):
    opened = RedisRecords(emptied(redis_url), lab="one")
    for look in (
        lambda: opened.read(["a"]),
        lambda: opened.scan("a"),
        lambda: opened.commit(Commit({"a": b"1"})),
        opened.check,
    ):
        with pytest.raises(StoreLostError, match="anchorwell restore"):
            look()
    opened.close()


def test_a_primary_that_was_made_a_replica_is_told_as_unavailable_until_it_is_one_again(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port), redis.Redis(port=port) as server:
        opened = RedisRecords(f"redis://127.0.0.1:{port}/0")
        opened.commit(Commit({"a": b"1"}))
        server.replicaof("127.0.0.1", free_port())
        with pytest.raises(StoreUnavailableError, match="read only replica"):
            opened.commit(Commit({"a": b"2"}))
        server.replicaof("NO", "ONE")
        opened.commit(Commit({"a": b"2"}))
        assert opened.read(["a"]) == [b"2"]
        opened.close()


class CutWire:
    """Stands before a Redis, and loses the reply to the next command that has some text in it."""

    def __init__(self, port):
        self.loses = None
        self.seen = 0
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._server.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _forward(self, client, server):
        """Take turns: a command, its reply."""
        with client, server, suppress(OSError):
            while command := client.recv(1 << 20):
                server.sendall(command)
                reply = server.recv(1 << 20)
                if self.loses is not None and self.loses in command:
                    self.seen += 1
                    if self.seen == 1:
                        return
                client.sendall(reply)


def test_a_commit_whose_reply_is_lost_takes_effect_once_and_is_safe_before_its_repetition_is_answered(redis_url):
    blobs = memory_blobs()
    direct = RedisRecords(emptied(redis_url))
    direct.found("lab")
    wire = CutWire(redis.connection.parse_url(redis_url)["port"])
    opened = RedisRecords(f"redis://127.0.0.1:{wire.port}/0", "lab", Journal(blobs))
    wire.loses = b"EVAL"
    change = Commit({"a": b"1"}, expected={"a": None})
    with pytest.raises(StoreUnavailableError, match="nothing is known to have changed"):
        opened.commit(change)
    assert (wire.seen, direct.read(["a"])) == (1, [b"1"]), "it took effect, and was not sent again"
    assert list(Journal(blobs).entries()) == []
    wait_until(lambda: conflicts(opened, change))
    opened.secure()
    ((sequence, entry),) = Journal(blobs).entries()
    assert (sequence, entry.changes) == (1_000_001, {"a": b"1"}), "the first under this primary"
    opened.close()
    direct.close()
    wire.close()


def conflicts(records, commit):
    try:
        records.commit(commit)
    except ConflictError:
        return True
    except StoreUnavailableError:
        return False


def test_a_request_whose_commit_lost_its_reply_gets_its_first_answer_when_it_is_repeated(redis_url):
    blobs = memory_blobs()
    direct = RedisRecords(emptied(redis_url))
    direct.found("lab")
    wire = CutWire(redis.connection.parse_url(redis_url)["port"])
    opened = RedisRecords(f"redis://127.0.0.1:{wire.port}/0", "lab", Journal(blobs))
    keys = Idempotency(opened)

    async def ask():
        async with keys.held("t", "k", {"asks": "this"}, 201) as held:
            wire.loses = b"EVAL"
            done = Deed("t", beside=(held,)).done("test", "P1", {}, b"the answer")
            await run_sync(lambda: opened.commit(Commit({"a": b"1"}).and_also(done)))

    with pytest.raises(StoreUnavailableError):
        anyio.run(ask)
    wait_until(lambda: is_read(opened))
    with pytest.raises(AnsweredBefore) as told:
        anyio.run(ask)
    assert (told.value.status, told.value.body) == (201, b"the answer")
    assert [entry.changes["a"] for _, entry in Journal(blobs).entries() if "a" in entry.changes] == [b"1"]
    assert audit.verify(opened).entries == 1
    opened.close()
    direct.close()
    wire.close()
