"""What is posted to a batch, in any of its ways: images in a multipart form, or JSON that names staged planes.

The body is received in a slot of its own; then, under its Idempotency-Key when it has one, the request runs.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from model.layout import Role
from service.batches import Stopwatch
from service.deeds import Deed
from service.errors import InvalidRequestError
from service.idempotency import Idempotency
from service.multipart import FormLimits, received_body, received_form
from service.staging import staged_upload
from service.storage import Storage
from service.uploads import Upload, chosen_pixel_size, read_upload

MAX_JSON_BYTES = 16 << 20
JSON = "application/json"


class Sent(BaseModel):
    """A JSON body: staged planes of some wells, or of all that have the role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    staged: bool = Field(default=False, description="take planes that were sent ahead with PUT …/images/…")
    wells: tuple[str, ...] | None = Field(
        default=None,
        description="the wells; without them, controls are the plate map's and treated wells are all others that are staged",
    )
    pixel_size_um: float | None = Field(default=None, description="µm per pixel of these images")


@dataclass(frozen=True)
class Post:
    """A received request: who asks, what was sent, and the watch that runs since its first byte."""

    deed: Deed
    upload: Upload
    watch: Stopwatch


@dataclass(frozen=True)
class Receiver:
    """Receives posts for batches of a bundle's channels."""

    storage: Storage
    idempotency: Idempotency
    channels: tuple[str, ...]
    limits: FormLimits

    @asynccontextmanager
    async def received(self, request: Request, deed: Deed, batch_id: str, role: Role, status: int) -> AsyncIterator[Post]:
        """Receive a request; ``status`` is that of its answer.

        Raises:
            RequestError, PlateError, RepeatError: one of their subclasses says what is wrong with it.
        """
        watch = Stopwatch()
        async with self._uploaded(request, deed, batch_id, role) as upload:
            watch.lap("receive")
            key = request.headers.get("idempotency-key")
            if key is None:
                yield Post(deed, upload, watch)
                return
            content = [request.method, request.url.path, sorted(request.query_params.multi_items()), upload.identity]
            async with self.idempotency.held(deed.tenant, key, content, status) as held:
                yield Post(replace(deed, beside=(*deed.beside, held)), upload, watch)

    @asynccontextmanager
    async def _uploaded(self, request: Request, deed: Deed, batch_id: str, role: Role) -> AsyncIterator[Upload]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            async with received_form(request, self.limits) as form:
                yield await run_in_threadpool(read_upload, form, self.channels)
            return
        sent = _parsed(await received_body(request, MAX_JSON_BYTES, self.limits.idle_timeout_s))
        yield await run_in_threadpool(self._named, sent, deed, batch_id, role)

    def _named(self, sent: Sent, deed: Deed, batch_id: str, role: Role) -> Upload:
        if not sent.staged:
            raise InvalidRequestError('the body says no images: send {"staged": true}, or a multipart form')
        size = None if sent.pixel_size_um is None else chosen_pixel_size(repr(sent.pixel_size_um), None)
        return staged_upload(self.storage.of(deed.tenant), batch_id, sent.wells, role, self.channels, size)


def _parsed(body: bytes) -> Sent:
    try:
        return Sent.model_validate_json(body)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors()[:5])
        raise InvalidRequestError(f"the JSON body is not valid: {faults}") from None
