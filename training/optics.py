"""What a lab, a batch, a plate and a well do to an image: the ranges they are drawn from, and the camera.

Knows nothing about cells or phenotypes. Every range states its spread per level; `docs/simulator.md` holds the same
table with the reasons.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")
LEVELS = ("lab", "batch", "plate", "well")
# Pixel sizes of the microscopes in JUMP's microscope_config.csv, one entry per Metadata_Source, so that a draw
# follows how common each instrument is there.
PIXEL_SIZES_UM = (
    0.597976, 0.65, 0.597976, 0.597976, 0.64974, 0.646187, 0.65, 0.7032, 0.597976, 0.6516944, 0.597976, 0.65, 0.597976,
)  # fmt: skip
# Light from above and below the focal plane; a widefield microscope gathers it, a confocal one mostly does not.
HAZE_SIGMA_UM = 7.0
SATURATION = 65535
WORST_BLUR_UM = 1.6  # phenotypes are checked to stay visible up to here

Planes = NDArray[np.float32]


@dataclass(frozen=True)
class Range:
    """Where one parameter is drawn from: a centre, a standard deviation per level, hard limits.

    `spread` holds (lab, batch, plate, well). A `log` range spreads in natural-log units, so 0.4 is a factor of 1.5
    for one standard deviation; others spread in the parameter's own unit. `per_channel` draws five values.
    """

    centre: float
    spread: tuple[float, float, float, float]
    low: float
    high: float
    per_channel: bool = False
    log: bool = True

    @property
    def width(self) -> int:
        """The number of values drawn: five with `per_channel`, else one."""
        return len(CHANNELS) if self.per_channel else 1

    def value(self, deviates: NDArray[np.float64]) -> NDArray[np.float64]:
        """The parameter from standard deviates (levels so far, width), summed over nested levels, then clipped."""
        shift = np.asarray(self.spread[: len(deviates)]) @ deviates
        value = self.centre * np.exp(shift) if self.log else self.centre + shift
        return np.asarray(np.clip(value, self.low, self.high))


def _drawn(centre: float, spread: tuple[float, float, float, float], low: float, high: float, **kind: bool) -> Any:
    return field(metadata={"range": Range(centre, spread, low, high, **kind)})


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything but the compound that shapes the images of one well, each with the range it is drawn from.

    `density` is cells per 160 by 160 µm, `*_um` are µm, `background` and `read_noise` counts, `camera_gain` counts
    per photoelectron; five-tuples follow `CHANNELS`. A lab, a batch or a plate has conditions too: those of a well
    at which all deeper levels drew zero.
    """

    pixel_um: float
    # Staining: relative signal, counts of background, shares of stray signal.
    gain: tuple[float, ...] = _drawn(1.0, (0.40, 0.15, 0.08, 0.06), 0.25, 3.5, per_channel=True)
    background: tuple[float, ...] = _drawn(280.0, (0.45, 0.15, 0.08, 0.05), 100.0, 1500.0, per_channel=True)
    er_into_rna: float = _drawn(0.12, (0.50, 0.10, 0.05, 0.0), 0.02, 0.40)
    rna_into_er: float = _drawn(0.10, (0.50, 0.10, 0.05, 0.0), 0.02, 0.40)
    rna_into_agp: float = _drawn(0.15, (0.50, 0.10, 0.05, 0.0), 0.02, 0.45)
    dna_in_cytoplasm: float = _drawn(0.04, (0.40, 0.20, 0.10, 0.05), 0.01, 0.15)
    er_in_nucleus: float = _drawn(0.30, (0.25, 0.10, 0.05, 0.03), 0.10, 0.60)
    rna_in_nucleus: float = _drawn(0.60, (0.20, 0.10, 0.05, 0.03), 0.30, 1.00)
    # Microscope.
    focus_um: float = _drawn(0.75, (0.28, 0.14, 0.10, 0.07), 0.40, 1.60)
    channel_focus: tuple[float, ...] = _drawn(1.0, (0.12, 0.04, 0.04, 0.03), 0.80, 1.30, per_channel=True)
    haze: float = _drawn(0.15, (0.45, 0.10, 0.05, 0.05), 0.03, 0.40)
    vignetting: float = _drawn(0.18, (0.50, 0.05, 0.05, 0.0), 0.02, 0.45)
    vignetting_x: float = _drawn(0.0, (0.30, 0.05, 0.03, 0.0), -0.7, 0.7, log=False)
    vignetting_y: float = _drawn(0.0, (0.30, 0.05, 0.03, 0.0), -0.7, 0.7, log=False)
    camera_gain: float = _drawn(0.7, (0.40, 0.0, 0.0, 0.0), 0.2, 2.5)
    read_noise: float = _drawn(6.0, (0.30, 0.0, 0.0, 0.0), 2.0, 20.0)
    # Cells, before any compound: the axes that phenotypes move as well.
    density: float = _drawn(18.0, (0.22, 0.12, 0.07, 0.08), 10.8, 27.0)
    cell_size: float = _drawn(1.0, (0.08, 0.06, 0.02, 0.02), 0.80, 1.25)
    nucleus_size: float = _drawn(1.0, (0.05, 0.03, 0.01, 0.01), 0.88, 1.14)
    chromatin_blotch: float = _drawn(0.15, (0.30, 0.15, 0.08, 0.06), 0.05, 0.35)
    mito_puncta: float = _drawn(0.15, (0.40, 0.22, 0.10, 0.10), 0.04, 0.45)
    mito_collapse: float = _drawn(0.15, (0.40, 0.22, 0.10, 0.10), 0.04, 0.45)
    actin_edge: float = _drawn(0.15, (0.40, 0.22, 0.10, 0.10), 0.04, 0.45)
    er_granules: float = _drawn(0.15, (0.40, 0.22, 0.10, 0.10), 0.04, 0.45)
    # Outer ring of wells, relative to the wells inside it.
    edge_density: float = _drawn(0.94, (0.04, 0.02, 0.02, 0.0), 0.80, 1.08)
    edge_gain: float = _drawn(1.04, (0.04, 0.02, 0.02, 0.0), 0.90, 1.20)

    @property
    def blur_um(self) -> tuple[float, ...]:
        """The Gaussian sigma of each channel's point spread, in µm."""
        return tuple(min(max(self.focus_um * factor, 0.40), WORST_BLUR_UM) for factor in self.channel_focus)


