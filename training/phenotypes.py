"""Simulated cells: what a compound does to their shape, and how five stains show them.

A phenotype moves cells along axes of shape and texture that labs and batches move as well; it never multiplies a
stain. Knows nothing about microscopes, files or plates; lengths are µm until a scene is painted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from training.optics import Conditions, Planes

Floats = NDArray[np.float64]

CLASSES = (
    "antimitotic", "cytostatic", "chromatin_condensed", "chromatin_coarse",
    "mito_fragmented", "mito_perinuclear", "actin_edge", "er_granular",
)  # fmt: skip
FIELD_UM = 160.0  # side of the field that `density` counts cells in
CELL_RADIUS_UM = 20.0
NUCLEUS_RADIUS_UM = 7.6
MITOTIC_SHARE = 0.025
# Mean counts where a stain is, at gain 1: a JUMP pilot field has nuclei near 10,000 in DNA, medians of 8,000 in RNA and
# 4,600 in AGP; most planes of a second real field are several times dimmer. The middle leaves room for both.
AMPLITUDE = (4500.0, 2600.0, 3000.0, 2200.0, 2400.0)
ANGLES = 256
REACH_PX = 128  # no outline reaches further from its centre
BANK_PX = 640
BANK_SEED = 20_240


@dataclass(frozen=True)
class Phenotype:
    """What a compound does to a cell that responds fully; all zero is an untreated cell.

    `count` multiplies the cells of a well. The `*_area` are natural-log factors, `elongation` the log of the axes'
    ratio, `lobes` the expected number of further nuclear lobes, `roughness` the relative unevenness of the nuclear
    outline. The others move a share of the stain (0 to 1) towards 1, from where the lab and batch left it.
    """

    count: float = 1.0
    cell_area: float = 0.0
    nucleus_area: float = 0.0
    elongation: float = 0.0
    lobes: float = 0.0
    roughness: float = 0.0
    chromatin_blotch: float = 0.0
    mito_puncta: float = 0.0
    mito_collapse: float = 0.0
    actin_edge: float = 0.0
    er_granules: float = 0.0
    nucleolus_loss: float = 0.0


UNTREATED = Phenotype()
PHENOTYPES: Mapping[str, Phenotype] = MappingProxyType(
    {
        "antimitotic": Phenotype(count=0.82, lobes=0.85, nucleus_area=0.27, cell_area=0.10),
        "cytostatic": Phenotype(count=0.70, cell_area=0.46, nucleus_area=0.08),
        "chromatin_condensed": Phenotype(nucleus_area=-0.36, roughness=0.08),
        "chromatin_coarse": Phenotype(nucleus_area=0.18, chromatin_blotch=0.26),
        "mito_fragmented": Phenotype(mito_puncta=0.48),
        "mito_perinuclear": Phenotype(mito_collapse=0.43),
        "actin_edge": Phenotype(actin_edge=0.26),
        "er_granular": Phenotype(er_granules=0.28),
        "inactive": UNTREATED,
        "DMSO": UNTREATED,
        "novel": Phenotype(elongation=1.3, nucleolus_loss=0.95),
    }
)
PENETRANCE = 0.85  # share of cells that respond at all
SHARES = ("chromatin_blotch", "mito_puncta", "mito_collapse", "actin_edge", "er_granules")


@dataclass(frozen=True)
class Cells:
    """The cells of one scene, each array (cells,) unless said otherwise; positions in pixels, lengths in µm.

    `stain` (5, cells) is each stain's mean amount, `shares` holds `SHARES` per cell, `cycle` is the DNA content,
    1 in G1 to 2 in G2.
    """

    y: Floats
    x: Floats
    radius: Floats
    elongation: Floats
    angle: Floats
    nucleus: Floats
    roughness: Floats
    lobes: NDArray[np.int64]
    cycle: Floats
    mitotic: NDArray[np.bool_]
    nucleoli: Floats
    stain: Floats
    shares: Mapping[str, Floats]


def draw_cells(phenotype: Phenotype, potency: float, scene_px: int, at: Conditions, rng: np.random.Generator) -> Cells:
    """The cells that show in a scene of scene_px by scene_px, some centred outside it."""
    side = scene_px * at.pixel_um + 2 * CELL_RADIUS_UM
    count = 1.0 + (phenotype.count - 1.0) * min(potency, 1.2)
    n = max(int(rng.poisson(at.density * count * (side / FIELD_UM) ** 2)), 1)
    position = _spread_out(rng.uniform(0.0, side, (n, 2)), rng) - CELL_RADIUS_UM
    strength = potency * rng.beta(5.0, 2.0, n) * (rng.random(n) < PENETRANCE)
    mitotic = rng.random(n) < MITOTIC_SHARE
    cycle = np.where(mitotic, 2.0, 1.0 + rng.beta(0.6, 1.2, n))
    radius = CELL_RADIUS_UM * at.cell_size * np.exp(rng.normal(0.0, 0.14, n) + strength * phenotype.cell_area / 2)
    radius *= np.where(mitotic, 0.55, 1.0) * (cycle / 1.3) ** 0.25
    nucleus = NUCLEUS_RADIUS_UM * at.nucleus_size * np.exp(rng.normal(0.0, 0.06, n))
    nucleus *= np.where(mitotic, 0.8, (cycle / 1.3) ** (1 / 3)) * np.exp(strength * phenotype.nucleus_area / 2)
    return Cells(
        y=position[:, 0] / at.pixel_um,
        x=position[:, 1] / at.pixel_um,
        radius=radius,
        elongation=np.abs(rng.normal(0.25, 0.15, n)) * ~mitotic + strength * phenotype.elongation,
        # Compounds that stretch cells also align them; untreated cells point anywhere.
        angle=rng.uniform(0.0, np.pi, n) * np.exp(-2.0 * strength * phenotype.elongation),
        nucleus=np.minimum(nucleus, 0.72 * radius),
        roughness=0.03 + 0.03 * rng.random(n) + strength * phenotype.roughness,
        lobes=np.where(mitotic, 0, rng.poisson(strength * phenotype.lobes + 0.02)),
        cycle=cycle,
        mitotic=mitotic,
        nucleoli=np.where(mitotic, 0.0, 1.0 - strength * phenotype.nucleolus_loss).clip(0.0),
        stain=_stain(radius, rng),
        shares={name: _share(getattr(at, name), strength * getattr(phenotype, name), rng) for name in SHARES},
    )


def _stain(radius: Floats, rng: np.random.Generator) -> Floats:
    """(5, cells) relative stain: a spread larger cell is thinner, and each organelle has its own abundance."""
    n = len(radius)
    abundance = np.exp(rng.normal(0.0, 0.12, n) + rng.normal(0.0, 0.12, (5, n)))
    abundance[0] = 1.0  # DNA follows the cell cycle alone
    abundance[1:] *= (CELL_RADIUS_UM / radius).clip(0.6, 1.7)
    return np.asarray(abundance)


def _share(baseline: float, moved: Floats, rng: np.random.Generator) -> Floats:
    """(cells,) shares in 0…1: the baseline varied by cell, and the rest of the way to 1 times `moved`."""
    own = (baseline * np.exp(rng.normal(0.0, 0.45, moved.shape))).clip(0.0, 0.6)
    return np.asarray(own + (1.0 - own) * moved.clip(0.0, 1.0))


def _spread_out(position: Floats, rng: np.random.Generator) -> Floats:
    """Positions (cells, 2) in µm after a few steps of mutual repulsion, as adherent cells keep apart."""
    for _ in range(6):
        apart = position[:, None] - position[None]
        distance = np.sqrt((apart**2).sum(-1)) + np.eye(len(position)) * 1e3 + 1e-6
        push = np.maximum(30.0 - distance, 0.0) / distance * 0.3
        position = position + (apart * push[..., None]).sum(1)
    return position + rng.normal(0.0, 1.5, position.shape)


@dataclass(frozen=True)
class Textures:
    """Noise planes (BANK_PX, BANK_PX) at one pixel size, each a kind of structure.

    `grain` and `blotch` have mean 0 and variance 1; the others are positive with mean 1.
    """

    grain: Planes
    blotch: Planes
    network: Planes
    puncta: Planes
    granules: Planes
    reticulum: Planes
    fibres: Planes


@lru_cache(maxsize=8)
def textures(pixel_um: float) -> Textures:
    """The textures for a pixel size in µm: the same in every process, and in no way part of the seed."""
    rng = np.random.default_rng(BANK_SEED)

    def noise(y_um: float, x_um: float) -> Planes:
        fy, fx = fft.fftfreq(BANK_PX, pixel_um)[:, None], fft.rfftfreq(BANK_PX, pixel_um)[None, :]
        transfer = np.exp(-2 * np.pi**2 * ((fy * y_um) ** 2 + (fx * x_um) ** 2))
        plane = fft.irfft2(fft.rfft2(rng.standard_normal((BANK_PX, BANK_PX))) * transfer, s=(BANK_PX, BANK_PX))
        return np.asarray((plane - plane.mean()) / plane.std(), np.float32)

    def unit(plane: Planes) -> Planes:
        return np.asarray(plane / plane.mean(), np.float32)

    # The zero lines of a smooth random field are curves that branch and close: a network.
    return Textures(
        grain=noise(0.5, 0.5),
        blotch=noise(1.5, 1.5),
        network=unit(np.exp(-((noise(1.1, 1.1) / 0.30) ** 2)) * np.exp(0.4 * noise(0.8, 0.8)) + 0.20),
        puncta=unit(np.maximum(noise(1.1, 1.1) - 0.9, 0.0) ** 0.7 + 0.05),
        granules=unit(np.maximum(noise(1.5, 1.5) - 0.6, 0.0) + 0.06),
        reticulum=unit(1.0 + 0.35 * np.exp(-((noise(1.0, 1.0) / 0.4) ** 2)) + 0.12 * noise(2.0, 2.0).clip(-2, 2)),
        fibres=unit(np.exp(0.45 * noise(0.45, 3.0))),
    )


@dataclass(frozen=True)
class Territory:
    """Which cell owns each pixel, all (height, width); the last index, one past the cells, is the bare well.

    `rho` runs from 0 at the nucleus's centre to 1 at the cell's outline, `edge` is the distance to the outline in
    µm, `nucleus` runs from 0 to 1 inside nuclei, `nucleoli` likewise.
    """

    owner: NDArray[np.intp]
    rho: Planes
    edge: Planes
    nucleus: Planes
    nucleoli: Planes


_AXIS = np.arange(-REACH_PX, REACH_PX + 1, dtype=np.float32)
_RADIUS = np.hypot(_AXIS[:, None], _AXIS[None, :])
_ANGLE = np.rint(np.arctan2(_AXIS[:, None], _AXIS[None, :]) * (ANGLES / (2 * np.pi))).astype(np.intp) % ANGLES
_THETA = np.arange(ANGLES) * (2 * np.pi / ANGLES)

Window = tuple[slice, slice]


def _windows(y: float, x: float, reach: float, shape: tuple[int, int]) -> tuple[Window, Window] | None:
    """The window of a plane within `reach` pixels of (y, x), and the same window of the polar grids."""
    cy, cx, r = round(y), round(x), min(int(reach) + 1, REACH_PX)
    y0, y1, x0, x1 = max(cy - r, 0), min(cy + r + 1, shape[0]), max(cx - r, 0), min(cx + r + 1, shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    oy, ox = REACH_PX - cy, REACH_PX - cx
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 + oy, y1 + oy), slice(x0 + ox, x1 + ox))


def _outlines(
    radius: Floats, elongation: Floats, angle: Floats, rough: Floats, orders: range, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(outlines, ANGLES) radii: ellipses of constant area, uneven by a few harmonics of amplitude `rough`."""
    turned = _THETA[None] - angle[:, None]
    ratio = np.exp(elongation)[:, None]
    ellipse = radius[:, None] / np.sqrt(np.cos(turned) ** 2 / ratio + np.sin(turned) ** 2 * ratio)
    k = np.asarray(orders)
    phase = rng.uniform(0, 2 * np.pi, (len(radius), len(k)))
    amplitude = rough[:, None] * rng.standard_normal((len(radius), len(k))) / k**0.8
    waves = (amplitude[..., None] * np.cos(k[:, None] * _THETA + phase[..., None])).sum(1)
    return np.asarray(ellipse * np.exp(waves.clip(-0.6, 0.45)), np.float32)


