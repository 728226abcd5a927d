"""Episodes: what one step of meta-training sees of one plate, drawn from the step's number alone.

An episode is K control and L treated images of one plate; where a panel is asked for, images of the plate's panel wells
come between them, and those wells are never among the treated, which carry the loss. Methods without a context get the
same number of images, all treated, so that every method passes equally many through the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from model.errors import LayoutError
from model.images import ImageRecipe
from training.dataset import PlateSites


@dataclass(frozen=True)
class EpisodeShape:
    """How much of a plate a step draws: L treated, K controls from a range (K-jitter), of D plates.

    ``panel`` images are drawn of the plate's panel, which is ``panel_wells`` wells of every class; a method without a panel
    draws as many more treated ones.
    """

    treated: int = 64
    controls_min: int = 8
    controls_max: int = 128
    plates: int = 8
    panel: int = 0
    panel_wells: int = 1

    @property
    def rows(self) -> int:
        """Images of one plate in one step, on average."""
        return self.treated + self.panel + (self.controls_min + self.controls_max) // 2


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


class Episodes(Dataset[list[Episode]]):
    """Steps ``first`` … ``first + steps``; item i is the list of D episodes of step ``first + i``, always the same.

    ``panels`` are the panel's rows of every plate, in the order of ``plates``; none for a method without a panel.

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
    ) -> None:
        self.plates = list(plates)
        self.panels = list(panels) or [np.zeros(0, np.int64)] * len(self.plates)
        self.treated = [_beside(plate, panel) for plate, panel in zip(self.plates, self.panels, strict=True)]
        self.recipes = [plate.zscore_recipe(recipe) if zscore else recipe for plate in self.plates]
        self.shape = shape
        self.crop = crop
        self.seed = seed
        self.first = first
        self.steps = steps
        self.with_controls = with_controls

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, item: int) -> list[Episode]:
        rng = np.random.default_rng([self.seed, self.first + item])
        controls = int(rng.integers(self.shape.controls_min, self.shape.controls_max + 1))
        chosen = rng.choice(len(self.plates), self.shape.plates, replace=len(self.plates) < self.shape.plates)
        return [self._episode(int(number), controls, rng) for number in chosen]

    def _episode(self, number: int, controls: int, rng: np.random.Generator) -> Episode:
        plate, recipe = self.plates[number], self.recipes[number]
        context = panel = np.zeros(0, np.int64)
        if self.with_controls:
            more = 0 if len(self.panels[number]) else self.shape.panel
            treated = _draw(self.treated[number], self.shape.treated + more, rng)
            context = _draw_wells(plate, controls, rng)
            panel = _draw_panel(plate, self.panels[number], self.shape.panel, rng)
        else:
            treated = _draw(self.treated[number], self.shape.rows, rng)
        images = plate.augmented(np.concatenate([context, panel, treated]), recipe, self.crop, rng)
        tensor = torch.from_numpy(images).to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        return Episode(tensor, torch.from_numpy(plate.labels[treated]), len(context), len(panel))


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
