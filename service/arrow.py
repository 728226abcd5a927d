"""Tables by Arrow: Parquet that strangers send, within bounds, and kept answers as CSV and Parquet.

To be imported when a table is there: it takes 46 MB and a tenth of a second, and most processes never need it.

Of answers a well is a row, as pycytominer reads profiles: ``Metadata_Plate``, ``Metadata_Well``, the plate map's own columns
as ``Metadata_…``, the answer, one ``p_…`` a class, and the embedding as ``Embedding_0000…``.
"""

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from model.errors import LayoutError
from model.layout import WELL_COLUMNS
from model.tables import MAX_CELLS, MAX_ROWS, MAX_TABLE_BYTES, Table, table_of, too_large
from service import schemas

_ROWS_AT_ONCE = 2_048
MAX_UNPACKED_BYTES = 128 << 20
_METADATA = "Metadata_"
_ANSWER = (
    "label",
    "probability",
    "entropy",
    "sites",
    "spread",
    "distance_to_controls",
    "distance_to_class",
    "resembles_controls",
    "out_of_range",
    "control",
    "stale",
    "context",
    "statistics_id",
    "bundle",
    "answered_at",
)


# --- Parquet that is sent --------------------------------------------------------------------------------------------


def parquet_table(data: bytes) -> Table:
    """Read Parquet columns that are text, numbers or truth values; other columns (lists, binary) are left out.

    Raises:
        LayoutError: it cannot be read. TableTooLargeError: it has more rows or cells than are taken.
    """
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


# --- answers ---------------------------------------------------------------------------------------------------------


def table(kept: schemas.KeptPredictions, columns: Sequence[str], classes: Sequence[str]) -> pa.Table:
    """One row a well.

    Args:
        kept: the answers.
        columns: those of the plate map, in its order.
        classes: the served bundle's; those of wells that an older bundle answered follow.
    """
    wells = kept.wells
    values: dict[str, pa.Array] = {
        f"{_METADATA}Plate": pa.array([well.plate for well in wells], pa.string()),
        f"{_METADATA}Well": pa.array([well.well for well in wells], pa.string()),
    }
    for column in columns:
        name = column if column.startswith(_METADATA) else f"{_METADATA}{column}"
        if column.casefold() not in WELL_COLUMNS and name not in values:
            values[name] = pa.array([well.platemap.get(column) for well in wells], pa.string())
    for name in _ANSWER:
        values[name] = pa.array([getattr(well, name) for well in wells], _type_of(name))
    values["sites_refused"] = pa.array([len(well.refused) for well in wells], pa.int64())
    for label in dict.fromkeys([*classes, *(name for well in wells for name in well.probabilities)]):
        values[f"p_{label}"] = pa.array([well.probabilities.get(label) for well in wells], pa.float64())
    width = max((len(well.embedding) for well in wells), default=0)
    for at in range(width):
        values[f"Embedding_{at:04d}"] = pa.array([_at(well.embedding, at) for well in wells], pa.float32())
    return pa.table(values)


def csv_bytes(rows: pa.Table) -> bytes:
    """Serialise as CSV with a header."""
    buffer = io.BytesIO()
    csv.write_csv(rows, buffer)
    return buffer.getvalue()


def parquet_bytes(rows: pa.Table) -> bytes:
    """Serialise as Parquet."""
    buffer = io.BytesIO()
    parquet.write_table(rows, buffer)
    return buffer.getvalue()


def _type_of(name: str) -> pa.DataType:
    kinds = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    annotation = schemas.KeptPrediction.model_fields[name].annotation
    return next((kind for python, kind in kinds.items() if annotation in (python, python | None)), pa.timestamp("us", "UTC"))


def _at(embedding: Sequence[float], at: int) -> float | None:
    return embedding[at] if at < len(embedding) else None
