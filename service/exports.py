"""Kept answers as tables: CSV and Parquet, one row a well, as pycytominer reads profiles.

Columns: ``Metadata_Plate``, ``Metadata_Well``, the plate map's own as ``Metadata_…``, the answer, one ``p_…`` a class, and
the embedding as ``Embedding_0000…``.
"""

import io
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import csv, parquet

from model.layout import WELL_COLUMNS
from service import schemas
from service.errors import NotAcceptableError

CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
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


def chosen_form(asked: str | None, accept: str) -> str:
    """Return the media type to answer with: the one asked for by name, or the one that an Accept header likes best.

    Raises:
        NotAcceptableError: the header takes none of the three.
    """
    if asked is not None:
        return {"json": JSON, "csv": CSV, "parquet": PARQUET}[asked]
    likings = [(_liking(accept, form), form) for form in (JSON, CSV, PARQUET)]
    best = max(liking for liking, _ in likings)
    if best <= 0:
        raise NotAcceptableError(f"answers are given as {JSON}, {CSV} or {PARQUET}; the Accept header takes none")
    return next(form for liking, form in likings if liking == best)


def _liking(accept: str, form: str) -> float:
    """The quality that the most specific range of an Accept header gives a media type."""
    found = {}
    for item in accept.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((part.removeprefix("q=") for part in parameters if part.startswith("q=")), "1")
        found[name] = float(quality) if quality.replace(".", "", 1).isdecimal() else 0.0
    ranges = (form, f"{form.partition('/')[0]}/*", "*/*")
    return next((found[name] for name in ranges if name in found), 0.0)


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
