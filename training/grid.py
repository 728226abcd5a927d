"""The grid: methods x settings x seeds x cells, from a YAML file or a few runs, into tidy tables, going on where it stopped.

A cell's rows lie in a part of their own, ``parts/<digest>.cells.parquet``, named by all that they depend on: the way the
network is used, the cell and its draws, the plates' files and the checkpoint's sha256. A part that is there is not made
again; one whose cell, run or plates changed has another name. Run directories are ``training.train``'s, answers and scores
``training.evaluate``'s.
"""

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, model_validator

from model.bundle import file_sha256, recipe_json
from model.errors import NoControlsError, RunError
from model.predictions import group_means
from model.statistics import json_sha256
from training.dataset import NO_LABEL, PlateSites
from training.evaluate import (
    NetworkAnswers,
    Outcome,
    TrainedNetwork,
    answers_of,
    named,
    outcome,
    plates_tested,
    scores,
    temperature_of,
)
from training.methods import NETWORKS, WAYS, Method, Way
from training.nulls import Null, fit_nulls
from training.plates import plate_records, write_whole
from training.progress import BEST, COMING, LAST, is_finished, read_checkpoint
from training.queries import ALL, DEFAULT, Cell, Draws
from training.release import load_run_plates
from training.results import ABOUT, PROBABILITY
from training.train import RUN, Run, TrainingConfig, load_network, require_same_run, train

VERSION = 2
"""Of what a part holds and of how cells are drawn and scored: a change makes every part anew."""
PARTS = "parts"
TABLES = ("cells", "predictions", "embeddings")

_HOW = ("accelerator", "devices", "num_nodes", "loader_workers")

Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


# --- what is asked ---------------------------------------------------------------------------------------------------


def _named(**values: float) -> BeforeValidator:
    return BeforeValidator(lambda value: values.get(value, value) if isinstance(value, str) else value)


Count = Annotated[int, _named(all=ALL)]
Alpha = Annotated[float, _named(none=math.inf)]


class Asked(BaseModel):
    """Part of a grid file: every name in it is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Axes(Asked):
    """The product of its axes, an axis not named at its default: all controls, all wells sent together, no label shift.

    ``controls`` counts control wells, ``query_wells`` treated wells sent together; ``alpha`` is 0 for one class.
    """

    controls: tuple[Count, ...] = (ALL,)
    query_wells: tuple[Count, ...] = (ALL,)
    alpha: tuple[Alpha, ...] = (math.inf,)

    def cells(self) -> list[Cell]:
        """Every combination."""
        return [Cell(*values) for values in itertools.product(self.controls, self.query_wells, self.alpha)]

    @model_validator(mode="after")
    def _check(self) -> "Axes":
        self.cells()
        return self


ONE_AT_A_TIME = (
    Axes(controls=(0, 1, 2, 4, 8, 16)),
    Axes(query_wells=(1, 2, 4, 8, 16, 32, 64)),
    Axes(query_wells=(8,), alpha=(1, 0.1, 0.01, 0)),
)


class SeedAsked(Asked):
    """One seed of the training (and of the data, where each seed has its own plates), and the lab it leaves out."""

    seed: int
    plates: Path
    test_lab: str | None = None


class Grid(Asked):
    """A grid file.

    ``seeds`` are trained, where they are not yet, under ``runs``, each of ``methods``' networks with the same ``training``:
    a ``TrainingConfig`` but for plates, method, context and seed. ``methods`` are names of ways (all by default); the nulls
    stand beside them always. ``cells`` are evaluated, axes one at a time by default. ``embeddings`` names the ways whose
    embeddings are written.
    """

    seeds: tuple[SeedAsked, ...] = ()
    runs: Path | None = None
    training: dict[str, Any] = {}
    methods: tuple[str, ...] = tuple(way.name for way in WAYS)
    cells: tuple[Axes, ...] = ONE_AT_A_TIME
    draws: Draws = Draws()
    embeddings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Grid":
        known = {way.name: way for way in WAYS}
        for name in self.methods:
            if name not in known:
                raise ValueError(f"no method {name!r}; the methods are {', '.join(known)}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("a method is named twice")
        for name in self.embeddings:
            if name not in self.methods or known[name].blended:
                raise ValueError(f"no embeddings of {name!r}: name some of the grid's methods that are not blended")
        seeds = [asked.seed for asked in self.seeds]
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        if seeds and self.runs is None:
            raise ValueError("there are seeds to train and no folder for their runs: give runs")
        return self

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways asked for, in order."""
        known = {way.name: way for way in WAYS}
        return tuple(known[name] for name in self.methods)

    @property
    def every_cell(self) -> tuple[Cell, ...]:
        """All cells, the default one first."""
        asked = {cell for axes in self.cells for cell in axes.cells()} - {DEFAULT}
        return (DEFAULT, *sorted(asked))

    def only(self, seeds: Sequence[int] | None) -> "Grid":
        """Return the grid with these of its seeds; None for all.

        Raises:
            RunError: it has no such seed.
        """
        if seeds is None:
            return self
        absent = sorted(set(seeds) - {asked.seed for asked in self.seeds})
        if absent:
            raise RunError(f"the grid has no seed {absent[0]}")
        return self.model_copy(update={"seeds": tuple(asked for asked in self.seeds if asked.seed in seeds)})

    def config(self, seed: SeedAsked, method: Method) -> TrainingConfig:
        """Configure the training of one network.

        Raises:
            RunError: ``training`` is not a training's configuration.
        """
        own = {"plates": str(seed.plates), "seed": seed.seed, "test_lab": seed.test_lab, "method": method.name}
        own |= {"context": method.context if method.with_controls else "controls", "stop_gradient": method.stop_gradient}
        unknown = sorted(set(self.training) - {item.name for item in fields(TrainingConfig)} | set(self.training) & set(own))
        if unknown:
            raise RunError(f"training in the grid has {', '.join(unknown)}, which is not to be set there")
        try:
            return TypeAdapter(TrainingConfig).validate_python({**self.training, **own})
        except ValidationError as error:
            raise RunError(f"training in the grid: {_told(error)}") from None


