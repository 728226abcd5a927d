"""HTTP of what surrounds the two stories: images sent ahead, plate maps, kept answers. Holds no ``try``."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from model.layout import PlaneKey, match_channel, parse_site, parse_well, read_platemap
from service import exports, schemas
from service.digests import require_digest
from service.multipart import received_body, received_pieces, utf8
from service.routes import PROBLEM, BatchId, KeptBatches, Reading, Ready, Serving, Writing

MAX_PLATEMAP_BYTES = 1 << 20

router = APIRouter()

_TIFF: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "one grey TIFF plane",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_CSV: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "CSV or TSV with a well column; one that tells the role, and any others",
        "content": {
            exports.CSV: {"schema": {"type": "string"}, "example": "well,role,compound\nA01,control,DMSO\n"},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_FORMS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            exports.CSV: {"schema": {"type": "string"}},
            exports.PARQUET: {"schema": {"type": "string", "format": "binary"}},
        }
    },
    **PROBLEM,
}


@router.put(
    "/batches/{batch_id}/images/{well}/{site}/{channel}",
    status_code=201,
    response_model=schemas.KeptImage,
    responses={200: {"model": schemas.KeptImage, "description": "the same image was there"}, **PROBLEM},
    openapi_extra=_TIFF,
)
async def send_image(
    request: Request,
    response: Response,
    deed: Writing,
    batch_id: BatchId,
    batches: Ready,
    served: Serving,
    well: str,
    site: str,
    channel: str,
    content_digest: Annotated[str, Header(description="RFC 9530: sha-256=:<base64>:")],
    replace: Annotated[bool, Query(description="put another image in the place of the one sent before")] = False,
) -> schemas.KeptImage:
    """Send one plane ahead, as a raw body; it waits until its well is asked for. The fast way: parallel, no multipart."""
    key = PlaneKey(parse_well(well), parse_site(site), match_channel(channel, batches.bundle.manifest.channels))
    declared = request.headers.get("content-length", "")
    with served.staging_bytes.taken(deed.tenant, int(declared) if declared.isdecimal() else served.max_plane_bytes):
        pieces = await received_pieces(request, served.max_plane_bytes, served.receiver.limits.idle_timeout_s)

        def stage() -> tuple[bool, schemas.KeptImage]:
            body = b"".join(pieces)
            pieces.clear()  # or the plane would be held twice
            digest = require_digest(body, content_digest)
            return served.kept.stage(deed, batch_id, key, body, digest, replace=replace)

        new, image = await served.staging_turns.taken(stage)
    response.status_code = 201 if new else 200
    return image


@router.get("/batches/{batch_id}/images", response_model=schemas.ImageList, responses=PROBLEM)
def list_images(deed: Reading, batch_id: BatchId, kept: KeptBatches) -> schemas.ImageList:
    """List the planes that are staged, and those of kept controls: what a client need not send again."""
    return kept.images(deed.tenant, batch_id)


@router.put("/batches/{batch_id}/platemap", response_model=schemas.PlateMapReport, responses=PROBLEM, openapi_extra=_CSV)
async def send_platemap(
    request: Request, deed: Writing, batch_id: BatchId, kept: KeptBatches, served: Serving
) -> schemas.PlateMapReport:
    """Send a plate map: which wells are controls, and columns that come back in every export. It replaces the one before."""
    body = await received_body(request, MAX_PLATEMAP_BYTES, served.receiver.limits.idle_timeout_s)
    sent = await run_in_threadpool(lambda: read_platemap(utf8(body, "plate map")))
    return await run_in_threadpool(kept.send_platemap, deed, batch_id, sent)


@router.get("/batches/{batch_id}/platemap", response_model=schemas.PlateMapReport, responses=PROBLEM)
def get_platemap(deed: Reading, batch_id: BatchId, kept: KeptBatches) -> schemas.PlateMapReport:
    """Tell the plate map."""
    return kept.platemap(deed.tenant, batch_id)


@router.get("/batches/{batch_id}/predictions", response_model=schemas.KeptPredictions, responses=_FORMS)
def get_predictions(
    deed: Reading,
    batch_id: BatchId,
    kept: KeptBatches,
    batches: Ready,
    accept: Annotated[str, Header(description="application/json, text/csv or application/vnd.apache.parquet")] = "*/*",
    form: Annotated[
        Literal["json", "csv", "parquet"] | None, Query(alias="format", description="instead of the Accept header")
    ] = None,
) -> Any:
    """Give the latest answer of every well; ``stale`` ones stand on superseded statistics."""
    chosen = exports.chosen_form(form, accept)
    found, columns = kept.predictions(deed.tenant, batch_id)
    if chosen == exports.JSON:
        return found
    content = exports.file_of(chosen, found, columns, batches.bundle.manifest.classes)
    name = f"{batch_id}.{'csv' if chosen == exports.CSV else 'parquet'}"
    return Response(content, media_type=chosen, headers={"Content-Disposition": f'attachment; filename="{name}"'})
