"""Requests that are answered later: a post becomes a job, and a job the same two stories."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.layout import PlaneKey, Role
from service import schemas
from service.batches import Batches, Stopwatch
from service.deeds import Deed
from service.jobs import Job, Jobs
from service.kept import Kept
from service.posts import Post, Receiver, Sent

ROLES = {"controls": Role.CONTROL, "predict": Role.TREATED}


@dataclass(frozen=True)
class Later:
    """Takes posts as jobs, and runs them."""

    batches: Batches
    kept: Kept
    receiver: Receiver
    jobs: Jobs

    def put(self, post: Post, kind: str, batch_id: str, options: Mapping[str, bool]) -> schemas.JobReport:
        """Keep a post as a job; images that came with it are sent ahead first, so that they outlive the request.

        Raises:
            StagedConflictError: another image was sent ahead for one of its planes.
        """
        sent = post.sent if post.sent is not None else self._staged(post, batch_id)
        asked = {"sent": sent.model_dump(mode="json"), "plate": post.upload.plate, "options": dict(options)}
        return self.jobs.put(post.deed, kind, batch_id, asked)

    def run(self, job: Job, deed: Deed) -> None:
        """Do what a job asks."""
        asked: Mapping[str, Any] = job.asked
        upload = self.receiver.named(Sent.model_validate(asked["sent"]), job.tenant, job.batch_id, ROLES[job.kind])
        upload = replace(upload, plate=upload.plate or asked["plate"])
        story = self.batches.adapt if job.kind == "controls" else self.batches.classify
        story(deed, job.batch_id, upload, Stopwatch(), **asked["options"])

    def _staged(self, post: Post, batch_id: str) -> Sent:
        deed = Deed(post.deed.tenant, post.deed.by, post.deed.request_id)
        for key, files in post.upload.sites.items():
            for channel, file in files.items():
                with file.on_disk() as copy:
                    plane = PlaneKey(key.well, key.site, channel)
                    self.kept.stage(deed, batch_id, plane, copy.read(), file.content, replace=False)
        return Sent(staged=True, wells=tuple(sorted(post.upload.wells)), pixel_size_um=post.upload.pixel_size_um)
