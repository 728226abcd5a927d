"""The index: one row a site, JUMP-style, saying which plate it is of, what was done to its well, and where its planes lie.

Columns: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``, ``Metadata_Well``, ``Metadata_Site``, ``label``,
``role`` (control | treated), ``pixel_size_um`` (empty when unknown) and ``Path_<channel>`` per channel: an s3:// URL, or a
path relative to the index file's folder or absolute. Other columns ride along. A plate's rows lie together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import AnchorwellError, LayoutError, MissingChannelError
from model.layout import WELL_COLUMNS, Role, parse_platemap, parse_site, parse_well

KEYS = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]
COLUMNS = [*KEYS, "label", "role", "pixel_size_um"]
RESOLUTION = "Metadata_ImageResolutionX"
_PATH = "Path_"
_BATCH_ROWS = 20_000


def channels_of(index: pd.DataFrame) -> tuple[str, ...]:
    """Return the channels an index has paths for, in its column order."""
    return _channels(list(index.columns))


def _channels(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(_PATH) for name in columns if name.startswith(_PATH))


def path_column(channel: str) -> str:
    """Name the column that holds a channel's paths."""
    return f"{_PATH}{channel}"


# --- a folder tree ---------------------------------------------------------------------------------------------------


def index_plate(load_data: Path, platemap: Path, channels: Sequence[str]) -> pd.DataFrame:
    """Index one plate from its LoadData table and its plate map.

    Args:
        load_data: CSV or Parquet with JUMP's columns: ``Metadata_*``, ``FileName_Orig<channel>`` and
            ``PathName_Orig<channel>`` (relative to the table's folder, or absolute).
        platemap: CSV or TSV with a well column, a role column (see ``model.layout.parse_platemap``) and ``label``, the
            class to learn (empty for wells that have none).
        channels: which channels to index, in order.

    Raises:
        LayoutError, MissingChannelError: a table lacks a column, or a well is not on the plate map.
    """
    table = _read_table(load_data)
    if not platemap.is_file():
        raise LayoutError(f"{load_data} has no {platemap.name} beside it: which wells are controls?")
    text = platemap.read_text(encoding="utf-8")
    roles = parse_platemap(text)
    labels = _labels(platemap)
    wells = [parse_well(str(well)) for well in table["Metadata_Well"]]
    unknown = sorted(set(wells) - set(roles))
    if unknown:
        raise LayoutError(f"{platemap.name} does not name the wells {', '.join(unknown[:8])} of {load_data.name}")
    index = pd.DataFrame({name: table[name].astype(str) for name in KEYS[:3]})
    index["Metadata_Well"] = wells
    index["Metadata_Site"] = [parse_site(str(site)) for site in table["Metadata_Site"]]
    index["label"] = [labels.get(well, "") for well in wells]
    index["role"] = [roles[well].value for well in wells]
    index["pixel_size_um"] = _pixel_sizes(table)
    for channel in channels:
        index[path_column(channel)] = plane_places(table, channel, load_data.parent)
    return index


def index_tree(root: Path, channels: Sequence[str]) -> pd.DataFrame:
    """Index every folder below ``root`` that holds ``load_data.csv`` (or .parquet) and ``platemap.csv``.

    Raises:
        LayoutError: there is none, a site is there twice, or an image is not there; tells of all plates at once.
    """
    tables = sorted([*root.rglob("load_data.csv"), *root.rglob("load_data.parquet")])
    if not tables:
        raise LayoutError(f"no load_data.csv below {root}")
    plates, problems = [], []
    for table in tables:
        try:
            plates.append(index_plate(table, table.parent / "platemap.csv", channels))
            _require_images(plates[-1])
        except AnchorwellError as error:
            problems.append(error if str(table.parent) in error.detail else error.about(table=str(table)))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise LayoutError("\n".join(error.detail for error in problems))
    return checked(pd.concat(plates, ignore_index=True))


def _require_images(index: pd.DataFrame) -> None:
    paths = [path for channel in channels_of(index) for path in index[path_column(channel)]]
    absent = [path for path in paths if "://" not in path and not Path(path).is_file()]
    if absent:
        raise LayoutError(f"{len(absent)} of {len(paths)} images are not there, the first is {absent[0]}")


def plane_places(table: pd.DataFrame, channel: str, folder: Path) -> pd.Series:
    """Return where a channel's planes lie by a LoadData table: its URL column, or its path and file name columns.

    Args:
        table: the LoadData table, its cells text.
        channel: as in ``URL_Orig<channel>``.
        folder: what relative paths are relative to.

    Raises:
        MissingChannelError: the table has neither.
    """
    url, name, place = (f"{kind}_Orig{channel}" for kind in ("URL", "FileName", "PathName"))
    if url in table.columns:
        return table[url].astype(str)
    if name not in table.columns:
        raise MissingChannelError(f"the LoadData table has no column {url} or {name}", channel=channel)
    names = table[name].astype(str)
    folders = table[place].astype(str) if place in table.columns else pd.Series("", index=table.index)
    absolute = {text: _absolute(text, folder) for text in folders.unique()}
    return (folders.map(absolute) + names).where(names != "", "")


def _absolute(text: str, folder: Path) -> str:
    """A path column's entry with a slash at its end."""
    return f"{text.rstrip('/')}/" if "://" in text else f"{(folder / text).resolve()}/"