def _claim(cells: Cells, shape: tuple[int, int], at: Conditions, rng: np.random.Generator) -> Territory:
    n = len(cells.y)
    owner = np.full(shape, n, np.intp)
    rho, second = np.ones(shape, np.float32), np.ones(shape, np.float32)
    rough = np.where(cells.mitotic, 0.04, 0.22)
    radii = _outlines(cells.radius / at.pixel_um, cells.elongation, cells.angle, rough, range(1, 7), rng)
    for i in range(n):
        at_plane = _windows(cells.y[i], cells.x[i], float(radii[i].max()), shape)
        if at_plane is not None:
            window, polar = at_plane
            mine = _RADIUS[polar] * (1.0 / radii[i])[_ANGLE[polar]]
            best = rho[window]
            np.minimum(second[window], np.maximum(mine, best), out=second[window])
            np.copyto(owner[window], i, where=mine < best)
            np.minimum(best, mine, out=best)
    edge = (second - rho) * np.append(cells.radius, 0.0).astype(np.float32)[owner]
    nucleus, nucleoli = _place_nuclei(cells, owner, at, rng)
    np.maximum(edge, 2.5 * nucleus, out=edge)  # a nucleus that touches a neighbour stays covered
    return Territory(owner, rho, edge, nucleus, nucleoli)


