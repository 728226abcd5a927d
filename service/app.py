"""The one composition root: settings in, an ASGI app out. Nothing is created at import."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from model.bundle import Bundle
from model.errors import BundleError
from service import routes, routes_images
from service.access import Access, Keys
from service.batches import Batches
from service.decoding import Decoder, SiteDecoder, WorkerDecoder, cpu_count, decoding_memory_bytes
from service.engine import Engine, OnnxEngine, replay
from service.errors import install_handlers
from service.gates import Rates, Readiness, Slots
from service.idempotency import Idempotency
from service.kept import BundleView, Kept
from service.multipart import FormLimits, sweep_spool
from service.posts import Receiver
from service.references import References
from service.reports import VERSION
from service.requests import RequestIds
from service.routes import Served
from service.settings import Settings
from service.storage import Storage
from service.uploads import Preparer

_HEADER_BYTES = 1 << 20

log = logging.getLogger("anchorwell")


def create_app(
    settings: Settings, *, engine: Engine | None = None, storage: Storage | None = None, decoder: Decoder | None = None
) -> FastAPI:
    """Compose the service. What else is given stands in for what would be made, and stays its owner's.

    Raises:
        BundleError: the bundle is not what its manifest says. StartError: the settings cannot be met.
    """
    bundle = Bundle.load(settings.bundle)
    used_storage = storage or settings.open_storage()
    settings.check_exposure(keys=any(Keys(used_storage.records).all()))
    used_engine = engine or OnnxEngine(bundle, settings.device, settings.threads)
    used_decoder = decoder or _decoder(settings, bundle)
    preparer = Preparer(
        bundle.manifest.recipe,
        used_decoder,
        ahead=2 * cpu_count(settings.threads),
        max_input_bytes=settings.max_request_input_bytes,
    )
    view = BundleView(bundle, used_engine.precision)
    spool = settings.data / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    sweep_spool(spool)
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_replay, used_engine, bundle, readiness)
            yield
            tasks.cancel_scope.cancel()
        if decoder is None and isinstance(used_decoder, WorkerDecoder):
            await run_in_threadpool(used_decoder.close)
        if storage is None:
            used_storage.close()

    app = FastAPI(
        title="Anchorwell",
        version=VERSION,
        description="Classifies microscopy plates against their own negative controls.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    max_plane_bytes = 4 * settings.max_image_pixels + _HEADER_BYTES
    app.state.served = Served(
        batches=Batches(view, used_engine, used_storage, preparer),
        kept=Kept(view, used_storage),
        access=Access(used_storage.records, allow_anonymous=settings.allow_anonymous),
        rates=Rates(settings.redis),
        readiness=readiness,
        receiver=Receiver(
            used_storage,
            References(settings.roots, spool, max_plane_bytes),
            Idempotency(used_storage.records),
            bundle.manifest.channels,
            _form_limits(settings, spool),
        ),
        upload_slots=Slots(settings.max_concurrent_requests),
        staging_bytes=Slots(settings.max_staging_bytes, "bytes of images"),
        max_plane_bytes=max_plane_bytes,
    )
    app.add_middleware(RequestIds)
    app.include_router(routes_images.router)
    app.include_router(routes.router)
    install_handlers(app)
    return app


def _form_limits(settings: Settings, spool: Path) -> FormLimits:
    return FormLimits(
        body_bytes=settings.max_upload_bytes,
        files=settings.max_upload_files,
        file_bytes=4 * settings.max_image_pixels + _HEADER_BYTES,
        idle_timeout_s=settings.upload_idle_timeout_s,
        spool=spool,
    )


def _decoder(settings: Settings, bundle: Bundle) -> WorkerDecoder:
    recipe, limits = bundle.manifest.recipe, settings.image_limits
    return WorkerDecoder(
        SiteDecoder(recipe, limits),
        workers=cpu_count(settings.threads),
        memory_bytes=decoding_memory_bytes(limits, recipe),
        timeout_s=settings.decode_timeout_s,
    )


async def _replay(engine: Engine, bundle: Bundle, readiness: Readiness) -> None:
    """Let requests in once the engine agrees with the bundle's golden images; else say why, for good."""
    try:
        await run_in_threadpool(replay, engine, bundle)
    except BundleError as error:
        log.error("not ready: %s", error.detail)  # noqa: TRY400 (the sentence says it all)
        readiness.fail(error.detail)
    except Exception as error:
        log.exception("not ready: the golden images could not be replayed")
        readiness.fail(f"the golden images could not be replayed: {type(error).__name__}")
    else:
        readiness.succeed()
