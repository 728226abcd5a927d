"""Runs the bundle's two graphs on a runtime.

Knows nothing of wells or batches: a call's images are one stack, and its outputs depend on nothing else.
"""

import logging
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.bundle import (
    CLASSIFY,
    GOLDEN_WELLS,
    INPUT_IMAGES,
    INPUT_MEAN,
    INPUT_VARIANCE,
    INPUTS,
    MEASURE,
    OUTPUTS,
    WEIGHTS,
    Bundle,
    Measured,
    Parity,
    Precision,
    Tolerance,
    file_sha256,
)
from model.errors import BundleError
from model.statistics import BN_EPSILON, BatchNormStatistics, Prior
from service.errors import BusyError, MemoryShortError
from service.graphs import Graph
from service.observe import UNOBSERVED, Observer
from service.priority import give_way
from service.runtime import Runtime, Session

Float = NDArray[np.float32]
FAR = 1e4
"""Square of a mean's distance from where it was taken about, over the variance, beyond which rounding would be seen."""
QUEUE_TIMEOUT_S = 300.0
"""Longest wait for the passes before."""
_EMBEDDED_AT_ONCE = 32
_BUFFERS = 1.7
"""What a runtime takes for its buffers, over what the graph needs: they do not fit one another."""

log = logging.getLogger("anchorwell")


class Classified(NamedTuple):
    """Logits (sites, members, classes) and embeddings (sites, dim)."""

    logits: Float
    embeddings: Float


class Engine(Protocol):
    """Measures statistics on images, and classifies images with given statistics."""

    @property
    def provider(self) -> str:
        """Where the graphs really run, e.g. ``CPUExecutionProvider``."""
        ...

    @property
    def precision(self) -> Precision:
        """Arithmetic of the graphs; part of a statistics id."""
        ...

    def measure(self, images: Float, prior: Prior | None = None) -> Measured:
        """Statistics of one pass over (sites, channels, height, width), and the sites' embeddings under them.

        With a prior every layer's are blended with it, inside the pass.

        Raises:
            BusyError, MemoryShortError: not now.
        """
        ...

    def classify(self, images: Float, statistics: BatchNormStatistics) -> Classified:
        """Classify (sites, channels, height, width).

        Raises:
            BusyError, MemoryShortError: not now.
        """
        ...


