"""Fixtures that more than one of the three mirrors needs."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real images are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def demo_bundles() -> Path:
    """The folder of the two committed bundles: cs-arm-bn and erm."""
    return ROOT / "examples" / "bundles"


@pytest.fixture(scope="session")
def tiny_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, exported bundle of a small random network: 3 channels, 3 classes, 64 x 64 pixels."""
    import torch

    from model.bundle import Manifest
    from model.images import ImageRecipe
    from model.network import Ensemble, NetworkSpec, ResNet
    from model.predictions import EmbeddingReference
    from model.statistics import BatchNormStatistics, summarise_training
    from training.export import export_bundle, measure_float64

    rng = np.random.default_rng(5)
    torch.manual_seed(5)
    network = Ensemble([ResNet(NetworkSpec(channels=3, classes=3, depth=18, width=4, antialiased=True))])

    def plate(seed: int) -> BatchNormStatistics:
        images = np.random.default_rng(seed).normal(size=(6, 3, 64, 64)).astype(np.float32)
        mean, variance = measure_float64(network, images)
        return BatchNormStatistics(mean.astype(np.float32), variance.astype(np.float32), sites=6, wells=6)

    plates = [plate(seed) for seed in range(6)]
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export_bundle(
        network,
        path,
        Manifest(
            name="tiny",
            classes=("alpha", "beta", "gamma"),
            recipe=ImageRecipe(channels=("DNA", "ER", "RNA"), size=64, shrink=1, mean=(0.3,) * 3, std=(0.2,) * 3),
            method="cs-arm-bn",
            context="controls",
            features=network.features,
            embedding_dim=network.embedding_dim,
            minimum_control_wells=4,
            max_context_sites=32,
            network=network.spec.to_json(),
        ),
        summarise_training(plates[:4], source=plates[0], held_out=plates[4:]),
        EmbeddingReference(
            projection=np.eye(network.embedding_dim, dtype=np.float32),
            class_centres=rng.normal(size=(3, network.embedding_dim)).astype(np.float32),
            control_wells=np.array([4, 8]),
            control_distances=np.array([1.2, 1.0]),
            class_distance=3.0,
        ),
        rng.normal(size=(4, 3, 64, 64)).astype(np.float32),
    )
    return path
