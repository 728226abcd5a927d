"""Batch-normalisation statistics of one batch: values, bytes, identity, blending, distance from the training plates.

Statistics are the mean and the population (biased) variance of every BN layer's input, all layers concatenated in
network order, from ONE forward pass over the whole context.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.layout import PlaneKey

BN_EPSILON = 1e-5
"""Added to every variance before its square root is taken."""

_MAGIC = b"ANCHSTAT"
_VERSION = 1
_HEADER = struct.Struct("<8sHIII")  # magic, version, features, sites, wells


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """Mean and biased variance per BN feature, float32 (features,), measured on ``sites`` sites of ``wells`` wells."""

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    sites: int
    wells: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.variance.shape:
            raise ValueError(f"mean {self.mean.shape} and variance {self.variance.shape} must be one vector each")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.variance).all()):
            raise ValueError("statistics must be finite")
        if (self.variance < 0).any():
            raise ValueError("a variance is negative")

    def to_bytes(self) -> bytes:
        """Serialise as a versioned little-endian array: the same values give the same bytes on every machine."""
        header = _HEADER.pack(_MAGIC, _VERSION, self.mean.size, self.sites, self.wells)
        return header + self.mean.astype("<f4").tobytes() + self.variance.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "BatchNormStatistics":
        """Read what ``to_bytes`` wrote.

        Raises:
            ValueError: other bytes, another version, or a wrong length.
        """
        if len(data) < _HEADER.size:
            raise ValueError("too short for statistics")
        magic, version, features, sites, wells = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError(f"not statistics of version {_VERSION}")
        values = np.frombuffer(data, "<f4", offset=_HEADER.size)
        if values.size != 2 * features:
            raise ValueError(f"expected {2 * features} values, found {values.size}")
        return cls(mean=values[:features].copy(), variance=values[features:].copy(), sites=sites, wells=wells)


@dataclass(frozen=True, eq=False)
class Prior:
    """What measured statistics are blended with: mean, variance and ``weight`` (0: not at all), float32 (features,) each."""

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    weight: NDArray[np.float32]

    @classmethod
    def none(cls, features: int) -> "Prior":
        """A prior without weight: what is blended with it stays exactly as it is."""
        return cls(np.zeros(features, np.float32), np.ones(features, np.float32), np.zeros(features, np.float32))

    @classmethod
    def worth(cls, source: BatchNormStatistics, count: NDArray[np.float32], measured: int) -> "Prior":
        """Make ``source`` a prior that counts as much as ``count`` N, (features,), beside K measured: weight N / (N + K)."""
        return cls(source.mean, source.variance, count / (count + np.float32(measured)))

    @property
    def share(self) -> float:
        """The prior's weight, averaged over features."""
        return float(self.weight.mean(dtype=np.float64))


def blended(mean: Any, variance: Any, prior_mean: Any, prior_variance: Any, weight: Any) -> tuple[Any, Any]:
    """Mean and variance of a mixture that is ``weight`` prior and otherwise measured: arrays or tensors, (features,) each.

    Equals mixing E[x] and E[x²], without their cancellation; a weight of 0 returns exactly what was measured.
    """
    kept, apart = 1 - weight, mean - prior_mean
    return kept * mean + weight * prior_mean, kept * variance + weight * prior_variance + weight * kept * apart * apart


