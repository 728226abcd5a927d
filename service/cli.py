"""The command line: ``anchorwell serve`` runs the service, the other commands drive one through the client."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from model.errors import AnchorwellError
from model.layout import Role, parse_layout, parse_platemap, parse_well
from service import cli_operate, cli_screen, cli_serve, schemas
from service.client import (
    AnchorwellClient,
    Context,
    ProblemError,
    ServiceUnreachableError,
    StatisticsChangedError,
    well_of,
)
from service.terminal import err, in_flags, out, run
from service.watch import UNSETTLED, Form, Watcher

IMAGE_SUFFIXES = (".tif", ".tiff")
NOT_ADAPTED = 3
"""Exit code of ``adapt`` when the controls are kept but too few."""
WIDE = 100
"""Columns of a terminal from which every number of an answer is shown."""

app = typer.Typer(
    name="anchorwell",
    help="Classify microscopy plates against their own negative controls.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(cli_serve.serve)
app.command()(cli_serve.worker)
app.add_typer(cli_operate.keys)
app.add_typer(cli_operate.audits)
app.command("restore")(cli_operate.restore)
app.command("screen")(cli_screen.screen)

_Files = Annotated[list[Path], typer.Argument(help="images, or directories of them", exists=True)]
_Batch = Annotated[str, typer.Argument(help="the batch's id, normally the plate's barcode")]
_Url = Annotated[str, typer.Option(help="where the service listens", envvar="ANCHORWELL_URL")]
_API_KEY = "ANCHORWELL_API_KEY"
"""Variable with the API key: never an option, which other users of the machine could see."""
_Layout = Annotated[
    Path | None, typer.Option(help="CSV or JSON: file, well, site, channel; or a JUMP LoadData CSV", exists=True)
]
_Platemap = Annotated[
    Path | None, typer.Option(help="CSV or TSV that tells the control wells: only those adapt, the rest is predicted")
]
_Channels = Annotated[str | None, typer.Option(help="names of numbered channels, in order: DNA,ER,RNA; '-': not used")]
_PixelSize = Annotated[float | None, typer.Option(help="µm per pixel of the images")]
_Json = Annotated[bool, typer.Option("--json", help="print the answer as JSON")]
_DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Run the command line."""
    run(app, ProblemError, ServiceUnreachableError, StatisticsChangedError)


# --- adapt and predict -----------------------------------------------------------------------------------------------


@app.command()
def adapt(
    batch: _Batch,
    files: _Files,
    platemap: _Platemap = None,
    layout: _Layout = None,
    channels: _Channels = None,
    pixel_size_um: _PixelSize = None,
    replace: Annotated[bool, typer.Option("--replace", help="put other images in the place of kept ones")] = False,
    panel: Annotated[
        str | None, typer.Option(help="wells of the panel, C03,D07: they alone are sent, for a bundle trained with a panel")
    ] = None,
    url: _Url = _DEFAULT_URL,
    as_json: _Json = False,
) -> None:
    """Send a batch's negative controls, or its panel; the statistics are measured on all that are kept.

    Exits with 3 when they are kept, but more control wells are needed.
    """
    with _connected(url) as client, _progress("controls", hidden=as_json) as progress:
        table = _text(layout)
        paths = _images(files)
        if panel is not None:
            paths = _of_wells(paths, panel, table, client)
        else:
            if platemap is None:
                _refuse_folders(files)
            paths = _of_role(paths, platemap, table, client, Role.CONTROL)
        report = client.adapt(
            batch,
            paths,
            table,
            channels=_names(channels),
            pixel_size_um=pixel_size_um,
            replace=replace,
            panel=panel is not None,
            progress=progress,
        )
    _show(report, as_json, _report_table)
    if not report.adapted:
        raise typer.Exit(NOT_ADAPTED)


@app.command()
def predict(
    batch: _Batch,
    files: _Files,
    platemap: _Platemap = None,
    layout: _Layout = None,
    channels: _Channels = None,
    pixel_size_um: _PixelSize = None,
    context: Annotated[
        Context,
        typer.Option(
            help="blended: the statistics of few control wells, one or more, blended with the mean of the training plates; "
            "source: answer without adaptation"
        ),
    ] = "controls",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write one row a well to this file")] = None,
    url: _Url = _DEFAULT_URL,
    as_json: _Json = False,
) -> None:
    """Send a batch's treated wells and get one class each."""
    with _connected(url) as client, _progress("treated", hidden=as_json) as progress:
        table = _text(layout)
        paths = _of_role(_images(files), platemap, table, client, Role.TREATED)
        prediction = client.predict(
            batch,
            paths,
            table,
            channels=_names(channels),
            pixel_size_um=pixel_size_um,
            context=context,
            progress=progress,
        )
    if csv_file is not None:
        write_csv(prediction, csv_file)
    _show(prediction, as_json, _prediction_table)


