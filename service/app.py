"""The one composition root: settings in, an ASGI app or a worker out. Nothing is created at import."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from model.bundle import Bundle
from model.errors import BundleError
from service import routes, routes_images, routes_jobs
from service.access import Access, Keys
from service.batches import Batches
from service.blobs import open_blobs
from service.decoding import Decoder, SiteDecoder, WorkerDecoder, decoding_memory_bytes
from service.engine import QUEUE_TIMEOUT_S, BundleEngine, Engine, Opening, open_engine, replay
from service.errors import StartError
from service.gates import Neighbours, Rates, Readiness, Slots, Turns
from service.idempotency import Idempotency
from service.jobs import Jobs
from service.kept import BundleView, Kept
from service.later import Later
from service.multipart import FormLimits, sweep_spool
from service.observe import UNOBSERVED, Observer
from service.posts import Receiver
from service.priority import cpu_count
from service.problems import install_handlers
from service.queue import Queue
from service.references import References
from service.reports import VERSION
from service.requests import Admission, Requests
from service.retention import Retention
from service.routes import Served, known_query
from service.settings import Settings
from service.storage import Storage
from service.telemetry import Metrics, TimedRecords
from service.tracing import UNTRACED, Tracing, open_tracing
from service.uploads import Preparer
from service.webhooks import Webhooks

if TYPE_CHECKING:
    from service.screen import Screener

_HEADER_BYTES = 1 << 20
_ELSEWHERE_AT_ONCE = 40
"""Planes kept at once where Redis or object storage is waited for."""

log = logging.getLogger("anchorwell")


@dataclass(frozen=True)
class Composition:
    """Everything that serves, or works in the background, and how it begins and ends."""

    settings: Settings
    served: Served
    prove: Callable[[], None]
    queue: Queue
    retention: Retention
    metrics: Metrics
    own_storage: Storage | None
    own_decoder: WorkerDecoder | None

    async def begin(self) -> None:
        """Let requests in, and background work begin, once the engine agrees with the bundle's golden images."""
        gc.freeze()  # what is there now stays: a look through all of it would hold every request up for tens of milliseconds
        await _proved(self.prove, self.served.readiness)
        gc.enable()
        if self.served.readiness.reason is not None:
            return
        if self.own_decoder is not None:
            await run_in_threadpool(self.own_decoder.begin)
        if self.settings.workers:
            await run_in_threadpool(self.queue.start, self.settings.workers, self.run, self.look_after)

    def serve_metrics(self) -> Callable[[], None]:
        """Answer for metrics on a port of their own, when one is set; gives what stops that."""
        if self.settings.metrics_port is None:
            return lambda: None
        return self.metrics.serve(self.settings.metrics_host, self.settings.metrics_port)

    def run(self, kind: str, name: str) -> None:
        """Do one piece of background work."""
        if kind == "job":
            self.served.later.jobs.run(name, self.served.later.run)
        else:
            self.served.webhooks.deliver(name)

    def look_after(self) -> None:
        """Enqueue what should run and does not; bring what was committed to safety, and keep it in little room."""
        self.served.later.jobs.look_after()
        self.served.webhooks.look_after()
        self.retention.look_after()
        self.served.batches.storage.records.secure()
        self.served.batches.storage.records.compact()

    def end(self) -> None:
        """Let background work end, and let go of everything that was made for this composition."""
        self.queue.stop()
        if self.own_decoder is not None:
            self.own_decoder.close()
        if self.own_storage is not None:
            self.own_storage.close()


