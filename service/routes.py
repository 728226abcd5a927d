"""HTTP in, HTTP out. Knows no rule of a plate and holds no ``try``: what is raised below leaves as problem+json."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from service import schemas
from service.batches import Batches, Stopwatch
from service.errors import InvalidBatchIdError
from service.gates import Readiness, Slots
from service.multipart import FormLimits, received_form
from service.uploads import Upload, read_upload

BATCH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

router = APIRouter()


@dataclass(frozen=True)
class Served:
    """What the routes hand requests to; the app carries one."""

    batches: Batches
    readiness: Readiness
    slots: Slots
    limits: FormLimits


@dataclass(frozen=True)
class TimedUpload:
    """A received upload and the watch that runs since its first byte."""

    upload: Upload
    watch: Stopwatch


def get_served(request: Request) -> Served:
    """What the app was composed of."""
    served: Served = request.app.state.served
    return served


def valid_batch_id(batch_id: Annotated[str, Path(description="normally the plate's barcode")]) -> str:
    """Check a batch's name.

    Raises:
        InvalidBatchIdError: it could not stand in a path or a key.
    """
    if not BATCH_ID.fullmatch(batch_id):
        raise InvalidBatchIdError(
            f"{batch_id[:40]!r} is not a batch id: 1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit"
        )
    return batch_id


def ready_batches(served: Annotated[Served, Depends(get_served)]) -> Batches:
    """The batches, once the golden images agreed.

    Raises:
        NotReadyError: they have not, or not yet.
    """
    served.readiness.require()
    return served.batches


BatchId = Annotated[str, Depends(valid_batch_id)]
Ready = Annotated[Batches, Depends(ready_batches)]


async def received_upload(
    request: Request, _: BatchId, batches: Ready, served: Annotated[Served, Depends(get_served)]
) -> AsyncIterator[TimedUpload]:
    """Receive an upload in a slot of its own and tell which file is which plane."""
    watch = Stopwatch()
    with served.slots.taken():
        async with received_form(request, served.limits) as form:
            upload = await run_in_threadpool(read_upload, form, batches.bundle.manifest.channels)
            watch.lap("receive")
            yield TimedUpload(upload, watch)


Received = Annotated[TimedUpload, Depends(received_upload)]

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "grey TIFFs, one plane a file; every site with every channel of the bundle",
                        },
                        "layout": {
                            "type": "string",
                            "description": "CSV or JSON (file, well, site, channel) or a JUMP LoadData CSV; "
                            "without it, file names tell",
                        },
                        "channels": {
                            "type": "string",
                            "description": "names of numbered channels, in order: DNA,ER,RNA; '-' for one not used",
                        },
                        "pixel_size_um": {"type": "number", "description": "µm per pixel of these images"},
                    },
                }
            }
        },
    }
}
_PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "RFC 9457 problem; docs/errors.md lists the types",
        "content": {"application/problem+json": {"schema": {"type": "object"}}},
    }
}


@router.post(
    "/batches/{batch_id:path}/controls",
    status_code=201,
    response_model=schemas.ControlsReport,
    responses=_PROBLEM,
    openapi_extra=_FORM,
)
async def send_controls(
    batch_id: BatchId,
    batches: Ready,
    received: Received,
    replace: Annotated[bool, Query(description="put other images in the place of kept ones")] = False,
) -> schemas.ControlsReport:
    """Send negative-control images: they are kept, and the batch's statistics are measured on all that are kept."""
    return await run_in_threadpool(batches.adapt, batch_id, received.upload, received.watch, replace=replace)


@router.post(
    "/batches/{batch_id:path}/predict",
    response_model=schemas.Prediction,
    responses=_PROBLEM,
    openapi_extra=_FORM,
)
async def predict(
    batch_id: BatchId,
    batches: Ready,
    received: Received,
    context: Annotated[
        Literal["controls", "source"], Query(description="source asks for the answer without adaptation")
    ] = "controls",
) -> schemas.Prediction:
    """Send treated images: one answer per well, against the statistics of the batch's controls."""
    source = context == "source"
    return await run_in_threadpool(batches.classify, batch_id, received.upload, received.watch, source=source)


@router.get("/batches", response_model=schemas.BatchList, responses=_PROBLEM)
def list_batches(batches: Ready) -> schemas.BatchList:
    """List the batches kept."""
    return batches.summaries()


@router.api_route("/batches/{batch_id:path}/controls", methods=["GET", "DELETE"], include_in_schema=False)
@router.api_route("/batches/{batch_id:path}/predict", methods=["GET", "DELETE"], include_in_schema=False)
def refuse_method(batch_id: str) -> None:  # noqa: ARG001
    """Say that the two stories are posted, before their paths are taken for ids."""
    raise HTTPException(405, headers={"Allow": "POST"})


@router.get("/batches/{batch_id:path}", response_model=schemas.BatchSummary, responses=_PROBLEM)
def get_batch(batch_id: BatchId, batches: Ready) -> schemas.BatchSummary:
    """Tell what is kept of a batch."""
    return batches.summary(batch_id)


@router.delete("/batches/{batch_id:path}", status_code=204, responses=_PROBLEM)
def delete_batch(batch_id: BatchId, batches: Ready) -> Response:
    """Forget a batch: its controls, its statistics, and which wells were answered."""
    batches.delete(batch_id)
    return Response(status_code=204)


@router.get("/model", response_model=schemas.ModelCard, responses=_PROBLEM)
def get_model(served: Annotated[Served, Depends(get_served)]) -> schemas.ModelCard:
    """Describe the served bundle."""
    return served.batches.model_card()


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", response_model=schemas.Live)
async def live() -> schemas.Live:
    """Answer while the process does."""
    return schemas.Live()


@router.get("/health/ready", response_model=schemas.Ready, responses=_PROBLEM)
def ready(batches: Ready) -> schemas.Ready:
    """Answer 200 once the bundle's golden images were replayed and agreed, and while the store answers."""
    return batches.ready()