@app.command()
def batches(url: _Url = _DEFAULT_URL, as_json: _Json = False) -> None:
    """List the batches that the service keeps."""
    with _connected(url) as client:
        _show(client.batches(), as_json, _batches_table)


def _connected(url: str) -> AnchorwellClient:
    return AnchorwellClient(url, api_key=os.environ.get(_API_KEY))


# --- watch -----------------------------------------------------------------------------------------------------------


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(help="where plates are dropped, a folder each", exists=True, file_okay=False)],
    settle_s: Annotated[float, typer.Option(help="seconds for which a folder must not have changed")] = 30.0,
    every_s: Annotated[float, typer.Option(help="seconds between looks")] = 5.0,
    channels: _Channels = None,
    pixel_size_um: _PixelSize = None,
    form: Annotated[Form, typer.Option("--format", help="of the answers")] = Form.CSV,
    partial: Annotated[bool, typer.Option("--partial", help="leave out wells of the plate map that have no images")] = False,
    once: Annotated[bool, typer.Option("--once", help="end when nothing is left to do")] = False,
    url: _Url = _DEFAULT_URL,
) -> None:
    """Adapt and classify every plate that is dropped with its plate map, each once; answers are written beside it.

    With --once it exits with 1 when plates are refused.
    """
    with _connected(url) as client:
        watcher = Watcher(client, directory, settle_s, form, _names(channels), pixel_size_um, partial)
        told: dict[str, str] = {}
        while True:
            for outcome in watcher.look():
                style = "green" if outcome.done else "red"
                out.print(f"[{style}]{outcome.batch_id}[/]  {escape(outcome.told)}", highlight=False, soft_wrap=True)
            for batch_id, reason in watcher.waiting.items():
                if reason not in (UNSETTLED, told.get(batch_id)):
                    _note(f"{batch_id} waits: {reason}")
            told = dict(watcher.waiting)
            if once and not watcher.has_work:
                break
            time.sleep(every_s)
    if watcher.refused:
        raise AnchorwellError(f"refused, as error.json in each tells: {', '.join(watcher.refused)}")


# --- files -----------------------------------------------------------------------------------------------------------


