"""The index: one row a site, JUMP-style, saying which plate it is of, what was done to its well, and where its planes lie.

Columns: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``, ``Metadata_Well``, ``Metadata_Site``, ``label``,
``role`` (control | treated), ``pixel_size_um`` (empty when unknown) and ``Path_<channel>`` per channel: an s3:// URL, or a
path relative to the index file's folder or absolute. Other columns ride along. A plate's rows lie together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import AnchorwellError, LayoutError, PlateError
from model.layout import (
    INDEX_KEYS,
    INDEX_PATH,
    INDEX_ROLE,
    INDEX_SIZE,
    Role,
    parse_platemap,
    parse_site,
    parse_well,
    read_platemap,
)
from training.load_data import PLATE, SITE, WELL, checked_sites, in_um, pixel_sizes, told_sizes, with_places
from training.tables import ROW, Problems, Table, among, read_table

KEYS = list(INDEX_KEYS)
COLUMNS = [*KEYS, "label", INDEX_ROLE, INDEX_SIZE]
_BATCH_ROWS = 20_000
_PLACES_TOLD = 4


def channels_of(index: pd.DataFrame) -> tuple[str, ...]:
    """Return the channels an index has paths for, in its column order."""
    return _channels(list(index.columns))


def _channels(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(INDEX_PATH) for name in columns if name.startswith(INDEX_PATH))


def require_channels(channels: Sequence[str]) -> None:
    """Check names of channels to index.

    Raises:
        LayoutError: one is empty or there twice.
    """
    wrong = sorted({name for name in channels if not name or channels.count(name) > 1})
    if wrong:
        listed = ", ".join(map(repr, wrong))
        raise LayoutError(f"of the channels {','.join(channels)} {listed} is empty or there twice: name each channel once")


def path_column(channel: str) -> str:
    """Name the column that holds a channel's paths."""
    return f"{INDEX_PATH}{channel}"


# --- a folder tree ---------------------------------------------------------------------------------------------------


def index_tree(root: Path, channels: Sequence[str]) -> pd.DataFrame:
    """Index every folder below ``root`` that holds ``load_data.csv`` (or .parquet) and ``platemap.csv``.

    LoadData has JUMP's columns: ``Metadata_*``, and ``URL_Orig<channel>`` or ``FileName_Orig<channel>`` and
    ``PathName_Orig<channel>`` (relative to the table's folder, or absolute). The plate map is a CSV or TSV with a well
    column, a role column (see ``model.layout.parse_platemap``) and ``label``, the class to learn (empty for wells that have
    none).

    Args:
        root: where to look.
        channels: which channels to index, in order.

    Raises:
        LayoutError: there is none, something is wrong with the tables, or an image is not there; tells of all plates at
            once.
    """
    tables = sorted([*root.rglob("load_data.csv"), *root.rglob("load_data.parquet")])
    if not tables:
        raise LayoutError(f"no load_data.csv below {root}")
    problems = Problems()
    plates = [plate for table in tables for plate in _plates_of(table, channels, problems)]
    problems.stop()
    return checked(pd.concat(plates, ignore_index=True))


def _plates_of(path: Path, channels: Sequence[str], problems: Problems) -> Iterator[pd.DataFrame]:
    """Give the plates of a LoadData table, whatever is wrong with them told."""
    columns = {channel: path_column(channel) for channel in channels}
    platemap = _platemap(path, problems)
    table = read_table(str(path), path.read_bytes(), problems)
    if table is None or table.lacks(KEYS, problems):
        return
    if not len(table.rows):
        problems.error(table.file, "it names no site")
    placed = with_places(table, columns, problems)
    if placed is None or platemap is None:
        return
    for _, rows in placed.rows.groupby(PLATE, sort=False):
        plate = Table(table.file, rows.reset_index(drop=True))
        sizes = pixel_sizes(plate, float("nan"), problems)
        plate = checked_sites(plate.with_columns(pixel_size_um=sizes), columns, problems)
        _tell_absent(plate, columns, problems)
        yield _labelled(_with_known_wells(plate, platemap, problems), platemap)[[*COLUMNS, *columns.values()]]


