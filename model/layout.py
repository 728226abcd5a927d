"""Where an image belongs: wells, sites, channels, roles, and the file names and tables that say so.

Knows nothing of pixels. Every function takes text and returns values; no file is opened here.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from model.errors import (
    DuplicateImageError,
    DuplicatePlaneError,
    LayoutError,
    MissingChannelError,
    TableTooLargeError,
    UnknownChannelError,
    WellNameError,
)
from model.tables import Table, read_table

PLATE_FORMATS: Mapping[int, tuple[int, int]] = {
    6: (2, 3),
    12: (3, 4),
    24: (4, 6),
    48: (6, 8),
    96: (8, 12),
    384: (16, 24),
    1536: (32, 48),
}
"""Wells of a plate → (rows, columns), after ANSI/SLAS 4."""

MAX_ROWS, MAX_COLUMNS = PLATE_FORMATS[1536]
MAX_PIXEL_SIZE_UM = 1_000.0
MAX_PLATE_NAME = 128
MAX_PLANES = 400_000
"""Planes that one table tells of: twice those of a 1536-well plate of 16 sites and 8 channels."""
UNUSED_CHANNEL = "-"
"""Stands for a numbered channel that is not used."""
_PIXEL_SIZE_DECIMALS = 6


class Role(StrEnum):
    """What a well is for: a negative control, or anything with a perturbation (positive controls too).

    The panel's are treated wells that enter a plate's statistics beside its controls; no plate map tells them.
    """

    CONTROL = "control"
    TREATED = "treated"
    PANEL = "panel"


class SiteKey(NamedTuple):
    """One field of view of a well."""

    well: str
    site: int


class PlaneKey(NamedTuple):
    """One channel of one site."""

    well: str
    site: int
    channel: str

    @property
    def site_key(self) -> SiteKey:
        """The site this plane belongs to."""
        return SiteKey(self.well, self.site)


# --- wells -----------------------------------------------------------------------------------------------------------

_WELL = re.compile(r"([A-Za-z]{1,2})0*([1-9][0-9]?)", re.ASCII)


def row_name(row: int) -> str:
    """Name a zero-based row: 0 → "A", 25 → "Z", 26 → "AA"."""
    return chr(ord("A") + row) if row < 26 else "A" + chr(ord("A") + row - 26)  # noqa: PLR2004


@lru_cache(MAX_ROWS * MAX_COLUMNS)
def well_name(row: int, column: int) -> str:
    """Name the well at a zero-based row and column: (0, 0) → "A01"; one string a well, however many planes it has.

    Raises:
        WellNameError: outside a 1536-well plate.
    """
    if not (0 <= row < MAX_ROWS and 0 <= column < MAX_COLUMNS):
        raise WellNameError(f"row {row}, column {column} is outside a 1536-well plate (A01 to AF48)")
    return f"{row_name(row)}{column + 1:02d}"


def well_position(well: str) -> tuple[int, int]:
    """Return the zero-based (row, column) of a well named like "A01", "a1" or "AF48".

    Raises:
        WellNameError: the text names no well.
    """
    match = _WELL.fullmatch(well.strip())
    if match:
        letters, column = match[1].upper(), int(match[2]) - 1
        row = ord(letters[-1]) - ord("A") + (26 if len(letters) > 1 else 0)
        if (len(letters) == 1 or letters[0] == "A") and row < MAX_ROWS and column < MAX_COLUMNS:
            return row, column
    raise WellNameError(f"{well[:40]!r} is not a well: expected A01 to AF48", well=well[:40])


def parse_well(text: str) -> str:
    """Return the zero-padded name of a well: "a1" → "A01"."""
    return well_name(*well_position(text))


def parse_site(text: str | int) -> int:
    """Return a site number, 1 or more (0 is taken too: some microscopes count from it)."""
    digits = str(text).strip()
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 6:  # noqa: PLR2004
        raise LayoutError(f"site {digits[:40]!r} is not a whole number")
    return int(digits)


# --- file names ------------------------------------------------------------------------------------------------------

_TIFF = r"\.(?:ome\.)?tiff?"
_SUFFIX = re.compile(_TIFF + "$", re.IGNORECASE)
_GUID = r"(?:[0-9A-F]{8}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{12})?"
_CONVENTIONS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "Opera Phenix / Operetta",
        re.compile(rf"r(?P<row>\d{{2}})c(?P<column>\d{{2}})f(?P<site>\d+)p\d+-ch(?P<number>\d{{1,3}})sk\d+\S*{_TIFF}"),
    ),
    (
        "Yokogawa CV8000",
        re.compile(rf".*_(?P<well>[A-Z]{{1,2}}\d{{2}})_T\d{{4}}F(?P<site>\d{{3}})L\d+A\d+Z\d+C(?P<number>\d{{2}}){_TIFF}"),
    ),
    (
        "ImageXpress",
        re.compile(
            rf".*_(?P<well>[A-Z]{{1,2}}\d{{2}})(?:_s(?P<site>\d+))?_w(?P<number>\d{{1,2}})(?P<thumb>_thumb)?{_GUID}{_TIFF}"
        ),
    ),
    (
        "<well>_<site>_<channel>",
        re.compile(rf"(?P<well>[A-Za-z]{{1,2}}\d{{1,2}})_(?P<site>\d+)_(?P<channel>[A-Za-z][A-Za-z0-9+-]*){_TIFF}"),
    ),
    (
        "<well>_<site>, an OME-TIFF that names its channels",
        re.compile(rf"(?P<well>[A-Za-z]{{1,2}}\d{{1,2}})_(?P<site>\d+){_TIFF}"),
    ),
)


@dataclass(frozen=True)
class ParsedName:
    """What a file name says: well, site, and a channel by name or by number; ``thumbnail`` files carry no data.

    Without a channel, the file is one of several channels that are named inside it.
    """

    well: str
    site: int
    channel: str | int | None
    thumbnail: bool
    convention: str


def file_name(path: str) -> str:
    """Return the last part of a path written on Windows or POSIX."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def parse_file_name(path: str) -> ParsedName:
    """Read well, site and channel from a file's name by the known conventions.

    Raises:
        LayoutError: no convention fits. WellNameError: one fits, but the well does not exist.
    """
    name = file_name(path)
    for convention, pattern in _CONVENTIONS:
        match = pattern.fullmatch(_SUFFIX.sub(lambda found: found[0].lower(), name))
        if match:
            return _parsed(match.groupdict(), convention)
    known = ", ".join(convention for convention, _ in _CONVENTIONS)
    raise LayoutError(
        f"the name {name[:80]!r} does not say well, site and channel; send a layout part, or name files as one of: {known}",
        file=name[:200],
    )


