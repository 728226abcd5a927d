"""The operator's commands, on the store itself: API keys, the audit log, and rebuilding a flushed Redis."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from service import audit
from service.access import Keys, Scope
from service.deeds import DEFAULT_TENANT
from service.errors import StartError
from service.settings import StorageSettings
from service.storage import RECORDS_FILE, Storage, rebuild_records
from service.terminal import err, out

BROKEN_CHAIN = 4
"""Exit code of ``audit verify`` when the chain does not hold."""

keys = typer.Typer(name="keys", help="API keys: made, listed, revoked.", no_args_is_help=True)
audits = typer.Typer(name="audit", help="The audit log of every write.", no_args_is_help=True)

_Data = Annotated[Path | None, typer.Option(help="directory of everything kept (ANCHORWELL_DATA)")]


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="whose batches it opens")] = DEFAULT_TENANT,
    scope: Annotated[list[Scope] | None, typer.Option(help="what it may do; again for another one")] = None,
    days: Annotated[float | None, typer.Option(help="days until it expires; never without")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="most requests a minute")] = None,
    bytes_per_day: Annotated[int | None, typer.Option(min=1, help="most bytes sent a day")] = None,
    note: Annotated[str, typer.Option(help="who has it, what for")] = "",
    data: _Data = None,
) -> None:
    """Make a key and print its token, which is told this once; without --scope it may read and write."""
    storage = _open(data, new=True)
    key, token = Keys(storage.records).create(
        tenant,
        scope or [Scope.READ, Scope.WRITE],
        days=days,
        requests_per_minute=requests_per_minute,
        bytes_per_day=bytes_per_day,
        note=note,
    )
    storage.close()
    until = "never expires" if key.expires_at is None else f"expires {key.expires_at:%Y-%m-%d %H:%M} UTC"
    err.print(f"key {key.key_id} of tenant {key.tenant} ({', '.join(sorted(key.scopes))}), {until}", highlight=False)
    sys.stdout.write(token + "\n")


@keys.command("list")
def list_keys(data: _Data = None) -> None:
    """List keys; their secrets are not kept."""
    storage = _open(data)
    table = Table()
    for name in ("key", "tenant", "scopes", "created", "expires", "revoked"):
        table.add_column(name, no_wrap=name == "key", overflow="fold")
    for name in ("a minute", "bytes a day", "note"):
        table.add_column(name, overflow="fold")
    for key in Keys(storage.records).all():
        times = (key.created_at, key.expires_at, key.revoked_at)
        limits = ("" if limit is None else f"{limit:,}" for limit in (key.requests_per_minute, key.bytes_per_day))
        table.add_row(key.key_id, key.tenant, " ".join(sorted(key.scopes)), *map(_day, times), *limits, escape(key.note))
    storage.close()
    out.print(table, highlight=False)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="as list shows it")], data: _Data = None) -> None:
    """Let a key open nothing more, within seconds and without a restart."""
    storage = _open(data)
    key = Keys(storage.records).revoke(key_id)
    storage.close()
    out.print(f"key {key.key_id} of tenant {key.tenant} is revoked", highlight=False)


@audits.command("verify")
def verify_audit(
    expect: Annotated[str | None, typer.Option(help="hash that the chain ended with before; it must still be in it")] = None,
    data: _Data = None,
) -> None:
    """Check every link of the audit log; exits with 4 when one does not hold."""
    storage = _open(data)
    verdict = audit.verify(storage.records, expect)
    storage.close()
    if verdict.fault is not None:
        err.print(f"[bold red]broken[/]  {verdict.fault}", highlight=False, soft_wrap=True)
        raise typer.Exit(BROKEN_CHAIN)
    out.print(f"{verdict.entries} entries hold; the chain ends with {verdict.end}", highlight=False, soft_wrap=True)


@audits.command("show")
def show_audit(data: _Data = None) -> None:
    """Print every entry as a line of JSON, oldest first."""
    storage = _open(data)
    for entry in audit.entries(storage.records):
        sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
    storage.close()


def restore(data: _Data = None) -> None:
    """Rebuild the records of a Redis that was flushed, from the journal in the object storage; running services go on."""
    settings = StorageSettings.given(data=data)
    if settings.redis is None:
        raise StartError("records are kept in a file, not in Redis: put records.db back from a backup instead")
    count = rebuild_records(settings.data, settings.redis, settings.objects)
    out.print(f"restored {count} records", highlight=False)


def _open(data: Path | None, *, new: bool = False) -> Storage:
    """Open the lab; a mistyped directory is not taken for an empty one.

    Raises:
        StartError: there is none.
    """
    settings = StorageSettings.given(data=data)
    if not (new or settings.redis or (settings.data / RECORDS_FILE).is_file()):
        raise StartError(f"there is no lab in {settings.data}: say --data, or set ANCHORWELL_DATA")
    return settings.open_storage()


def _day(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M}"