def read_grid(path: Path) -> Grid:
    """Read a grid file (YAML).

    Raises:
        RunError: it is not one; says where.
    """
    try:
        return Grid.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise RunError(f"{path}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    places = [".".join(map(str, item["loc"])) for item in error.errors()]
    return "; ".join(
        f"{place}: {item['msg']}" if place else item["msg"] for place, item in zip(places, error.errors(), strict=True)
    )


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run whose network is loaded, with its plates, when something of it is still to be computed."""

    run: Run
    network_name: str

    @classmethod
    def of(cls, run: Run) -> "FinishedRun":
        """Name a run's network.

        Raises:
            RunError: the table of networks has none that was trained so, or its checkpoint is not in its place yet.
        """
        if (run.path / COMING).is_file():
            raise RunError(f"{run.path} was stopped while it wrote its checkpoints, or is being trained: resume it first")
        for name, method in NETWORKS.items():
            if method == run.method:
                return cls(run, name)
        raise RunError(f"{run.path} holds a network of no method that is evaluated: {run.method}")

    @cached_property
    def plates(self) -> dict[str, PlateSites]:
        """All plates with a purpose."""
        return load_run_plates(self.run)

    @cached_property
    def train_plates(self) -> list[PlateSites]:
        """Plates trained on."""
        return [self.plates[name] for name in self.run.split.train]

    @cached_property
    def validation_plates(self) -> list[PlateSites]:
        """Plates of held-out batches that stopped the training."""
        return [self.plates[name] for name in self.run.split.validation]

    @cached_property
    def network(self) -> TrainedNetwork:
        """The network, on a GPU if there is one."""
        network = load_network(self.run).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return TrainedNetwork(
            network.to(device),
            self.run.method,
            self.run.recipe,
            self.train_plates,
            self.validation_plates,
            panel_wells=self.run.config.shape.panel_wells,
        )

    @cached_property
    def checkpoint(self) -> str:
        """The sha256 of the weights."""
        return file_sha256(self.run.path / BEST)

    @cached_property
    def content(self) -> str:
        """The sha256 of the plates, their labels and their purposes."""
        plates = [list(item) for item in sorted(self.run.plates.items())]
        return json_sha256([plates, asdict(self.run.split), self.run.classes, recipe_json(self.run.recipe)])

    @cached_property
    def steps_taken(self) -> int | None:
        """How many steps it has had; None where that is not known any more."""
        last = self.run.path / LAST
        return int(read_checkpoint(last, ("global_step",))["global_step"]) if last.is_file() else None

    @property
    def budget(self) -> dict[str, Any]:
        """What of its configuration must be equal for a fair comparison."""
        config = asdict(self.run.config)
        apart = ("plates", "method", "context", "stop_gradient", "seed", "test_lab", *_HOW)
        images = self.run.config.shape.rows * self.run.config.shape.plates
        return {
            **{name: value for name, value in config.items() if name not in apart},
            "images_per_step": images,
            "steps_taken": self.steps_taken,
        }


def train_missing(grid: Grid, tell: Tell) -> list[Run]:
    """Train every network of the grid's ways for every seed, but those that have been.

    Raises:
        RunError: ``training`` is not a configuration, or a run there was trained otherwise.
    """
    assert grid.runs is not None
    found = []
    for seed in grid.seeds:
        for name in dict.fromkeys(way.network for way in grid.ways):
            config, folder = grid.config(seed, NETWORKS[name]), grid.runs / f"seed-{seed.seed}" / name
            try:
                found.append(_finished(config, folder) or _trained(config, folder, tell))
            except NoControlsError as error:
                tell(f"seed {seed.seed}: {name} is not trained: {error.detail}")
    return found


def _finished(config: TrainingConfig, folder: Path) -> Run | None:
    """Return a run that has had all its steps, or stopped early."""
    if not all((folder / name).is_file() for name in (RUN, LAST, BEST)) or (folder / COMING).is_file():
        return None
    run = Run.load(folder)
    require_same_run(run.config, config, folder, resume=True)
    return run if is_finished(read_checkpoint(folder / LAST, ("global_step", "callbacks")), config.steps) else None


def _trained(config: TrainingConfig, folder: Path, tell: Tell) -> Run:
    tell(f"training {folder}")
    return train(config, folder, resume=(folder / RUN).is_file(), quiet=True)


def by_seed(runs: Sequence[Run]) -> dict[int, dict[str, FinishedRun]]:
    """Sort runs by seed and network.

    Raises:
        RunError: two runs of one network and seed, runs of one seed whose plates, recipes, purposes or classes differ, or of
            different seeds whose classes do.
    """
    seeds: dict[int, dict[str, FinishedRun]] = {}
    for run in runs:
        if run.classes != runs[0].classes:
            raise RunError(f"{runs[0].path} and {run.path} have other classes: not comparable")
        finished = FinishedRun.of(run)
        others = seeds.setdefault(run.config.seed, {})
        if finished.network_name in others:
            raise RunError(f"{run.path} and {others[finished.network_name].run.path} are the same network and seed")
        for other in others.values():
            if other.content != finished.content:
                raise RunError(
                    f"{run.path} and {other.run.path} have one seed and {_differing(finished, other)}: not comparable"
                )
        others[finished.network_name] = finished
    return seeds


def _differing(one: FinishedRun, other: FinishedRun) -> str:
    differing = (name for name in ("split", "recipe") if getattr(one.run, name) != getattr(other.run, name))
    return next((f"another {name}" for name in differing), "other plates")


# --- cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """One way to use a run's network, or a null fitted to its plates: what is evaluated in every cell."""

    seed: int
    run: FinishedRun
    subject: Way | Null

    @cached_property
    def answers(self) -> NetworkAnswers | Null:
        """What answers; the network is loaded only now."""
        return self.subject if isinstance(self.subject, Null) else answers_of(self.run.network, self.subject)

    @cached_property
    def temperature(self) -> float:
        """The class temperature, fitted on validation plates."""
        return temperature_of(self.answers, self.run.validation_plates)

    @property
    def named(self) -> dict[str, Any]:
        """Its columns in every table."""
        return dict(zip(("method", "context"), named(self.subject), strict=True))

    @property
    def blended(self) -> bool:
        """Whether few controls are blended with the training's."""
        return isinstance(self.subject, Way) and self.subject.blended

    def takes(self, plate: PlateSites) -> bool:
        """Whether it can be used on a test plate: not where it needs negative controls and there are none."""
        return bool(plate.controls.any()) or not (isinstance(self.subject, Way) and self.subject.uses_controls)

    @property
    def tested(self) -> Iterator[tuple[str, PlateSites]]:
        """Test plates that it can be used on, with their settings."""
        plates = plates_tested(self.run.run.split, self.run.plates)
        return ((setting, plate) for setting, plate in plates if self.takes(plate))

    def digest(self, kind: str, cell: Cell, draws: Draws) -> str:
        """Name what there is of the task in a cell by all that it depends on."""
        weights = (
            None
            if isinstance(self.subject, Null)
            else [asdict(self.subject), self.run.checkpoint, self.run.run.config.shape.panel_wells]
        )
        drawn = [cell.controls, cell.query, str(cell.alpha), asdict(draws)]
        return json_sha256([VERSION, kind, self.seed, self.named, weights, drawn, self.run.content])

    def cells(self, asked: Sequence[Cell]) -> list[Cell]:
        """Return the cells that are not the same as another: the number of controls matters only to what uses them."""
        uses = self.subject.uses_controls or (isinstance(self.subject, Way) and self.run.run.recipe.scaled_by_batch)
        return [cell for cell in asked if cell.controls == ALL or uses]


def tasks_of(seed: int, runs: Mapping[str, FinishedRun], grid: Grid, tell: Tell) -> list[Task]:
    """What can be evaluated of one seed's runs: the nulls, and the grid's ways; says what is left out, and why.

    Ways that nobody named are left out without a word where there is no run of their network.
    """
    first = next(iter(runs.values()))
    _tell_untested(seed, first, tell)
    found = [Task(seed, first, null) for null in fit_nulls(first.train_plates)]
    learned = (*first.train_plates, *first.validation_plates)
    bare = [plate.plate for plate in learned if not plate.controls.any()]
    for way in grid.ways:
        if way.network not in runs:
            if "methods" in grid.model_fields_set or way.name in grid.embeddings:
                tell(f"seed {seed}: {way.name} is left out: no run of the network {way.network}")
        elif way.needs_controls and bare:
            tell(
                f"seed {seed}: {way.name} is left out: it needs negative controls on the plates of training and validation, "
                f"and plate {bare[0]} has none"
            )
        else:
            found.append(Task(seed, runs[way.network], way))
            left_out = [
                plate.plate for _, plate in plates_tested(first.run.split, first.plates) if not found[-1].takes(plate)
            ]
            if left_out:
                tell(f"seed {seed}: {way.name} has no negative controls on {', '.join(left_out)}: left out")
    return found


def _tell_untested(seed: int, run: FinishedRun, tell: Tell) -> None:
    """Say which test plates have nothing to call, and which wells and files of plates are left out.

    Raises:
        RunError: no test plate has anything to call.
    """
    tested = {plate.plate for _, plate in plates_tested(run.run.split, run.plates)}
    if not tested:
        raise RunError(f"seed {seed}: {run.run.path} has no test plate with a treated site of its classes to evaluate")
    for setting, names in run.run.split.tests().items():
        without = [name for name in names if name not in tested]
        if without:
            tell(f"seed {seed}: no treated site of the classes on {', '.join(without)} ({setting}): left out")
        wells = Counter(label for name in names for label in _unscored(run.plates[name]))
        if wells and run.run.config.classes is None:  # else they were left out by name
            listed = ", ".join(f"{label} ({count})" for label, count in sorted(wells.items()))
            tell(f"seed {seed}: treated wells of labels that are no class are not scored ({setting}): {listed}")
    records = plate_records(Path(run.run.config.plates))
    skipped = {name: len(records[name].skipped) for name in run.run.split.purposes() if records[name].skipped}
    if skipped:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(skipped.items()))
        tell(f"seed {seed}: sites with files that could not be used were left out when plates were fetched; files: {listed}")


