"""Science: the simulated grid of methods, settings, seeds and cells, and whether it shows the pattern that was published.

``make science`` simulates and fetches the plates of every seed of ``benchmarks/science.yaml``, trains every network,
evaluates every cell, and writes ``build/science.json`` and a report in ``build/science/report``. What lies finished in
``build/science`` is not made again. ``--keep`` then puts the figures and the networks of one seed beside this file.

``make science-check`` takes the figures from the kept tables, simulates one seed's new lab again, and holds what the kept
networks answer on it against the kept scores. Simulated plates: what is shown is shown for the simulator's batch effects.

Run: ``python -m benchmarks.science [--workers 2] [--keep | --check]``.
"""

import argparse
import itertools
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks.bars import Bar, table, write_bars
from examples.small import fetched_plates
from model.images import ImageRecipe
from training.embeddings import Columns, write_baselines
from training.evaluate import TrainedNetwork, answers_of, outcome, scores
from training.grid import Grid, SeedAsked, evaluate_grid, read_grid, train_missing, write_table
from training.intervals import Estimate, Resamples
from training.methods import WAYS
from training.plates import open_plates, write_whole
from training.progress import BEST, LAST
from training.queries import ALL, DEFAULT, Draws
from training.report import write_report
from training.results import Results, read_results
from training.simulate import CHANNELS, SimulationPlan
from training.train import RUN, Run, load_network

GRID = Path(__file__).with_name("science.yaml")
KEPT = Path(__file__).with_name("science")
OUT = Path("build/science")
RECIPE = ImageRecipe(channels=CHANNELS, size=80, pixel_size_um=1.85)
PLAN = SimulationPlan(labs=5, batches=3, plates=6, sites=2, wells_per_class=6, inactive_wells=0)
ERM, OURS, ARM = ("erm", "source"), ("cs-arm-bn", "controls"), ("arm-bn", "treated")
KEPT_NETWORKS = ("erm", "cs-arm-bn")
LARGEST_DIFFERENCE = 0.01

Way = tuple[str, str]


# --- plates, networks, cells -----------------------------------------------------------------------------------------


def fetched(seed: int, out: Path, workers: int, plan: SimulationPlan = PLAN) -> None:
    """Simulate a seed's plates, fetch them into ``out`` and let their TIFFs go, unless that was done."""
    done, data = out.with_name(f"{out.name}.json"), out.with_name(f"data-{out.name}")
    made = json.dumps(asdict(replace(plan, seed=seed)))
    if done.is_file() and done.read_text(encoding="utf-8") == made:
        return
    fetched_plates(replace(plan, seed=seed), data, {out: RECIPE}, workers)
    write_whole(done, made.encode())
    shutil.rmtree(data)


def trained(grid: Grid, seed: int, network: str) -> None:
    """Train one network of one seed on one thread, unless it was."""
    torch.set_num_threads(1)
    ways = tuple(way.name for way in grid.ways if way.network == network)
    train_missing(grid.only([seed]).model_copy(update={"methods": ways, "embeddings": ()}), partial(print, flush=True))


def evaluated(grid: Grid, seed: int) -> None:
    """Evaluate one seed on one thread."""
    torch.set_num_threads(1)
    evaluate_grid(grid.only([seed]), [], OUT / "results", tell=partial(print, flush=True), progress=_silent)


def everything(grid: Grid, workers: int) -> Results:
    """Make every table that is missing; returns them all."""
    for asked in grid.seeds:
        fetched(asked.seed, asked.plates, workers)
    seeds = [asked.seed for asked in grid.seeds]
    networks = dict.fromkeys(way.network for way in grid.ways)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(trained, grid, seed, name) for seed, name in itertools.product(seeds, networks)]:
            future.result()
        for future in [pool.submit(evaluated, grid, seed) for seed in seeds]:
            future.result()
    evaluate_grid(grid, [], OUT / "results", tell=print, progress=_silent)
    write_baselines(OUT / "results" / "embeddings.parquet", OUT / "results", "", Columns())
    return read_results(OUT / "results")


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


# --- figures ---------------------------------------------------------------------------------------------------------


class Figures:
    """Accuracy per well from a table of cells, every figure from the same draws of plates and seeds."""

    def __init__(self, cells: pd.DataFrame) -> None:
        self.cells = cells
        self.resamples = Resamples()

    def accuracy(
        self, way: Way, setting: str, controls: int = ALL, query_wells: int = ALL, alpha: float = float("inf"),
        *, blended: bool = False,
    ) -> Estimate:  # fmt: skip
        """Mean over plates in one cell."""
        asked = {"method": way[0], "context": way[1], "setting": setting, "controls": controls}
        asked |= {"query_wells": query_wells, "alpha": alpha, "blended": blended}
        rows = self.cells
        for column, value in asked.items():
            rows = rows[rows[column] == value]
        return self.resamples.mean(rows, "well_accuracy")

    def counts(self, way: Way) -> list[int]:
        """Numbers of control wells that a way was evaluated with, rising; ALL is not one of them."""
        rows = self.cells[(self.cells["method"] == way[0]) & (self.cells["context"] == way[1]) & ~self.cells["blended"]]
        return sorted({int(count) for count in rows["controls"]} - {ALL})


