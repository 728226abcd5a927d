"""The network on one machine: classifying by a batch's statistics, and measuring them, beside what others would run.

Every way takes the same images in turn. ``folded`` is onnxruntime on the same network with the statistics folded into the
convolutions, a well in each pass, as others' services run it; ``folded_a_core`` is the same run as ours is, a site on each
core. On a GPU ``folded`` takes as many sites in a pass as ours does; ours folds a batch's statistics in once,
``ours_folded_each_pass`` in every pass, and ``statistics_as_inputs`` is the bundle's graph as it lies there. ``one_pass`` is
our own graph that classifies, run as the one that measures: all images in one pass on all cores. The floor is the time that
the multiplications take at the speed of this machine's matrix products, in turn with the rest.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.interleaved import Way, interleaved
from benchmarks.network import Float
from benchmarks.plain_pytorch import ResNet50, adapt
from model.bundle import CLASSIFY, INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, OUTPUT_LOGITS, Bundle
from model.statistics import BatchNormStatistics
from service.engine import BundleEngine
from service.errors import StartError
from service.graphs import Graph
from service.runtime import Device, Kept, Runtime, open_runtime
from service.runtime_onnx import GPU_SITES, GpuRuntime, OnnxRuntime
from training.cost import Workload, flops

WELL_SITES, WELLS, CONTEXT_SITES, CALIBRATION_SITES = 9, 2, 64, 8
GPU_WELLS, GPU_PASSES = 16, (1, 9, 64)
SAME_LOGITS, ROUGHLY = 1e-2, {"fp16": 0.1, "bf16": 0.5, "int8": 1.0}
MATRIX_SIDE = 2048
CLOSELY = 4
"""So many times as often those are timed that lie within a few hundredths of each other."""
Classify = Callable[[Float], Float]


@dataclass(frozen=True)
class Machine:
    """What to measure on."""

    device: Device = "cpu"
    threads: int = 2

    @property
    def wells(self) -> int:
        """How many are classified together."""
        return GPU_WELLS if self.device == "cuda" else WELLS

    @property
    def torch(self) -> str:
        """Torch's name for it."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def providers(self) -> list[Any]:
        """Onnxruntime's names for it; in the arithmetic that ours has."""
        cuda = [("CUDAExecutionProvider", {"use_tf32": "0"})] if self.device == "cuda" else []
        return [*cuda, "CPUExecutionProvider"]

    def runtimes(self) -> dict[str, Runtime]:
        """What the service could run a bundle on here; ``ours`` is what it chooses."""
        found = {"ours": open_runtime(self.device, "fp32", self.threads)}
        if self.device == "cuda":
            return found | {
                "ours_fp16": GpuRuntime("fp16", self.threads),
                "ours_folded_each_pass": GpuRuntime("fp32", self.threads, kept=0),
                **{f"ours_{sites}_a_pass": GpuRuntime("fp32", self.threads, pass_sizes=(sites,)) for sites in GPU_PASSES},
            }
        found["ours_statistics_as_inputs"] = OnnxRuntime(self.threads, kept=Kept(most_bytes=0))
        with suppress(StartError):
            found["ours_bf16"] = open_runtime("cpu", "bf16", self.threads)
        with suppress(ImportError):
            from service.runtime_openvino import OpenVinoRuntime  # noqa: PLC0415 (it is an extra)

            found["openvino"] = OpenVinoRuntime("fp32", self.threads, measuring=found["ours"])
        return found


def engine_bars(folder: Path, machine: Machine, rounds: int) -> list[Bar]:
    """Time every way and hold the ratios against their bounds."""
    torch.set_num_threads(machine.threads)
    torch.backends.cudnn.allow_tf32 = False
    bundle = network.bundle(folder)
    wells = [network.images(WELL_SITES, seed) for seed in range(machine.wells)]
    context = network.images(CONTEXT_SITES, seed=9)
    engines = {name: BundleEngine(bundle, runtime) for name, runtime in machine.runtimes().items()}
    mean, variance, _ = engines["ours"].measure(context)
    statistics = BatchNormStatistics(mean, variance, sites=len(context), wells=len(context))
    ways = {name: classifying(engine, statistics) for name, engine in engines.items()}
    ways |= _peers(bundle, machine, context, statistics)
    for name, way in ways.items():
        difference = float(np.abs(way(wells[0]) - ways["folded"](wells[0])).max())
        if not difference < next((rough for kind, rough in ROUGHLY.items() if kind in name), SAME_LOGITS):
            raise SystemExit(f"{name} answers otherwise, by {difference:.1e}: it is no peer")
        print(f"{name}: logits within {difference:.1e} of onnxruntime's")
    whole = np.concatenate(wells)
    timed: dict[str, Way] = {name: (lambda way=way: way(whole)) for name, way in ways.items()}  # type: ignore[misc]
    one = {f"{name}_one_well": (lambda way=ways[name]: way(wells[0])) for name in ("ours", "folded")}
    found = interleaved(timed | one | {"matrices": _matrices(machine)}, rounds)
    closely = interleaved({name: timed[name] for name in ("ours", "folded")}, CLOSELY * rounds)
    beside = interleaved({name: timed[name] for name in ("ours", "torch_eager")}, rounds)
    others = [name for name in ways if name not in ("ours", "folded", "torch_eager")]
    bars = [
        closely.ratio("classify_over_folded", "folded", "ours", at_least=0.9 if machine.device == "cuda" else 0.97),
        beside.ratio("classify_over_torch_eager", "torch_eager", "ours", at_least=2.5 if machine.device == "cpu" else None),
        *(found.ratio(f"{name}_over_torch_eager", "torch_eager", name) for name in others),
        *(found.rate(f"{name}_images_per_s", name, len(whole), "/s") for name in ways),
        found.ratio("classify_one_well_over_folded", "folded_one_well", "ours_one_well"),
        found.ratio("classify_over_matrix_throughput", "matrices", "ours"),
    ]
    return bars + _measuring(engines, statistics, context, machine, rounds)


