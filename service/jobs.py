"""Jobs: requests that are answered later. A job is a row of its own: it may run again, but takes effect once.

The row says of whom it is and how it ended. What was asked and what was answered, which may be long, are records beside it,
and images that came with the request are kept as long as the job is open. Who runs it holds a lease in a further record,
which is pushed on while it runs and carries the progress; when the lease runs out, the next worker may take the job. Its
effect is committed together with its row, which only the holder of the latest lease can write.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, Protocol

from model.errors import AnchorwellError
from model.statistics import canonical_json
from service import schemas
from service.deeds import Beside, Deed
from service.errors import (
    JobAbandonedError,
    JobCancelledError,
    JobNotFoundError,
    UnavailableError,
    problem_body,
)
from service.records import Changes, Commit, ConflictError, Records, scan_all
from service.storage import Storage
from service.usage import Usage

PREFIX = "job/"
ASKED = "job-asked/"
ANSWERS = "job-answer/"
LEASE = timedelta(seconds=30)
MAX_ATTEMPTS = 8
FAILED = "job.failed"
OPEN = ("queued", "running")


@dataclass(frozen=True)
class Job:
    """One row: who asked for what of which batch, and how it ended; ``size`` is what images kept for it take, in bytes."""

    job_id: str
    tenant: str
    by: str
    request_id: str
    kind: str
    batch_id: str
    created_at: str
    size: int = 0
    state: str = "queued"
    attempt: int = 0
    run: str = ""
    finished_at: str | None = None
    problem: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Its record."""
        return f"{PREFIX}{self.tenant}/{self.job_id}"

    @property
    def lease(self) -> str:
        """The record of who runs it, until when, and how far it is."""
        return f"lease/{self.name}"

    @property
    def asked(self) -> str:
        """The record of what was asked."""
        return f"{ASKED}{self.tenant}/{self.job_id}"

    @property
    def answer(self) -> str:
        """The record of what was answered."""
        return f"{ANSWERS}{self.tenant}/{self.job_id}"

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON."""
        return canonical_json(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Job":
        """Read what ``to_bytes`` wrote."""
        return cls(**json.loads(data))


class Runner(Protocol):
    """Does what a job asks, and commits its effect with what stands beside it."""

    def __call__(self, job: Job, deed: Deed) -> None:
        """Run a job."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a job is to do: ``what`` only who runs it understands; ``files`` are blobs that are kept for it, of ``size``."""

    what: Mapping[str, Any]
    files: tuple[str, ...] = ()
    size: int = 0

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON."""
        return canonical_json(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Asked":
        """Read what ``to_bytes`` wrote."""
        value = json.loads(data)
        return cls(value["what"], tuple(value["files"]), value["size"])


@dataclass(frozen=True)
class _Ending:
    """A job's end; stands beside its effect."""

    job: Job
    usage: Usage
    now: Callable[[], datetime]

    def commit(self, deed: Deed, action: str, subject: str, answer: bytes | None) -> Commit:  # noqa: ARG002
        """Write the row's end; the commit conflicts when another worker took the job, or it was deleted."""
        ended = replace(self.job, state="done", finished_at=self.now().isoformat(), size=0)
        changes = {self.job.name: ended.to_bytes(), self.job.lease: None, self.job.asked: None, self.job.answer: answer}
        return Commit(changes, {self.job.name: self.job.to_bytes()}, derived=self.usage.changed(-self.job.size))


