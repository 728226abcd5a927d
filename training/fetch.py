"""Fetching: planes read from disk or object storage, prepared once by a recipe, written plate by plate to be mapped.

A plate is there whole or not at all, and is not fetched again; a call that was stopped, killed, cut off from the network or
out of space goes on where it was. Files that cannot be used are collected, and told plate by plate, all at once.
"""

import hashlib
import math
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.errors import AnchorwellError, FetchError, LayoutError, RunError
from model.images import ImageRecipe, Plane, decode_plane, prepare_field, scale_pixels
from model.layout import Role, rounded_pixel_size_um
from model.memory import keep_freed_memory
from model.statistics import json_sha256
from training.dataset import plane_moments
from training.drafts import DraftedSite, PlateDraft, StoredForm, clear_draft, plate_lock, write_site
from training.index import IndexFile, channels_of, path_column
from training.objects import ObjectAccess, Objects, StampedObject, is_remote
from training.plates import DISK_FULL, PlateFiles, PlateRecord, plate_records, plates_recipe, recipe_name, write_recipe

_CHUNK_SITES = 8
_FIRST_SITES = 5
_LEFT_OUT_PERCENT = 10
_SITES_AHEAD = 3
_READERS = 16
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SiteTask:
    """One site to prepare: its row, what it is called in messages, where its planes lie, its pixel size."""

    row: int
    plate: str
    well: str
    site: str
    places: tuple[str, ...]
    pixel_size_um: float | None


@dataclass(frozen=True)
class BadSite:
    """A site that cannot be used, and all that is wrong with it."""

    row: int
    problems: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PreparedSite:
    """A site's planes as read and prepared, and their files' sha256 and stamps."""

    planes: tuple[Plane, ...]
    field: NDArray[np.float32]
    digests: tuple[str, ...]
    stamps: tuple[str, ...]


@dataclass(frozen=True)
class FetchReport:
    """Plates that this call wrote, that were there, and that another process is fetching; sites written.

    ``skipped`` are the files that cannot be used of sites left out, of plates that were there too. ``unsized`` says which
    plates have sites of no known pixel size, where the recipe asks for one.
    """

    written: tuple[str, ...]
    there: tuple[str, ...]
    elsewhere: tuple[str, ...]
    sites: int
    skipped: tuple[str, ...]
    unsized: tuple[str, ...]

    @property
    def plates(self) -> tuple[str, ...]:
        """All plates of the index."""
        return (*self.written, *self.there, *self.elsewhere)


@dataclass(frozen=True)
class FetchOptions:
    """How planes are fetched: by how many processes, with which access; whether a few sites may be left out.

    ``skip_bad_sites`` leaves out sites that cannot be used, a tenth of a plate's at most, and never all sites of a label nor
    all controls. Raises ValueError where there are no workers.
    """

    workers: int = 1
    access: ObjectAccess = field(default_factory=ObjectAccess)
    skip_bad_sites: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it is 1 or more")


def fetch(
    index: pd.DataFrame | IndexFile,
    folder: Path,
    recipe: ImageRecipe,
    options: FetchOptions = FetchOptions(),
    progress: Progress | None = None,
) -> FetchReport:
    """Prepare every plate of an index that is not in the folder yet.

    Args:
        index: see ``training.index``; a file is read plate by plate.
        folder: where plates are kept; made where it is not there.
        recipe: mean and std are not used here; ``size`` is the least that a field may have.
        options: see there.
        progress: told (sites done, sites in all).

    Raises:
        RunError: the folder, or a plate in it, was prepared otherwise or is damaged.
        FetchError: files of a plate cannot be used (names all of them by plate, well, site and channel), the storage is
            away, or the disk is full.
        ContextError: the recipe takes its scale from a plate's controls, and they give none.
    """
    _require_channels(index, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, recipe)
    with _no_space_told(folder), ExitStack() as stack:
        work = _Work(folder, recipe, options, stack.enter_context(_pool(options)), _Counter(_sites(index), progress))
        for rows in _plates(index):
            work.plate(rows)
    return work.report()