def _parsed(parts: Mapping[str, str | None], convention: str) -> ParsedName:
    row, column, well = parts.get("row"), parts.get("column"), parts.get("well")
    name = well_name(int(row) - 1, int(column) - 1) if row and column else parse_well(well or "")
    number = parts.get("number")
    return ParsedName(
        well=name,
        site=parse_site(parts.get("site") or 1),
        channel=int(number) if number else parts.get("channel"),
        thumbnail=parts.get("thumb") is not None,
        convention=convention,
    )


def plane_key(parsed: ParsedName, channels: Sequence[str], numbered: Sequence[str] | None = None) -> PlaneKey:
    """Give a parsed name its channel: by name among ``channels``, or by number (from 1) in ``numbered``.

    ``numbered`` defaults to ``channels``: the bundle's own order.

    Raises:
        UnknownChannelError: the channel is not one of the bundle's.
    """
    if parsed.channel is None:
        raise LayoutError(
            f"the name of well {parsed.well} site {parsed.site} says no channel; send one plane a file, named "
            "<well>_<site>_<channel>, or an OME-TIFF as a form"
        )
    if isinstance(parsed.channel, str):
        return PlaneKey(parsed.well, parsed.site, match_channel(parsed.channel, channels))
    names = numbered if numbered is not None else channels
    if not 1 <= parsed.channel <= len(names):
        raise UnknownChannelError(
            f"channel number {parsed.channel} has no name: {len(names)} are named ({', '.join(names)})",
            channel=str(parsed.channel),
        )
    return PlaneKey(parsed.well, parsed.site, match_channel(names[parsed.channel - 1], channels))


def is_unused(parsed: ParsedName, numbered: Sequence[str] | None) -> bool:
    """Whether a name numbers a channel (from 1) that ``numbered`` says is not used."""
    number = parsed.channel
    return isinstance(number, int) and number >= 1 and [*(numbered or ())][number - 1 : number] == [UNUSED_CHANNEL]


def match_channel(name: str, channels: Sequence[str]) -> str:
    """Return the bundle's spelling of a channel's name, ignoring case.

    Raises:
        UnknownChannelError: the bundle has no such channel.
    """
    for channel in channels:
        if channel.casefold() == name.strip().casefold():
            return channel
    raise UnknownChannelError(f"channel {name[:40]!r} is not one of the bundle's: {', '.join(channels)}", channel=name[:40])


