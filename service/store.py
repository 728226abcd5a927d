"""What is kept of a batch: its controls as network input, the wells answered as treated, and its adaptations.

Values and the edge; knows no database. A batch changes by one atomic commit that names the revision it was made from,
so that of two simultaneous changes one is told to look again. What ``commit`` returned from is on disk.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from secrets import token_hex
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.layout import SiteKey
from model.statistics import BatchNormStatistics, canonical_json
from service.errors import StartError

TENANT = "default"


class RevisionConflictError(Exception):
    """The batch was changed since the revision that a commit names."""


@dataclass(frozen=True)
class ControlSite:
    """One kept control site: the sha256 of each channel's file, and the recipe its network input was prepared by."""

    key: SiteKey
    planes: Mapping[str, str]
    recipe_digest: str


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
class BatchRecord:
    """One batch as kept, without its arrays; ``revision`` is None for a batch that is not kept yet.

    ``adaptations`` are the (bundle digest, statistics id) that can be read.
    """

    batch_id: str
    revision: str | None = None
    pixel_size_um: float | None = None
    plate: str | None = None
    controls: Mapping[SiteKey, ControlSite] = field(default_factory=dict)
    treated: frozenset[str] = frozenset()
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


@dataclass(frozen=True, eq=False)
class Change:
    """What one commit adds: control sites with their network input, treated wells, an adaptation."""

    changed_at: datetime
    pixel_size_um: float | None = None
    controls: Sequence[tuple[ControlSite, NDArray[np.float32]]] = ()
    treated: frozenset[str] = frozenset()
    adaptation: Adaptation | None = None
    plate: str | None = None


class Store(Protocol):
    """Keeps batches of one tenant."""

    def batch_ids(self) -> list[str]:
        """The batches kept, sorted."""
        ...

    def batch(self, batch_id: str) -> BatchRecord | None:
        """One consistent reading of a batch; None when it is not kept."""
        ...

    def image(self, batch_id: str, site: SiteKey) -> NDArray[np.float32] | None:
        """The network input of a kept control site."""
        ...

    def adaptation(self, batch_id: str, bundle_digest: str, statistics_id: str) -> Adaptation | None:
        """An adaptation by its names."""
        ...

    def commit(self, batch_id: str, expected_revision: str | None, change: Change) -> None:
        """Add ``change`` whole, when the batch is still at ``expected_revision``.

        Raises:
            RevisionConflictError: it is not.
        """
        ...

    def delete(self, batch_id: str) -> bool:
        """Forget a batch; whether there was one."""
        ...

    def check(self) -> None:
        """Return when the store answers.

        Raises:
            StoreUnavailableError: it does not.
        """
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def next_revision(revision: str | None) -> str:
    """Draw the name of a batch's next revision; what is before its point is drawn when the batch is created, and stays."""
    incarnation = token_hex(8) if revision is None else revision.partition(".")[0]
    return f"{incarnation}.{token_hex(8)}"


def open_store(url: str) -> Store:
    """Open the store a URL names: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``redis://``, ``rediss://``.

    Raises:
        StartError: another kind of URL, or a store that cannot be used.
    """
    kind, separator, place = url.partition("://")
    if separator and kind == "sqlite" and place.startswith("/") and len(place) > 1:
        from service.store_sqlite import SqliteStore  # noqa: PLC0415 (one of the two is enough)

        return SqliteStore(place[1:])
    if separator and kind in ("redis", "rediss"):
        from service.store_redis import RedisStore  # noqa: PLC0415 (one of the two is enough)

        return RedisStore(url)
    raise StartError(f"a store is sqlite:///FILE, redis://… or rediss://…; not {kind[:20]!r}")


def image_bytes(image: NDArray[np.float32]) -> bytes:
    """Serialise network input as .npy, the format's own version and type in its header."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image, dtype="<f4"), allow_pickle=False)
    return buffer.getvalue()


def image_from_bytes(data: bytes) -> NDArray[np.float32]:
    """Read what ``image_bytes`` wrote."""
    image: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    return image
