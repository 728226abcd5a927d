"""HTTP in, HTTP out. Knows no rule of a plate and holds no ``try``: what is raised below leaves as problem+json."""

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from model.layout import Role
from service import schemas
from service.access import Access, Caller, Scope
from service.batches import Batches
from service.deeds import ANONYMOUS, Deed
from service.errors import InvalidBatchIdError, InvalidRequestError
from service.gates import Neighbours, Rates, Readiness, Slots, Turns
from service.kept import PAGE, Kept
from service.later import Later
from service.posts import JSON, Post, Receiver, Sent
from service.priority import give_way
from service.problems import accepted_headers
from service.reports import model_card, provenance
from service.telemetry import METRICS_TYPE
from service.webhooks import Webhooks

BATCH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

router = APIRouter()


@dataclass(frozen=True)
class Served:
    """What the routes hand requests to; the app carries one."""

    batches: Batches
    kept: Kept
    access: Access
    rates: Rates
    readiness: Readiness
    receiver: Receiver
    later: Later
    webhooks: Webhooks
    neighbours: Neighbours
    turns: Turns
    staging_turns: Turns
    upload_slots: Slots
    staging_bytes: Slots
    max_plane_bytes: int


# --- who asks, for what ----------------------------------------------------------------------------------------------


async def get_served(request: Request) -> Served:
    """What the app was composed of."""
    served: Served = request.app.state.served
    return served


Serving = Annotated[Served, Depends(get_served)]


async def known_query(request: Request) -> None:
    """Refuse query parameters that would be passed over.

    Raises:
        InvalidRequestError: one is unknown, or given twice.
    """
    if not request.scope["query_string"]:
        return
    fields = get_flat_params(request.scope["route"].dependant)
    known = {field.alias for field in fields if isinstance(field.field_info, params.Query)}
    told = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            raise InvalidRequestError(f"{request.url.path[:200]} takes no query parameter {name[:40]!r}; {told}")
        if times > 1:
            raise InvalidRequestError(f"the query parameter {name} is given {times} times")


_BEARER = HTTPBearer(auto_error=False, description="an API key: aw_…; without any keys, none is needed on this machine")