def _unscored(plate: PlateSites) -> list[str]:
    """Labels of the treated wells that have one, and none of the classes; an entry a well."""
    rows = np.flatnonzero(~plate.controls & (plate.labels == NO_LABEL) & (plate.names != ""))
    return [label for _, label in sorted({(str(plate.wells[row]), str(plate.names[row])) for row in rows})]


def cell_rows(task: Task, cell: Cell, draws: Draws) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score a cell on every test plate, one row a plate, and tell every well's probabilities.

    Plates with too few wells for the cell have no row.
    """
    rows, wells = [], []
    for setting, plate in task.tested:
        found = outcome(task.answers, plate, cell, draws)
        if found is None:
            continue
        place = {"setting": setting, "seed": task.seed, "lab": plate.lab, "batch": plate.batch, "plate": plate.plate}
        axes = {"controls": cell.controls, "query": _images(plate, cell), "query_wells": cell.query, "alpha": cell.alpha}
        rows.append(
            {**task.named, **place, **axes, "blended": task.blended, **_swept(task), **scores(found, task.temperature)}
        )
        wells.append(_predictions(task, place, found))
    return pd.DataFrame(rows), pd.concat(wells, ignore_index=True) if wells else pd.DataFrame()


def _images(plate: PlateSites, cell: Cell) -> int:
    """Images sent together: that many wells' sites, of as many sites as a treated well has (the median)."""
    sites = np.unique(plate.wells[plate.treated], return_counts=True)[1]
    return ALL if cell.query == ALL else cell.query * int(np.median(sites))


