"""A plate's sites as training reads them: planes prepared by a recipe, whole, by row, scaled when they are asked for.

Knows nothing of files: ``training.plates`` opens what was fetched, and anything that gives images by rows will do.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.context import MAX_CONTEXT_SITES, choose_context
from model.errors import ContextError
from model.images import ImageRecipe, PreparedImage, centre_crop, crop_corner, measure_scale, normalise, scale_pixels
from model.layout import SiteKey
from model.scale import BatchScale
from model.statistics import json_sha256

NO_LABEL = -1
_CHUNK_SITES = 64
_CHUNK_PIXELS = 16_384


class SiteImages(Protocol):
    """Images (sites, channels, height, width), read by rows: an array, or a file that is opened when it is asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> NDArray[Any]: ...


class PlaneFiles(Protocol):
    """The files that a plate's planes were read from."""

    def digests(self) -> NDArray[np.str_]:
        """sha256 of each, hexadecimal (sites, channels)."""

    def places(self, rows: Sequence[int], channels: Sequence[int]) -> list[str]:
        """Where they lay: one for each row and channel number."""


class NoFiles:
    """Of planes that came from no file."""

    def digests(self) -> NDArray[np.str_]:
        """None."""
        return np.empty((0, 0), np.str_)

    def places(self, rows: Sequence[int], channels: Sequence[int]) -> list[str]:  # noqa: ARG002
        """No place."""
        return [""] * len(rows)


