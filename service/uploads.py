"""A received form → verified sites: which file is which plane, then bytes → sha256, pixels, prepared sites.

Knows nothing of batches or statistics. Names are read first, before any pixel: a form that does not hold together costs
no decoding. Sites are then prepared in sorted order, a few ahead of whoever consumes them, so that a whole plate never
has to fit in memory.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Protocol, TypeVar

from model.errors import (
    AnchorwellError,
    BlankImageError,
    ImageError,
    LayoutError,
    MissingChannelError,
    SaturatedImageError,
)
from model.images import ImageRecipe, PreparedImage
from model.layout import (
    MAX_PIXEL_SIZE_UM,
    Layout,
    PlaneKey,
    SiteKey,
    duplicate_image,
    duplicate_plane,
    file_name,
    is_unused,
    layout_of,
    parse_file_name,
    plane_key,
    rounded_pixel_size_um,
)
from model.tables import Table
from service.decoding import Decoder, FileSlice, content_of
from service.errors import InvalidRequestError, NoImagesError, ReferenceUnreadableError, UploadTooLargeError
from service.multipart import IMAGES, LAYOUT, Form, ReceivedFile
from service.priority import give_way
from service.store import KeptFile, blob_sha256
from service.tables import table_of_any_kind

_SUFFIX = re.compile(r"(\.ome)?\.tiff?$", re.IGNORECASE)
QUALITY_ERRORS = (BlankImageError, SaturatedImageError)
"""What may befall one site of a treated well without casting doubt on the rest of the upload."""


@dataclass(frozen=True)
class Skipped:
    """A file that carries nothing to measure, and why."""

    file: str
    reason: str


class SentFile(Protocol):
    """One plane's file, wherever it lies."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def content(self) -> str:
        """What tells its content from another's before it is decoded: a digest, or an address."""
        ...

    def on_disk(self) -> AbstractContextManager[FileSlice]:
        """Give the file as bytes on this machine's disk."""
        ...


@dataclass(frozen=True)
class Upload:
    """Which file is which plane: complete sites, in order; nothing is decoded yet.

    ``plate`` is the one that the layout names; ``notices`` tell what was assumed, or chosen of two, unasked. Images that are
    kept already are of one ``incarnation`` of their batch, and of no other.
    """

    sites: Mapping[SiteKey, Mapping[str, SentFile]]
    skipped: tuple[Skipped, ...] = ()
    pixel_size_um: float | None = None
    plate: str | None = None
    notices: tuple[str, ...] = ()
    incarnation: str | None = None

    @property
    def wells(self) -> frozenset[str]:
        """The wells sent."""
        return frozenset(site.well for site in self.sites)

    @property
    def identity(self) -> list[object]:
        """What was sent, whatever its files were called and in whatever order they came."""
        planes = [
            [key.well, key.site, channel, file.content]
            for key, files in sorted(self.sites.items())
            for channel, file in sorted(files.items())
        ]
        return [planes, self.pixel_size_um, self.plate]


@dataclass(frozen=True, eq=False)
class SeenSite:
    """One site that was decoded, with each plane's sha256 and saturated share."""

    key: SiteKey
    planes: Mapping[str, str]
    saturation: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class PreparedSite(SeenSite):
    """One prepared site; ``files`` are what whoever was to keep its files made of them."""

    image: PreparedImage
    files: Mapping[str, KeptFile] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RefusedSite:
    """A site left out because an image of it shows nothing to classify."""

    key: SiteKey
    error: ImageError


# --- which file is which plane ---------------------------------------------------------------------------------------


def read_upload(form: Form, channels: Sequence[str], decoder: Decoder) -> Upload:
    """Group a form's files to complete sites with every one of ``channels``; the decoder looks into files of several.

    Raises:
        PlateError, InvalidRequestError, NoImagesError: one of their subclasses names the file at fault.
    """
    fields, table, images = _split(form)
    numbered = _channel_names(fields.get("channels"))
    layout = layout_of(table, channels) if table is not None else None
    planes: dict[PlaneKey, ReceivedFile] = {}
    skipped: list[Skipped] = []
    for file in _by_plane(images, layout, channels, numbered, decoder):
        key = _place(file, None if layout is None else layout.files, channels, numbered)
        if isinstance(key, Skipped):
            skipped.append(key)
        elif key in planes:
            raise duplicate_plane(key, planes[key].name, file.name)
        else:
            planes[key] = file
    if not planes:
        raise NoImagesError(f"no image to use among {len(images)} files: send them as parts named 'images'")
    assumed = layout is None and numbered is None and _any_numbered(planes.values())
    pixel_size_um = chosen_pixel_size(fields.get("pixel_size_um"), layout)
    notices = (*_order_notice(channels if assumed else ()), *_pixel_size_notice(pixel_size_um, layout))
    plate = None if layout is None else layout.plate
    return Upload(complete_sites(planes, channels), tuple(skipped), pixel_size_um, plate, notices)


