"""A batch's scale: the grey levels that become 0 and 1, per channel, and how both vary over the field of view.

Knows nothing of recipes, networks or statistics. What varies over the field is a quadratic surface: in simulated plates,
quartics and smoothed grids followed the cells of a few control sites more than the light, and what the sites do not
agree on is shrunk away, so that few controls correct little instead of wrongly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.statistics import json_sha256

Surfaces = tuple[tuple[float, ...], ...]
"""Per channel the coefficients of 1, y, x, y² - ⅓, yx and x² - ⅓, or of 1 alone: the same all over the field.

y and x run from -1 to 1 over the centre crop and further beyond it; all terms but the first are 0 on average over the crop.
"""

_BLOCKS, _LEAST_BLOCK_PX = 16, 4
_FLOOR_PERCENTILE = 10
_DARKEST = 0.1
"""Least brightness, relative to the crop's mean, that a surface may extrapolate to."""


@dataclass(frozen=True)
class BatchScale:
    """What one batch's control images say of stain, camera and light: ``low`` becomes 0, ``low + span`` becomes 1."""

    low: Surfaces
    span: Surfaces

    def __call__(self, pixels: NDArray[np.float32], crop_px: int, corner: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
        """Scale grey levels.

        Args:
            pixels: (…, channels, height, width), any window of the field.
            crop_px: side of the centre crop.
            corner: row and column of the window's first pixel, counted from the centre crop's.
        """
        low, span = (_on_pixels(surfaces, pixels.shape[-2:], crop_px, corner) for surfaces in (self.low, self.span))
        least = np.float32(_DARKEST) * np.array([terms[0] for terms in self.span], np.float32)
        scaled: NDArray[np.float32] = (pixels - low) / np.maximum(span, least[:, None, None])
        return scaled

    @cached_property
    def digest(self) -> str:
        """Name the scale: sha256 of its canonical JSON."""
        return json_sha256(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, which name every number exactly."""
        return {"low": self.low, "span": self.span}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BatchScale":
        """Read what ``to_json`` wrote."""
        return cls(*(tuple(tuple(terms) for terms in value[name]) for name in ("low", "span")))

    @classmethod
    def of(cls, low: NDArray[np.float64], span: NDArray[np.float64]) -> "BatchScale":
        """Make a scale of coefficients (channels, terms)."""
        return cls(*(tuple(tuple(map(float, terms)) for terms in surfaces) for surfaces in (low, span)))


def _on_pixels(surfaces: Surfaces, shape: tuple[int, ...], crop_px: int, corner: tuple[int, int]) -> NDArray[np.float32]:
    """Values of surfaces at pixel centres: (channels, height, width), or (channels, 1, 1) where they are flat.

    A pixel's value does not depend on the window that it is asked for with.
    """
    terms = np.array(surfaces)
    if terms.shape[1] == 1:
        return terms[:, :, None].astype(np.float32)
    y, x = (2 * (start + np.arange(extent) + 0.5) / crop_px - 1 for start, extent in zip(corner, shape, strict=True))
    rows = terms[:, :1] + terms[:, 1:2] * y + terms[:, 3:4] * (y**2 - 1 / 3)
    columns = terms[:, 2:3] * x + terms[:, 5:6] * (x**2 - 1 / 3)
    leaning = (terms[:, 4:5] * y).astype(np.float32)[:, :, None] * x.astype(np.float32)
    values: NDArray[np.float32] = rows.astype(np.float32)[:, :, None] + columns.astype(np.float32)[:, None, :] + leaning
    return values


# --- illumination ----------------------------------------------------------------------------------------------------


def field_surfaces(plane: NDArray[np.float32], crop_px: int) -> NDArray[np.float64]:
    """Fit surfaces to the floor of a whole plane, and to how far its mean lies above it: (2, terms).

    Both are taken in 16 x 16 blocks of the largest centred square (fewer of a small one): the 10th percentile, and the mean.
    An offset moves the floor alone, a gain multiplies both.
    """
    side = min(plane.shape)
    number = max(1, min(_BLOCKS, side // _LEAST_BLOCK_PX))
    edge = side // number
    top, left = ((extent - side) // 2 + (side - number * edge) // 2 for extent in plane.shape)
    square = plane[top : top + number * edge, left : left + number * edge]
    blocks = square.reshape(number, edge, number, edge).swapaxes(1, 2).reshape(number, number, edge * edge)
    at = edge * edge * _FLOOR_PERCENTILE // 100
    floor = np.partition(blocks, at, axis=-1)[..., at].astype(np.float64)
    light = blocks.mean(axis=-1, dtype=np.float64) - floor
    return np.stack([_fitted(values, number * edge / crop_px) for values in (floor, light)])


def _fitted(values: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """Least squares of the terms on a centred square of blocks that reaches to ``reach`` crop halves from its middle.

    On such a square the terms about its own means are orthogonal, so that every coefficient is a ratio of sums.
    """
    number = len(values)
    place = reach * ((2 * np.arange(number) + 1) / number - 1)
    middle = float(np.mean(place**2))
    one, bow = np.ones(number), place**2 - middle
    pairs = ((one, one), (place, one), (one, place), (bow, one), (place, place), (one, bow))
    found = [_ratio(np.sum(values * np.outer(y, x)), np.sum(np.outer(y, x) ** 2)) for y, x in pairs]
    found[0] += (found[3] + found[5]) * (1 / 3 - middle)
    return np.array(found)


def _ratio(over: float, under: float) -> float:
    return float(over / under) if under > 0 else 0.0


def common_surfaces(fields: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return what sites' surfaces (…, terms) have in common: their mean, shrunk to flat by what they disagree.

    Every term but the first is multiplied by 1 - (its standard error / itself)², at least 0. One site alone shows no
    illumination: what is bright in it may be a cell. The order of the sites does not matter.
    """
    ordered = np.sort(np.stack(fields), axis=0)
    common: NDArray[np.float64] = ordered.mean(axis=0)
    certain = np.zeros_like(common)
    if len(ordered) > 1:
        error = ordered.var(axis=0, ddof=1) / len(ordered)
        certain = np.maximum(1 - error / np.maximum(common**2, np.finfo(np.float64).tiny), 0)
    certain[..., 0] = 1
    common *= certain
    return common
