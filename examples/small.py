"""The small network that the demo and the first-light comparison train on simulated plates.

Chosen on validation batches of simulation seed 101 alone; no reported figure comes from that seed.
"""

from pathlib import Path

from training.episodes import EpisodeShape
from training.simulate import CLASSES
from training.train import TrainingConfig

NETWORK_PIXEL_SIZE_UM = 1.196


def small_config(
    index: Path, method: str, *, steps: int, seed: int, cache: Path, context: str = "controls", test_lab: str | None = None
) -> TrainingConfig:
    """Configure an anti-aliased ResNet-18 a quarter as wide as the usual one, on 128 x 128 pixels of 1.196 µm."""
    return TrainingConfig(
        index=str(index),
        method=method,
        context=context,
        test_lab=test_lab,
        classes=CLASSES,
        depth=18,
        width=16,
        antialiased=True,
        size=128,
        crop=96,
        pixel_size_um=NETWORK_PIXEL_SIZE_UM,
        shape=EpisodeShape(treated=24, controls_min=8, controls_max=32, plates=4),
        steps=steps,
        validate_every=50,
        patience=20,
        learning_rate=2e-3,
        schedule="cosine",
        seed=seed,
        cache=str(cache),
    )
