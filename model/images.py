"""TIFF bytes → planes → network input: the one preprocessing rule, shared by training and the service.

Knows nothing of plates or networks. Bytes come from strangers: the header is checked before a pixel is decoded, one
page is decoded from memory alone, and no other file is ever opened.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from model.errors import (
    BlankImageError,
    ImageError,
    ImageTooLargeError,
    ImageTooSmallError,
    MixedSizesError,
    NonFiniteImageError,
    NotATiffError,
    SaturatedImageError,
    TruncatedImageError,
    UnsupportedImageError,
)

Plane = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 50000: "zstd", 34926: "zstd"}
_DTYPES = ("uint8", "uint16", "float32")
_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_DECLARED_PER_FILE_BYTE = 2_000  # a constant 16-bit plane deflates about 1,000:1; bombs start beyond


@dataclass(frozen=True)
class ImageLimits:
    """What one plane may be: its largest pixel count and its largest share of pixels at the top of the range."""

    max_pixels: int = 64_000_000
    max_saturated_share: float = 0.25


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_plane(data: bytes, limits: ImageLimits = ImageLimits()) -> Plane:
    """Decode one grey-scale TIFF page from memory.

    Args:
        data: a TIFF file's bytes: uint8, uint16 or float32; uncompressed, LZW, deflate or zstd.
        limits: what the header may declare.

    Returns:
        The plane, (height, width), in the file's own type.

    Raises:
        ImageError: one of its subclasses says what is wrong with the file.
    """
    if data[:4] not in _TIFF_MAGIC:
        raise NotATiffError("an empty file" if not data else "the file is not a TIFF (its first bytes are another format's)")
    try:
        with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as tiff:
            page = _checked_page(tiff, len(data), limits)
            plane = np.asarray(page.asarray(maxworkers=1))
    except ImageError:
        raise
    except MemoryError:
        raise ImageTooLargeError("the image needs more memory than there is") from None
    except Exception as error:  # noqa: BLE001 (a decoder meets hostile bytes: whatever it raises, the file is at fault)
        raise TruncatedImageError(f"the pixels cannot be decoded: {str(error)[:120] or type(error).__name__}") from None
    return _checked_plane(plane)


def _checked_page(tiff: tifffile.TiffFile, file_bytes: int, limits: ImageLimits) -> Any:
    """Return the only page when its header is one that is read here."""
    if len(tiff.pages) != 1:
        raise UnsupportedImageError(f"the TIFF has {len(tiff.pages)} pages; send one plane a file")
    page: Any = tiff.pages[0]
    if page.ndim != 2 or page.samplesperpixel != 1:  # noqa: PLR2004
        raise UnsupportedImageError(f"expected one grey plane (height, width), the TIFF has shape {page.shape}")
    height, width = (int(extent) for extent in page.shape)
    if height * width > limits.max_pixels:
        raise ImageTooLargeError(
            f"the TIFF declares {height} x {width} pixels; at most {limits.max_pixels:,} are taken",
            height=height,
            width=width,
        )
    if str(page.dtype) not in _DTYPES:
        raise UnsupportedImageError(f"pixels of type {page.dtype}; expected one of {', '.join(_DTYPES)}")
    if int(page.compression) not in _COMPRESSIONS:
        raise UnsupportedImageError(f"compression {page.compression!s}; expected none, LZW, deflate or zstd")
    _check_declared_bytes(page, height * width * page.dtype.itemsize, file_bytes)
    return page


def _check_declared_bytes(page: Any, declared_bytes: int, file_bytes: int) -> None:
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if not ends or max(ends) > file_bytes:
        raise TruncatedImageError(f"the file has {file_bytes:,} bytes; its pixels should reach to {max(ends, default=0):,}")
    if int(page.compression) == 1 and sum(page.databytecounts) < declared_bytes:
        raise TruncatedImageError(f"the header declares {declared_bytes:,} bytes of pixels, the file stores fewer")
    if declared_bytes > file_bytes * _DECLARED_PER_FILE_BYTE:
        raise ImageTooLargeError(f"{file_bytes:,} bytes of file declare {declared_bytes:,} bytes of pixels")


def _checked_plane(plane: NDArray[Any]) -> Plane:
    if plane.dtype == np.float32 and not np.isfinite(plane).all():
        raise NonFiniteImageError("the image has NaN or infinite pixels")
    if plane.size == 0 or plane.min() == plane.max():
        value = plane.flat[0] if plane.size else "nothing"
        raise BlankImageError(f"the image is blank: every pixel is {value}")
    native: Plane = np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("="))
    return native


def saturated_share(plane: Plane) -> float:
    """Return the share of pixels at the top of an integer type's range; 0 for float planes."""
    if plane.dtype.kind != "u":
        return 0.0
    return float(np.count_nonzero(plane == (1 << 8 * plane.dtype.itemsize) - 1)) / plane.size


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


