"""Fetching: planes read, prepared once by a recipe, and written plate by plate into a folder that training maps.

A plate is there whole or not at all; a plate that is there is not fetched again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.bundle import recipe_json
from model.errors import AnchorwellError, MixedSizesError, RunError
from model.images import ImageRecipe, Plane, decode_plane, scale_site
from training.dataset import pixel_moments
from training.index import channels_of, path_column
from training.plates import (
    KEYS,
    PlateFiles,
    PlateRecord,
    file_sha256,
    json_sha256,
    measured_columns,
    plate_records,
    preparation,
    sha256_column,
    stored_dtype,
    sync_folder,
    to_stored,
    write_recipe,
    write_whole,
)


@dataclass(frozen=True)
class SiteTask:
    """One site to prepare: where its planes lie, its place for messages, its pixel size."""

    plate: str
    well: str
    site: str
    channels: tuple[str, ...]
    paths: tuple[str, ...]
    pixel_size_um: float | None


@dataclass(frozen=True, eq=False)
class PreparedSite:
    """What is kept of a site: pixels as stored (channels, height, width), and what was measured, a row a channel."""

    images: NDArray[Any]
    digests: tuple[str, ...]
    measured: NDArray[np.float64]


@dataclass(frozen=True)
class FetchReport:
    """Plates written by this call, plates that were there, and sites written."""

    written: tuple[str, ...]
    there: tuple[str, ...]
    sites: int


def fetch(
    index: pd.DataFrame,
    folder: Path,
    recipe: ImageRecipe,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FetchReport:
    """Prepare every plate of an index that is not in the folder yet.

    Args:
        index: see ``training.index``.
        folder: where plates are kept; made where it is not there.
        recipe: mean and std are not used here; ``size`` is the least that a field may have.
        workers: processes that read and decode.
        progress: told (sites done, sites in all).

    Raises:
        RunError: the folder, or a plate in it, was prepared otherwise.
        AnchorwellError: a plane cannot be used; names plate, well, site, channel and file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, recipe)
    groups = {str(name): rows for name, rows in index.groupby("Metadata_Plate", sort=True)}
    records = plate_records(folder)
    there = [name for name, rows in groups.items() if name in records and require_rows(records[name], rows, folder)]
    written, done = [], sum(len(groups[name]) for name in there)
    with _mapper(workers) as mapped:
        for name, rows in groups.items():
            if name in there:
                continue
            prepared = mapped(_tasks(rows, recipe), recipe)
            _write_plate(PlateFiles(folder, name), rows, recipe, _told(prepared, done, len(index), progress))
            written.append(name)
            done += len(rows)
    return FetchReport(tuple(written), tuple(there), done - sum(len(groups[name]) for name in there))


def rows_digest(rows: pd.DataFrame) -> str:
    """Name the content of a plate's rows in an index."""
    return json_sha256([list(rows.columns), rows.astype(str).to_numpy().tolist()])


def require_rows(record: PlateRecord, rows: pd.DataFrame, folder: Path) -> bool:
    """Check that a plate that is there was made of the same rows; True.

    Raises:
        RunError: it was not; says in which columns they differ.
    """
    if record.rows == rows_digest(rows):
        return True
    stored = pd.read_parquet(PlateFiles(folder, record.plate).sites)
    different = [
        name
        for name in rows.columns
        if name not in stored.columns or stored[name].astype(str).tolist() != rows[name].astype(str).tolist()
    ]
    raise RunError(
        f"plate {record.plate} in {folder} was fetched from another index: {', '.join(different) or 'its columns'} differ; "
        f"name another folder, or delete {PlateFiles(folder, record.plate).record.name} there to fetch the plate again"
    )


def _tasks(rows: pd.DataFrame, recipe: ImageRecipe) -> list[SiteTask]:
    missing = [channel for channel in recipe.channels if channel not in channels_of(rows)]
    assert not missing
    paths = rows[[path_column(channel) for channel in recipe.channels]].to_numpy(dtype=str)
    return [
        SiteTask(
            str(plate), str(well), str(site), recipe.channels, tuple(map(str, own)), None if pd.isna(size) else float(size)
        )
        for plate, well, site, size, own in zip(
            rows["Metadata_Plate"], rows["Metadata_Well"], rows["Metadata_Site"], rows["pixel_size_um"], paths, strict=True
        )
    ]


