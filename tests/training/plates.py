"""A plate made up in memory: random images, classes that differ in raw intensity and not in where they lie."""

import numpy as np

from model.images import ImageRecipe
from training.dataset import NO_LABEL, PlateSites


def made_up_plate(
    name: str, *, seed: int = 0, classes: int = 2, sites: int = 1, controls: int = 8, size: int = 64
) -> PlateSites:
    """48 wells: ``controls`` of them negative controls, the others of ``classes`` classes in turn, in random places."""
    rng = np.random.default_rng(seed)
    wells = rng.permutation([f"{row}{column:02d}" for row in "ABCDEFGH" for column in range(1, 7)])
    numbers = np.where(np.arange(48) < controls, NO_LABEL, np.arange(48) % classes)
    labels = np.repeat(numbers, sites)
    intensities = rng.normal(100, 1, size=(48 * sites, 2, 2)) + 20 * np.maximum(labels, 0)[:, None, None]
    return PlateSites(
        plate=name,
        lab="L",
        batch=f"batch of {name}",
        wells=np.repeat(wells, sites),
        names=np.where(labels == NO_LABEL, "control", labels.astype(str)),
        labels=labels,
        controls=labels == NO_LABEL,
        images=rng.integers(0, 255, size=(48 * sites, 2, size, size), dtype=np.uint8),
        intensities=intensities.astype(np.float32),
        recipe=ImageRecipe(channels=("A", "B"), size=size),
    )