@dataclass(frozen=True)
class Jobs:
    """Every tenant's jobs."""

    storage: Storage
    enqueue: Callable[[str, str], None]
    events: Beside
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    @property
    def records(self) -> Records:
        """Where they are kept."""
        return self.storage.records

    # --- asked for ---------------------------------------------------------------------------------------------------

    def put(self, deed: Deed, kind: str, batch_id: str, asked: Asked) -> schemas.JobReport:
        """Keep a new job, and enqueue it.

        Raises:
            QuotaExceededError: there is no room for what came with it.
        """
        now = self.now().isoformat()
        job = Job(token_hex(12), deed.tenant, deed.by, deed.request_id, kind, batch_id, now, asked.size)
        report = self._report(job, None)
        beside = deed.done("job.queued", batch_id, {"job_id": job.job_id}, report.model_dump_json().encode())
        derived = self.storage.of(job.tenant).usage.changed(asked.size)
        changes: Changes = {job.name: job.to_bytes(), job.asked: asked.to_bytes()}
        self.records.commit(Commit(changes, {job.name: None}, derived=derived, scope=job.name).and_also(beside))
        self.enqueue("job", job.name)
        return report

    def asked(self, job: Job) -> Asked:
        """What an open job is to do.

        Raises:
            JobCancelledError: it is open no more.
        """
        (data,) = self.records.read([job.asked])
        if data is None:
            raise JobCancelledError(f"job {job.job_id} was deleted, or done by another worker")
        return Asked.from_bytes(data)

    def get(self, tenant: str, job_id: str) -> schemas.JobReport:
        """How far a job is, or how it ended.

        Raises:
            JobNotFoundError: the tenant has no such job.
        """
        job, lease = self._read(tenant, job_id)
        (answer,) = self.records.read([job.answer])
        return self._report(job, lease, answer)

    def all(self, tenant: str) -> schemas.JobList:
        """A tenant's jobs, the newest first, without their answers."""
        found = [Job.from_bytes(data) for _, data in scan_all(self.records, f"{PREFIX}{tenant}/")]
        found.sort(key=lambda job: job.created_at, reverse=True)
        leases = self.records.read([job.lease for job in found])
        return schemas.JobList(jobs=tuple(self._report(job, lease) for job, lease in zip(found, leases, strict=True)))

    def delete(self, deed: Deed, job_id: str) -> None:
        """Forget a job; one that did not take effect yet never will.

        Raises:
            JobNotFoundError: the tenant has no such job.
        """
        while True:
            job, _ = self._read(deed.tenant, job_id)
            files = self._files(job)
            beside = deed.done("job.deleted", job.batch_id, {"job_id": job_id, "state": job.state})
            changes = dict.fromkeys((job.name, job.lease, job.asked, job.answer))
            usage = self.storage.of(job.tenant).usage.changed(-job.size)
            gone = Commit(changes, {job.name: job.to_bytes()}, derived=usage, scope=job.name)
            with suppress(ConflictError):
                self.records.commit(gone.and_also(beside))
                self.storage.of(job.tenant).drop_files(files)
                return

    def _files(self, job: Job) -> tuple[str, ...]:
        (data,) = self.records.read([job.asked])
        return () if data is None else Asked.from_bytes(data).files

    # --- run ---------------------------------------------------------------------------------------------------------

    def run(self, name: str, runner: Runner) -> None:
        """Run a job, when it should run and nobody runs it; a fault of the request ends it, one of the moment does not."""
        job = self._taken(name)
        if job is None:
            return
        files = self._files(job)
        with self._lease_held(job) as progress:
            ending = _Ending(job, self.storage.of(job.tenant).usage, self.now)
            deed = Deed(job.tenant, job.by, job.request_id, (ending,), self.events, progress, self.now)
            try:
                runner(job, deed)
                self.storage.of(job.tenant).drop_files(files)
            except JobCancelledError:
                return
            except UnavailableError as error:
                self._put_back(job, error)
            except AnchorwellError as error:
                self._fail(job, error)
            except Exception as error:
                self._put_back(job, error)
                raise

    def look_after(self) -> None:
        """Enqueue what should run and does not: the message was lost, or the worker died."""
        for _, data in scan_all(self.records, PREFIX):
            job = Job.from_bytes(data)
            (lease,) = self.records.read([job.lease])
            if job.state in OPEN and not self._is_held(lease):
                self.enqueue("job", job.name)

    def _taken(self, name: str) -> Job | None:
        data, lease = self.records.read([name, f"lease/{name}"])
        if data is None:
            return None
        job = Job.from_bytes(data)
        if job.state not in OPEN or self._is_held(lease):
            return None
        if job.attempt >= MAX_ATTEMPTS:
            self._fail(
                job, JobAbandonedError(f"job {job.job_id} was begun {job.attempt} times, and no worker came to its end")
            )
            return None
        taken = replace(job, state="running", attempt=job.attempt + 1, run=token_hex(8))
        changes = {name: taken.to_bytes(), job.lease: self._lease(0, 0)}
        try:
            self.records.commit(Commit(changes, {name: data, job.lease: lease}, scope=name))
        except ConflictError:
            return None
        return taken

    @contextmanager
    def _lease_held(self, job: Job) -> Iterator[Callable[[int, int], None]]:
        """Push a job's lease on while it runs; the function that is given tells progress, and raises when it was taken."""
        state = {"done": 0, "total": 0}
        lost, over = threading.Event(), threading.Event()

        def push_on() -> None:
            while not over.wait(LEASE.total_seconds() / 6):
                changes = {job.lease: self._lease(state["done"], state["total"])}
                with suppress(UnavailableError):
                    try:
                        self.records.commit(Commit(changes, {job.name: job.to_bytes()}, scope=job.name))
                    except ConflictError:
                        lost.set()

        def progress(done: int, total: int) -> None:
            state.update(done=done, total=total)
            if lost.is_set():
                raise JobCancelledError(f"job {job.job_id} was deleted, or taken by another worker")

        thread = threading.Thread(target=push_on, name="lease", daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            over.set()
            thread.join()

    def _put_back(self, job: Job, error: Exception) -> None:
        """Let a job run again, after its lease; too many times end it."""
        if job.attempt >= MAX_ATTEMPTS:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        problem = problem_body(error)
        ended = replace(job, state="failed", finished_at=self.now().isoformat(), problem=problem, size=0)
        files = self._files(job)
        deed = Deed(job.tenant, job.by, job.request_id, events=self.events, now=self.now)
        told = canonical_json({"job_id": job.job_id, "problem": problem})
        beside = deed.done(FAILED, job.batch_id, {"job_id": job.job_id}, told)
        changes: Changes = {job.name: ended.to_bytes(), job.lease: None, job.asked: None}
        store = self.storage.of(job.tenant)
        derived = store.usage.changed(-job.size)
        with suppress(ConflictError):
            commit = Commit(changes, {job.name: job.to_bytes()}, derived=derived, scope=job.name)
            self.records.commit(commit.and_also(beside))
            store.drop_files(files)

    # --- told --------------------------------------------------------------------------------------------------------

    def _read(self, tenant: str, job_id: str) -> tuple[Job, bytes | None]:
        name = f"{PREFIX}{tenant}/{job_id}"
        data, lease = self.records.read([name, f"lease/{name}"])
        if data is None:
            raise JobNotFoundError(f"there is no job {job_id[:40]!r}", job_id=job_id[:40])
        return Job.from_bytes(data), lease

    def _report(self, job: Job, lease: bytes | None, answer: bytes | None = None) -> schemas.JobReport:
        told = json.loads(answer) if answer is not None else None
        progress = json.loads(lease) if lease is not None else {"done": 0, "total": 0}
        return schemas.JobReport.model_validate(
            {
                "job_id": job.job_id,
                "kind": job.kind,
                "batch_id": job.batch_id,
                "state": job.state,
                "attempt": job.attempt,
                "wells_done": progress["done"],
                "wells": progress["total"],
                "created_at": job.created_at,
                "finished_at": job.finished_at,
                "controls": told if job.kind == "controls" else None,
                "prediction": told if job.kind == "predict" else None,
                "problem": job.problem,
            }
        )

    def _lease(self, done: int, total: int) -> bytes:
        return canonical_json({"until": (self.now() + LEASE).isoformat(), "done": done, "total": total})

    def _is_held(self, lease: bytes | None) -> bool:
        return lease is not None and datetime.fromisoformat(json.loads(lease)["until"]) > self.now()