# --- layout tables ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a table says of images: which file is which plane, of which plate, and at which pixel sizes (µm)."""

    files: Mapping[str, PlaneKey]
    plate: str | None
    pixel_sizes_um: tuple[float, ...]

    @property
    def pixel_size_um(self) -> float | None:
        """The one pixel size; None when the table gives none.

        Raises:
            LayoutError: it gives several.
        """
        if len(self.pixel_sizes_um) > 1:
            listed = ", ".join(f"{size:g}" for size in self.pixel_sizes_um[:4])
            raise LayoutError(f"the images of one request have one pixel size; {_RESOLUTION} gives {listed} µm")
        return self.pixel_sizes_um[0] if self.pixel_sizes_um else None


_RESOLUTION = "Metadata_ImageResolutionX"
_LOAD_DATA = frozenset({"Metadata_Well", "Metadata_Site"})


def parse_layout(text: str, channels: Sequence[str]) -> Layout:
    """Read a layout from text, as ``read_table`` and ``layout_of`` do."""
    return layout_of(read_table(text), channels)


def layout_of(table: Table, channels: Sequence[str]) -> Layout:
    """Read a layout: which file is which well, site and channel.

    Takes CSV with the columns ``file,well,site,channel``; JSON, a list of objects with the same keys; or a JUMP
    LoadData CSV (``Metadata_Well``, ``Metadata_Site`` and, per channel, ``FileName_Orig…``; channels that the bundle
    does not have are left out; ``Metadata_ImageResolutionX`` is metres per pixel). Files are keyed by their last path
    component.

    Raises:
        LayoutError: not such a table. WellNameError, UnknownChannelError, DuplicatePlaneError: as they say.
        TableTooLargeError: a table of too many planes.
    """
    columns = set(table.columns)
    if {"file", "well", "site", "channel"} <= columns:
        pairs = (
            (
                file_name(row["file"]),
                PlaneKey(parse_well(row["well"]), parse_site(row["site"]), match_channel(row["channel"], channels)),
            )
            for row in table
        )
    elif columns >= _LOAD_DATA:
        pairs = ((file_name(place), key) for key, place in _load_data_places(table, channels, ("FileName", "URL")))
    else:
        raise LayoutError(
            "a layout needs the columns file, well, site, channel (or JUMP's Metadata_Well, Metadata_Site and "
            f"FileName_Orig…); it has {', '.join(sorted(columns))[:200]}"
        )
    return Layout(_unique_files(pairs), _plate(table), _pixel_sizes_um(table))


@dataclass(frozen=True)
class Places:
    """What a LoadData table says of images that lie elsewhere: each plane's address, the plate, and the pixel size (µm)."""

    addresses: Mapping[PlaneKey, str]
    plate: str | None
    pixel_size_um: float | None


def load_data_places(table: Table, channels: Sequence[str]) -> Places:
    """Read where a LoadData table says that images are: ``URL_Orig…``, or else ``PathName_Orig…`` and ``FileName_Orig…``.

    Raises:
        LayoutError: not such a table. WellNameError, MissingChannelError, DuplicatePlaneError: as they say.
        TableTooLargeError: a table of too many planes.
    """
    if not set(table.columns) >= _LOAD_DATA:
        raise LayoutError(
            "a LoadData table needs the columns Metadata_Well and Metadata_Site, and URL_Orig… for each channel"
        )
    addresses: dict[PlaneKey, str] = {}
    for key, place in _load_data_places(table, channels, ("URL", "FileName")):
        if key in addresses:
            raise duplicate_plane(key, addresses[key], place)
        addresses[key] = place
    return Places(addresses, _plate(table), Layout({}, None, _pixel_sizes_um(table)).pixel_size_um)


def rounded_pixel_size_um(size_um: float) -> float:
    """Round a pixel size to six decimals: metres of a table and µm of a form or an index give the same number."""
    return round(size_um, _PIXEL_SIZE_DECIMALS)


def _pixel_sizes_um(table: Table) -> tuple[float, ...]:
    found = {cell.strip() for cell in table.column(_RESOLUTION)} - {""}
    try:
        sizes = sorted({rounded_pixel_size_um(float(value) * 1e6) for value in found})
    except ValueError:
        raise LayoutError(f"{_RESOLUTION} is not a number of metres per pixel") from None
    if not all(0 < size < MAX_PIXEL_SIZE_UM for size in sizes):
        raise LayoutError(f"{_RESOLUTION} gives {', '.join(f'{size:g}' for size in sizes[:4])} µm per pixel")
    return tuple(sizes)


