"""Results: the tidy tables that evaluation wrote, read and checked, and the parts of them that figures are taken from.

A results folder holds ``cells.parquet`` (a row a plate and cell of the grid), ``predictions.parquet`` (a row a treated well:
probabilities after temperature, and what was called before it, how surely) and ``embeddings.parquet`` (a row a well); files
beside them whose names go on after a dash, such as ``cells-openphenom.parquet``, hold more rows. ``about.json`` says
what the cells are of and, by its sha256, which tables were written with it; ``cost.json`` is what ``training.cost`` wrote.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from model.bundle import file_sha256
from model.errors import LayoutError, RunError
from training.plates import read_json
from training.queries import ALL
from training.tables import Problem

SETTINGS = {"in_domain": "in domain", "new_batch": "new batches", "new_lab": "new lab"}
"""Settings in order, as they are called in print."""
KEYS = ("method", "context", "setting", "seed", "lab", "batch", "plate")
AXES = ("controls", "query_wells", "alpha", "blended")
METRICS = ("image_accuracy", "well_accuracy", "macro_f1", "nll", "ece", "brier")
BEFORE = ("nll_before", "ece_before", "brier_before")
CELL_COLUMNS = (*KEYS, *AXES, "query", "images", "wells", *METRICS, "temperature", *BEFORE)
PREDICTION_COLUMNS = (*KEYS, "well", "label", "called", "called_before", "confidence_before")
METADATA = "Metadata_"
EMBEDDING_COLUMNS = tuple(
    f"{METADATA}{name}"
    for name in ("Source", "Batch", "Plate", "pert_type", "label", "method", "context", "setting", "seed")
)
PROBABILITY = "p:"
ABOUT, COST = "about.json", "cost.json"
NULL = "null: "
UNADAPTED = ("erm", "source")
"""What a lab would otherwise use: an ordinary network with its running statistics."""
FOCUS = ("cs-arm-bn", "controls")
_NUMBERS = frozenset({
    "seed", *AXES, "query", "images", "wells", *METRICS, "temperature", *BEFORE, "confidence_before", f"{METADATA}seed",
})  # fmt: skip
_MAY_LACK = frozenset({"image_accuracy", f"{METADATA}label", f"{METADATA}pert_type"})
"""Embeddings of wells know no images, and a well may have no class."""

Way = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Results:
    """A results folder's tables, None for those that are not there; ``told``: what was left out or is not comparable.

    ``runs`` are the trained networks: each with its seed, the network's name and its budget.
    """

    cells: pd.DataFrame
    predictions: pd.DataFrame | None = None
    embeddings: pd.DataFrame | None = None
    cost: dict[str, Any] | None = None
    told: tuple[str, ...] = ()
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def default(self) -> pd.DataFrame:
        """Cells with all controls, all treated wells sent together, no label shift and no blending."""
        cells = self.cells
        whole = (cells["controls"] == ALL) & (cells["query_wells"] == ALL) & np.isinf(cells["alpha"]) & ~cells["blended"]
        found: pd.DataFrame = cells.loc[whole]
        return found

    @property
    def settings(self) -> list[str]:
        """The settings there are, in order."""
        return [name for name in SETTINGS if name in set(self.cells["setting"])]

    @property
    def simulated(self) -> bool:
        """Whether the plates say that they were simulated."""
        names = pd.unique(self.cells[["lab", "batch", "plate"]].astype(str).to_numpy().ravel())
        return any("simul" in name.lower() for name in names)

    def ways(self) -> list[Way]:
        """Methods with their contexts: unadapted ERM first, nulls last, the others as they come.

        A null that came with an embedding table is left out where the same one stands by itself for the same plates and
        seeds.
        """
        known = [way for way in ways_of(self.cells) if not self._repeated(way)]
        return sorted(known, key=lambda way: (way[0].startswith(NULL), way != UNADAPTED))

    def _repeated(self, way: Way) -> bool:
        method, context = way
        if not method.startswith(NULL) or context == "-":
            return False
        own, other = (plates_of(of_way(self.default, known)) for known in ((method, "-"), way))
        return bool(own) and own >= other


def read_results(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        RunError: there is no table of cells, a table is not the one that its evaluation wrote, or a file of JSON is damaged.
        LayoutError: a table cannot be read, lacks a column or a value, holds words for numbers, has a setting that is not
            known, or scores a plate twice.
    """
    told, runs = _about(folder)
    cells = _read(folder, "cells", CELL_COLUMNS)
    if cells is None:
        raise RunError(f"{folder} has no cells.parquet: evaluate first, or name the folder that evaluation wrote")
    if cells.empty:
        raise LayoutError(f"{folder}/cells.parquet has no row")
    unknown = sorted(set(cells["setting"]) - set(SETTINGS))
    if unknown:
        raise LayoutError(f"cells.parquet has the setting {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    twice = cells[cells.duplicated([*KEYS, *AXES])]
    if not twice.empty:
        row = twice.iloc[0]
        raise LayoutError(f"plate {row['plate']} is scored twice for {way_name((row['method'], row['context']))}, "
                          f"{row['setting']}, seed {row['seed']}: two runs wrote into {folder}")  # fmt: skip
    predictions = _read(folder, "predictions", PREDICTION_COLUMNS)
    if predictions is not None and not classes_of(predictions):
        raise LayoutError(
            f"{folder}/predictions.parquet has no probabilities: a column {PROBABILITY}<class> a class is expected"
        )
    return Results(
        cells=cells.astype({"blended": bool, "alpha": float}),
        predictions=predictions,
        embeddings=_read(folder, "embeddings", EMBEDDING_COLUMNS),
        cost=read_json(folder / COST, _object, "measure the cost again") if (folder / COST).is_file() else None,
        told=told,
        runs=runs,
    )


def _about(folder: Path) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """Return what the evaluation told and which runs it took, once its tables are known to be those that it wrote."""
    path = folder / ABOUT
    if not path.is_file():
        evaluated = (folder / "cells.parquet").is_file()
        return ((f"what was left out of the evaluation is not known: the folder has no {ABOUT}",) if evaluated else ()), ()
    about = read_json(path, _object, "evaluate again")
    told, tables = about.get("told"), about.get("tables", {})
    if not isinstance(told, list) or not isinstance(tables, dict):
        raise RunError(f"{path} is damaged (it does not say what was told of which tables): evaluate again")
    for name, digest in tables.items():
        table = folder / name
        if not table.is_file() or file_sha256(table) != digest:
            raise RunError(f"{table} was changed or only half written after its evaluation: evaluate again")
    runs = about.get("runs", [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) and isinstance(run.get("budget"), dict) for run in runs):
        raise RunError(f"{path} is damaged (it does not say of which runs it is): evaluate again")
    return tuple(map(str, told)), tuple(runs)


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError("it is no object")
    return content


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file.

    Raises:
        LayoutError: it is none, or damaged.
    """
    try:
        return pd.read_parquet(path)
    except (ValueError, pa.ArrowException) as error:
        raise LayoutError(f"{path} cannot be read as Parquet: {error}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise LayoutError(f"{path} cannot be read as Parquet: {error}") from None


def _read(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    paths = [folder / f"{name}.parquet", *sorted(folder.glob(f"{name}-*.parquet"))]
    tables = [_checked(path, read_parquet(path), columns) for path in paths if path.is_file()]
    return pd.concat(tables, ignore_index=True) if tables else None


def _checked(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Refuse a table that lacks a column or a value, or has words for numbers; its words are text."""
    absent = [column for column in columns if column not in table]
    if absent:
        raise LayoutError(f"{path} lacks the columns {', '.join(absent)}")
    for name in map(str, table):
        feature = columns is EMBEDDING_COLUMNS and not name.startswith(METADATA)
        number = feature or name in _NUMBERS or name.startswith(PROBABILITY)
        if number and not pd.api.types.is_numeric_dtype(table[name]):
            raise LayoutError(f"{path}: the column {name} holds no numbers but {table[name].dtype}: evaluate again")
    table = table.assign(**{column: as_text(table[column]) for column in columns if column not in _NUMBERS})
    for column in columns:
        empty = (table[column].isna() if column in _NUMBERS else table[column] == "").to_numpy(bool)
        if empty.any() and column not in _MAY_LACK:
            rows = tuple(int(row) + 1 for row in np.flatnonzero(empty))
            raise LayoutError(str(Problem(str(path), rows, f"{column} is empty: evaluate again")))
    return table


def as_text(column: pd.Series) -> pd.Series:
    """Write a column's cells as text without space around it: whole numbers without a fraction, what is missing as ""."""
    return column.convert_dtypes().astype("string").fillna("").str.strip().astype(str)


def way_name(way: Way) -> str:
    """Name a method and its context in print: without the context where the method's name says it."""
    method, context = way
    if way == UNADAPTED:
        return f"{method} (unadapted)"
    return method if context == "-" or method.endswith(f"-{context}") else f"{method} ({context})"


def ways_of(rows: pd.DataFrame) -> list[Way]:
    """Methods with their contexts, in the order of the rows."""
    return list(dict.fromkeys(zip(rows["method"], rows["context"], strict=True)))


def of_way(rows: pd.DataFrame, way: Way) -> pd.DataFrame:
    """Rows of one method and context."""
    return rows[(rows["method"] == way[0]) & (rows["context"] == way[1])]


def grouped(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Parts of a table that agree in columns, in the order of the values."""
    for key, part in table.groupby(list(by)):
        yield (key if isinstance(key, tuple) else (key,)), part


def classes_of(predictions: pd.DataFrame) -> list[str]:
    """The classes that a table of predictions has probabilities of, in order."""
    return [str(name).removeprefix(PROBABILITY) for name in predictions if str(name).startswith(PROBABILITY)]


def places_of(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The different plates of rows, each as (lab, batch, plate)."""
    return sorted(set(zip(*(rows[level] for level in ("lab", "batch", "plate")), strict=True)))


def plates_of(rows: pd.DataFrame) -> set[tuple[Any, ...]]:
    """The different plates of rows, each as (seed, lab, batch, plate)."""
    return set(zip(*(rows[name] for name in ("seed", "lab", "batch", "plate")), strict=True))


def most_seeds(rows: pd.DataFrame) -> int:
    """How many seeds any one method was scored with: seeds of different methods are not added up."""
    return max((len(set(of_way(rows, way)["seed"])) for way in ways_of(rows)), default=0)


def extent(rows: pd.DataFrame) -> str:
    """How much stands behind a figure: plates, batches, labs and seeds."""
    places = places_of(rows)
    counts = {
        ("plate", "plates"): len(places),
        ("batch", "batches"): len({place[:2] for place in places}),
        ("lab", "labs"): len({place[:1] for place in places}),
        ("seed", "seeds"): most_seeds(rows),
    }
    return ", ".join(f"{count} {one if count == 1 else many}" for (one, many), count in counts.items())
