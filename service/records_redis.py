"""Records in Redis. The only module that knows it.

A commit is one script: Redis compares what was expected, then changes every record, or none. Redis must sync every write to
disk before it answers, or an acknowledged upload could be lost; a server that says otherwise is warned of at start.

Redis is a place of work, not the truth: every commit leaves a journal entry there (``pending``, its sequence in ``waiting``)
until it lies in the object storage, from which ``anchorwell restore`` rebuilds the records of a Redis that was flushed. A
commit returns when its entry and every one before it lie there: nothing that was acknowledged stands on something that could
be lost.

No command is sent twice: a commit whose reply is lost may have taken effect, and is told as unavailable. Whoever repeats the
request finds what it did, or nothing, and is answered when that is safe.

Behind Sentinels a primary may die and a replica take its place, without what had not come to it; which one, they choose by
what they knew of each a while ago. So a commit counts when every replica that follows has confirmed it (``WAIT``), one at
least, and goes to the journal only then. No lock decides who may write: a commit names what it
expects to find, so that who was overtaken is refused.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from service.blobs import in_parallel
from service.errors import StartError, StoreLostError, StoreUnavailableError
from service.journal import Journal, JournalEntry
from service.records import Changes, Commit, ConflictError, Records

SCHEMA_VERSION = 3
_PREFIX = "anchorwell:v3:"
_DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
_COULD_BE_LOST = {
    "appendonly": "everything since Redis's last snapshot, when it stops",
    "appendfsync": "the last second of acknowledged uploads, when the machine loses power",
    "maxmemory-policy": "any batch, silently, when Redis runs out of memory",
}
_ATTEMPTS = 200
_AWAY_S = 1.0
_COMPACTED_EVERY_S = 3600
_FOLLOWS_WITHIN_S = 5
"""A replica that was not heard of for longer follows no more: it is not waited for, and Sentinels would not take it."""
_CONFIRMED_WITHIN_S = 4.0
_IN_HAND = 1_000_000
"""More entries than running processes could still be bringing to the journal when Redis is flushed, or another its primary.

So far sequences jump then: what a primary knew that died with all who had heard it has numbers that nobody else is given.
"""
_LOST, _CONFLICT, _MOVED = -1, -2, -3
_COMMIT = """
local prefix, lab, at = KEYS[1], ARGV[1], 2
local found = redis.call('GET', prefix .. 'lab')
if lab ~= '' and found ~= lab then return {-1, 0, 0} end
local function number() at = at + 1; return tonumber(ARGV[at - 1]) end
local function text() at = at + 1; return ARGV[at - 1] end
for _, verdict in ipairs({-2, -3}) do
  for _ = 1, number() do
    local key, present, value = text(), text(), text()
    local now = redis.call('GET', prefix .. 'record:' .. key)
    if (present == '1' and now ~= value) or (present == '0' and now) then return {verdict, 0, 0} end
  end
end
local index = prefix .. 'index'
for _ = 1, number() do
  local start = text()
  for _, key in ipairs(redis.call('ZRANGE', index, '[' .. start, '(' .. start .. '\\255', 'BYLEX')) do
    redis.call('DEL', prefix .. 'record:' .. key)
    redis.call('ZREM', index, key)
  end
end
for _ = 1, number() do
  local key, present, value = text(), text(), text()
  if present == '1' then
    redis.call('SET', prefix .. 'record:' .. key, value)
    redis.call('ZADD', index, 0, key)
  else
    redis.call('DEL', prefix .. 'record:' .. key)
    redis.call('ZREM', index, key)
  end
end
local entry = text()
if entry == '' then return {0, 0, 0} end
local primary = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local before = tonumber(redis.call('GET', prefix .. 'sequence') or 0)
if redis.call('GET', prefix .. 'primary') ~= primary then
  redis.call('SET', prefix .. 'primary', primary)
  redis.call('INCRBY', prefix .. 'sequence', @JUMP@)
