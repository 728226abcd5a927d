"""Tables that say things of a plate: CSV, TSV and JSON as rows of text.

Knows nothing of wells or files. A table is read row by row and kept about as small as it was sent, within bounds on its
rows, its cells and the length of a row: whatever a stranger sends, it costs little.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from model.errors import LayoutError, TableTooLargeError

MAX_ROWS = 400_000
"""Twice the planes of a 1536-well plate of 16 sites and 8 channels, a row each."""
MAX_CELLS = 5_000_000
MAX_ROW_BYTES = 500_000
MAX_TABLE_BYTES = 64 << 20
MAX_JSON_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = b"\r\n "
_BETWEEN = "\0"


@dataclass(frozen=True)
class Table:
    """Rows of text under one header; each row is kept as its UTF-8, with a NUL between its cells."""

    columns: tuple[str, ...]
    packed: Sequence[bytes]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.packed)

    def __iter__(self) -> Iterator[Mapping[str, str]]:
        """Give the rows, their cells by column."""
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows())

    def rows(self) -> Iterator[list[str]]:
        """Give the rows, their cells in the order of the columns."""
        return (row.decode().split(_BETWEEN) for row in self.packed)

    def column(self, name: str) -> Iterator[str]:
        """Give the cells of a column; none of one that there is not."""
        if name not in self.columns:
            return iter(())
        place = self.columns.index(name)
        return (row[place] for row in self.rows())


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Keep rows as a table, while they come; each has a cell for every column.

    Raises:
        LayoutError: no row or column, a column named twice, or what is no text. TableTooLargeError: more than is taken.
    """
    names = tuple(columns)
    _packed(names)
    if not names or len(set(names)) != len(names):
        raise LayoutError("the header of the table names a column twice" if names else "the table has no columns")
    packed: list[bytes] = []
    size = 0
    for number, row in enumerate(rows, start=1):
        _require_room(number, number * len(names), size)
        packed.append(_packed(row))
        size += len(packed[-1])
    if not packed:
        raise LayoutError("the table has no rows")
    return Table(names, packed)


def _require_room(rows: int, cells: int, size: int) -> None:
    for found, most, what in (
        (rows, MAX_ROWS, "rows"),
        (cells, MAX_CELLS, "cells"),
        (size, MAX_TABLE_BYTES, "bytes"),
    ):
        if found > most:
            raise too_large(most, what)


def too_large(most: int, what: str) -> TableTooLargeError:
    """Say that a table has more of something than is taken."""
    return TableTooLargeError(f"the table has more than {most:,} {what}: send a table of these images alone")


def _packed(cells: Sequence[str]) -> bytes:
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        raise _row_too_long()
    text = _BETWEEN.join(cells)
    if text.count(_BETWEEN) >= max(len(cells), 1):
        raise LayoutError("the table has a NUL character in it: is it UTF-8 text?")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise LayoutError("the table has half a surrogate pair in it, which is no character") from None


def _row_too_long() -> TableTooLargeError:
    return TableTooLargeError(f"a row of the table has more than {MAX_ROW_BYTES:,} bytes: is a quote not closed?")


def read_table(table: str | bytes) -> Table:
    """Read a CSV, TSV or JSON table: text, or its UTF-8.

    Raises:
        LayoutError: it is none. TableTooLargeError: it has more rows or cells than are taken.
    """
    data = table if isinstance(table, bytes) else _encoded(table)
    start = len(data) - len(data.removeprefix(_BOM).lstrip(_BLANK))
    end = len(data.rstrip(_BLANK))
    if data.startswith((b"[", b"{"), start):
        return _json_table(data[start:end])
    return _csv_table(_Lines(data, start, end))


def _encoded(text: str) -> bytes:
    try:
        return text.lstrip("\ufeff").encode()
    except UnicodeEncodeError:
        raise LayoutError("the table has half a surrogate pair in it, which is no character") from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise LayoutError("the table is not UTF-8 text") from None