def caller_of(
    request: Request, served: Serving, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """Who asks; counted against what their key may send. A body of undeclared length is counted as it arrives.

    Raises:
        UnauthorizedError: nobody whom the service knows. ForeignSiteError: another site's page, by a browser.
        TooManyRequestsError: one who sent too much.
    """
    give_way()  # every thread of the pool comes by here
    caller = served.access.caller(request.headers.get("authorization"))
    if caller.by == ANONYMOUS:
        served.neighbours.require(request.headers.get("host", ""), request.headers.get("origin"))
    served.rates.count_request(caller)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        served.rates.count_bytes(caller, int(declared))
    else:
        request.state.count_undeclared = partial(served.rates.count_bytes, caller)
    return caller


def asked_with(scope: Scope) -> Callable[..., Awaitable[Deed]]:
    """A dependency that gives the deed of a request whose key has a scope."""

    async def deed_of(request: Request, caller: Annotated[Caller, Depends(caller_of)], served: Serving) -> Deed:
        caller.require(scope)
        return Deed(caller.tenant, caller.by, request.scope["state"]["request_id"], events=served.webhooks)

    return deed_of


Reading = Annotated[Deed, Depends(asked_with(Scope.READ))]
Writing = Annotated[Deed, Depends(asked_with(Scope.WRITE))]
Administering = Annotated[Deed, Depends(asked_with(Scope.ADMIN))]


async def valid_batch_id(
    batch_id: Annotated[
        str,
        Path(
            description="normally the plate's barcode",
            json_schema_extra={"pattern": f"^{BATCH_ID.pattern}$", "example": "BR00116991"},
        ),
    ],
) -> str:
    """Check a batch's name.

    Raises:
        InvalidBatchIdError: it could not stand in a path or a key.
    """
    if not BATCH_ID.fullmatch(batch_id):
        raise InvalidBatchIdError(
            f"{batch_id[:40]!r} is not a batch id: 1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit"
        )
    return batch_id


async def ready_batches(served: Serving) -> Batches:
    """The batches, once the golden images agreed.

    Raises:
        NotReadyError: they have not, or not yet.
    """
    served.readiness.require()
    return served.batches


async def kept_batches(served: Serving, _: Annotated[Batches, Depends(ready_batches)]) -> Kept:
    """What is kept of batches, once requests are taken."""
    return served.kept


BatchId = Annotated[str, Depends(valid_batch_id)]
Ready = Annotated[Batches, Depends(ready_batches)]
KeptBatches = Annotated[Kept, Depends(kept_batches)]


async def is_later(
    prefer: Annotated[str, Header(description="respond-async: answer 202 with a job (RFC 7240)")] = "",
) -> bool:
    """Whether the caller wants to be answered later."""
    return "respond-async" in (item.partition(";")[0].strip().lower() for item in prefer.split(","))


IsLater = Annotated[bool, Depends(is_later)]


async def control_or_panel(
    role: Annotated[
        Literal["control", "panel"],
        Query(description="panel: treated wells that a bundle trained with a panel measures beside the controls"),
    ] = "control",
) -> Role:
    """What the wells that are sent as controls are."""
    return Role(role)


async def treated() -> Role:
    """What the wells that are sent to be answered are."""
    return Role.TREATED


def posted(role_of: Callable[..., Awaitable[Role]], status: int) -> Callable[..., AsyncIterator[Post]]:
    """A dependency that receives a post in a slot of its own."""

    async def received(
        request: Request,
        deed: Writing,
        batch_id: BatchId,
        _: Ready,
        served: Serving,
        later: IsLater,
        role: Annotated[Role, Depends(role_of)],
    ) -> AsyncIterator[Post]:
        with served.upload_slots.taken(deed.tenant):
            async with served.receiver.received(request, deed, batch_id, role, 202 if later else status) as post:
                yield post

    return received


PostedControls = Annotated[Post, Depends(posted(control_or_panel, 201))]
PostedTreated = Annotated[Post, Depends(posted(treated, 200))]


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema, what it refers to put in its place."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("$ref", "").rpartition("/")[2]
            return resolved(definitions[name]) if name else {key: resolved(inner) for key, inner in value.items()}
        return [resolved(inner) for inner in value] if isinstance(value, list) else value

    whole: dict[str, Any] = resolved(schema)
    return whole


IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "the same key and content gets the first answer, and takes effect once",
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
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
            },
            JSON: {"schema": inlined(Sent), "example": {"staged": True, "wells": ["A01", "B01"]}},
        },
    },
    "parameters": [IDEMPOTENCY_KEY],
}
_LATER: dict[int | str, dict[str, Any]] = {
    202: {"model": schemas.JobReport, "description": "with Prefer: respond-async: a job that answers later"},
}
PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "RFC 9457 problem; docs/errors.md lists the types",
        "content": {"application/problem+json": {"schema": inlined(schemas.Problem)}},
    }
}


# --- the two stories -------------------------------------------------------------------------------------------------


@router.post(
    "/batches/{batch_id}/controls",
    status_code=201,
    response_model=schemas.ControlsReport,
    responses={**_LATER, **PROBLEM},
    openapi_extra=_FORM,
)
async def send_controls(
    batch_id: BatchId,
    batches: Ready,
    served: Serving,
    post: PostedControls,
    later: IsLater,
    role: Annotated[Role, Depends(control_or_panel)],
    replace: Annotated[bool, Query(description="put other images in the place of kept ones")] = False,
) -> schemas.ControlsReport | Response:
    """Send negative-control images: they are kept, and the batch's statistics are measured on all that are kept.

    With role=panel, images of treated wells (such as positive controls) that enter the statistics beside the controls.
    """
    if later:
        options = {"replace": replace, "role": role.value}
        return accepted(await run_in_threadpool(served.later.put, post, "controls", batch_id, options))
    story = partial(batches.adapt, post.deed, batch_id, post.upload, post.watch, replace=replace, role=role)
    return await served.turns.taken(story)


