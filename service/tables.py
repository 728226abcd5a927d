"""Tables that strangers send, as rows of text: CSV, TSV and JSON by ``model.layout``; Parquet here."""

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
from pyarrow import parquet

from model.errors import LayoutError
from model.layout import read_table
from service.errors import UploadTooLargeError
from service.multipart import utf8

_MAGIC = b"PAR1"
MAX_CELLS = 5_000_000


def rows_of(data: bytes, name: str) -> Sequence[Mapping[str, str]]:
    """Read a table of any of the kinds.

    Raises:
        LayoutError, InvalidRequestError: it cannot be read. UploadTooLargeError: it has too many cells.
    """
    return _parquet_rows(data) if data[:4] == _MAGIC else read_table(utf8(data, name))


def _parquet_rows(data: bytes) -> Sequence[Mapping[str, str]]:
    """Read Parquet columns that are text, numbers or truth values; other columns (lists, binary) are left out."""
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows * file.metadata.num_columns > MAX_CELLS:
            raise UploadTooLargeError(f"the table has more than {MAX_CELLS:,} cells")
        names = [field.name for field in file.schema_arrow if _is_plain(field.type)]
        table = file.read(columns=names)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise LayoutError(f"the table is not valid Parquet: {str(error)[:120]}") from None
    columns = {name: ["" if cell is None else str(cell) for cell in table[name].to_pylist()] for name in names}
    if not table.num_rows or not columns:
        raise LayoutError("the table has no rows")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_plain(kind: pa.DataType) -> bool:
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(text)
        or pa.types.is_large_string(text)
        or pa.types.is_integer(text)
        or pa.types.is_floating(text)
        or pa.types.is_boolean(text)
    )