def _platemap(load_data: Path, problems: Problems) -> dict[str, tuple[str, str]] | None:
    """Role and label of each well of the plate map beside a LoadData table; None where there is none."""
    path = load_data.with_name("platemap.csv")
    if not path.is_file():
        problems.error(str(load_data), f"no {path.name} beside it: which wells are controls?")
        return None
    try:
        roles, found = parse_platemap(path.read_bytes()), read_platemap(path.read_bytes())
    except AnchorwellError as error:
        problems.error(str(path), error.detail)
        return None
    names = [name.strip().casefold() for name in found.columns]
    if "label" not in names:
        problems.error(str(path), "no label column: which class does each well belong to?")
        return None
    at = names.index("label")
    return {well: (roles[well].value, cells[at].strip()) for well, cells in found.rows.items()}


def _with_known_wells(plate: Table, platemap: Mapping[str, tuple[str, str]], problems: Problems) -> Table:
    known = among(plate.rows[WELL], platemap)
    problems.each(plate, ~known, "well {Metadata_Well} of plate {Metadata_Plate} is not on platemap.csv")
    return plate.where(known)


def _labelled(plate: Table, platemap: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    said = [platemap[well] for well in plate.rows[WELL]]
    return plate.rows.assign(role=[role for role, _ in said], label=[label for _, label in said])


def _tell_absent(plate: Table, columns: Mapping[str, str], problems: Problems) -> None:
    paths = plate.rows[[ROW, *columns.values()]].melt(ROW)
    absent = paths[[path != "" and "://" not in path and not Path(path).is_file() for path in paths["value"]]]
    if len(absent):
        first = absent["value"].iloc[0]
        say = f"{len(absent)} of {len(paths)} images are not there, the first is {first}"
        problems.error(plate.file, say, absent[ROW])


# --- checking, writing, reading ---------------------------------------------------------------------------------------


def checked(index: pd.DataFrame) -> pd.DataFrame:
    """Check an index; return it sorted, with plates' names as text, zero-padded wells, numbers of sites, and sizes in µm.

    Every site has its names and paths and is there once; a plate's planes have a path each; a well has one role and one
    label; a plate is of one batch and has one pixel size, or none.

    Raises:
        LayoutError, WellNameError: as it says, or there are no rows.
    """
    _require_columns(list(index.columns))
    _require_rows(len(index))
    for name in [*KEYS[:3], *map(path_column, channels_of(index))]:
        empty = index[name].isna() | (index[name] == "")
        if empty.any():
            first = " ".join(map(str, index.loc[empty, KEYS].iloc[0]))
            raise LayoutError(f"{empty.sum()} sites have no {name}, the first is {first}")
    index = index.assign(**{
        **{name: index[name].astype(str) for name in KEYS[:3]},
        WELL: _parsed(index, WELL, parse_well),
        SITE: _parsed(index, SITE, parse_site).astype("int64"),
        "label": index["label"].fillna("").astype(str),
        "pixel_size_um": _checked_sizes(index),
    })  # fmt: skip
    _require_one_of_each(index)
    _require_own_paths(index)
    return index.sort_values(KEYS, ignore_index=True)


def _parsed(index: pd.DataFrame, column: str, parse: Callable[[str], Any]) -> pd.Series:
    values = {}
    for cell in index[column].unique():
        try:
            values[cell] = parse(str(cell))
        except PlateError as error:
            plate = index.loc[index[column].isin([cell]), PLATE].iloc[0]
            raise error.about(plate=str(plate)) from None
    return index[column].map(values)


def _checked_sizes(index: pd.DataFrame) -> pd.Series:
    sizes, wrong = in_um(index["pixel_size_um"], 1)
    if wrong.any():
        row = index[wrong].iloc[0]
        raise LayoutError(f"plate {row[PLATE]} well {row[WELL]}: {row['pixel_size_um']!r} is no pixel size in µm")
    return sizes.astype(float)


def _require_one_of_each(index: pd.DataFrame) -> None:
    wrong = index[~index["role"].isin([Role.CONTROL.value, Role.TREATED.value])]
    if len(wrong):
        named = ", ".join(sorted({str(role) for role in wrong["role"].unique()}))
        row = wrong.iloc[0]
        raise LayoutError(f"the role is control or treated, not {named}: first in well {row[WELL]} of plate {row[PLATE]}")
    plates = index[KEYS[:3]].drop_duplicates()
    several = sorted(plates.loc[plates.duplicated(PLATE), PLATE])
    if several:
        raise LayoutError(f"plates of one name in several batches: {', '.join(several[:8])}; give them names of their own")
    for plate, sizes in index.groupby(PLATE)["pixel_size_um"]:
        if len(told := told_sizes(sizes)) > 1:
            raise LayoutError(f"plate {plate} has several pixel sizes (µm): {', '.join(told)}")
    said = index[[PLATE, WELL, "role", "label"]].drop_duplicates()
    twice = said[said.duplicated([PLATE, WELL], keep=False)]
    if len(twice):
        plate, well = twice[[PLATE, WELL]].iloc[0]
        told = twice.loc[(twice[PLATE] == plate) & (twice[WELL] == well), ["role", "label"]].agg(" ".join, axis=1)
        raise LayoutError(f"well {well} of plate {plate} has several roles or labels: {', '.join(told)}")
    again = index.duplicated([PLATE, WELL, SITE])
    if again.any():
        first = " ".join(map(str, index.loc[again, KEYS].iloc[0]))
        raise LayoutError(f"{again.sum()} sites are there twice, the first is {first}")


def _require_own_paths(index: pd.DataFrame) -> None:
    columns = [path_column(channel) for channel in channels_of(index)]
    paths = index[[PLATE, WELL, SITE, *columns]].melt([PLATE, WELL, SITE])
    again = paths[paths.duplicated([PLATE, "value"], keep=False)]
    if len(again):
        plate, path = again[[PLATE, "value"]].iloc[0]
        same = again[(again[PLATE] == plate) & (again["value"] == path)].head(_PLACES_TOLD)
        places = " and ".join(
            f"well {well} site {site} channel {str(column).removeprefix(INDEX_PATH)}"
            for well, site, column in same[[WELL, SITE, "variable"]].to_numpy().tolist()
        )
        raise LayoutError(f"plate {plate}: {path} is given for {places}: a plane has a file of its own")


def write_index(index: pd.DataFrame, path: Path) -> None:
    """Write an index as Parquet or CSV, by the file's ending; paths below its folder become relative to it.

    It is there whole or not at all.
    """
    portable = with_relative_paths(index, path.parent)
    with _folder_beside(path) as folder:
        if path.suffix == ".parquet":
            portable.to_parquet(folder / path.name, index=False)
        else:
            portable.to_csv(folder / path.name, index=False)
        (folder / path.name).replace(path)


def write_index_of(plates: Iterable[pd.DataFrame], path: Path) -> None:
    """Write the index of many plates as Parquet, one after the other; they may differ in the columns that ride along.

    Nothing is written where ``plates`` raises.
    """
    with _folder_beside(path) as folder:
        parts = []
        for number, rows in enumerate(plates):
            parts.append(folder / f"{number}.parquet")
            with_relative_paths(rows, path.parent).to_parquet(parts[-1], index=False)
        schema = pa.unify_schemas([pq.read_schema(part).remove_metadata() for part in parts], promote_options="permissive")
        with pq.ParquetWriter(folder / path.name, schema) as writer:
            for part in parts:
                writer.write_table(_with_schema(pq.read_table(part), schema))
        (folder / path.name).replace(path)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Make the folder of a file, and one in it that goes again, to write the file in before it is put in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[name] if name in table.column_names else pa.nulls(len(table), schema.field(name).type) for name in schema.names
    ]
    return pa.table(columns, schema.names).cast(schema)


