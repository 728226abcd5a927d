"""Real images: a translocation plate, row by row, through the real service, adapted and not.

The plate (BBBC013 by its names and layout: U2OS cells, FKHR-GFP moving from cytoplasm to nucleus with dose) is one plate of
one batch, so its rows serve as pseudo-batches. A small two-channel network learns untreated (column 02) from translocated
(column 12) on three rows; the fourth is adapted to its column 01 over HTTP and answers columns 03 to 11, whose dose
rises with the column. A second run degrades the fourth row as another microscope would. Every field is sent as 16 tiles.

Each setting is trained twice over: on the rows as they are, and with simulated microscope variation between episodes,
milder than that of the microscope which degrades the fourth row. The ERM twin gets the same. The temperature of 1
was chosen on rows A to C, each held out of the other two; a first version had been tried on row D, so no row is untouched.

Beside the answers stand two measures that need no network: mean GFP intensity with the sign that the training rows give it,
and a hand-made nucleus-to-cytoplasm ratio of GFP, which is what the assay was made to show. Dose runs with the column, so
position alone could explain any correlation.

Writes ``build/real-images.json``, ``build/real-images.md`` and ``build/real-images.png``.

Run: ``python -m benchmarks.real_images [--seeds 0 1 2] [--steps 150]``; the data lies in ``../shared/data``.
"""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import tifffile
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.stats import spearmanr

from benchmarks.bars import Bar, table, write_bars
from examples.demo import Server
from model.bundle import Manifest
from model.context import MAX_CONTEXT_SITES
from model.images import ImageRecipe, decode_plane, prepare_field
from model.layout import row_name
from model.network import Ensemble, NetworkSpec, ResNet
from service.client import AnchorwellClient
from training.calibrate import calibrate
from training.contexts import context_rows
from training.dataset import PlateSites, moments
from training.episodes import Episodes, EpisodeShape
from training.export import export_bundle
from training.methods import Method, make_method, training_loss
from training.train import cosine

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "sbs_translocation_plate"
OUT = Path("build/real-images")
ROWS, COLUMNS = "ABCD", range(1, 13)
CHANNELS, CLASSES = ("GFP", "DNA"), ("untreated", "translocated")
CONTROL, NEGATIVE, POSITIVE, DOSES = 1, 2, 12, range(3, 12)
TILE_PX, INPUT_PX, CROP_PX = 160, 160, 112
VARIANTS = 8
CALL = 0.5
RECIPE = ImageRecipe(channels=CHANNELS, size=INPUT_PX, shrink=1)
Field = NDArray[np.float32]  # (channels, 640, 640)


@dataclass(frozen=True)
class MicroscopeRanges:
    """How far microscopes differ: gain, offset and noise in grey levels of 255, blur in px, corners darker by a share.

    ``off_axis`` moves the brightest point from the centre, in half fields.
    """

    gain: tuple[float, float]
    offset: tuple[float, float]
    blur_px: tuple[float, float]
    vignetting: tuple[float, float]
    noise: tuple[float, float]
    off_axis: float = 0.0


TRAINING = MicroscopeRanges(gain=(0.4, 1.6), offset=(5, 60), blur_px=(0.5, 2.5), vignetting=(0.0, 0.5), noise=(1, 6))
UNSEEN = MicroscopeRanges(
    gain=(0.25, 2.0), offset=(5, 80), blur_px=(0.5, 3.0), vignetting=(0.2, 0.6), noise=(1, 8), off_axis=0.2
)


@dataclass(frozen=True)
class Microscope:
    """How another microscope would have taken a field: per channel gain, offset, blur, vignetting and noise."""

    gain: tuple[float, ...]
    offset: tuple[float, ...]
    blur_px: tuple[float, ...]
    vignetting: tuple[float, ...]
    noise: tuple[float, ...]
    axis: tuple[float, ...]
    seed: int

    @classmethod
    def draw(cls, seed: int, ranges: MicroscopeRanges) -> "Microscope":
        """Draw one for both channels."""
        rng = np.random.default_rng(seed)
        limits = (ranges.gain, ranges.offset, ranges.blur_px, ranges.vignetting, ranges.noise)
        draws = [rng.uniform(low, high, 2) for low, high in (*limits, (-ranges.off_axis, ranges.off_axis))]
        gain, offset, blur, vignetting, noise, axis = (tuple(float(value) for value in draw) for draw in draws)
        return cls(gain, offset, blur, vignetting, noise, axis, seed)

    def photograph(self, field: Field, number: int) -> Field:
        """Degrade one field (channels, height, width) of 0…255 grey values."""
        rng = np.random.default_rng([self.seed, number])
        y, x = np.mgrid[-1 : 1 : field.shape[1] * 1j, -1 : 1 : field.shape[2] * 1j]
        shade = ((x - self.axis[0]) ** 2 + (y - self.axis[1]) ** 2) / 2
        planes = [
            self.gain[c] * gaussian_filter(field[c], self.blur_px[c]) * (1 - self.vignetting[c] * shade)
            + self.offset[c]
            + rng.normal(0, self.noise[c], field[c].shape)
            for c in range(len(field))
        ]
        return np.stack(planes).astype(np.float32)