def _swept(task: Task) -> dict[str, float]:
    swept = task.answers.swept_images if isinstance(task.answers, NetworkAnswers) else None
    return {"swept_images": math.nan if swept is None else float(swept)}


def _predictions(task: Task, place: Mapping[str, Any], found: Outcome) -> pd.DataFrame:
    classes = np.array(task.run.run.classes)
    probabilities, before = found.probabilities(task.temperature), found.probabilities()
    table = pd.DataFrame({
        **task.named, **place, "well": found.wells, "label": classes[found.labels],
        "called": classes[probabilities.argmax(axis=1)],
        "called_before": classes[before.argmax(axis=1)], "confidence_before": before.max(axis=1),
    })  # fmt: skip
    return table.assign(**{f"{PROBABILITY}{name}": probabilities[:, number] for number, name in enumerate(classes.tolist())})


def embedding_rows(task: Task) -> pd.DataFrame:
    """Mean embeddings of wells, controls among them, on training and test plates: pycytominer's columns, one row a well."""
    assert isinstance(task.answers, NetworkAnswers)
    split, plates = task.run.run.split, task.run.plates
    tables = []
    for setting, plate in [*(("train", plates[name]) for name in split.train), *task.tested]:
        rows = np.sort(np.concatenate([plate.treated, plate.control_rows]))
        controls = np.unique(plate.wells[plate.control_rows])
        found = task.answers.answers(plate, rows, plate.treated, controls)
        assert found is not None
        wells, first, where = np.unique(plate.wells[rows], return_index=True, return_inverse=True)
        means = group_means(found[1], where, len(wells))
        metadata = pd.DataFrame({
            "Metadata_Source": plate.lab, "Metadata_Batch": plate.batch, "Metadata_Plate": plate.plate,
            "Metadata_Well": wells, "Metadata_pert_type": np.where(plate.controls[rows[first]], "negcon", "trt"),
            "Metadata_label": plate.names[rows[first]], "Metadata_method": task.named["method"],
            "Metadata_context": task.named["context"], "Metadata_setting": setting, "Metadata_seed": task.seed,
        })  # fmt: skip
        names = [f"e{number:03d}" for number in range(means.shape[1])]
        tables.append(pd.concat([metadata, pd.DataFrame(means.astype(np.float32), columns=names)], axis=1))
    return pd.concat(tables, ignore_index=True)


