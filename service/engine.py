"""Runs the bundle's two graphs on a runtime.

Knows nothing of wells or batches. A context is measured in one pass, with every core. On a CPU sites are classified each by
itself, as many side by side as there are cores: none waits for another, which may be decoding meanwhile.
"""

import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
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
    Golden,
    Measured,
    Parity,
    Precision,
    Tolerance,
    file_sha256,
)
from model.errors import BundleError
from model.statistics import BN_EPSILON, BatchNormStatistics, Prior
from service.errors import BusyError, MemoryShortError
from service.graphs import Graph, Weights
from service.observe import UNOBSERVED, Observer
from service.passes import Passes
from service.priority import cpu_count, give_way
from service.runtime import Kept, Runtime, Session, open_runtime
from service.settings import Settings

Float = NDArray[np.float32]
FAR = 1e4
"""Square of a mean's distance from where it was taken about, over the variance, beyond which rounding would be seen."""
QUEUE_TIMEOUT_S = 300.0
"""Longest wait for passes: those before, and one's own."""
_BUFFERS = 2.0
"""What a runtime takes for its buffers, over what the graph needs: they do not fit one another."""

log = logging.getLogger("anchorwell")


class Classified(NamedTuple):
    """Logits (sites, members, classes) and embeddings (sites, dim); how long the passes took, one after the other.

    And how long it took to make the batch's own network: 0 where it was there, or others made it meanwhile, None where
    batches share one.
    """

    logits: Float
    embeddings: Float
    seconds: float = 0.0
    network_seconds: float | None = None


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

    @property
    def sites_at_once(self) -> int:
        """How many sites to ask it to classify at once, so that it never waits for the next."""
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


@dataclass(frozen=True, eq=False)
class _Asked:
    """A site to classify, by whom and since when."""

    image: Float
    statistics: BatchNormStatistics
    context: Context = field(default_factory=copy_context)
    since: float = field(default_factory=time.perf_counter)


