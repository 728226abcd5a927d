"""Speed that must not be lost: ratios measured in one run, interleaved, with so much slack that noise does not trip them."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks import network
from benchmarks.bench_engine import classifying
from benchmarks.bench_images import image_bars
from benchmarks.interleaved import interleaved
from model.bundle import INPUT_IMAGES, OUTPUT_LOGITS, Bundle
from model.statistics import BatchNormStatistics
from service.engine import BundleEngine
from service.runtime import open_runtime

BUNDLE = Path(__file__).resolve().parents[1] / "examples" / "bundles" / "cs-arm-bn"
ROUNDS = 9


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(BUNDLE)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> BundleEngine:
    return BundleEngine(bundle, open_runtime("cpu", "fp32", 1))


def test_classifying_and_measuring_are_about_as_fast_as_a_plain_pass(bundle: Bundle, engine: BundleEngine) -> None:
    golden = bundle.golden
    statistics = BatchNormStatistics(golden.bn_mean, golden.bn_var, sites=len(golden.images), wells=1)
    context = np.tile(golden.images, (6, 1, 1, 1))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    folded = network.folded_session(bundle, statistics, options, ["CPUExecutionProvider"])
    classify = classifying(engine, statistics)
    found = interleaved(
        {
            "folded": lambda: folded.run([OUTPUT_LOGITS], {INPUT_IMAGES: context}),
            "classify": lambda: classify(context),
            "measure": lambda: engine.measure(context),
        },
        ROUNDS,
    )
    assert found.ratio("", "folded", "classify").value > 0.6, "of onnxruntime on the same network"
    assert found.ratio("", "measure", "classify").value < 2.5, "measuring, beside classifying"


def test_preparing_a_site_takes_little_beside_decoding_it() -> None:
    ratio = next(bar for bar in image_bars(ROUNDS) if bar.name == "prepare_over_decode_lzw")
    assert ratio.value < 1.6
