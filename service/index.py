"""The index of a screen: Parquet or CSV, one row a site, read plate by plate.

Columns, as ``anchorwell-train index`` writes them: ``Metadata_Source``, ``Metadata_Batch``, ``Metadata_Plate``,
``Metadata_Well``, ``Metadata_Site``, ``role`` (as a plate map tells it), perhaps ``pixel_size_um``, and
``Path_<channel>`` per channel: an s3:// URL, or a path, relative to the index's folder or absolute. Other columns ride
along into the answers. A plate's rows lie together. What is wrong with one plate is told when that plate is read, and of
no other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from csv import reader as csv_reader
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from model.errors import LayoutError
from model.layout import (
    INDEX_KEYS,
    INDEX_PATH,
    INDEX_PLATE,
    INDEX_ROLE,
    INDEX_SITE,
    INDEX_SIZE,
    INDEX_WELL,
    MAX_PIXEL_SIZE_UM,
    PlaneKey,
    PlateMap,
    Role,
    duplicate_plane,
    parse_role,
    parse_site,
    parse_well,
    rounded_pixel_size_um,
)
from model.statistics import canonical_json

_ROWS_AT_ONCE = 20_000
Row = Mapping[str, Any]


@dataclass(frozen=True)
class IndexedPlate:
    """One plate's rows, as they stand in the index; looked at when they are asked for."""

    name: str
    rows: Sequence[Row]
    folder: Path
    apart: bool = False

    @property
    def digest(self) -> str:
        """Tells these rows, and the files of this machine that they name, from others: by their places, sizes and times."""
        told = [{name: self._told(name, value) for name, value in row.items()} for row in self.rows]
        return sha256(canonical_json(told)).hexdigest()

    def _told(self, column: str, value: object) -> str:
        if not column.startswith(INDEX_PATH) or not _cell(value):
            return _cell(value)
        address = self._address(value)
        try:
            found = None if "://" in address else Path(address).stat()
        except (OSError, ValueError):
            return f"{address} is not there"
        return address if found is None else f"{address} {found.st_size} {found.st_mtime_ns}"

    def _address(self, value: object) -> str:
        return _cell(value) if "://" in _cell(value) else str(self.folder / _cell(value))

    def require_whole(self) -> None:
        """Check what is true of all of a plate's rows.

        Raises:
            LayoutError: they lie apart, are of several batches, or name a file twice.
        """
        if self.apart:
            raise LayoutError(
                f"the rows of plate {self.name} lie apart in the index, or two plates have that name: sort it by plate, and "
                "give each a name of its own"
            )
        batches = {tuple(_cell(row[name]) for name in INDEX_KEYS[:2]) for row in self.rows}
        if len(batches) > 1:
            told = ", ".join(" ".join(names) for names in sorted(batches)[:4])
            raise LayoutError(f"plates of one name in several batches: {self.name} in {told}; give them names of their own")
        named = Counter(_cell(row[column]) for row in self.rows for column in row if column.startswith(INDEX_PATH))
        again = sorted(path for path, times in named.items() if path and times > 1)
        if again:
            raise LayoutError(f"plate {self.name}: {again[0]} is given for two planes: a plane has a file of its own")

    def planes(self, channels: Sequence[str], role: Role) -> dict[PlaneKey, str | None]:
        """Where the planes of a role's wells lie: an address, or an absolute path, each; None where the index has none.

        Raises:
            LayoutError, WellNameError: a row says what no plate has. DuplicatePlaneError: one says it again.
        """
        found: dict[PlaneKey, str | None] = {}
        for row in self.rows:
            if _role(row) is not role:
                continue
            well, site = parse_well(_cell(row[INDEX_WELL])), parse_site(_cell(row[INDEX_SITE]))
            for channel in channels:
                path, key = row.get(f"{INDEX_PATH}{channel}"), PlaneKey(well, site, channel)
                if key in found:
                    raise duplicate_plane(key, _cell(found[key]), _cell(path))
                found[key] = self._address(path) if _cell(path) else None
        return found

    @property
    def pixel_size_um(self) -> float | None:
        """Of its images; None where the index does not say.

        Raises:
            LayoutError: it says several, or what is no length.
        """
        told = {_cell(row.get(INDEX_SIZE)) for row in self.rows} - {"", "nan"}
        try:
            sizes = {rounded_pixel_size_um(float(text)) for text in told}
        except ValueError:
            sizes = {float("nan")}
        if not all(0 < size <= MAX_PIXEL_SIZE_UM for size in sizes) or len(sizes) > 1:
            raise LayoutError(f"plate {self.name} has no one pixel size in µm, but {', '.join(sorted(told)[:4])}")
        return sizes.pop() if sizes else None

    @property
    def platemap(self) -> PlateMap:
        """What the index says of wells: the columns whose cells are the same at all sites of each.

        Raises:
            LayoutError, WellNameError: a well has several roles, or is none.
        """
        wells: dict[str, list[Row]] = {}
        for row in self.rows:
            wells.setdefault(parse_well(_cell(row[INDEX_WELL])), []).append(row)
        roles = {well: {_role(row) for row in rows} for well, rows in wells.items()}
        several = sorted(well for well, found in roles.items() if len(found) > 1)
        if several:
            raise LayoutError(f"wells of plate {self.name} are both control and treated: {', '.join(several[:8])}")
        names = [name for name in self.rows[0] if name not in (INDEX_PLATE, INDEX_WELL) and not name.startswith(INDEX_PATH)]
        columns = [name for name in names if all(len({_cell(row[name]) for row in rows}) == 1 for rows in wells.values())]
        cells = {well: tuple(_cell(rows[0][name]) for name in columns) for well, rows in wells.items()}
        return PlateMap(("well", *columns), {well: (well, *row) for well, row in cells.items()}, {
            well: next(iter(found)) for well, found in roles.items()
        })  # fmt: skip


