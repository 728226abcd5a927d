"""What is kept of a batch, as records and blobs: controls, staged planes, plate map, adaptations, answers.

Knows no database. A batch changes by one atomic commit that names the revision it was made from, so that of two simultaneous
changes one is told to look again. Blobs are put before the commit that names them, and go after the commit that forgets
them: a process that dies between leaves a blob that nothing names. No two puts share a name.
"""

import io
import json
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from model.images import PreparedImage
from model.layout import PlaneKey, PlateMap, Role, SiteKey
from model.scale import BatchScale
from model.statistics import BatchNormStatistics, canonical_json
from service.blobs import Blobs
from service.errors import BatchBusyError, BatchNotFoundError, BlobMissingError, QuotaExceededError
from service.records import Commit, ConflictError, Records, scan_all
from service.usage import Usage, added, amount

BLOBS = "batches/"
"""Where batches' blobs lie, a folder a tenant."""
STAGED_BYTES = "staged-bytes"
KNOWN_BATCHES = 256
KNOWN_ADAPTATIONS = 256


class RevisionConflictError(Exception):
    """The batch was changed since the revision that a commit names."""


@dataclass(frozen=True)
class KeptFile:
    """A file as it was sent: its blob, its size in bytes, and the page of it that is meant, in one of several channels."""

    blob: str
    size: int
    page: int | None = None


@dataclass(frozen=True)
class ControlSite:
    """One kept site of a control well, or of the panel: its files' sha256 by channel, and the recipe it was prepared by.

    ``blob`` is where it lies as it was prepared, before any scale of the batch's: a name like no other (``new_blob``), so
    that who forgets it never means another's. ``files`` are the channels' files, where they are kept; ``size`` is what all
    of it takes, in bytes.
    """

    key: SiteKey
    planes: Mapping[str, str]
    recipe_digest: str
    blob: str
    size: int
    files: Mapping[str, KeptFile] = field(default_factory=dict)
    role: Role = Role.CONTROL

    @property
    def blobs(self) -> frozenset[str]:
        """Where all of it lies."""
        return frozenset({self.blob, *(file.blob for file in self.files.values())})


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Statistics of one batch under one bundle, with what was measured and how far they lie from training.

    ``context`` is the rule: controls; panel, when ``panel`` wells are among those ``used``; or blended, with the weight of
    the prior, averaged over features. The ``control_centre`` is of control wells alone.
    ``scale`` is the one that its context gave, for a recipe that has one; ``unscaled_id`` what the statistics are named
    before it is measured.
    """

    bundle_digest: str
    statistics_id: str
    statistics: BatchNormStatistics
    control_centre: NDArray[np.float32]
    used: tuple[SiteKey, ...]
    left_out: tuple[SiteKey, ...]
    distance: float
    percentile: float
    out_of_range: bool
    provider: str
    precision: str
    created_at: datetime
    context: str = "controls"
    panel: tuple[str, ...] = ()
    prior_weight: float | None = None
    scale: BatchScale | None = None
    unscaled_id: str = ""

    @property
    def control_wells(self) -> tuple[str, ...]:
        """The control wells measured, sorted."""
        return tuple(sorted({site.well for site in self.used}.difference(self.panel)))

    def to_bytes(self) -> bytes:
        """Serialise as an npz of plain arrays: statistics, control centre, and the rest as JSON."""
        rest = {
            "bundle_digest": self.bundle_digest,
            "statistics_id": self.statistics_id,
            "used": [[site.well, site.site] for site in self.used],
            "left_out": [[site.well, site.site] for site in self.left_out],
            "distance": self.distance,
            "percentile": self.percentile,
            "out_of_range": self.out_of_range,
            "provider": self.provider,
            "precision": self.precision,
            "created_at": self.created_at.isoformat(),
            "context": self.context,
            "panel": self.panel,
            "prior_weight": self.prior_weight,
        }
        if self.scale is not None:
            rest |= {"scale": self.scale.to_json(), "unscaled_id": self.unscaled_id}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            version=np.array(1),
            statistics=np.frombuffer(self.statistics.to_bytes(), np.uint8),
            control_centre=self.control_centre,
            rest=np.frombuffer(canonical_json(rest), np.uint8),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Adaptation":
        """Read what ``to_bytes`` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            if int(stored["version"]) != 1:
                raise ValueError(f"adaptation of version {int(stored['version'])}; this release reads 1")
            rest: dict[str, Any] = json.loads(stored["rest"].tobytes())
            scale = rest.get("scale")
            return cls(
                **{
                    **rest,
                    "statistics": BatchNormStatistics.from_bytes(stored["statistics"].tobytes()),
                    "control_centre": stored["control_centre"],
                    "used": tuple(SiteKey(well, site) for well, site in rest["used"]),
                    "left_out": tuple(SiteKey(well, site) for well, site in rest["left_out"]),
                    "created_at": datetime.fromisoformat(rest["created_at"]),
                    "scale": None if scale is None else BatchScale.from_json(scale),
                    "panel": tuple(rest.get("panel", ())),
                }
            )


