"""Episodes: what one step of meta-training sees of one plate, drawn from the step's number alone.

An episode is K control and L treated images of one plate; where a panel is asked for, images of the plate's panel wells
come between them, and those wells are never among the treated, which carry the loss. Methods without a context get the
same number of images, all treated, so that every method passes equally many through the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from model.errors import LayoutError
from model.images import ImageRecipe, normalise
from training.dataset import PlateSites


@dataclass(frozen=True)
class EpisodeShape:
    """How much of a plate a step draws: L treated, K controls from a range (K-jitter), of D plates.

    ``panel`` images are drawn of the plate's panel, which is ``panel_wells`` wells of every class; a method without a panel
    draws as many more treated ones. Raises ValueError where a number is out of range.
    """

    treated: int = 64
    controls_min: int = 8
    controls_max: int = 128
    plates: int = 8
    panel: int = 0
    panel_wells: int = 1

    def __post_init__(self) -> None:
        for name, least in (("treated", 1), ("controls_min", 0), ("plates", 1), ("panel", 0), ("panel_wells", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it is {least} or more")
        if self.controls_max < self.controls_min:
            raise ValueError(
                f"controls_min is {self.controls_min} and controls_max {self.controls_max}: "
                "the fewest are not more than the most"
            )

    @property
    def rows(self) -> int:
        """Images of one plate in one step, on average."""
        return self.treated + self.panel + (self.controls_min + self.controls_max) // 2


@dataclass(frozen=True)
class Share:
    """Which of a step's plates a process takes: those of ``rank`` among ``ranks``, in ``parts`` one after the other."""

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def places(self, plates: int, part: int) -> range:
        """Places, among a step's plates, of one part; ``plates`` is a multiple of ranks times parts."""
        size = plates // (self.ranks * self.parts)
        first = (part * self.ranks + self.rank) * size
        return range(first, first + size)


@dataclass(frozen=True, eq=False)
class Episode:
    """Images (controls + panel + treated, channels, size, size), in this order, and the labels of the treated."""

    images: Tensor
    labels: Tensor
    controls: int
    panel: int = 0

    @property
    def context(self) -> slice:
        """Rows of the controls and the panel."""
        return slice(0, self.controls + self.panel)

    @property
    def treated(self) -> slice:
        """Rows that carry the loss."""
        return slice(self.controls + self.panel, None)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Episode":
        """Return the episode on a device."""
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Episode":
        """Return the episode in memory that a GPU copies from while it computes."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Episodes(Dataset[list[Episode]]):
    """Steps ``first`` … ``first + steps``, of each the plates that are this process's share, in parts.

    A step's D episodes depend on the seed and the step's number alone, however they are shared. Item i is one part's:
    with one part, step ``first + i``. ``panels`` are the panel's rows of every plate, in the order of ``plates``; none
    for a method without a panel.

    Raises:
        LayoutError: a plate whose treated sites are all the panel's.
    """

    def __init__(
        self,
        plates: Sequence[PlateSites],
        recipe: ImageRecipe,
        shape: EpisodeShape,
        *,
        crop: int,
        seed: int,
        first: int,
        steps: int,
        with_controls: bool,
        zscore: bool = False,
        panels: Sequence[NDArray[np.int64]] = (),
        share: Share = Share(),
    ) -> None:
        self.plates = list(plates)
        self.panels = list(panels) or [np.zeros(0, np.int64)] * len(self.plates)
        self.treated = [_beside(plate, panel) for plate, panel in zip(self.plates, self.panels, strict=True)]
        recipes = [plate.zscore_recipe(recipe) if zscore else recipe for plate in self.plates]
        self.inputs = _network_inputs(self.plates, recipes)
        self.shape = shape
        self.crop = crop
        self.seed = seed
        self.first = first
        self.steps = steps
        self.with_controls = with_controls
        self.share = share

    def __len__(self) -> int:
        return self.steps * self.share.parts

    def __getitem__(self, item: int) -> list[Episode]:
        step, part = self.first + item // self.share.parts, item % self.share.parts
        rng = np.random.default_rng([self.seed, step])
        controls = int(rng.integers(self.shape.controls_min, self.shape.controls_max + 1))
        chosen = rng.choice(len(self.plates), self.shape.plates, replace=len(self.plates) < self.shape.plates)
        return [
            self._episode(int(chosen[place]), controls, np.random.default_rng([self.seed, step, 1 + place]))
            for place in self.share.places(self.shape.plates, part)
        ]

    def _episode(self, number: int, controls: int, rng: np.random.Generator) -> Episode:
        plate = self.plates[number]
        context = panel = np.zeros(0, np.int64)
        if self.with_controls:
            more = 0 if len(self.panels[number]) else self.shape.panel
            treated = _draw(self.treated[number], self.shape.treated + more, rng)
            context = _draw_wells(plate, controls, rng)
            panel = _draw_panel(plate, self.panels[number], self.shape.panel, rng)
        else:
            treated = _draw(self.treated[number], self.shape.rows, rng)
        images = _augmented(plate, np.concatenate([context, panel, treated]), self.inputs[number], self.crop, rng)
        return Episode(images, torch.from_numpy(plate.labels[treated]), len(context), len(panel))


# --- pixels ----------------------------------------------------------------------------------------------------------

_Input = Callable[[NDArray[Any], tuple[int, int]], NDArray[np.float32]]
"""A window of stored values (channels, height, width) and its first pixel -> network input (height, width, channels)."""


def _network_inputs(plates: Sequence[PlateSites], recipes: Sequence[ImageRecipe]) -> list[_Input]:
    """Say how each plate's stored values become network input; plates of one scale share their table."""
    shared: dict[tuple[Any, ...], _Input] = {}
    found = []
    for plate, recipe in zip(plates, recipes, strict=True):
        if plate.images.dtype.kind != "u" or plate.recipe.scaled_by_batch:  # a table of 65,536 levels for every plate
            found.append(_by_formula(plate, recipe))
            continue
        key = (recipe, plate.recipe, plate.steps, plate.images.dtype.str)
        if key not in shared:
            shared[key] = _by_table(plate, recipe)
        found.append(shared[key])
    return found


