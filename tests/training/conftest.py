"""Small simulated plates, an index of them, what was fetched by it, and a run trained for a handful of steps."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from model.images import ImageRecipe
from training.dataset import PlateSites
from training.episodes import EpisodeShape
from training.fetch import fetch
from training.index import index_tree
from training.plates import open_plates
from training.simulate import CHANNELS, CLASSES, SimulationPlan, simulate
from training.train import Run, TrainingConfig, train

PLAN = SimulationPlan(labs=2, batches=2, plates=2, seed=3, sites=1, size_px=128, wells_per_class=1, inactive_wells=1)
RECIPE = ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196)


@pytest.fixture(scope="session")
def plates_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plates")
    simulate(PLAN, root)
    return root


@pytest.fixture(scope="session")
def index(plates_root: Path) -> pd.DataFrame:
    return index_tree(plates_root, CHANNELS)


@pytest.fixture(scope="session")
def fetched(index: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fetched")
    fetch(index, folder, RECIPE)
    return folder


@pytest.fixture
def plates(fetched: Path) -> list[PlateSites]:
    return list(open_plates(fetched, CLASSES).values())


@pytest.fixture
def plate(plates: list[PlateSites]) -> PlateSites:
    return plates[0]


@pytest.fixture(scope="session")
def config(fetched: Path) -> TrainingConfig:
    return TrainingConfig(
        plates=str(fetched),
        classes=CLASSES,
        depth=18,
        width=4,
        size=64,
        crop=48,
        shape=EpisodeShape(treated=6, controls_min=2, controls_max=6, plates=2),
        steps=6,
        validate_every=2,
        seed=1,
        accelerator="cpu",
    )


@pytest.fixture(scope="session")
def run(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config, tmp_path_factory.mktemp("runs") / "cs", quiet=True)


@pytest.fixture(scope="session")
def second_run(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same as ``run`` from another seed: another member of an ensemble."""
    return train(replace(config, seed=2), tmp_path_factory.mktemp("runs") / "second", quiet=True)


@pytest.fixture(scope="session")
def erm_run(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(replace(config, method="erm"), tmp_path_factory.mktemp("runs") / "erm", quiet=True)
