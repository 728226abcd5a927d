"""Plates on disk: a folder of prepared plates, opened without being read.

``recipe.json`` says how all of them were prepared. Each plate has three files, named by its barcode:

- ``<plate>.npy``: images (sites, channels, height, width), uint8 or uint16, whole fields at the network's pixel size;
- ``<plate>.parquet``: one row a site: the index's columns, sha256 of each plane's file, intensities, moments;
- ``<plate>.json``: written last, with sizes and sha256 of the other two. Without it the plate is not there.

Knows nothing of where planes come from (``training.fetch``) nor of purposes (``training.splits``).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.bundle import recipe_from_json, recipe_json
from model.errors import RunError
from model.images import ImageRecipe
from model.layout import Role
from model.statistics import canonical_json
from training.dataset import NO_LABEL, PlateSites

FORMAT_VERSION = 1
RECIPE = "recipe.json"
KEYS = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate"]
_UINT8_STEPS, _UINT16_STEPS = 255, 65535
_HEADROOM = 4


# --- how pixels are stored -------------------------------------------------------------------------------------------


def preparation(recipe: ImageRecipe) -> ImageRecipe:
    """Return what of a recipe a folder of plates is prepared by: all but the training set's mean and std."""
    return replace(recipe, mean=(), std=())


def white_of(recipe: ImageRecipe) -> tuple[float, ...]:
    """Return the stored value that stands for 1, per channel.

    Percentile scaling gives 256 steps, which uint8 keeps. What keeps intensity is stored as uint16 counts; a full scale of
    few counts is stored in finer steps, so that resampled pixels are not coarsened, with room for pixels beyond it.
    """
    if recipe.scaling == "percentile":
        return (float(_UINT8_STEPS),) * len(recipe.channels)
    assert recipe.full_scale is not None
    return tuple(
        full * max(1, int(_UINT16_STEPS / _HEADROOM / full)) if full <= _UINT8_STEPS else full for full in recipe.full_scale
    )


def stored_dtype(recipe: ImageRecipe) -> np.dtype[Any]:
    """Return the type in which a recipe's pixels are stored."""
    return np.dtype(np.uint8 if recipe.scaling == "percentile" else np.uint16)


def to_stored(site: NDArray[np.float32], recipe: ImageRecipe) -> NDArray[Any]:
    """Store a scaled site (channels, height, width); ``PlateSites.unit`` is the way back."""
    dtype = stored_dtype(recipe)
    steps = site * np.asarray(white_of(recipe), np.float32)[:, None, None]
    stored: NDArray[Any] = np.clip(np.rint(steps), 0, np.iinfo(dtype).max).astype(dtype)
    return stored


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlateFiles:
    """Where a plate's three files lie."""

    folder: Path
    plate: str

    def path(self, ending: str) -> Path:
        """Name the plate's file with an ending; a barcode that is no file name is quoted."""
        name = quote(self.plate, safe="")
        return self.folder / f"{'%2E' + name[1:] if name.startswith('.') else name}{ending}"

    @property
    def images(self) -> Path:
        """Pixels."""
        return self.path(".npy")

    @property
    def sites(self) -> Path:
        """One row a site."""
        return self.path(".parquet")

    @property
    def record(self) -> Path:
        """What makes the plate complete."""
        return self.path(".json")