def _by_formula(plate: PlateSites, recipe: ImageRecipe) -> _Input:
    return lambda stored, corner: normalise(plate.scaled(stored, corner), recipe).transpose(1, 2, 0)


def _by_table(plate: PlateSites, recipe: ImageRecipe) -> _Input:
    """Look the formula's value of every stored level up: the same values, a third of the time."""
    dtype, channels = plate.images.dtype, plate.images.shape[1]
    levels = np.iinfo(dtype).max + 1
    stored = np.broadcast_to(np.arange(levels).astype(dtype), (channels, 1, levels))
    table = normalise(plate.scaled(stored), recipe).reshape(-1)
    starts = levels * np.arange(channels)
    return lambda stored, _corner: np.take(table, stored.transpose(1, 2, 0) + starts)


def _augmented(plate: PlateSites, rows: NDArray[np.int64], to_input: _Input, crop: int, rng: np.random.Generator) -> Tensor:
    """Random crops, flips and quarter turns of rows: (rows, channels, crop, crop), channels last in memory.

    Channels last is what convolutions are fastest with; only the pixels of the crops are read.
    """
    count, (height, width) = len(rows), plate.images.shape[-2:]
    tops, lefts = rng.integers(height - crop + 1, size=count), rng.integers(width - crop + 1, size=count)
    turns, flips = rng.integers(4, size=count), rng.random(count) < 0.5  # noqa: PLR2004
    images = np.empty((count, crop, crop, plate.images.shape[1]), np.float32)
    for at, (row, top, left) in enumerate(zip(rows, tops, lefts, strict=True)):
        window = to_input(plate.images[row, :, top : top + crop, left : left + crop], (int(top), int(left)))
        turned = np.rot90(window, int(turns[at]))
        images[at] = turned[:, ::-1] if flips[at] else turned
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- rows ------------------------------------------------------------------------------------------------------------


def _beside(plate: PlateSites, panel: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = np.setdiff1d(plate.treated, panel)
    if not len(rows):
        raise LayoutError(f"plate {plate.plate}: no treated site is left to learn from beside a panel of {len(panel)} sites")
    return rows


def _draw_wells(plate: PlateSites, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw control sites well by well, all of a well's sites before the next: few sites are few wells, as when served."""
    rows = plate.control_rows
    order = {well: place for place, well in enumerate(rng.permutation(np.unique(plate.wells[rows])))}
    by_well = sorted(rng.permutation(rows), key=lambda row: order[plate.wells[row]])
    if count <= len(by_well):
        return np.array(by_well[:count], np.int64)
    return np.concatenate([by_well, rng.choice(rows, count - len(by_well))])


def _draw(rows: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw rows without replacement as long as there are enough."""
    return rng.choice(rows, count, replace=len(rows) < count)


def _draw_panel(plate: PlateSites, rows: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw panel sites evenly over the classes: as even as the whole panel, which is what is served."""
    if not len(rows):
        return rows
    shuffled = rng.permutation(rows)
    labels = plate.labels[shuffled]
    rank = np.array([(labels[:at] == label).sum() for at, label in enumerate(labels)])  # 0 for a class's first, 1, …
    return np.resize(shuffled[np.argsort(rank, kind="stable")], count)
