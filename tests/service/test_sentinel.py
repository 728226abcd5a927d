"""Redis behind a Sentinel: records, the queue and rates find the primary, and the next one when it dies."""

import shutil
import signal
import subprocess
import threading
from contextlib import ExitStack, contextmanager

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service import records_redis
from service.access import Caller, Scope
from service.blobs import memory_blobs
from service.errors import StoreUnavailableError, TooManyRequestsError
from service.gates import Rates
from service.journal import Journal
from service.queue import Queue
from service.records import Commit
from service.records_redis import RedisRecords, _following, connect, durability_warnings
from tests.service.conftest import answers, free_port, redis_server, wait_until

PASSWORD = "p@ss/word"
QUOTED = "p%40ss%2Fword"


@contextmanager
def sentinel(folder, port, primary_port):
    """A Sentinel of our own that looks after one primary."""
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor lab 127.0.0.1 {primary_port} 1\n"
        f"sentinel auth-pass lab {PASSWORD}\n"
        "sentinel down-after-milliseconds lab 500\n"
        "sentinel failover-timeout lab 3000\n"
    )
    with subprocess.Popen([shutil.which("redis-server"), config, "--sentinel"], stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as probe:
                wait_until(lambda: answers(probe))
            yield
        finally:
            process.kill()


class Servers:
    """A primary, its two replicas, and the URL of the Sentinel that looks after them."""

    def __init__(self, folder, stack):
        self.primary_port, self.sentinel_port = free_port(), free_port()
        for name in ("primary", "replica-0", "replica-1", "sentinel"):
            (folder / name).mkdir()
        common = ("--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0")
        of_primary = ("--replicaof", f"127.0.0.1 {self.primary_port}")
        self.primary = stack.enter_context(redis_server(folder / "primary", self.primary_port, *common))
        self.replica_processes, self.replicas = [], []
        for number in range(2):
            port = free_port()
            server = redis_server(folder / f"replica-{number}", port, *common, *of_primary)
            self.replica_processes.append(stack.enter_context(server))
            self.replicas.append(stack.enter_context(redis.Redis(port=port, password=PASSWORD, db=1)))
        with redis.Redis(port=self.primary_port, password=PASSWORD) as primary:
            wait_until(lambda: _following(primary.info("replication")) == 2)
        stack.enter_context(sentinel(folder / "sentinel", self.sentinel_port, self.primary_port))
        self.url = f"redis+sentinel://:{QUOTED}@127.0.0.1:{free_port()},127.0.0.1:{self.sentinel_port}/lab?db=1"
        with redis.Redis(port=self.sentinel_port) as looks_after:
            wait_until(lambda: len(looks_after.sentinel_slaves("lab")) == 2, timeout_s=60)

    def replicas_stand_still(self, *, still):
        for process in self.replica_processes:
            process.send_signal(signal.SIGSTOP if still else signal.SIGCONT)

    def replicas_hear_the_primary(self, *, hear):
        """Whether they follow: without, nothing of what is written reaches them, not even their machines."""
        for replica in self.replicas:
            replica.config_set("masterauth", PASSWORD if hear else "another")
            if not hear:
                replica.execute_command("CLIENT", "KILL", "TYPE", "master")


@pytest.fixture
def servers(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine: Sentinel is not tested")
    with ExitStack() as stack:
        yield Servers(tmp_path, stack)


class Asked:
    """A Sentinel that says who is the primary when both threads have asked it, or is not there."""

    def __init__(self, port, both=None):
        self.port = port
        self.both = both

    def sentinel_masters(self):
        if self.both is None:
            raise redis.ConnectionError
        self.both.wait(20)
        return {
            "lab": {
                "ip": "host",
                "port": 1,
                "is_master": True,
                "is_sdown": False,
                "num-other-sentinels": 0,
                "is_odown": False,
            }
        }


def test_no_sentinel_is_lost_when_threads_look_for_the_primary_at_once():
    records = connect("redis+sentinel://one:1,two:2/lab")
    found, sentinels = [], records.connection_pool.sentinel_manager
    dead, alive = Asked(1), Asked(2, threading.Barrier(2))
    sentinels.sentinels = [dead, alive]
    threads = [threading.Thread(target=lambda: found.append(sentinels.discover_master("lab"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("host", 1)] * 2
    assert sentinels.sentinels == [alive, dead], "and the one that answers is asked first"


def caller(name):
    return Caller("t", name, frozenset(Scope), requests_per_minute=1)


def is_committed(records, key):
    try:
        records.commit(Commit({key: b"1"}, scope=key))
    except StoreUnavailableError:
        return False
    return True


def test_records_queue_and_rates_follow_the_primary_without_a_restart(servers, tmp_path):
    records, rates, queue = RedisRecords(servers.url), Rates(servers.url), Queue(tmp_path, servers.url)
    records.commit(Commit({"a": b"1"}))
    rates.count_request(caller("one"))
    of_another_process = Rates(servers.url)
    with pytest.raises(TooManyRequestsError):
        of_another_process.count_request(caller("one"))
    ran = []
    queue.start(1, lambda kind, name: ran.append((kind, name)), lambda: None)
    queue.put("job", "before")
    wait_until(lambda: ran == [("job", "before")])
    assert not (tmp_path / "queue.db").exists()
    assert all(replica.get("anchorwell:v3:record:a") == b"1" for replica in servers.replicas), "whichever comes next has it"

    servers.primary.kill()
    servers.primary.wait(20)
    assert not is_committed(records, "b")
    wait_until(lambda: is_committed(records, "b"))
    assert records.read(["a", "b"]) == [b"1", b"1"]
    wait_until(lambda: (queue.put("job", "after"), ("job", "after") in ran)[1])
    wait_until(lambda: is_refused(rates, "two"))
    queue.stop()
    records.close()
    for counts in (rates, of_another_process):
        pool = counts._limiter.storage.storage.connection_pool
        pool.disconnect()
        pool.sentinel_manager.close()


@pytest.fixture
def impatient(monkeypatch):
    """A replica has to confirm soon, and who waited in vain asks again at once."""
    monkeypatch.setattr(records_redis, "_CONFIRMED_WITHIN_S", 1.0)
    monkeypatch.setattr(records_redis, "_AWAY_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_what_no_replica_confirms_is_neither_acknowledged_nor_kept_in_the_journal(servers):
    blobs = memory_blobs()
    records = RedisRecords(servers.url, None, Journal(blobs))
    wait_until(lambda: is_committed(records, "batch/t/A"))
    kept = set(blobs.names(""))
    servers.replicas_stand_still(still=True)
    with pytest.raises(StoreUnavailableError, match=r"\d of \d replicas of Redis confirmed"):
        records.commit(Commit({"batch/t/B": b"1"}, scope="batch/t/B"))
    with pytest.raises(StoreUnavailableError, match=r"\d of \d replicas of Redis confirmed"):
        records.secure()
    assert set(blobs.names("")) == kept, "an entry of a commit that may be lost would outlive it"
    servers.replicas_stand_still(still=False)
    wait_until(lambda: is_secured(records))
    assert len(set(blobs.names("")) - kept) == 1, "once it is confirmed, it is brought there"
    records.close()


@pytest.mark.usefixtures("impatient")
def test_what_is_committed_while_others_are_secured_is_not_taken_for_confirmed(servers, monkeypatch):
    blobs = memory_blobs()
    records, other = RedisRecords(servers.url, None, Journal(blobs)), RedisRecords(servers.url, None, Journal(blobs))
    wait_until(lambda: is_committed(records, "batch/t/A"))
    confirm = records._confirm

    def meanwhile(connection):
        confirm(connection)
        servers.replicas_stand_still(still=True)
        with pytest.raises(StoreUnavailableError, match=r"\d of \d replicas of Redis confirmed"):
            other.commit(Commit({"batch/t/B": b"1"}, scope="batch/t/B"))

    monkeypatch.setattr(records, "_confirm", meanwhile)
    records.secure()
    servers.replicas_stand_still(still=False)
    assert not any("batch/t/B" in name for name in blobs.names(""))
    records.close()
    other.close()


def test_another_primary_gives_numbers_that_none_before_gave(servers):
    journal = Journal(memory_blobs())
    records = RedisRecords(servers.url, None, journal)
    wait_until(lambda: is_committed(records, "a"))
    before = [sequence for sequence, _ in journal.entries()]
    servers.primary.kill()
    wait_until(lambda: is_committed(records, "b"), timeout_s=60)
    after = [sequence for sequence, _ in journal.entries()][len(before) :]
    assert min(after) - max(before) > 1_000_000
    assert journal.set_aside() == 0, "a jump is no gap"
    assert {key for _, entry in journal.entries() for key in entry.changes} == {"a", "b"}
    records.close()


@pytest.mark.usefixtures("impatient")
def test_a_commit_that_only_the_primary_had_is_gone_with_it_and_can_be_made_again(servers):
    records = RedisRecords(servers.url)
    wait_until(lambda: is_committed(records, "a"))
    servers.replicas_hear_the_primary(hear=False)
    assert not is_committed(records, "b")
    assert records.read(["b"]) == [b"1"], "the primary has it"
    servers.primary.kill()
    servers.replicas_hear_the_primary(hear=True)
    wait_until(lambda: is_committed(records, "c"), timeout_s=60)
    assert records.read(["a", "b", "c"]) == [b"1", None, b"1"]
    records.commit(Commit({"b": b"2"}, {"b": None}))
    records.close()


def test_a_primary_that_is_known_by_its_address_alone_is_warned_of(servers):
    (told,) = (line for line in durability_warnings(f"redis://:{QUOTED}@127.0.0.1:{servers.primary_port}/1")
               if "replicas" in line)  # fmt: skip
    assert "name its Sentinels" in told
    assert not any("replicas" in line for line in durability_warnings(servers.url))


def is_secured(records):
    try:
        records.secure()
    except StoreUnavailableError:
        return False
    return True


def is_refused(rates, name):
    try:
        rates.count_request(caller(name))
    except TooManyRequestsError:
        return True
    return False
