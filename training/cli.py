"""``anchorwell-train``: simulate, index, train, export, import-checkpoint, evaluate, report.

Each command imports what it needs when it runs: ``simulate`` works without torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.errors import AnchorwellError, LayoutError, RunError
from model.images import ImageRecipe
from training.simulate import CHANNELS, SimulationPlan, simulate

if TYPE_CHECKING:
    from model.bundle import Bundle, Parity
    from training.train import TrainingConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yields what to tell (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command("simulate")
def simulate_command(
    out: Annotated[Path, typer.Argument(help="Folder to write plates to.")],
    *,
    labs: int = 3,
    batches: Annotated[int, typer.Option(help="Experimental batches a lab.")] = 3,
    plates: Annotated[int, typer.Option(help="Plates a batch.")] = 2,
    seed: int = 7,
    sites: Annotated[int, typer.Option(help="Fields of view a well.")] = 2,
    wells_per_class: int = 8,
    inactive_wells: Annotated[int, typer.Option(help="Wells of compounds that do nothing.")] = 16,
    novel_wells: Annotated[int, typer.Option(help="Wells of a phenotype that is no class.")] = 0,
    plate_format: int = 96,
    first_lab: Annotated[int, typer.Option(help="Number of the first lab: others are other labs.")] = 1,
    workers: int = 1,
) -> None:
    """Write simulated Cell Painting plates: TIFF planes, LoadData tables, plate maps."""
    plan = SimulationPlan(
        labs=labs, batches=batches, plates=plates, seed=seed, plate_format=plate_format, sites=sites,
        wells_per_class=wells_per_class, inactive_wells=inactive_wells, novel_wells=novel_wells, first_lab=first_lab,
    )  # fmt: skip
    with progress_bar("Simulating sites") as tell:
        report = simulate(plan, out, workers=workers, progress=tell)
    typer.echo(f"{len(report.plates)} simulated plates, {report.sites} sites in {report.seconds:.0f} s: {out}")


@app.command("index")
def index_command(
    root: Annotated[Path, typer.Argument(help="Folder below which plates have load_data.csv and platemap.csv.")],
    out: Annotated[Path, typer.Option(help="Index to write: .parquet or .csv.")],
    *,
    channels: Annotated[str, typer.Option(help="Channels, in the order the network shall take them.")] = ",".join(CHANNELS),
) -> None:
    """Index plates for training: one row a site."""
    from training.index import index_tree, write_index  # noqa: PLC0415 (pandas)
    from training.splits import split_by_batch  # noqa: PLC0415 (pandas)

    index = index_tree(root, tuple(name.strip() for name in channels.split(",")))
    write_index(index, out)
    for lab, rows in index.groupby("Metadata_Source"):
        counts = rows.groupby("role")["Metadata_Well"].size()
        typer.echo(
            f"lab {lab}: {rows['Metadata_Batch'].nunique()} batches, {rows['Metadata_Plate'].nunique()} plates, "
            f"{counts.get('control', 0)} control sites, {counts.get('treated', 0)} treated"
        )
    typer.echo(f"{index['Metadata_Plate'].nunique()} plates, {len(index)} sites: {out}")
    try:
        split_by_batch(index, None)
    except LayoutError as error:
        console.print(f"[yellow]note:[/yellow] not enough to train on: {error.detail}", soft_wrap=True)


@app.command("train")
def train_command(
    index: Annotated[Path, typer.Argument(help="An index (.parquet or .csv).")],
    out: Annotated[Path, typer.Argument(help="Run directory to write.")],
    *,
    method: Annotated[str, typer.Option(help="erm, erm-zscore, instancenorm, arm-bn or cs-arm-bn.")] = "cs-arm-bn",
    context: Annotated[str, typer.Option(help="cs-arm-bn: controls or union.")] = "controls",
    test_lab: Annotated[str | None, typer.Option(help="Metadata_Source to keep for testing.")] = None,
    classes: Annotated[str | None, typer.Option(help="Labels to learn, commas; all by default.")] = None,
    depth: Annotated[int, typer.Option(help="18, 34 or 50.")] = 50,
    width: int = 64,
    antialiased: bool = True,
    size: Annotated[int, typer.Option(help="Network input, pixels.")] = 256,
    crop: Annotated[int | None, typer.Option(help="Side of the random crops trained on; size by default.")] = None,
    shrink: Annotated[int, typer.Option(help="Take every n-th pixel where the pixel size is not known.")] = 2,
    pixel_size_um: Annotated[float | None, typer.Option(help="Network pixel size; resamples where known.")] = None,
    scaling: Annotated[str, typer.Option(help="percentile or fixed.")] = "percentile",
    full_scale: Annotated[str | None, typer.Option(help="fixed scaling: full scale per channel, commas.")] = None,
    treated: Annotated[int, typer.Option(help="Treated images a plate and step.")] = 64,
    controls_min: Annotated[int, typer.Option(help="Fewest control images a step (K-jitter).")] = 8,
    controls_max: Annotated[int, typer.Option(help="Most control images a step (K-jitter).")] = 128,
    plates: Annotated[int, typer.Option(help="Plates a step.")] = 8,
    steps: int = 20_000,
    validate_every: int = 200,
    patience: Annotated[int, typer.Option(help="Validations without a better loss before stopping.")] = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "constant",
    seed: int = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    loader_workers: int = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for scaled sites, shared by runs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train a network; the defaults follow the paper."""
    from training.episodes import EpisodeShape  # noqa: PLC0415 (torch)
    from training.train import TrainingConfig, train  # noqa: PLC0415 (torch)

    config = TrainingConfig(
        index=str(index), method=method, context=context, test_lab=test_lab,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else None,
        depth=cast("Literal[18, 34, 50]", depth), width=width, antialiased=antialiased,
        size=size, crop=crop, shrink=shrink, pixel_size_um=pixel_size_um,
        scaling=cast('Literal["percentile", "fixed"]', scaling),
        full_scale=tuple(float(value) for value in full_scale.split(",")) if full_scale else None,
        shape=EpisodeShape(treated, controls_min, controls_max, plates),
        steps=steps, validate_every=validate_every, patience=patience, learning_rate=learning_rate,
        weight_decay=weight_decay, schedule=cast('Literal["constant", "cosine"]', schedule), seed=seed,
        accelerator=accelerator, loader_workers=loader_workers, cache=str(cache) if cache else None,
    )  # fmt: skip
    _check_choices(config)
    train(config, out, resume=resume)
    typer.echo(f"run: {out}")


