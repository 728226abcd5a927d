"""Work that is answered later: posts kept as jobs, and the jobs run by the two stories.

A job is asked for what was there when it was: images that came with the post are kept for it alone, and of planes that were
sent ahead those that were there then are taken, or none.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from model.layout import Role, SiteKey
from service import schemas
from service.batches import Batches, Stopwatch
from service.decoding import FileSlice
from service.deeds import Deed
from service.errors import BatchBusyError, StagedConflictError
from service.jobs import Asked, Job, Jobs
from service.keeping import FileKeeper, kept_files
from service.posts import Post, Receiver, Sent
from service.reports import CONTROLS, SOURCE
from service.staging import StagedFile
from service.store import BatchRecord, BatchStore, KeptFile
from service.uploads import SentFile, Skipped, Upload


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

    def put(self, post: Post, kind: str, batch_id: str, options: Mapping[str, bool | str]) -> schemas.JobReport:
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
        with kept_files(store) as keeper:
            what["planes"] = [file.told() for file in _files(store, batch, post.upload, keeper)]
            report = self.jobs.put(post.deed, kind, batch_id, Asked(what, tuple(keeper.put), sum(keeper.put.values())))
            keeper.named = keeper.put
        return report

    def run(self, job: Job, deed: Deed) -> None:
        """Do what a job asks."""
        what = self.jobs.asked(job).what
        options, role = what["options"], _role(job, what)
        request = (deed, job.batch_id, self._upload(job, what, role), Stopwatch())
        if job.kind == "controls":
            self.batches.adapt(*request, replace=options["replace"], role=role)
        else:  # jobs of before there were blends say only whether source was asked for
            self.batches.classify(*request, context=options.get("context", SOURCE if options.get("source") else CONTROLS))

    def _upload(self, job: Job, what: Mapping[str, Any], role: Role) -> Upload:
        if "sent" in what:
            upload = self.receiver.named(Sent.model_validate(what["sent"]), job.tenant, job.batch_id, role)
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


def _role(job: Job, what: Mapping[str, Any]) -> Role:
    return Role(what["options"].get("role", Role.CONTROL)) if job.kind == "controls" else Role.TREATED


def _files(store: BatchStore, batch: BatchRecord, upload: Upload, keeper: FileKeeper) -> Iterator[JobFile]:
    """Give every plane as its job will find it: what was sent ahead lies there already, what came with the post is kept."""
    for key, files in upload.sites.items():
        ahead = {channel: file.plane for channel, file in files.items() if isinstance(file, StagedFile)}
        with ExitStack() as stack:
            kept = keeper({name: stack.enter_context(file.on_disk()) for name, file in files.items() if name not in ahead})
        where = {**kept, **{channel: KeptFile(plane.blob, plane.size) for channel, plane in ahead.items()}}
        for channel, file in files.items():
            place, told = (key.well, key.site, channel), (file.name[:200], file.content)
            yield JobFile(store, batch, *place, *told, where[channel].blob, where[channel].size, where[channel].page)