def _split(form: Form) -> tuple[Mapping[str, str], Table | None, list[ReceivedFile]]:
    """Separate the form's options, its layout (text or a file), and its images."""
    tables = [file.read() for name, file in form.files if name == LAYOUT]
    tables += [form.fields[LAYOUT].encode()] if LAYOUT in form.fields else []
    images = [file for name, file in form.files if name == IMAGES]
    return form.fields, table_of_any_kind(tables[0]) if tables else None, images


def _any_numbered(files: Iterable[ReceivedFile]) -> bool:
    return any(isinstance(parse_file_name(file.name).channel, int) for file in files)


def _by_plane(
    images: Sequence[ReceivedFile],
    layout: Layout | None,
    channels: Sequence[str],
    numbered: Sequence[str] | None,
    decoder: Decoder,
) -> Iterator[ReceivedFile]:
    """Give each channel of an OME-TIFF as a file of its own, named as one; other files as they are.

    Channels that the bundle does not have are left out. ``numbered`` names take the place of the file's own.
    """
    for file in images:
        if layout is not None or not _is_of_several(file):
            yield file
            continue
        pages = decoder.pages(file.slice).result()
        for number, (name, page) in enumerate(pages.items()):
            called = numbered[number] if numbered is not None and number < len(numbered) else name
            if any(called.strip().casefold() == channel.casefold() for channel in channels):
                yield replace(file, name=f"{_SUFFIX.sub('', file_name(file.name))}_{called.strip()}.tif", page=page)


def _is_of_several(file: ReceivedFile) -> bool:
    try:
        return parse_file_name(file.name).channel is None
    except AnchorwellError:  # it is told when its place is looked for
        return False


def _order_notice(assumed: Sequence[str]) -> Iterator[str]:
    if assumed:
        order = ", ".join(f"{number} {channel}" for number, channel in enumerate(assumed, start=1))
        yield f"the files number their channels, and the bundle's order was taken: {order}; send channels to name others"


def _pixel_size_notice(taken: float | None, layout: Layout | None) -> Iterator[str]:
    others = [size for size in (layout.pixel_sizes_um if layout is not None else ()) if size != taken]
    if others:
        yield f"pixel_size_um {taken:g} was taken; the table says {', '.join(f'{size:g}' for size in others[:4])}"


def _channel_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def chosen_pixel_size(text: str | None, layout: Layout | None) -> float | None:
    """Return the µm per pixel that a request gives, or else its table.

    Raises:
        InvalidRequestError: what it gives is no length. LayoutError: the table gives several.
    """
    if text is None:
        return None if layout is None else layout.pixel_size_um
    try:
        value = rounded_pixel_size_um(float(text))
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and 0 < value <= MAX_PIXEL_SIZE_UM):
        raise InvalidRequestError(f"pixel_size_um {text[:40]!r} is not a number of micrometres above 0")
    return value


def _place(
    file: ReceivedFile, layout: Mapping[str, PlaneKey] | None, channels: Sequence[str], numbered: Sequence[str] | None
) -> PlaneKey | Skipped:
    name = file_name(file.name)
    try:
        if layout is not None and name in layout:
            return layout[name]
        parsed = parse_file_name(name)
        if parsed.thumbnail:
            return Skipped(name, "a thumbnail")
        if layout is not None:
            raise LayoutError("the layout does not name this file")
        if is_unused(parsed, numbered):
            return Skipped(name, f"channel {parsed.channel} is named unused by the request")
        return plane_key(parsed, channels, numbered)
    except AnchorwellError as error:
        raise error.about(file=name[:200]) from None


def complete_sites(planes: Mapping[PlaneKey, SentFile], channels: Sequence[str]) -> dict[SiteKey, Mapping[str, SentFile]]:
    """Group planes to sites.

    Raises:
        MissingChannelError: a site lacks one.
    """
    sites: dict[SiteKey, dict[str, SentFile]] = defaultdict(dict)
    for key in sorted(planes):
        sites[key.site_key][key.channel] = planes[key]
    for site, files in sites.items():
        missing = [channel for channel in channels if channel not in files]
        if missing:
            raise MissingChannelError(
                f"well {site.well} site {site.site} has no image of {', '.join(missing)}; "
                f"every site needs {', '.join(channels)}",
                well=site.well,
                site=site.site,
                channel=missing[0],
                channels=missing,
            )
    return dict(sites)