@dataclass(frozen=True)
class StagedPlane:
    """One plane that was sent ahead: its file's sha256, its size in bytes, where it lies, and when it came."""

    key: PlaneKey
    sha256: str
    size: int
    blob: str
    staged_at: str

    def to_bytes(self) -> bytes:
        """Serialise all but the key as canonical JSON."""
        return canonical_json({"sha256": self.sha256, "size": self.size, "blob": self.blob, "staged_at": self.staged_at})


@dataclass(frozen=True, eq=False)
class KeptAnswer:
    """A well's latest answer: what was told of it, the statistics it stands on, and its embedding (dim,)."""

    well: str
    told: Mapping[str, Any]
    statistics_id: str
    bundle_digest: str
    embedding: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON, the embedding as little-endian float32 in base64."""
        return canonical_json(
            {
                "well": self.well,
                "told": dict(self.told),
                "statistics_id": self.statistics_id,
                "bundle_digest": self.bundle_digest,
                "embedding": b64encode(self.embedding.astype("<f4").tobytes()).decode(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "KeptAnswer":
        """Read what ``to_bytes`` wrote."""
        value = json.loads(data)
        return cls(**{**value, "embedding": np.frombuffer(b64decode(value["embedding"]), "<f4")})


@dataclass(frozen=True)
class BatchRecord:
    """One batch as kept, without its arrays; ``revision`` is None for a batch that is not kept yet.

    ``controls`` are the sites whose images may enter the statistics, the panel's too; ``adaptations`` the (bundle digest,
    statistics id) that can be read; ``scales`` the digests of their scales, by what the statistics are named without;
    ``planned`` the wells that the plate map calls treated.
    """

    batch_id: str
    revision: str | None = None
    pixel_size_um: float | None = None
    plate: str | None = None
    controls: Mapping[SiteKey, ControlSite] = field(default_factory=dict)
    treated: frozenset[str] = frozenset()
    planned: frozenset[str] = frozenset()
    adaptations: frozenset[tuple[str, str]] = frozenset()
    changed_at: datetime | None = None
    scales: Mapping[str, str] = field(default_factory=dict)

    @property
    def incarnation(self) -> str | None:
        """What a batch keeps from its creation to its deletion, and no other batch ever has."""
        return None if self.revision is None else self.revision.partition(".")[0]

    @property
    def control_bytes(self) -> int:
        """What the kept controls and panel take."""
        return sum(site.size for site in self.controls.values())

    @property
    def control_wells(self) -> frozenset[str]:
        """The wells of the kept control sites."""
        return self._wells_of(Role.CONTROL)

    @property
    def panel_wells(self) -> frozenset[str]:
        """The wells of the panel that is recorded."""
        return self._wells_of(Role.PANEL)

    def _wells_of(self, role: Role) -> frozenset[str]:
        return frozenset(key.well for key in sites_of(self.controls, role))

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON."""
        return canonical_json(
            {
                "revision": self.revision,
                "pixel_size_um": self.pixel_size_um,
                "plate": self.plate,
                "controls": [
                    {
                        "well": site.key.well,
                        "site": site.key.site,
                        "planes": dict(site.planes),
                        "recipe": site.recipe_digest,
                        "blob": site.blob,
                        "size": site.size,
                        "files": {channel: [file.blob, file.size, file.page] for channel, file in site.files.items()},
                        # a record reads back to the bytes that it was, and those of before there were panels name no role
                        **({} if site.role is Role.CONTROL else {"role": site.role}),
                    }
                    for site in self.controls.values()
                ],
                "treated": sorted(self.treated),
                "planned": sorted(self.planned),
                "adaptations": sorted(self.adaptations),
                "changed_at": None if self.changed_at is None else self.changed_at.isoformat(),
                **({"scales": dict(self.scales)} if self.scales else {}),  # a record from before has none, to the byte
            }
        )

    @classmethod
    def from_bytes(cls, batch_id: str, data: bytes) -> "BatchRecord":
        """Read what ``to_bytes`` wrote."""
        value = json.loads(data)
        sites = map(_control_site, value["controls"])
        return cls(
            batch_id=batch_id,
            revision=value["revision"],
            pixel_size_um=value["pixel_size_um"],
            plate=value["plate"],
            controls={site.key: site for site in sorted(sites, key=lambda site: site.key)},
            treated=frozenset(value["treated"]),
            planned=frozenset(value["planned"]),
            adaptations=frozenset((bundle, statistics) for bundle, statistics in value["adaptations"]),
            changed_at=datetime.fromisoformat(value["changed_at"]),
            scales=value.get("scales", {}),
        )


