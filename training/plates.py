"""Plates on disk: a folder of prepared plates, opened without being read.

``recipe.json`` says how all of them were prepared. Each plate has three files, named by its barcode:

- ``<plate>.npy``: images (sites, channels, height, width), whole fields at the network's pixel size: uint8 for
  percentile-8bit, else grey levels as uint16 (float32 where the planes are);
- ``<plate>.parquet``: one row a site: the index's columns, sha256 of each plane's file, intensities, moments;
- ``<plate>.plate.json``: written last, with sizes and sha256 of the other two. Without it the plate is not there.

Knows nothing of where planes come from (``training.fetch``) nor of purposes (``training.splits``).
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from glob import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.bundle import file_sha256, recipe_digest, recipe_from_json, recipe_json
from model.errors import LayoutError, LeakError, RunError
from model.images import ImageRecipe
from model.layout import Role
from model.scale import BatchScale
from training.dataset import NO_LABEL, PlateSites
from training.index import path_column

FORMAT_VERSION = 1
RECIPE = "recipe.json"
PLATE_KEYS = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate"]
MEASURED = ("intensity_mean", "intensity_std", "unit_mean", "unit_square")
"""What is measured of a plane: mean and std as read, mean and mean square when scaled to about 0…1."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of the errors that say that no more can be written."""
JOURNAL, DRAFT = ".journal", ".npy.partial"
"""Endings of the files of a plate that is not finished (``training.drafts``)."""
_OPEN_FILES = 64
_UNFINISHED = ".partial"

log = logging.getLogger("anchorwell.training")
Read = TypeVar("Read")


@dataclass(frozen=True)
class PlateFiles:
    """Where a plate's files lie."""

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
        return self.path(".plate.json")


@dataclass(frozen=True)
class PlateRecord:
    """What a plate's last file says: of which plate, by which recipe, of which rows of an index, and its files.

    ``steps`` are stored values per grey level. ``skipped`` are the sites left out, and why.
    """

    plate: str
    lab: str
    batch: str
    recipe: str
    rows: str
    steps: float
    scale: dict[str, Any] | None
    skipped: tuple[str, ...]
    images_bytes: int
    images_sha256: str
    sites_bytes: int
    sites_sha256: str
    format: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: Path) -> "PlateRecord":
        """Read a plate's record.

        Raises:
            RunError: it is of another version, or damaged.
        """
        return read_json(path, lambda content: cls._of(path, content), "delete it and fetch the plate again")

    @classmethod
    def _of(cls, path: Path, content: dict[str, Any]) -> "PlateRecord":
        if content.get("format") != FORMAT_VERSION:
            raise RunError(f"{path} has format {content.get('format')}; this version reads {FORMAT_VERSION}: fetch it again")
        return cls(**{**content, "skipped": tuple(content["skipped"])})


