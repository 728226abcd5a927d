"""The one composition root: settings in, an ASGI app out. Nothing is created at import."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from model.bundle import Bundle
from model.errors import BundleError
from service.batches import Batches
from service.engine import Engine, OnnxEngine, replay
from service.errors import install_handlers
from service.gates import PixelBudget, Readiness, Slots
from service.multipart import FormLimits
from service.reports import VERSION
from service.routes import Served, router
from service.settings import Settings
from service.store import Store, open_store
from service.uploads import Preparer

_HEADER_BYTES = 1 << 20

log = logging.getLogger("anchorwell")


def create_app(settings: Settings, *, engine: Engine | None = None, store: Store | None = None) -> FastAPI:
    """Compose the service. An engine or store that is given stands in for the configured one, and stays its owner's.

    Raises:
        BundleError: the bundle is not what its manifest says. StartError: the settings cannot be met.
    """
    settings.check_exposure()
    bundle = Bundle.load(settings.bundle)
    used_engine = engine or OnnxEngine(bundle, settings.device, settings.threads)
    used_store = store or open_store(settings.store)
    preparer = Preparer(
        bundle.manifest.recipe,
        settings.image_limits,
        workers=settings.threads or os.cpu_count() or 1,
        budget=PixelBudget(settings.max_decoding_pixels),
        max_input_bytes=settings.max_request_input_bytes,
    )
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_replay, used_engine, bundle, readiness)
            yield
            tasks.cancel_scope.cancel()
        if store is None:
            used_store.close()

    app = FastAPI(
        title="Anchorwell",
        version=VERSION,
        description="Classifies microscopy plates against their own negative controls.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.served = Served(
        batches=Batches(bundle, used_engine, used_store, preparer),
        readiness=readiness,
        slots=Slots(settings.max_concurrent_requests),
        limits=FormLimits(
            body_bytes=settings.max_upload_bytes,
            files=settings.max_upload_files,
            file_bytes=4 * settings.max_image_pixels + _HEADER_BYTES,
            idle_timeout_s=settings.upload_idle_timeout_s,
        ),
    )
    app.include_router(router)
    install_handlers(app)
    return app


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
