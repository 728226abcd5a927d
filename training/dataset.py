"""Plates in memory: every site's planes at the network's pixel size, scaled, not yet cropped.

Percentile scaling gives 256 steps, so such sites are kept as uint8 without loss; fixed scaling keeps float32.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.bundle import recipe_json
from model.errors import ImageError
from model.images import ImageRecipe, Plane, centre_crop, decode_plane, normalise, scale_site
from model.layout import Role
from model.statistics import canonical_json
from training.index import path_column

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class PlateSites:
    """One plate's sites.

    ``images`` (sites, channels, height, width) uint8 or float32; ``labels`` (sites,) class numbers, NO_LABEL where the
    well has no class of those learned; ``intensities`` (sites, channels, 2): mean and standard deviation of the raw
    planes, for the intensity null.
    """

    plate: str
    lab: str
    batch: str
    wells: NDArray[np.str_]
    names: NDArray[np.str_]
    labels: NDArray[np.int64]
    controls: NDArray[np.bool_]
    images: NDArray[Any]
    intensities: NDArray[np.float32]

    @property
    def treated(self) -> NDArray[np.int64]:
        """Rows of treated sites with a class, in order."""
        return np.flatnonzero(~self.controls & (self.labels != NO_LABEL))

    @property
    def control_rows(self) -> NDArray[np.int64]:
        """Rows of control sites."""
        return np.flatnonzero(self.controls)

    def unit(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows scaled to about 0…1: float32 (rows, channels, height, width)."""
        images = self.images[rows]
        return images.astype(np.float32) / np.float32(255.0) if images.dtype == np.uint8 else images

    def served(self, rows: NDArray[np.int64], recipe: ImageRecipe) -> NDArray[np.float32]:
        """Rows as the service prepares them: centre crop, normalised."""
        sites = centre_crop(self.unit(rows), recipe.size)
        return np.stack([normalise(site, recipe) for site in sites])

    def augmented(
        self, rows: NDArray[np.int64], recipe: ImageRecipe, crop: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Rows as training sees them: random crops, flips and quarter turns, normalised."""
        sites = self.unit(rows)
        return np.stack([normalise(_augment(site, crop, rng), recipe) for site in sites])

    def zscore_recipe(self, recipe: ImageRecipe, rows: NDArray[np.int64] | None = None) -> ImageRecipe:
        """Return the recipe with mean and std per channel of this plate's controls (all, or ``rows``) instead."""
        controls = self if rows is None else replace(self, controls=np.isin(np.arange(len(self.wells)), rows))
        mean, std = moments([controls], controls_only=True)
        return replace(recipe, mean=mean, std=std)


def _augment(site: NDArray[np.float32], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    top, left = (int(rng.integers(extent - size + 1)) for extent in site.shape[-2:])
    crop = site[:, top : top + size, left : left + size]
    crop = np.rot90(crop, k=int(rng.integers(4)), axes=(1, 2))
    return crop[:, :, ::-1] if rng.random() < 0.5 else crop  # noqa: PLR2004


def moments(plates: Iterable[PlateSites], *, controls_only: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of scaled pixels over plates, every plate counting once."""
    means, squares = [], []
    for plate in plates:
        rows = plate.control_rows if controls_only else np.arange(len(plate.wells))
        pixels = plate.unit(rows)
        means.append(pixels.mean(axis=(0, 2, 3), dtype=np.float64))
        squares.append(np.square(pixels).mean(axis=(0, 2, 3), dtype=np.float64))
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 1e-12))
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)


def group_means(values: NDArray[np.floating], where: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Mean of rows by group: (rows, dim) → (groups, dim); ``where`` (rows,) numbers each row's group, such as its well."""
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, where, values)
    return sums / np.bincount(where, minlength=groups)[:, None]


# --- loading ---------------------------------------------------------------------------------------------------------


def load_plates(
    index: pd.DataFrame,
    recipe: ImageRecipe,
    classes: Sequence[str],
    *,
    cache: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, PlateSites]:
    """Load every plate of an index.

    Args:
        index: see ``training.index``.
        recipe: mean and std are not used here.
        classes: labels in the order of the network's outputs; a label not among them gets NO_LABEL.
        cache: a folder for scaled sites, keyed by recipe and files, to load them once for many trainings.
        workers: processes that decode.
        progress: told (plates done, plates in all).
    """
    groups = list(index.groupby("Metadata_Plate", sort=True))
    plates: dict[str, PlateSites] = {}
    with ProcessPoolExecutor(max(1, workers)) as pool:
        for done, (name, rows) in enumerate(groups, start=1):
            plates[str(name)] = _plate(rows, recipe, classes, _pixels(rows, recipe, cache, pool))
            if progress:
                progress(done, len(groups))
    return plates


def _plate(
    rows: pd.DataFrame,
    recipe: ImageRecipe,
    classes: Sequence[str],
    pixels: tuple[NDArray[Any], NDArray[np.float32]],
) -> PlateSites:
    number = {name: position for position, name in enumerate(classes)}
    first = rows.iloc[0]
    assert pixels[0].shape[1] == len(recipe.channels)
    return PlateSites(
        plate=str(first["Metadata_Plate"]),
        lab=str(first["Metadata_Source"]),
        batch=str(first["Metadata_Batch"]),
        wells=rows["Metadata_Well"].to_numpy(dtype=str),
        names=rows["label"].to_numpy(dtype=str),
        labels=np.array([number.get(str(label), NO_LABEL) for label in rows["label"]], np.int64),
        controls=(rows["role"] == Role.CONTROL.value).to_numpy(dtype=bool),
        images=pixels[0],
        intensities=pixels[1],
    )


def _pixels(
    rows: pd.DataFrame, recipe: ImageRecipe, cache: Path | None, pool: ProcessPoolExecutor
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    columns = [path_column(channel) for channel in recipe.channels]
    paths = [tuple(map(str, row)) for row in rows[columns].to_numpy()]
    sizes = [None if pd.isna(size) else float(size) for size in rows["pixel_size_um"]]
    stored = None if cache is None else cache / f"{_cache_key(recipe, paths, sizes)}.npz"
    if stored is not None and stored.is_file():
        with np.load(stored, allow_pickle=False) as arrays:
            return arrays["images"], arrays["intensities"]
    sites = list(pool.map(_load_site, paths, [recipe] * len(paths), sizes, chunksize=8))
    size = min(min(image.shape[1:]) for image, _ in sites)
    images = np.stack([centre_crop(image, size) for image, _ in sites])
    intensities = np.stack([intensity for _, intensity in sites])
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        partial = stored.with_suffix(f".{os.getpid()}.npz")  # other runs may be filling the cache too
        np.savez(partial, images=images, intensities=intensities)
        partial.replace(stored)
    return images, intensities


def _load_site(
    paths: tuple[str, ...], recipe: ImageRecipe, pixel_size_um: float | None
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    planes = [_decoded(path) for path in paths]
    try:
        scaled = scale_site(planes, recipe, pixel_size_um)
    except ImageError as error:
        raise error.about(files=list(paths)) from None
    images = np.round(scaled * 255).astype(np.uint8) if recipe.scaling == "percentile" else scaled
    return images, np.array([(plane.mean(), plane.std()) for plane in planes], np.float32)


def _decoded(path: str) -> Plane:
    try:
        return decode_plane(Path(path).read_bytes())
    except ImageError as error:
        raise error.about(file=path) from None


def _cache_key(recipe: ImageRecipe, paths: Sequence[tuple[str, ...]], sizes: Sequence[float | None]) -> str:
    """Name a plate's scaled sites by the recipe and by each file's path, size and time of change."""
    content = recipe_json(replace(recipe, mean=(), std=()))
    stats = [[path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for site in paths for path in site]
    return hashlib.sha256(canonical_json([content, stats, list(sizes)])).hexdigest()
