"""Tables that strangers send: CSV, TSV and JSON by ``model.tables``, Parquet by ``service.arrow``."""

from model.tables import Table, read_table

_PARQUET = b"PAR1"


def table_of_any_kind(data: bytes) -> Table:
    """Read a table of any of the kinds.

    Raises:
        LayoutError: it cannot be read. TableTooLargeError: it has more rows or cells than are taken.
    """
    if not data.startswith(_PARQUET):
        return read_table(data)
    from service.arrow import parquet_table  # noqa: PLC0415 (few send one)

    return parquet_table(data)