def sites_of(sites: Mapping[SiteKey, ControlSite], role: Role) -> dict[SiteKey, ControlSite]:
    """Return the sites of a role."""
    return {key: site for key, site in sites.items() if site.role is role}


def _control_site(value: Mapping[str, Any]) -> ControlSite:
    files = {channel: KeptFile(*file) for channel, file in value["files"].items()}
    key = SiteKey(value["well"], value["site"])
    role = Role(value.get("role", Role.CONTROL))
    return ControlSite(key, value["planes"], value["recipe"], value["blob"], value["size"], files, role)


@dataclass(frozen=True, eq=False)
class Change:
    """What one commit adds: control sites as they were prepared, treated wells, an adaptation, answers, a plate map."""

    changed_at: datetime
    pixel_size_um: float | None = None
    controls: Sequence[tuple[ControlSite, bytes]] = ()
    treated: frozenset[str] = frozenset()
    adaptation: Adaptation | None = None
    plate: str | None = None
    answers: Sequence[KeptAnswer] = ()
    platemap: PlateMap | None = None


def platemap_bytes(platemap: PlateMap) -> bytes:
    """Serialise a plate map as canonical JSON."""
    rows = {well: list(values) for well, values in platemap.rows.items()}
    return canonical_json({"columns": list(platemap.columns), "rows": rows, "roles": dict(platemap.roles)})


def platemap_from_bytes(data: bytes) -> PlateMap:
    """Read what ``platemap_bytes`` wrote."""
    value = json.loads(data)
    return PlateMap(
        columns=tuple(value["columns"]),
        rows={well: tuple(values) for well, values in value["rows"].items()},
        roles={well: Role(role) for well, role in value["roles"].items()},
    )


