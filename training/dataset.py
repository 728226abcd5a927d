"""A plate's sites as training reads them: planes at the network's pixel size, whole, scaled by the recipe, by row.

Knows nothing of files: ``training.plates`` opens what was fetched, and anything that gives images by rows will do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.images import ImageRecipe, centre_crop, normalise

NO_LABEL = -1
_UINT8_WHITE = 255.0
_CHUNK_SITES = 64


class SiteImages(Protocol):
    """Images (sites, channels, height, width), read by rows: an array, or a file that is opened when it is asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> NDArray[Any]: ...


def no_digests() -> NDArray[np.str_]:
    """Return the digests of a plate whose planes came from no file: none."""
    return np.empty((0, 0), np.str_)


@dataclass(frozen=True, eq=False)
class PlateSites:
    """One plate's sites.

    ``images`` (sites, channels, height, width); ``white`` (channels,) is the stored value that stands for 1, by default
    255 for uint8 and 1 for floats. ``names`` (sites,) are the wells' labels, ``labels`` (sites,) class numbers, NO_LABEL
    where the well has no class of those learned. ``intensities`` (sites, channels, 2): mean and standard deviation of the
    raw planes, for the intensity null. ``pixel_moments`` (sites, channels, 2): mean and mean square of ``images``, counted
    when they are needed where they were not stored. ``read_digests`` reads ``digests``.
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
    white: tuple[float, ...] = ()
    pixel_moments: NDArray[np.float64] | None = None
    read_digests: Callable[[], NDArray[np.str_]] = no_digests

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
        """sha256 of every plane's file, hexadecimal (sites, channels); read anew each time."""
        return self.read_digests()

    def with_classes(self, classes: Sequence[str]) -> "PlateSites":
        """Return the plate with class numbers in the order of ``classes``; other labels get NO_LABEL."""
        number = {name: position for position, name in enumerate(classes)}
        return replace(self, labels=np.array([number.get(name, NO_LABEL) for name in self.names.tolist()], np.int64))

    def unit(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows scaled to about 0…1: float32 (rows, channels, height, width)."""
        return self.scaled(self.images[rows])

    def scaled(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values (…, channels, height, width) scaled to about 0…1: float32."""
        white = self._white(stored.dtype)
        if white is None:
            return stored.astype(np.float32, copy=False)
        found: NDArray[np.float32] = stored.astype(np.float32) / white[:, None, None]
        return found

    def _white(self, dtype: np.dtype[Any]) -> NDArray[np.float32] | None:
        """The stored value that stands for 1: (channels,), or (1,) for all of them; None where nothing is to divide."""
        if self.white:
            return np.asarray(self.white, np.float32)
        return np.asarray([_UINT8_WHITE], np.float32) if dtype == np.uint8 else None

    def served(self, rows: NDArray[np.int64], recipe: ImageRecipe) -> NDArray[np.float32]:
        """Rows as the service prepares them: centre crop, normalised."""
        sites = self.scaled(centre_crop(self.images[rows], recipe.size))
        return np.stack([normalise(site, recipe) for site in sites])

    def zscore_recipe(self, recipe: ImageRecipe, rows: NDArray[np.int64] | None = None) -> ImageRecipe:
        """Return the recipe with mean and std per channel of this plate's controls (all, or ``rows``) instead."""
        controls = self if rows is None else replace(self, controls=np.isin(np.arange(len(self.wells)), rows))
        mean, std = moments([controls], controls_only=True)
        return replace(recipe, mean=mean, std=std)

    def unit_moments(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean and mean square of scaled pixels over rows, per channel: (channels, 2)."""
        if self.pixel_moments is None:
            counted: NDArray[np.float64] = pixel_moments(self.unit(part) for part in _chunks(rows)).mean(axis=0)
            return counted
        stored: NDArray[np.float64] = self.pixel_moments[rows].mean(axis=0)
        white = self._white(self.images.dtype)
        return stored if white is None else np.divide(stored, np.stack([white, white**2], axis=1))


def pixel_moments(chunks: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean and mean square of every plane of chunks (sites, channels, height, width): (sites, channels, 2)."""
    return np.concatenate([[[_plane_moments(plane) for plane in site] for site in chunk] for chunk in chunks])


def _plane_moments(plane: NDArray[Any]) -> tuple[float, float]:
    pixels = plane.reshape(-1).astype(np.float64)
    return float(pixels.mean()), float(pixels @ pixels) / pixels.size


def _chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + _CHUNK_SITES] for start in range(0, len(rows), _CHUNK_SITES))


def moments(plates: Iterable[PlateSites], *, controls_only: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of scaled pixels over plates, every plate counting once."""
    found = []
    for plate in plates:
        rows = plate.control_rows if controls_only else np.arange(len(plate.wells))
        found.append(plate.unit_moments(rows))
    mean, square = np.mean(found, axis=0).T
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)


def group_means(values: NDArray[np.floating], where: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Mean of rows by group: (rows, dim) → (groups, dim); ``where`` (rows,) numbers each row's group, such as its well."""
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, where, values)
    return sums / np.bincount(where, minlength=groups)[:, None]
