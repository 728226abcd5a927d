"""The index: one row a site, JUMP-style, saying which plate it is of, what was done to its well, and where its planes lie.

Columns: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``, ``Metadata_Well``, ``Metadata_Site``, ``label``,
``role`` (control | treated), ``pixel_size_um`` (empty when unknown) and ``Path_<channel>`` per channel, relative to the
index file's folder or absolute.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from model.errors import LayoutError, MissingChannelError
from model.layout import WELL_COLUMNS, Role, parse_platemap, parse_site, parse_well

KEYS = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]
COLUMNS = [*KEYS, "label", "role", "pixel_size_um"]
_PATH = "Path_"


def channels_of(index: pd.DataFrame) -> tuple[str, ...]:
    """Return the channels an index has paths for, in its column order."""
    return tuple(name.removeprefix(_PATH) for name in index.columns if name.startswith(_PATH))


def path_column(channel: str) -> str:
    """Name the column that holds a channel's paths."""
    return f"{_PATH}{channel}"


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
        index[path_column(channel)] = _paths(table, channel, load_data.parent)
    return index


def index_tree(root: Path, channels: Sequence[str]) -> pd.DataFrame:
    """Index every folder below ``root`` that holds ``load_data.csv`` (or .parquet) and ``platemap.csv``.

    Raises:
        LayoutError: there is none, a site is there twice, a plate has no controls, or an image is not there.
    """
    tables = sorted([*root.rglob("load_data.csv"), *root.rglob("load_data.parquet")])
    if not tables:
        raise LayoutError(f"no load_data.csv below {root}")
    index = checked(pd.concat([index_plate(t, t.parent / "platemap.csv", channels) for t in tables], ignore_index=True))
    _require_controls(index)
    _require_images(index)
    return index


def _require_controls(index: pd.DataFrame) -> None:
    key = KEYS[:3]
    plates = index[key].drop_duplicates()
    controls = index.loc[index["role"] == Role.CONTROL.value, key].drop_duplicates()
    merged = plates.merge(controls, on=key, how="left", indicator=True)
    without = list(merged.loc[merged["_merge"] == "left_only", "Metadata_Plate"])
    if without:
        raise LayoutError(f"{len(without)} plates have no control site in their tables: {', '.join(without[:8])}")


def _require_images(index: pd.DataFrame) -> None:
    paths = [path for channel in channels_of(index) for path in index[path_column(channel)]]
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        raise LayoutError(f"{len(absent)} of {len(paths)} images are not there, the first is {absent[0]}")


def checked(index: pd.DataFrame) -> pd.DataFrame:
    """Check an index's columns and that no site is there twice; return it sorted.

    Raises:
        LayoutError: as it says.
    """
    missing = [name for name in COLUMNS if name not in index.columns]
    if missing or not channels_of(index):
        raise LayoutError(f"the index lacks the columns {', '.join(missing) or 'Path_<channel>'}")
    wrong = sorted(set(index["role"]) - {role.value for role in Role})
    if wrong:
        raise LayoutError(f"the role is control or treated, not {', '.join(map(str, wrong))}")
    twice = index[index.duplicated(KEYS)]
    if len(twice):
        raise LayoutError(f"{len(twice)} sites are there twice, the first is {' '.join(map(str, twice.iloc[0][KEYS]))}")
    return index.sort_values(KEYS, ignore_index=True)


def write_index(index: pd.DataFrame, path: Path) -> None:
    """Write an index as Parquet or CSV, by the file's ending; paths below its folder become relative to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    portable = index.copy()
    base = path.parent.resolve()
    for channel in channels_of(index):
        name = path_column(channel)
        portable[name] = [str(Path(p).relative_to(base)) if Path(p).is_relative_to(base) else str(p) for p in portable[name]]
    if path.suffix == ".parquet":
        portable.to_parquet(path, index=False)
    else:
        portable.to_csv(path, index=False)


def read_index(path: Path) -> pd.DataFrame:
    """Read an index (Parquet or CSV); paths come back absolute."""
    text = dict.fromkeys([*KEYS[:4], "role"], str)
    index = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=text)
    index["label"] = index["label"].fillna("").astype(str)
    for channel in channels_of(index):
        name = path_column(channel)
        index[name] = [str((path.parent / p).resolve()) for p in index[name]]
    return checked(index)


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
    if "Metadata_ImageResolutionX" not in table.columns:
        return pd.Series([float("nan")] * len(table))
    return table["Metadata_ImageResolutionX"].astype(float) * 1e6  # metres → µm


def _paths(table: pd.DataFrame, channel: str, folder: Path) -> list[str]:
    name, place = f"FileName_Orig{channel}", f"PathName_Orig{channel}"
    if name not in table.columns:
        raise MissingChannelError(f"the LoadData table has no column {name}", channel=channel)
    places = table[place] if place in table.columns else ["."] * len(table)
    return [str((folder / str(p) / str(n)).resolve()) for p, n in zip(places, table[name], strict=True)]
