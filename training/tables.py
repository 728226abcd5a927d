"""Tables of text with their rows as in the file, and all that is wrong with them.

Knows nothing of what the columns mean. A CSV's header is row 1, a Parquet file's first row is row 1.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from model.errors import LayoutError

ROW = "_row"


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
    """Name rows: 2, 5-7."""
    numbers = np.unique(rows)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


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
    """A table's rows as text, with ``_row`` as in the file; cells that are empty are empty text."""

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
    """Read a table's bytes: Parquet, CSV or TSV, gzipped or not, by the name's ending; None where it cannot be read."""
    try:
        if name.endswith(".parquet"):
            rows = pd.read_parquet(io.BytesIO(data))
            rows = rows.astype(object).where(rows.notna(), "").astype(str)
            first = 1
        else:
            plain = name.removesuffix(".gz")
            rows = pd.read_csv(
                io.BytesIO(data),
                sep="\t" if plain.endswith((".tsv", ".txt")) else ",",
                dtype=str,
                keep_default_na=False,
                skip_blank_lines=False,
                compression="gzip" if name.endswith(".gz") else None,
                index_col=False,
            ).fillna("")
            first = 2
    except (ValueError, OSError, EOFError) as error:
        problems.error(name, f"it cannot be read: {str(error).strip()[:300]}")
        return None
    rows[ROW] = np.arange(first, first + len(rows))
    return Table(name, rows)


def looked_up(column: pd.Series, values: Mapping[str, str], otherwise: str = "") -> pd.Series:
    """Return a column's cells looked up in a mapping."""
    return column.map({name: values.get(name, otherwise) for name in column.unique()}).astype(str)
