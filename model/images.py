"""TIFF bytes → planes → prepared images → network input: the one preprocessing rule, shared by training and the service.

A site is prepared by itself, and finished when its batch's scale is known. Knows nothing of plates or networks. Bytes come
from strangers: the header is checked before a pixel is decoded, one page is decoded from memory alone, and no other file
is ever opened.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from model.errors import (
    BlankImageError,
    ContextError,
    ImageError,
    ImageTooLargeError,
    ImageTooSmallError,
    MixedSizesError,
    NoControlsError,
    NonFiniteImageError,
    PixelSizeError,
    SaturatedImageError,
    TruncatedImageError,
    UnsupportedImageError,
)
from model.scale import BatchScale, common_surfaces, field_surfaces
from model.tiff import grey_plane_stream

Plane = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 50000: "zstd", 34926: "zstd"}
_DTYPES = ("uint8", "uint16", "float32")
_MIN_IS_BLACK = 1
_DECLARED_PER_FILE_BYTE = 2_000  # a constant 16-bit plane deflates about 1,000:1; bombs start beyond
_SAMPLED = 64
_MAX_SEGMENTS = 65_536
_RESAMPLING = (0.05, 20.0)
"""Smallest and largest factor by which planes are resampled to the network's pixel size."""


@dataclass(frozen=True)
class ImageLimits:
    """What one plane may be: its largest pixel count and its largest share of pixels at the top of the range."""

    max_pixels: int = 64_000_000
    max_saturated_share: float = 0.25


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_plane(data: bytes, limits: ImageLimits = ImageLimits(), page: int | None = None) -> Plane:
    """Decode one grey-scale TIFF page from memory.

    Args:
        data: a TIFF file's bytes: uint8, uint16 or float32; uncompressed, LZW, deflate or zstd.
        limits: what the header may declare.
        page: which of several pages; without it the file must have one alone.

    Returns:
        The plane, (height, width), in the file's own type.

    Raises:
        ImageError: one of its subclasses says what is wrong with the file.
    """
    with _opened(data, limits, page) as opened:
        plane = np.asarray(opened.asarray(maxworkers=1))
    return _checked_plane(plane)


@contextmanager
def _opened(data: bytes, limits: ImageLimits, number: int | None) -> Iterator[Any]:
    """Give the only page of a TIFF, or one of several, whose header is one that is read here."""
    try:
        with grey_plane_stream(data, number) as stream, tifffile.TiffFile(stream, _multifile=False) as tiff:
            page: Any = tiff.pages[0]
            _check_page(page, limits)
            _check_segments(page, len(data), limits)
            yield page
    except ImageError:
        raise
    except MemoryError:
        raise ImageTooLargeError("the image needs more memory than there is") from None
    except Exception as error:  # noqa: BLE001 (a decoder meets hostile bytes: whatever it raises, the file is at fault)
        raise TruncatedImageError(f"the pixels cannot be decoded: {str(error)[:120] or type(error).__name__}") from None


def _check_page(page: Any, limits: ImageLimits) -> None:
    """Check that the page is one grey plane of a kind that is read here."""
    if page.ndim != 2 or page.samplesperpixel != 1:  # noqa: PLR2004
        raise UnsupportedImageError(f"expected one grey plane (height, width), the TIFF has shape {page.shape}")
    height, width = (int(extent) for extent in page.shape)
    if height * width > limits.max_pixels:
        raise ImageTooLargeError(
            f"the TIFF declares {height} x {width} pixels; at most {limits.max_pixels:,} are taken",
            height=height,
            width=width,
        )
    if int(page.photometric) != _MIN_IS_BLACK:
        raise UnsupportedImageError(f"photometric {page.photometric!s}; expected grey levels from black (min-is-black)")
    if str(page.dtype) not in _DTYPES:
        raise UnsupportedImageError(f"pixels of type {page.dtype}; expected one of {', '.join(_DTYPES)}")
    if int(page.compression) not in _COMPRESSIONS:
        raise UnsupportedImageError(f"compression {page.compression!s}; expected none, LZW, deflate or zstd")
    if _described_planes(page) > 1:
        raise UnsupportedImageError(f"the TIFF is a stack of {_described_planes(page)} planes; send one plane a file")


