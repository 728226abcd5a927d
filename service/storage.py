"""Opens what a lab's data lies in: records (SQLite or Redis) and blobs (files or object storage) that belong together.

Both carry the lab's name, drawn when they are first used together. Records that lost theirs while the blobs have it were
flushed, or are others: they are never taken for those of an empty lab.
"""

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from service.blobs import Blobs, FileBlobs, open_object_blobs
from service.errors import BlobMissingError, StartError, UnavailableError
from service.journal import Journal
from service.records import Changes, Records, scan_all
from service.records_sqlite import SqliteRecords
from service.store import STAGED_BYTES, BatchRecord, BatchStore
from service.usage import USAGE, amount

if TYPE_CHECKING:
    from service.records_redis import RedisRecords

RECORDS_FILE = "records.db"
BLOBS_DIRECTORY = "blobs"
_OURS = (RECORDS_FILE, BLOBS_DIRECTORY, "queue.db", "spool")
"""What the service has in the data directory; of what else lies there, such as a volume's lost+found, it needs nothing."""
_LAB = "lab"
_RESTORED_AS = "restored-as"

log = logging.getLogger("anchorwell")


@dataclass(frozen=True)
class Storage:
    """Records and blobs of one lab, and each tenant's batches in them; a tenant's images may take ``max_bytes``."""

    records: Records
    blobs: Blobs
    max_bytes: Callable[[str], int | None] = lambda _: None
    _stores: dict[str, BatchStore] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, tenant: str) -> BatchStore:
        """The batches of a tenant."""
        with self._lock:
            return self._stores.setdefault(tenant, BatchStore(self.records, self.blobs, tenant, self.max_bytes(tenant)))

    def close(self) -> None:
        """Let go of connections."""
        self.records.close()


def open_storage(data: Path, redis: str | None = None, objects: str | None = None) -> Storage:
    """Open a lab's storage, and found it when it is new.

    Args:
        data: the data directory; records and blobs lie in it unless the following name another place.
        redis: URL of a Redis for the records.
        objects: URL of object storage for the blobs.

    Raises:
        StartError: it cannot be used, or its parts are of different labs.
    """
    if not data.parent.is_dir():
        raise StartError(f"the data directory {data} cannot be made: there is no folder {data.parent}")
    _require_writable(data)
    blobs: Blobs = FileBlobs(data / BLOBS_DIRECTORY) if objects is None else open_object_blobs(objects)
    if redis is None:
        new = SqliteRecords(data / RECORDS_FILE)
        lab = _agreed_lab(new, blobs)
        new.close()
        return Storage(SqliteRecords(data / RECORDS_FILE, lab), blobs)
    from service.records_redis import RedisRecords  # noqa: PLC0415 (an embedded service needs no Redis)

    unbound = RedisRecords(redis)
    lab = _agreed_lab(unbound, blobs)
    _require_latest(unbound, blobs)
    unbound.close()
    records = RedisRecords(redis, lab, Journal(blobs))
    _secure(records)
    return Storage(records, blobs)


def _require_writable(data: Path) -> None:
    """Make the data directory where it is missing.

    Raises:
        StartError: it cannot be made, or it or what the service has in it cannot be written.
    """
    try:
        data.mkdir(exist_ok=True)
    except OSError as error:
        raise StartError(f"the data directory {data} cannot be used: {error.strerror}") from None
    for path in (data, *(data / name for name in _OURS)):
        if path.exists() and not os.access(path, os.W_OK):
            raise StartError(f"{path} cannot be written by this user: it is of the data directory, which must be")


def _secure(records: Records) -> None:
    """Bring to safety what a process that died left behind; what cannot be yet is looked after while the service runs."""
    try:
        records.secure()
    except UnavailableError as error:
        log.warning("what was committed last could not be brought to safety yet: %s", error.detail)


def rebuild_records(data: Path, redis: str, objects: str | None) -> int:
    """Rebuild the records of a flushed Redis from the journal; how many there are.

    What was committed after something that never got to the journal was not acknowledged either, and is set aside.

    Raises:
        StartError: Redis holds records, or there is no journal to rebuild them from.
    """
    from service.records_redis import RedisRecords  # noqa: PLC0415 (as above)

    blobs: Blobs = FileBlobs(data / BLOBS_DIRECTORY) if objects is None else open_object_blobs(objects)
    lab = lab_of(blobs)
    if lab is None:
        raise StartError("there is no lab in the object storage: check where images are kept")
    records, journal = RedisRecords(redis), Journal(blobs)
    records.require_empty()
    try:
        aside, name = journal.set_aside(), token_hex(16)
        blobs.put(_RESTORED_AS, name.encode())
        records.rebuild(journal.entries(), lab, name, _usage_of)
    except BlobMissingError:
        raise StartError("a running service is merging the journal: restore again in a minute") from None
    if aside:
        log.warning("%d entries that were never acknowledged are set aside: something before them is missing", aside)
    count = sum(1 for _ in scan_all(records, ""))
    records.close()
    return count


def _require_latest(records: "RedisRecords", blobs: Blobs) -> None:
    """Return when these are the records that the blobs are with, and not those of a Redis of before a restore.

    Raises:
        StartError: they were restored into another Redis.
    """
    try:
        latest = blobs.get(_RESTORED_AS).decode()
    except BlobMissingError:
        return
    if records.lab() is not None and records.restored_as() != latest:
        raise StartError(
            "this Redis was the lab's before its records were restored into another one: use that, or empty this one and "
            "run 'anchorwell restore'"
        )


def _usage_of(records: Records) -> Changes:
    """Count anew what every tenant's images take: controls, planes sent ahead, and what is kept for open jobs."""
    found: Counter[str] = Counter()
    for prefix in ("batch/", "part/", "job/"):
        for key, data in scan_all(records, prefix):
            tenant, _, name = key.removeprefix(prefix).partition("/")
            if prefix == "batch/":
                found[tenant] += BatchRecord.from_bytes(name, data).control_bytes
            elif prefix == "job/":
                found[tenant] += int(json.loads(data)["size"])
            elif name.endswith(f"/{STAGED_BYTES}"):
                found[tenant] += amount(data)
    return {USAGE + tenant: str(total).encode() for tenant, total in found.items() if total}


def lab_of(blobs: Blobs) -> str | None:
    """The lab whose blobs these are; None for new ones."""
    try:
        return blobs.get(_LAB).decode()
    except BlobMissingError:
        return None


def _agreed_lab(records: "SqliteRecords | RedisRecords", blobs: Blobs) -> str:
    """Return the lab's name; records without one keep none when the blobs have one: they are lost, not new."""
    of_records, of_blobs = records.lab(), lab_of(blobs)
    if of_blobs is not None:
        if of_records not in (None, of_blobs):
            raise StartError("the records are of one lab and the images of another: check where they are kept")
        return of_blobs
    if of_records is not None and any(key != _LAB for key, _ in records.scan("", limit=2)):
        raise StartError("the records are of a lab whose images are not there: check where they are kept")
    records.found(token_hex(16))
    lab = records.lab()
    assert lab is not None
    blobs.put(_LAB, lab.encode())
    return lab