def classifying(engine: BundleEngine, statistics: BatchNormStatistics) -> Classify:
    """How an engine classifies sites of a plate."""
    return lambda images: engine.classify(images, statistics).logits[:, 0]


def _peers(bundle: Bundle, machine: Machine, context: Float, statistics: BatchNormStatistics) -> dict[str, Classify]:
    """The same network as others would run it, a well in each pass; on a GPU onnxruntime as many sites as we do."""
    cuda = machine.device == "cuda"
    folded, alone = (
        _logits_of(network.folded_session(bundle, statistics, _options(threads), machine.providers))
        for threads in (machine.threads, 1)
    )
    eager = _torch_network(context, machine)
    ways: dict[str, Classify] = {
        "folded": _in_passes(folded, GPU_SITES[-1] if cuda else WELL_SITES),
        "torch_eager": _in_passes(lambda images: _torch_logits(eager, images, machine), WELL_SITES),
    }
    if cuda:
        as_it_is = network.given_session(bundle, _options(machine.threads), machine.providers)
        given = {INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        ways["statistics_as_inputs"] = _in_passes(_logits_of(as_it_is, given), GPU_SITES[-1])
    else:
        ways["folded_a_core"] = _a_core(alone, machine)
        ways["folded_int8_a_core"] = _a_core(
            _logits_of(network.int8_session(bundle, statistics, context[:CALIBRATION_SITES], _options(1))), machine
        )
    if shutil.which("g++"):
        compiled = torch.compile(eager)
        ways["torch_compiled"] = _in_passes(lambda images: _torch_logits(compiled, images, machine), WELL_SITES)
    return ways


def _in_passes(classify: Classify, sites: int) -> Classify:
    return lambda images: np.concatenate([classify(images[at : at + sites]) for at in range(0, len(images), sites)])


def _a_core(classify: Classify, machine: Machine) -> Classify:
    pool = ThreadPoolExecutor(machine.threads)
    return lambda images: np.concatenate(list(pool.map(classify, np.split(images, len(images)))))


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return options


def _logits_of(session: Any, also: Mapping[str, Float] | None = None) -> Classify:
    given = dict(also or {})
    return lambda images: np.asarray(session.run([OUTPUT_LOGITS], {INPUT_IMAGES: images, **given})[0][:, 0])


def _measuring(
    engines: Mapping[str, BundleEngine],
    statistics: BatchNormStatistics,
    context: Float,
    machine: Machine,
    rounds: int,
) -> list[Bar]:
    """Measuring a context, over a plain pass of it on the same runtime, over classifying it, and torch's over ours."""
    plain, ours = _torch_network(context[:2], machine), engines["ours"]
    whole = torch.from_numpy(context)
    session = machine.runtimes()["ours"].session(Graph.read(ours.bundle.path.resolve() / CLASSIFY), measures=True)
    given = {INPUT_IMAGES: context, INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
    ways: dict[str, Way] = {
        "one_pass": lambda: session.run([OUTPUT_LOGITS], given),
        "classify": lambda: ours.classify(context, statistics),
        **{f"{name}_measure": (lambda engine=engine: engine.measure(context)) for name, engine in engines.items()},  # type: ignore[misc]
        "torch_measure": lambda: _adapt(plain, whole, machine),
    }
    found = interleaved(ways, max(3, rounds // 2))
    return [
        found.ratio("measure_over_one_pass", "ours_measure", "one_pass", at_most=1.25),
        found.ratio("measure_over_classify", "ours_measure", "classify"),
        *(found.ratio(f"{name}_measure_over_torch_eager", "torch_measure", f"{name}_measure") for name in engines),
    ]


def _adapt(plain: ResNet50, images: torch.Tensor, machine: Machine) -> None:
    adapt(plain, images.to(machine.torch))
    if machine.device == "cuda":
        torch.cuda.synchronize()


def _torch_network(context: Float, machine: Machine) -> ResNet50:
    """Torch's network as a lab has it once it is adapted."""
    plain = ResNet50(context.shape[1], network.CLASSES)
    plain.load_state_dict(network.network().state_dict(), strict=False)
    plain.to(machine.torch)
    adapt(plain, torch.from_numpy(context).to(machine.torch))
    return plain


@torch.no_grad()
def _torch_logits(module: Callable[[torch.Tensor], torch.Tensor], images: Float, machine: Machine) -> Float:
    return module(torch.from_numpy(images).to(machine.torch)).cpu().numpy()


def _matrices(machine: Machine) -> Way:
    """Products of large matrices: how long the multiplications of the wells would take at their speed."""
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=machine.torch) for _ in range(2))
    needed = machine.wells * WELL_SITES * flops(Workload(network.SPEC, network.SIZE, 1, 1, 1, 1))["forward"]
    share = needed / (2 * MATRIX_SIDE**3)

    def multiply() -> float:
        begun = time.perf_counter()
        for _ in range(math.ceil(share)):
            product = left @ right
        float(product[0, 0])  # which waits for it
        return (time.perf_counter() - begun) * share / math.ceil(share)

    return multiply