class BatchStore:
    """The batches of one tenant, who may keep ``max_bytes`` of images."""

    def __init__(self, records: Records, blobs: Blobs, tenant: str, max_bytes: int | None = None) -> None:
        self._records = records
        self._blobs = blobs
        self._tenant = tenant
        self._usage = Usage(records, tenant, max_bytes)
        self._known: LRUCache[str, tuple[bytes, BatchRecord]] = LRUCache(KNOWN_BATCHES)
        self._adaptations: LRUCache[str, Adaptation] = LRUCache(KNOWN_ADAPTATIONS)
        self._lock = threading.Lock()

    @property
    def tenant(self) -> str:
        """Whose they are."""
        return self._tenant

    @property
    def usage(self) -> Usage:
        """What the tenant's images take."""
        return self._usage

    # --- what is kept ------------------------------------------------------------------------------------------------

    def batch_ids(self) -> list[str]:
        """The batches kept, sorted."""
        prefix = self._head("")
        return [key.removeprefix(prefix) for key, _ in scan_all(self._records, prefix)]

    def page(self, after: str, limit: int) -> list[BatchRecord]:
        """The first batches behind a name, sorted."""
        prefix = self._head("")
        found = self._records.scan(prefix, self._head(after) if after else "", limit)
        return [self._read(key.removeprefix(prefix), data) for key, data in found]

    def batch(self, batch_id: str) -> BatchRecord | None:
        """One consistent reading of a batch; None when it is not kept."""
        (data,) = self._records.read([self._head(batch_id)])
        if data is None:
            self._forget(batch_id)
            return None
        return self._read(batch_id, data)

    def last_known(self, batch_id: str) -> BatchRecord | None:
        """The batch as this process read or changed it last, whatever became of it since."""
        with self._lock:
            known = self._known.get(batch_id)
        return None if known is None else known[1]

    def image(self, batch: BatchRecord, site: SiteKey) -> PreparedImage | None:
        """A kept control site as it was prepared; None when it is gone: the batch was changed or deleted since.

        Raises:
            BlobMissingError: it is gone although the batch is as it was, or it was damaged.
        """
        kept = batch.controls[site]
        try:
            data = self._blobs.get(self._path(kept.blob))
        except BlobMissingError:
            if self._is_as_read(batch):
                raise
            return None
        if not _is_whole(kept.blob, data):
            raise BlobMissingError(
                f"the kept image of well {site.well} site {site.site} of batch {batch.batch_id} was damaged on its disk: "
                "put it back from a backup, or delete the batch and send its controls again"
            )
        return image_from_bytes(data)

    def adaptation(self, batch_id: str, bundle_digest: str, statistics_id: str) -> Adaptation | None:
        """An adaptation by its names; those read before come from memory, for they never change."""
        key = self._part(batch_id, "adaptation", bundle_digest, statistics_id)
        with self._lock:
            known = self._adaptations.get(key)
        if known is not None:
            return known
        (data,) = self._records.read([key])
        if data is None:
            return None
        adaptation = Adaptation.from_bytes(data)
        with self._lock:
            self._adaptations[key] = adaptation
        return adaptation

    def answers(self, batch_id: str) -> list[KeptAnswer]:
        """The latest answer of every well, sorted."""
        return [KeptAnswer.from_bytes(data) for _, data in scan_all(self._records, self._part(batch_id, "answer", ""))]

    def platemap(self, batch_id: str) -> PlateMap | None:
        """The batch's plate map."""
        (data,) = self._records.read([self._part(batch_id, "platemap")])
        return None if data is None else platemap_from_bytes(data)

    def staged(self, batch_id: str) -> list[StagedPlane]:
        """The planes that were sent ahead, sorted."""
        prefix = self._part(batch_id, "staged", "")
        return sorted(
            (_staged(key.removeprefix(prefix), data) for key, data in scan_all(self._records, prefix)),
            key=lambda plane: plane.key,
        )

    def staged_plane(self, batch_id: str, key: PlaneKey) -> StagedPlane | None:
        """The plane that was sent ahead for one place."""
        (data,) = self._records.read([self._staged_key(batch_id, key)])
        return None if data is None else StagedPlane(key, **json.loads(data))

    def blobs_of(self, batch: BatchRecord) -> set[str]:
        """Every blob that a batch's controls and staged planes name."""
        return {*_blobs_of(batch), *(plane.blob for plane in self.staged(batch.batch_id))}

    @contextmanager
    def file(self, batch: BatchRecord, blob: str) -> Iterator[Path]:
        """The file of a staged plane or a control, on this machine while the context lasts.

        Raises:
            BatchNotFoundError: the batch was deleted meanwhile. BatchBusyError: another image took this one's place.
            BlobMissingError: it is gone although the batch is as it was.
        """
        try:
            with self._blobs.local(self._path(blob)) as path:
                yield path
        except (BlobMissingError, FileNotFoundError):
            self._tell_missing(batch, blob)
            raise

    def _tell_missing(self, batch: BatchRecord, blob: str) -> None:
        """Say why a file is gone that a batch named; return when nothing explains it."""
        now = self.batch(batch.batch_id)
        if now is None or now.incarnation != batch.incarnation:
            raise BatchNotFoundError(
                f"batch {batch.batch_id} was deleted while its images were read; nothing was changed",
                batch_id=batch.batch_id,
            )
        if blob not in self.blobs_of(now):
            raise BatchBusyError(
                f"images of batch {batch.batch_id} were replaced while they were read; nothing was changed: send it again"
            )

    def _is_as_read(self, batch: BatchRecord) -> bool:
        now = self.batch(batch.batch_id)
        return now is not None and now.revision == batch.revision

    # --- changes -----------------------------------------------------------------------------------------------------

    def commit(self, batch: BatchRecord, change: Change, also: Commit | None = None) -> BatchRecord:
        """Add ``change`` whole, and whatever is to be written beside it, when the batch is still as it was read.

        Raises:
            RevisionConflictError: it is not, or what is beside it conflicts. QuotaExceededError: there is no room for it.
        """
        after = _changed(batch, change)
        data = after.to_bytes()
        new = {self._path(site.blob): image for site, image in change.controls}
        parts = dict(self._parts_of(batch.batch_id, change))
        commit = Commit(
            {self._head(batch.batch_id): data, **parts},
            derived=self._usage.changed(after.control_bytes - batch.control_bytes),
        )
        with self._put(new):
            self._commit(batch, commit, also)
        self._know(after, data, change.adaptation)
        if change.controls:
            self._blobs.delete(self._path(blob) for blob in _blobs_of(batch) - _blobs_of(after))
        return after

    def put_files(self, files: Mapping[str, bytes]) -> None:
        """Keep files under their blobs' names, before the commit that names them."""
        self._blobs.put_all({self._path(blob): data for blob, data in files.items()})

    def drop_files(self, blobs: Iterable[str]) -> None:
        """Forget files that no record names, or none any more."""
        self._blobs.delete(self._path(blob) for blob in blobs)

    def beside(self, batch: BatchRecord, also: Commit) -> None:
        """Write what stands beside a batch that is not changed itself, when it is still as it was read."""
        self._commit(batch, Commit({}), also)

    def stage(
        self,
        batch: BatchRecord,
        plane: StagedPlane,
        data: bytes,
        changed_at: datetime,
        also: Commit,
        instead_of: StagedPlane | None = None,
    ) -> None:
        """Keep a plane that is sent ahead; a batch begins with its first.

        Raises:
            RevisionConflictError: the batch changed since it was read, or the plane there is not ``instead_of``.
            QuotaExceededError: there is no room for it.
        """
        key = self._staged_key(batch.batch_id, plane.key)
        changes: dict[str, bytes | None] = {key: plane.to_bytes()}
        if batch.revision is None:
            changes[self._head(batch.batch_id)] = _changed(batch, Change(changed_at)).to_bytes()
        was = None if instead_of is None else instead_of.to_bytes()
        more = plane.size - (0 if instead_of is None else instead_of.size)
        derived = (*self._usage.changed(more), added(self._part(batch.batch_id, STAGED_BYTES), more))
        with self._put({self._path(plane.blob): data}):
            self._commit(batch, Commit(changes, expected={key: was}, derived=derived), also)
        if instead_of is not None:
            self._blobs.delete([self._path(instead_of.blob)])

    def unstage(self, batch: BatchRecord, planes: Sequence[StagedPlane], also: Commit) -> None:
        """Forget planes that were sent ahead.

        Raises:
            RevisionConflictError: the batch or one of them changed since.
        """
        keys = {self._staged_key(batch.batch_id, plane.key): plane for plane in planes}
        less = -sum(plane.size for plane in planes)
        commit = Commit(
            dict.fromkeys(keys),
            expected={key: plane.to_bytes() for key, plane in keys.items()},
            derived=(*self._usage.changed(less), added(self._part(batch.batch_id, STAGED_BYTES), less)),
        )
        self._commit(batch, commit, also)
        self._blobs.delete(self._path(plane.blob) for plane in planes)

    def delete(self, batch: BatchRecord, also: Commit) -> None:
        """Forget a batch and its files."""
        staged_bytes = self._part(batch.batch_id, STAGED_BYTES)
        (counted,) = self._records.read([staged_bytes])
        blobs = self.blobs_of(batch)
        less = -(batch.control_bytes + amount(counted))
        gone = Commit(
            {self._head(batch.batch_id): None},
            expected={staged_bytes: counted},
            cleared=(self._part(batch.batch_id, ""),),
            derived=self._usage.changed(less),
        )
        self._commit(batch, gone, also)
        self._forget(batch.batch_id)
        self.drop_files(blobs)

    def secure(self) -> None:
        """Return when everything that was committed is safe."""
        self._records.secure()

    @contextmanager
    def _put(self, blobs: Mapping[str, bytes]) -> Iterator[None]:
        """Put blobs for a commit; when it certainly did not come about, they go again."""
        self._blobs.put_all(blobs)
        try:
            yield
        except (RevisionConflictError, QuotaExceededError):
            self._blobs.delete(blobs)
            raise

    def _know(self, batch: BatchRecord, data: bytes, adaptation: Adaptation | None) -> None:
        with self._lock:
            self._known[batch.batch_id] = (data, batch)
            if adaptation is not None:
                self._adaptations[self._adaptation_key(batch.batch_id, adaptation)] = adaptation

    def _forget(self, batch_id: str) -> None:
        with self._lock:
            self._known.pop(batch_id, None)

    # --- names -------------------------------------------------------------------------------------------------------

    def _commit(self, batch: BatchRecord, commit: Commit, also: Commit | None) -> None:
        expected = {self._head(batch.batch_id): None if batch.revision is None else self._bytes_of(batch)}
        whole = Commit(
            commit.changes,
            {**expected, **commit.expected},
            commit.cleared,
            commit.derived,
            scope=self._head(batch.batch_id),
        )
        try:
            self._records.commit(whole if also is None else whole.and_also(also))
        except ConflictError:
            raise RevisionConflictError from None

    def _read(self, batch_id: str, data: bytes) -> BatchRecord:
        with self._lock:
            known = self._known.get(batch_id)
        if known is not None and known[0] == data:
            return known[1]
        batch = BatchRecord.from_bytes(batch_id, data)
        with self._lock:
            self._known[batch_id] = (data, batch)
        return batch

    def _bytes_of(self, batch: BatchRecord) -> bytes:
        """The bytes that a batch was read from."""
        with self._lock:
            known = self._known.get(batch.batch_id)
        return known[0] if known is not None and known[1] is batch else batch.to_bytes()

    def _parts_of(self, batch_id: str, change: Change) -> Iterable[tuple[str, bytes]]:
        if change.adaptation is not None:
            yield self._adaptation_key(batch_id, change.adaptation), change.adaptation.to_bytes()
        for answer in change.answers:
            yield self._part(batch_id, "answer", answer.well), answer.to_bytes()
        if change.platemap is not None:
            yield self._part(batch_id, "platemap"), platemap_bytes(change.platemap)

    def _head(self, batch_id: str) -> str:
        return f"batch/{self._tenant}/{batch_id}"

    def _part(self, batch_id: str, *names: str) -> str:
        return "/".join(("part", self._tenant, batch_id, *names))

    def _adaptation_key(self, batch_id: str, adaptation: Adaptation) -> str:
        return self._part(batch_id, "adaptation", adaptation.bundle_digest, adaptation.statistics_id)

    def _staged_key(self, batch_id: str, key: PlaneKey) -> str:
        return self._part(batch_id, "staged", key.well, str(key.site), key.channel)

    def _path(self, blob: str) -> str:
        return f"{BLOBS}{self._tenant}/{blob}"


