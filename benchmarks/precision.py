"""What bfloat16 and fp16 cost in accuracy and calibration, beside fp32, on trained networks and a new lab's plates.

The networks are those that ``benchmarks/science.py`` keeps, the plates the new lab of their seed, simulated again where they
are not there. Statistics are measured as the service measures them, in fp32. Wells are classified on every processor by
rounding: weights and what every layer gives become bfloat16, and sums in between are fp32, as in such arithmetic, with a
rounding more than a runtime that joins layers; and by OpenVINO where the processor has bfloat16. fp16 is the graph that a
GPU is given, rounded likewise wherever it computes in halves, for a CPU would not. Simulated plates: what is shown is shown
for the simulator's batch effects.

Run: ``python -m benchmarks.precision [--workers 2]``; writes build/precision.json.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
from numpy.typing import NDArray

from benchmarks.bars import Bar, conclude
from benchmarks.science import GRID, KEPT, KEPT_NETWORKS, OUT, PLAN, fetched
from model.bundle import CLASSIFY, INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, INPUTS, MEASURE, OUTPUTS, Measured
from model.network import Ensemble
from model.predictions import site_probabilities
from model.statistics import BatchNormStatistics, Prior, TrainingStatistics, summarise_training
from service.errors import StartError
from service.graphs import Graph, as_products
from service.runtime import Session, open_runtime
from service.runtime_onnx import OnnxSession
from training.dataset import PlateSites
from training.export import measure_float64, write_graphs
from training.grid import read_grid
from training.metrics import accuracy, calibrated
from training.plates import open_plates
from training.train import Run, load_network

THREADS, CONTEXT_SITES, CHUNK = 2, 128, 32
NOT_ROUNDED = {"Constant", "Shape", "Cast", "Split", "Reshape", "Unsqueeze", "Squeeze", "Concat", "Gather"}
"""What computes nothing."""
ENTERING = "images_entering"

Float = NDArray[np.float32]
Logits = Callable[[Float], Float]


@dataclass(frozen=True)
class Network:
    """A kept network as graphs in a folder, and the temperature that it was calibrated with."""

    run: Run
    folder: Path
    temperature: float


def network(name: str, seed: int, folder: Path, example: Float) -> Network:
    """Export a kept network's graphs."""
    run = Run.load(KEPT / name)
    ensemble = Ensemble([load_network(run).eval()])
    write_graphs(ensemble, folder, example[:2], _described(ensemble, example))
    cells = pd.read_parquet(KEPT / "cells.parquet")
    context = "source" if name == "erm" else "controls"
    kept = cells["temperature"][(cells["method"] == name) & (cells["context"] == context) & (cells["seed"] == seed)]
    return Network(run, folder, float(kept.iloc[0]))


def _described(ensemble: Ensemble, example: Float) -> TrainingStatistics:
    mean, variance = measure_float64(ensemble, example)
    count = len(example)
    source = BatchNormStatistics(mean.astype(np.float32), variance.astype(np.float32), sites=count, wells=count)
    return summarise_training([source, source], source=source, held_out=[source])


def answers(found: Network, plates: list[PlateSites]) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.int64]]]:
    """Every way's well probabilities (wells, classes) and labels of each plate."""
    exact = open_runtime("cpu", "fp32", THREADS)
    measuring, graph = (Graph.read(found.folder / name) for name in (MEASURE, CLASSIFY))
    measure = exact.session(measuring, measures=True)
    ways: dict[str, Session] = {
        "fp32": exact.session(graph),
        "bf16 by rounding": rounded(graph),
        "fp16 by rounding": RoundedHalves(graph),
    }
    with suppress(StartError):
        ways["bf16"] = open_runtime("cpu", "bf16", THREADS).session(graph)
    for plate in plates:
        context = plate.served(plate.context_rows(CONTEXT_SITES), found.run.recipe)
        prior = Prior.none(len(measuring.centre))
        given = dict(zip(INPUTS[MEASURE], (context, prior.mean, prior.variance, prior.weight), strict=True))
        measured = Measured(*measure.run(OUTPUTS[MEASURE], given))
        inputs = {INPUT_MEAN: measured.mean, INPUT_VARIANCE: measured.variance}
        images = plate.served(plate.treated, found.run.recipe)
        for name, session in ways.items():
            yield name, *_wells(plate, _logits(session, images, inputs), found.temperature)


# --- bfloat16 by rounding --------------------------------------------------------------------------------------------


def rounded(graph: Graph) -> Session:
    """Make a session that computes as bfloat16 does."""
    content, weights = graph.with_scale_and_shift(as_products).with_weights_as_inputs()
    model = onnx.ModelProto.FromString(content)
    inputs = [item for item in model.graph.input if item.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items())
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array(bfloat16(onnx.numpy_helper.to_array(tensor)), tensor.name))
    entering = onnx.helper.make_node("Identity", [INPUT_IMAGES], [ENTERING])
    for node in model.graph.node:
        node.input[:] = [ENTERING if name == INPUT_IMAGES else name for name in node.input]
    nodes = [*_with_rounding(entering), *(part for node in model.graph.node for part in _with_rounding(node))]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return OnnxSession(_as_it_is(model, graph.weights.folder), measures=False)