@dataclass(frozen=True, eq=False)
class PlateSites:
    """One plate's sites.

    ``images`` (sites, channels, height, width), prepared by ``recipe``, whose mean and std are not used here: uint8 for
    percentile-8bit, else ``steps`` times grey levels. ``scale`` is the plate's own, for a recipe that has one. ``names``
    (sites,) are the wells' labels, ``labels`` (sites,) class numbers, NO_LABEL where the well has no class of those learned.
    ``intensities`` (sites, channels, 2): mean and standard deviation of the raw planes, for the intensity null.
    ``site_moments`` (sites, channels, 2): mean and mean square of scaled pixels; without them they are counted when they are
    asked for. ``files`` are those of the planes.
    """

    plate: str
    lab: str
    batch: str
    wells: NDArray[np.str_]
    names: NDArray[np.str_]
    labels: NDArray[np.int64]
    controls: NDArray[np.bool_]
    images: SiteImages
    intensities: NDArray[np.float32]
    recipe: ImageRecipe
    scale: BatchScale | None = None
    steps: float = 1.0
    site_moments: NDArray[np.float64] | None = None
    files: PlaneFiles = field(default_factory=NoFiles)

    @property
    def treated(self) -> NDArray[np.int64]:
        """Rows of treated sites with a class, in order."""
        return np.flatnonzero(~self.controls & (self.labels != NO_LABEL))

    @property
    def control_rows(self) -> NDArray[np.int64]:
        """Rows of control sites."""
        return np.flatnonzero(self.controls)

    @property
    def digests(self) -> NDArray[np.str_]:
        """sha256 of every plane's file, hexadecimal (sites, channels); read anew each time; of no site without files."""
        return self.files.digests()

    @property
    def sha256(self) -> str:
        """What the plate holds, hexadecimal: its lab and batch, and every site's well, label, role and files."""
        sites = [self.wells.tolist(), self.names.tolist(), self.controls.tolist(), self.digests.tolist()]
        return json_sha256([self.lab, self.batch, *sites])

    def context_rows(self, max_sites: int = MAX_CONTEXT_SITES) -> NDArray[np.int64]:
        """Control rows that enter the statistics, by the rule the service uses."""
        return self.even_rows(self.control_rows, max_sites)

    def even_rows(self, rows: NDArray[np.int64], max_sites: int) -> NDArray[np.int64]:
        """At most ``max_sites`` of some rows, evenly over wells, by the rule the service uses."""
        seen: dict[str, int] = {}
        keys: dict[SiteKey, int] = {}
        for row in rows:
            well = str(self.wells[row])
            seen[well] = seen.get(well, 0) + 1
            keys[SiteKey(well, seen[well])] = int(row)
        context = choose_context(keys, max_sites)
        return np.array([keys[site] for site in context.used], np.int64)

    def with_classes(self, classes: Sequence[str]) -> "PlateSites":
        """Return the plate with class numbers in the order of ``classes``; other labels get NO_LABEL."""
        number = {name: position for position, name in enumerate(classes)}
        return replace(self, labels=np.array([number.get(name, NO_LABEL) for name in self.names.tolist()], np.int64))

    def scaled_by(self, rows: NDArray[np.int64] | None = None) -> "PlateSites":
        """Return the plate at the scale that control rows give, as the service would scale it had it those alone.

        Without rows it is at its own scale: that of its whole context.

        Raises:
            ContextError: they give none; names the plate.
        """
        if not self.recipe.scaled_by_batch:
            return self
        try:
            chosen = self.images[self.context_rows() if rows is None else rows]
            sites = [PreparedImage.of_planes(self._grey(site), self.recipe) for site in chosen]
            return replace(self, scale=measure_scale(sites, self.recipe), site_moments=None)
        except ContextError as error:
            raise error.about(plate=self.plate) from None

    def unit(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows scaled to about 0…1: float32 (rows, channels, height, width)."""
        return self.scaled(self.images[rows])

    def scaled(self, window: NDArray[Any], corner: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
        """Scale a window (…, channels, height, width) of stored images to about 0…1; ``corner`` is its first pixel's."""
        if self.recipe.scaling == "percentile-8bit":
            return self._grey(window)
        top, left = crop_corner(self.images.shape, self.recipe.size)
        return scale_pixels(self._grey(window), self.recipe, self.scale, (corner[0] - top, corner[1] - left))

    def _grey(self, window: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values as the recipe prepared them: 0…1, or grey levels."""
        values: NDArray[np.float32] = window.astype(np.float32, copy=False)
        steps = np.float32(255.0 if window.dtype == np.uint8 else self.steps)
        return values if steps == 1 else values / steps

    def served(self, rows: NDArray[np.int64], recipe: ImageRecipe) -> NDArray[np.float32]:
        """Rows as the service prepares them: centre crop, normalised."""
        sites = centre_crop(self.images[rows], recipe.size)
        return normalise(self.scaled(sites, crop_corner(self.images.shape, recipe.size)), recipe)

    def zscore_recipe(self, recipe: ImageRecipe, rows: NDArray[np.int64] | None = None) -> ImageRecipe:
        """Return the recipe with mean and std per channel of this plate's controls (all, or ``rows``) instead."""
        controls = self if rows is None else replace(self, controls=np.isin(np.arange(len(self.wells)), rows))
        mean, std = moments([controls], controls_only=True)
        return replace(recipe, mean=mean, std=std)

    def moments_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean and mean square of scaled pixels, per site and channel: (rows, channels, 2)."""
        if self.site_moments is not None:
            return self.site_moments[rows]
        return np.concatenate([_moments(self.unit(part)) for part in _chunks(rows)])


def _moments(sites: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean and mean square of every plane of (sites, channels, height, width): (sites, channels, 2)."""
    return np.array([[plane_moments(plane) for plane in site] for site in sites])


def plane_moments(plane: NDArray[Any]) -> tuple[float, float]:
    """Mean and mean square of a plane, in double precision: exact for integers."""
    pixels = plane.reshape(-1)
    total = square = 0.0
    for start in range(0, len(pixels), _CHUNK_PIXELS):  # which fit a processor's cache
        part = pixels[start : start + _CHUNK_PIXELS].astype(np.float64)
        total += float(part.sum())
        square += float(np.einsum("i,i", part, part))  # no BLAS: its threads spin beside those of other workers
    return total / len(pixels), square / len(pixels)


def _chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + _CHUNK_SITES] for start in range(0, len(rows), _CHUNK_SITES))


def moments(plates: Iterable[PlateSites], *, controls_only: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of scaled pixels over plates, every plate counting once."""
    found = []
    for plate in plates:
        rows = plate.control_rows if controls_only else np.arange(len(plate.wells))
        found.append(plate.moments_of(rows).mean(axis=0))
    mean, square = np.mean(found, axis=0).T
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)