def _described_planes(page: Any) -> int:
    """How many planes the description of an ImageJ or tifffile stack says that the file has."""
    if page.is_imagej:
        return int(tifffile.tifffile.imagej_description_metadata(page.imagej_description).get("images", 1))
    if page.is_shaped:
        shape = tifffile.tifffile.shaped_description_metadata(page.shaped_description)["shape"]
        return int(math.prod(shape) // math.prod(page.shape))
    return 1


@dataclass(frozen=True)
class _Segments:
    """The strips or tiles that a page must have: pixels of each when whole and of the last, and how many there are."""

    area: int
    last: int
    number: int

    @classmethod
    def of(cls, page: Any) -> "_Segments":
        height, width = (int(extent) for extent in page.shape)
        if page.is_tiled:
            area = page.tilelength * page.tilewidth
            return cls(area, area, math.ceil(height / page.tilelength) * math.ceil(width / page.tilewidth))
        rows = min(page.rowsperstrip, height)
        number = math.ceil(height / rows)
        return cls(rows * width, (height - rows * (number - 1)) * width, number)

    @property
    def pixels(self) -> int:
        """All pixels that are decoded: those by which tiles reach over the image's edge, too."""
        return self.area * (self.number - 1) + self.last


def _check_segments(page: Any, file_bytes: int, limits: ImageLimits) -> None:
    """Check that every strip or tile that the header declares is in the file, and that they are not too many."""
    segments = _Segments.of(page)
    if segments.pixels > limits.max_pixels or segments.number > _MAX_SEGMENTS:
        raise ImageTooLargeError(
            f"the TIFF declares {segments.number:,} strips or tiles with {segments.pixels:,} pixels; at most "
            f"{_MAX_SEGMENTS:,} with {limits.max_pixels:,} are taken"
        )
    offsets, counts = page.dataoffsets, page.databytecounts
    if not len(offsets) == len(counts) == segments.number or min(*offsets, *counts) <= 0:
        raise TruncatedImageError(f"strips or tiles are missing: the header declares {segments.number:,}")
    end = max(map(sum, zip(offsets, counts, strict=True)))
    if end > file_bytes:
        raise TruncatedImageError(f"the file has {file_bytes:,} bytes; its pixels should reach to {end:,}")
    itemsize = page.dtype.itemsize
    whole = min(counts[:-1], default=segments.area * itemsize)
    if int(page.compression) == 1 and (whole < segments.area * itemsize or counts[-1] < segments.last * itemsize):
        raise TruncatedImageError("the header declares more bytes of pixels than a strip or tile of the file has")
    if segments.pixels * itemsize > file_bytes * _DECLARED_PER_FILE_BYTE:
        raise ImageTooLargeError(f"{file_bytes:,} bytes of file declare {segments.pixels * itemsize:,} bytes of pixels")


def _checked_plane(plane: NDArray[Any]) -> Plane:
    if plane.dtype == np.float32 and not np.isfinite(plane).all():
        raise NonFiniteImageError("the image has NaN or infinite pixels")
    if _is_constant(plane[:1]) and _is_constant(plane):  # a row of nearly every image shows that it is not
        value = plane.flat[0] if plane.size else "nothing"
        raise BlankImageError(f"the image is blank: every pixel is {value}")
    native: Plane = np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("="))
    return native


def _is_constant(pixels: NDArray[Any]) -> bool:
    return bool(pixels.size == 0 or pixels.min() == pixels.max())


def saturated_share(plane: Plane) -> float:
    """Return the share of pixels at the top of an integer type's range; 0 for float planes."""
    if plane.dtype.kind != "u":
        return 0.0
    top = (1 << 8 * plane.dtype.itemsize) - 1
    return float(np.count_nonzero(plane == top)) / plane.size if plane.max() == top else 0.0


def check_saturation(plane: Plane, limits: ImageLimits = ImageLimits()) -> float:
    """Return the saturated share.

    Raises:
        SaturatedImageError: it is above the limit.
    """
    share = saturated_share(plane)
    if share > limits.max_saturated_share:
        raise SaturatedImageError(
            f"{share:.0%} of the pixels are saturated; at most {limits.max_saturated_share:.0%} are taken", share=share
        )
    return share


# --- network input ---------------------------------------------------------------------------------------------------


