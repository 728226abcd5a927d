"""What is kept of a batch, as records and blobs: controls, staged planes, plate map, adaptations, answers.

Knows no database. A batch changes by one atomic commit that names the revision it was made from, so that of two simultaneous
changes one is told to look again. Blobs are put before the commit that names them, and go after the commit that forgets
them: a process that dies between leaves a blob that nothing names. No two puts share a name.
"""

import io
import json
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from model.layout import PlaneKey, PlateMap, Role, SiteKey
from model.statistics import BatchNormStatistics, canonical_json
from service.blobs import Blobs
from service.errors import BlobMissingError
from service.records import Commit, ConflictError, Records, scan_all

KNOWN_BATCHES = 256
KNOWN_ADAPTATIONS = 256


class RevisionConflictError(Exception):
    """The batch was changed since the revision that a commit names."""


@dataclass(frozen=True)
class ControlSite:
    """One kept control site: the sha256 of each channel's file, and the recipe its network input was prepared by.

    ``blob`` is where that input lies: a name like no other (``new_blob``), so that who forgets it never means another's.
    """

    key: SiteKey
    planes: Mapping[str, str]
    recipe_digest: str
    blob: str


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Statistics of one batch under one bundle, with what was measured and how far they lie from training."""

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

    @property
    def wells(self) -> tuple[str, ...]:
        """The wells measured, sorted."""
        return tuple(sorted({site.well for site in self.used}))

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
        }
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
            return cls(
                **{
                    **rest,
                    "statistics": BatchNormStatistics.from_bytes(stored["statistics"].tobytes()),
                    "control_centre": stored["control_centre"],
                    "used": tuple(SiteKey(well, site) for well, site in rest["used"]),
                    "left_out": tuple(SiteKey(well, site) for well, site in rest["left_out"]),
                    "created_at": datetime.fromisoformat(rest["created_at"]),
                }
            )


@dataclass(frozen=True)
class StagedPlane:
    """One plane that was sent ahead: its file's sha256, its size in bytes, and where it lies."""

    key: PlaneKey
    sha256: str
    size: int
    blob: str

    def to_bytes(self) -> bytes:
        """Serialise all but the key as canonical JSON."""
        return canonical_json({"sha256": self.sha256, "size": self.size, "blob": self.blob})


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

    ``adaptations`` are the (bundle digest, statistics id) that can be read; ``planned`` the wells that the plate map calls
    treated.
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

    @property
    def incarnation(self) -> str | None:
        """What a batch keeps from its creation to its deletion, and no other batch ever has."""
        return None if self.revision is None else self.revision.partition(".")[0]

    @property
    def control_wells(self) -> frozenset[str]:
        """The wells of the kept control sites."""
        return frozenset(site.well for site in self.controls)

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON."""
        return canonical_json(
            {
                "revision": self.revision,
                "pixel_size_um": self.pixel_size_um,
                "plate": self.plate,
                "controls": [
                    [site.key.well, site.key.site, dict(site.planes), site.recipe_digest, site.blob]
                    for site in self.controls.values()
                ],
                "treated": sorted(self.treated),
                "planned": sorted(self.planned),
                "adaptations": sorted(self.adaptations),
                "changed_at": None if self.changed_at is None else self.changed_at.isoformat(),
            }
        )

    @classmethod
    def from_bytes(cls, batch_id: str, data: bytes) -> "BatchRecord":
        """Read what ``to_bytes`` wrote."""
        value = json.loads(data)
        sites = (ControlSite(SiteKey(well, site), *rest) for well, site, *rest in value["controls"])
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
        )


@dataclass(frozen=True, eq=False)
class Change:
    """What one commit adds: control sites with their network input, treated wells, an adaptation, answers, a plate map."""

    changed_at: datetime
    pixel_size_um: float | None = None
    controls: Sequence[tuple[ControlSite, NDArray[np.float32]]] = ()
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
    """The batches of one tenant."""

    def __init__(self, records: Records, blobs: Blobs, tenant: str) -> None:
        self._records = records
        self._blobs = blobs
        self._tenant = tenant
        self._known: LRUCache[str, tuple[bytes, BatchRecord]] = LRUCache(KNOWN_BATCHES)
        self._adaptations: LRUCache[str, Adaptation] = LRUCache(KNOWN_ADAPTATIONS)
        self._lock = threading.Lock()

    # --- what is kept ------------------------------------------------------------------------------------------------

    def batch_ids(self) -> list[str]:
        """The batches kept, sorted."""
        prefix = self._head("")
        return [key.removeprefix(prefix) for key, _ in scan_all(self._records, prefix)]

    def batch(self, batch_id: str) -> BatchRecord | None:
        """One consistent reading of a batch; None when it is not kept."""
        (data,) = self._records.read([self._head(batch_id)])
        return None if data is None else self._read(batch_id, data)

    def last_known(self, batch_id: str) -> BatchRecord | None:
        """The batch as this process read it last, whatever became of it since."""
        with self._lock:
            known = self._known.get(batch_id)
        return None if known is None else known[1]

    def image(self, batch: BatchRecord, site: SiteKey) -> NDArray[np.float32] | None:
        """The network input of a kept control site; None when it is gone: the batch was changed or deleted since."""
        kept = batch.controls[site]
        try:
            data = self._blobs.get(f"{self._folder(batch)}/{kept.blob}")
        except BlobMissingError:
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
        (data,) = self._records.read([self._part(batch_id, "staged", key.well, str(key.site), key.channel)])
        return None if data is None else StagedPlane(key, **json.loads(data))

    def staged_file(self, batch: BatchRecord, plane: StagedPlane) -> AbstractContextManager[Path]:
        """The file of a staged plane, on this machine while the context lasts.

        Raises:
            BlobMissingError: it is gone.
        """
        return self._blobs.local(f"{self._folder(batch)}/{plane.blob}")

    # --- changes -----------------------------------------------------------------------------------------------------

    def commit(self, batch: BatchRecord, change: Change, also: Commit | None = None) -> BatchRecord:
        """Add ``change`` whole, and whatever is to be written beside it, when the batch is still as it was read.

        Raises:
            RevisionConflictError: it is not, or what is beside it conflicts.
        """
        incarnation = batch.incarnation or token_hex(8)
        folder = f"batches/{self._tenant}/{incarnation}"
        self._blobs.put_all({f"{folder}/{site.blob}": image_bytes(image) for site, image in change.controls})
        after = _changed(batch, change, f"{incarnation}.{token_hex(8)}")
        parts = dict(self._parts_of(batch.batch_id, change))
        self._commit(batch, Commit({self._head(batch.batch_id): after.to_bytes(), **parts}), also)
        superseded = _blobs_of(batch) - _blobs_of(after)
        self._blobs.delete(f"{folder}/{blob}" for blob in superseded)
        return after

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
        """
        incarnation = batch.incarnation or token_hex(8)
        folder = f"batches/{self._tenant}/{incarnation}"
        self._blobs.put(f"{folder}/{plane.blob}", data)
        key = self._part(batch.batch_id, "staged", plane.key.well, str(plane.key.site), plane.key.channel)
        changes: dict[str, bytes | None] = {key: plane.to_bytes()}
        if batch.revision is None:
            begun = _changed(batch, Change(changed_at), f"{incarnation}.{token_hex(8)}")
            changes[self._head(batch.batch_id)] = begun.to_bytes()
        was = None if instead_of is None else instead_of.to_bytes()
        self._commit(batch, Commit(changes, expected={key: was}), also)
        if instead_of is not None:
            self._blobs.delete([f"{folder}/{instead_of.blob}"])

    def delete(self, batch: BatchRecord, also: Commit) -> None:
        """Forget a batch and its files."""
        gone = Commit({self._head(batch.batch_id): None}, cleared=(self._part(batch.batch_id, ""),))
        self._commit(batch, gone, also)
        self._blobs.delete(self._blobs.names(self._folder(batch) + "/"))

    def secure(self) -> None:
        """Return when everything that was committed is safe."""
        self._records.secure()

    # --- names -------------------------------------------------------------------------------------------------------

    def _commit(self, batch: BatchRecord, commit: Commit, also: Commit | None) -> None:
        expected = {self._head(batch.batch_id): None if batch.revision is None else batch.to_bytes()}
        whole = Commit(
            commit.changes,
            {**expected, **commit.expected},
            commit.cleared,
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

    def _parts_of(self, batch_id: str, change: Change) -> Iterable[tuple[str, bytes]]:
        if change.adaptation is not None:
            names = change.adaptation.bundle_digest, change.adaptation.statistics_id
            yield self._part(batch_id, "adaptation", *names), change.adaptation.to_bytes()
        for answer in change.answers:
            yield self._part(batch_id, "answer", answer.well), answer.to_bytes()
        if change.platemap is not None:
            yield self._part(batch_id, "platemap"), platemap_bytes(change.platemap)

    def _head(self, batch_id: str) -> str:
        return f"batch/{self._tenant}/{batch_id}"

    def _part(self, batch_id: str, *names: str) -> str:
        return "/".join(("part", self._tenant, batch_id, *names))

    def _folder(self, batch: BatchRecord) -> str:
        assert batch.incarnation is not None
        return f"batches/{self._tenant}/{batch.incarnation}"


def _changed(batch: BatchRecord, change: Change, revision: str) -> BatchRecord:
    """The batch as it is after a change."""
    adaptation = change.adaptation
    new = frozenset() if adaptation is None else frozenset({(adaptation.bundle_digest, adaptation.statistics_id)})
    controls = {**batch.controls, **{site.key: site for site, _ in change.controls}}
    return BatchRecord(
        batch_id=batch.batch_id,
        revision=revision,
        pixel_size_um=batch.pixel_size_um if change.pixel_size_um is None else change.pixel_size_um,
        plate=batch.plate or change.plate,
        controls=dict(sorted(controls.items())),
        treated=batch.treated | change.treated,
        planned=batch.planned if change.platemap is None else change.platemap.wells(Role.TREATED),
        adaptations=batch.adaptations | new,
        changed_at=change.changed_at,
    )


def _staged(name: str, data: bytes) -> StagedPlane:
    well, site, channel = name.split("/", 2)
    return StagedPlane(PlaneKey(well, int(site), channel), **json.loads(data))


def _blobs_of(batch: BatchRecord) -> set[str]:
    return {site.blob for site in batch.controls.values()}


def new_blob(data: bytes) -> str:
    """Draw a name for bytes: their sha256, and what no other name has."""
    return f"{sha256(data).hexdigest()}-{token_hex(8)}"


def _is_whole(blob: str, data: bytes) -> bool:
    return blob.partition("-")[0] == sha256(data).hexdigest()


def image_bytes(image: NDArray[np.float32]) -> bytes:
    """Serialise network input as .npy, the format's own version and type in its header."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image, dtype="<f4"), allow_pickle=False)
    return buffer.getvalue()


def image_from_bytes(data: bytes) -> NDArray[np.float32]:
    """Read what ``image_bytes`` wrote."""
    image: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    return image
