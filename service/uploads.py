"""A received form → verified sites: which file is which plane, then bytes → sha256, pixels, network input.

Knows nothing of batches or statistics. Names are read first, before any pixel: a form that does not hold together costs
no decoding. Sites are then prepared in sorted order, a few ahead of whoever consumes them, so that a whole plate never
has to fit in memory.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from model.errors import (
    AnchorwellError,
    BlankImageError,
    ImageError,
    LayoutError,
    MissingChannelError,
    NonFiniteImageError,
    SaturatedImageError,
)
from model.images import ImageLimits, ImageRecipe, Plane, check_saturation, decode_plane, prepare_site
from model.layout import (
    MAX_PIXEL_SIZE_UM,
    PlaneKey,
    SiteKey,
    duplicate_plane,
    file_name,
    layout_pixel_size_um,
    parse_file_name,
    parse_layout,
    plane_key,
)
from service.errors import InvalidRequestError, NoImagesError
from service.multipart import Form, ReceivedFile, utf8

UNUSED_CHANNEL = "-"
QUALITY_ERRORS = (BlankImageError, SaturatedImageError)
"""What may befall one site of a treated well without casting doubt on the rest of the upload."""


@dataclass(frozen=True)
class Skipped:
    """A file that carries nothing to measure, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Upload:
    """Which file is which plane: complete sites, in order; nothing is decoded yet."""

    form: Form
    sites: Mapping[SiteKey, Mapping[str, ReceivedFile]]
    skipped: tuple[Skipped, ...]
    pixel_size_um: float | None

    @property
    def wells(self) -> frozenset[str]:
        """The wells sent."""
        return frozenset(site.well for site in self.sites)


@dataclass(frozen=True, eq=False)
class PreparedSite:
    """One site as the network takes it: float32 (channels, size, size), with each plane's sha256 and saturated share."""

    key: SiteKey
    planes: Mapping[str, str]
    saturation: Mapping[str, float]
    image: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RefusedSite:
    """A site left out because an image of it shows nothing to classify."""

    key: SiteKey
    error: ImageError


# --- which file is which plane ---------------------------------------------------------------------------------------


def read_upload(form: Form, channels: Sequence[str]) -> Upload:
    """Group a form's files to complete sites with every one of ``channels``.

    Raises:
        PlateError, InvalidRequestError, NoImagesError: one of their subclasses names the file at fault.
    """
    fields, images = _split(form)
    numbered = _channel_names(fields.get("channels"))
    layout = parse_layout(fields["layout"], channels) if "layout" in fields else None
    planes: dict[PlaneKey, ReceivedFile] = {}
    skipped: list[Skipped] = []
    for file in images:
        key = _place(file, layout, channels, numbered)
        if isinstance(key, Skipped):
            skipped.append(key)
        elif key in planes:
            raise duplicate_plane(key, planes[key].name, file.name)
        else:
            planes[key] = file
    if not planes:
        raise NoImagesError(f"no image to use among {len(images)} files: send them as parts named 'images'")
    return Upload(form, _complete_sites(planes, channels), tuple(skipped), _pixel_size(fields))


def _split(form: Form) -> tuple[dict[str, str], list[ReceivedFile]]:
    """Separate the form's options (``layout`` may be a file) from its images."""
    fields, images = dict(form.fields), []
    for name, file in form.files:
        if name == "images":
            images.append(file)
        elif name == "layout" and "layout" not in fields:
            fields["layout"] = utf8(form.read(file), name)
        else:
            raise _unknown_part(name)
    for name in fields.keys() - {"layout", "channels", "pixel_size_um"}:
        raise _unknown_part(name)
    return fields, images


def _unknown_part(name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the part {name[:40]!r} is not known or is given twice; a form has the files 'images' and at most one each of "
        "'layout', 'channels' and 'pixel_size_um'"
    )


def _channel_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _pixel_size(fields: Mapping[str, str]) -> float | None:
    """Return the pixel size that the form gives, or else its LoadData table."""
    text = fields.get("pixel_size_um")
    if text is None:
        return layout_pixel_size_um(fields["layout"]) if "layout" in fields else None
    try:
        value = float(text)
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
        if isinstance(parsed.channel, int) and numbered and numbered[parsed.channel - 1 :][:1] == (UNUSED_CHANNEL,):
            return Skipped(name, f"channel {parsed.channel} is named unused by the request")
        return plane_key(parsed, channels, numbered)
    except AnchorwellError as error:
        raise error.about(file=name[:200]) from None


def _complete_sites(
    planes: Mapping[PlaneKey, ReceivedFile], channels: Sequence[str]
) -> dict[SiteKey, Mapping[str, ReceivedFile]]:
    sites: dict[SiteKey, dict[str, ReceivedFile]] = defaultdict(dict)
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


# --- bytes to network input ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparer:
    """Turns an upload's files into network input by the bundle's recipe, on ``workers`` threads."""

    recipe: ImageRecipe
    limits: ImageLimits
    workers: int

    @contextmanager
    def prepared(self, upload: Upload, pixel_size_um: float | None) -> Iterator[Iterator[PreparedSite | RefusedSite]]:
        """Give the upload's sites in sorted order; those with an error of ``QUALITY_ERRORS`` as ``RefusedSite``.

        Raises:
            ImageError: any other fault of a file; it names file, well, site and channel.
        """
        with ThreadPoolExecutor(self.workers, thread_name_prefix="prepare") as pool:
            waiting: deque[Future[PreparedSite | RefusedSite]] = deque()

            def ahead() -> Iterator[PreparedSite | RefusedSite]:
                for key, files in upload.sites.items():
                    waiting.append(pool.submit(partial(self._prepare, upload.form, key, files, pixel_size_um)))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()

            try:
                yield ahead()
            finally:
                for future in waiting:
                    future.cancel()

    def _prepare(
        self, form: Form, key: SiteKey, files: Mapping[str, ReceivedFile], pixel_size_um: float | None
    ) -> PreparedSite | RefusedSite:
        decoded = {}
        for channel in self.recipe.channels:
            plane = self._decode(form, key, channel, files[channel])
            if isinstance(plane, RefusedSite):
                return plane
            decoded[channel] = plane
        planes = [decoded[channel].plane for channel in self.recipe.channels]
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                image = prepare_site(planes, self.recipe, pixel_size_um)
            if not np.isfinite(image).all():
                raise NonFiniteImageError("the pixels span more than single precision can scale")
        except ImageError as error:
            raise error.about(well=key.well, site=key.site) from None
        return PreparedSite(
            key=key,
            planes={channel: item.sha256 for channel, item in decoded.items()},
            saturation={channel: item.saturated_share for channel, item in decoded.items()},
            image=image,
        )

    def _decode(self, form: Form, key: SiteKey, channel: str, file: ReceivedFile) -> "_Decoded | RefusedSite":
        data = form.read(file)
        try:
            plane = decode_plane(data, self.limits)
            share = check_saturation(plane, self.limits)
        except ImageError as error:
            error.about(file=file_name(file.name)[:200], well=key.well, site=key.site, channel=channel)
            if isinstance(error, QUALITY_ERRORS):
                return RefusedSite(key, error)
            raise
        return _Decoded(plane, hashlib.sha256(data).hexdigest(), share)


@dataclass(frozen=True, eq=False)
class _Decoded:
    plane: Plane
    sha256: str
    saturated_share: float
