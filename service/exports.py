"""Forms that kept answers are given in, and which of them a request asks for."""

from collections.abc import Sequence

from service import schemas
from service.errors import NotAcceptableError

CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"


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


def file_of(form: str, kept: schemas.KeptPredictions, columns: Sequence[str], classes: Sequence[str]) -> bytes:
    """Write answers as CSV or Parquet, with a plate map's columns and the served bundle's classes."""
    from service import arrow  # noqa: PLC0415 (few ask for a file)

    rows = arrow.table(kept, columns, classes)
    return arrow.csv_bytes(rows) if form == CSV else arrow.parquet_bytes(rows)