def _sites(index: pd.DataFrame | IndexFile) -> int:
    return len(index) if isinstance(index, pd.DataFrame) else index.sites


def _plates(index: pd.DataFrame | IndexFile) -> Iterator[pd.DataFrame]:
    if isinstance(index, IndexFile):
        yield from index.plates()
    else:
        yield from (rows for _, rows in index.groupby("Metadata_Plate", sort=True))


def _require_channels(index: pd.DataFrame | IndexFile, recipe: ImageRecipe) -> None:
    known = channels_of(index) if isinstance(index, pd.DataFrame) else index.channels
    absent = [channel for channel in recipe.channels if channel not in known]
    if absent:
        raise LayoutError(f"the index has no paths of {', '.join(absent)}; it has {', '.join(known)}")


@contextmanager
def _no_space_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise FetchError(f"no space is left in {folder}: make room and run again, it goes on from here") from None
    except BrokenProcessPool:
        raise FetchError(
            "a worker was killed, perhaps for memory: run again with fewer workers, it goes on from here"
        ) from None


@dataclass
class _Counter:
    """Tells progress."""

    total: int
    tell: Progress | None
    done: int = 0

    def add(self, sites: int) -> None:
        self.done += sites
        if self.tell is not None:
            self.tell(self.done, self.total)


