"""The network on one machine: classifying by a batch's statistics, and measuring them, beside what others would run.

Every way takes the same images in turn. ``folded`` is onnxruntime on the same network with the statistics folded into the
convolutions, the limit for classifying; ``plain forward`` is that over the images that are measured.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.interleaved import Way, interleaved
from benchmarks.network import Float
from benchmarks.plain_pytorch import ResNet50, adapt
from model.bundle import INPUT_IMAGES, OUTPUT_LOGITS
from model.statistics import BatchNormStatistics
from service.engine import WORTH_FOLDING, OnnxEngine
from training.cost import Workload, flops

WELL_SITES, WELLS, CONTEXT_SITES = 9, 2, 64
CPU = "CPUExecutionProvider"
SAME_LOGITS = 1e-2
SESSION_TIMEOUT_S = 60.0


def engine_bars(folder: Path, threads: int, rounds: int) -> list[Bar]:
    """Time every way and hold the ratios against their bounds."""
    torch.set_num_threads(threads)
    bundle = network.bundle(folder)
    wells = [network.images(WELL_SITES, seed) for seed in range(WELLS)]
    context = network.images(CONTEXT_SITES, seed=9)
    engine, shared = OnnxEngine(bundle, "cpu", threads, folded_bytes=1 << 30), OnnxEngine(bundle, "cpu", threads)
    mean, variance = engine.measure(context)
    statistics = BatchNormStatistics(mean, variance, sites=len(context), wells=len(context))
    _wait_for_session(engine, wells[0], statistics)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    folded = network.folded_session(bundle, statistics, options, [CPU])
    eager = _torch_network(context)
    ways: dict[str, Callable[[Float], Float]] = {
        "folded": lambda images: folded.run([OUTPUT_LOGITS], {INPUT_IMAGES: images})[0][:, 0],
        "ours": lambda images: engine.classify(images, statistics).logits[:, 0],
        "shared": lambda images: shared.classify(images, statistics).logits[:, 0],
        "torch_eager": lambda images: _torch_logits(eager, images),
    }
    if shutil.which("g++"):
        compiled = torch.compile(eager)
        ways["torch_compiled"] = lambda images: _torch_logits(compiled, images)
    for name, way in ways.items():
        difference = float(np.abs(way(wells[0]) - ways["folded"](wells[0])).max())
        if not difference < SAME_LOGITS:
            raise SystemExit(f"{name} answers otherwise, by {difference:.1e}: it is no peer")
    timed: dict[str, Way] = {
        name: (lambda way=way: [way(images) for images in wells])  # type: ignore[misc]
        for name, way in ways.items()
    }
    found = interleaved(timed, rounds)
    images = WELL_SITES * WELLS
    bars = [
        found.ratio("classify_over_folded", "folded", "ours", at_least=0.97),
        found.ratio("classify_over_torch_eager", "torch_eager", "ours", at_least=2.5),
        found.ratio("shared_graph_over_folded", "folded", "shared"),
        *([found.ratio("classify_over_torch_compiled", "torch_compiled", "ours")] if "torch_compiled" in ways else []),
        *(found.rate(f"{name}_images_per_s", name, images, "/s") for name in ways),
        _floor(float(np.median(found.taken["ours"])) / images),
    ]
    return bars + _measuring(engine, ways["folded"], context, rounds)


def _measuring(engine: OnnxEngine, forward: Callable[[Float], Float], context: Float, rounds: int) -> list[Bar]:
    """Measuring a context over a plain forward pass of it, and over torch in train mode."""
    plain = ResNet50(context.shape[1], network.CLASSES)
    plain.load_state_dict(network.network().state_dict(), strict=False)
    whole = torch.from_numpy(context)
    ways: dict[str, Way] = {
        "forward": lambda: [forward(context[at : at + WELL_SITES]) for at in range(0, len(context), WELL_SITES)],
        "measure": lambda: engine.measure(context),
        "torch_measure": lambda: adapt(plain, whole),
    }
    found = interleaved(ways, rounds)
    return [
        found.ratio("measure_over_forward", "measure", "forward", at_most=1.25),
        found.ratio("measure_over_torch_eager", "torch_measure", "measure"),
    ]


def _wait_for_session(engine: OnnxEngine, images: Float, statistics: BatchNormStatistics) -> None:
    end = time.monotonic() + SESSION_TIMEOUT_S
    while engine.classify(images[:1], statistics, WORTH_FOLDING).graph == "shared":
        if time.monotonic() > end:
            raise SystemExit("no session is made for the batch's statistics")
        time.sleep(0.1)


def _torch_network(context: Float) -> ResNet50:
    """Torch's network as a lab has it once it is adapted."""
    plain = ResNet50(context.shape[1], network.CLASSES)
    plain.load_state_dict(network.network().state_dict(), strict=False)
    adapt(plain, torch.from_numpy(context))
    return plain


@torch.no_grad()
def _torch_logits(module: Callable[[torch.Tensor], torch.Tensor], images: Float) -> Float:
    return module(torch.from_numpy(images)).numpy()


def _floor(seconds_an_image: float) -> Bar:
    """How much of the matrix throughput, as measured here, classifying reaches."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    taken = []
    for _ in range(8):
        begun = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - begun)
    throughput = 2 * 2048**3 / float(np.median(taken))
    of_image = flops(Workload(network.SPEC, network.SIZE, 1, 1, 1, 1))["forward"]
    return Bar("classify_over_matrix_throughput", of_image / seconds_an_image / throughput, "")
