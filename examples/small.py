"""The small network that the demo and the first-light comparison train on simulated plates, and how those are made.

Chosen on validation batches of simulation seed 101 alone; no reported figure comes from that seed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from model.images import ImageRecipe
from training.episodes import EpisodeShape
from training.fetch import FetchOptions, fetch
from training.index import index_tree
from training.simulate import CHANNELS, CLASSES, SimulationPlan, simulate
from training.train import TrainingConfig

NETWORK_PIXEL_SIZE_UM = 1.196
RECIPE = ImageRecipe(channels=CHANNELS, size=128, pixel_size_um=NETWORK_PIXEL_SIZE_UM)
"""How the plates are fetched."""


def small_config(
    plates: Path, method: str, *, steps: int, seed: int, context: str = "controls", test_lab: str | None = None
) -> TrainingConfig:
    """Configure an anti-aliased ResNet-18 a quarter as wide as the usual one, on 128 x 128 pixels of 1.196 µm."""
    return TrainingConfig(
        plates=str(plates),
        method=method,
        context=context,
        test_lab=test_lab,
        classes=CLASSES,
        depth=18,
        width=16,
        antialiased=True,
        size=RECIPE.size,
        crop=96,
        shape=EpisodeShape(treated=24, controls_min=8, controls_max=32, plates=4),
        steps=steps,
        validate_every=50,
        patience=20,
        learning_rate=2e-3,
        schedule="cosine",
        seed=seed,
    )


def fetched_plates(plan: SimulationPlan, data: Path, folders: Mapping[Path, ImageRecipe], workers: int = 2) -> None:
    """Simulate a plan's plates into ``data`` and fetch them into each of ``folders`` by its recipe; what is there stays."""
    if not (data / "simulation.json").is_file():
        shutil.rmtree(data, ignore_errors=True)
        simulate(plan, data, workers=workers)
    index = index_tree(data, CHANNELS)
    for folder, recipe in folders.items():
        fetch(index, folder, recipe, FetchOptions(workers))
