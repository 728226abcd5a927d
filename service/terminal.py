"""What the command lines say to people, and how they end: what is wrong with input is one line and exit code 1."""

import sys

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.markup import escape

from model.errors import AnchorwellError

_FLAGS = {
    "?replace=true": "--replace",
    "?context=": "--context ",
    "POST …/controls?role=panel": "adapt --panel",
    "send channels": "give --channels",
    "send pixel_size_um": "give --pixel-size-um",
}
out = Console()
err = Console(stderr=True)


def run(app: typer.Typer, *refusals: type[Exception]) -> None:
    """Run a command line; errors of these further types are told as the project's own are."""
    ours: tuple[type[Exception], ...] = (AnchorwellError, OSError, *refusals)
    try:
        app()
    except SettingsError as error:
        _end(f"{error}: it is not JSON")
    except ValidationError as error:
        _end("; ".join(_setting_fault(item["loc"], item["type"], item["msg"]) for item in error.errors()))
    except ours as error:
        _end(in_flags(str(error)))


def in_flags(text: str) -> str:
    """Name this command line's flags where the service names its own fields."""
    for field, flag in _FLAGS.items():
        text = text.replace(field, flag)
    return text


def _end(told: str) -> None:
    err.print(f"[bold red]error[/]  {escape(told)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _setting_fault(place: tuple[str | int, ...], kind: str, reason: str) -> str:
    name = ".".join(map(str, place))
    if kind == "missing":
        return f"no {name} is given: say --{name}, or set ANCHORWELL_{name.upper()}"
    return f"setting {name}: {reason}"