def _check_choices(config: "TrainingConfig") -> None:
    import torch  # noqa: PLC0415 (slow)

    from training.methods import make_method  # noqa: PLC0415 (torch)

    choices = {
        "depth": (18, 34, 50),
        "scaling": ("percentile", "fixed"),
        "schedule": ("constant", "cosine"),
        "accelerator": ("auto", "cpu", "gpu"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise typer.BadParameter(f"--{name} is one of {', '.join(map(str, allowed))}")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise typer.BadParameter("--accelerator gpu: torch sees no GPU here")
    try:
        make_method(config.method, config.context)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("export")
def export_command(
    runs: Annotated[list[Path], typer.Argument(help="A run directory; several make an ensemble.")],
    out: Annotated[Path, typer.Argument(help="Bundle directory to write.")],
    *,
    name: Annotated[str | None, typer.Option(help="The bundle's name; the directory's by default.")] = None,
    minimum_control_wells: Annotated[int, typer.Option(help="Fewest control wells that adapt a batch.")] = 4,
) -> None:
    """Export a run, or several as one ensemble, as a bundle; refused unless ONNX agrees with torch."""
    from training.release import release  # noqa: PLC0415 (torch)

    _require_empty(out)
    _tell_bundle(*release(runs, out, name=name or out.name, minimum_control_wells=minimum_control_wells))


@app.command("import-checkpoint")
def import_checkpoint_command(
    folder: Annotated[Path, typer.Argument(help="Folder of published checkpoints, one file a fold.")],
    *,
    classes: Annotated[str, typer.Option(help="Names of the network's outputs, in their order, commas.")],
    calibration: Annotated[Path, typer.Option(help="An index of labelled plates that no fold was trained on.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    name: Annotated[str | None, typer.Option(help="The bundle's name; the directory's by default.")] = None,
    context: Annotated[str, typer.Option(help="What the network was trained with: controls, union or source.")] = "controls",
    minimum_control_wells: Annotated[int, typer.Option(help="Fewest control wells that adapt a batch.")] = 4,
    channels: Annotated[
        str | None, typer.Option(help="Channels, in the network's order; the published ones by default.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel after scaling; the published ones by default.")] = None,
    std: Annotated[str | None, typer.Option(help="Deviation per channel; the published ones by default.")] = None,
    size: Annotated[int | None, typer.Option(help="Network input, pixels; 256 by default, 224 or more.")] = None,
    shrink: Annotated[int | None, typer.Option(help="Take every n-th pixel; 2 by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode.")] = 2,
) -> None:
    """Turn checkpoints that others publish for this method into a bundle, calibrated on plates of your own."""
    from training import checkpoints  # noqa: PLC0415 (torch)
    from training.dataset import load_plates  # noqa: PLC0415 (pandas)
    from training.index import read_index  # noqa: PLC0415 (pandas)
    from training.methods import make_method  # noqa: PLC0415 (torch)

    _require_empty(out)
    names = _split(classes)
    recipe = ImageRecipe(
        channels=_split(channels) if channels else checkpoints.CHANNELS,
        size=size or checkpoints.SIZE,
        shrink=shrink or checkpoints.SHRINK,
        mean=tuple(map(float, _split(mean))) if mean else checkpoints.MEAN,
        std=tuple(map(float, _split(std))) if std else checkpoints.STD,
    )
    method = make_method("erm") if context == "source" else make_method("cs-arm-bn", context)
    plates = load_plates(read_index(calibration), recipe, names, workers=workers)
    bundle, parity = checkpoints.import_checkpoints(
        folder, list(plates.values()), out, name=name or out.name, classes=names, recipe=recipe, method=method,
        minimum_control_wells=minimum_control_wells,
    )  # fmt: skip
    typer.echo(f"members: {', '.join(str(member['file']) for member in bundle.manifest.training['members'])}")
    _tell_bundle(bundle, parity)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _require_empty(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: name another directory, so that no bundle is written over")


def _tell_bundle(bundle: "Bundle", parity: "Parity") -> None:
    typer.echo(
        f"bundle {bundle.digest[:12]}: {bundle.path}\nONNX against torch: statistics {parity.statistics_sd:.1e} standard "
        f"deviations, logits {parity.logits:.1e}"
    )


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="CSV to write, one row a plate and context.")],
) -> None:
    """Score a run on its test plates (in domain, new batch, new lab), beside the nulls."""
    from training.release import evaluate_run  # noqa: PLC0415 (torch)
    from training.report import markdown_table, summarise  # noqa: PLC0415 (pandas)

    table = evaluate_run(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    typer.echo(markdown_table(summarise(table)))


@app.command("report")
def report_command(
    tables: Annotated[list[Path], typer.Argument(help="CSVs that evaluate wrote.")],
) -> None:
    """Print a table of several evaluations: mean over plates with a bootstrapped 95 % interval."""
    import pandas as pd  # noqa: PLC0415

    from training.report import markdown_table, summarise  # noqa: PLC0415 (pandas)

    typer.echo(markdown_table(summarise(pd.concat([pd.read_csv(path) for path in tables], ignore_index=True))))


def main() -> None:
    """Run the command line; what is wrong with the input is one line, not a traceback."""
    try:
        app()
    except AnchorwellError as error:
        console.print(f"[red]error:[/red] {error.detail}", soft_wrap=True)
        raise SystemExit(1) from None
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise SystemExit(1) from None