@dataclass(frozen=True)
class PlateRecord:
    """What a plate's last file says: of which plate, by which recipe, of which rows of an index, and its files."""

    plate: str
    lab: str
    batch: str
    recipe: str
    rows: str
    images_bytes: int
    images_sha256: str
    sites_bytes: int
    sites_sha256: str
    format: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: Path) -> "PlateRecord":
        """Read a plate's record.

        Raises:
            RunError: it is of another version.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT_VERSION:
            raise RunError(f"{path} has format {content.get('format')}; this version reads {FORMAT_VERSION}: fetch it again")
        return cls(**content)


class StoredImages:
    """A plate's pixels in their file, mapped anew for every reading: no file stays open, and workers are sent a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type["StoredImages"], tuple[Path]]:
        return StoredImages, (self.path,)

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        mapped = self._mapped()
        return mapped.shape, mapped.dtype

    def _mapped(self) -> NDArray[Any]:
        mapped: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped

    @property
    def shape(self) -> tuple[int, ...]:
        """(sites, channels, height, width)."""
        return self._header[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""
        return self._header[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        return np.array(self._mapped()[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


def sha256_column(channel: str) -> str:
    """Name the column of a sites table that holds a channel's digests."""
    return f"sha256_{channel}"


def measured_columns(channel: str) -> list[str]:
    """Name the columns of what was measured of a channel: mean and std of the raw plane, mean and mean square as stored."""
    return [f"{name}_{channel}" for name in ("intensity_mean", "intensity_std", "stored_mean", "stored_square")]


def write_recipe(folder: Path, recipe: ImageRecipe) -> None:
    """Say how the folder's plates are prepared.

    Raises:
        RunError: it says otherwise already; names what differs.
    """
    path = folder / RECIPE
    if path.is_file():
        require_recipe(folder, recipe)
        return
    write_whole(path, json.dumps(recipe_json(preparation(recipe)), indent=2).encode() + b"\n")


def require_recipe(folder: Path, recipe: ImageRecipe, *, but: frozenset[str] = frozenset()) -> None:
    """Check that a folder was prepared by a recipe, ``but`` for some of its fields.

    Raises:
        RunError: it was not; names what differs.
    """
    there, asked = asdict(plates_recipe(folder)), asdict(preparation(recipe))
    differences = [
        f"{name} (it is {there[name]}, asked for is {asked[name]})"
        for name in there
        if name not in but and there[name] != asked[name]
    ]
    if differences:
        raise RunError(f"{folder} was prepared with another {', another '.join(differences)}: name another folder")


def plates_recipe(folder: Path) -> ImageRecipe:
    """Return how a folder's plates were prepared; its mean and std are left to training, its size is the least there is.

    Raises:
        RunError: nothing was fetched there.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{folder} holds no plates ({RECIPE} is not there): fetch them with anchorwell-train fetch")
    return recipe_from_json(json.loads(path.read_text(encoding="utf-8")))


def plate_records(folder: Path) -> dict[str, PlateRecord]:
    """Return the records of the folder's plates, by name."""
    found = [PlateRecord.load(path) for path in sorted(folder.glob("*.json")) if path.name != RECIPE]
    return {record.plate: record for record in found}


def open_plates(folder: Path, classes: Sequence[str] | None = None) -> dict[str, PlateSites]:
    """Open every complete plate of a folder; pixels stay on disk until they are asked for.

    Args:
        folder: what ``anchorwell-train fetch`` wrote.
        classes: labels in the order of the network's outputs; without them every label is NO_LABEL.

    Raises:
        RunError: there are no plates, or they are of another version.
    """
    recipe = plates_recipe(folder)
    records = plate_records(folder)
    if not records:
        raise RunError(f"{folder} has no complete plate: fetch them with anchorwell-train fetch")
    return {name: _open_plate(PlateFiles(folder, name), record, recipe, classes or ()) for name, record in records.items()}


def _open_plate(files: PlateFiles, record: PlateRecord, recipe: ImageRecipe, classes: Sequence[str]) -> PlateSites:
    for path, size in ((files.images, record.images_bytes), (files.sites, record.sites_bytes)):
        if not path.is_file() or path.stat().st_size != size:
            raise RunError(f"{path} is not as its record says ({size:,} bytes): delete {files.record.name} and fetch again")
    measured = [measured_columns(channel) for channel in recipe.channels]
    columns = ["Metadata_Well", "label", "role", *(name for names in measured for name in names)]
    sites = pq.read_table(files.sites, columns=columns).to_pandas()
    values = np.stack([sites[names].to_numpy(np.float64) for names in measured], axis=1)  # (sites, channels, 4)
    plate = PlateSites(
        plate=record.plate,
        lab=record.lab,
        batch=record.batch,
        wells=sites["Metadata_Well"].to_numpy(dtype=str),
        names=sites["label"].to_numpy(dtype=str),
        labels=np.full(len(sites), NO_LABEL, np.int64),
        controls=(sites["role"] == Role.CONTROL.value).to_numpy(dtype=bool),
        images=StoredImages(files.images),
        intensities=values[..., :2].astype(np.float32),
        white=white_of(recipe),
        pixel_moments=values[..., 2:],
        read_digests=partial(read_digests, files.sites, recipe.channels),
    )
    return plate.with_classes(classes)


def read_digests(sites: Path, channels: Sequence[str]) -> NDArray[np.str_]:
    """Read the sha256 of every plane of a sites table: (sites, channels)."""
    table = pq.read_table(sites, columns=[sha256_column(channel) for channel in channels])
    return np.stack([np.array(column.to_pylist(), np.str_) for column in table.columns], axis=1)


def plate_table(plates: Mapping[str, PlateSites]) -> pd.DataFrame:
    """Return one row a plate: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``."""
    return pd.DataFrame([(plate.lab, plate.batch, plate.plate) for plate in plates.values()], columns=KEYS)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial_path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
