"""Records in one SQLite file: write-ahead log, every commit synced to disk. The only module that knows SQLite."""

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import StartError, StoreLostError, StoreUnavailableError
from service.records import Commit, ConflictError

SCHEMA_VERSION = 3
_BUSY_TIMEOUT_S = 30.0
_LAB = "lab"


class SqliteRecords:
    """``Records`` in one file, shared by threads and processes of one machine."""

    def __init__(self, path: Path, lab: str | None = None) -> None:
        """Open the file, made when it is missing; it must be of ``lab``, whose records are lost when it is of none."""
        self._path = path
        self._lab = lab
        self._idle: deque[sqlite3.Connection] = deque()
        self._committing = threading.Lock()
        try:
            if not path.parent.is_dir():
                raise StartError(f"the store {path} cannot be opened: there is no folder {path.parent}")
            with self._connection() as db:
                _prepare_schema(db, path)
        except (OSError, sqlite3.Error, StoreUnavailableError) as error:
            raise StartError(f"the store {path} cannot be opened: {error}") from None

    def lab(self) -> str | None:
        """The lab that these records are of; None for a new file."""
        with self._connection() as db:
            value = _value(db, _LAB)
        return None if value is None else value.decode()

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._connection() as db, _transaction(db, "DEFERRED"):
            self._require_lab(db)
            return [_value(db, key) for key in keys]

    def scan(self, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        with self._connection() as db, _transaction(db, "DEFERRED"):
            self._require_lab(db)
            rows = db.execute(
                "SELECT key, value FROM record WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?",
                (prefix, _beyond(prefix), after, limit),
            )
            return [(str(key), bytes(value)) for key, value in rows]

    def commit(self, commit: Commit) -> None:
        # Who waits for another thread's commit here is woken at once; SQLite would sleep, and look again.
        with self._committing, self._connection() as db, _transaction(db, "IMMEDIATE"):
            self._require_lab(db)
            if any(_value(db, key) != value for key, value in commit.expected.items()):
                raise ConflictError
            changes = commit.with_derived(lambda key: _value(db, key))
            for prefix in commit.cleared:
                db.execute("DELETE FROM record WHERE key >= ? AND key < ?", (prefix, _beyond(prefix)))
            written = [(key, value) for key, value in changes.items() if value is not None]
            db.executemany("INSERT OR REPLACE INTO record VALUES (?, ?)", written)
            db.executemany("DELETE FROM record WHERE key = ?", [(key,) for key, value in changes.items() if value is None])

    def found(self, lab: str) -> None:
        """Say whose records a new file holds."""
        with self._connection() as db, _transaction(db, "IMMEDIATE"):
            db.execute("INSERT OR IGNORE INTO record VALUES (?, ?)", (_LAB, lab.encode()))

    def secure(self) -> None:
        pass  # a commit that is there is on disk

    def compact(self) -> None:
        pass  # SQLite does

    def check(self) -> None:
        self.read([])

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _require_lab(self, db: sqlite3.Connection) -> None:
        if self._lab is not None and _value(db, _LAB) != self._lab.encode():
            raise StoreLostError(
                f"{self._path.name} holds no records, but the files beside it are those of a lab: put the file back from a "
                "backup, or give a new data directory"
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; one is opened whenever all others are in use."""
        try:
            db = self._idle.pop() if self._idle else self._open()
        except IndexError:  # another thread took the last idle one
            db = self._open()
        try:
            yield db
        except (ConflictError, StoreLostError):
            self._idle.append(db)
            raise
        except sqlite3.Error as error:
            db.close()
            raise StoreUnavailableError(f"the store failed: {error}; nothing was changed") from error
        except BaseException:
            db.close()
            raise
        self._idle.append(db)

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"the store cannot be opened: {error}") from error
        return db


def _value(db: sqlite3.Connection, key: str) -> bytes | None:
    row = db.execute("SELECT value FROM record WHERE key = ?", (key,)).fetchone()
    return None if row is None else bytes(row[0])


def _beyond(prefix: str) -> str:
    """The first text, in the order of UTF-8 bytes, that is behind everything which starts with ``prefix``."""
    return prefix + "\U0010ffff"


def _prepare_schema(db: sqlite3.Connection, path: Path) -> None:
    with _transaction(db, "IMMEDIATE"):
        db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = db.execute("SELECT version FROM schema_version").fetchone()
        if row is None:
            db.execute("CREATE TABLE record (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL)")
            db.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        elif row[0] != SCHEMA_VERSION:
            raise StartError(f"the store {path} has schema {row[0]}; this release reads {SCHEMA_VERSION}")


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
