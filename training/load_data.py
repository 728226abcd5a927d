"""LoadData, as JUMP publishes it: where the planes of a plate's sites lie, one row a site.

All that is wrong with one is told by file and row. Knows nothing of roles and labels, nor where plates are listed.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from model.errors import WellNameError
from model.layout import parse_well, rounded_pixel_size_um
from training.tables import ROW, Problems, Table

PLATE, WELL, SITE = (f"Metadata_{name}" for name in ("Plate", "Well", "Site"))
RESOLUTION = "Metadata_ImageResolutionX"
_UM_PER_METRE = 1e6
_PIXEL_SIZES_UM = (0.01, 100.0)


# --- planes ----------------------------------------------------------------------------------------------------------


def with_places(table: Table, columns: Mapping[str, str], problems: Problems) -> Table | None:
    """Put in where planes lie, by the URL column, or by the path and file name columns; None where a channel has neither.

    Args:
        table: LoadData; relative paths are relative to its folder.
        columns: channel (as in ``URL_Orig<channel>``) → the column to put in.
        problems: takes up the channels that are not there.
    """
    absent = [name for name in columns if not {f"URL_Orig{name}", f"FileName_Orig{name}"} & set(table.columns)]
    for name in absent:
        problems.error(table.file, f"the LoadData table has no column URL_Orig{name} or FileName_Orig{name}")
    if absent:
        return None
    folder = Path() if "://" in table.file else Path(table.file).parent
    return table.with_columns(**{column: _places(table.rows, channel, folder) for channel, column in columns.items()})


def _places(rows: pd.DataFrame, channel: str, folder: Path) -> pd.Series:
    url, name, place = (f"{kind}_Orig{channel}" for kind in ("URL", "FileName", "PathName"))
    if url in rows.columns:
        return rows[url]
    names = rows[name]
    folders = rows[place] if place in rows.columns else pd.Series("", index=rows.index)
    absolute = {text: _absolute(text, folder) for text in folders.unique()}
    return (folders.map(absolute) + names).where(names != "", "")


def _absolute(text: str, folder: Path) -> str:
    """A path column's entry with a slash at its end."""
    return f"{text.rstrip('/')}/" if "://" in text else f"{(folder / text).resolve()}/"


# --- sites -----------------------------------------------------------------------------------------------------------


def with_well_names(table: Table, problems: Problems) -> Table:
    """Zero-padded well names; rows whose well is none are reported and left out."""
    names = {text: _well_or_none(text) for text in table.rows[WELL].unique()}
    wells = table.rows[WELL].map(names)
    problems.each(table, wells.isna(), "{Metadata_Well!r} is not a well of plate {Metadata_Plate}: expected A01 to AF48")
    return table.with_columns(**{WELL: wells}).where(wells.notna())


def _well_or_none(text: str) -> str | None:
    try:
        return parse_well(text)
    except WellNameError:
        return None


def checked_sites(plate: Table, columns: Mapping[str, str], problems: Problems) -> Table:
    """Return one plate's rows with well names and site numbers; report sites and planes that are missing or there twice.

    Args:
        plate: with places put in.
        columns: channel → the column of its places.
        problems: takes up what is wrong; rows whose well or site is none are left out.
    """
    plate = with_well_names(plate, problems)
    numbered = plate.rows[SITE].str.fullmatch(r"[0-9]{1,6}").astype(bool)
    problems.each(plate, ~numbered, "site {Metadata_Site!r} of well {Metadata_Well} is not a whole number")
    plate = plate.where(numbered)
    plate = plate.with_columns(**{SITE: plate.rows[SITE].astype(np.int64)})
    plate.report_twice([PLATE, WELL, SITE], "plate, well and site", problems)
    for channel, column in columns.items():
        say = "no {channel} image of plate {Metadata_Plate} well {Metadata_Well}"
        problems.each(plate, plate.rows[column] == "", say, channel=channel)
    places = plate.rows[[ROW, *columns.values()]].melt(ROW)
    twice = places[(places["value"] != "") & places.duplicated("value", keep=False)]
    for place, rows in twice.groupby("value", sort=False):
        problems.error(
            plate.file, f"{place} is named {len(rows)} times: one image for several wells, sites or channels", rows[ROW]
        )
    return plate


# --- pixel sizes -----------------------------------------------------------------------------------------------------


def pixel_sizes(plate: Table, otherwise: float, problems: Problems) -> pd.Series:
    """µm per pixel of one plate's sites: LoadData states metres; where it states nothing at all, ``otherwise`` holds."""
    if RESOLUTION not in plate.columns:
        return pd.Series(otherwise, plate.rows.index)
    sizes, wrong = in_um(plate.rows[RESOLUTION], _UM_PER_METRE)
    problems.each(plate, wrong, f"{RESOLUTION} {{{RESOLUTION}}} of plate {{{PLATE}}} is no pixel size in metres")
    told = told_sizes(sizes)
    if len(told) > 1 and not wrong.any():
        problems.error(
            plate.file, f"plate {plate.rows[PLATE].iloc[0]} has several pixel sizes (µm): {', '.join(told)}", plate.rows[ROW]
        )
    return sizes.fillna(otherwise)


def in_um(cells: pd.Series, um: float) -> tuple[pd.Series, pd.Series]:
    """Read pixel sizes in a unit of ``um`` µm: sizes in µm, NaN where the cell is empty; and which cells give none."""
    sizes = pd.to_numeric(cells, errors="coerce") * um
    return sizes, cells.notna() & (cells != "") & ~sizes.between(*_PIXEL_SIZES_UM)


def told_sizes(sizes: pd.Series) -> list[str]:
    """Name the pixel sizes that differ, in their order; those not known are one of them."""
    return ["none" if np.isnan(size) else f"{size:g}" for size in sizes.map(rounded_pixel_size_um).unique()]
