"""``anchorwell-train``: simulate, index, fetch, train, export, import-checkpoint, evaluate, embeddings, cost, report.

Each command imports what it needs when it runs: ``simulate`` works without torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.errors import AnchorwellError, LayoutError, RunError
from model.images import SCALINGS, Illumination, ImageRecipe, Scaling
from training.simulate import CHANNELS, SimulationPlan, simulate

if TYPE_CHECKING:
    import pandas as pd

    from model.bundle import Bundle, Parity

Anonymous = Annotated[bool, typer.Option("--anonymous", help="Read s3:// without credentials: public data.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of an S3 other than AWS's; else AWS_ENDPOINT.")]
Region = Annotated[str | None, typer.Option(help="AWS region of the bucket; else AWS_REGION.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yields what to tell (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Name what is written where the system does not say which file it could not write."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(out)) from None


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
    with _writing(out), progress_bar("Simulating sites") as tell:
        report = simulate(plan, out, workers=workers, progress=tell)
    typer.echo(f"{len(report.plates)} simulated plates, {report.sites} sites in {report.seconds:.0f} s: {out}")


@app.command("index")
def index_command(
    root: Annotated[
        Path,
        typer.Argument(
            help="Folder below which plates have load_data.csv and platemap.csv; with --load-data, the folder of JUMP's "
            "published tables: plate.csv, well.csv, perturbation_control.csv, compound.csv (or .csv.gz)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Index to write: .parquet (needed with --load-data) or .csv.")],
    *,
    channels: Annotated[str, typer.Option(help="Channels, in the order the network shall take them.")] = ",".join(CHANNELS),
    load_data: Annotated[
        list[str] | None,
        typer.Option(
            help="LoadData of JUMP's plates, CSV or Parquet: a file, a folder, or a place with columns of plate.csv in "
            "braces, on disk or S3; may be given again."
        ),
    ] = None,
    sources: Annotated[str | None, typer.Option(help="With --load-data: only these labs, commas.")] = None,
    batches: Annotated[str | None, typer.Option(help="With --load-data: only these experimental batches, commas.")] = None,
    plates: Annotated[str | None, typer.Option(help="With --load-data: only these plates, commas.")] = None,
    plate_types: Annotated[str | None, typer.Option(help="With --load-data: only these types, such as COMPOUND.")] = None,
    compounds: Annotated[
        Path | None,
        typer.Option(
            help="With --load-data: table of Metadata_JCP2022 (or InChIKey) and label; by default the eight "
            "positive controls by their mechanism of action."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="With --load-data: only these labels, commas.")] = None,
    all_wells: Annotated[bool, typer.Option("--all-wells", help="With --load-data: keep wells without a label.")] = False,
    anonymous: Anonymous = False,
    endpoint: Endpoint = None,
    region: Region = None,
) -> None:
    """Index plates for training: one row a site, from a folder of plates or from JUMP's published tables.

    All that is wrong with the tables is told at once, with file and row.
    """
    from training.index import IndexFile, index_tree, require_channels, write_index  # noqa: PLC0415 (pandas)

    names = tuple(name.strip() for name in channels.split(","))
    require_channels(names)
    if load_data:
        from training.jump import Selection, write_jump_index  # noqa: PLC0415 (pandas)
        from training.objects import ObjectAccess, Objects  # noqa: PLC0415 (obstore)

        if out.suffix != ".parquet":
            raise typer.BadParameter("--out ends in .parquet where plates are indexed one by one")
        selection = Selection(
            _listed(sources), _listed(batches), _listed(plates), _listed(plate_types), _listed(labels), all_wells=all_wells
        )
        objects = Objects(ObjectAccess(anonymous, endpoint, region))
        with _writing(out):
            problems = write_jump_index(root, load_data, names, compounds, selection, objects, out)
        for problem in problems:
            console.print(f"[yellow]warning:[/yellow] {escape(str(problem))}", soft_wrap=True)
    else:
        found = index_tree(root, names)
        with _writing(out):
            write_index(found, out)
    _tell_index(IndexFile.open(out).plates(), out)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _tell_index(plates: "Iterator[pd.DataFrame]", out: Path) -> None:
    """Say what is in an index, and what it is not enough for."""
    import pandas as pd  # noqa: PLC0415

    from training.index import KEYS  # noqa: PLC0415 (pandas)
    from training.splits import split_by_batch  # noqa: PLC0415 (pandas)

    found = pd.DataFrame([
        {**rows[KEYS[:3]].iloc[0], "sites": len(rows), "controls": int((rows["role"] == "control").sum())} for rows in plates
    ])  # fmt: skip
    for lab, rows in found.groupby(KEYS[0]):
        treated = rows["sites"].sum() - rows["controls"].sum()
        typer.echo(
            f"lab {lab}: {rows[KEYS[1]].nunique()} batches, {len(rows)} plates, "
            f"{rows['controls'].sum()} control sites, {treated} treated"
        )
    typer.echo(f"{len(found)} plates, {found['sites'].sum()} sites: {out}")
    without = found.loc[found["controls"] == 0, KEYS[2]].tolist()
    if without:
        console.print(
            f"[yellow]note:[/yellow] no controls on {', '.join(without)}: cs-arm-bn cannot train on them", soft_wrap=True
        )
    try:
        split_by_batch(found, None)
    except LayoutError as error:
        console.print(f"[yellow]note:[/yellow] not enough to train on: {escape(error.detail)}", soft_wrap=True)


@app.command("fetch")
def fetch_command(
    index: Annotated[Path, typer.Argument(help="An index (.parquet or .csv).")],
    out: Annotated[Path, typer.Argument(help="Folder to write plates to; goes on where it was left.")],
    *,
    size: Annotated[int, typer.Option(help="Least side of a field at the network's pixel size; all of it is kept.")] = 256,
    shrink: Annotated[int, typer.Option(help="Take every n-th pixel where the pixel size is not known.")] = 2,
    pixel_size_um: Annotated[float | None, typer.Option(help="Network pixel size; resamples where known.")] = None,
    scaling: Annotated[str, typer.Option(help=f"{', '.join(SCALINGS)}.")] = "percentile-8bit",
    full_scale: Annotated[str | None, typer.Option(help="fixed-scale: full scale per channel, commas.")] = None,
    illumination: Annotated[
        str, typer.Option(help="none, or flattened by the plate's controls (linear scalings).")
    ] = "none",
    workers: Annotated[int, typer.Option(help="Processes that read and decode.")] = 1,
    skip_bad_sites: Annotated[
        bool,
        typer.Option(
            "--skip-bad-sites",
            help="Leave out sites with files that cannot be used, and tell them: a tenth of a plate's at most, never all "
            "of a label's or all controls.",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="At the end, check that all plates are there and, by its sha256, every file."),
    ] = False,
    anonymous: Anonymous = False,
    endpoint: Endpoint = None,
    region: Region = None,
) -> None:
    """Read an index's planes from disk or S3, prepare them once, and write a file a plate to train on.

    Stopped, killed, cut off or out of space, it goes on where it was when it is run again; several calls may share a folder.
    """
    from training.fetch import FetchOptions, fetch  # noqa: PLC0415 (pandas)
    from training.index import IndexFile  # noqa: PLC0415 (pandas)
    from training.objects import ObjectAccess  # noqa: PLC0415 (obstore)
    from training.plates import verify_plates  # noqa: PLC0415 (pandas)

    table = IndexFile.open(index)
    recipe = ImageRecipe(
        channels=table.channels, size=size, shrink=shrink, pixel_size_um=pixel_size_um,
        scaling=cast("Scaling", scaling), illumination=cast("Illumination", illumination),
        full_scale=tuple(float(value) for value in full_scale.split(",")) if full_scale else None,
    )  # fmt: skip
    options = FetchOptions(workers, ObjectAccess(anonymous, endpoint, region), skip_bad_sites)
    with progress_bar("Fetching sites") as tell:
        report = fetch(table, out, recipe, options, tell)
    for problem in report.unsized:
        console.print(f"[yellow]warning:[/yellow] {escape(problem)}", soft_wrap=True)
    for problem in report.skipped:
        console.print(f"[yellow]left out:[/yellow] {escape(problem)}", soft_wrap=True)
    if report.elsewhere:
        console.print(f"[yellow]note:[/yellow] {len(report.elsewhere)} plates are being fetched by another process")
    typer.echo(f"{len(report.written)} plates written, {report.sites} sites; {len(report.there)} were there: {out}")
    if verify:
        count = verify_plates(out, report.plates)
        typer.echo(f"{count} plates are as they were written, {count - len(report.plates)} of them not of this index")


@app.command("train")
def train_command(
    plates: Annotated[Path, typer.Argument(help="Folder of fetched plates.")],
    out: Annotated[Path, typer.Argument(help="Run directory to write.")],
    *,
    method: Annotated[str, typer.Option(help="erm, erm-zscore, instancenorm, arm-bn or cs-arm-bn.")] = "cs-arm-bn",
    context: Annotated[str, typer.Option(help="cs-arm-bn: controls, union or panel.")] = "controls",
    test_lab: Annotated[str | None, typer.Option(help="Metadata_Source to keep for testing.")] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON: train, validation, in_domain, new_batch, new_lab: names of plates, batches or labs."
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Labels to learn, commas; all by default.")] = None,
    depth: Annotated[int, typer.Option(help="18, 34 or 50.")] = 50,
    width: int = 64,
    antialiased: bool = True,
    size: Annotated[int, typer.Option(help="Network input, pixels.")] = 256,
    crop: Annotated[int | None, typer.Option(help="Side of the random crops trained on; size by default.")] = None,
    treated: Annotated[int, typer.Option(help="Treated images a plate and step.")] = 64,
    controls_min: Annotated[int, typer.Option(help="Fewest control images a step (K-jitter).")] = 8,
    controls_max: Annotated[int, typer.Option(help="Most control images a step (K-jitter).")] = 128,
    plates_per_step: Annotated[int, typer.Option("--plates", help="Plates a step.")] = 8,
    panel: Annotated[int, typer.Option(help="Images of the plate's panel a step (context panel).")] = 0,
    panel_wells: Annotated[int, typer.Option(help="Wells of every class that are a plate's panel.")] = 1,
    steps: int = 20_000,
    validate_every: int = 200,
    patience: Annotated[int, typer.Option(help="Validations without a better loss before stopping.")] = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "constant",
    seed: int = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes on this machine, one a GPU.")] = 1,
    num_nodes: Annotated[int, typer.Option(help="Machines, started by torchrun or a scheduler.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Parts in which a process takes its plates of a step.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    loader_workers: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train a network; the defaults follow the paper."""
    from lightning.pytorch.utilities import rank_zero_only  # noqa: PLC0415 (torch)

    from training.episodes import EpisodeShape  # noqa: PLC0415 (torch)
    from training.train import TrainingConfig, train  # noqa: PLC0415 (torch)

    config = TrainingConfig(
        plates=str(plates), method=method, context=context, test_lab=test_lab, split=str(split) if split else None,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else None,
        depth=cast("Literal[18, 34, 50]", depth), width=width, antialiased=antialiased,
        size=size, crop=crop,
        shape=EpisodeShape(treated, controls_min, controls_max, plates_per_step, panel, panel_wells),
        steps=steps, validate_every=validate_every, patience=patience, learning_rate=learning_rate,
        weight_decay=weight_decay, schedule=cast('Literal["constant", "cosine"]', schedule), seed=seed,
        accelerator=accelerator,
        devices=devices, num_nodes=num_nodes, accumulate=accumulate,
        precision=cast('Literal["fp32", "bf16"]', precision), loader_workers=loader_workers,
    )  # fmt: skip
    run = train(config, out, resume=resume)
    purposes = {"training": run.split.train, "validation": run.split.validation, **run.split.tests()}
    told = ", ".join(f"{len(plates)} {name.replace('_', ' ')}" for name, plates in purposes.items())
    rank_zero_only(typer.echo)(f"run: {out} (plates: {told})")


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
    with _writing(out):
        bundle, parity = release(runs, out, name=name or out.name, minimum_control_wells=minimum_control_wells)
    _tell_bundle(bundle, parity)