def with_relative_paths(index: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return an index whose paths below a folder are relative to it."""
    base = f"{folder.resolve()}/"
    return index.assign(**{
        name: index[name].astype(str).str.removeprefix(base) for name in map(path_column, channels_of(index))
    })  # fmt: skip


@dataclass(frozen=True)
class IndexFile:
    """An index on disk, read plate by plate; ``channels`` in its column order, ``sites`` its rows."""

    path: Path
    channels: tuple[str, ...]
    sites: int

    @classmethod
    def open(cls, path: Path) -> "IndexFile":
        """Look at an index's columns.

        Raises:
            LayoutError: it is none.
        """
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                columns, sites = file.schema_arrow.names, file.metadata.num_rows
        else:
            index = _read_csv(path)
            columns, sites = list(index.columns), len(index)
        with _about(path):
            _require_columns(columns)
            _require_rows(sites)
        return cls(path, _channels(columns), sites)

    def plates(self) -> Iterator[pd.DataFrame]:
        """Yield every plate's rows, paths absolute.

        Raises:
            LayoutError: see ``checked``; or a plate's rows lie apart.
        """
        seen: set[str] = set()
        for rows in self._parts():
            plate = str(rows[PLATE].iloc[0])
            if plate in seen:
                raise LayoutError(f"the rows of plate {plate} lie apart in {self.path}: sort it by plate")
            seen.add(plate)
            with _about(self.path):
                rows = checked(_with_absolute_paths(rows, self.path.parent))  # noqa: PLW2901
            yield rows

    def _parts(self) -> Iterator[pd.DataFrame]:
        pending: list[pd.DataFrame] = []
        for part in self._batches():
            plate = part[PLATE].astype(str)
            for _, rows in part.groupby((plate != plate.shift()).cumsum(), sort=False):
                if pending and str(pending[0][PLATE].iloc[0]) != str(rows[PLATE].iloc[0]):
                    yield pd.concat(pending, ignore_index=True)
                    pending = []
                pending.append(rows)
        if pending:
            yield pd.concat(pending, ignore_index=True)

    def _batches(self) -> Iterator[pd.DataFrame]:
        if self.path.suffix != ".parquet":
            yield _read_csv(self.path).sort_values(KEYS[:3], kind="stable")
            return
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                yield batch.to_pandas()


def read_index(path: Path) -> pd.DataFrame:
    """Read a whole index (Parquet or CSV); paths come back absolute."""
    index = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    with _about(path):
        _require_columns(list(index.columns))
        return checked(_with_absolute_paths(index, path.parent))


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file that what is wrong with an index is in."""
    try:
        yield
    except PlateError as error:
        raise error.about(file=str(path)) from None


def _read_csv(path: Path) -> pd.DataFrame:
    problems = Problems()
    table = read_table(str(path), path.read_bytes(), problems)
    problems.stop()
    assert table is not None
    return table.rows.drop(columns=ROW)


def _with_absolute_paths(index: pd.DataFrame, folder: Path) -> pd.DataFrame:
    base = f"{folder.resolve()}/"
    columns = {}
    for name in map(path_column, channels_of(index)):
        paths = index[name].fillna("").astype(str)
        whole = (paths == "") | paths.str.startswith("/") | paths.str.contains("://", regex=False)
        columns[name] = paths.where(whole, base + paths)
    return index.assign(**columns)


def _require_columns(columns: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing or not _channels(columns):
        raise LayoutError(f"the index lacks the columns {', '.join(missing) or 'Path_<channel>'}")


def _require_rows(rows: int) -> None:
    if not rows:
        raise LayoutError("the index has no rows")