class _Classifier:
    """The graph that classifies, in passes of the runtime's sizes."""

    def __init__(self, session: Session, sizes: Sequence[int]) -> None:
        self._session, self._sizes = session, sizes

    def prepare(self, statistics: BatchNormStatistics) -> float | None:
        """Make the network of statistics that have one of their own; how long that took."""
        begun = time.perf_counter()
        try:
            return self._session.prepare(statistics)
        except MemoryError:  # the pass will try again, in what was given up
            return time.perf_counter() - begun

    def run(self, images: Sequence[Float], statistics: BatchNormStatistics) -> tuple[Float, Float]:
        """Logits and embeddings in one pass, or in two where there is not the memory.

        Raises:
            MemoryShortError: there is not the memory for half of them.
        """
        try:
            return self._pass(images, statistics)
        except MemoryError:
            log.warning("there is not the memory to classify %d sites at once: half as many are", len(images))
        half = (len(images) + 1) // 2
        try:
            parts = [self._pass(part, statistics) for part in (images[:half], images[half:]) if part]
        except MemoryError:
            raise MemoryShortError(f"there is not the memory to classify {half} sites: send the request again") from None
        logits, embeddings = (np.concatenate(both) for both in zip(*parts, strict=True))
        return logits, embeddings

    def _pass(self, images: Sequence[Float], statistics: BatchNormStatistics) -> tuple[Float, Float]:
        sites = len(images)
        size = next(size for size in self._sizes if size >= sites)
        filled = images[0][np.newaxis] if size == 1 else np.stack([*images, *[images[-1]] * (size - sites)])
        given = {INPUT_IMAGES: filled, INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
        logits, embeddings = self._session.run(OUTPUTS[CLASSIFY], given)
        return logits[:sites], embeddings[:sites]

    def warm(self, bundle: Bundle) -> None:
        """Do what is done once: make a network, and run a pass of each size, the largest first, so that no request waits.

        Of one size the first passes are the golden images'.

        Raises:
            BundleError: no network can be made. What else is wrong, the golden images' replay will say.
        """
        try:
            golden = bundle.golden
            self.prepare(_golden_statistics(golden))
            for size in reversed(self._sizes) if len(self._sizes) > 1 else ():
                with suppress(MemoryShortError):  # it is told to a request that is so large
                    self.run([golden.images[0]] * size, _golden_statistics(golden))
        except BundleError:
            raise
        except Exception:
            log.warning("a first pass could not be run", exc_info=True)


class BundleEngine:
    """An ``Engine`` of a bundle on a runtime. What it is asked for waits until the graph for that is loaded."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        folder = bundle.path.resolve()  # a link to it may be turned to another bundle while this one is served
        self.bundle, self._runtime = replace(bundle, path=folder), runtime
        self.observer: Observer = UNOBSERVED
        weights = Weights(folder)
        self._graphs = {name: Graph.read(folder / name, weights) for name in (MEASURE, CLASSIFY)}
        pool = ThreadPoolExecutor(2, initializer=give_way)  # they inherit how nice who makes them is
        self._measure = pool.submit(runtime.session, self._graphs[MEASURE], measures=True)
        self._classify = pool.submit(self._warm_classifier)
        pool.shutdown(wait=False)
        self.bytes_a_site = math.ceil(_BUFFERS * self._graphs[MEASURE].bytes_a_site())
        self._centre = self._graphs[MEASURE].centre
        self._plain = Prior.none(bundle.manifest.features)
        self._measuring = threading.Lock()  # a pass uses every core, and its memory grows with its sites
        shared = {"at_once": runtime.passes_at_once, "most": runtime.pass_sizes[-1]}
        self._passes = Passes(self._pass, lambda one, other: one.statistics is other.statistics, **shared)

    @property
    def provider(self) -> str:
        """Where the graphs run."""
        return self._runtime.provider

    @property
    def precision(self) -> Precision:
        """Arithmetic of the graphs."""
        return self._runtime.precision

    @property
    def sites_at_once(self) -> int:
        """Twice what is classified at once: as many are ready when that is done."""
        return 2 * self._runtime.passes_at_once * self._runtime.pass_sizes[-1]

    def require_loaded(self) -> None:
        """Wait until both graphs are loaded.

        Raises:
            BundleError: one of them cannot be.
        """
        self._measure.result()
        self._classify.result()

    def measure(self, images: Float, prior: Prior | None = None) -> Measured:
        used, asked = self._plain if prior is None else prior, time.perf_counter()
        if not self._measuring.acquire(timeout=QUEUE_TIMEOUT_S):
            raise _busy()
        try:
            begun = time.perf_counter()
            found = self._measured(images, used)
        except MemoryError:
            raise MemoryShortError(
                f"there is not the memory to measure {len(images)} sites in one pass: send the request again when less "
                "is done, or fewer control sites"
            ) from None
        finally:
            self._measuring.release()
        self.observer.stage("queue", begun - asked)
        self._count("measure", len(images), time.perf_counter() - begun)
        return found if self.precision == "fp32" else found._replace(embeddings=self._embedded(images, found))

    def _warm_classifier(self) -> _Classifier:
        classifier = _Classifier(self._runtime.session(self._graphs[CLASSIFY]), self._runtime.pass_sizes)
        classifier.warm(self.bundle)
        return classifier

    def _measured(self, images: Float, prior: Prior) -> Measured:
        found = _measured(self._measure.result(), images, prior)
        centre = self._nearer(found, prior)
        if centre is None:
            return found
        log.info("a context lies so far from the training plates that it is measured again, about its own means")
        return _measured(self._session_about(centre), images, prior)

    def _embedded(self, images: Float, measured: Measured) -> Float:
        """Embeddings as wells' are, which are compared with them: of the graph that classifies, in its precision."""
        statistics = BatchNormStatistics(measured.mean, measured.variance, sites=len(images), wells=1)
        return self.classify(images, statistics).embeddings

    def _session_about(self, centre: Float) -> Session:
        """Make a session that measures about other means, of the weights that were loaded.

        Raises:
            BundleError: others lie there now.
        """
        if file_sha256(self.bundle.path / WEIGHTS) != self.bundle.manifest.files.get(WEIGHTS):
            raise BundleError(f"{WEIGHTS} is no longer what was there when the bundle was loaded: start the service again")
        return self._runtime.session(self._graphs[MEASURE].with_centre(centre), measures=True)

    def _nearer(self, found: Measured, prior: Prior) -> Float | None:
        """Return the means that were measured where they lie too far from what they were taken about, (features,)."""
        share = np.maximum(1 - prior.weight, np.finfo(np.float32).tiny)
        measured = (found.mean - prior.weight * prior.mean) / share
        far = share * np.square(measured - self._centre) / (found.variance + BN_EPSILON)
        return measured.astype(np.float32) if far.max() > FAR else None

    def classify(self, images: Float, statistics: BatchNormStatistics) -> Classified:
        self._classify.result()  # until it is loaded, nobody is queued
        end = time.monotonic() + QUEUE_TIMEOUT_S
        waiting = [self._passes.put(_Asked(image, statistics)) for image in images]
        try:
            found = [future.result(max(0.0, end - time.monotonic())) for future in waiting]
        except TimeoutError:
            raise _busy() from None
        finally:
            for future in waiting:
                future.cancel()
        logits, embeddings, seconds, networks = zip(*found, strict=True)
        return Classified(np.stack(logits), np.stack(embeddings), sum(seconds), sum_or_none(networks))

    def _pass(self, asked: Sequence[_Asked]) -> list[Classified]:
        """Classify sites that have their statistics in common; an answer each."""
        begun, first = time.perf_counter(), asked[0]
        classifier = self._classify.result()
        network = classifier.prepare(first.statistics)
        prepared = time.perf_counter()
        found = classifier.run([site.image for site in asked], first.statistics)
        ended = time.perf_counter()
        for site in asked:
            site.context.run(self.observer.stage, "queue", begun - site.since)
        first.context.run(self._count, "classify", len(asked), ended - begun)
        each, shares = (ended - prepared) / len(asked), None if network is None else network / len(asked)
        return [Classified(*both, each, shares) for both in zip(*found, strict=True)]

    def _count(self, graph: str, sites: int, took: float) -> None:
        self.observer.stage("infer", took)
        self.observer.sites(graph, sites)


def _golden_statistics(golden: Golden) -> BatchNormStatistics:
    return BatchNormStatistics(golden.bn_mean, golden.bn_var, sites=len(golden.images), wells=1)


def sum_or_none(seconds: Iterable[float | None]) -> float | None:
    """Sum of what is known; None of nothing."""
    known = [value for value in seconds if value is not None]
    return sum(known) if known else None


def _busy() -> BusyError:
    return BusyError(f"other requests' passes took longer than {QUEUE_TIMEOUT_S:g} s")


def _measured(session: Session, images: Float, prior: Prior) -> Measured:
    given = (images, prior.mean, prior.variance, prior.weight)
    return Measured(*session.run(OUTPUTS[MEASURE], dict(zip(INPUTS[MEASURE], given, strict=True))))


@dataclass(frozen=True)
class Opening:
    """An engine that is being made, and proved by the bundle's golden images after that, beside what else goes on."""

    engine: Future[BundleEngine]
    proof: Future[None]


def open_engine(settings: Settings) -> Opening:
    """Begin to make the engine that the settings ask for, on a thread that gives way, as the engine's own threads will.

    What is made raises ``BundleError`` when the bundle is not what its manifest says, and ``StartError`` when the settings
    cannot be met; whether its graphs can be loaded ``require_loaded`` says; its proof raises as ``replay`` does.
    """

    def make() -> BundleEngine:
        bundle = Bundle.load(settings.bundle)
        threads, members = cpu_count(settings.threads), bundle.manifest.members
        kept = Kept(settings.classify_bytes, settings.max_concurrent_requests + settings.workers)
        runtime = open_runtime(settings.device, settings.precision, threads, members=members, kept=kept)
        made = BundleEngine(bundle, runtime)
        if len(runtime.pass_sizes) > 1:
            made.require_loaded()  # what a GPU's first passes look for is timed: nothing runs beside them
        return made

    def prove() -> None:
        replay(engine.result(), engine.result().bundle)

    pool = ThreadPoolExecutor(1, initializer=give_way)
    engine = pool.submit(make)
    proof = pool.submit(prove)
    pool.shutdown(wait=False)
    return Opening(engine, proof)


def replay(engine: Engine, bundle: Bundle) -> None:
    """Run the bundle's golden images through the engine and compare with what the training's framework gave.

    They are classified beside being measured; each waits until its graph is loaded.

    Raises:
        BundleError: the engine does not agree.
    """
    golden = bundle.golden
    with ThreadPoolExecutor(1, initializer=give_way) as pool:
        classifying = pool.submit(engine.classify, golden.images, _golden_statistics(golden))
        plain = engine.measure(golden.images)
        blended = engine.measure(golden.images, bundle.training_statistics.prior(GOLDEN_WELLS))
        classified = classifying.result()
    parity = Parity.of(golden, plain, blended, classified.logits, classified.embeddings)
    parity.require(f"the engine on {engine.provider} in {engine.precision}", Tolerance.of(golden, engine.precision))
