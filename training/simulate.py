"""SIMULATED Cell Painting plates: labs, batches and plates drawn from one seed, written as TIFF files and tables.

Every draw depends on the seed and on the drawn thing's own place (lab, batch, plate, well, site) alone: neither the
order of work, nor the number of processes, nor what else is simulated changes a byte. `docs/simulator.md` says where
the ranges come from and what such plates cannot show.
"""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import fft

from model.layout import PLATE_FORMATS, Role, well_name
from training.optics import CHANNELS, DEVIATES, Conditions, conditions, draw_pixel_um, photograph
from training.phenotypes import CLASSES, PHENOTYPES, draw_cells, paint

__all__ = [
    "CHANNELS", "CLASSES", "PlateBatch", "SimulatedWell", "SimulationPlan", "SimulationReport",
    "plate_batches", "plate_wells", "render_site", "simulate", "well_conditions",
]  # fmt: skip

FORMAT_VERSION = 1
METADATA = "metadata"
RECORD, BEGUN = "simulation.json", "simulation.plan.json"
NEGATIVE_CONTROL = "JCP2022_033924"
"""DMSO, as JUMP names it."""
SCENE_MARGIN_PX = 12  # each side; more than three times the widest in-focus blur
INACTIVE_WELLS_PER_COMPOUND = 4
POTENCY_SPREAD = 0.08  # standard deviation between the wells of one compound, natural log

Progress = Callable[[int, int], None]


# Zero-based columns of the negative controls, and those of the treated wells; at 384 the outermost columns stay empty.
CONTROL_COLUMNS = {96: (0, 11), 384: (1, 22)}
TREATED_COLUMNS = {96: range(1, 11), 384: range(2, 22)}
SIZE_LIMITS_PX = (32, 512)


