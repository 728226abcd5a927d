"""What is forgotten in time: what a tenant keeps no longer, what ended long ago, and files that nothing names.

Runs in the background, every hour, on every machine; two that do it at once do it once. Deleting is as final as it is when
a client asks for it, and stands in the audit log.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from service.blobs import PARTIAL
from service.deeds import Deed
from service.errors import JobNotFoundError
from service.idempotency import PREFIX as IDEMPOTENCY
from service.jobs import ASKED, OPEN, PREFIX, Asked, Job, Jobs
from service.records import Commit, ConflictError, scan_all
from service.storage import Storage
from service.store import BLOBS, BatchRecord, BatchStore, RevisionConflictError

BY = "retention"
EVERY = timedelta(hours=1)
JOBS_KEPT_FOR = timedelta(days=30)
ORPHANS_KEPT_FOR = timedelta(days=1)
"""No request or job works so long before its commit names what it keeps."""
_SWEPT = "lease/sweep"

log = logging.getLogger("anchorwell")


class Rules(Protocol):
    """How long a tenant keeps what; None is for ever."""

    @property
    def keep_days(self) -> float | None:
        """Days from a batch's last change to its deletion."""
        ...

    @property
    def keep_staged_days(self) -> float | None:
        """Days for which a plane that was sent ahead is kept."""
        ...


@dataclass(frozen=True)
class Retention:
    """Forgets what is kept no longer, by each tenant's ``rules``."""

    storage: Storage
    jobs: Jobs
    rules: Callable[[str], Rules]
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    def look_after(self) -> None:
        """Sweep when an hour has passed since anybody did."""
        (data,) = self.storage.records.read([_SWEPT])
        if data is not None and self.now() - datetime.fromisoformat(data.decode()) < EVERY:
            return
        with suppress(ConflictError):
            self.storage.records.commit(Commit({_SWEPT: self.now().isoformat().encode()}, {_SWEPT: data}, scope=_SWEPT))
            self.sweep()

    def sweep(self) -> None:
        """Forget everything whose time has come."""
        self._forget_answered_requests()
        self._forget_jobs()
        for tenant in self._tenants():
            self._forget_batches(tenant)
        self._forget_orphans()

    # --- by time -----------------------------------------------------------------------------------------------------

    def _forget_answered_requests(self) -> None:
        records = self.storage.records
        for key, data in scan_all(records, IDEMPOTENCY):
            found = json.loads(data)
            if found["state"] == "done" and datetime.fromisoformat(found["until"]) < self.now():
                with suppress(ConflictError):  # somebody uses the key again
                    records.commit(Commit({key: None}, {key: data}, scope=key))

    def _forget_jobs(self) -> None:
        for _, data in scan_all(self.storage.records, PREFIX):
            job = Job.from_bytes(data)
            if job.state not in OPEN and self._is_over(job.finished_at or job.created_at, JOBS_KEPT_FOR):
                with suppress(JobNotFoundError):  # its tenant deleted it
                    self.jobs.delete(self._deed(job.tenant), job.job_id)

    def _forget_batches(self, tenant: str) -> None:
        rules, store = self.rules(tenant), self.storage.of(tenant)
        if rules.keep_days is None and rules.keep_staged_days is None:
            return
        for batch_id in store.batch_ids():
            batch = store.batch(batch_id)
            if batch is None:
                continue
            with suppress(RevisionConflictError):  # it is in use: next time
                if rules.keep_days is not None and self._is_over(batch.changed_at, timedelta(days=rules.keep_days)):
                    store.delete(batch, self._deed(tenant).done("batch.deleted", batch_id, {"by_age_days": rules.keep_days}))
                elif rules.keep_staged_days is not None:
                    self._forget_staged(store, batch, timedelta(days=rules.keep_staged_days))

    def _forget_staged(self, store: BatchStore, batch: BatchRecord, kept_for: timedelta) -> None:
        old = [plane for plane in store.staged(batch.batch_id) if self._is_over(plane.staged_at, kept_for)]
        if old:
            told = {"sha256": sorted(plane.sha256 for plane in old)}
            store.unstage(batch, old, self._deed(store.tenant).done("plane.forgotten", batch.batch_id, told))

    def _is_over(self, since: datetime | str | None, kept_for: timedelta) -> bool:
        at = datetime.fromisoformat(since) if isinstance(since, str) else since
        return at is not None and self.now() - at > kept_for

    def _deed(self, tenant: str) -> Deed:
        return Deed(tenant, BY, now=self.now)

    def _tenants(self) -> list[str]:
        """Tenants with batches."""
        found: list[str] = []
        prefix = "batch/"
        while page := self.storage.records.scan(prefix, f"{prefix}{found[-1]}0" if found else "", limit=1):
            found.append(page[0][0].removeprefix(prefix).partition("/")[0])
        return found

    # --- files that nothing names ------------------------------------------------------------------------------------

    def _forget_orphans(self) -> None:
        """Delete what a process that died left behind: files that were written, and never named by a commit."""
        blobs = self.storage.blobs
        old = blobs.older(BLOBS, self.now() - ORPHANS_KEPT_FOR)
        orphans = sorted(set(old) - self._named()) if old else []
        partial = blobs.older(f"{PARTIAL}/", self.now() - ORPHANS_KEPT_FOR)
        if orphans or partial:
            log.info("%d files that nothing names are deleted", len(orphans) + len(partial))
        blobs.delete([*orphans, *partial])

    def _named(self) -> set[str]:
        """Every blob that a record names; those of newer files are not asked about."""
        named: set[str] = set()
        for tenant in self._tenants():
            store = self.storage.of(tenant)
            batches = (store.batch(batch_id) for batch_id in store.batch_ids())
            for batch in batches:
                named |= {f"{BLOBS}{tenant}/{blob}" for blob in (store.blobs_of(batch) if batch is not None else ())}
        for key, data in scan_all(self.storage.records, ASKED):
            tenant = key.removeprefix(ASKED).partition("/")[0]
            named |= {f"{BLOBS}{tenant}/{blob}" for blob in Asked.from_bytes(data).files}
        return named