# --- bytes to prepared sites ------------------------------------------------------------------------------------------


Keeper = Callable[[Mapping[str, FileSlice]], Mapping[str, KeptFile]]
"""Is given a site's files by channel; says where they are kept."""
Site = TypeVar("Site", bound=SeenSite)


@dataclass(frozen=True)
class Preparer:
    """Prepares an upload's sites by the bundle's recipe, a few sites ahead of whoever takes them."""

    recipe: ImageRecipe
    decoder: Decoder
    ahead: int
    max_input_bytes: int

    @contextmanager
    def prepared(
        self,
        upload: Upload,
        pixel_size_um: float | None,
        then: Callable[[PreparedSite], Site],
        keep: Keeper | None = None,
    ) -> Iterator[Iterator[Site | RefusedSite]]:
        """Give what ``then`` makes of each of the upload's sites, in sorted order; of an error of ``QUALITY_ERRORS``, that.

        ``keep`` is given the files of each site that is not refused. Both work on several sites at once.

        Raises:
            ImageError: any other fault of a file; it names file, well, site and channel.
            DuplicateImageError: one file is sent as two planes.
        """

        def made(key: SiteKey, files: Mapping[str, SentFile]) -> Site | RefusedSite:
            site = self._prepare(key, files, pixel_size_um, keep)
            return site if isinstance(site, RefusedSite) else then(site)

        with ThreadPoolExecutor(self.ahead, thread_name_prefix="prepare", initializer=give_way) as pool:
            waiting: deque[Future[Site | RefusedSite]] = deque()

            def ahead() -> Iterator[Site | RefusedSite]:
                for key, files in upload.sites.items():
                    waiting.append(pool.submit(copy_context().run, made, key, files))
                    if len(waiting) > self.ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()

            try:
                yield _different(ahead())
            finally:
                for future in waiting:
                    future.cancel()

    @property
    def max_sites(self) -> int:
        """How many prepared sites may be held together."""
        return self.max_input_bytes // (4 * len(self.recipe.channels) * self.recipe.size**2)

    def require_room(self, sites: int) -> None:
        """Check that the prepared sites which are held together are not too large.

        Raises:
            UploadTooLargeError: it is; says how many fit.
        """
        if sites > self.max_sites:
            raise UploadTooLargeError(
                f"{sites:,} sites are more than are held at once; at most {self.max_sites:,} fit in one request's controls: "
                "send fewer a request",
                max_sites=self.max_sites,
            )

    def _prepare(
        self, key: SiteKey, files: Mapping[str, SentFile], pixel_size_um: float | None, keep: Keeper | None
    ) -> PreparedSite | RefusedSite:
        with ExitStack() as stack:
            slices = {}
            for channel, file in files.items():
                try:
                    slices[channel] = stack.enter_context(file.on_disk())
                except ReferenceUnreadableError as error:
                    raise error.about(well=key.well, site=key.site, channel=channel) from None
            try:
                decoded = self.decoder.site(key, slices, pixel_size_um).result()
            except ImageError as error:
                if isinstance(error, QUALITY_ERRORS):
                    return RefusedSite(key, error)
                raise
            kept = {} if keep is None else keep(slices)
        for channel, held in kept.items():
            if content_of(blob_sha256(held.blob), held.page) != decoded.planes[channel]:
                raise ReferenceUnreadableError(f"{files[channel].name[:200]!r} was changed while it was read").about(
                    well=key.well, site=key.site, channel=channel
                )
        return PreparedSite(key, decoded.planes, decoded.saturation, decoded.image, kept)


def _different(outcomes: Iterator[Site | RefusedSite]) -> Iterator[Site | RefusedSite]:
    """Pass sites on.

    Raises:
        DuplicateImageError: two planes of them are one image.
    """
    seen: dict[str, PlaneKey] = {}
    for outcome in outcomes:
        for channel, sha256 in () if isinstance(outcome, RefusedSite) else outcome.planes.items():
            plane = PlaneKey(outcome.key.well, outcome.key.site, channel)
            if sha256 in seen:
                raise duplicate_image(seen[sha256], plane)
            seen[sha256] = plane
        yield outcome