@dataclass(frozen=True)
class ScreenIndex:
    """An index on disk."""

    path: Path
    names: tuple[str, ...]
    """Every plate, once, in the order of the rows."""
    apart: frozenset[str]
    """Those whose rows do not lie together."""

    @classmethod
    def open(cls, path: Path) -> "ScreenIndex":
        """Look at an index's columns, and at the names of its plates.

        Raises:
            LayoutError: it is none.
        """
        columns = next(_batches(path)).schema.names
        missing = [name for name in (*INDEX_KEYS, INDEX_ROLE) if name not in columns]
        if missing or not any(name.startswith(INDEX_PATH) for name in columns):
            hint = "; its columns are to be separated by commas" if len(columns) == 1 and ";" in columns[0] else ""
            raise LayoutError(f"the index {path} lacks the columns {', '.join(missing) or 'Path_<channel>'}{hint}")
        runs = [name for name, _ in groupby(name for batch in _batches(path, [INDEX_PLATE]) for name in _plates(batch))]
        if "" in runs:
            raise LayoutError(f"the index {path} has rows without a {INDEX_PLATE}")
        return cls(path, tuple(dict.fromkeys(runs)), frozenset(name for name, times in Counter(runs).items() if times > 1))

    def plates(self) -> Iterator[IndexedPlate]:
        """Every plate, one after the other; of one whose rows lie apart, the first of them."""
        seen: set[str] = set()
        folder = self.path.parent.resolve()
        rows = (row for batch in _batches(self.path) for row in batch.to_pylist())
        for name, found in groupby(rows, key=lambda row: _cell(row[INDEX_PLATE])):
            if name not in seen:
                seen.add(name)
                yield IndexedPlate(name, list(found), folder, apart=name in self.apart)

    def plate(self, name: str) -> IndexedPlate:
        """One plate by its name; of one whose rows lie apart, all of them.

        Raises:
            LayoutError: there is none.
        """
        rows = [row for batch in _batches(self.path, plate=name) for row in _of_plate(batch, name).to_pylist()]
        return IndexedPlate(name, rows, self.path.parent.resolve(), apart=name in self.apart)


def _of_plate(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    return batch.filter(pc.equal(pc.cast(batch.column(INDEX_PLATE), pa.string()), name))


def _plates(batch: pa.RecordBatch) -> Iterator[str]:
    return (_cell(name) for name in batch.column(0).to_pylist())


def _batches(path: Path, columns: Sequence[str] | None = None, plate: str | None = None) -> Iterator[pa.RecordBatch]:
    """Give an index's rows, many at once; of ``plate``, at least its own.

    Raises:
        LayoutError: it cannot be read, or has none.
    """
    rows = 0
    try:
        for batch in _read(path, columns, plate):
            rows += len(batch)
            yield batch
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LayoutError(f"the index {path} cannot be read: {str(error)[:200]}") from None
    if not rows:
        raise LayoutError(f"the index {path} has no rows")


def _read(path: Path, columns: Sequence[str] | None, plate: str | None) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(_ROWS_AT_ONCE, row_groups=_groups_with(file, plate), columns=columns)
        return
    with path.open(encoding="utf-8-sig", newline="") as text:
        names = next(csv_reader(text), [])
    kinds = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), include_columns=columns, strings_can_be_null=False
    )
    yield from csv.open_csv(path, convert_options=kinds)


def _groups_with(file: parquet.ParquetFile, plate: str | None) -> list[int]:
    """Row groups that may have rows of a plate, as far as the file tells what is in them."""
    groups = []
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        told = next((column.statistics for column in columns if column.path_in_schema == INDEX_PLATE), None)
        if plate is None or told is None or not isinstance(told.min, str) or told.min <= plate <= told.max:
            groups.append(number)
    return groups


def _role(row: Row) -> Role:
    well, told = _cell(row[INDEX_WELL]), _cell(row[INDEX_ROLE])
    if not told.strip():
        raise LayoutError(f"well {well} has no role: say control or treated")
    return parse_role(well, told)


def _cell(value: object) -> str:
    return "" if value is None else str(value)
