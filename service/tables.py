"""Tables that strangers send: CSV, TSV and JSON by ``model.tables``; Parquet here, within the same bounds."""

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from model.errors import LayoutError
from model.tables import MAX_CELLS, MAX_ROWS, MAX_TABLE_BYTES, Table, read_table, table_of, too_large

_MAGIC = b"PAR1"
_ROWS_AT_ONCE = 2_048
MAX_UNPACKED_BYTES = 128 << 20


def table_of_any_kind(data: bytes) -> Table:
    """Read a table of any of the kinds.

    Raises:
        LayoutError: it cannot be read. TableTooLargeError: it has more rows or cells than are taken.
    """
    return _parquet_table(data) if data[:4] == _MAGIC else read_table(data)


def _parquet_table(data: bytes) -> Table:
    """Read Parquet columns that are text, numbers or truth values; other columns (lists, binary) are left out."""
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        names = [field.name for field in schema if _is_plain(field.type)]
        texts = [field.name for field in schema if _is_text(field.type)]
        file = parquet.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        _require_room(file.metadata)
        return table_of(names, _parquet_rows(file, names))
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise LayoutError(f"the table is not valid Parquet: {str(error)[:120]}") from None


def _require_room(told: parquet.FileMetaData) -> None:
    """Check what a file says of its own size, before any of it is unpacked."""
    groups = [told.row_group(number) for number in range(told.num_row_groups)]
    unpacked = sum(group.column(number).total_uncompressed_size for group in groups for number in range(group.num_columns))
    for found, most, what in (
        (told.num_rows, MAX_ROWS, "rows"),
        (told.num_rows * told.num_columns, MAX_CELLS, "cells"),
        (unpacked, MAX_UNPACKED_BYTES, "bytes, unpacked"),
    ):
        if found > most:
            raise too_large(most, what)


def _parquet_rows(file: parquet.ParquetFile, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Give the rows; columns are unpacked one after the other, for a dictionary costs more than the text it stands for."""
    columns: list[pa.ChunkedArray] = []
    room = MAX_TABLE_BYTES
    for name in names:
        column = file.read(columns=[name], use_threads=False).column(0)
        room -= sum(_text_bytes(chunk) for chunk in column.chunks)
        if room < 0:
            raise too_large(MAX_TABLE_BYTES, "bytes")
        columns.append(pa.chunked_array([_plain(chunk) for chunk in column.chunks]) if column.num_chunks else column)
    for start in range(0, file.metadata.num_rows, _ROWS_AT_ONCE):
        yield from zip(*(_cells(column.slice(start, _ROWS_AT_ONCE)) for column in columns), strict=True)


def _text_bytes(chunk: pa.Array) -> int:
    """How many bytes a dictionary's text has when each of its words is written out where it stands."""
    if not pa.types.is_dictionary(chunk.type) or not _is_text(chunk.type):
        return 0
    return int(pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0)


def _plain(chunk: pa.Array) -> pa.Array:
    return chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk


def _cells(column: pa.ChunkedArray) -> list[str]:
    return ["" if cell is None else str(cell) for cell in column.to_pylist()]


def _is_plain(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(_is_text(value) or pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_boolean(value))


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))