Scaling = Literal["percentile-8bit", "fixed-scale", "control-scale"]
Illumination = Literal["none", "controls"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
ILLUMINATIONS: tuple[Illumination, ...] = get_args(Illumination)


@dataclass(frozen=True)
class ImageRecipe:
    """How a site's planes become the network's input.

    The planes are brought to the network's pixel size (resampled when the plate's pixel size is known, else every
    ``shrink``-th pixel is taken), scaled to about 0…1, cropped about their centre to ``size`` x ``size``, and per
    channel shifted by ``mean`` and divided by ``std``.

    ``percentile-8bit`` scaling (Sanchez-Fernandez et al. 2026) maps each plane's minimum…``percentile``-th percentile to
    0…1 in 256 steps; it removes a plane's absolute intensity. ``fixed-scale`` divides by ``full_scale`` per channel and
    keeps it. ``control-scale`` maps to 0…1, per channel and for all sites of a batch alike, what lies between
    ``control_percentiles`` of the batch's control sites (median over the sites of the context): intensity between the
    wells of a plate is kept, gain and offset of stain and camera go.

    ``illumination`` ``controls`` also divides by how bright the light of the batch's control sites is over the field, once
    their floor is subtracted. It needs a linear scaling: ``percentile-8bit`` is the paper's, made of each image alone, and
    its numbers would no longer be those.
    """

    channels: tuple[str, ...]
    size: int
    shrink: int = 2
    pixel_size_um: float | None = None
    scaling: Scaling = "percentile-8bit"
    percentile: float = 99.99
    full_scale: tuple[float, ...] | None = None
    control_percentiles: tuple[float, float] = (1.0, 99.9)
    illumination: Illumination = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("scaling", SCALINGS), ("illumination", ILLUMINATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; expected one of {', '.join(allowed)}")
        if self.scaling == "fixed-scale" and len(self.full_scale or ()) != len(self.channels):
            raise ValueError("fixed-scale needs a full_scale per channel")
        if self.scaling == "percentile-8bit" and self.illumination != "none":
            raise ValueError("percentile-8bit scales each image by itself: illumination needs fixed-scale or control-scale")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != len(self.channels):
                raise ValueError(f"{name} needs one value per channel")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("size", "shrink"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number of pixels, 1 or more")
        sizes = () if self.pixel_size_um is None else (self.pixel_size_um,)
        for name, values in (("pixel_size_um", sizes), ("full_scale", self.full_scale or ()), ("std", self.std)):
            if not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name} {', '.join(f'{value:g}' for value in values)} is not positive and finite")
        if not 0 < self.percentile <= 100:  # noqa: PLR2004 (percent)
            raise ValueError(f"percentile {self.percentile:g} is not above 0 and at most 100")
        low, high = self.control_percentiles
        if not 0 <= low < high <= 100:  # noqa: PLR2004 (percent)
            raise ValueError(f"control_percentiles {low:g} and {high:g} are not two of 0 to 100, the lower first")

    @property
    def scaled_by_batch(self) -> bool:
        """Whether a site is scaled by what its batch's control sites show: without controls it is no input."""
        return self.scaling == "control-scale" or self.illumination == "controls"


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A site's centre crop before its batch's scale: ``pixels`` float32 (channels, size, size).

    They are 0…1 for ``percentile-8bit``, grey levels at the network's pixel size for the linear scalings. ``field`` is how
    bright each whole plane is over the field of view, (channels, 2, terms), for recipes that correct illumination.
    """

    pixels: NDArray[np.float32]
    field: NDArray[np.float64] | None = None

    @classmethod
    def of_planes(cls, planes: Iterable[NDArray[np.float32]], recipe: ImageRecipe) -> "PreparedImage":
        """Cut a site's whole planes, (height, width) each, as ``prepare_field`` returns them."""
        pixels = np.empty((len(recipe.channels), recipe.size, recipe.size), np.float32)
        fields = []
        for place, plane in enumerate(planes):
            pixels[place] = centre_crop(plane, recipe.size)
            if recipe.illumination == "controls":
                fields.append(field_surfaces(plane, recipe.size))
        return cls(pixels, np.stack(fields) if fields else None)


def prepare_site(
    planes: Iterable[Plane],
    recipe: ImageRecipe,
    pixel_size_um: float | None = None,
    limits: ImageLimits = ImageLimits(),
) -> PreparedImage:
    """Bring a site's planes, in the recipe's channel order, to the network's pixel size and crop them.

    Args:
        planes: one (height, width) plane per channel, all of one size; taken one at a time, so that they may be decoded
            as they are needed.
        recipe: the bundle's rule.
        pixel_size_um: µm per pixel of these planes, when known.
        limits: what resampling may give.

    Raises:
        MixedSizesError, ImageTooSmallError, PixelSizeError: the planes do not fit the recipe.
        BlankImageError: nothing is left of a plane to scale.
    """
    return PreparedImage.of_planes(_fields(planes, recipe, pixel_size_um, limits, crop=True), recipe)


def prepare_field(planes: Iterable[Plane], recipe: ImageRecipe, pixel_size_um: float | None = None) -> NDArray[np.float32]:
    """Bring planes to the network's pixel size, whole: float32 (channels, height, width).

    They are 0…1 for ``percentile-8bit``, grey levels for the linear scalings. Raises what ``prepare_site`` does.
    """
    return np.stack(list(_fields(planes, recipe, pixel_size_um, ImageLimits(), crop=False)))


def measure_scale(sites: Sequence[PreparedImage], recipe: ImageRecipe) -> BatchScale | None:
    """Measure a batch's scale on the control sites of its context, in any order; None for a recipe that has none.

    Raises:
        ContextError: there are no sites, or a channel of them shows nothing to scale by.
    """
    if not recipe.scaled_by_batch:
        return None
    if not sites:
        raise NoControlsError("no control sites: this image recipe takes its scale from them")
    floor, light = _light(sites, recipe)
    if recipe.scaling == "fixed-scale":
        return BatchScale.of(floor - floor[:, :1] * light, np.array(recipe.full_scale)[:, None] * light)
    flat = BatchScale.of(floor, light)
    levels = np.median([_percentiles(flat(site.pixels, recipe.size), recipe) for site in sites], axis=0)  # (channels, 2)
    for name, (low, high) in zip(recipe.channels, levels, strict=True):
        if not low < high:
            raise ContextError(f"channel {name} of the control images is all but blank: it gives no scale", channel=name)
    low, high = levels[:, :1], levels[:, 1:]
    return BatchScale.of(floor + low * light, (high - low) * light)


def scale_pixels(
    pixels: NDArray[np.float32], recipe: ImageRecipe, scale: BatchScale | None, corner: tuple[int, int] = (0, 0)
) -> NDArray[np.float32]:
    """Scale prepared pixels to about 0…1.

    Args:
        pixels: (…, channels, height, width).
        recipe: what they were prepared by.
        scale: their batch's.
        corner: row and column of their first pixel, counted from the centre crop's.

    Raises:
        ValueError: the recipe needs a scale.
    """
    if scale is not None:
        return scale(pixels, recipe.size, corner)
    if recipe.scaled_by_batch:
        raise ValueError(f"{recipe.scaling} with illumination {recipe.illumination} needs the batch's scale")
    if recipe.scaling == "percentile-8bit":
        return pixels
    return pixels / np.array(recipe.full_scale, np.float32)[:, None, None]


def finish_site(site: PreparedImage, recipe: ImageRecipe, scale: BatchScale | None) -> NDArray[np.float32]:
    """Turn a prepared site into the network's input: float32 (channels, size, size).

    Raises:
        NonFiniteImageError: its pixels span more than single precision can scale.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        finished = normalise(scale_pixels(site.pixels, recipe, scale), recipe)
    if not np.isfinite(finished).all():
        raise NonFiniteImageError("the pixels span more than single precision can scale")
    return finished


def centre_crop(site: NDArray[Any], size: int) -> NDArray[Any]:
    """Crop (…, height, width) about its centre."""
    top, left = crop_corner(site.shape, size)
    return site[..., top : top + size, left : left + size]


def crop_corner(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Row and column of the first pixel of the centre crop of (…, height, width)."""
    return (shape[-2] - size) // 2, (shape[-1] - size) // 2


def normalise(site: NDArray[np.float32], recipe: ImageRecipe) -> NDArray[np.float32]:
    """Shift and divide each channel by the recipe's mean and std: (…, channels, height, width), contiguous."""
    if not recipe.mean:
        return np.ascontiguousarray(site)
    mean = np.asarray(recipe.mean, np.float32)[:, None, None]
    std = np.asarray(recipe.std, np.float32)[:, None, None]
    return np.ascontiguousarray((site - mean) / std)


# --- steps -----------------------------------------------------------------------------------------------------------


def _fields(
    planes: Iterable[Plane], recipe: ImageRecipe, pixel_size_um: float | None, limits: ImageLimits, *, crop: bool
) -> Iterator[NDArray[np.float32]]:
    """Prepare planes one by one; ``map`` lets go of each before the next is asked for. ``crop``: the centre will do."""
    sizes: set[tuple[int, ...]] = set()
    return map(partial(_field, recipe, pixel_size_um, limits, sizes, crop), planes)


def _field(
    recipe: ImageRecipe,
    pixel_size_um: float | None,
    limits: ImageLimits,
    sizes: set[tuple[int, ...]],
    crop: bool,
    plane: Plane,
) -> NDArray[np.float32]:
    """Prepare one plane; ``sizes`` are those of the site's planes so far."""
    sizes.add(plane.shape)
    if len(sizes) != 1:
        listed = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise MixedSizesError(f"the channels of one site differ in size: {listed}")
    shrunk = _at_network_pixel_size(plane, recipe, pixel_size_um, limits)
    height, width = shrunk.shape
    if min(height, width) < recipe.size:
        raise ImageTooSmallError(
            f"the planes give {height} x {width} pixels at the network's pixel size; it needs {recipe.size} x {recipe.size}"
        )
    return _contrasted(shrunk, recipe, crop=crop)


def _at_network_pixel_size(
    plane: Plane, recipe: ImageRecipe, pixel_size_um: float | None, limits: ImageLimits
) -> NDArray[np.float32]:
    if pixel_size_um is None or recipe.pixel_size_um is None:
        return plane[:: recipe.shrink, :: recipe.shrink].astype(np.float32)
    factor = pixel_size_um / recipe.pixel_size_um
    height, width = (max(1, math.floor(extent * factor + 0.5)) for extent in plane.shape)
    if not _RESAMPLING[0] <= factor <= _RESAMPLING[1] or height * width > limits.max_pixels:
        raise PixelSizeError(
            f"{plane.shape[0]} x {plane.shape[1]} pixels of {pixel_size_um:g} µm would be {height} x {width} of the "
            f"network's {recipe.pixel_size_um:g} µm: look at the pixel size; factors from {_RESAMPLING[0]:g} to "
            f"{_RESAMPLING[1]:g} and {limits.max_pixels:,} pixels are taken"
        )
    resized = Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)  # antialiased: Pillow widens the filter when it shrinks


def _contrasted(plane: NDArray[np.float32], recipe: ImageRecipe, *, crop: bool) -> NDArray[np.float32]:
    """Stretch a plane to 0…1 in 256 steps for ``percentile-8bit``; else check that there is something to scale.

    What a plane is stretched by is seen in all of it, also where its centre alone is.
    """
    by_percentile = recipe.scaling == "percentile-8bit"
    low, high = np.float32(plane.min()), _percentile(plane, recipe.percentile) if by_percentile else np.float32(plane.max())
    if high <= low:  # nothing to stretch
        raise BlankImageError(f"the image is blank at the network's pixel size: all but a few pixels are {low:g}")
    if not by_percentile:
        return plane
    shown = centre_crop(plane, recipe.size) if crop else plane
    steps = np.floor(np.clip((shown - low) / (high - low), 0.0, 1.0) * 255.0)
    scaled: NDArray[np.float32] = (steps / np.float32(255.0)).astype(np.float32)
    return scaled


def _percentile(plane: NDArray[np.float32], share: float) -> np.float32:
    """Return what ``np.percentile`` does, bit for bit; for a high one the brightest pixels alone are sorted."""
    pixels = plane.reshape(-1)
    place = (pixels.size - 1) * (share / 100)
    below = math.floor(place)
    tail = pixels.size - below  # pixels from the one below the percentile to the brightest
    sample = pixels[::_SAMPLED]
    expected = min(sample.size, 2 * tail // _SAMPLED + 8)
    bright = pixels[pixels >= np.partition(sample, -expected)[-expected]]
    if bright.size < tail:
        bright = pixels
    first = bright.size - tail
    second = min(first + 1, bright.size - 1)
    part = np.partition(bright, (first, second))
    low, high, weight = part[first], part[second], place - below
    step = high - low
    return np.float32(high - step * (1 - weight) if weight >= 0.5 else low + step * weight)  # noqa: PLR2004 (numpy's rule)


def _light(sites: Sequence[PreparedImage], recipe: ImageRecipe) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Floor and relative brightness of the control sites over the field: (channels, terms) each, the latter 1 on average."""
    if recipe.illumination == "none":
        return np.zeros((len(recipe.channels), 1)), np.ones((len(recipe.channels), 1))
    common = common_surfaces([site.field for site in sites if site.field is not None])
    floor, light = common[:, 0], common[:, 1]
    for name, brightness in zip(recipe.channels, light[:, 0], strict=True):
        if not brightness > 0:
            raise ContextError(f"channel {name} of the control images is all but blank: it shows no light", channel=name)
    return floor, light / light[:, :1]


def _percentiles(pixels: NDArray[np.float32], recipe: ImageRecipe) -> NDArray[np.float64]:
    """Grey levels of a site at the recipe's percentiles of every fourth pixel: (channels, 2)."""
    some = pixels[:, ::2, ::2].reshape(len(pixels), -1)
    ranks = [round(share / 100 * (some.shape[1] - 1)) for share in recipe.control_percentiles]
    return np.partition(some, ranks, axis=1)[:, ranks].astype(np.float64)