def _plate(table: Table) -> str | None:
    plates = sorted({cell.strip() for cell in table.column("Metadata_Plate")} - {""})
    if len(plates) > 1:
        raise LayoutError(f"the table is of {len(plates)} plates ({', '.join(plates)[:80]}); send one plate's rows")
    if plates and len(plates[0]) > MAX_PLATE_NAME:
        raise LayoutError(f"Metadata_Plate has {len(plates[0]):,} characters; a plate's name has {MAX_PLATE_NAME} at most")
    return plates[0] if plates else None


def _load_data_places(table: Table, channels: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[PlaneKey, str]]:
    """Give each plane and its place, from the first of the kinds of columns that there is."""
    columns = {
        channel: next((f"{kind}_Orig{channel}" for kind in kinds if f"{kind}_Orig{channel}" in table.columns), None)
        for channel in channels
    }
    missing = [channel for channel, column in columns.items() if column is None]
    if missing:
        raise MissingChannelError(
            f"the LoadData table has no {kinds[0]}_Orig… column for {', '.join(missing)}", channels=missing
        )
    if len(table) * len(columns) > MAX_PLANES:
        raise TableTooLargeError(f"the table is of more than {MAX_PLANES:,} images: send one of the plate's own rows")
    for row in table:
        well, site = parse_well(row["Metadata_Well"]), parse_site(row["Metadata_Site"])
        for channel, column in columns.items():
            assert column is not None
            folder = row.get(f"PathName_Orig{channel}", "") if column.startswith("FileName") else ""
            yield PlaneKey(well, site, channel), f"{folder.rstrip('/')}/{row[column]}" if folder else row[column]


def _unique_files(pairs: Iterable[tuple[str, PlaneKey]]) -> dict[str, PlaneKey]:
    layout: dict[str, PlaneKey] = {}
    seen: dict[PlaneKey, str] = {}
    for name, key in pairs:
        if name in layout:
            raise LayoutError(f"the layout names the file {name[:80]!r} twice", file=name[:200])
        if key in seen:
            raise duplicate_plane(key, seen[key], name)
        layout[name] = key
        seen[key] = name
    return layout


def duplicate_plane(key: PlaneKey, first: str, second: str) -> DuplicatePlaneError:
    """Say that two files claim one well, site and channel."""
    return DuplicatePlaneError(
        f"well {key.well} site {key.site} channel {key.channel} is given twice: {first[:80]!r} and {second[:80]!r}; "
        "of several focal planes or time points send one",
        well=key.well,
        site=key.site,
        channel=key.channel,
    )


def duplicate_image(first: PlaneKey, second: PlaneKey) -> DuplicateImageError:
    """Say that one image is given for two planes."""
    return DuplicateImageError(
        f"well {first.well} site {first.site} channel {first.channel} and well {second.well} site {second.site} channel "
        f"{second.channel} are given the very same image",
        well=second.well,
        site=second.site,
        channel=second.channel,
    )


# --- plate maps ------------------------------------------------------------------------------------------------------

MAX_MAP_COLUMNS = 200
MAX_MAP_COLUMN_NAME = 200
MAX_MAP_HEADER_BYTES = 4_000
"""Bytes of all the names of a plate map's columns, as JSON: they are told again with every answered well."""
MAX_MAP_CELL = 2_000
INDEX_KEYS = tuple(f"Metadata_{name}" for name in ("Source", "Batch", "Plate", "Well", "Site"))
"""Columns that name a row of an index, which is a site: its lab, batch, plate, well and number."""
INDEX_PLATE, INDEX_WELL, INDEX_SITE = INDEX_KEYS[2:]
INDEX_ROLE, INDEX_SIZE, INDEX_PATH = "role", "pixel_size_um", "Path_"
"""Columns that say what a site is for, and its images' size; what the column of a channel's paths begins with."""
WELL_COLUMNS = ("well", "metadata_well", "well_position")
_ROLE_COLUMNS = ("role", "control_type", "metadata_control_type", "pert_type", "metadata_pert_type")
_NEGATIVE = frozenset({"control", "negcon", "negative", "negative_control", "dmso"})
_TREATED = frozenset({"treated", "trt", "compound", "sample", "positive", "positive_control", ""})