class BundleEngine:
    """An ``Engine`` of a bundle on a runtime; one pass at a time, each with every thread that the runtime has."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle, self._runtime = bundle, runtime
        self.observer: Observer = UNOBSERVED
        self._folder = bundle.path.resolve()  # a link to it may be turned to another bundle while this one is served
        self._graphs = {name: Graph.read(self._folder / name) for name in (MEASURE, CLASSIFY)}
        with ThreadPoolExecutor(2, initializer=give_way) as pool:  # they inherit how nice who makes them is
            classify = pool.submit(runtime.session, self._graphs[CLASSIFY])
            measure = pool.submit(runtime.session, self._graphs[MEASURE], measures=True)
            self.bytes_a_site = math.ceil(_BUFFERS * self._graphs[MEASURE].bytes_a_site())
            self._classify, self._measure = classify.result(), measure.result()
        self._centre = self._graphs[MEASURE].centre
        self._plain = Prior.none(bundle.manifest.features)
        self._one_pass = threading.Lock()  # a pass uses every core, and its memory grows with its sites

    @property
    def provider(self) -> str:
        """Where the graphs run."""
        return self._runtime.provider

    @property
    def precision(self) -> Precision:
        """Arithmetic of the graphs."""
        return self._runtime.precision

    def measure(self, images: Float, prior: Prior | None = None) -> Measured:
        used = self._plain if prior is None else prior
        with self._turn("measure", len(images)):
            try:
                found = _measured(self._measure, images, used)
                centre = self._nearer(found, used)
                if centre is not None:
                    log.info("a context lies so far from the training plates that it is measured again, about its own means")
                    found = _measured(self._session_about(centre), images, used)
            except MemoryError:
                raise MemoryShortError(
                    f"there is not the memory to measure {len(images)} sites in one pass: send the request again when less "
                    "is done, or fewer control sites"
                ) from None
        return found if self.precision == "fp32" else found._replace(embeddings=self._embedded(images, found))

    def _embedded(self, images: Float, measured: Measured) -> Float:
        """Embeddings as wells' are, which are compared with them: of the graph that classifies, in its precision."""
        statistics = BatchNormStatistics(measured.mean, measured.variance, sites=len(images), wells=1)
        parts = [images[at : at + _EMBEDDED_AT_ONCE] for at in range(0, len(images), _EMBEDDED_AT_ONCE)]
        return np.concatenate([self.classify(part, statistics).embeddings for part in parts])

    def _session_about(self, centre: Float) -> Session:
        """Make a session that measures about other means, of the weights that were loaded.

        Raises:
            BundleError: others lie there now.
        """
        if file_sha256(self._folder / WEIGHTS) != self.bundle.manifest.files.get(WEIGHTS):
            raise BundleError(f"{WEIGHTS} is no longer what was there when the bundle was loaded: start the service again")
        return self._runtime.session(self._graphs[MEASURE].with_centre(centre), measures=True)

    def _nearer(self, found: Measured, prior: Prior) -> Float | None:
        """Return the means that were measured where they lie too far from what they were taken about, (features,)."""
        share = np.maximum(1 - prior.weight, np.finfo(np.float32).tiny)
        measured = (found.mean - prior.weight * prior.mean) / share
        far = share * np.square(measured - self._centre) / (found.variance + BN_EPSILON)
        return measured.astype(np.float32) if far.max() > FAR else None

    def classify(self, images: Float, statistics: BatchNormStatistics) -> Classified:
        with self._turn("classify", len(images)):
            try:
                return self._classified(images, statistics)
            except MemoryError:
                log.warning("there is not the memory to classify %d sites at once: half as many are", len(images))
            half = (len(images) + 1) // 2
            try:
                parts = [self._classified(part, statistics) for part in (images[:half], images[half:]) if len(part)]
            except MemoryError:
                raise MemoryShortError(f"there is not the memory to classify {half} sites: send the request again") from None
        return Classified(*(np.concatenate(both) for both in zip(*parts, strict=True)))

    def _classified(self, images: Float, statistics: BatchNormStatistics) -> Classified:
        given = {INPUT_IMAGES: images, INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        return Classified(*self._classify.run(OUTPUTS[CLASSIFY], given))

    @contextmanager
    def _turn(self, graph: str, sites: int) -> Iterator[None]:
        """Wait for the passes before, and count the time of both.

        Raises:
            BusyError: they take too long.
        """
        asked = time.perf_counter()
        if not self._one_pass.acquire(timeout=QUEUE_TIMEOUT_S):
            raise BusyError(f"other requests' passes took longer than {QUEUE_TIMEOUT_S:g} s")
        try:
            begun = time.perf_counter()
            self.observer.stage("queue", begun - asked)
            yield
            self.observer.stage("infer", time.perf_counter() - begun)
        finally:
            self._one_pass.release()
        self.observer.sites(graph, sites)


def _measured(session: Session, images: Float, prior: Prior) -> Measured:
    given = (images, prior.mean, prior.variance, prior.weight)
    return Measured(*session.run(OUTPUTS[MEASURE], dict(zip(INPUTS[MEASURE], given, strict=True))))


def replay(engine: Engine, bundle: Bundle) -> None:
    """Run the bundle's golden images through the engine and compare with what the training's framework gave.

    Raises:
        BundleError: the engine does not agree.
    """
    golden = bundle.golden
    plain = engine.measure(golden.images)
    blended = engine.measure(golden.images, bundle.training_statistics.prior(GOLDEN_WELLS))
    statistics = BatchNormStatistics(golden.bn_mean, golden.bn_var, sites=len(golden.images), wells=1)
    classified = engine.classify(golden.images, statistics)
    parity = Parity.of(golden, plain, blended, classified.logits, classified.embeddings)
    parity.require(f"the engine on {engine.provider} in {engine.precision}", Tolerance.of(golden, engine.precision))