# --- parts and tables ------------------------------------------------------------------------------------------------


def evaluate_grid(grid: Grid, runs: Sequence[Run], out: Path, *, tell: Tell, progress: Progress) -> pd.DataFrame:
    """Evaluate runs, or the grid's seeds after training what is missing, into a results folder; returns its cells.

    ``tell`` is told what is left out and why, ``progress`` (parts done, parts in all).

    Raises:
        RunError: neither runs nor seeds, or both; runs that are not comparable.
    """
    if bool(runs) == bool(grid.seeds):
        raise RunError("name runs to evaluate, or a grid file with seeds to train (and not both)")
    seeds = by_seed(runs or train_missing(grid, tell))
    told: list[str] = []

    def note(text: str) -> None:
        told.append(text)
        tell(text)

    tasks = [task for seed, found in seeds.items() for task in tasks_of(seed, found, grid, note)]
    _tell_budgets(seeds, note)
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    work = [(task, *one) for task in tasks for one in _parts(task, grid)]
    for done, (task, kind, cell) in enumerate(work):
        progress(done, len(work))
        make_part(task, kind, cell, grid, out / PARTS)
    progress(len(work), len(work))
    (out / ABOUT).unlink(missing_ok=True)  # until all tables are of this grid
    tables = _write_tables(work, grid, out)
    _tell_empty(tables["cells"], grid, note)
    digests = {f"{name}.parquet": file_sha256(out / f"{name}.parquet") for name in tables}
    about = {**_about(grid, seeds, told), "tables": digests}
    write_whole(out / ABOUT, json.dumps(about, indent=2).encode() + b"\n")
    return tables["cells"]


