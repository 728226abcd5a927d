"""Runs the bundle's two graphs. The only module that knows onnxruntime.

Knows nothing of wells or batches: a call's images are one stack, and its outputs depend on nothing else but, in the last
bits, on whether the shared graph gave them, which takes statistics as inputs, or a session made for these statistics, in
which they are constants that onnxruntime folds into the convolutions.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

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
    WEIGHTS,
    Bundle,
    Parity,
    file_sha256,
)
from model.errors import BundleError
from model.statistics import BN_EPSILON, BatchNormStatistics, Prior
from service.errors import StartError
from service.graphs import Graph
from service.observe import UNOBSERVED, Observer
from service.priority import give_way

Float = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]
Ran = Literal["shared", "folded"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
WORTH_FOLDING = 64
"""Sites still to classify from which making a session for their statistics is worth its time, on the CPU."""
FAR = 1e4
"""Square of a mean's distance from where it was taken about, over the variance, beyond which rounding would be seen."""
_MOST_SESSIONS = 8
_SESSION_BYTES = 10 << 20
"""What a session takes beside its weights; buffers are shared."""
_PRIOR = (INPUT_PRIOR_MEAN, INPUT_PRIOR_VARIANCE, INPUT_PRIOR_WEIGHT)

log = logging.getLogger("anchorwell")


class Classified(NamedTuple):
    """Logits (sites, members, classes), embeddings (sites, dim), and the graph that gave them."""

    logits: Float
    embeddings: Float
    graph: Ran = "shared"


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

    def classify(self, images: Float, statistics: BatchNormStatistics, left: int = 0) -> Classified:
        """Classify (sites, channels, height, width); ``left`` sites will be with the same statistics, these among them."""
        ...


