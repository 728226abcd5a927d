"""On a machine with a GPU: the same bundle answers on CUDA within 1e-3 of the CPU's probabilities, in fp16 within 0.05.

Runs offline, through the service's own engine. Writes ``build/gpu-check.json``; says so and ends where there is no GPU.

Run: ``python -m benchmarks.gpu_check [--bundle DIR]``.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.bars import Bar, table, write_bars
from model.bundle import Bundle, Precision
from model.predictions import site_probabilities
from model.statistics import BN_EPSILON, BatchNormStatistics
from service.engine import BundleEngine, replay
from service.priority import cpu_count
from service.runtime import Device, open_runtime

CUDA = "CUDAExecutionProvider"


def answers(
    bundle: Bundle, device: Device, precision: Precision, images: NDArray[np.float32]
) -> tuple[BatchNormStatistics, NDArray[np.float64]]:
    """Measure the first half of the images and classify the second with it, on one device."""
    engine = BundleEngine(bundle, open_runtime(device, precision, cpu_count(0)))
    replay(engine, bundle)
    print(f"{device}: golden images replayed on {engine.provider}, {engine.precision}")
    half = len(images) // 2
    mean, variance, _ = engine.measure(images[:half])
    statistics = BatchNormStatistics(mean, variance, sites=half, wells=half)
    logits = engine.classify(images[half:], statistics)[0]
    return statistics, site_probabilities(logits, bundle.manifest.temperature)


def compare(bundle: Bundle, sites: int) -> list[Bar]:
    """Compare both devices on mixtures of the golden images, each with a gain and an offset of its own."""
    rng = np.random.default_rng(0)
    golden = bundle.golden.images
    chosen = golden[rng.integers(len(golden), size=sites)]
    gain = rng.uniform(0.7, 1.3, size=(sites, golden.shape[1], 1, 1))
    images = (chosen * gain + rng.normal(0, 0.2, size=gain.shape)).astype(np.float32)
    on_cpu, cpu = answers(bundle, "cpu", "fp32", images)
    on_gpu, gpu = answers(bundle, "cuda", "fp32", images)
    _, half = answers(bundle, "cuda", "fp16", images)
    spread = np.sqrt(on_cpu.variance + BN_EPSILON)
    return [
        Bar("cuda_probability_difference", float(np.abs(gpu - cpu).max()), "", at_most=1e-3),
        Bar("cuda_fp16_probability_difference", float(np.abs(half - cpu).max()), "", at_most=0.05),
        Bar("cuda_mean_difference", float((np.abs(on_gpu.mean - on_cpu.mean) / spread).max()), "sd", at_most=1e-4),
    ]


def main() -> None:
    """Compare, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("examples/bundles/cs-arm-bn"))
    parser.add_argument("--sites", type=int, default=64)
    arguments = parser.parse_args()
    if CUDA not in onnxruntime.get_available_providers():
        raise SystemExit("skipped: this onnxruntime has no CUDA (install the extra 'gpu' on a machine with a GPU)")
    bars = compare(Bundle.load(arguments.bundle), arguments.sites)
    write_bars(bars, Path("build/gpu-check.json"))
    print(table(bars))
    if not all(bar.holds for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