def pattern(figures: Figures) -> list[Bar]:
    """Hold what was published of the method against the grid, on the new lab: points are hundredths per well."""
    home, away = figures.accuracy(ERM, "in_domain"), figures.accuracy(ERM, "new_lab")
    ours = figures.accuracy(OURS, "new_lab")
    found = [
        _bar("erm_in_domain", home, "", at_least=0.7),
        _bar("cs_arm_bn_in_domain", figures.accuracy(OURS, "in_domain"), "", at_least=0.85),
        _bar("erm_loss_in_domain_to_new_lab", _points(home - away), "points", at_least=10),
        _bar("cs_arm_bn_over_erm_new_lab", _points(ours - away), "points", at_least=10),
        _bar("cs_arm_bn_share_of_loss_closed", (ours - away).share_of(home - away), "", at_least=0.8),
    ]
    for name, way in (("cs_arm_bn", OURS), ("arm_bn", ARM)):
        bound = {"at_most": 3.0} if way == OURS else {"at_least": 20.0}
        mixed = figures.accuracy(way, "new_lab", query_wells=8)
        one_class = figures.accuracy(way, "new_lab", query_wells=8, alpha=0)
        found.append(_bar(f"{name}_one_class_drop", _points(mixed - one_class), "points", **bound))
        single = figures.accuracy(way, "new_lab", query_wells=1)
        found.append(_bar(f"{name}_single_well_drop", _points(figures.accuracy(way, "new_lab") - single), "points", **bound))
    return found + few_controls(figures, away)


def few_controls(figures: Figures, unadapted: Estimate) -> list[Bar]:
    """Whether accuracy rises with the number of control wells, and blended with one or two is no worse than unadapted."""
    counts = [count for count in figures.counts(OURS) if count > 0]
    line = [figures.accuracy(OURS, "new_lab", controls=count) for count in counts] + [figures.accuracy(OURS, "new_lab")]
    falls = [_points(fewer - more) for fewer, more in itertools.pairwise(line)]
    worst = max(falls, key=lambda fall: fall.value)
    found = [_bar("largest_fall_with_more_control_wells", worst, "points", at_most=2)]
    for count in (1, 2):
        own = figures.accuracy(OURS, "new_lab", controls=count, blended=True)
        found.append(_bar(f"blended_{count}_over_unadapted", _points(own - unadapted), "points", at_least=0))
        gain = own - figures.accuracy(OURS, "new_lab", controls=count)
        found.append(_bar(f"blended_{count}_over_plain", _points(gain), "points"))
    return found


def _points(estimate: Estimate) -> Estimate:
    return replace(estimate, value=100 * estimate.value, draws=100 * estimate.draws)


def _bar(name: str, estimate: Estimate, unit: str, **bounds: float) -> Bar:
    return Bar(name, estimate.value, unit, **bounds, interval=estimate.interval)


def longest_training(grid: Grid) -> Bar:
    """The longest time from a network's start to its last checkpoint, on one thread of a process that shares two cores."""
    folders = [path.parent for path in sorted((grid.runs or OUT).glob(f"seed-*/*/{RUN}"))]
    seconds = [(path / LAST).stat().st_mtime - (path / RUN).stat().st_mtime for path in folders]
    return Bar("longest_training", max(seconds) / 60, "min", at_most=60)


# --- what is kept ----------------------------------------------------------------------------------------------------


def keep(grid: Grid) -> None:
    """Put the cells, and the networks of the first seed, beside this file."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir()
    write_table(KEPT / "cells.parquet", read_results(OUT / "results").cells)
    for name in KEPT_NETWORKS:
        run = (grid.runs or OUT) / f"seed-{grid.seeds[0].seed}" / name
        (KEPT / name / BEST).parent.mkdir(parents=True)
        weights = torch.load(run / BEST, map_location="cpu", weights_only=True)["state_dict"]
        torch.save({"state_dict": weights}, KEPT / name / BEST)
        shutil.copy(run / RUN, KEPT / name / RUN)


def checked(asked: SeedAsked, cells: pd.DataFrame, workers: int) -> list[Bar]:
    """Simulate a seed's new lab again; the largest differences of what the kept networks answer from the kept scores."""
    lab = int(str(asked.test_lab).rpartition("_")[2])
    plates = OUT / f"check-{asked.seed}"
    fetched(asked.seed, plates, workers, replace(PLAN, labs=1, first_lab=lab))
    found = []
    for name in KEPT_NETWORKS:
        run = Run.load(KEPT / name)
        way = next(way for way in WAYS if way.network == name and (way.method, way.context) in (ERM, OURS))
        answers = answers_of(TrainedNetwork(load_network(run), run.method, run.recipe), way)
        differences = []
        for plate, sites in open_plates(plates, run.classes).items():
            (kept,) = _kept_rows(cells, way.method, way.context, asked.seed, plate).to_dict("records")
            answered = outcome(answers, sites, DEFAULT, Draws())
            assert answered is not None
            now = scores(answered, kept["temperature"])
            differences += [abs(now[metric] - kept[metric]) for metric in ("well_accuracy", "nll", "ece")]
        found.append(Bar(f"largest_difference_{name}", max(differences), "", at_most=LARGEST_DIFFERENCE))
    return found


def _kept_rows(cells: pd.DataFrame, method: str, context: str, seed: int, plate: str) -> pd.DataFrame:
    rows = Results(cells).default
    asked = {"method": method, "context": context, "seed": seed, "plate": plate}
    for column, value in asked.items():
        rows = rows[rows[column] == value]
    return rows


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing, or check what is kept; write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    grid = read_grid(GRID)
    if arguments.check:
        cells = pd.read_parquet(KEPT / "cells.parquet")
        bars = [*pattern(Figures(cells)), *checked(grid.seeds[0], cells, arguments.workers)]
        write_bars(bars, Path("build/science-check.json"))
    else:
        bars = [*pattern(Figures(everything(grid, arguments.workers).cells)), longest_training(grid)]
        write_bars(bars, Path("build/science.json"))
        print(f"report: {write_report(OUT / 'results', OUT / 'report')}")
        if arguments.keep:
            keep(grid)
    print(f"{table(bars)}\n\nthis call took {(time.monotonic() - started) / 60:.0f} min")
    if any(bar.holds is False for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