class OnnxEngine:
    """onnxruntime on CUDA, without TF32, or on the CPU; one pass at a time, each with every thread it is given."""

    precision = "fp32"

    def __init__(
        self,
        bundle: Bundle,
        device: Device = "auto",
        threads: int = 0,
        observer: Observer = UNOBSERVED,
        folded_bytes: int = 0,
    ) -> None:
        onnxruntime.disable_telemetry_events()
        _share_buffers()
        self._bundle, self._threads, self._observer = bundle, threads, observer
        self._folder = bundle.path.resolve()  # a link to it may be turned to another bundle while this one is served
        self._graphs = {name: Graph.read(self._folder / name) for name in (MEASURE, CLASSIFY)}
        self._providers = _providers(device)
        self._classify = self._shared(self._graphs[CLASSIFY])
        if self.provider == CPU and self._providers != [CPU]:
            if device == "cuda":
                raise StartError(f"device cuda was asked for, but onnxruntime runs the bundle on {self.provider}")
            self._providers = [CPU]
            self._classify = self._shared(self._graphs[CLASSIFY])
        self._measure = self._shared(self._graphs[MEASURE])
        self._centre = self._graphs[MEASURE].centre
        self._plain = Prior.none(bundle.manifest.features)
        self._folded = FoldedSessions(self._fold, self._most_sessions(folded_bytes) if self.provider == CPU else 0)
        self._one_pass = threading.Lock()  # a pass uses every core, and its memory grows with its sites

    @property
    def provider(self) -> str:
        """The provider the sessions really got."""
        return str(self._classify.get_providers()[0])

    def measure(self, images: Float, prior: Prior | None = None) -> tuple[Float, Float]:
        used = self._plain if prior is None else prior
        with self._turn("measure", len(images)):
            found = _measured(self._measure, images, used)
            centre = self._nearer(*found, used)
            if centre is not None:
                log.info("a context lies so far from the training plates that it is measured once more, about its own means")
                found = _measured(self._shared(self._graphs[MEASURE].with_centre(centre)), images, used)
        return found

    def _nearer(self, mean: Float, variance: Float, prior: Prior) -> Float | None:
        """Return the means that were measured where they lie too far from what they were taken about, (features,)."""
        if self._centre is None:
            return None
        share = np.maximum(1 - prior.weight, np.finfo(np.float32).tiny)
        measured = (mean - prior.weight * prior.mean) / share
        far = share * np.square(measured - self._centre) / (variance + BN_EPSILON)
        return measured.astype(np.float32) if far.max() > FAR else None

    def classify(self, images: Float, statistics: BatchNormStatistics, left: int = 0) -> Classified:
        folded = self._folded.get(statistics, make=left >= WORTH_FOLDING)
        given = {INPUT_IMAGES: images}
        if folded is None:
            given |= {INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        with self._turn("classify", len(images)):
            logits, embeddings = (folded or self._classify).run([OUTPUT_LOGITS, OUTPUT_EMBEDDING], given)
        return Classified(logits, embeddings, "shared" if folded is None else "folded")

    def _fold(self, statistics: BatchNormStatistics) -> Any:
        self._require_weights()
        return self._session(self._graphs[CLASSIFY].with_constants(statistics), CLASSIFY, [INPUT_IMAGES])

    def _require_weights(self) -> None:
        if file_sha256(self._folder / WEIGHTS) != self._bundle.manifest.files.get(WEIGHTS):
            raise BundleError(f"{WEIGHTS} is no longer what was there when the bundle was loaded: start the service again")

    def _most_sessions(self, folded_bytes: int) -> int:
        each = 2 * (self._folder / WEIGHTS).stat().st_size + _SESSION_BYTES  # as they are, and laid out for the processor
        return min(folded_bytes // each, _MOST_SESSIONS)

    def _shared(self, graph: Graph) -> Any:
        inputs = [INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE] if graph.name == CLASSIFY else [INPUT_IMAGES, *_PRIOR]
        content = graph.with_scale_and_shift() if self._providers == [CPU] else graph.content
        return self._session(content, graph.name, inputs)

    def _session(self, content: bytes, name: str, inputs: Sequence[str]) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoders and the loop want the cores
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights are no buffers
        # Of several members, buffers would be held from one's pass for the next.
        options.enable_mem_reuse = self._bundle.manifest.members == 1
        return _session(content, name, options, self._providers, inputs)

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


def _measured(session: Any, images: Float, prior: Prior) -> tuple[Float, Float]:
    given = dict(zip(_PRIOR, (prior.mean, prior.variance, prior.weight), strict=True))
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")  # a context takes far more than a well
    mean, variance = session.run([OUTPUT_MEAN, OUTPUT_VARIANCE], {INPUT_IMAGES: images, **given}, options)
    return mean, variance


@cache
def _share_buffers() -> None:
    """Let all sessions of this process, which run one at a time, have their buffers from one place."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    unbounded, as_requested, default = 0, 1, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(unbounded, as_requested, default, default))


def _providers(device: Device) -> list[Any]:
    present = CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not present:
        raise StartError("device cuda was asked for, but this onnxruntime has no CUDA: install the extra 'gpu'")
    if device == "cpu" or not present:
        return [CPU]
    onnxruntime.preload_dlls()
    return [(CUDA, {"use_tf32": "0"}), CPU]


def _session(content: bytes, name: str, options: Any, providers: list[Any], inputs: Sequence[str]) -> Any:
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, without a common base)
        raise BundleError(f"{name} cannot be loaded: {str(error)[:300]}") from None
    found = sorted(item.name for item in session.get_inputs())
    if found != sorted(inputs):
        raise BundleError(f"{name} takes {', '.join(found)}; expected {', '.join(inputs)}")
    return session


# --- sessions of one batch -------------------------------------------------------------------------------------------


class FoldedSessions:
    """Sessions made for statistics, one at a time in the background; the longest unused goes when there is one too many.

    What cannot be made is told in the log once, and not tried again while it is remembered.
    """

    def __init__(self, make: Callable[[BatchNormStatistics], Any], most: int) -> None:
        self._make = make
        self._most = most
        self._made: OrderedDict[str, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fold", initializer=give_way)

    def get(self, statistics: BatchNormStatistics, *, make: bool) -> Any:
        """Return what was made for statistics; None where nothing is there yet, which then is made where it is worth it."""
        if not self._most:
            return None
        name = hashlib.sha256(statistics.mean.tobytes() + statistics.variance.tobytes()).hexdigest()
        with self._lock:
            found = self._made.get(name)
            if found is not None:
                self._made.move_to_end(name)
            elif make:
                self._begin(name, statistics)
            return found.result() if found is not None and found.done() else None

    def _begin(self, name: str, statistics: BatchNormStatistics) -> None:
        try:
            self._made[name] = self._pool.submit(self._try, statistics)
        except RuntimeError:  # this process ends, or has no thread left
            return
        while len(self._made) > self._most:
            self._made.popitem(last=False)[1].cancel()

    def _try(self, statistics: BatchNormStatistics) -> Any:
        try:
            return self._make(statistics)
        except Exception:
            log.exception("no session could be made for a batch's statistics: the shared graph answers")
            return None


def replay(engine: Engine, bundle: Bundle) -> None:
    """Run the bundle's golden images through the engine and compare with what the training's framework gave.

    Raises:
        BundleError: the engine does not agree.
    """
    golden = bundle.golden
    plain = engine.measure(golden.images)
    blended = engine.measure(golden.images, bundle.training_statistics.prior(GOLDEN_WELLS))
    statistics = BatchNormStatistics(golden.bn_mean, golden.bn_var, sites=len(golden.images), wells=1)
    logits = engine.classify(golden.images, statistics)[0]
    Parity.of(golden, plain, blended, logits).require(f"the engine on {engine.provider}")
