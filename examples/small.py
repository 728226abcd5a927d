"""The small network that the demo and the first-light comparison train on simulated plates.

Chosen on validation batches of simulation seed 101 alone; no reported figure comes from that seed.
"""

from pathlib import Path

from model.images import ImageRecipe
from training.episodes import EpisodeShape
from training.simulate import CHANNELS, CLASSES
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