@dataclass(frozen=True, eq=False)
class TrainingStatistics:
    """What the training plates' own control statistics look like.

    ``source`` are the statistics used without adaptation, and as a prior worth ``blend_wells`` control wells, (features,).
    ``mean_centre``/``mean_spread`` and ``log_variance_centre``/``log_variance_spread`` are means and standard deviations
    over training plates, (features,); ``held_out_distances`` are the distances of plates of held-out batches, sorted, that
    calibrate a new plate's.
    """

    source: BatchNormStatistics
    mean_centre: NDArray[np.float32]
    mean_spread: NDArray[np.float32]
    log_variance_centre: NDArray[np.float32]
    log_variance_spread: NDArray[np.float32]
    held_out_distances: NDArray[np.float64]
    blend_wells: NDArray[np.float32]

    def prior(self, wells: int) -> Prior:
        """What statistics of so many control wells K are blended with: ``source``, weight N / (N + K)."""
        return Prior.worth(self.source, self.blend_wells, wells)

    def distance(self, statistics: BatchNormStatistics) -> float:
        """Root mean square, over features, of the shift of mean and log variance in training-plate spreads."""
        mean = (statistics.mean - self.mean_centre) / self.mean_spread
        log_variance = (log_variances(statistics) - self.log_variance_centre) / self.log_variance_spread
        return float(np.sqrt(np.mean(np.concatenate([mean, log_variance]).astype(np.float64) ** 2)))

    def percentile(self, distance: float) -> float:
        """Share of held-out training plates that lie no farther, in percent."""
        return 100.0 * float(np.searchsorted(self.held_out_distances, distance, side="right")) / self.held_out_distances.size

    @cached_property
    def out_of_range_distance(self) -> float:
        """The distance beyond which a plate is out of range: 1.5 times that of the farthest held-out training plate.

        A handful of held-out plates cannot show a far percentile, so the bound is the largest seen with a margin.
        """
        return 1.5 * float(self.held_out_distances[-1])


def log_variances(statistics: BatchNormStatistics) -> NDArray[np.float32]:
    """Natural logarithm of the variances, floored at 1e-6: (features,)."""
    return np.log(np.maximum(statistics.variance, np.float32(1e-6)))


def summarise_training(
    plates: Iterable[BatchNormStatistics],
    source: BatchNormStatistics,
    held_out: Iterable[BatchNormStatistics],
    blend_wells: NDArray[np.float32] | None = None,
) -> TrainingStatistics:
    """Describe training plates by centre and spread, and calibrate distance on plates of held-out batches.

    Without ``blend_wells`` the source statistics count as much as one control well. Spreads are floored at a tenth of their
    median so that a feature that hardly moved in training cannot rule alone.
    """
    members = list(plates)
    means = np.stack([plate.mean for plate in members])
    logs = np.stack([log_variances(plate) for plate in members])
    described = TrainingStatistics(
        source=source,
        mean_centre=means.mean(0),
        mean_spread=_floored(means.std(0)),
        log_variance_centre=logs.mean(0),
        log_variance_spread=_floored(logs.std(0)),
        held_out_distances=np.zeros(1),
        blend_wells=np.ones_like(source.mean) if blend_wells is None else blend_wells,
    )
    distances = np.sort([described.distance(plate) for plate in held_out])
    return TrainingStatistics(**{**vars(described), "held_out_distances": distances})


def _floored(spread: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(spread, np.float32(max(0.1 * float(np.median(spread)), 1e-6)))


def statistics_id(
    *, bundle_digest: str, recipe: Mapping[str, Any], pixel_size_um: float | None, context: str, precision: str,
    planes: Iterable[tuple[PlaneKey, str]], panel: Iterable[str] = (), blend_wells: int | None = None,
) -> str:  # fmt: skip
    """Name statistics by everything that made them: sha256 of canonical JSON.

    ``planes`` pairs each plane used with the sha256 of its file; ``panel`` are the wells among them that are no controls;
    ``blend_wells`` how many control wells were weighed against the bundle's prior, if they were.
    """
    content: dict[str, Any] = {
        "bundle": bundle_digest,
        "context": context,
        "pixel_size_um": pixel_size_um,
        "planes": sorted((*key, digest) for key, digest in planes),
        "precision": precision,
        "recipe": dict(recipe),
    }
    wells = sorted(panel)
    if wells:
        content["panel"] = wells
    if blend_wells is not None:
        content["blend"] = {"prior": "source", "wells": blend_wells}
    return json_sha256(content)


def with_scale(statistics_id: str, scale_digest: str) -> str:
    """Name statistics of a recipe whose scale the batch sets: by what they were measured on, and by that scale."""
    return json_sha256({"measured": statistics_id, "scale": scale_digest})


def json_sha256(value: Any) -> str:
    """Name a value: sha256 of its canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: one value, one text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
