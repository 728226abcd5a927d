"""``anchorwell screen``: plates of an index in, answers out, without a server."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.blobs import open_blobs
from service.errors import InvalidRequestError, StartError
from service.logs import configure_logs
from service.settings import Settings
from service.terminal import err, out

if TYPE_CHECKING:  # all other commands start sooner without
    from service.index import IndexedPlate, ScreenIndex
    from service.screen import Outcome, RayCluster

SOME_REFUSED = 3
"""Exit code of a screen that is done, but for plates that could not be answered."""


def screen(
    index: Annotated[
        Path, typer.Argument(help="Parquet or CSV, a row a site, as anchorwell-train index writes it", exists=True)
    ],
    bundle: Annotated[Path | None, typer.Option(help="the bundle that answers (ANCHORWELL_BUNDLE)")] = None,
    to: Annotated[str, typer.Option("--out", help="directory, or s3://bucket/prefix, of a folder a plate")] = "answers",
    part: Annotated[str, typer.Option(help="2/10: of ten processes that share the screen, the second's plates")] = "1/1",
    plates_at_once: Annotated[int, typer.Option(min=1, help="plates that are worked on at once")] = 2,
    scratch: Annotated[Path | None, typer.Option(help="directory for some plates' controls for as long as it takes")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda (ANCHORWELL_DEVICE)")] = None,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster that answers, such as head:6379")] = None,
    ray_actors: Annotated[int, typer.Option(min=1, help="processes on the cluster that each answer plates")] = 1,
    ray_cores: Annotated[int, typer.Option(min=1, help="cores of each of them")] = 2,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each of them")] = 0.0,
    ray_decoders: Annotated[
        int, typer.Option(min=0, help="sites that other cores decode for each of them at once; 0: each decodes by itself")
    ] = 0,
) -> None:
    """Answer whole screens: adapt each plate on its controls, classify its other wells, write a Parquet file a plate.

    Asked again it goes on: what is answered already by the same bundle is kept. Exits with 3 when plates were refused; what
    is wrong with them stands in their folders, in error.json, and in screen.json.
    """
    from service.index import ScreenIndex  # noqa: PLC0415 (as above)
    from service.screen import SUMMARY, RayCluster, part_of, summary  # noqa: PLC0415 (as above)

    number, parts = _part(part)
    known = ScreenIndex.open(index)
    mine = known.names[number - 1 :: parts]
    configure_logs("text", err)
    with TemporaryDirectory(prefix="anchorwell-screen-", dir=scratch) as folder:
        settings = _settings({"bundle": bundle, "device": device}, Path(folder) / "lab")
        with ExitStack() as stack:
            if ray is None:
                done = _here(stack, settings, to, part_of(known.plates(), number, parts), plates_at_once)
            else:
                done = _on_ray(RayCluster(ray, ray_actors, ray_cores, ray_gpus, ray_decoders), known, mine, settings, to)
            outcomes = _followed(done, len(mine))
        told = summary(known, outcomes)
        open_blobs(to).put(SUMMARY if parts == 1 else f"screen-{number}-of-{parts}.json", told)
    _conclude(outcomes, to)


def _settings(given: Mapping[str, Any], data: Path) -> Settings:
    """Settings of a service that is reached by nobody, keeps nothing, and has a store of its own."""
    own: dict[str, Any] = {"data": data, "redis": None, "objects": None, "tenants": {}, "keep_control_images": False}
    own |= {"host": "127.0.0.1", "metrics_port": None, "workers": 0}
    return Settings(**own, **{name: value for name, value in given.items() if value is not None})


def _here(
    stack: ExitStack, settings: Settings, to: str, plates: "Iterator[IndexedPlate]", at_once: int
) -> "Iterator[Outcome]":
    from service.app import screening  # noqa: PLC0415 (the client's commands need no onnxruntime)
    from service.screen import answered  # noqa: PLC0415 (as above)

    return answered(stack.enter_context(screening(settings, to)).answer, plates, at_once)


def _on_ray(
    cluster: "RayCluster", known: "ScreenIndex", plates: Sequence[str], settings: Settings, to: str
) -> "Iterator[Outcome]":
    """Answer on a cluster; paths are the same on all of its machines.

    Raises:
        StartError: Ray is not installed, or no cluster answers.
    """
    try:
        from service.screen_ray import answered_on  # noqa: PLC0415 (it is an extra)
    except ImportError:
        raise StartError("--ray needs Ray: install the extra 'ray'") from None
    where = to if "://" in to else str(Path(to).resolve())
    shared = settings.model_copy(update={"bundle": settings.bundle.resolve()})
    try:
        yield from answered_on(cluster, known, plates, shared, where)
    except ConnectionError as error:
        raise StartError(f"no Ray cluster answers at {cluster.address}: {str(error)[:200]}") from None


def _followed(done: "Iterator[Outcome]", plates: int) -> "list[Outcome]":
    """Tell what becomes of plates while they come."""
    outcomes = []
    with _bar(plates) as bar:
        task = bar.add_task("plates", total=plates)
        for outcome in done:
            outcomes.append(outcome)
            bar.advance(task)
            _tell(outcome)
    return outcomes


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise InvalidRequestError(f"--part {text[:40]!r} is not like 2/10, the second of ten")
    return int(number), int(parts)


def _bar(plates: int) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, disable=not err.is_terminal or not plates)


def _tell(outcome: "Outcome") -> None:
    if outcome.state == "refused":
        err.print(f"[red]refused[/]  {escape(outcome.plate)}: {escape(outcome.detail)}", soft_wrap=True, highlight=False)
    for notice in outcome.notices:
        err.print(f"[yellow]note[/]     {escape(outcome.plate)}: {escape(notice)}", soft_wrap=True, highlight=False)
    for well, reason in (outcome.left_out or {}).items():
        err.print(f"[yellow]left out[/] {escape(outcome.plate)} {well}: {escape(reason)}", soft_wrap=True, highlight=False)


def _conclude(outcomes: "list[Outcome]", to: str) -> None:
    from service.screen import counts  # noqa: PLC0415 (as above)

    found, wells = counts(outcomes), sum(outcome.wells for outcome in outcomes)
    told = f"{found['answered']} plates answered, {found['kept']} were there already, {found['refused']} refused"
    out.print(f"{told}; {wells:,} wells: {to}", highlight=False, markup=False, soft_wrap=True)
    if found["refused"]:
        sys.exit(SOME_REFUSED)