def _place_nuclei(cells: Cells, owner: NDArray[np.intp], at: Conditions, rng: np.random.Generator) -> tuple[Planes, Planes]:
    """The nuclei (height, width) and their nucleoli; takes over `owner` where a nucleus lies."""
    shape = (owner.shape[0], owner.shape[1])
    nucleus, nucleoli = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    who, y, x, radius = _lobes(cells, at, rng)
    stretched = np.where(cells.mitotic, 1.0, 0.18 + 0.25 * cells.elongation)[who]
    radii = _outlines(radius, stretched, cells.angle[who], cells.roughness[who], range(2, 7), rng)
    spots = rng.uniform((0.12, 0.0, 0.16), (0.55, 2 * np.pi, 0.30), (len(who), 3, 3))  # distance, angle, radius
    for j, i in enumerate(who):
        windows = _windows(y[j], x[j], float(radii[j].max()), shape)
        if windows is None:
            continue
        window, polar = windows
        inside = ((1.0 - _RADIUS[polar] * (1.0 / radii[j])[_ANGLE[polar]]) * 5.0).clip(0.0, 1.0)
        np.copyto(owner[window], i, where=inside > 0)
        np.maximum(nucleus[window], inside, out=nucleus[window])
        if cells.nucleoli[i] > 0:
            for away, angle, size in spots[j, : 2 + (j % 2)] * (radius[j], 1.0, radius[j]):
                _dot(nucleoli, y[j] + away * np.sin(angle), x[j] + away * np.cos(angle), size, cells.nucleoli[i])
    return nucleus, nucleoli