def create_app(
    settings: Settings,
    *,
    engine: Engine | Opening | None = None,
    storage: Storage | None = None,
    decoder: Decoder | None = None,
) -> FastAPI:
    """Compose the service. What else is given stands in for what would be made, and stays its owner's.

    An engine may be one that is being made.

    Raises:
        BundleError: the bundle is not what its manifest says. StartError: the settings cannot be met.
    """
    tracing = open_tracing()
    composition = compose(settings, engine=engine, storage=storage, decoder=decoder, tracing=tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop_metrics = composition.serve_metrics()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(composition.begin)
            yield
            tasks.cancel_scope.cancel()
        stop_metrics()
        await run_in_threadpool(composition.end)
        await run_in_threadpool(tracing.close)

    app = FastAPIOffline(
        title="Anchorwell",
        version=VERSION,
        description="Classifies microscopy plates against their own negative controls.",
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        telemetry=tracing.requests(),
    )
    app.state.served = composition.served
    app.state.metrics = composition.metrics
    app.add_middleware(Admission, require_room=composition.served.upload_slots.require_room)
    app.add_middleware(Requests, count=composition.metrics.request)
    for router in (routes_images.router, routes_jobs.router, routes.router):
        app.include_router(router, dependencies=[Depends(known_query)])
    install_handlers(app)
    return app


def compose(
    settings: Settings,
    *,
    engine: Engine | Opening | None = None,
    storage: Storage | None = None,
    decoder: Decoder | None = None,
    tracing: Tracing = UNTRACED,
    listens: bool = True,
) -> Composition:
    """Make everything that the settings ask for, for a process that listens or not; raises as ``create_app`` does."""
    metrics = Metrics()
    observer = tracing.observing(metrics)
    opened = storage or settings.open_storage()
    used_storage = Storage(
        TimedRecords(opened.records, observer), opened.blobs, lambda tenant: settings.rules(tenant).max_bytes
    )
    for warning in (*settings.misspelt(), *settings.storage_warnings()):
        log.warning(warning)
    if listens:
        settings.check_exposure(keys=any(Keys(used_storage.records).all()))
    opening = engine or open_engine(settings)
    used_engine = opening.engine.result() if isinstance(opening, Opening) else opening
    bundle = used_engine.bundle if isinstance(used_engine, BundleEngine) else Bundle.load(settings.bundle)
    most_sites = bundle.manifest.max_context_sites
    if isinstance(used_engine, BundleEngine):
        used_engine.require_loaded()
        most_sites = _max_context_sites(settings, used_engine)

    def prove() -> None:
        if isinstance(opening, Opening):
            opening.proof.result()
        else:
            replay(opening, bundle)
        if isinstance(used_engine, BundleEngine):
            used_engine.observer = observer  # from now on: golden images are nobody's sites

    metrics.engine(used_engine.provider, used_engine.precision, bundle.digest)
    own_decoder = open_decoder(settings, bundle, observer) if decoder is None else None
    used_decoder = decoder or own_decoder
    assert used_decoder is not None
    view = BundleView(bundle, used_engine.precision, most_sites)
    preparer = _preparer(settings, bundle, used_decoder, used_engine)
    batches = Batches(view, used_engine, used_storage, preparer, settings.keep_control_images)
    kept = Kept(view, used_storage)
    receiver = _receiver(settings, bundle, used_storage, used_decoder)
    queue = Queue(settings.data, settings.redis)
    webhooks = Webhooks(used_storage.records, queue.put, settings.webhook_networks)
    jobs = Jobs(used_storage, queue.put, webhooks)
    served = Served(
        batches=batches,
        kept=kept,
        access=Access(used_storage.records, allow_anonymous=settings.allow_anonymous),
        rates=Rates(settings.redis),
        neighbours=Neighbours(settings.allowed_hosts),
        turns=Turns(cpu_count(settings.threads) + 1, QUEUE_TIMEOUT_S),  # one waits for a disk
        staging_turns=Turns(_stagings_at_once(settings), QUEUE_TIMEOUT_S),
        readiness=Readiness(),
        receiver=receiver,
        later=Later(batches, receiver, jobs),
        webhooks=webhooks,
        upload_slots=Slots(settings.max_concurrent_requests),
        staging_bytes=Slots(settings.max_staging_bytes, "bytes of images"),
        max_plane_bytes=_max_plane_bytes(settings),
    )
    retention = Retention(used_storage, jobs, settings.rules)
    own_storage = used_storage if storage is None else None
    return Composition(settings, served, prove, queue, retention, metrics, own_storage, own_decoder)


@contextmanager
def screening(settings: Settings, out: str, decoder: Decoder | None = None) -> Iterator["Screener"]:
    """Compose what answers plates into a directory or below an s3:// URL; its own store lies in the data directory.

    A decoder that is given may be on other machines: what lies in object storage is fetched where it is decoded.

    Raises:
        BundleError, StartError: as ``create_app`` does; or the engine does not agree with the golden images.
    """
    from service.screen import Screener  # noqa: PLC0415 (a service needs none)

    assert decoder is None or not settings.keep_control_images  # files that are read elsewhere are not here to be kept
    composition = compose(settings, decoder=decoder)
    try:
        asyncio.run(composition.begin())
        served = composition.served
        if served.readiness.reason is not None:
            raise StartError(f"the screen cannot begin: {served.readiness.reason}")
        yield Screener(
            served.batches,
            served.kept,
            open_blobs(out),
            _spool(settings),
            served.max_plane_bytes,
            settings.image_limits,
            fetched_by_decoder=decoder is not None,
        )
    finally:
        composition.end()


def _max_context_sites(settings: Settings, engine: BundleEngine) -> int:
    """How many sites are measured in one pass: as many as the bundle says, or fit in the memory that is set.

    Raises:
        StartError: fewer fit than a site of each of the wells that the bundle needs.
    """
    each, manifest = engine.bytes_a_site, engine.bundle.manifest
    most, fit = manifest.max_context_sites, settings.measure_bytes // each
    if fit < manifest.minimum_control_wells:
        raise StartError(
            f"ANCHORWELL_MEASURE_BYTES is {settings.measure_bytes:,}; measuring one site takes {each:,}, and the bundle "
            f"needs one of each of {manifest.minimum_control_wells} control wells: set at least "
            f"{manifest.minimum_control_wells * each:,}"
        )
    if fit < most:
        log.warning(
            "ANCHORWELL_MEASURE_BYTES lets %d control sites of a batch be measured, %d bytes each; the bundle would measure "
            "%d: of more, some of each well are, and of more wells than that, some wells", fit, each, most,
        )  # fmt: skip
    return min(fit, most)


def _preparer(settings: Settings, bundle: Bundle, decoder: Decoder, engine: Engine) -> Preparer:
    return Preparer(
        bundle.manifest.recipe,
        decoder,
        ahead=decoder.sites_at_once + engine.sites_at_once,
        max_input_bytes=settings.max_request_input_bytes,
    )


def _receiver(settings: Settings, bundle: Bundle, storage: Storage, decoder: Decoder) -> Receiver:
    spool = _spool(settings)
    limits = FormLimits(
        body_bytes=settings.max_upload_bytes,
        files=settings.max_upload_files,
        file_bytes=_max_plane_bytes(settings),
        idle_timeout_s=settings.upload_idle_timeout_s,
        spool=spool,
    )
    references = References(settings.roots, spool, _max_plane_bytes(settings))
    return Receiver(storage, references, decoder, Idempotency(storage.records), bundle.manifest.channels, limits)


def _stagings_at_once(settings: Settings) -> int:
    """As many as there are cores where a disk of this machine is written to; more elsewhere."""
    elsewhere = settings.redis is not None or settings.objects is not None
    return _ELSEWHERE_AT_ONCE if elsewhere else cpu_count(settings.threads)


def _spool(settings: Settings) -> Path:
    """Where requests are spooled; what dead processes left there goes."""
    spool = settings.data / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    sweep_spool(spool)
    return spool


def _max_plane_bytes(settings: Settings) -> int:
    return 4 * settings.max_image_pixels + _HEADER_BYTES


def open_decoder(settings: Settings, bundle: Bundle, observer: Observer = UNOBSERVED) -> WorkerDecoder:
    """Make what decodes a bundle's images, on as many workers as the settings have threads."""
    recipe, limits = bundle.manifest.recipe, settings.image_limits
    return WorkerDecoder(
        SiteDecoder(recipe, limits),
        workers=cpu_count(settings.threads),
        memory_bytes=decoding_memory_bytes(limits, recipe),
        timeout_s=settings.decode_timeout_s,
        observer=observer,
    )


async def _proved(prove: Callable[[], None], readiness: Readiness) -> None:
    """Let requests in once the engine agrees with the bundle's golden images; else say why, for good."""
    try:
        await run_in_threadpool(prove)
    except BundleError as error:
        log.error("not ready: %s", error.detail)  # noqa: TRY400 (the sentence says it all)
        readiness.fail(error.detail)
    except Exception as error:
        log.exception("not ready: the golden images could not be replayed")
        readiness.fail(f"the golden images could not be replayed: {type(error).__name__}")
    else:
        readiness.succeed()