class _Work:
    """One call's state: what it writes to, and what it has done so far."""

    def __init__(
        self, folder: Path, recipe: ImageRecipe, options: FetchOptions, pool: ProcessPoolExecutor | None, counter: _Counter
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.options = options
        self.pool = pool
        self.counter = counter
        self.records = plate_records(folder)
        self.written: list[str] = []
        self.there: list[str] = []
        self.elsewhere: list[str] = []
        self.skipped: list[str] = []
        self.unsized: list[str] = []
        self.sites = 0

    def report(self) -> FetchReport:
        return FetchReport(
            written=tuple(self.written),
            there=tuple(self.there),
            elsewhere=tuple(self.elsewhere),
            sites=self.sites,
            skipped=tuple(self.skipped),
            unsized=tuple(self.unsized),
        )

    def plate(self, rows: pd.DataFrame) -> None:
        """Fetch a plate, unless it is there or in other hands."""
        files = PlateFiles(self.folder, str(rows["Metadata_Plate"].iloc[0]))
        self.unsized += _unsized(files.plate, rows, self.recipe)
        with plate_lock(files) as ours:
            if not ours:
                self.elsewhere.append(files.plate)
                self.counter.add(len(rows))
            elif files.record.is_file():
                record = self.records.get(files.plate) or PlateRecord.load(files.record)
                require_rows(record, rows, self.folder)
                clear_draft(files)
                self.there.append(files.plate)
                self.skipped += record.skipped
                self.counter.add(len(rows))
            else:
                self._fetch(files, rows)

    def _fetch(self, files: PlateFiles, rows: pd.DataFrame) -> None:
        tasks = _tasks(rows, self.recipe)
        draft = PlateDraft(files, {"recipe": recipe_name(self.recipe), "rows": rows_digest(rows)}, len(tasks))
        draft.drop(_changed(draft, tasks, _reader(self.options.access)))
        self.counter.add(len(draft.done))
        bad = self._prepared(draft, [task for task in tasks if task.row not in draft.done])
        problems = [line for site in bad for line in site.problems]
        needed = _needed(rows, sorted(draft.done))
        if problems and (needed or not self.options.skip_bad_sites):
            raise FetchError(_told(files.plate, problems, len(bad), needed))
        draft.finish(rows, plates_recipe(self.folder), problems)
        self.written.append(files.plate)
        self.skipped += problems
        self.sites += len(draft.done)

    def _prepared(self, draft: PlateDraft, tasks: Sequence[SiteTask]) -> list[BadSite]:
        """Prepare sites into a draft; return those that cannot be used."""
        bad: list[BadSite] = []
        for found in self._found(draft, tasks):
            draft.add([site for site in found if isinstance(site, DraftedSite)])
            bad += [site for site in found if isinstance(site, BadSite)]
            self.counter.add(len(found))
        return bad

    def _found(self, draft: PlateDraft, tasks: Sequence[SiteTask]) -> Iterator[Sequence[DraftedSite | BadSite]]:
        if draft.form is None:
            first = self._first(tasks)
            yield self._begun(draft, first)
            tasks = tasks[len(first) :]
        if draft.form is None:
            return
        chunks = [tasks[start : start + _CHUNK_SITES] for start in range(0, len(tasks), _CHUNK_SITES)]
        prepare = partial(_prepare_chunk, draft.images, draft.form, self.recipe, self.options.access)
        yield from map(prepare, chunks) if self.pool is None else self.pool.map(prepare, chunks)

    def _first(self, tasks: Sequence[SiteTask]) -> list[tuple[SiteTask, PreparedSite | BadSite]]:
        """Prepare sites in order until a few can be used."""
        reader = _reader(self.options.access)
        found: list[tuple[SiteTask, PreparedSite | BadSite]] = []
        for task in tasks:
            if sum(isinstance(site, PreparedSite) for _, site in found) == _FIRST_SITES:
                break
            found.append((task, _prepare(task, [reader.read_later(place) for place in task.places], self.recipe)))
        return found

    def _begun(
        self, draft: PlateDraft, first: Sequence[tuple[SiteTask, PreparedSite | BadSite]]
    ) -> Sequence[DraftedSite | BadSite]:
        """Begin a draft in the form that most of the first sites have, and write them."""
        usable = [site for _, site in first if isinstance(site, PreparedSite)]
        if not usable:
            return [site for _, site in first if isinstance(site, BadSite)]
        forms = Counter(StoredForm.of(site.field, site.planes, self.recipe) for site in usable)
        ((form, _),) = forms.most_common(1)
        draft.begin(form)
        return [_drafted(task, site, draft.images, form, self.recipe) for task, site in first]


def _changed(draft: PlateDraft, tasks: Sequence[SiteTask], reader: "_Reader") -> list[int]:
    """Rows of a draft whose files are other ones than were read; what is not there any more counts as read.

    Raises:
        FetchError: the storage is away.
    """
    done = [task for task in tasks if task.row in draft.done]
    asked = [[reader.stamp_later(place) for place in task.places] for task in done]
    try:
        now = [[_stamp(task, stamp) for stamp in stamps] for task, stamps in zip(done, asked, strict=True)]
    finally:
        for stamps in asked:
            for stamp in stamps:
                stamp.cancel()
    return [task.row for task, stamps in zip(done, now, strict=True) if _differ(draft.done[task.row].stamps, stamps)]


def _differ(read: Sequence[str], now: Sequence[str | None]) -> bool:
    return any(after not in (None, before) for before, after in zip(read, now, strict=True))


def _stamp(task: SiteTask, asked: Future[str]) -> str | None:
    try:
        return asked.result()
    except FileNotFoundError:
        return None
    except FetchError as error:
        raise error.about(plate=task.plate, well=task.well, site=task.site) from None


def _needed(rows: pd.DataFrame, kept: Sequence[int]) -> str | None:
    """Say why a plate is not one without the sites that are not kept; None where it is."""
    if not kept:
        return "no site of the plate can be used"
    if 100 * (len(rows) - len(kept)) > _LEFT_OUT_PERCENT * len(rows):
        return f"that is more than {_LEFT_OUT_PERCENT} % of its {len(rows)} sites, which are not left out"
    controls, labels = (rows["role"] == Role.CONTROL.value).to_numpy(), _plain(rows["label"])
    if controls.any() and not controls[kept].any():
        return "those are all its controls, which are not left out"
    lost = sorted(set(labels) - {labels[row] for row in kept} - {""})
    return f"those are all its sites of {', '.join(lost)}, which are not left out" if lost else None


def _told(plate: str, problems: Sequence[str], sites: int, needed: str | None) -> str:
    way = f"{needed}; mend them" if needed else "mend them, or leave those sites out with --skip-bad-sites"
    listed = "\n".join(problems)
    return f"plate {plate}: {len(problems)} files of {sites} sites cannot be used; {way}:\n{listed}"


# --- the index's side ------------------------------------------------------------------------------------------------


def rows_digest(rows: pd.DataFrame) -> str:
    """Name the content of a plate's rows in an index."""
    return json_sha256([list(rows.columns), [_plain(rows[name]) for name in rows.columns]])


def _plain(column: pd.Series) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in column.tolist()]