def _dot(plane: Planes, y: float, x: float, radius: float, height: float) -> None:
    windows = _windows(y, x, 1.6 * radius, (plane.shape[0], plane.shape[1]))
    if windows is not None:
        window, polar = windows
        dot = np.exp(-((_RADIUS[polar] * np.float32(1 / radius)) ** 4)) * np.float32(height)
        np.maximum(plane[window], dot, out=plane[window])


def _lobes(cells: Cells, at: Conditions, rng: np.random.Generator) -> tuple[NDArray[np.intp], Floats, Floats, Floats]:
    """Owner, y, x and radius in pixels of every nuclear body: one per cell, and smaller ones beside it."""
    who = np.repeat(np.arange(len(cells.y)), 1 + cells.lobes)
    several = (cells.lobes > 0)[who]
    shrink = 1.0 / np.sqrt(1.0 + 0.55 * cells.lobes[who])  # lobes overlap, so areas add to more than one nucleus
    radius = cells.nucleus[who] / at.pixel_um * shrink * np.exp(rng.normal(0.0, 0.12, len(who)) * several)
    first = np.r_[True, who[1:] != who[:-1]]
    angle = rng.uniform(0, 2 * np.pi, len(who))
    away = np.where(several, 1.0 * radius * np.where(first, 0.7, 1.15), 0.0)
    return who, cells.y[who] + away * np.sin(angle), cells.x[who] + away * np.cos(angle), radius