def prepare(task: SiteTask, recipe: ImageRecipe) -> PreparedSite:
    """Read and prepare one site.

    Raises:
        AnchorwellError: a plane cannot be used; names plate, well, site, channel and file.
    """
    contents = [Path(path).read_bytes() for path in task.paths]
    planes = [_decoded(data, task, number) for number, data in enumerate(contents)]
    try:
        images = to_stored(scale_site(planes, recipe, task.pixel_size_um), recipe)
    except AnchorwellError as error:
        raise error.about(plate=task.plate, well=task.well, site=task.site) from None
    raw = [(plane.mean(dtype=np.float64), plane.std(dtype=np.float64)) for plane in planes]
    measured = np.concatenate([raw, pixel_moments([images[None]])[0]], axis=1)
    return PreparedSite(images, tuple(hashlib.sha256(data).hexdigest() for data in contents), measured)


def _decoded(data: bytes, task: SiteTask, number: int) -> Plane:
    try:
        return decode_plane(data)
    except AnchorwellError as error:
        place = {"plate": task.plate, "well": task.well, "site": task.site, "channel": task.channels[number]}
        raise error.about(**place, file=task.paths[number]) from None


class _mapper:  # noqa: N801 (a context manager, used as a function)
    """Prepare sites in order, in this process or in several."""

    def __init__(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def __enter__(self) -> Callable[[Sequence[SiteTask], ImageRecipe], Iterator[PreparedSite]]:
        return self._map

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _map(self, tasks: Sequence[SiteTask], recipe: ImageRecipe) -> Iterator[PreparedSite]:
        if self._pool is None:
            return map(prepare, tasks, [recipe] * len(tasks))
        return self._pool.map(prepare, tasks, [recipe] * len(tasks), chunksize=4)


def _told(
    prepared: Iterator[PreparedSite], done: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[PreparedSite]:
    for number, site in enumerate(prepared, start=1):
        yield site
        if progress is not None:
            progress(done + number, total)


def _write_plate(files: PlateFiles, rows: pd.DataFrame, recipe: ImageRecipe, prepared: Iterator[PreparedSite]) -> None:
    """Write pixels, then the table, then the record."""
    partial = files.images.with_suffix(".npy.partial")
    kept: list[PreparedSite] = []
    shape: tuple[int, ...] | None = None
    with partial.open("wb") as file:
        for site in prepared:
            if shape is None:
                shape = site.images.shape
                header = {"descr": stored_dtype(recipe).str, "fortran_order": False, "shape": (len(rows), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            if site.images.shape != shape:
                raise MixedSizesError(f"plate {files.plate} has fields of {shape[1:]} and of {site.images.shape[1:]} pixels")
            file.write(site.images.data)
            kept.append(PreparedSite(site.images[:, :0], site.digests, site.measured))
        file.flush()
    partial.replace(files.images)
    write_whole(files.sites, _sites_table(rows, recipe, kept))
    first = rows.iloc[0]
    record = PlateRecord(
        plate=files.plate,
        lab=str(first[KEYS[0]]),
        batch=str(first[KEYS[1]]),
        recipe=json_sha256(recipe_json(preparation(recipe))),
        rows=rows_digest(rows),
        images_bytes=files.images.stat().st_size,
        images_sha256=file_sha256(files.images),
        sites_bytes=files.sites.stat().st_size,
        sites_sha256=file_sha256(files.sites),
    )
    write_whole(files.record, json.dumps(asdict(record), indent=2).encode() + b"\n")
    sync_folder(files.folder)


def _sites_table(rows: pd.DataFrame, recipe: ImageRecipe, kept: Sequence[PreparedSite]) -> bytes:
    table = rows.reset_index(drop=True)
    for number, channel in enumerate(recipe.channels):
        table[sha256_column(channel)] = [site.digests[number] for site in kept]
        for place, name in enumerate(measured_columns(channel)):
            table[name] = [site.measured[number, place] for site in kept]
    return table.to_parquet(index=False)