def _tell_empty(cells: pd.DataFrame, grid: Grid, tell: Tell) -> None:
    """Say which cells no plate has wells for, or no method an answer."""
    scored = set(zip(cells["controls"], cells["query_wells"], cells["alpha"], strict=True))
    for cell in grid.every_cell:
        if (cell.controls, cell.query, cell.alpha) not in scored:
            asked = f"control wells {_all(cell.controls)}, treated wells sent {_all(cell.query)}, alpha {cell.alpha:g}"
            if cell.controls == 0 and (ALL, cell.query, cell.alpha) in scored:
                tell(f"no method evaluated here uses controls and can do without any: a cell is not scored ({asked})")
            else:
                tell(f"no test plate has the wells for a cell of the grid ({asked}): not scored")


def _all(count: int) -> str:
    return "all" if count == ALL else str(count)


def _parts(task: Task, grid: Grid) -> Iterator[tuple[str, Cell]]:
    """What is made of a task: its cells, and its embeddings where they are asked for."""
    yield from (("cells", cell) for cell in task.cells(grid.every_cell))
    if isinstance(task.subject, Way) and task.subject.name in grid.embeddings:
        yield "embeddings", DEFAULT


def make_part(task: Task, kind: str, cell: Cell, grid: Grid, folder: Path) -> None:
    """Make one part unless it is there; of the default cell, predictions beside it."""
    digest = task.digest(kind, cell, grid.draws)
    path, predictions_path = folder / f"{digest}.{kind}.parquet", folder / f"{digest}.predictions.parquet"
    predicted = kind == "cells" and cell == DEFAULT and not task.blended
    if path.is_file() and (predictions_path.is_file() or not predicted):
        return
    if kind == "embeddings":
        write_table(path, embedding_rows(task))
        return
    scored, predictions = cell_rows(task, cell, grid.draws)
    if predicted:
        write_table(predictions_path, predictions)
    write_table(path, scored)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a Parquet file that is there whole or not at all."""
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    write_whole(path, content.getvalue())


def _write_tables(work: Sequence[tuple[Task, str, Cell]], grid: Grid, out: Path) -> dict[str, pd.DataFrame]:
    """Join the parts of this grid, and of no other that was evaluated into the same folder."""
    stems = [out / PARTS / task.digest(kind, cell, grid.draws) for task, kind, cell in work]
    tables = {}
    for name in TABLES:
        parts = [
            pd.read_parquet(path) for stem in stems if (path := stem.with_name(f"{stem.name}.{name}.parquet")).is_file()
        ]
        filled = [part for part in parts if len(part)]
        path = out / f"{name}.parquet"
        before = file_sha256(path) if path.is_file() else None
        if filled:
            tables[name] = labs_of_their_seed(pd.concat(filled, ignore_index=True), work)
            write_table(path, tables[name])
        else:
            path.unlink(missing_ok=True)  # of an earlier grid
        if name == "embeddings" and (not filled or file_sha256(path) != before):
            for derived in ("cells", "predictions"):
                (out / f"{derived}-embedding.parquet").unlink(missing_ok=True)  # made of the table that was there before
    return tables


def labs_of_their_seed(table: pd.DataFrame, work: Sequence[tuple[Task, str, Cell]]) -> pd.DataFrame:
    """Tell labs of different seeds apart where these have other plates under the same names, as simulated ones do."""
    known: dict[str, str] = {}
    runs = {task.seed: task.run for task, _, _ in work}
    if all(known.setdefault(name, digest) == digest for run in runs.values() for name, digest in run.run.plates.items()):
        return table
    lab, seed = ("Metadata_Source", "Metadata_seed") if "Metadata_Source" in table else ("lab", "seed")
    return table.assign(**{lab: table[lab].astype(str) + " of seed " + table[seed].astype(str)})


def _tell_budgets(seeds: Mapping[int, Mapping[str, FinishedRun]], tell: Tell) -> None:
    for seed, runs in seeds.items():
        for name, finished in runs.items():
            taken, steps = finished.steps_taken, finished.run.config.steps
            if taken is None:
                tell(f"seed {seed}: how many of its {steps} steps {name} had is not known ({LAST} is not there)")
            elif taken < steps:
                tell(f"seed {seed}: {name} had {taken} of {steps} steps: stopped by its validation, or not finished")
        budgets = {name: finished.budget for name, finished in runs.items()}
        first = next(iter(budgets.values()))
        differ = sorted({key for budget in budgets.values() for key in first if budget[key] != first[key]})
        if differ:
            tell(f"seed {seed}: budgets are NOT equal: the runs differ in {', '.join(differ)}")
    _tell_seeds(seeds, tell)


def _tell_seeds(seeds: Mapping[int, Mapping[str, FinishedRun]], tell: Tell) -> None:
    """Say where a network had another budget with another seed; how many steps were taken is told of each run."""
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    for seed, runs in seeds.items():
        for name, finished in runs.items():
            before, budget = first.setdefault(name, (seed, finished.budget))
            differ = sorted(key for key in budget if key != "steps_taken" and budget[key] != finished.budget[key])
            if differ:
                tell(f"seeds {before} and {seed}: budgets of {name} are NOT equal: they differ in {', '.join(differ)}")


def _about(grid: Grid, seeds: Mapping[int, Mapping[str, FinishedRun]], told: Sequence[str]) -> dict[str, Any]:
    """What the tables are of: cells, draws, runs with their budgets, and what was left out."""
    return {
        "cells": "all controls, all treated wells sent together and no label shift, but for the axes that a cell names; "
        "axes are varied one at a time unless they stand together in one entry of the grid's cells",
        "grid": json.loads(grid.model_dump_json(exclude={"seeds", "runs"})),
        "runs": [
            {"seed": seed, "network": name, "checkpoint": finished.checkpoint, "budget": finished.budget}
            for seed, runs in seeds.items()
            for name, finished in runs.items()
        ],
        "told": list(told),
    }


def overview(cells: pd.DataFrame) -> str:
    """Accuracy per well in the default cell, mean over plates: a row a method, a column a setting."""
    whole = cells[(cells["controls"] == ALL) & (cells["query_wells"] == ALL) & np.isinf(cells["alpha"])]
    names = whole["method"] + " " + whole["context"] + np.where(whole["blended"], " blended", "")
    table = whole.assign(way=names).pivot_table("well_accuracy", "way", "setting", sort=False)
    return str(table.rename_axis(index=None, columns="accuracy per well").to_string(float_format="{:.3f}".format))
