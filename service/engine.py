"""Runs the bundle's two graphs. The only module that knows onnxruntime.

Knows nothing of wells or batches: a call's images are one stack, and its outputs depend on nothing else.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.bundle import (
    CLASSIFY,
    GOLDEN_WELLS,
    INPUT_IMAGES,
    INPUT_MEAN,
    INPUT_PRIOR_MEAN,
    INPUT_PRIOR_VARIANCE,
    INPUT_PRIOR_WEIGHT,
    INPUT_VARIANCE,
    MEASURE,
    OUTPUT_EMBEDDING,
    OUTPUT_LOGITS,
    OUTPUT_MEAN,
    OUTPUT_VARIANCE,
    Bundle,
    Parity,
)
from model.errors import BundleError
from model.statistics import BatchNormStatistics, Prior
from service.errors import StartError
from service.observe import UNOBSERVED, Observer

Float = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]
_PRIOR = (INPUT_PRIOR_MEAN, INPUT_PRIOR_VARIANCE, INPUT_PRIOR_WEIGHT)


class Engine(Protocol):
    """Measures statistics on images, and classifies images with given statistics."""

    @property
    def provider(self) -> str:
        """Where the graphs really run, e.g. ``CPUExecutionProvider``."""
        ...

    @property
    def precision(self) -> str:
        """Arithmetic of the graphs; part of a statistics id."""
        ...

    def measure(self, images: Float, prior: Prior | None = None) -> tuple[Float, Float]:
        """Statistics of one pass over (sites, channels, height, width): mean and biased variance, (features,) each.

        With a prior every layer's are blended with it, inside the pass.
        """
        ...

    def classify(self, images: Float, statistics: BatchNormStatistics) -> tuple[Float, Float]:
        """Logits (sites, members, classes) and embeddings (sites, dim) of (sites, channels, height, width)."""
        ...


class OnnxEngine:
    """onnxruntime on CUDA, without TF32, or on the CPU; one pass at a time, each with every thread it is given."""

    precision = "fp32"

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 0, observer: Observer = UNOBSERVED) -> None:
        onnxruntime.disable_telemetry_events()
        providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoders and the loop want the cores
        options.enable_mem_reuse = bundle.manifest.members == 1  # else buffers are held from one member's pass for the next
        self._measure = _session(bundle, MEASURE, options, providers, [INPUT_IMAGES, *_PRIOR])
        self._plain = Prior.none(bundle.manifest.features)
        self._classify = _session(bundle, CLASSIFY, options, providers, [INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE])
        self._observer = observer
        self._one_pass = threading.Lock()  # a pass uses every core, and its memory grows with its sites
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise StartError(f"device cuda was asked for, but onnxruntime runs the bundle on {self.provider}")

    @property
    def provider(self) -> str:
        """The provider the sessions really got."""
        return str(self._classify.get_providers()[0])

    def measure(self, images: Float, prior: Prior | None = None) -> tuple[Float, Float]:
        used = self._plain if prior is None else prior
        given = dict(zip(_PRIOR, (used.mean, used.variance, used.weight), strict=True))
        with self._turn("measure", len(images)):
            mean, variance = self._measure.run([OUTPUT_MEAN, OUTPUT_VARIANCE], {INPUT_IMAGES: images, **given})
        return mean, variance

    def classify(self, images: Float, statistics: BatchNormStatistics) -> tuple[Float, Float]:
        given = {INPUT_IMAGES: images, INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        with self._turn("classify", len(images)):
            logits, embeddings = self._classify.run([OUTPUT_LOGITS, OUTPUT_EMBEDDING], given)
        return logits, embeddings

    @contextmanager
    def _turn(self, graph: str, sites: int) -> Iterator[None]:
        """Wait for the pass before, and count the time of both."""
        asked = time.perf_counter()
        with self._one_pass:
            begun = time.perf_counter()
            self._observer.stage("queue", begun - asked)
            yield
            self._observer.stage("infer", time.perf_counter() - begun)
        self._observer.sites(graph, sites)


def _providers(device: Device) -> list[Any]:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    present = cuda in onnxruntime.get_available_providers()
    if device == "cuda" and not present:
        raise StartError("device cuda was asked for, but this onnxruntime has no CUDA: install the extra 'gpu'")
    if device == "cpu" or not present:
        return [cpu]
    onnxruntime.preload_dlls()
    return [(cuda, {"use_tf32": "0"}), cpu]


def _session(bundle: Bundle, graph: str, options: Any, providers: list[Any], inputs: Sequence[str]) -> Any:
    try:
        session = onnxruntime.InferenceSession(str(bundle.path / graph), options, providers=providers)
    except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, without a common base)
        raise BundleError(f"{graph} cannot be loaded: {str(error)[:300]}") from None
    found = sorted(item.name for item in session.get_inputs())
    if found != sorted(inputs):
        raise BundleError(f"{graph} takes {', '.join(found)}; expected {', '.join(inputs)}")
    return session


def replay(engine: Engine, bundle: Bundle) -> None:
    """Run the bundle's golden images through the engine and compare with what the training's framework gave.

    Raises:
        BundleError: the engine does not agree.
    """
    golden = bundle.golden
    plain = engine.measure(golden.images)
    blended = engine.measure(golden.images, bundle.training_statistics.prior(GOLDEN_WELLS))
    statistics = BatchNormStatistics(golden.bn_mean, golden.bn_var, sites=len(golden.images), wells=1)
    logits, _ = engine.classify(golden.images, statistics)
    Parity.of(golden, plain, blended, logits).require(f"the engine on {engine.provider}")