@app.command("import-checkpoint")
def import_checkpoint_command(
    folder: Annotated[Path, typer.Argument(help="Folder of published checkpoints, one file a fold.")],
    *,
    classes: Annotated[str, typer.Option(help="Names of the network's outputs, in their order, commas.")],
    calibration: Annotated[Path, typer.Option(help="Fetched, labelled plates that no fold was trained on.")],
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
    pixel_size_um: Annotated[float | None, typer.Option(help="Network pixel size; resamples where known.")] = None,
) -> None:
    """Turn checkpoints that others publish for this method into a bundle, calibrated on plates of your own."""
    from training import checkpoints  # noqa: PLC0415 (torch)
    from training.methods import make_method  # noqa: PLC0415 (torch)
    from training.plates import open_plates, require_recipe  # noqa: PLC0415 (pandas)

    if context not in ("controls", "union", "source"):
        raise typer.BadParameter("--context is one of controls, union, source")
    _require_empty(out)
    names = _listed(classes)
    recipe = ImageRecipe(
        channels=_listed(channels) or checkpoints.CHANNELS,
        size=size or checkpoints.SIZE,
        shrink=shrink or checkpoints.SHRINK,
        pixel_size_um=pixel_size_um,
        mean=tuple(map(float, _listed(mean))) or checkpoints.MEAN,
        std=tuple(map(float, _listed(std))) or checkpoints.STD,
    )
    method = make_method("erm") if context == "source" else make_method("cs-arm-bn", context)
    require_recipe(calibration, recipe)
    plates = open_plates(calibration, names)
    with _writing(out):
        bundle, parity = checkpoints.import_checkpoints(
            folder, list(plates.values()), out, name=name or out.name, classes=names, recipe=recipe, method=method,
            minimum_control_wells=minimum_control_wells,
        )  # fmt: skip
    typer.echo(f"members: {', '.join(str(member['file']) for member in bundle.manifest.training['members'])}")
    _tell_bundle(bundle, parity)


