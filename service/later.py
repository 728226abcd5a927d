"""Work that is answered later: posts kept as jobs, and the jobs run by the two stories.

A job is asked for what was there when it was: images that came with the post are kept for it alone, and of planes that were
sent ahead those that were there then are taken, or none.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from model.layout import Role, SiteKey
from service import schemas
from service.batches import Batches, Stopwatch
from service.decoding import FileSlice
from service.deeds import Deed
from service.errors import BatchBusyError, QuotaExceededError, StagedConflictError
from service.jobs import Asked, Job, Jobs
from service.posts import Post, Receiver, Sent
from service.staging import StagedFile
from service.store import BatchRecord, BatchStore, new_blob, new_shard
from service.uploads import SentFile, Skipped, Upload

ROLES = {"controls": Role.CONTROL, "predict": Role.TREATED}


@dataclass(frozen=True)
class JobFile:
    """A plane's file, as it was when the job was asked for."""

    store: BatchStore
    batch: BatchRecord
    well: str
    site: int
    channel: str
    name: str
    content: str
    blob: str
    size: int
    page: int | None = None

    def told(self) -> list[Any]:
        """All but the store and the batch, as JSON has it."""
        return [self.well, self.site, self.channel, self.name, self.content, self.blob, self.size, self.page]

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as bytes on this machine's disk.

        Raises:
            StagedConflictError: another image took its place since the job was asked for.
        """
        try:
            with self.store.file(self.batch, self.blob) as path:
                yield FileSlice(path, 0, self.size, self.name, self.page)
        except BatchBusyError:
            raise StagedConflictError(
                f"batch {self.batch.batch_id} keeps another image for well {self.well} site {self.site} channel "
                f"{self.channel} than when the job was asked for: ask again",
                batch_id=self.batch.batch_id,
                well=self.well,
                site=self.site,
                channel=self.channel,
            ) from None


@dataclass(frozen=True)
class Later:
    """Takes posts as jobs, and runs them."""

    batches: Batches
    receiver: Receiver
    jobs: Jobs

    def put(self, post: Post, kind: str, batch_id: str, options: Mapping[str, bool]) -> schemas.JobReport:
        """Keep a post as a job.

        Raises:
            QuotaExceededError: there is no room for the images that came with it.
        """
        store = self.jobs.storage.of(post.deed.tenant)
        batch = store.batch(batch_id) or BatchRecord(batch_id)
        what: dict[str, Any] = {
            "incarnation": post.upload.incarnation or batch.incarnation,
            "plate": post.upload.plate,
            "options": dict(options),
        }
        if post.sent is not None and not post.sent.staged:
            what["sent"] = post.sent.model_dump(mode="json")
            return self.jobs.put(post.deed, kind, batch_id, Asked(what))
        what["pixel_size_um"] = post.upload.pixel_size_um
        what["notices"] = list(post.upload.notices)
        what["skipped"] = [[item.file, item.reason] for item in post.upload.skipped]
        keeping = _Keeping(store, batch)
        what["planes"] = [file.told() for file in keeping.files(post.upload)]
        try:
            return self.jobs.put(post.deed, kind, batch_id, Asked(what, tuple(keeping.put), sum(keeping.put.values())))
        except QuotaExceededError:
            store.drop_files(keeping.put)
            raise

    def run(self, job: Job, deed: Deed) -> None:
        """Do what a job asks."""
        what = self.jobs.asked(job).what
        story = self.batches.adapt if job.kind == "controls" else self.batches.classify
        story(deed, job.batch_id, self._upload(job, what), Stopwatch(), **what["options"])

    def _upload(self, job: Job, what: Mapping[str, Any]) -> Upload:
        if "sent" in what:
            upload = self.receiver.named(Sent.model_validate(what["sent"]), job.tenant, job.batch_id, ROLES[job.kind])
            return replace(upload, plate=upload.plate or what["plate"], incarnation=what["incarnation"])
        store, batch = self.jobs.storage.of(job.tenant), BatchRecord(job.batch_id, what["incarnation"])
        sites: defaultdict[SiteKey, dict[str, SentFile]] = defaultdict(dict)
        for told in what["planes"]:
            file = JobFile(store, batch, *told)
            sites[SiteKey(file.well, file.site)][file.channel] = file
        return Upload(
            sites=dict(sites),
            skipped=tuple(Skipped(*item) for item in what["skipped"]),
            pixel_size_um=what["pixel_size_um"],
            plate=what["plate"],
            notices=tuple(what["notices"]),
            incarnation=what["incarnation"],
        )


@dataclass
class _Keeping:
    """Keeps what came with a post for its job; what was sent ahead lies there already. ``put``: bytes by blob."""

    store: BatchStore
    batch: BatchRecord
    shard: str = field(default_factory=new_shard)
    put: dict[str, int] = field(default_factory=dict)

    def files(self, upload: Upload) -> Iterator[JobFile]:
        """Give every plane as the job will find it."""
        for key, files in upload.sites.items():
            blobs: dict[str, str] = {}
            for channel, file in files.items():
                with file.on_disk() as copy:
                    sha256 = file.content.partition("#")[0]
                    blob = file.plane.blob if isinstance(file, StagedFile) else blobs.get(sha256) or self._kept(copy)
                    blobs[sha256] = blob
                    place = key.well, key.site, channel
                    yield JobFile(self.store, self.batch, *place, copy.name[:200], file.content, blob, copy.size, copy.page)

    def _kept(self, file: FileSlice) -> str:
        data = file.read()
        blob = new_blob(data, self.shard)
        self.store.put_files({blob: data})
        self.put[blob] = file.size
        return blob
