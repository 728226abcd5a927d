"""Batches in one SQLite file: write-ahead log, every commit synced to disk."""

import json
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.layout import SiteKey
from model.statistics import canonical_json
from service.errors import StartError, StoreUnavailableError
from service.store import (
    TENANT,
    Adaptation,
    BatchRecord,
    Change,
    ControlSite,
    RevisionConflictError,
    image_bytes,
    image_from_bytes,
    next_revision,
)

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE batch (
    tenant TEXT NOT NULL, batch_id TEXT NOT NULL, revision TEXT NOT NULL, pixel_size_um REAL, plate TEXT,
    changed_at TEXT NOT NULL,
    PRIMARY KEY (tenant, batch_id)
) WITHOUT ROWID;
CREATE TABLE control_site (
    tenant TEXT NOT NULL, batch_id TEXT NOT NULL, well TEXT NOT NULL, site INTEGER NOT NULL,
    recipe_digest TEXT NOT NULL, planes TEXT NOT NULL, image BLOB NOT NULL,
    PRIMARY KEY (tenant, batch_id, well, site),
    FOREIGN KEY (tenant, batch_id) REFERENCES batch ON DELETE CASCADE
);
CREATE TABLE treated_well (
    tenant TEXT NOT NULL, batch_id TEXT NOT NULL, well TEXT NOT NULL,
    PRIMARY KEY (tenant, batch_id, well),
    FOREIGN KEY (tenant, batch_id) REFERENCES batch ON DELETE CASCADE
) WITHOUT ROWID;
CREATE TABLE adaptation (
    tenant TEXT NOT NULL, batch_id TEXT NOT NULL, bundle_digest TEXT NOT NULL, statistics_id TEXT NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (tenant, batch_id, bundle_digest, statistics_id),
    FOREIGN KEY (tenant, batch_id) REFERENCES batch ON DELETE CASCADE
);
"""


class SqliteStore:
    """A ``Store`` in one file, shared by threads and processes of one machine."""

    def __init__(self, path: str, tenant: str = TENANT) -> None:
        self._path = path
        self._tenant = tenant
        self._idle: deque[sqlite3.Connection] = deque()
        try:
            if not Path(path).parent.is_dir():
                raise StartError(f"the store {path} cannot be opened: there is no folder {Path(path).parent}")
            with self._connection() as db:
                _prepare_schema(db, path)
        except (OSError, sqlite3.Error, StoreUnavailableError) as error:
            raise StartError(f"the store {path} cannot be opened: {error}") from None

    def batch_ids(self) -> list[str]:
        with self._connection() as db:
            rows = db.execute("SELECT batch_id FROM batch WHERE tenant = ? ORDER BY batch_id", (self._tenant,))
            return [str(batch_id) for (batch_id,) in rows]

    def batch(self, batch_id: str) -> BatchRecord | None:
        at = (self._tenant, batch_id)
        with self._connection() as db, _transaction(db, "DEFERRED"):
            head = db.execute(
                "SELECT revision, pixel_size_um, plate, changed_at FROM batch WHERE tenant = ? AND batch_id = ?", at
            ).fetchone()
            if head is None:
                return None
            controls = db.execute(
                "SELECT well, site, planes, recipe_digest FROM control_site WHERE tenant = ? AND batch_id = ?", at
            ).fetchall()
            treated = db.execute("SELECT well FROM treated_well WHERE tenant = ? AND batch_id = ?", at).fetchall()
            adaptations = db.execute(
                "SELECT bundle_digest, statistics_id FROM adaptation WHERE tenant = ? AND batch_id = ?", at
            ).fetchall()
        sites = [ControlSite(SiteKey(well, site), json.loads(planes), recipe) for well, site, planes, recipe in controls]
        return BatchRecord(
            batch_id=batch_id,
            revision=head[0],
            pixel_size_um=head[1],
            plate=head[2],
            controls={site.key: site for site in sorted(sites, key=lambda site: site.key)},
            treated=frozenset(well for (well,) in treated),
            adaptations=frozenset((bundle, statistics) for bundle, statistics in adaptations),
            changed_at=datetime.fromisoformat(head[3]),
        )

    def image(self, batch_id: str, site: SiteKey) -> NDArray[np.float32] | None:
        with self._connection() as db:
            row = db.execute(
                "SELECT image FROM control_site WHERE tenant = ? AND batch_id = ? AND well = ? AND site = ?",
                (self._tenant, batch_id, site.well, site.site),
            ).fetchone()
        return None if row is None else image_from_bytes(row[0])

    def adaptation(self, batch_id: str, bundle_digest: str, statistics_id: str) -> Adaptation | None:
        with self._connection() as db:
            row = db.execute(
                "SELECT content FROM adaptation "
                "WHERE tenant = ? AND batch_id = ? AND bundle_digest = ? AND statistics_id = ?",
                (self._tenant, batch_id, bundle_digest, statistics_id),
            ).fetchone()
        return None if row is None else Adaptation.from_bytes(row[0])

    def commit(self, batch_id: str, expected_revision: str | None, change: Change) -> None:
        at = (self._tenant, batch_id)
        images = [
            (*at, site.key.well, site.key.site, site.recipe_digest, canonical_json(dict(site.planes)).decode(),
             image_bytes(image))
            for site, image in change.controls
        ]  # fmt: skip
        with self._connection() as db, _transaction(db, "IMMEDIATE"):
            head = db.execute("SELECT revision FROM batch WHERE tenant = ? AND batch_id = ?", at).fetchone()
            if (None if head is None else head[0]) != expected_revision:
                raise RevisionConflictError
            db.execute(
                "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET revision = excluded.revision, "
                "pixel_size_um = coalesce(excluded.pixel_size_um, pixel_size_um), plate = coalesce(excluded.plate, plate), "
                "changed_at = excluded.changed_at",
                (*at, next_revision(expected_revision), change.pixel_size_um, change.plate, change.changed_at.isoformat()),
            )
            db.executemany("INSERT OR REPLACE INTO control_site VALUES (?, ?, ?, ?, ?, ?, ?)", images)
            db.executemany(
                "INSERT OR IGNORE INTO treated_well VALUES (?, ?, ?)", [(*at, well) for well in sorted(change.treated)]
            )
            if change.adaptation is not None:
                adaptation = change.adaptation
                db.execute(
                    "INSERT OR REPLACE INTO adaptation VALUES (?, ?, ?, ?, ?)",
                    (*at, adaptation.bundle_digest, adaptation.statistics_id, adaptation.to_bytes()),
                )

    def delete(self, batch_id: str) -> bool:
        with self._connection() as db, _transaction(db, "IMMEDIATE"):
            deleted = db.execute("DELETE FROM batch WHERE tenant = ? AND batch_id = ?", (self._tenant, batch_id))
            return deleted.rowcount > 0

    def check(self) -> None:
        with self._connection() as db:
            db.execute("SELECT version FROM schema_version").fetchone()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; one is opened whenever all others are in use."""
        try:
            db = self._idle.pop() if self._idle else self._open()
        except IndexError:  # another thread took the last idle one
            db = self._open()
        try:
            yield db
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
            db.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"the store cannot be opened: {error}") from error
        return db


def _prepare_schema(db: sqlite3.Connection, path: str) -> None:
    with _transaction(db, "IMMEDIATE"):
        db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = db.execute("SELECT version FROM schema_version").fetchone()
        if row is None:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        elif row[0] != SCHEMA_VERSION:
            raise StartError(f"the store {path} has schema {row[0]}; this release reads {SCHEMA_VERSION}: update it")


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