def paint(cells: Cells, scene_px: int, at: Conditions, rng: np.random.Generator) -> Planes:
    """The stains of a scene as (5, scene_px, scene_px) counts at gain 1: no blur, background or noise yet."""
    land = _claim(cells, (scene_px, scene_px), at, rng)
    return _Painter(cells, land, at, rng).scene()


class _Painter:
    """Paints whole planes at once: per-cell numbers are gathered by owner, textures are windows of the bank."""

    def __init__(self, cells: Cells, land: Territory, at: Conditions, rng: np.random.Generator) -> None:
        self.cells, self.land, self.at, self.rng = cells, land, at, rng
        self.bank = textures(at.pixel_um)
        self.covered = land.owner < len(cells.y)
        self.area = np.bincount(land.owner.ravel(), minlength=len(cells.y) + 1)
        self.from_centre = land.rho * self.gather(cells.radius)  # µm
        hump = np.exp(-((self.from_centre / np.float32(11.5)) ** 2))
        self.rim = 1.0 - np.exp(land.edge * np.float32(-1 / 2.5))
        self.body = self.rim * (np.float32(0.25) + hump)

    def gather(self, values: Floats) -> Planes:
        """Per-cell values (cells,) as a plane, 0 on the bare well."""
        return np.append(values, 0.0).astype(np.float32)[self.land.owner]

    def share(self, name: str) -> Planes:
        """One of `SHARES` as a plane."""
        return self.gather(self.cells.shares[name])

    def window(self, bank: Planes) -> Planes:
        """A random window of a texture, randomly mirrored, the size of the scene."""
        size = self.land.owner.shape[0]
        y, x = self.rng.integers(0, BANK_PX - size, 2)
        flip_y, flip_x = self.rng.choice((-1, 1), 2)
        return bank[y : y + size, x : x + size][::flip_y, ::flip_x]

    def spread(self, plane: Planes, channel: int) -> Planes:
        """The plane scaled so that each cell holds its drawn amount, however the phenotype distributes it."""
        total = np.bincount(self.land.owner.ravel(), weights=plane.ravel(), minlength=len(self.area))[:-1]
        scale = self.cells.stain[channel] * AMPLITUDE[channel] * self.area[:-1] / np.maximum(total, 1e-3)
        return np.asarray(plane * self.gather(scale), np.float32)

    def scene(self) -> Planes:
        """All five stains, in the order of `CHANNELS`."""
        return np.stack([self.dna(), self.er(), self.rna(), self.agp(), self.mito()])

    def dna(self) -> Planes:
        """Chromatin: the drawn DNA content over the nuclear area, plus stain stuck in the cytoplasm."""
        typical = NUCLEUS_RADIUS_UM * self.at.nucleus_size
        content = self.cells.cycle / 1.3 * (typical / self.cells.nucleus) ** 2 * AMPLITUDE[0]
        chromatin = 1.0 + np.float32(0.10) * self.window(self.bank.grain)
        chromatin += self.share("chromatin_blotch") * self.window(self.bank.blotch) * np.float32(0.75)
        stuck = self.body * np.float32(self.at.dna_in_cytoplasm * AMPLITUDE[0])
        return np.asarray(self.gather(content) * self.land.nucleus * chromatin.clip(0.1) + stuck, np.float32)

    def er(self) -> Planes:
        """Endoplasmic reticulum: fine and reticular, or gathered in coarse granules."""
        granular = self.share("er_granules")
        texture = (1 - granular) * self.window(self.bank.reticulum) + granular * self.window(self.bank.granules)
        return self.spread(self.body * texture * self.dim_nucleus(self.at.er_in_nucleus), 1)

    def rna(self) -> Planes:
        """Cytoplasmic RNA, a dimmer nucleoplasm and bright nucleoli."""
        texture = 1.0 + np.float32(0.10) * self.window(self.bank.grain)
        plane = self.body * texture * self.dim_nucleus(self.at.rna_in_nucleus)
        return self.spread(plane + np.float32(1.3) * self.land.nucleoli * self.land.nucleus, 2)

    def agp(self) -> Planes:
        """Actin along the outline and in fibres, the Golgi beside the nucleus, membrane everywhere."""
        ring = np.exp(-((self.land.edge * np.float32(1 / 1.6)) ** 2)) * self.covered
        ruffled = ring * (0.5 + 0.5 * self.window(self.bank.granules).clip(0.0, 3.0))
        along = self.gather(np.cos(self.cells.angle) ** 2)
        fibres = along * self.window(self.bank.fibres) + (1 - along) * self.window(self.bank.fibres.T)
        inner = self.body * (0.5 + 0.3 * fibres) + 1.2 * self.golgi() * self.window(self.bank.puncta).clip(0.2, 5.0)
        edged = self.share("actin_edge")
        return self.spread(inner * (1 - 0.8 * edged) + ruffled * (0.15 + 3.2 * edged), 3)

    def golgi(self) -> Planes:
        """A cap on one side of each nucleus."""
        plane = np.zeros_like(self.land.rho)
        angle = self.rng.uniform(0, 2 * np.pi, len(self.cells.y))
        away = (self.cells.nucleus + 1.0) / self.at.pixel_um
        y, x = self.cells.y + away * np.sin(angle), self.cells.x + away * np.cos(angle)
        for i in np.flatnonzero(~self.cells.mitotic):
            _dot(plane, y[i], x[i], 4.5 / self.at.pixel_um, 1.0)
        return np.asarray(plane * self.rim * (1 - self.land.nucleus), np.float32)

    def mito(self) -> Planes:
        """Mitochondria: a network or puncta, over the cell or drawn in around the nucleus."""
        fragmented, collapsed = self.share("mito_puncta"), self.share("mito_collapse")
        texture = (1 - fragmented) * self.window(self.bank.network) + fragmented * self.window(self.bank.puncta)
        beyond = self.from_centre - self.gather(self.cells.nucleus)  # µm outside the nucleus
        wide = np.exp(-((beyond * np.float32(1 / 13.0)) ** 2))
        tight = np.exp(-((beyond * np.float32(1 / 3.5)) ** 2)) * np.float32(4.0)
        where = self.rim * ((1 - collapsed) * wide + collapsed * tight)
        return self.spread(where * (texture + np.float32(0.08)) * self.dim_nucleus(0.15), 4)

    def dim_nucleus(self, ratio: float) -> Planes:
        """1 in the cytoplasm, `ratio` in the nucleus; a cell in mitosis has no envelope to keep a stain out."""
        kept = np.where(self.cells.mitotic, 0.0, 1.0 - ratio)
        return np.asarray(1.0 - self.gather(kept) * self.land.nucleus, np.float32)