@dataclass(frozen=True)
class ImageRecipe:
    """How a site's planes become the network's input.

    The planes are brought to the network's pixel size (resampled when the plate's pixel size is known, else every
    ``shrink``-th pixel is taken), scaled to about 0…1, cropped about their centre to ``size`` x ``size``, and per
    channel shifted by ``mean`` and divided by ``std``.

    ``percentile`` scaling (Sanchez-Fernandez et al. 2026) maps each plane's minimum…``percentile``-th percentile to 0…1
    in 256 steps; it removes a plane's absolute intensity. ``fixed`` scaling divides by ``full_scale`` per channel and
    keeps it.
    """

    channels: tuple[str, ...]
    size: int
    shrink: int = 2
    pixel_size_um: float | None = None
    scaling: Literal["percentile", "fixed"] = "percentile"
    percentile: float = 99.99
    full_scale: tuple[float, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling == "fixed" and len(self.full_scale or ()) != len(self.channels):
            raise ValueError("fixed scaling needs a full_scale per channel")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != len(self.channels):
                raise ValueError(f"{name} needs one value per channel")


def prepare_site(planes: Sequence[Plane], recipe: ImageRecipe, pixel_size_um: float | None = None) -> NDArray[np.float32]:
    """Turn a site's planes, in the recipe's channel order, into the network's input.

    Args:
        planes: one (height, width) plane per channel, all of one size.
        recipe: the bundle's rule.
        pixel_size_um: µm per pixel of these planes, when known.

    Returns:
        float32 (channels, size, size).

    Raises:
        MixedSizesError, ImageTooSmallError: the planes do not fit the recipe.
    """
    scaled = scale_site(planes, recipe, pixel_size_um)
    return normalise(centre_crop(scaled, recipe.size), recipe)


def scale_site(planes: Sequence[Plane], recipe: ImageRecipe, pixel_size_um: float | None = None) -> NDArray[np.float32]:
    """Bring planes to the network's pixel size and to about 0…1, whole: float32 (channels, height, width)."""
    sizes = {plane.shape for plane in planes}
    if len(sizes) != 1:
        listed = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise MixedSizesError(f"the channels of one site differ in size: {listed}")
    shrunk = [_at_network_pixel_size(plane, recipe, pixel_size_um) for plane in planes]
    height, width = shrunk[0].shape
    if min(height, width) < recipe.size:
        raise ImageTooSmallError(
            f"the planes give {height} x {width} pixels at the network's pixel size; it needs {recipe.size} x {recipe.size}"
        )
    return np.stack([_scale(plane, recipe, index) for index, plane in enumerate(shrunk)])


def centre_crop(site: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Crop (…, height, width) about its centre."""
    top, left = (site.shape[-2] - size) // 2, (site.shape[-1] - size) // 2
    return site[..., top : top + size, left : left + size]


def normalise(site: NDArray[np.float32], recipe: ImageRecipe) -> NDArray[np.float32]:
    """Shift and divide each channel by the recipe's mean and std: (channels, height, width), contiguous."""
    if not recipe.mean:
        return np.ascontiguousarray(site)
    mean = np.asarray(recipe.mean, np.float32)[:, None, None]
    std = np.asarray(recipe.std, np.float32)[:, None, None]
    return np.ascontiguousarray((site - mean) / std)


def _at_network_pixel_size(plane: Plane, recipe: ImageRecipe, pixel_size_um: float | None) -> NDArray[np.float32]:
    if pixel_size_um is None or recipe.pixel_size_um is None:
        return plane[:: recipe.shrink, :: recipe.shrink].astype(np.float32)
    factor = pixel_size_um / recipe.pixel_size_um
    height, width = (max(1, math.floor(extent * factor + 0.5)) for extent in plane.shape)
    resized = Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)  # antialiased: Pillow widens the filter when it shrinks


def _scale(plane: NDArray[np.float32], recipe: ImageRecipe, index: int) -> NDArray[np.float32]:
    if recipe.scaling == "fixed":
        assert recipe.full_scale is not None
        return plane / np.float32(recipe.full_scale[index])
    low, high = np.float32(plane.min()), np.float32(np.percentile(plane, recipe.percentile))
    if high <= low:  # all but a few pixels share one value: nothing to stretch
        return np.zeros_like(plane)
    steps = np.floor(np.clip((plane - low) / (high - low), 0.0, 1.0) * 255.0)
    scaled: NDArray[np.float32] = (steps / np.float32(255.0)).astype(np.float32)
    return scaled