def _images(places: Iterable[Path]) -> list[Path]:
    """Return the files named, and the TIFFs below the directories named."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise AnchorwellError(f"{place} holds no .tif or .tiff file")
            found += inside
        else:
            found.append(place)
    return found


def _refuse_folders(files: Iterable[Path]) -> None:
    """Let no whole plate be taken for controls."""
    folder = next((place for place in files if place.is_dir()), None)
    if folder is not None:
        raise AnchorwellError(
            f"which wells of {folder} are controls? Give --platemap, or name the control images themselves"
        )


def _of_role(
    paths: list[Path], platemap: Path | None, layout: str | None, client: AnchorwellClient, role: Role
) -> list[Path]:
    """Return the images of wells with a role on the plate map; all of them without one."""
    places = None if layout is None else parse_layout(layout, client.model().channels).files
    wells = {path: well_of(path, places) for path in paths}
    if platemap is None:
        sent = sorted({well for well in wells.values() if well is not None})
        if role is Role.CONTROL and sent:
            _note(f"no plate map: {len(sent)} wells are taken for controls, {', '.join(sent)}")
        return paths
    left_out = 0 if places is None else sum(path.name not in places for path in paths)
    if left_out:
        _note(f"{left_out} of {len(paths)} image files are not in the layout and are not sent")
    roles = parse_platemap(_text(platemap) or "")
    unknown = sorted({well for well in wells.values() if well is not None} - set(roles))
    if unknown:
        raise AnchorwellError(f"the plate map {platemap} does not name well {', '.join(unknown[:5])}")
    chosen = [path for path, well in wells.items() if well is not None and roles[well] is role]
    if not chosen:
        raise AnchorwellError(f"none of the {len(paths)} images is of a {role} well on the plate map {platemap}")
    return chosen


def _of_wells(paths: list[Path], names: str, layout: str | None, client: AnchorwellClient) -> list[Path]:
    """Return the images of wells that are named, commas between."""
    places = None if layout is None else parse_layout(layout, client.model().channels).files
    wells = {path: well_of(path, places) for path in paths}
    wanted = {parse_well(name) for name in names.split(",")}
    absent = sorted(wanted.difference(wells.values()))
    if absent:
        raise AnchorwellError(f"none of the {len(paths)} images is of well {', '.join(absent[:5])}")
    return [path for path, well in wells.items() if well in wanted]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnchorwellError(f"{path} is not UTF-8 text: {error.reason}") from None


def _names(channels: str | None) -> list[str] | None:
    return None if channels is None else channels.split(",")


def write_csv(prediction: schemas.Prediction, path: Path) -> None:
    """Write one row a well, with what the answer stands on."""
    classes = list(prediction.wells[0].probabilities)
    columns = [name for name in schemas.WellPrediction.model_fields if name not in ("probabilities", "refused")]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "batch",
                *columns,
                "sites_refused",
                *(f"p_{name}" for name in classes),
                "adapted",
                "context",
                "statistics_id",
                "bundle",
            ]
        )
        for well in prediction.wells:
            values = [getattr(well, name) for name in columns]
            rows.writerow(
                [
                    prediction.batch_id,
                    *values,
                    len(well.refused),
                    *(well.probabilities[name] for name in classes),
                    prediction.adapted,
                    prediction.context,
                    prediction.statistics_id,
                    prediction.bundle,
                ]
            )


def _note(text: str) -> None:
    err.print(f"[yellow]note[/] {escape(text)}", soft_wrap=True, highlight=False)


# --- what is printed -------------------------------------------------------------------------------------------------


@contextmanager
def _progress(name: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar over files sent."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=hidden or not err.is_terminal) as bars:
        task = bars.add_task(f"sending {name}", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _show(value: BaseModel, as_json: bool, table: Callable[[Any], Iterable[Table | str]]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
        return
    for part in table(value):
        out.print(part, highlight=False)


def _report_table(report: schemas.ControlsReport) -> Iterator[Table | str]:
    if not report.adapted:
        yield (
            f"[yellow]not adapted yet[/]: {report.control_wells} control wells are kept, "
            f"{report.wells_needed} more are needed"
        )
        yield from _warnings(report.notices, report.saturation)
        return
    panel = f" and {len(report.context_panel)} of the panel" if report.context_panel else ""
    yield (
        f"[green]adapted[/] {escape(report.batch_id)} on {report.context_sites} sites of "
        f"{len(report.context_wells)} control wells{panel} ({report.provider}, {report.precision})"
    )
    yield f"statistics {report.statistics_id}"
    yield f"distance from the training plates {report.distance:.2f}, percentile {report.percentile:.0f} of held-out ones"
    yield from _warnings(report.notices, report.saturation)


def _prediction_table(prediction: schemas.Prediction) -> Iterator[Table | str]:
    table = Table(title=f"{escape(prediction.batch_id)}: {len(prediction.wells)} wells, context {prediction.context}")
    table.add_column("well")
    table.add_column("class", min_width=max(len(well.label) for well in prediction.wells))
    wide = out.width >= WIDE
    numbers = ("probability", "entropy", "sites", "spread", "to controls") if wide else ("probability", "sites")
    for name in numbers:
        table.add_column(name, justify="right")
    table.add_column("remarks")
    for well in prediction.wells:
        values = {
            "probability": f"{well.probability:.3f}",
            "entropy": f"{well.entropy:.2f}",
            "sites": str(well.sites),
            "spread": f"{well.spread:.3f}",
            "to controls": "" if well.distance_to_controls is None else f"{well.distance_to_controls:.2f}",
        }
        table.add_row(well.well, escape(well.label), *(values[name] for name in numbers), ", ".join(_remarks(well)))
    yield table
    yield from _warnings(prediction.notices, prediction.saturation)


def _remarks(well: schemas.WellPrediction) -> Iterator[str]:
    if well.out_of_range:
        yield "out of range"
    if well.resembles_controls:
        yield "like a control"
    if well.control:
        yield "is a control"
    if well.refused:
        yield f"{len(well.refused)} sites refused"


def _warnings(notices: Iterable[str], saturation: Iterable[schemas.Saturation]) -> Iterator[str]:
    for notice in notices:
        yield f"[yellow]note[/] {escape(in_flags(notice))}"
    for item in saturation:
        yield (
            f"[yellow]note[/] {item.planes} {escape(item.channel)} images are saturated, at worst "
            f"{item.worst_share:.1%} of the pixels (well {item.worst_well} site {item.worst_site})"
        )


def _batches_table(kept: schemas.BatchList) -> Iterator[Table | str]:
    count = len(kept.batches)
    table = Table(title="1 batch" if count == 1 else f"{count} batches")
    for name in ("batch", "adapted", "control wells", "sites", "treated wells", "changed"):
        table.add_column(name)
    for batch in kept.batches:
        table.add_row(
            batch.batch_id,
            "yes" if batch.adapted else f"needs {batch.wells_needed} wells" if batch.wells_needed else "at next predict",
            str(len(batch.control_wells)),
            str(batch.control_sites),
            str(len(batch.treated_wells)),
            f"{batch.changed_at:%Y-%m-%d %H:%M}",
        )
    yield table
    of = "" if kept.max_bytes is None else f" of {kept.max_bytes / 1e9:,.1f}"
    yield f"images take {kept.kept_bytes / 1e9:,.1f}{of} GB"
