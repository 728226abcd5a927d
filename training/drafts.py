"""A plate that is being written: its pixels so far, and a journal of which sites they hold.

The journal's first line names what the plate is made of, every further line a site, with a checksum of its stored pixels:
a draft that was left at any moment is gone on with, and what did not reach the disk is made again.
"""

import fcntl
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.bundle import file_sha256
from model.images import ImageRecipe
from training.dataset import NO_LABEL, PlateSites
from training.plates import (
    DRAFT,
    JOURNAL,
    MEASURED,
    PLATE_KEYS,
    PlateFiles,
    PlateRecord,
    StoredImages,
    measured_columns,
    recipe_name,
    sha256_column,
    sync_folder,
    unfinished_files,
    write_whole,
)

_GRAIN = 256  # finer steps for uint8 planes: resampling would coarsen them


@dataclass(frozen=True)
class StoredForm:
    """How a plate's sites are stored: (channels, height, width) of one type; ``steps`` stored values are a grey level.

    ``planes`` are the types of the planes as read, a channel each.
    """

    shape: tuple[int, ...]
    dtype: str
    steps: float
    planes: tuple[str, ...]

    @classmethod
    def of(cls, field: NDArray[np.float32], planes: Sequence[NDArray[Any]], recipe: ImageRecipe) -> "StoredForm":
        """Choose the form that suits a site: ``field`` as prepared, ``planes`` as read."""
        types = _types(planes)
        if recipe.scaling == "percentile-8bit":
            return cls(field.shape, "<u1", 255.0, types)
        kind = np.result_type(*(plane.dtype for plane in planes))
        if kind.kind == "f":
            return cls(field.shape, "<f4", 1.0, types)
        return cls(field.shape, "<u2", float(_GRAIN) if kind.itemsize == 1 else 1.0, types)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "StoredForm":
        """Read what ``dataclasses.asdict`` made."""
        return cls(**{**value, "shape": tuple(value["shape"]), "planes": tuple(value["planes"])})

    @property
    def site_bytes(self) -> int:
        """Bytes of one site."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def header(self, sites: int) -> bytes:
        """The head of a .npy file of so many sites; as long for any number of them."""
        head = io.BytesIO()
        described = {"descr": self.dtype, "fortran_order": False, "shape": (sites, *self.shape)}
        np.lib.format.write_array_header_1_0(head, described)
        return head.getvalue()

    def store(self, field: NDArray[np.float32], planes: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Store a prepared site; ``PlateSites.scaled`` is the way back.

        Raises:
            ValueError: it does not fit: another size, or planes of another type than the plate's.
        """
        if field.shape != self.shape:
            raise ValueError(f"the field is {_times(field.shape)} pixels, the plate's are {_times(self.shape)}")
        types = _types(planes)
        if types != self.planes:
            raise ValueError(f"the planes are {_listed(types)}, the plate's are {_listed(self.planes)}")
        if self.dtype == "<f4":
            return field
        steps = field * np.float32(self.steps)
        stored: NDArray[Any] = np.rint(steps, out=steps).astype(self.dtype)
        return stored


def _types(planes: Sequence[NDArray[Any]]) -> tuple[str, ...]:
    return tuple(plane.dtype.name for plane in planes)


def _listed(types: Sequence[str]) -> str:
    return types[0] if len(set(types)) == 1 else ", ".join(types)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[1:]))