end
local sequence = redis.call('INCR', prefix .. 'sequence')
local settled = tonumber(redis.call('ZRANGE', prefix .. 'waiting', 0, 0)[1] or sequence) - 1
redis.call('ZADD', prefix .. 'waiting', sequence, sequence)
redis.call('HSET', prefix .. 'pending', sequence, settled .. ' ' .. before .. ' ' .. entry)
return {sequence, settled, before}
""".replace("@JUMP@", str(_IN_HAND))

log = logging.getLogger("anchorwell")


class RedisRecords:
    """``Records`` in a Redis server, shared by several machines; each commit is kept in the journal, too, if any."""

    def __init__(self, url: str, lab: str | None = None, journal: Journal | None = None) -> None:
        self._lab = lab
        self._journal = journal
        self._has_replicas = _is_behind_sentinels(url)
        self._breaker = _Breaker()
        self._chain = threading.Lock()  # of this process's threads one at a time extends a chain
        self._under_way: dict[int, Future[None]] = {}
        self._under_way_lock = threading.Lock()
        try:
            self._redis = connect(url)
            _check_schema(self._redis)
        except (redis.RedisError, ValueError) as error:
            raise StartError(f"the Redis store cannot be used: {error}") from None

    def lab(self) -> str | None:
        """The lab that these records are of; None on an empty Redis."""
        with self._told():
            value = self._redis.get(_PREFIX + "lab")
        return None if value is None else str(value.decode())

    def found(self, lab: str) -> None:
        """Say whose records an empty Redis holds."""
        with self._one_connection() as connection:
            with self._told():
                connection.set(_PREFIX + "lab", lab, nx=True)
            self._confirm(connection)

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._told():
            lab, *values = self._redis.mget([_PREFIX + "lab", *(_record(key) for key in keys)])
        self._require_lab(lab)
        return list(values)

    def scan(self, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        start = b"(" + after.encode() if after else b"[" + prefix.encode()
        with self._told():
            keys = self._redis.zrange(
                _PREFIX + "index", start, b"(" + prefix.encode() + b"\xff", bylex=True, offset=0, num=limit
            )
        names = [key.decode() for key in keys]
        found = [(name, value) for name, value in zip(names, self.read(names), strict=True) if value is not None]
        return found if found or len(names) < limit else self.scan(prefix, names[-1], limit)

    def commit(self, commit: Commit) -> None:
        with self._one_connection() as connection:
            entry, sequence = self._take_effect(commit, connection)
            self._confirm(connection)
        if entry is not None:
            self._bring(sequence, entry)
            self._secure(before=sequence)
            self._conclude(sequence, entry)

    def _take_effect(self, commit: Commit, connection: Any) -> tuple[JournalEntry | None, int]:
        """Change records; returns what is to be brought to the journal, and its place there."""
        if not commit.derived:
            return self._attempt(connection, commit, {}, commit.with_derived(_nothing))
        with self._chain:
            for _ in range(_ATTEMPTS):
                now = dict(zip((item.key for item in commit.derived), self._derived_from(commit), strict=True))
                entry, outcome = self._attempt(connection, commit, now, commit.with_derived(now.__getitem__))
                if outcome != _MOVED:
                    return entry, outcome
        raise StoreUnavailableError("the end of a chain kept moving; nothing was changed")

    def _derived_from(self, commit: Commit) -> list[bytes | None]:
        return self.read([item.key for item in commit.derived])

    def _attempt(
        self, connection: Any, commit: Commit, derived_from: dict[str, bytes | None], changes: dict[str, bytes | None]
    ) -> tuple[JournalEntry | None, int]:
        entry = self._journal.entry(commit, changes) if self._journal is not None else None
        arguments: list[bytes | str | int] = [self._lab or ""]
        for values in (commit.expected, derived_from):
            arguments += _listed(values)
        arguments += [len(commit.cleared), *commit.cleared, *_listed(changes), b"" if entry is None else entry.to_bytes()]
        with self._told():
            outcome, settled, before = map(int, connection.eval(_COMMIT, 1, _PREFIX, *arguments))
        if outcome == _LOST:
            self._require_lab(None)
        if outcome == _CONFLICT:
            raise ConflictError
        return (None if entry is None else replace(entry, settled=settled, after=before)), outcome

    # --- the journal's side ------------------------------------------------------------------------------------------

    def secure(self) -> None:
        """Bring every commit to the journal that did not get there, because the object storage failed or a process died."""
        if not self._has_replicas:
            self._secure()
            return
        with self._one_connection() as connection:
            with self._told():  # what waits before the write does is confirmed with it; what comes later may not be
                lab, waiting, _ = self._transaction(
                    ("GET", "lab"), ("ZRANGE", "waiting", 0, -1), ("SET", "secured", 1), on=connection
                )
            self._require_lab(lab)
            self._confirm(connection)
        in_parallel(self._bring, sorted(map(int, waiting)))

    def compact(self, every_s: int = _COMPACTED_EVERY_S) -> None:
        """Merge what the journal has many entries of; of all processes that are asked, one does in so many seconds."""
        if self._journal is None:
            return
        with self._told():
            lab, due, sequence = self._transaction(
                ("GET", "lab"), ("SET", "compacted", 1, "NX", "EX", every_s), ("GET", "sequence")
            )
        self._require_lab(lab)
        if due:
            self.secure()
            self._journal.compact(int(sequence or 0))

    def _secure(self, before: float = math.inf) -> None:
        """Return when the journal has every commit before one; those that other threads bring there are waited for."""
        if self._journal is None:
            return
        with self._told():
            lab, restored, waiting = self._transaction(("GET", "lab"), ("GET", "restored"), ("ZRANGE", "waiting", 0, -1))
        self._require_lab(lab)
        if before <= int(restored or 0):
            raise StoreUnavailableError("Redis was flushed and restored meanwhile; nothing is known to have changed")
        in_parallel(self._bring, sorted(sequence for sequence in map(int, waiting) if sequence < before))

    def _bring(self, sequence: int, entry: JournalEntry | None = None) -> None:
        """Bring one commit to the journal, unless another thread is about to: then it is waited for."""
        with self._under_way_lock:
            known = self._under_way.get(sequence)
            mine = self._under_way.setdefault(sequence, Future())
        if known is not None:
            known.result()
            return
        try:
            self._put(sequence, entry)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(None)
        finally:
            with self._under_way_lock:
                del self._under_way[sequence]

    def _put(self, sequence: int, entry: JournalEntry | None) -> None:
        assert self._journal is not None
        if entry is None:
            with self._told():
                data = self._redis.hget(_PREFIX + "pending", sequence)
            if data is None:
                return  # another process brought it there
            settled, _, rest = data.partition(b" ")
            before, _, content = rest.partition(b" ")
            if rest.startswith(b"{"):  # of a release that did not tell what came before
                before, content = str(sequence - 1).encode(), rest
            entry = replace(JournalEntry.from_bytes(content), settled=int(settled), after=int(before))
        self._journal.keep(sequence, entry)
        with self._told():
            self._transaction(("HDEL", "pending", sequence), ("ZREM", "waiting", sequence))

    def _conclude(self, sequence: int, entry: JournalEntry) -> None:
        """Let go of what a commit deleted; what cannot be now goes when the journal is merged."""
        assert self._journal is not None
        try:
            self._journal.conclude(sequence, entry)
        except StoreUnavailableError as error:
            log.warning("the journal of what was deleted is kept for now: %s", error.detail)

    def require_empty(self) -> None:
        """Return when this Redis holds no lab's records.

        Raises:
            StartError: it does.
        """
        if self.lab() is not None:
            raise StartError("this Redis holds the records of a lab already: nothing is to be restored")

    def restored_as(self) -> str | None:
        """The name that these records were given when they were rebuilt last; None for those that never were."""
        with self._told():
            value = self._redis.get(_PREFIX + "restored-as")
        return None if value is None else str(value.decode())

    def rebuild(
        self,
        entries: Iterable[tuple[int, JournalEntry]],
        lab: str,
        name: str,
        count: Callable[[Records], Changes] = lambda _: {},
    ) -> None:
        """Fill an empty Redis from journal entries in order; the lab is named last, so that half of it is never served.

        The records have a ``name`` from then on. ``count`` gives those that are not in the journal but follow from others.

        Raises:
            StartError: it is not empty.
        """
        self.require_empty()
        last = 0
        with self._told():
            self._redis.delete(*(_PREFIX + name for name in ("index", "pending", "waiting")))
            for sequence, entry in entries:
                self._write(entry.changes, entry.cleared)
                last = sequence
            self._write(count(self))
            values: dict[str, str | int] = {"restored": last + _IN_HAND, "sequence": last + _IN_HAND}
            values |= {"restored-as": name, "lab": lab}
            with self._one_connection() as connection:
                connection.mset({_PREFIX + name: value for name, value in values.items()})
                self._confirm(connection)

    def _write(self, changes: Changes, cleared: Sequence[str] = ()) -> None:
        nothing: list[bytes | str | int] = [0, 0]
        self._redis.eval(_COMMIT, 1, _PREFIX, "", *nothing, len(cleared), *cleared, *_listed(changes), b"")

    def check(self) -> None:
        self.read([])

    def close(self) -> None:
        self._redis.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Talk to Redis inside; connections to what became a replica are closed, so that the new primary is looked for.

        Raises:
            StoreUnavailableError: it fails, or did not answer a moment ago.
        """
        with self._breaker.told():
            try:
                yield
            except redis.ReadOnlyError:
                self._redis.connection_pool.disconnect(inuse_connections=False)
                raise

    @contextmanager
    def _one_connection(self) -> Iterator[Any]:
        """Give one connection for a write and for the question whether it was confirmed, where that is asked at all."""
        if not self._has_replicas:
            yield self._redis
            return
        with self._told():
            connection = self._redis.client()
        try:
            yield connection
        finally:
            connection.close()

    def _confirm(self, connection: Any) -> None:
        """Return when what a connection wrote, and all before it, will outlive the primary.

        Raises:
            StoreUnavailableError: it may not; whether it took effect is not known.
        """
        if not self._has_replicas:
            return
        with self._told():
            wanted = max(1, _following(connection.info("replication")))
            confirmed = connection.execute_command("WAIT", wanted, round(1000 * _CONFIRMED_WITHIN_S))
        if confirmed < wanted:
            self._breaker.open()
            raise StoreUnavailableError(
                f"{confirmed} of {wanted} replicas of Redis confirmed the write in time; whether it will last is not known"
            )

    def _transaction(self, *commands: tuple[str | int, ...], on: Any = None) -> list[Any]:
        """Several commands at one moment, each on a key of ours."""
        with (on or self._redis).pipeline(transaction=True) as pipeline:
            for name, key, *rest in commands:
                pipeline.execute_command(name, f"{_PREFIX}{key}", *rest)
            return list(pipeline.execute())

    def _require_lab(self, found: bytes | None) -> None:
        if self._lab is not None and found != self._lab.encode():
            raise StoreLostError(
                "Redis holds no records, but the object storage is that of a lab: Redis was flushed or replaced; "
                "run 'anchorwell restore'"
            )