def _changed(batch: BatchRecord, change: Change) -> BatchRecord:
    """The batch as it is after a change, under a new revision; a new batch begins its one incarnation."""
    adaptation = change.adaptation
    new = frozenset() if adaptation is None else frozenset({(adaptation.bundle_digest, adaptation.statistics_id)})
    scale = {} if adaptation is None or adaptation.scale is None else {adaptation.unscaled_id: adaptation.scale.digest}
    new_controls = {site.key: site for site, _ in change.controls}
    return BatchRecord(
        batch_id=batch.batch_id,
        revision=f"{batch.incarnation or token_hex(8)}.{token_hex(8)}",
        pixel_size_um=batch.pixel_size_um if change.pixel_size_um is None else change.pixel_size_um,
        plate=batch.plate or change.plate,
        controls=dict(sorted({**batch.controls, **new_controls}.items())) if new_controls else batch.controls,
        treated=batch.treated | change.treated,
        planned=batch.planned if change.platemap is None else change.platemap.wells(Role.TREATED),
        adaptations=batch.adaptations | new,
        changed_at=change.changed_at,
        scales={**batch.scales, **scale},
    )


def _staged(name: str, data: bytes) -> StagedPlane:
    well, site, channel = name.split("/", 2)
    return StagedPlane(PlaneKey(well, int(site), channel), **json.loads(data))