RANGES: Mapping[str, Range] = MappingProxyType(
    {f.name: f.metadata["range"] for f in fields(Conditions) if "range" in f.metadata}
)
DEVIATES = sum(limits.width for limits in RANGES.values())


def draw_pixel_um(rng: np.random.Generator) -> float:
    """One microscope's pixel size in µm, from those of JUMP's labs."""
    return float(rng.choice(PIXEL_SIZES_UM))


def conditions(deviates: NDArray[np.float64], pixel_um: float) -> Conditions:
    """The conditions that standard deviates (1 to 4 levels, DEVIATES) stand for, lab first."""
    values: dict[str, Any] = {}
    start = 0
    for name, limits in RANGES.items():
        value = limits.value(deviates[:, start : start + limits.width])
        values[name] = tuple(map(float, value)) if limits.per_channel else float(value[0])
        start += limits.width
    return Conditions(pixel_um=pixel_um, **values)


def photograph(scene: Planes, size_px: int, at: Conditions, rng: np.random.Generator) -> NDArray[np.uint16]:
    """The camera's (5, size_px, size_px) image of a scene (5, height, width) at least as large, in counts.

    The scene's margin is cut off after blurring, which keeps the Fourier transform's wrap-around out of the image.
    """
    light = _blur(_bleed(scene, at), at)
    margin = (scene.shape[1] - size_px) // 2
    light = light[:, margin : margin + size_px, margin : margin + size_px]
    light = light * np.asarray(at.gain, np.float32)[:, None, None]
    light = (light + np.asarray(at.background, np.float32)[:, None, None]) * _illumination(size_px, at)
    return _expose(light, at, rng)


def _bleed(scene: Planes, at: Conditions) -> Planes:
    mixed = scene.copy()  # sums by hand: a matrix product would start threads that fight with other workers
    mixed[1] += np.float32(at.rna_into_er) * scene[2]
    mixed[2] += np.float32(at.er_into_rna) * scene[1]
    mixed[3] += np.float32(at.rna_into_agp) * scene[2]
    return mixed


def _blur(scene: Planes, at: Conditions) -> Planes:
    height, width = scene.shape[1:]
    fy = fft.fftfreq(height, at.pixel_um)[:, None]  # cycles per µm
    fx = fft.rfftfreq(width, at.pixel_um)[None, :]
    exponent = (-2.0 * np.pi**2 * (fy**2 + fx**2)).astype(np.float32)
    out = np.empty_like(scene)
    wide = at.haze * np.exp(exponent * np.float32(HAZE_SIGMA_UM**2))
    for channel, sigma in enumerate(at.blur_um):
        transfer = (1 - at.haze) * np.exp(exponent * np.float32(sigma**2)) + wide
        out[channel] = fft.irfft2(fft.rfft2(scene[channel]) * transfer, s=(height, width))
    return out


def _illumination(size_px: int, at: Conditions) -> Planes:
    """(size, size) relative brightness: quadratic fall-off, largest at an off-centre point."""
    axis = np.linspace(-1.0, 1.0, size_px, dtype=np.float32)
    fall = (axis[:, None] - at.vignetting_y) ** 2 + (axis[None, :] - at.vignetting_x) ** 2
    shade: Planes = (1.0 - at.vignetting * np.minimum(fall / 2.0, 1.5)).astype(np.float32)
    return shade


def _expose(light: Planes, at: Conditions, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Counts with shot and read noise; at hundreds of photoelectrons a Gaussian stands in for the Poisson law."""
    np.maximum(light, 0.0, out=light)  # the Fourier blur leaves tiny negative ripples
    noise = rng.standard_normal(light.shape, dtype=np.float32)
    noise *= np.sqrt(light * np.float32(at.camera_gain) + np.float32(at.read_noise**2))
    light += noise
    return np.clip(np.rint(light, out=light), 0, SATURATION).astype(np.uint16)