@dataclass(frozen=True)
class PlateMap:
    """A plate map: its columns, each well's values, and the roles that it tells, if it tells any."""

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    roles: Mapping[str, Role]

    def wells(self, role: Role) -> frozenset[str]:
        """The wells of a role."""
        return frozenset(well for well, found in self.roles.items() if found is role)


def parse_platemap(text: str | bytes) -> dict[str, Role]:
    """Read a plate map's roles: which wells are negative controls.

    Takes CSV or TSV, text or its UTF-8, with a well column (``well``, ``Metadata_Well`` or ``well_position``) and one that
    tells the role: ``role``, ``control_type`` or ``pert_type`` (control, negcon, negative, DMSO; or treated, trt, compound,
    sample, positive, poscon…, nothing), or, as on JUMP plate maps, ``broad_sample`` that is empty in DMSO wells. A role that
    is none of these is refused, so that no control is taken for a treated well by its spelling.

    Raises:
        LayoutError: no such columns, a role that is not known, or a well named twice.
    """
    platemap = read_platemap(text)
    if not platemap.roles:
        raise LayoutError("a plate map needs a role, pert_type, control_type or broad_sample column")
    return dict(platemap.roles)


def read_platemap(text: str | bytes) -> PlateMap:
    """Read a whole plate map, as ``parse_platemap`` does; one without a role column tells no roles.

    Raises:
        LayoutError: no well column, a role that is not known, a well named twice, or more than a plate map may have.
        TableTooLargeError: more than any table may have.
    """
    table = read_table(text)
    _require_map(table)
    names = {name: name.strip().casefold() for name in table.columns}
    well_column = next((name for name, folded in names.items() if folded in WELL_COLUMNS), None)
    if well_column is None:
        raise LayoutError(
            f"a plate map needs a column well, Metadata_Well or well_position; it has {', '.join(table.columns)[:200]}"
        )
    values: dict[str, tuple[str, ...]] = {}
    roles: dict[str, Role] = {}
    for row in table:
        well = parse_well(row[well_column])
        if well in values:
            raise LayoutError(f"the plate map names well {well} twice", well=well)
        values[well] = _map_cells(well, row)
        role = _role(well, {names[name]: cell for name, cell in row.items()})
        if role is not None:
            roles[well] = role
    return PlateMap(table.columns, values, roles)


def _require_map(table: Table) -> None:
    """Check that a table is no larger than a plate map may be, however small it is as a file."""
    longest = max(map(len, table.columns))
    header = len(json.dumps(table.columns, ensure_ascii=False).encode())
    for found, most, what in (
        (len(table), MAX_ROWS * MAX_COLUMNS, "rows, one a well"),
        (len(table.columns), MAX_MAP_COLUMNS, "columns"),
        (longest, MAX_MAP_COLUMN_NAME, "characters in the name of a column"),
        (header, MAX_MAP_HEADER_BYTES, "bytes in the names of all its columns"),
    ):
        if found > most:
            raise LayoutError(f"a plate map has at most {most:,} {what}; this one has {found:,}")


def _map_cells(well: str, row: Mapping[str, str]) -> tuple[str, ...]:
    for name, cell in row.items():
        if len(cell) > MAX_MAP_CELL:
            raise LayoutError(
                f"a cell of a plate map has at most {MAX_MAP_CELL:,} characters; well {well} has {len(cell):,} in {name!r}",
                well=well,
            )
    return tuple(row.values())


def _role(well: str, row: Mapping[str, str]) -> Role | None:
    column = next((name for name in _ROLE_COLUMNS if name in row), None)
    if column is None and "broad_sample" in row:
        return Role.CONTROL if row["broad_sample"].strip() in ("", "DMSO") else Role.TREATED
    if column is None:
        return None
    value = row[column].strip().casefold()
    if column.endswith("pert_type") and value == "control":
        raise LayoutError(
            f"well {well}: pert_type 'control' may be positive; say negcon or poscon in control_type", well=well
        )
    return parse_role(well, row[column])


def parse_role(well: str, text: str) -> Role:
    """Read a well's role, in any of the words that plate maps have for it; nothing is treated.

    Raises:
        LayoutError: it is none.
    """
    value = text.strip().casefold()
    if value in _NEGATIVE:
        return Role.CONTROL
    if value in _TREATED or value.startswith("poscon"):
        return Role.TREATED
    raise LayoutError(
        f"well {well} has the role {text[:40]!r}, which is neither a negative control (control, negcon, DMSO) nor "
        "treated (treated, trt, poscon); leave unused wells and their images out",
        well=well,
    )