def _blobs_of(batch: BatchRecord) -> set[str]:
    return {blob for site in batch.controls.values() for blob in site.blobs}


def new_shard() -> str:
    """Draw a folder for what one request keeps: it is synced once, and no folder comes to hold everything."""
    return token_hex(2)[:3]


def shard_of(batch_id: str) -> str:
    """The folder of the planes that a batch is sent ahead, in many requests."""
    return sha256(batch_id.encode()).hexdigest()[:3]


def new_blob(data: bytes, shard: str, digest: str | None = None) -> str:
    """Draw a name for bytes: their sha256, which may be known, and what no other name has."""
    return f"{shard}/{digest or sha256(data).hexdigest()}-{token_hex(8)}"


def blob_sha256(blob: str) -> str:
    """Return the sha256 that a name tells."""
    return blob.rpartition("/")[2].partition("-")[0]


def _is_whole(blob: str, data: bytes) -> bool:
    return blob_sha256(blob) == sha256(data).hexdigest()


def image_bytes(image: PreparedImage) -> bytes:
    """Serialise a prepared site as .npy, the format's own version and type in its header; its field, if any, as another."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image.pixels, dtype="<f4"), allow_pickle=False)
    if image.field is not None:
        np.save(buffer, np.ascontiguousarray(image.field, dtype="<f8"), allow_pickle=False)
    return buffer.getvalue()


def image_from_bytes(data: bytes) -> PreparedImage:
    """Read what ``image_bytes`` wrote."""
    buffer = io.BytesIO(data)
    pixels = np.load(buffer, allow_pickle=False)
    return PreparedImage(pixels, np.load(buffer, allow_pickle=False) if buffer.tell() < len(data) else None)
