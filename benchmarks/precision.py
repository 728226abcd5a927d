"""What bfloat16 costs in accuracy and calibration, beside fp32, on trained networks and a new lab's plates.

The networks are those that ``benchmarks/science.py`` keeps, the plates the new lab of their seed, simulated again where they
are not there. Statistics are measured as the service measures them, in fp32; wells are classified by sessions with a batch's
statistics as inputs (``shared``) and folded in. Simulated plates: what is shown is shown for the simulator's batch effects.

Run: ``python -m benchmarks.precision [--workers 2]``; writes build/precision.json.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.bars import Bar, table, write_bars
from benchmarks.science import GRID, KEPT, KEPT_NETWORKS, OUT, PLAN, fetched
from model.bundle import CLASSIFY, INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, INPUTS, MEASURE, OUTPUTS, Measured
from model.network import Ensemble
from model.predictions import site_probabilities
from model.statistics import BatchNormStatistics, Prior, TrainingStatistics, summarise_training
from service.graphs import Graph
from service.runtime import Session
from service.runtime_openvino import OpenVinoRuntime
from training.dataset import PlateSites
from training.export import measure_float64, write_graphs
from training.grid import read_grid
from training.metrics import accuracy, calibrated
from training.plates import open_plates
from training.train import Run, load_network

THREADS, CONTEXT_SITES, CHUNK = 2, 128, 32

Float = NDArray[np.float32]
Logits = Callable[[Float], Float]


@dataclass(frozen=True)
class Network:
    """A kept network as graphs in a folder, and the temperature that it was calibrated with."""

    run: Run
    folder: Path
    temperature: float


def network(name: str, folder: Path, example: Float) -> Network:
    """Export a kept network's graphs."""
    run = Run.load(KEPT / name)
    ensemble = Ensemble([load_network(run).eval()])
    write_graphs(ensemble, folder, example[:2], _described(ensemble, example))
    cells = pd.read_parquet(KEPT / "cells.parquet")
    context = "source" if name == "erm" else "controls"
    rows = cells[
        (cells["method"] == name) & (cells["context"] == context) & (cells["seed"] == read_grid(GRID).seeds[0].seed)
    ]
    return Network(run, folder, float(rows["temperature"].iloc[0]))


def _described(ensemble: Ensemble, example: Float) -> TrainingStatistics:
    mean, variance = measure_float64(ensemble, example)
    source = BatchNormStatistics(
        mean.astype(np.float32), variance.astype(np.float32), sites=len(example), wells=len(example)
    )
    return summarise_training([source, source], source=source, held_out=[source])


def answers(found: Network, plates: list[PlateSites]) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.int64]]]:
    """Every way's well probabilities (wells, classes) and labels of each plate."""
    exact, half = (OpenVinoRuntime(precision, THREADS) for precision in ("fp32", "bf16"))
    measuring, graph = (Graph.read(found.folder / name) for name in (MEASURE, CLASSIFY))
    measure = exact.session(measuring, measures=True)
    shared = {"fp32": exact.session(graph), "bf16 shared": half.session(graph)}
    for plate in plates:
        context = plate.served(plate.context_rows(CONTEXT_SITES), found.run.recipe)
        prior = Prior.none(len(measuring.centre))
        given = dict(zip(INPUTS[MEASURE], (context, prior.mean, prior.variance, prior.weight), strict=True))
        measured = Measured(*measure.run(OUTPUTS[MEASURE], given))
        statistics = BatchNormStatistics(measured.mean, measured.variance, sites=len(context), wells=len(context))
        inputs = {INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        ways = {name: (session, inputs) for name, session in shared.items()}
        ways["bf16 folded"] = (half.session(graph.with_constants(statistics)), {})
        images = plate.served(plate.treated, found.run.recipe)
        for name, (session, also) in ways.items():
            yield name, *_wells(plate, _logits(session, images, also), found.temperature)


def _logits(session: Session, images: Float, also: dict[str, Float]) -> Float:
    parts = [images[at : at + CHUNK] for at in range(0, len(images), CHUNK)]
    return np.concatenate([session.run(OUTPUTS[CLASSIFY], {INPUT_IMAGES: part, **also})[0] for part in parts])


def _wells(plate: PlateSites, logits: Float, temperature: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sites, rows = site_probabilities(logits, temperature), plate.treated
    wells = sorted(set(plate.wells[rows].tolist()))
    labels = np.array([plate.labels[rows][plate.wells[rows] == well][0] for well in wells])
    return np.stack([sites[plate.wells[rows] == well].mean(axis=0) for well in wells]), labels


def bars_of(name: str, found: Network, plates: list[PlateSites]) -> list[Bar]:
    """How far bfloat16's answers are from fp32's, and what they cost."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    labels: list[NDArray[np.int64]] = []
    for way, probabilities, each in answers(found, plates):
        parts.setdefault(way, []).append(probabilities)
        labels += [each] if way == "fp32" else []
    truth = np.concatenate(labels)
    wells = {way: np.concatenate(part) for way, part in parts.items()}
    exact = wells.pop("fp32")
    score = calibrated(exact, truth)
    bars = [
        Bar(f"{name}, wells", len(truth), ""),
        Bar(f"{name}, fp32: accuracy", 100 * accuracy(exact, truth), "%"),
        Bar(f"{name}, fp32: log loss", score.nll, "nats"),
        Bar(f"{name}, fp32: calibration error", 100 * score.ece, "points"),
    ]
    for way, half in wells.items():
        now = calibrated(half, truth)
        bars += [
            Bar(
                f"{name}, {way}: accuracy lost", 100 * (accuracy(exact, truth) - accuracy(half, truth)), "points", at_most=1
            ),
            Bar(f"{name}, {way}: log loss gained", now.nll - score.nll, "nats", at_most=0.02),
            Bar(f"{name}, {way}: calibration error gained", 100 * (now.ece - score.ece), "points", at_most=1),
            Bar(f"{name}, {way}: calls changed", 100 * float((exact.argmax(1) != half.argmax(1)).mean()), "%", at_most=2),
            Bar(f"{name}, {way}: largest change of a probability", float(np.abs(exact - half).max()), ""),
        ]
    return bars


def main() -> None:
    """Measure both networks, write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    asked = read_grid(GRID).seeds[0]
    folder = OUT / f"check-{asked.seed}"
    fetched(
        asked.seed, folder, arguments.workers, replace(PLAN, labs=1, first_lab=int(str(asked.test_lab).rpartition("_")[2]))
    )
    bars = []
    for name in KEPT_NETWORKS:
        run = Run.load(KEPT / name)
        plates = list(open_plates(folder, run.classes).values())
        example = plates[0].served(plates[0].context_rows(8), run.recipe)
        with tempfile.TemporaryDirectory() as graphs:
            bars += bars_of(name, network(name, Path(graphs), example), plates)
    write_bars(bars, Path("build/precision.json"))
    print(table(bars))
    if any(bar.holds is False for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
