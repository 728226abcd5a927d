"""Tables of text with their rows as in the file, and all that is wrong with them.

Knows nothing of what the columns mean. A CSV's header is row 1, a Parquet file's first row is row 1.
"""

import csv
import gzip
import io
import zlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.errors import LayoutError

ROW = "_row"
_ROWS_AT_ONCE = 2_000
_RANGES_TOLD = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong with a table; ``rows`` as in the file."""

    file: str
    rows: tuple[int, ...]
    detail: str

    def __str__(self) -> str:
        where = f" {'row' if len(self.rows) == 1 else 'rows'} {_ranges(self.rows)}" if self.rows else ""
        return f"{self.file}{where}: {self.detail}"


def _ranges(rows: Sequence[int]) -> str:
    """Name rows: 2, 5-7; the first of them where they are many."""
    numbers = np.unique(rows)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    told = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts[:_RANGES_TOLD]]
    return ", ".join([*told, *["…"] * (len(parts) > _RANGES_TOLD)])


@dataclass
class Problems:
    """All that is wrong: ``errors`` stop, ``warnings`` do not."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def error(self, file: str, detail: str, rows: Iterable[int] = ()) -> None:
        self.errors.append(Problem(file, tuple(sorted(set(rows))), detail))

    def warn(self, file: str, detail: str, rows: Iterable[int] = ()) -> None:
        self.warnings.append(Problem(file, tuple(sorted(set(rows))), detail))

    def each(self, table: "Table", bad: pd.Series, say: str, **names: str) -> None:
        """Report bad rows, those together of which the same is said; ``say`` is filled in from their cells and ``names``."""
        rows = table.rows[bad.to_numpy(dtype=bool)]
        if len(rows):
            said = [
                say.format_map({**names, **dict(zip(rows.columns, row, strict=True))}) for row in rows.to_numpy().tolist()
            ]
            for detail, same in rows.groupby(pd.Series(said, rows.index), sort=False):
                self.error(table.file, str(detail), same[ROW])

    def stop(self) -> None:
        """Raise LayoutError with every error, if there is one."""
        if self.errors:
            listed = "\n".join(map(str, self.errors))
            raise LayoutError(f"{len(self.errors)} problems in the tables:\n{listed}")


@dataclass(frozen=True, eq=False)
class Table:
    """A table's rows as text without space around it, with ``_row`` as in the file; cells that are empty are empty text."""

    file: str
    rows: pd.DataFrame

    def lacks(self, columns: Sequence[str], problems: Problems) -> bool:
        """Report the columns that are not there; True where any is missing."""
        missing = [name for name in columns if name not in self.rows.columns]
        if missing:
            problems.error(self.file, f"no column {', '.join(missing)}; it has {', '.join(self.columns[:40])}")
        return bool(missing)

    @property
    def columns(self) -> list[str]:
        """Columns of the file."""
        return [name for name in self.rows.columns if name != ROW]

    def where(self, chosen: pd.Series) -> "Table":
        """Return some of the rows."""
        return Table(self.file, self.rows[chosen.to_numpy(dtype=bool)].reset_index(drop=True))

    def with_columns(self, **columns: pd.Series) -> "Table":
        """Return the table with columns put in."""
        return Table(self.file, self.rows.assign(**columns))

    def report_twice(self, keys: Sequence[str], what: str, problems: Problems) -> None:
        """Report rows that have the keys of an earlier one."""
        first = self.rows.groupby(list(keys), sort=False)[ROW].transform("min")
        twice = self.rows.assign(_first=first)[first != self.rows[ROW]]
        for (*values, earlier), same in twice.groupby([*keys, "_first"], sort=False):
            problems.error(self.file, f"{what} {' '.join(map(str, values))} is in row {earlier} already", same[ROW])


def read_table(name: str, data: bytes, problems: Problems) -> Table | None:
    """Read a table's bytes: Parquet, CSV or TSV, gzipped or not, by the name's ending; None where it cannot be read.

    Every row of a CSV is as wide as its header; rows without a filled cell are left out.
    """
    try:
        return _parquet(name, data) if name.endswith(".parquet") else _csv(name, data, problems)
    except (ValueError, OSError, EOFError, zlib.error, pa.ArrowException) as error:
        problems.error(name, f"it cannot be read: {str(error).strip()[:300]}")
        return None


def _table(name: str, columns: Sequence[str], cells: Sequence[pa.ChunkedArray], rows: NDArray[np.int64]) -> Table:
    names = [column.strip() for column in columns]
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise ValueError(f"its header names a column twice: {', '.join(twice)}")
    stripped = [pc.utf8_trim_whitespace(column) for column in cells]
    return Table(name, pa.table(stripped, names).combine_chunks().to_pandas().assign(**{ROW: rows}))


def _parquet(name: str, data: bytes) -> Table:
    table = pq.ParquetFile(pa.BufferReader(data)).read()
    return _table(name, table.column_names, [_text(column) for column in table.columns], np.arange(1, len(table) + 1))


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.large_string()).fill_null("")


def _csv(name: str, data: bytes, problems: Problems) -> Table | None:
    plain = gzip.decompress(data) if name.endswith(".gz") else data
    delimiter = "\t" if name.removesuffix(".gz").endswith((".tsv", ".txt")) else ","
    blocks = _blocks(io.TextIOWrapper(io.BytesIO(plain), "utf-8-sig", newline=""), delimiter)
    (header,) = next(blocks) or [[]]
    if not header:
        raise ValueError("its first line names no columns")
    numbers, parts, others = [np.zeros(0, np.int64)], [], defaultdict[int, list[int]](list)
    first = 2
    for block in blocks:
        rows, cells = _whole_rows(block, first, len(header), others)
        numbers.append(rows)
        parts.append(cells)
        first += len(block)
    for width, same in others.items():
        problems.error(name, f"{width} cells in a row, where the header names {len(header)} columns", same)
    if others:
        return None
    columns = [pa.chunked_array([part[at] for part in parts], pa.large_string()) for at in range(len(header))]
    return _table(name, header, columns, np.concatenate(numbers))


def _whole_rows(
    block: Sequence[Sequence[str]], first: int, width: int, others: dict[int, list[int]]
) -> tuple[NDArray[np.int64], list[pa.Array]]:
    """Return the numbers and the columns of the rows that have a filled cell; put those of another width into ``others``."""
    widths = np.fromiter(map(len, block), np.int64, len(block))
    filled = np.fromiter(map(any, block), bool, len(block))
    for at in np.flatnonzero(filled & (widths != width)):
        others[int(widths[at])].append(first + int(at))
    whole = filled & (widths == width)
    cells = list(zip(*compress(block, whole), strict=True)) or [()] * width
    return first + np.flatnonzero(whole), [pa.array(column, pa.large_string()) for column in cells]


def _blocks(lines: Iterable[str], delimiter: str) -> Iterator[list[list[str]]]:
    """Give a CSV's header, then its rows, many at once; a blank line is a row of no cells."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield list(islice(reader, 1))
        while block := list(islice(reader, _ROWS_AT_ONCE)):
            yield block
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def looked_up(column: pd.Series, values: Mapping[str, str], otherwise: str = "") -> pd.Series:
    """Return a column's cells looked up in a mapping."""
    return column.map({name: values.get(name, otherwise) for name in column.unique()}).astype(str)


def among(column: pd.Series, values: Container[str]) -> pd.Series:
    """Return which of a column's cells are among the values: faster than ``isin`` where cells are repeated."""
    return column.map({cell: cell in values for cell in column.unique()}).astype(bool)