# --- the plate -------------------------------------------------------------------------------------------------------


def read_fields() -> dict[tuple[str, int], Field]:
    """Read every well's field: (row, column) → float32 (channels, 640, 640)."""
    wells = pd.read_csv(DATA / "wells.csv", dtype={"column": str})
    return {
        (str(well["row"]), int(well["column"])): np.stack([
            decode_plane((DATA / str(well[name])).read_bytes()).astype(np.float32) for name in ("channel1", "channel2")
        ])
        for _, well in wells.iterrows()
    }  # fmt: skip


def tiles(field: Field) -> list[NDArray[np.uint16]]:
    """Cut a field into 16 tiles (channels, 160, 160) of uint16, 64 times the grey values so that noise is kept."""
    scaled = np.clip(field * 64, 0, 65535).astype(np.uint16)
    starts = range(0, field.shape[1], TILE_PX)
    return [scaled[:, top : top + TILE_PX, left : left + TILE_PX] for top, left in itertools.product(starts, starts)]


def taken(fields: dict[tuple[str, int], Field], row: str, microscope: Microscope | None) -> dict[int, Field]:
    """Return a row's fields by column, as the microscope took them."""
    own = {column: fields[row, column] for column in COLUMNS}
    return own if microscope is None else {c: microscope.photograph(field, c) for c, field in own.items()}


def unseen_microscope(row: str, seed: int) -> Microscope:
    """Draw the microscope that degrades a held-out row: no training row ever sees it."""
    return Microscope.draw(900_000 + 100 * ROWS.index(row) + seed, UNSEEN)


def pseudo_batch(name: str, row: dict[int, Field]) -> PlateSites:
    """Make a training plate of a row's columns 01 (controls), 02 and 12.

    There is one field a well: its quarters stand for wells, so that control wells can be held against one another.
    """
    labels = {CONTROL: -1, NEGATIVE: 0, POSITIVE: 1}
    sites = [(column, tile) for column in labels for tile in tiles(row[column])]
    columns = np.array([column for column, _ in sites])
    wells = np.array([f"{row_name(number % 16 // 4)}{column:02d}" for number, column in enumerate(columns)])
    images = np.stack([np.round(prepare_field(list(tile), RECIPE) * 255).astype(np.uint8) for _, tile in sites])
    return PlateSites(
        plate=name, lab="bbbc013", batch=name, wells=wells,
        names=columns.astype(str), labels=np.array([labels[column] for column in columns]), controls=columns == CONTROL,
        images=images, intensities=np.zeros((len(sites), 2, 2), np.float32), recipe=RECIPE,
    )  # fmt: skip


def training_plates(fields: dict[tuple[str, int], Field], rows: Sequence[str], *, varied: bool) -> list[PlateSites]:
    """Make pseudo-batches of the rows, each also as VARIANTS other microscopes would have taken it when ``varied``."""
    plates = []
    for row in rows:
        microscopes: list[Microscope | None] = [None]
        if varied:
            microscopes += [Microscope.draw(1000 * ROWS.index(row) + number, TRAINING) for number in range(VARIANTS)]
        plates += [pseudo_batch(f"{row}{number}", taken(fields, row, m)) for number, m in enumerate(microscopes)]
    return plates


# --- training --------------------------------------------------------------------------------------------------------