@router.post(
    "/batches/{batch_id}/predict",
    response_model=schemas.Prediction,
    responses={**_LATER, **PROBLEM},
    openapi_extra=_FORM,
)
async def predict(
    batch_id: BatchId,
    batches: Ready,
    served: Serving,
    post: PostedTreated,
    later: IsLater,
    context: Annotated[
        Literal["controls", "blended", "source"],
        Query(
            description="blended asks for statistics of one control well or more, blended with the mean of the training "
            "plates; source for the answer without adaptation"
        ),
    ] = "controls",
) -> schemas.Prediction | Response:
    """Send treated images: one answer per well, against the statistics of the batch's controls."""
    if later:
        return accepted(await run_in_threadpool(served.later.put, post, "predict", batch_id, {"context": context}))
    story = partial(batches.classify, post.deed, batch_id, post.upload, post.watch, context=context)
    return await served.turns.taken(story)


def accepted(job: schemas.JobReport) -> Response:
    """Tell where a job is looked at."""
    return Response(job.model_dump_json(), status_code=202, media_type=JSON, headers=accepted_headers(job.job_id))


# --- batches ---------------------------------------------------------------------------------------------------------


@router.get("/batches", response_model=schemas.BatchList, responses=PROBLEM)
def list_batches(
    deed: Reading,
    kept: KeptBatches,
    after: Annotated[str, Query(description="a batch's name: those behind it", max_length=128)] = "",
    limit: Annotated[int, Query(description="most batches", ge=1, le=PAGE)] = PAGE,
) -> schemas.BatchList:
    """List the batches kept, a page at a time; ``following`` says where the next one begins."""
    return kept.summaries(deed.tenant, after, limit)


@router.get("/batches/{batch_id}", response_model=schemas.BatchSummary, responses=PROBLEM)
def get_batch(deed: Reading, batch_id: BatchId, kept: KeptBatches) -> schemas.BatchSummary:
    """Tell what is kept of a batch."""
    return kept.summary(deed.tenant, batch_id)


@router.delete("/batches/{batch_id}", status_code=204, responses=PROBLEM)
def delete_batch(deed: Writing, batch_id: BatchId, kept: KeptBatches) -> Response:
    """Forget a batch: its images, its statistics, its plate map and its answers."""
    kept.delete(deed, batch_id)
    return Response(status_code=204)


# --- the service -----------------------------------------------------------------------------------------------------


@router.get("/model", response_model=schemas.ModelCard, responses=PROBLEM)
def get_model(_: Reading, served: Serving) -> schemas.ModelCard:
    """Describe the served bundle."""
    batches = served.batches
    return model_card(batches.bundle, batches.engine, batches.view.max_context_sites)


@router.get("/metrics", response_class=PlainTextResponse, responses=PROBLEM)
def metrics(request: Request, _: Annotated[Deed, Depends(asked_with(Scope.METRICS))]) -> Response:
    """Tell counts and times of this process, as Prometheus reads them; no tenant is named."""
    return Response(request.app.state.metrics.text(), media_type=METRICS_TYPE)


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", response_model=schemas.Live)
async def live() -> schemas.Live:
    """Answer while the process does."""
    return schemas.Live()


@router.get("/health/ready", response_model=schemas.Ready, responses=PROBLEM)
async def ready(batches: Ready, served: Serving) -> schemas.Ready:
    """Answer 200 once the bundle's golden images were replayed and agreed, and while the store answers."""
    await served.readiness.checked(batches.storage.records.check)
    return schemas.Ready(**provenance(batches.bundle, batches.engine))