def connect(url: str, timeout_s: float = 5) -> Any:
    """Connect to ``redis://``, ``rediss://`` or ``redis+sentinel://host:port[,host:port…]/service[?db=0]``.

    No command is repeated by the client; a primary that moved is looked for when the next one connects.
    """
    options = {
        "socket_connect_timeout": min(timeout_s, 2),
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    if not _is_behind_sentinels(url):
        return redis.Redis.from_url(url, **options)
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2].split(",")
    addresses = [(host.rpartition(":")[0].strip("[]"), int(host.rpartition(":")[2])) for host in hosts]
    if not parts.path.strip("/"):
        raise ValueError("redis+sentinel:// needs the name of the service: redis+sentinel://host:26379/NAME")
    secret = {name: value for name, value in (("username", _user(parts)), ("password", _password(parts))) if value}
    database = int(parse_qs(parts.query).get("db", ["0"])[0])
    sentinel: Any = _Sentinels(addresses, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(parts.path.strip("/"), _BehindSentinel, db=database, **options, **secret)


def _following(replication: Mapping[str, Any]) -> int:
    """How many replicas follow, as a primary tells it: those whose place could be taken for the next primary's."""
    told = [value for name, value in replication.items() if name.startswith("slave") and isinstance(value, dict)]
    return sum(one["state"] == "online" and one["lag"] <= _FOLLOWS_WITHIN_S for one in told)


def _is_behind_sentinels(url: str) -> bool:
    return url.startswith("redis+sentinel://")


class _Sentinels(Sentinel):
    """Sentinels that any number of threads may ask: the client's own list loses one when two of them reorder it at once."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        asked = copy(self)
        asked.sentinels = list(self.sentinels)
        found: tuple[str, int] = super(_Sentinels, asked).discover_master(service_name)  # type: ignore[no-untyped-call]
        self.sentinels = asked.sentinels
        return found


class _BehindSentinel(redis.Redis):
    """A client that lets go of its connections to the Sentinels, too; one that it lends a connection to does not."""

    def client(self) -> redis.Redis:
        return redis.Redis(connection_pool=self.connection_pool, single_connection_client=True)

    def close(self) -> None:
        super().close()
        pool: Any = self.connection_pool
        pool.sentinel_manager.close()


def _user(parts: Any) -> str | None:
    return unquote(parts.netloc.rpartition("@")[0].partition(":")[0]) or None


def _password(parts: Any) -> str | None:
    return unquote(parts.netloc.rpartition("@")[0].partition(":")[2]) or None


def durability_warnings(url: str) -> list[str]:
    """What this Redis could lose as it is set, a sentence each; nothing when it syncs every write and never evicts."""
    server = connect(url)
    try:
        found = {name: server.config_get(name).get(name) for name in _DURABLE}
        replicas = 0 if _is_behind_sentinels(url) else server.info("replication").get("connected_slaves", 0)
    except redis.ResponseError as error:  # a managed server may forbid CONFIG
        return [f"Redis does not tell whether it syncs every write to disk ({error}): make sure that it does"]
    except redis.RedisError as error:
        raise StartError(f"the Redis store cannot be used: {error}") from None
    finally:
        server.close()
    told = [
        f"Redis has {name} {found[name]}, not {wanted}: it could lose {_COULD_BE_LOST[name]}"
        for name, wanted in _DURABLE.items()
        if found[name] != wanted
    ]
    if replicas:
        told.append(
            "Redis has replicas, but is known by one address: when one takes its place, what was acknowledged last could be "
            "lost; name its Sentinels"
        )
    return told


def _check_schema(server: Any) -> None:
    key = "anchorwell:schema"
    if server.get(key) is None:
        server.setnx(key, SCHEMA_VERSION)
    found = int(server.get(key))
    if found != SCHEMA_VERSION:
        raise StartError(f"the Redis store has schema {found}; this release reads {SCHEMA_VERSION}")


class _Breaker:
    """Tells Redis's errors as the store's own; for a moment after it did not answer, nobody waits for it again."""

    def __init__(self) -> None:
        self._away_until = 0.0
        self._is_away = False

    @contextmanager
    def told(self) -> Iterator[None]:
        """Talk to Redis inside.

        Raises:
            StoreUnavailableError: it fails, or did not answer a moment ago.
        """
        if time.monotonic() < self._away_until:
            raise StoreUnavailableError("Redis did not answer a moment ago; nothing is known to have changed")
        try:
            yield
            self._note(None)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._away_until = time.monotonic() + _AWAY_S
            self._note(error)
            raise StoreUnavailableError("Redis does not answer; nothing is known to have changed") from error
        except redis.RedisError as error:
            raise StoreUnavailableError(f"Redis failed: {error}; nothing is known to have changed") from error

    def open(self) -> None:
        """Let nobody wait for Redis for a moment: those before waited in vain."""
        self._away_until = time.monotonic() + _AWAY_S

    def _note(self, error: Exception | None) -> None:
        """Log when Redis goes away, and when it is there again."""
        if self._is_away == (error is not None):
            return
        self._is_away = error is not None
        if error is not None:
            log.warning("Redis does not answer: %s", error)
        else:
            log.warning("Redis answers again")


def _record(key: str) -> str:
    return f"{_PREFIX}record:{key}"


def _listed(values: Any) -> list[bytes | str | int]:
    """Number of records, then each as key, present (1 or 0), value."""
    listed: list[bytes | str | int] = [len(values)]
    for key, value in values.items():
        listed += [key, 0, b""] if value is None else [key, 1, value]
    return listed


def _nothing(key: str) -> bytes | None:
    raise AssertionError(key)