def trained_bundle(plates: list[PlateSites], method: Method, seed: int, steps: int, out: Path) -> Path:
    """Train on pseudo-batches for a fixed number of steps and export.

    There is no further row to hold out for validation: nothing is tuned, nothing stops early, the temperature stays 1, and
    the thresholds of distances are those of training rows.
    """
    torch.manual_seed(seed)
    mean, std = moments(plates)
    recipe = replace(RECIPE, mean=mean, std=std)
    network = ResNet(NetworkSpec(channels=2, classes=2, depth=18, width=8, antialiased=True))
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, steps))
    shape = EpisodeShape(treated=16, controls_min=4, controls_max=16, plates=3)
    episodes = Episodes(
        plates, recipe, shape, crop=CROP_PX, seed=seed, first=0, steps=steps, with_controls=method.with_controls
    )
    for step in range(steps):
        optimiser.zero_grad()
        training_loss(network, method, episodes[step]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    ensemble = Ensemble([network.eval()])
    names = [plate.plate for plate in plates]
    calibration = calibrate(ensemble, method, recipe, plates, plates, [names])
    manifest = Manifest(
        name="translocation", classes=CLASSES, recipe=recipe, method=method.name, context=method.context,
        features=ensemble.features, embedding_dim=ensemble.embedding_dim, minimum_control_wells=1,
        max_context_sites=MAX_CONTEXT_SITES, temperature=1.0, network=network.spec.to_json(),
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    golden = plates[0].served(context_rows(plates[0], 4), recipe)
    export_bundle(ensemble, out, manifest, calibration.training_statistics, calibration.embedding_reference, golden)
    return out


# --- asking the service ----------------------------------------------------------------------------------------------


def written(row: dict[int, Field], columns: Sequence[int], folder: Path) -> list[Path]:
    """Write a row's tiles as ``<well>_<site>_<channel>.tif``; return the files of ``columns``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for column in columns:
        for site, tile in enumerate(tiles(row[column]), start=1):
            for channel, plane in zip(CHANNELS, tile, strict=True):
                files.append(folder / f"A{column:02d}_{site}_{channel}.tif")
                tifffile.imwrite(files[-1], plane)
    return files


def ask(bundle: Path, row: dict[int, Field], folder: Path) -> pd.DataFrame:
    """Serve the bundle, adapt it to column 01, and classify the other columns adapted and unadapted."""
    shutil.rmtree(folder, ignore_errors=True)
    controls = written(row, [CONTROL], folder / "controls")
    treated = written(row, [NEGATIVE, *DOSES, POSITIVE], folder / "treated")
    server = Server(bundle, folder)
    try:
        with AnchorwellClient(server.url) as client:
            client.adapt("row", controls)
            answers = {True: client.predict("row", treated), False: client.predict("row", treated, context="source")}
    finally:
        server.stop()
    return pd.DataFrame([
        {"adapted": adapted, "column": int(well.well[1:]), "p": well.probabilities["translocated"]}
        for adapted, answer in answers.items() for well in answer.wells
    ])  # fmt: skip


def one_setting(task: tuple[str, bool, str, int, int]) -> pd.DataFrame:
    """Train one method without one row, and ask about that row as it is and as another microscope took it."""
    held_out, varied, name, seed, steps = task
    torch.set_num_threads(1)
    fields = read_fields()
    method = make_method(name)
    folder = OUT / f"{held_out}-{'varied' if varied else 'plain'}-{name}-{seed}"
    scores = folder / "answers.csv"
    if scores.is_file():
        return pd.read_csv(scores)
    plates = training_plates(fields, [row for row in ROWS if row != held_out], varied=varied)
    bundle = trained_bundle(plates, method, seed, steps, folder / "bundle")
    degraded = unseen_microscope(held_out, seed)
    found = []
    for images, microscope in (("as taken", None), ("degraded", degraded)):
        answers = ask(bundle, taken(fields, held_out, microscope), folder / images.replace(" ", "-"))
        found.append(answers.assign(images=images))
    keys = {"row": held_out, "training": "varied" if varied else "plain", "method": name, "seed": seed}
    pd.concat(found, ignore_index=True).assign(**keys).to_csv(scores, index=False)
    return pd.read_csv(scores)


# --- report ----------------------------------------------------------------------------------------------------------

KEYS = ["training", "images", "method", "adapted"]


def scored(answers: pd.DataFrame) -> pd.DataFrame:
    """Per row and seed: rank correlation of P(translocated) with dose, and whether both trained columns are called."""
    rows = []
    for key, group in answers.groupby([*KEYS, "row", "seed"]):
        p = group.set_index("column")["p"]
        rho = float(spearmanr([p[column] for column in DOSES], list(DOSES)).statistic)
        named = dict(zip([*KEYS, "row", "seed"], key, strict=True))
        called = {"positive_called": float(p[POSITIVE] > CALL), "negative_called": float(p[NEGATIVE] < CALL)}
        rows.append({**named, "rho": rho, **called})
    return pd.DataFrame(rows)


def gfp_mean(field: Field) -> float:
    """Mean GFP intensity."""
    return float(field[0].mean())


def nuclear_ratio(field: Field) -> float:
    """GFP in nuclei over GFP in a ring of cytoplasm around them, both above the background: made by hand."""
    dna = gaussian_filter(field[1], 2)
    middle, top = np.percentile(dna, [50, 99])
    nuclei = dna > middle + 0.3 * (top - middle)
    ring = binary_dilation(nuclei, iterations=6) & ~binary_dilation(nuclei)
    background = np.percentile(field[0], 5)
    return float((field[0][nuclei].mean() - background) / (field[0][ring].mean() - background))


def without_network(fields: dict[tuple[str, int], Field], rows: str, seeds: Sequence[int]) -> pd.DataFrame:
    """Rank correlation with dose of measures that need no network, signed by columns 02 and 12 of the training rows."""
    found = []
    for name, measure in (("mean GFP intensity", gfp_mean), ("hand-made nuclear ratio", nuclear_ratio)):
        change = {row: measure(fields[row, POSITIVE]) - measure(fields[row, NEGATIVE]) for row in ROWS}
        for row, (images, seed) in itertools.product(rows, [("as taken", None), *(("degraded", seed) for seed in seeds)]):
            own = taken(fields, row, None if seed is None else unseen_microscope(row, seed))
            sign = np.sign(sum(change[other] for other in ROWS if other != row))
            rho = sign * spearmanr([measure(own[column]) for column in DOSES], list(DOSES)).statistic
            found.append({"measure": name, "images": images, "row": row, "seed": seed, "rho": float(rho)})
    return pd.DataFrame(found)


def figures(scores: pd.DataFrame, networkless: pd.DataFrame) -> list[Bar]:
    """Turn mean scores into figures; the first look's values are the bounds."""
    found = [
        Bar(f"rank correlation, {measure}, {images}", float(group["rho"].mean()), "")
        for (measure, images), group in networkless.groupby(["measure", "images"], sort=False)
    ]
    for key, group in scores.groupby(KEYS):
        training, images, method, adapted = key
        way = f"{training} {images} {method} {'adapted' if adapted else 'source'}"
        ours = method == "cs-arm-bn" and adapted
        bound = ({"as taken": 0.74, "degraded": 0.75}[str(images)]) if ours else None
        found.append(Bar(f"rank correlation, {way}", float(group["rho"].mean()), "", at_least=bound))
        found.append(Bar(f"positive wells called, {way}", float(group["positive_called"].mean()), ""))
        found.append(Bar(f"negative wells called, {way}", float(group["negative_called"].mean()), ""))
    return found


def by_row(scores: pd.DataFrame) -> str:
    """Rank correlation of each held-out row, mean over seeds with its range."""
    rows = sorted(scores["row"].unique())
    titles = " | ".join(f"row {row}" for row in rows)
    lines = [
        f"| training | row's images | method | adapted | {titles} |",
        "| --- | --- | --- | --- |" + " ---: |" * len(rows),
    ]
    for key, group in scores.groupby(KEYS):
        by = group.groupby("row")["rho"]
        cells = [f"{by.mean()[row]:.2f} ({by.min()[row]:.2f} to {by.max()[row]:.2f})" for row in rows]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def draw(answers: pd.DataFrame, path: Path) -> None:
    """Plot P(translocated) against dose step: unadapted ERM and adapted CS-ARM-BN, a line a row and seed."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the backend is chosen)

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey=True)
    ways = (("erm", False, "ERM, unadapted"), ("cs-arm-bn", True, "CS-ARM-BN, adapted to column 01"))
    chosen = answers[(answers["training"] == "varied") & answers["column"].isin(DOSES)]
    for across, (method, adapted, title) in enumerate(ways):
        for down, images in enumerate(("as taken", "degraded")):
            axis = axes[down][across]
            part = chosen[(chosen["method"] == method) & (chosen["adapted"] == adapted) & (chosen["images"] == images)]
            for _, line in part.groupby(["row", "seed"]):
                axis.plot(line["column"] - 2, line["p"], marker="o", alpha=0.6)
            axis.set_title(f"{title}; held-out row {images}", fontsize=10)
    figure.supxlabel("dose step (columns 03 to 11)")
    figure.supylabel("P(translocated)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, then write and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"skipped: the real images are not at {DATA}")
    tasks = list(itertools.product(arguments.rows, (False, True), ("cs-arm-bn", "erm"), arguments.seeds, [arguments.steps]))
    found = []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for task, answers in zip(tasks, pool.map(one_setting, tasks), strict=True):
            print(*task, flush=True)
            found.append(answers)
    answers = pd.concat(found, ignore_index=True)
    scores = scored(answers)
    bars = figures(scores, without_network(read_fields(), arguments.rows, arguments.seeds))
    write_bars(bars, Path("build/real-images.json"))
    report = f"{table(bars)}\n\n{by_row(scores)}"
    Path("build/real-images.md").write_text(report + "\n", encoding="utf-8")
    draw(answers, Path("build/real-images.png"))
    print(report)


if __name__ == "__main__":
    main()