def require_rows(record: PlateRecord, rows: pd.DataFrame, folder: Path) -> None:
    """Check that a plate that is there was made of the same rows.

    Raises:
        RunError: it was not; says in which columns they differ.
    """
    if record.rows == rows_digest(rows):
        return
    files = PlateFiles(folder, record.plate)
    stored = pd.read_parquet(files.sites)
    different = [name for name in rows.columns if name not in stored.columns or _plain(stored[name]) != _plain(rows[name])]
    raise RunError(
        f"plate {record.plate} in {folder} was fetched from another index: {', '.join(different) or 'its columns'} differ; "
        f"name another folder, or delete {files.record.name} there to fetch the plate again"
    )


def _tasks(rows: pd.DataFrame, recipe: ImageRecipe) -> list[SiteTask]:
    places = rows[[path_column(channel) for channel in recipe.channels]].to_numpy(dtype=str).tolist()
    columns = (rows[name].tolist() for name in ("Metadata_Plate", "Metadata_Well", "Metadata_Site", "pixel_size_um"))
    return [
        SiteTask(
            row, str(plate), str(well), str(site), tuple(own), None if pd.isna(size) else rounded_pixel_size_um(float(size))
        )
        for row, (plate, well, site, size, own) in enumerate(zip(*columns, places, strict=True))
    ]


def _unsized(plate: str, rows: pd.DataFrame, recipe: ImageRecipe) -> list[str]:
    """Say that sites are not resampled, since their pixel size is not known, where the recipe asks for it."""
    unknown = int(rows["pixel_size_um"].isna().sum())
    if recipe.pixel_size_um is None or not unknown:
        return []
    size = f"{recipe.pixel_size_um:g} µm"
    what = f"not resampled to {size}, every {recipe.shrink}-th pixel is taken"
    return [f"plate {plate}: {unknown} of {len(rows)} sites have no pixel size: {what}"]


# --- the workers' side -----------------------------------------------------------------------------------------------


@contextmanager
def _pool(options: FetchOptions) -> Iterator[ProcessPoolExecutor | None]:
    if options.workers <= 1:
        yield None
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn"), _start_worker) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave interrupts to the parent, end with it, however it ends, and keep memory that is freed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class _Reader:
    """Reads objects in threads."""

    def __init__(self, access: ObjectAccess) -> None:
        self.objects = Objects(access)
        self.threads = ThreadPoolExecutor(_READERS)

    def read_later(self, place: str) -> Future[StampedObject]:
        return self.threads.submit(self.objects.read_stamped, place)

    def stamp_later(self, place: str) -> Future[str]:
        return self.threads.submit(self.objects.stamp, place)


@lru_cache(1)
def _reader(access: ObjectAccess) -> _Reader:
    """The process's reader."""
    return _Reader(access)


def _prepare_chunk(
    images: Path, form: StoredForm, recipe: ImageRecipe, access: ObjectAccess, tasks: Sequence[SiteTask]
) -> list[DraftedSite | BadSite]:
    """Prepare sites and write their pixels into a draft; planes of the coming sites are read meanwhile.

    Raises:
        FetchError: the storage is away. OSError: the disk is full.
    """
    reader = _reader(access)
    reading: deque[list[Future[StampedObject]]] = deque()
    coming = iter(tasks)
    found: list[DraftedSite | BadSite] = []
    try:
        for task in tasks:
            for ahead in islice(coming, _SITES_AHEAD - len(reading)):
                reading.append([reader.read_later(place) for place in ahead.places])
            found.append(_drafted(task, _prepare(task, reading.popleft(), recipe), images, form, recipe))
    finally:
        for planes in reading:
            for plane in planes:
                plane.cancel()
    return found


