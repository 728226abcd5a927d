"""What is posted to a batch: images in a multipart form, or JSON that names planes which are staged or lie elsewhere.

The body is received in a slot of its own; then, under its Idempotency-Key when it has one, the request runs.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from model.layout import PlaneKey, Role, duplicate_plane, load_data_places, match_channel, parse_site, parse_well
from model.tables import MAX_TABLE_BYTES
from service.batches import Stopwatch
from service.decoding import Decoder
from service.deeds import Deed
from service.errors import InvalidRequestError, NoImagesError
from service.idempotency import Idempotency
from service.multipart import FormLimits, received_body, received_form
from service.references import ReferencedFile, References
from service.staging import Named, chosen, staged_upload
from service.storage import Storage
from service.tables import table_of_any_kind
from service.uploads import Upload, chosen_pixel_size, complete_sites, read_upload

MAX_JSON_BYTES = 16 << 20
JSON = "application/json"

M = TypeVar("M", bound=BaseModel)


class Referred(BaseModel):
    """One plane that lies elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = Field(description="file:///… or s3://…, below a place that the operator gave the tenant")
    well: str
    site: int
    channel: str


class Sent(BaseModel):
    """A JSON body, with one of ``staged``, ``images`` and ``load_data``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    staged: bool = Field(default=False, description="take planes that were sent ahead with PUT …/images/…")
    images: tuple[Referred, ...] | None = Field(default=None, description="planes by reference, all of them")
    load_data: str | None = Field(
        default=None, description="address of a JUMP LoadData table (CSV or Parquet) whose URL_Orig… tell each plane's"
    )
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
    sent: Sent | None = None


@dataclass(frozen=True)
class Receiver:
    """Receives posts for batches of a bundle's channels."""

    storage: Storage
    references: References
    decoder: Decoder
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
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == JSON:
            sent = parsed(Sent, await received_body(request, MAX_JSON_BYTES, self.limits.idle_timeout_s))
            async with self.keyed(request, deed, sent, status) as keyed:
                upload = await run_in_threadpool(self.named, sent, deed.tenant, batch_id, role)
                watch.lap("receive")
                yield Post(keyed, upload, watch, sent)
            return
        async with received_form(request, self.limits) as form:
            upload = await run_in_threadpool(read_upload, form, self.channels, self.decoder)
            watch.lap("receive")
            async with self.keyed(request, deed, upload.identity, status) as keyed:
                yield Post(keyed, upload, watch)

    @asynccontextmanager
    async def keyed(self, request: Request, deed: Deed, content: Any, status: int) -> AsyncIterator[Deed]:
        """Hold a request's Idempotency-Key, if it has one; ``content`` is what makes it the same request again.

        Raises:
            AnsweredBefore: it has been answered. RepeatError: the key is another's, or the request is still running.
        """
        key = request.headers.get("idempotency-key")
        if key is None:
            yield deed
            return
        plain = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
        whole = [request.method, request.url.path, sorted(request.query_params.multi_items()), plain]
        async with self.idempotency.held(deed.tenant, key, whole, status) as held:
            yield replace(deed, beside=(*deed.beside, held))

    def named(self, sent: Sent, tenant: str, batch_id: str, role: Role) -> Upload:
        """Gather the images that a JSON body names.

        Raises:
            RequestError, PlateError, BatchNotFoundError: one of their subclasses says what is wrong with it.
        """
        if [sent.staged, sent.images is not None, sent.load_data is not None].count(True) != 1:
            raise InvalidRequestError("the body needs one of staged: true, images and load_data, or be a multipart form")
        size = None if sent.pixel_size_um is None else chosen_pixel_size(repr(sent.pixel_size_um), None)
        named, store = Named(batch_id, role, sent.wells, size), self.storage.of(tenant)
        if sent.staged:
            return staged_upload(store, named, self.channels)
        if sent.images is not None:
            return self._referred(sent.images, named, tenant)
        place = sent.load_data or ""
        table = table_of_any_kind(self.references.read(tenant, place, MAX_TABLE_BYTES))
        places = load_data_places(table, self.channels)
        files = self._files(tenant, {key: _seen_from(place, address) for key, address in places.addresses.items()})
        return Upload(
            complete_sites(chosen(store, named, files, "in the LoadData table"), self.channels),
            pixel_size_um=places.pixel_size_um if size is None else size,
            plate=places.plate,
        )

    def _referred(self, images: Sequence[Referred], named: Named, tenant: str) -> Upload:
        """Take the planes that a request lists, each at its own address."""
        addresses: dict[PlaneKey, str] = {}
        wells = {name: parse_well(name) for name in dict.fromkeys(image.well for image in images)}  # few, of many planes
        channels = {name: match_channel(name, self.channels) for name in dict.fromkeys(image.channel for image in images)}
        for image in images:
            key = PlaneKey(wells[image.well], parse_site(image.site), channels[image.channel])
            if key in addresses:
                raise duplicate_plane(key, addresses[key], image.uri)
            addresses[key] = image.uri
        if not addresses:
            raise NoImagesError("the body lists no images")
        wanted = None if named.wells is None else {parse_well(well) for well in named.wells}
        files = self._files(tenant, {key: uri for key, uri in addresses.items() if wanted is None or key.well in wanted})
        return Upload(complete_sites(files, self.channels), pixel_size_um=named.pixel_size_um)

    def _files(self, tenant: str, addresses: Mapping[PlaneKey, str]) -> dict[PlaneKey, ReferencedFile]:
        """Give every address that the tenant may refer to as a file; one that it may not refuses them all."""
        for uri in addresses.values():
            self.references.place(tenant, uri)
        return {key: ReferencedFile(self.references, tenant, uri) for key, uri in addresses.items()}


def _seen_from(table: str, address: str) -> str:
    """An address in a table: a relative one begins where the table lies."""
    if "://" in address or address.startswith("/"):
        return address
    return f"{table.rpartition('/')[0]}/{address}"


def parsed(kind: type[M], body: bytes) -> M:
    """Read a JSON body.

    Raises:
        InvalidRequestError: it is not what it should be; says which fields.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors()[:5])
        raise InvalidRequestError(f"the JSON body is not valid: {faults}") from None