def _require_empty(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: name another directory, so that no bundle is written over")


def _tell_bundle(bundle: "Bundle", parity: "Parity") -> None:
    typer.echo(
        f"bundle {bundle.digest[:12]}: {bundle.path}\nONNX against torch: statistics {parity.statistics_sd:.1e} standard "
        f"deviations, logits {parity.logits:.1e}, embeddings {parity.embeddings:.1e}"
    )


@app.command("evaluate")
def evaluate_command(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories; none where the grid file names seeds.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Results folder to write, or to go on with.")],
    grid: Annotated[Path | None, typer.Option(help="Grid file (YAML): methods, cells, draws; seeds to train.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these of the grid file's seeds; one process each.")] = None,
) -> None:
    """Evaluate runs, or a grid's methods and seeds, on their test plates, beside the nulls; trains what is missing.

    Goes on where it was stopped. The tables cells, predictions and embeddings (.parquet) are written last, of what was asked
    for: after processes that took a seed each, call it once more without --seed to join them.
    """
    from training.grid import Grid, evaluate_grid, overview, read_grid  # noqa: PLC0415 (torch)
    from training.train import Run  # noqa: PLC0415 (torch)

    asked = Grid() if grid is None else read_grid(grid).only(seed)
    with progress_bar("Evaluating cells") as tell:
        cells = evaluate_grid(
            asked, [Run.load(run) for run in runs or ()], out,
            tell=lambda text: console.print(text, soft_wrap=True), progress=tell,
        )  # fmt: skip
    typer.echo(f"{overview(cells)}\n{len(cells)} rows, a plate and cell each: {out}")


@app.command("report")
def report_command(
    results: Annotated[Path, typer.Argument(help="A results folder: cells.parquet and what lies beside it.")],
    out: Annotated[Path, typer.Option(help="Folder to write report.md and its plots to.")],
    *,
    method: Annotated[
        str | None,
        typer.Option(help="The method that plots of one method show beside unadapted ERM; cs-arm-bn where it is there."),
    ] = None,
    context: Annotated[str | None, typer.Option(help="Its context; controls by default.")] = None,
) -> None:
    """Write a report of an evaluation: tables with intervals over plates, plots, and what they cannot show."""
    from training.report import write_report  # noqa: PLC0415 (pandas)
    from training.results import FOCUS  # noqa: PLC0415 (pandas)

    focus = None if method is None and context is None else (method or FOCUS[0], context or FOCUS[1])
    with _writing(out):
        typer.echo(f"report: {write_report(results, out, focus)}")


@app.command("embeddings")
def embeddings_command(
    table: Annotated[
        Path, typer.Argument(help="Embeddings, one row a well: Metadata_* columns and features, .parquet or .csv.")
    ],
    out: Annotated[Path, typer.Option(help="Results folder to write into, beside what lies there.")],
    *,
    name: Annotated[str, typer.Option(help="The embedding's name, where the table has no Metadata_method.")] = "",
    label_column: Annotated[str, typer.Option(help="The class; empty where a well has none.")] = "Metadata_label",
    control_column: Annotated[str, typer.Option(help="Says which wells are negative controls.")] = "Metadata_pert_type",
    control_value: Annotated[str, typer.Option(help="Its value for negative controls.")] = "negcon",
    setting_column: Annotated[
        str, typer.Option(help="train, in_domain, new_batch or new_lab; not read with --train-batches.")
    ] = "Metadata_setting",
    train_batches: Annotated[str | None, typer.Option(help="Metadata_Batch to train on, commas; others are tests.")] = None,
) -> None:
    """Score embeddings by logistic regression: as they are, z-scored by each plate's controls, and after TVN."""
    from training.embeddings import Columns, write_baselines  # noqa: PLC0415 (scikit-learn)

    columns = Columns(label=label_column, control=control_column, control_value=control_value, setting=setting_column)
    batches = tuple(batch.strip() for batch in train_batches.split(",")) if train_batches else ()
    with _writing(out):
        cells = write_baselines(table, out, name, columns, batches)
    for (method, context, setting), rows in cells.groupby(["method", "context", "setting"], sort=False):
        typer.echo(f"{method} {context} {setting}: {rows['well_accuracy'].mean():.3f} per well, {len(rows)} plates")


@app.command("cost")
def cost_command(
    out: Annotated[
        Path, typer.Option(help="Folder to write cost.json and cost.md to: a results folder shows it in its report.")
    ],
    *,
    run: Annotated[Path | None, typer.Option(help="Take network and size from a run directory.")] = None,
    channels: int = 5,
    classes: int = 8,
    depth: Annotated[int, typer.Option(help="18, 34 or 50.")] = 50,
    width: int = 64,
    antialiased: bool = True,
    size: Annotated[int, typer.Option(help="Network input, pixels.")] = 256,
    treated: Annotated[int, typer.Option(help="Treated images of a batch.")] = 256,
    controls: Annotated[int, typer.Option(help="Control images measured.")] = 64,
    minibatch: Annotated[int, typer.Option(help="Images a step of fine-tuning.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning.")] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds of interleaved timing.")] = 5,
) -> None:
    """Measure what adapting to a batch costs beside a plain forward pass and beside fine-tuning on it."""
    from model.network import NetworkSpec  # noqa: PLC0415 (torch)
    from training.cost import Workload, write_cost  # noqa: PLC0415 (torch)

    if depth not in {18, 34, 50}:
        raise typer.BadParameter("--depth is one of 18, 34, 50")
    spec = NetworkSpec(channels, classes, cast("Literal[18, 34, 50]", depth), width, antialiased)
    if run is not None:
        from training.train import Run  # noqa: PLC0415 (torch)

        loaded = Run.load(run)
        spec, size = loaded.spec, loaded.recipe.size
    with _writing(out):
        typer.echo(write_cost(Workload(spec, size, treated, controls, minibatch, steps), out, rounds))


def main() -> None:
    """Run the command line; what is wrong with the input is one line, not a traceback."""
    try:
        app()
    except AnchorwellError as error:
        console.print(f"[red]error:[/red] {escape(error.detail)}", soft_wrap=True)
        raise SystemExit(1) from None
    except (OSError, ValueError) as error:
        console.print(f"[red]error:[/red] {escape(_one_line(error))}", soft_wrap=True)
        raise SystemExit(1) from None


def _one_line(error: OSError | ValueError) -> str:
    """Say the file and what the system says of it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