@dataclass(frozen=True, eq=False)
class DraftedSite:
    """What the journal says of one site: what was measured (channels, MEASURED), and a checksum of its pixels.

    Of each plane's file it says the sha256 and the stamp (see ``training.objects``) that it had when it was read.
    """

    row: int
    digests: tuple[str, ...]
    stamps: tuple[str, ...]
    measured: NDArray[np.float64]
    checksum: int

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps([self.row, self.digests, self.stamps, self.measured.tolist(), self.checksum]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "DraftedSite":
        """Read what ``to_line`` wrote."""
        row, digests, stamps, measured, checksum = json.loads(line)
        return cls(row, tuple(digests), tuple(stamps), np.array(measured), checksum)


def write_site(path: Path, form: StoredForm, row: int, stored: NDArray[Any]) -> int:
    """Write a site's pixels to their place in a draft; return their checksum."""
    data = np.ascontiguousarray(stored).data.cast("B")
    with path.open("r+b") as file:
        file.seek(len(form.header(0)) + row * form.site_bytes)
        file.write(data)
    return zlib.crc32(data)


class PlateDraft:
    """One plate's draft, of ``sites`` sites. ``key`` names what it is made of; one of another key is started over."""

    def __init__(self, files: PlateFiles, key: Mapping[str, str], sites: int) -> None:
        self.files = files
        self.key = dict(key)
        self.sites = sites
        self.form: StoredForm | None = None
        self.done: dict[int, DraftedSite] = {}
        if self.images.is_file() or self._taken_back():
            self._go_on()

    @property
    def images(self) -> Path:
        """Pixels so far; rows that are not done hold anything."""
        return self.files.path(DRAFT)

    @property
    def journal(self) -> Path:
        """Which sites are done."""
        return self.files.path(JOURNAL)

    def _taken_back(self) -> bool:
        """Take back pixels that were named as finished by a call that ended before it wrote the record."""
        if not (self.journal.is_file() and self.files.images.is_file()):
            return False
        self.files.images.rename(self.images)
        return True

    def _go_on(self) -> None:
        lines = _lines(self.journal)
        try:
            head = json.loads(next(lines))
            form = StoredForm.from_json(head.pop("form"))
        except (StopIteration, ValueError, KeyError, TypeError):
            return
        if head != {**self.key, "sites": self.sites}:
            return
        if self.images.stat().st_size != len(form.header(0)) + self.sites * form.site_bytes:
            return
        self.form = form
        with self.images.open("rb") as pixels:
            for site in _sites(lines):
                self._keep(site, pixels, form)

    def _keep(self, site: DraftedSite, pixels: BinaryIO, form: StoredForm) -> None:
        pixels.seek(len(form.header(0)) + site.row * form.site_bytes)
        if zlib.crc32(pixels.read(form.site_bytes)) == site.checksum:
            self.done[site.row] = site

    def begin(self, form: StoredForm) -> None:
        """Start over, with a form."""
        self.form = form
        self.done = {}
        self.journal.unlink(missing_ok=True)
        with self.images.open("wb") as file:
            file.write(form.header(self.sites))
            file.truncate(len(form.header(0)) + self.sites * form.site_bytes)
        head = {**self.key, "sites": self.sites, "form": asdict(form)}
        write_whole(self.journal, json.dumps(head).encode() + b"\n")

    def drop(self, rows: Iterable[int]) -> None:
        """Take sites for not done."""
        for row in rows:
            del self.done[row]
        if not self.done:
            self.form = None

    def add(self, sites: Sequence[DraftedSite]) -> None:
        """Note sites whose pixels were written."""
        with self.journal.open("a", encoding="utf-8") as file:
            file.writelines(site.to_line() for site in sites)
        self.done.update((site.row, site) for site in sites)

    def finish(self, rows: pd.DataFrame, recipe: ImageRecipe, skipped: Sequence[str]) -> None:
        """Make the plate of the sites that are done.

        Raises:
            ContextError: the recipe takes its scale from the controls, and they give none.
        """
        assert self.form is not None
        kept = sorted(self.done)
        if len(kept) < self.sites:
            self._compact(kept)
        with self.images.open("rb") as file:
            os.fsync(file.fileno())
        rows = rows.iloc[kept].reset_index(drop=True)
        plate = self._plate(rows, recipe).scaled_by()
        measured = np.stack([self.done[row].measured for row in kept])
        if recipe.scaled_by_batch:
            measured[..., MEASURED.index("unit_mean") :] = plate.moments_of(np.arange(len(kept)))
        write_whole(self.files.sites, self._table(rows, recipe, kept, measured))
        self._record(plate, recipe, skipped)
        clear_draft(self.files)

    def _compact(self, kept: Sequence[int]) -> None:
        """Close the gaps that skipped sites leave."""
        assert self.form is not None
        compact = self.files.path(".npy.compact")
        with self.images.open("rb") as before, compact.open("wb") as after:
            after.write(self.form.header(len(kept)))
            for row in kept:
                before.seek(len(self.form.header(0)) + row * self.form.site_bytes)
                after.write(before.read(self.form.site_bytes))
        compact.replace(self.images)

    def _plate(self, rows: pd.DataFrame, recipe: ImageRecipe) -> PlateSites:
        assert self.form is not None
        lab, batch, plate = (str(rows[name].iloc[0]) for name in PLATE_KEYS)
        return PlateSites(
            plate=plate,
            lab=lab,
            batch=batch,
            wells=rows["Metadata_Well"].to_numpy(dtype=str),
            names=rows["label"].to_numpy(dtype=str),
            labels=np.full(len(rows), NO_LABEL, np.int64),
            controls=(rows["role"] == "control").to_numpy(dtype=bool),
            images=StoredImages(self.images),
            intensities=np.zeros((len(rows), len(recipe.channels), 2), np.float32),
            recipe=recipe,
            steps=self.form.steps,
        )

    def _table(self, rows: pd.DataFrame, recipe: ImageRecipe, kept: Sequence[int], measured: NDArray[np.float64]) -> bytes:
        own: dict[str, Any] = {}
        for number, channel in enumerate(recipe.channels):
            own[sha256_column(channel)] = [self.done[row].digests[number] for row in kept]
            own |= dict(zip(measured_columns(channel), measured[:, number].T, strict=True))
        return pd.concat([rows, pd.DataFrame(own)], axis=1).to_parquet(index=False)

    def _record(self, plate: PlateSites, recipe: ImageRecipe, skipped: Sequence[str]) -> None:
        self.images.replace(self.files.images)
        sync_folder(self.files.folder)
        record = PlateRecord(
            plate=plate.plate,
            lab=plate.lab,
            batch=plate.batch,
            recipe=recipe_name(recipe),
            rows=self.key["rows"],
            steps=plate.steps,
            scale=None if plate.scale is None else plate.scale.to_json(),
            skipped=tuple(skipped),
            images_bytes=self.files.images.stat().st_size,
            images_sha256=file_sha256(self.files.images),
            sites_bytes=self.files.sites.stat().st_size,
            sites_sha256=file_sha256(self.files.sites),
        )
        write_whole(self.files.record, json.dumps(asdict(record), indent=2).encode() + b"\n")


def _sites(lines: Iterator[str]) -> Iterator[DraftedSite]:
    """Sites of a journal, up to a line that did not reach the disk."""
    with suppress(ValueError, TypeError):
        yield from map(DraftedSite.from_line, lines)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a journal, but a last one that was not finished."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (line for line in file if line.endswith("\n"))


def clear_draft(files: PlateFiles) -> None:
    """Remove what is left of the drafts of a plate that is complete; call it with the plate locked."""
    for ending in (JOURNAL, DRAFT, ".npy.compact"):
        files.path(ending).unlink(missing_ok=True)
    for path in (files.path(JOURNAL), files.sites, files.record):
        for unfinished in unfinished_files(path):
            unfinished.unlink(missing_ok=True)
    files.path(".lock").unlink(missing_ok=True)


@contextmanager
def plate_lock(files: PlateFiles) -> Iterator[bool]:
    """Hold a plate against other processes; False where one of them holds it."""
    path = files.path(".lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