def _prepare(task: SiteTask, reading: Sequence[Future[StampedObject]], recipe: ImageRecipe) -> PreparedSite | BadSite:
    """Decode and prepare one site, or say all that is wrong with it.

    Raises:
        FetchError: the storage is away.
    """
    planes, digests, stamps, problems = [], [], [], []
    for channel, place, future in zip(recipe.channels, task.places, reading, strict=True):
        try:
            found = future.result()
            planes.append(decode_plane(found.data))
            digests.append(hashlib.sha256(found.data).hexdigest())
            stamps.append(found.stamp)
        except FileNotFoundError:
            _require_folder(task, channel, place)
            problems.append(f"{_named(task)} channel {channel} file {place}: it is not there")
        except IsADirectoryError:
            problems.append(f"{_named(task)} channel {channel} file {place}: it is a folder")
        except FetchError as error:
            raise error.about(plate=task.plate, well=task.well, site=task.site, channel=channel) from None
        except AnchorwellError as error:
            problems.append(f"{_named(task)} channel {channel} file {place}: {error.detail}")
    if problems:
        return BadSite(task.row, tuple(problems))
    try:
        prepared = prepare_field(planes, recipe, task.pixel_size_um)
        return PreparedSite(tuple(planes), prepared, tuple(digests), tuple(stamps))
    except AnchorwellError as error:
        return BadSite(task.row, (f"{_named(task)} files {' '.join(task.places)}: {error.detail}",))


def _require_folder(task: SiteTask, channel: str, place: str) -> None:
    """Check that a file alone is not there.

    Raises:
        FetchError: its folder is not there either: a disk was taken away, or a share; or it is no place that is read.
    """
    folder = Path(place).parent
    if not is_remote(place) and "://" in place:
        raise FetchError(
            f"{_named(task)} channel {channel} file {place}: planes are read from s3:// and from disk: copy it there"
        )
    if not is_remote(place) and not folder.is_dir():
        raise FetchError(
            f"{_named(task)} channel {channel} file {place}: its folder is not there; run again when the storage is there"
        )


def _named(task: SiteTask) -> str:
    return f"plate {task.plate} well {task.well} site {task.site}"


def _drafted(
    task: SiteTask, site: PreparedSite | BadSite, images: Path, form: StoredForm, recipe: ImageRecipe
) -> DraftedSite | BadSite:
    if isinstance(site, BadSite):
        return site
    try:
        stored = form.store(site.field, site.planes)
    except ValueError as error:
        return BadSite(task.row, (f"{_named(task)} files {' '.join(task.places)}: {error}",))
    checksum = write_site(images, form, task.row, stored)
    return DraftedSite(task.row, site.digests, site.stamps, _measured(site, recipe), checksum)


def _measured(site: PreparedSite, recipe: ImageRecipe) -> NDArray[np.float64]:
    """What is measured of each plane, see ``plates.MEASURED``; scaled pixels wait for the scale where a batch gives it."""
    raw = [_mean_std(plane) for plane in site.planes]
    unit: list[tuple[float, float]] = [(np.nan, np.nan)] * len(raw)
    if not recipe.scaled_by_batch:
        unit = [plane_moments(plane) for plane in scale_pixels(site.field, recipe, None)]
    return np.concatenate([raw, unit], axis=1)


def _mean_std(plane: Plane) -> tuple[float, float]:
    offset = plane.flat[0]  # so that large floats lose nothing in their squares
    mean, square = plane_moments(plane - offset if plane.dtype.kind == "f" else plane)
    shift = float(offset) if plane.dtype.kind == "f" else 0.0
    return mean + shift, math.sqrt(max(0.0, square - mean**2))