# --- checking, writing, reading ---------------------------------------------------------------------------------------


def checked(index: pd.DataFrame) -> pd.DataFrame:
    """Check an index's columns, that no path is empty, no site there twice and no plate in two batches; return it sorted.

    Raises:
        LayoutError: as it says.
    """
    _require_columns(list(index.columns))
    wrong = sorted(set(index["role"]) - {role.value for role in Role})
    if wrong:
        raise LayoutError(f"the role is control or treated, not {', '.join(map(str, wrong))}")
    for name in map(path_column, channels_of(index)):
        empty = index[index[name].isna() | (index[name] == "")]
        if len(empty):
            raise LayoutError(f"{len(empty)} sites have no {name}, the first is {' '.join(map(str, empty.iloc[0][KEYS]))}")
    plates = index[KEYS[:3]].drop_duplicates()
    several = sorted(plates.loc[plates.duplicated("Metadata_Plate"), "Metadata_Plate"].astype(str))
    if several:
        raise LayoutError(f"plates of one name in several batches: {', '.join(several[:8])}; give them names of their own")
    twice = index[index.duplicated(KEYS)]
    if len(twice):
        raise LayoutError(f"{len(twice)} sites are there twice, the first is {' '.join(map(str, twice.iloc[0][KEYS]))}")
    return index.sort_values(KEYS, ignore_index=True)


def write_index(index: pd.DataFrame, path: Path) -> None:
    """Write an index as Parquet or CSV, by the file's ending; paths below its folder become relative to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    portable = with_relative_paths(index, path.parent)
    if path.suffix == ".parquet":
        portable.to_parquet(path, index=False)
    else:
        portable.to_csv(path, index=False)


def write_index_of(plates: Iterable[pd.DataFrame], path: Path) -> None:
    """Write the index of many plates as Parquet, one after the other; they may differ in the columns that ride along.

    Nothing is written where ``plates`` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        parts = []
        for number, rows in enumerate(plates):
            parts.append(Path(folder) / f"{number}.parquet")
            with_relative_paths(rows, path.parent).to_parquet(parts[-1], index=False)
        schema = pa.unify_schemas([pq.read_schema(part).remove_metadata() for part in parts], promote_options="permissive")
        with pq.ParquetWriter(Path(folder) / path.name, schema) as writer:
            for part in parts:
                writer.write_table(_with_schema(pq.read_table(part), schema))
        (Path(folder) / path.name).replace(path)


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
        _require_columns(columns)
        return cls(path, _channels(columns), sites)

    def plates(self) -> Iterator[pd.DataFrame]:
        """Yield every plate's rows, paths absolute.

        Raises:
            LayoutError: see ``checked``; or a plate's rows lie apart.
        """
        seen: set[str] = set()
        for rows in self._parts():
            plate = str(rows["Metadata_Plate"].iloc[0])
            if plate in seen:
                raise LayoutError(f"the rows of plate {plate} lie apart in {self.path}: sort it by plate")
            seen.add(plate)
            yield checked(_with_absolute_paths(rows, self.path.parent))

    def _parts(self) -> Iterator[pd.DataFrame]:
        pending: list[pd.DataFrame] = []
        for part in self._batches():
            plate = part["Metadata_Plate"].astype(str)
            for _, rows in part.groupby((plate != plate.shift()).cumsum(), sort=False):
                if pending and str(pending[0]["Metadata_Plate"].iloc[0]) != str(rows["Metadata_Plate"].iloc[0]):
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
    _require_columns(list(index.columns))
    return checked(_with_absolute_paths(index, path.parent))


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=dict.fromkeys([*KEYS[:4], "role", "label"], str), low_memory=False)


def _with_absolute_paths(index: pd.DataFrame, folder: Path) -> pd.DataFrame:
    base = f"{folder.resolve()}/"
    columns = {"label": index["label"].fillna("").astype(str)}
    for name in map(path_column, channels_of(index)):
        paths = index[name].astype(str)
        columns[name] = paths.where(paths.str.startswith("/") | paths.str.contains("://", regex=False), base + paths)
    return index.assign(**columns)


def _require_columns(columns: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing or not _channels(columns):
        raise LayoutError(f"the index lacks the columns {', '.join(missing) or 'Path_<channel>'}")


def _read_table(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    missing = [name for name in KEYS if name not in table.columns]
    if missing:
        raise LayoutError(f"{path} lacks the columns {', '.join(missing)}")
    return table


def _labels(platemap: Path) -> dict[str, str]:
    table = pd.read_csv(platemap, sep=None, engine="python", dtype=str, keep_default_na=False)
    table.columns = table.columns.str.strip().str.casefold()
    well = next(name for name in WELL_COLUMNS if name in table.columns)
    if "label" not in table.columns:
        raise LayoutError(f"{platemap} has no label column: which class does each well belong to?")
    return {parse_well(name): label.strip() for name, label in zip(table[well], table["label"], strict=True)}


def _pixel_sizes(table: pd.DataFrame) -> pd.Series:
    if RESOLUTION not in table.columns:
        return pd.Series(float("nan"), index=table.index)
    return table[RESOLUTION].astype(float) * 1e6  # metres → µm