# --- CSV -------------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a table, one after the other; no row may go on over too much of them."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self._data, self._at, self._end = data, start, end
        self._row = start
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._at >= self._end:
            raise StopIteration
        start, self._at = self._at, self._data.find(b"\n", self._at, self._end) + 1 or self._end
        self.number += 1
        if self.number > MAX_ROWS + 1:
            raise too_large(MAX_ROWS, "lines")
        if self._at - self._row > MAX_ROW_BYTES:
            raise _row_too_long()
        return _decoded(self._data[start : self._at])

    def next_row(self) -> None:
        """Say that the row ends with the line that was given last."""
        self._row = self._at

    def first(self) -> bytes:
        """Return the line that comes next, or as much of it as a row may have."""
        return self._data[self._at : min(self._end, self._at + MAX_ROW_BYTES)].partition(b"\n")[0]


def _csv_table(lines: _Lines) -> Table:
    first = lines.first()
    delimiter = next((mark for mark in ("\t", ",", ";") if mark.encode() in first), ",")
    rows = _csv_rows(lines, delimiter)
    header = next(rows, [])
    return table_of(header, _as_wide(rows, lines, len(header)))


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[list[str]]:
    try:
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            lines.next_row()
            if row:
                yield row
    except csv.Error as error:
        raise LayoutError(f"the table is not valid CSV: {error}") from None


def _as_wide(rows: Iterable[list[str]], lines: _Lines, width: int) -> Iterator[list[str]]:
    for row in rows:
        if len(row) != width:
            raise LayoutError(f"line {lines.number} of the table does not have the header's {width} columns")
        yield row


# --- JSON ------------------------------------------------------------------------------------------------------------

_SPACE = r"[ \t\r\n]*"
_LIST = re.compile(rf"\[{_SPACE}")
_OBJECT = re.compile(r'\{(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+\}')
_NEXT = re.compile(rf"{_SPACE}([,\]]){_SPACE}")


def _json_table(data: bytes) -> Table:
    if len(data) > MAX_JSON_BYTES:
        raise TableTooLargeError(f"a JSON table has at most {MAX_JSON_BYTES:,} bytes: send CSV or Parquet")
    objects = _json_objects(_decoded(data))
    first = next(objects, None)
    if first is None:
        raise LayoutError("the table has no rows")
    return table_of(tuple(first), _of_the_same_keys(first, objects))


def _json_objects(text: str) -> Iterator[dict[str, str]]:
    """Give the objects of a list, one after the other; none has an object or a list in it."""
    begin = _LIST.match(text)
    if begin is None:
        raise LayoutError("a JSON table is a list of objects")
    at, number = begin.end(), 0
    more = not text.startswith("]", at)
    at += 0 if more else 1
    while more:
        number += 1
        found, after = _OBJECT.match(text, at, at + MAX_ROW_BYTES), None
        if found is not None:
            yield _json_cells(found[0], number)
            after = _NEXT.match(text, found.end())
        if after is None:
            raise LayoutError(
                f"entry {number} of the JSON table is no object with plain values that ends within {MAX_ROW_BYTES:,} "
                "characters and is followed by another or by the list's end"
            )
        more, at = after[1] == ",", after.end()
    if at != len(text):
        raise LayoutError("the JSON table goes on after its list")


def _json_cells(text: str, number: int) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise LayoutError(f"object {number} of the table is not valid JSON: {error}") from None
    return {name: "" if cell is None else str(cell) for name, cell in found.items()}


def _of_the_same_keys(first: Mapping[str, str], others: Iterable[Mapping[str, str]]) -> Iterator[list[str]]:
    yield list(first.values())
    for number, row in enumerate(others, start=2):
        if row.keys() != first.keys():
            raise LayoutError(f"object {number} of the table does not have the keys of the first")
        yield [row[name] for name in first]