class RoundedHalves:
    """A session that computes as fp16 does: what a GPU is given, in single precision, with its roundings."""

    def __init__(self, graph: Graph) -> None:
        folded = graph.folded(half=True)
        fold, model = (onnx.ModelProto.FromString(part.content) for part in (folded.fold, folded.classify))
        self._fold = _as_it_is(fold, graph.weights.folder)
        halves = {item.name for item in model.graph.input if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
        for item in model.graph.input:
            item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        nodes: list[Any] = []
        for node in model.graph.node:
            to_single = node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT
            to_half = node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16
            if to_half:
                node.CopyFrom(onnx.helper.make_node("Identity", node.input, node.output))
            if to_half or (not to_single and halves.intersection(node.input)):
                halves.update(node.output)
                nodes += _with_rounding(node, onnx.TensorProto.FLOAT16)
            else:
                nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        self._classify = _as_it_is(model, graph.weights.folder)

    def prepare(self, _: BatchNormStatistics) -> None:
        """Nothing: statistics are folded in for each pass."""

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run it."""
        names = [output.name for output in self._fold.get_outputs()]
        made = self._fold.run(names, {name: given[name] for name in (INPUT_MEAN, INPUT_VARIANCE)})
        weights = {name: value.astype(np.float32) for name, value in zip(names, made, strict=True)}
        found: list[Float] = self._classify.run(list(outputs), {INPUT_IMAGES: given[INPUT_IMAGES], **weights})
        return found


def _as_it_is(model: Any, folder: Path) -> Any:
    """Make onnxruntime's session of a graph that it must not change, or it takes the roundings out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _with_rounding(node: Any, to: int = onnx.TensorProto.BFLOAT16) -> list[Any]:
    """Round what a layer gives."""
    if node.op_type in NOT_ROUNDED or len(node.output) > 1:
        return [node]
    exact, half, out = f"{node.output[0]}_exact", f"{node.output[0]}_half", node.output[0]
    node.output[0] = exact
    make = onnx.helper.make_node
    return [
        node,
        make("Cast", [exact], [half], to=to),
        make("Cast", [half], [out], to=onnx.TensorProto.FLOAT),
    ]


def bfloat16(values: Float) -> Float:
    """Round to the nearest bfloat16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    kept: Float = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return kept


# --- figures ---------------------------------------------------------------------------------------------------------


def _logits(session: Session, images: Float, also: dict[str, Float]) -> Float:
    parts = [images[at : at + CHUNK] for at in range(0, len(images), CHUNK)]
    return np.concatenate([session.run(OUTPUTS[CLASSIFY], {INPUT_IMAGES: part, **also})[0] for part in parts])


def _wells(plate: PlateSites, logits: Float, temperature: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sites, rows = site_probabilities(logits, temperature), plate.treated
    wells = sorted(set(plate.wells[rows].tolist()))
    labels = np.array([plate.labels[rows][plate.wells[rows] == well][0] for well in wells])
    return np.stack([sites[plate.wells[rows] == well].mean(axis=0) for well in wells]), labels


def bars_of(name: str, found: Network, plates: list[PlateSites]) -> list[Bar]:
    """How far reduced precision's answers are from fp32's, and what they cost."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    labels: list[NDArray[np.int64]] = []
    for way, probabilities, each in answers(found, plates):
        parts.setdefault(way, []).append(probabilities)
        labels += [each] if way == "fp32" else []
    truth = np.concatenate(labels)
    wells = {way: np.concatenate(part) for way, part in parts.items()}
    exact = wells.pop("fp32")
    right, score = accuracy(exact, truth), calibrated(exact, truth)
    bars = [
        Bar(f"{name}, wells", len(truth), ""),
        Bar(f"{name}, fp32: accuracy", 100 * right, "%"),
        Bar(f"{name}, fp32: log loss", score.nll, "nats"),
        Bar(f"{name}, fp32: calibration error", 100 * score.ece, "points"),
    ]
    for way, half in wells.items():
        now = calibrated(half, truth)
        bars += [
            Bar(f"{name}, {way}: accuracy lost", 100 * (right - accuracy(half, truth)), "points", at_most=1),
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
    lab = int(str(asked.test_lab).rpartition("_")[2])
    fetched(asked.seed, folder, arguments.workers, replace(PLAN, labs=1, first_lab=lab))
    bars = []
    for name in KEPT_NETWORKS:
        run = Run.load(KEPT / name)
        plates = list(open_plates(folder, run.classes).values())
        example = plates[0].served(plates[0].context_rows(8), run.recipe)
        with tempfile.TemporaryDirectory() as graphs:
            bars += bars_of(name, network(name, asked.seed, Path(graphs), example), plates)
    conclude(bars, Path("build/precision.json"))


if __name__ == "__main__":
    main()