@dataclass(frozen=True)
class SimulationPlan:
    """What to simulate: `labs` labs from `first_lab` on, each with `batches` batches of `plates` plates.

    Raises ValueError where a number is out of range or the treated wells do not fit on a plate.
    """

    labs: int = 3
    batches: int = 3
    plates: int = 2
    seed: int = 7
    plate_format: int = 96
    sites: int = 2
    size_px: int = 256
    wells_per_class: int = 8
    inactive_wells: int = 16
    novel_wells: int = 0
    first_lab: int = 1

    def __post_init__(self) -> None:
        if self.plate_format not in CONTROL_COLUMNS:
            raise ValueError(f"plate_format is {self.plate_format}; it can be 96 or 384")
        for name in ("labs", "batches", "plates", "sites", "first_lab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "wells_per_class", "inactive_wells", "novel_wells"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        low, high = SIZE_LIMITS_PX
        if not low <= self.size_px <= high:
            raise ValueError(f"size_px is {self.size_px}; a site can be {low} to {high} pixels wide")
        room = PLATE_FORMATS[self.plate_format][0] * len(TREATED_COLUMNS[self.plate_format])
        if self.treated_wells > room:
            raise ValueError(f"{self.treated_wells} treated wells asked for; the plate has room for {room}")

    @property
    def treated_wells(self) -> int:
        """The number of treated wells on every plate."""
        return len(CLASSES) * self.wells_per_class + self.inactive_wells + self.novel_wells


@dataclass(frozen=True)
class PlateBatch:
    """One plate by its numbers (from 1), and the names it is written under; `name` is its barcode."""

    lab: int
    batch: int
    plate: int

    @property
    def source(self) -> str:
        return f"simulated_{self.lab:02d}"

    @property
    def batch_name(self) -> str:
        return f"SIM{self.lab:02d}_B{self.batch:02d}"

    @property
    def name(self) -> str:
        return f"SIM{self.lab:02d}B{self.batch:02d}P{self.plate:02d}"

    @property
    def folder(self) -> Path:
        return Path(self.source) / self.batch_name / self.name


@dataclass(frozen=True)
class SimulatedWell:
    """One well: zero-based row and column, and what is in it. `label` is a key of `PHENOTYPES`."""

    row: int
    column: int
    compound: str
    label: str
    role: Role

    @property
    def name(self) -> str:
        return well_name(self.row, self.column)


@dataclass(frozen=True)
class SimulationReport:
    """What `simulate` wrote: sites, seconds it took, and the plates' folders relative to the output folder."""

    sites: int
    seconds: float
    plates: tuple[Path, ...]


class _Draw(IntEnum):
    """What a random stream is for; the first number of its key."""

    LAB = 0
    BATCH = 1
    PLATE = 2
    WELL = 3
    LAYOUT = 4
    POTENCY = 5
    SITE = 6
    MICROSCOPE = 7


def _rng(seed: int, draw: _Draw, *place: int) -> np.random.Generator:
    """The random stream of one place; keys have one length, so that no two places share a stream."""
    key = (int(draw), *place, *(0,) * (6 - len(place)))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def plate_batches(plan: SimulationPlan) -> tuple[PlateBatch, ...]:
    """The plates of a plan, by lab, batch and plate."""
    labs = range(plan.first_lab, plan.first_lab + plan.labs)
    return tuple(
        PlateBatch(lab, batch, plate)
        for lab in labs
        for batch in range(1, plan.batches + 1)
        for plate in range(1, plan.plates + 1)
    )


def plate_wells(plan: SimulationPlan, plate: PlateBatch) -> tuple[SimulatedWell, ...]:
    """The wells that are not empty, by row and column; treated positions are drawn anew for every plate."""
    rows = range(PLATE_FORMATS[plan.plate_format][0])
    controls, treated = CONTROL_COLUMNS[plan.plate_format], TREATED_COLUMNS[plan.plate_format]
    wells = [SimulatedWell(row, column, "DMSO", "DMSO", Role.CONTROL) for row in rows for column in controls]
    free = [(row, column) for row in rows for column in treated]
    order = _rng(plan.seed, _Draw.LAYOUT, plate.lab, plate.batch, plate.plate).permutation(len(free))
    for place, (compound, label) in zip(order, _treatments(plan), strict=False):
        row, column = free[place]
        wells.append(SimulatedWell(row, column, compound, label, Role.TREATED))
    return tuple(sorted(wells, key=lambda well: (well.row, well.column)))


def _treatments(plan: SimulationPlan) -> Iterator[tuple[str, str]]:
    """Compound and label of every treated well: one compound per class, several inactive ones, one novel."""
    for number, label in enumerate(CLASSES, start=1):
        yield from [(f"SIM-{number:02d}", label)] * plan.wells_per_class
    for well in range(plan.inactive_wells):
        yield f"SIM-I{well // INACTIVE_WELLS_PER_COMPOUND + 1:02d}", "inactive"
    yield from [("SIM-N01", "novel")] * plan.novel_wells


def _deviates(plan: SimulationPlan, plate: PlateBatch, levels: int) -> NDArray[np.float64]:
    """(levels, DEVIATES) standard deviates of a plate's lab, batch and plate."""
    places = ((plate.lab,), (plate.lab, plate.batch), (plate.lab, plate.batch, plate.plate))
    draws = (_Draw.LAB, _Draw.BATCH, _Draw.PLATE)
    rngs = [_rng(plan.seed, draw, *place) for draw, place in zip(draws, places, strict=True)]
    return np.stack([rng.standard_normal(DEVIATES) for rng in rngs[:levels]])


def _level_conditions(plan: SimulationPlan, plate: PlateBatch, levels: int) -> Conditions:
    pixel_um = draw_pixel_um(_rng(plan.seed, _Draw.MICROSCOPE, plate.lab))
    return conditions(_deviates(plan, plate, levels), pixel_um)


def well_conditions(plan: SimulationPlan, plate: PlateBatch, well: SimulatedWell) -> Conditions:
    """The conditions of one well, the outer ring's included."""
    place = (plate.lab, plate.batch, plate.plate, well.row, well.column)
    own = _rng(plan.seed, _Draw.WELL, *place).standard_normal((1, DEVIATES))
    pixel_um = draw_pixel_um(_rng(plan.seed, _Draw.MICROSCOPE, plate.lab))
    at = conditions(np.concatenate([_deviates(plan, plate, 3), own]), pixel_um)
    rows, columns = PLATE_FORMATS[plan.plate_format]
    if well.row not in (0, rows - 1) and well.column not in (0, columns - 1):
        return at
    return replace(at, density=at.density * at.edge_density, gain=tuple(g * at.edge_gain for g in at.gain))


def render_site(plan: SimulationPlan, plate: PlateBatch, well: SimulatedWell, site: int) -> NDArray[np.uint16]:
    """The (5, size_px, size_px) uint16 image of one site (from 1); channels in the order of `CHANNELS`."""
    place = (plate.lab, plate.batch, plate.plate, well.row, well.column)
    at = well_conditions(plan, plate, well)
    potency = np.exp(POTENCY_SPREAD * _rng(plan.seed, _Draw.POTENCY, *place).standard_normal())
    rng = _rng(plan.seed, _Draw.SITE, *place, site)
    scene_px = fft.next_fast_len(plan.size_px + 2 * SCENE_MARGIN_PX, real=True)
    cells = draw_cells(PHENOTYPES[well.label], float(potency), scene_px, at, rng)
    return photograph(paint(cells, scene_px, at, rng), plan.size_px, at, rng)


def simulate(plan: SimulationPlan, out: str | Path, workers: int = 1, progress: Progress | None = None) -> SimulationReport:
    """Write a plan's plates under `out`, in `workers` processes; `progress` hears (sites done, sites in all).

    One that was stopped is begun again by the same plan. Raises FileExistsError where `out` holds a finished simulation,
    one that was begun by another plan, or anything else: two seeds in one folder would be one data set that no seed can
    repeat.
    """
    out = Path(out)
    _begin(plan, out)
    start = time.perf_counter()
    plates = plate_batches(plan)
    jobs = [(plan, out, plate, well) for plate in plates for well in plate_wells(plan, plate)]
    for plate in plates:
        (out / plate.folder / "images").mkdir(parents=True, exist_ok=True)
        _write_tables(plan, out, plate)
    _write_metadata(plan, out / METADATA, plates)
    for done in _run(jobs, workers):
        if progress is not None:
            progress(done * plan.sites, len(jobs) * plan.sites)
    _write_whole(out / RECORD, _record(plan, plates))
    (out / BEGUN).unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    return SimulationReport(len(jobs) * plan.sites, seconds, tuple(plate.folder for plate in plates))


def _begin(plan: SimulationPlan, out: Path) -> None:
    """Say in a folder by which plan it is written."""
    record, begun = out / RECORD, out / BEGUN
    if record.exists():
        raise FileExistsError(f"{record} exists: choose an empty folder, or delete that simulation first")
    if begun.is_file() and begun.read_bytes() != _json(asdict(plan)):
        raise FileExistsError(f"{begun} is of another plan: choose an empty folder, or delete that simulation first")
    if out.is_dir() and any(out.iterdir()) and not begun.is_file():
        raise FileExistsError(f"{out} is not empty and no simulation was begun there: choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(begun, asdict(plan))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a file of JSON that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(_json(content))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


_Job = tuple[SimulationPlan, Path, PlateBatch, SimulatedWell]


def _run(jobs: list[_Job], workers: int) -> Iterator[int]:
    """Write the wells, yielding how many are done; spawned processes inherit no threads that could be held."""
    if workers <= 1:
        for done, job in enumerate(jobs, start=1):
            _write_well(job)
            yield done
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunk = max(1, min(16, len(jobs) // (4 * workers)))
        for done, _ in enumerate(pool.map(_write_well, jobs, chunksize=chunk), start=1):
            yield done


def _write_well(job: _Job) -> None:
    plan, out, plate, well = job
    for site in range(1, plan.sites + 1):
        image = render_site(plan, plate, well, site)
        for channel, plane in zip(CHANNELS, image, strict=True):
            _write_plane(out / plate.folder / "images" / _file_name(well, site, channel), plane)


def _write_plane(path: Path, plane: NDArray[np.uint16]) -> None:
    """Write one TIFF.

    Raises:
        OSError: it cannot be written; names the file.
    """
    content = io.BytesIO()  # tifffile would tell a full disk by numbers of bytes alone
    tifffile.imwrite(content, plane, photometric="minisblack", metadata=None, software=False)
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _file_name(well: SimulatedWell, site: int, channel: str) -> str:
    return f"{well.name}_{site}_{channel}.tif"


def _write_tables(plan: SimulationPlan, out: Path, plate: PlateBatch) -> None:
    wells = plate_wells(plan, plate)
    folder = out / plate.folder
    _write_csv(folder / "load_data.csv", [_site_row(plan, plate, w, s + 1) for w in wells for s in range(plan.sites)])
    rows = [{"well": w.name, "compound": w.compound, "label": w.label, "role": w.role.value} for w in wells]
    _write_csv(folder / "platemap.csv", rows)


def _write_metadata(plan: SimulationPlan, folder: Path, plates: Iterable[PlateBatch]) -> None:
    """Write the tables that JUMP publishes of its plates, wells and controls, and one of every compound's class."""
    folder.mkdir(exist_ok=True)
    place = {plate.name: {"Metadata_Source": plate.source, "Metadata_Plate": plate.name} for plate in plates}
    rows = [{**place[plate.name], "Metadata_Batch": plate.batch_name, "Metadata_PlateType": "COMPOUND"} for plate in plates]
    _write_csv(folder / "plate.csv", rows)
    wells = [(plate, well) for plate in plates for well in plate_wells(plan, plate)]
    names = {"DMSO": NEGATIVE_CONTROL}
    compounds = [
        {**place[plate.name], "Metadata_Well": well.name, "Metadata_JCP2022": names.get(well.compound, well.compound)}
        for plate, well in wells
    ]
    _write_csv(folder / "well.csv", compounds)
    control = {"Metadata_JCP2022": NEGATIVE_CONTROL, "Metadata_pert_type": "negcon", "Metadata_Name": "DMSO"}
    _write_csv(folder / "perturbation_control.csv", [control])
    labels = {well.compound: well.label for _, well in wells if well.role is Role.TREATED}
    classes = [{"Metadata_JCP2022": name, "label": label} for name, label in sorted(labels.items())]
    _write_csv(folder / "moa.csv", classes, ("Metadata_JCP2022", "label"))


def _site_row(plan: SimulationPlan, plate: PlateBatch, well: SimulatedWell, site: int) -> dict[str, str]:
    """One row of load_data.csv; JUMP states the resolution in metres per pixel."""
    metres = f"{_level_conditions(plan, plate, 1).pixel_um * 1e-6:.9g}"
    return {
        "Metadata_Source": plate.source,
        "Metadata_Batch": plate.batch_name,
        "Metadata_Plate": plate.name,
        "Metadata_Well": well.name,
        "Metadata_Site": str(site),
        **{f"FileName_Orig{channel}": _file_name(well, site, channel) for channel in CHANNELS},
        **{f"PathName_Orig{channel}": "images" for channel in CHANNELS},
        "Metadata_ImageResolutionX": metres,
        "Metadata_ImageResolutionY": metres,
    }


def _write_csv(path: Path, rows: list[dict[str, str]], columns: Sequence[str] = ()) -> None:
    """Write rows under their own columns, or those given where there may be no row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _record(plan: SimulationPlan, plates: Iterable[PlateBatch]) -> dict[str, Any]:
    """The content of simulation.json: the plan, and the conditions drawn for each lab, batch and plate."""
    labs: dict[str, Any] = {}
    for plate in plates:
        lab = labs.setdefault(plate.source, {"drawn": asdict(_level_conditions(plan, plate, 1)), "batches": {}})
        batch = lab["batches"].setdefault(
            plate.batch_name, {"drawn": asdict(_level_conditions(plan, plate, 2)), "plates": {}}
        )
        batch["plates"][plate.name] = {"drawn": asdict(_level_conditions(plan, plate, 3))}
    return {
        "format": FORMAT_VERSION,
        "simulated": True,
        "plan": asdict(plan),
        "channels": CHANNELS,
        "classes": CLASSES,
        "labs": labs,
    }