class StoredImages:
    """A plate's pixels in their file, mapped when they are asked for; workers are sent the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type["StoredImages"], tuple[Path]]:
        return StoredImages, (self.path,)

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        mapped = self._mapped()
        return mapped.shape, mapped.dtype

    def _mapped(self) -> NDArray[Any]:
        found = self.path.stat()
        return _map(self.path, found.st_ino, found.st_mtime_ns)

    @property
    def shape(self) -> tuple[int, ...]:
        """(sites, channels, height, width)."""
        return self._header[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the file."""
        return self._header[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        return np.array(self._mapped()[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


@lru_cache(_OPEN_FILES)  # thousands of plates would be more open files than a process may have
def _map(path: Path, _inode: int, _mtime_ns: int) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


@dataclass(frozen=True)
class StoredFiles:
    """What a sites table says of the files that planes were read from; read when it is asked for."""

    sites: Path
    channels: tuple[str, ...]

    def digests(self) -> NDArray[np.str_]:
        """sha256 of each, hexadecimal (sites, channels)."""
        table = pq.read_table(self.sites, columns=[sha256_column(channel) for channel in self.channels])
        return np.stack([np.array(column.to_pylist(), np.str_) for column in table.columns], axis=1)

    def places(self, rows: Sequence[int], channels: Sequence[int]) -> list[str]:
        """Site and path or URL of planes, each of a row and a channel's number."""
        names = [path_column(channel) for channel in self.channels]
        table = pq.read_table(self.sites, columns=["Metadata_Site", *names]).to_pandas()
        return [
            f"site {table['Metadata_Site'].iloc[row]} {table[names[channel]].iloc[row]}"
            for row, channel in zip(rows, channels, strict=True)
        ]


# --- columns ---------------------------------------------------------------------------------------------------------


def sha256_column(channel: str) -> str:
    """Name the column of a sites table that holds a channel's digests."""
    return f"sha256_{channel}"


def measured_columns(channel: str) -> list[str]:
    """Name the columns of what was measured of a channel, in the order of ``MEASURED``."""
    return [f"{name}_{channel}" for name in MEASURED]


# --- the folder ------------------------------------------------------------------------------------------------------


def preparation(recipe: ImageRecipe) -> ImageRecipe:
    """Return what of a recipe a folder of plates is prepared by: all but the training set's mean and std."""
    return replace(recipe, mean=(), std=())


def recipe_name(recipe: ImageRecipe) -> str:
    """Name a preparation: sha256 of its canonical JSON."""
    return recipe_digest(preparation(recipe))


def write_recipe(folder: Path, recipe: ImageRecipe) -> None:
    """Say how the folder's plates are prepared; of several processes that would say it first, one does.

    Raises:
        RunError: it, or a plate there, says otherwise already; names what differs.
    """
    path = folder / RECIPE
    if not path.is_file():
        with (folder / f".{RECIPE}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _require_prepared(folder, _records(folder), recipe)
                write_whole(path, json.dumps(recipe_json(preparation(recipe)), indent=2).encode() + b"\n")
    require_recipe(folder, recipe)


def require_recipe(folder: Path, recipe: ImageRecipe) -> None:
    """Check that a folder was prepared by a recipe; its size may be larger where no batch's scale hangs on it.

    Raises:
        RunError: it was not; names what differs.
    """
    stored = plates_recipe(folder)
    there, asked = asdict(stored), asdict(preparation(recipe))
    differences = [
        f"{name} (it is {there[name]}, asked for is {asked[name]})"
        for name in there
        if there[name] != asked[name] and (name != "size" or stored.scaled_by_batch)
    ]
    if differences:
        raise RunError(f"{folder} was prepared with another {', another '.join(differences)}: name another folder")


def plates_recipe(folder: Path) -> ImageRecipe:
    """Return how a folder's plates were prepared; its mean and std are left to training, its size is the least there is.

    Raises:
        RunError: nothing was fetched there, or what says it is damaged.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{folder} holds no plates ({RECIPE} is not there): fetch them with anchorwell-train fetch")
    return read_json(path, recipe_from_json, "delete it and run the same fetch again, which writes it anew")


def plate_records(folder: Path) -> dict[str, PlateRecord]:
    """Return the records of the folder's complete plates, by name.

    Raises:
        RunError: a plate is of another version, its record has another's name, it was prepared otherwise than the folder
            says, or its files are not as long as they were; names all that are not.
    """
    found = _records(folder)
    if found:
        _require_prepared(folder, found, plates_recipe(folder))
    damaged = [str(path) for record in found for path, size in _files(folder, record) if _size(path) != size]
    if damaged:
        raise _damaged(damaged)
    return {record.plate: record for record in found}


def _records(folder: Path) -> list[PlateRecord]:
    found = {path: PlateRecord.load(path) for path in sorted(folder.glob("*.plate.json"))}
    for path, record in found.items():
        own = PlateFiles(folder, record.plate).record.name
        if path.name != own:
            raise RunError(
                f"{path} says it is of plate {record.plate}, whose record is {own}: delete it, or give it its name"
            )
    return list(found.values())


def _require_prepared(folder: Path, records: Sequence[PlateRecord], recipe: ImageRecipe) -> None:
    """Check that plates were prepared by a folder's recipe.

    Raises:
        RunError: they were not; names all of them.
    """
    other = [record.plate for record in records if record.recipe != recipe_name(recipe)]
    if other:
        raise RunError(
            f"{folder}: {RECIPE} is not what the plates {', '.join(other)} were prepared by: name another folder, or delete "
            "their .plate.json to fetch them again"
        )


def _warn_of_drafts(folder: Path, complete: Mapping[str, PlateRecord]) -> None:
    drafts = {unquote(path.name.removesuffix(ending)) for ending in (JOURNAL, DRAFT) for path in folder.glob(f"*{ending}")}
    unfinished = sorted(drafts - complete.keys())
    if unfinished:
        log.warning(
            "%s is not fetched to its end, the plates %s are unfinished: run fetch again", folder, ", ".join(unfinished)
        )


def verify_plates(folder: Path, expected: Iterable[str] = ()) -> int:
    """Check the sha256 of every file of every complete plate; return how many plates there are.

    Raises:
        RunError: files are not as they were written, or expected plates are not complete; names all of them.
    """
    records = plate_records(folder)
    _warn_of_drafts(folder, records)
    absent = sorted(set(expected) - records.keys())
    if absent:
        raise RunError(f"{folder} lacks the plates {', '.join(absent)} of the index: run fetch again")
    damaged = _opened(folder, records, plates_recipe(folder))[1] if records else []
    images = {PlateFiles(folder, name).images: record.images_sha256 for name, record in records.items()}
    damaged += [str(path) for path, expected in images.items() if file_sha256(path) != expected]
    if damaged:
        raise _damaged(damaged)
    return len(records)


def _files(folder: Path, record: PlateRecord) -> tuple[tuple[Path, int], tuple[Path, int]]:
    files = PlateFiles(folder, record.plate)
    return (files.images, record.images_bytes), (files.sites, record.sites_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _damaged(paths: Sequence[str]) -> RunError:
    listed = "\n".join(paths)
    return RunError(f"not as their plates' records say; delete those plates' .plate.json and fetch them again:\n{listed}")


def open_plates(folder: Path, classes: Sequence[str] | None = None) -> dict[str, PlateSites]:
    """Open every complete plate of a folder; pixels stay on disk until they are asked for.

    Args:
        folder: what ``anchorwell-train fetch`` wrote.
        classes: labels in the order of the network's outputs; without them every label is NO_LABEL.

    Raises:
        RunError: there are no plates, they are of another version, or files are damaged: all but the values of pixels is
            looked at.
    """
    recipe = plates_recipe(folder)
    records = plate_records(folder)
    _warn_of_drafts(folder, records)
    if not records:
        raise RunError(f"{folder} has no complete plate: fetch them with anchorwell-train fetch")
    opened, damaged = _opened(folder, records, recipe)
    if damaged:
        raise _damaged(damaged)
    return opened if classes is None else {name: plate.with_classes(classes) for name, plate in opened.items()}


def _opened(
    folder: Path, records: Mapping[str, PlateRecord], recipe: ImageRecipe
) -> tuple[dict[str, PlateSites], list[str]]:
    """Open plates, but those whose files do not go together; of these return the files, and what is wrong."""
    opened: dict[str, PlateSites] = {}
    damaged: list[str] = []
    for name, record in records.items():
        try:
            opened[name] = _open_plate(PlateFiles(folder, name), record, recipe)
        except RunError as error:
            damaged.append(error.detail)
    return opened, damaged


def _open_plate(files: PlateFiles, record: PlateRecord, recipe: ImageRecipe) -> PlateSites:
    content = files.sites.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.sites_sha256:
        raise RunError(str(files.sites))
    measured = [measured_columns(channel) for channel in recipe.channels]
    columns = [*PLATE_KEYS, "Metadata_Well", "label", "role", *(name for names in measured for name in names)]
    sites = pq.read_table(io.BytesIO(content), columns=columns).to_pandas()
    _require_own_rows(files, record, sites)
    _require_images(files, record, len(sites), recipe)
    values = np.stack([sites[names].to_numpy(np.float64) for names in measured], axis=1)  # (sites, channels, MEASURED)
    return PlateSites(
        plate=record.plate,
        lab=record.lab,
        batch=record.batch,
        wells=sites["Metadata_Well"].to_numpy(dtype=str),
        names=sites["label"].to_numpy(dtype=str),
        labels=np.full(len(sites), NO_LABEL, np.int64),
        controls=(sites["role"] == Role.CONTROL.value).to_numpy(dtype=bool),
        images=StoredImages(files.images),
        intensities=values[..., :2].astype(np.float32),
        recipe=recipe,
        scale=None if record.scale is None else BatchScale.from_json(record.scale),
        steps=record.steps,
        site_moments=values[..., 2:],
        files=StoredFiles(files.sites, recipe.channels),
    )


def _require_own_rows(files: PlateFiles, record: PlateRecord, sites: pd.DataFrame) -> None:
    """Hold what a record says of its plate against the table of its sites.

    Raises:
        RunError: they differ; names the record.
    """
    for name, said in zip(PLATE_KEYS, (record.lab, record.batch, record.plate), strict=True):
        other = sorted(set(sites[name].astype(str)) - {said})
        if other:
            raise RunError(f"{files.record} (its {name} is {said}; {files.sites.name} has {', '.join(other)})")


def _require_images(files: PlateFiles, record: PlateRecord, sites: int, recipe: ImageRecipe) -> None:
    """Hold the head of a file of pixels against its plate's sites, and against its length.

    Raises:
        RunError: it is of other images; names the file.
    """
    types = ("uint8",) if recipe.scaling == "percentile-8bit" else ("uint16", "float32")
    expected = f"{sites} sites of {len(recipe.channels)} channels as {' or '.join(types)}"
    try:
        with files.images.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
            length = file.tell() + math.prod(shape) * dtype.itemsize
    except Exception as error:  # noqa: BLE001 (damaged bytes: whatever reading them raises, they are at fault)
        raise RunError(f"{files.images} (its head cannot be read; expected are {expected}: {str(error)[:100]})") from None
    known = version == (1, 0) and not columns_first and dtype.isnative and dtype.name in types
    if not known or shape[:-2] != (sites, len(recipe.channels)) or length != record.images_bytes:
        raise RunError(f"{files.images} (its head says {shape} as {dtype.name}; expected are {expected})")


def plate_table(plates: Mapping[str, PlateSites]) -> pd.DataFrame:
    """Return one row a plate: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``."""
    return pd.DataFrame([(plate.lab, plate.batch, plate.plate) for plate in plates.values()], columns=PLATE_KEYS)


# --- writing ---------------------------------------------------------------------------------------------------------


def read_json(path: Path, read: Callable[[dict[str, Any]], Read], remedy: str) -> Read:
    """Read a file of JSON.

    Raises:
        RunError: it is damaged; says what to do.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, LayoutError, LeakError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RunError(f"{path} is damaged ({said}): {remedy}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def unfinished_files(path: Path) -> list[Path]:
    """Return what calls that were killed left of a file."""
    return list(path.parent.glob(f".{escape(path.name)}.*{_UNFINISHED}"))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
