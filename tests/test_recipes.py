"""One plate, prepared in training and by the service over HTTP: the network sees the same numbers, to the bit."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.images import ImageRecipe, measure_scale, prepare_site, scale_pixels
from service.settings import Settings
from tests.service.conftest import running
from tests.service.plates import FakeEngine, fake_bundle, image
from training.fetch import fetch
from training.index import index_tree
from training.plates import open_plates
from training.simulate import (
    CLASSES,
    SimulationPlan,
    plate_batches,
    plate_wells,
    render_site,
    simulate,
    well_conditions,
)

CHANNELS = ("DNA", "ER", "RNA")
PLAN = SimulationPlan(labs=1, batches=1, plates=1, seed=8, sites=2, size_px=128, wells_per_class=1, inactive_wells=0)
SHAPE = {"channels": CHANNELS, "size": 48, "mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)}
FULL = (9_000.0,) * 3
RECIPES = {
    "percentile-8bit": ImageRecipe(**SHAPE),
    "fixed-scale": ImageRecipe(**SHAPE, scaling="fixed-scale", full_scale=FULL),
    "fixed-scale, lit": ImageRecipe(**SHAPE, scaling="fixed-scale", full_scale=FULL, illumination="controls"),
    "control-scale": ImageRecipe(**SHAPE, scaling="control-scale"),
    "control-scale, lit": ImageRecipe(**SHAPE, scaling="control-scale", illumination="controls"),
}


class SeeingEngine(FakeEngine):
    """Remembers the images that it measured, and those that it classified, a well's in any order."""

    def __init__(self):
        super().__init__()
        self.classified = []

    def measure(self, images, prior=None):
        self.measured = images
        return super().measure(images, prior)

    def classify(self, images, statistics):
        self.classified += list(images)
        return super().classify(images, statistics)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("one-plate")
    simulate(PLAN, root)
    return index_tree(root, CHANNELS)


def files_of(rows: pd.DataFrame):
    return [
        image(f"{row.Metadata_Well}_{row.Metadata_Site}_{channel}.tif", Path(getattr(row, f"Path_{channel}")).read_bytes())
        for row in rows.itertuples()
        for channel in CHANNELS
    ]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_and_the_service_give_the_network_the_same_images(recipe, index, tmp_path):
    fetch(index, tmp_path / "fetched", recipe)
    (plate,) = open_plates(tmp_path / "fetched", CLASSES).values()
    bundle = fake_bundle(tmp_path / "bundle", recipe=recipe, max_context_sites=20)
    engine, size = SeeingEngine(), {"pixel_size_um": str(index["pixel_size_um"].iloc[0])}
    with running(Settings(bundle=bundle.path, data=tmp_path / "data", threads=1), engine) as client:
        plate = plate.scaled_by(plate.context_rows(20))
        controls = files_of(index[index["role"] == "control"])
        report = client.post("/batches/P1/controls", files=controls, data=size).json()
        assert (report["context_sites"], len(report["left_out"])) == (20, 12)
        assert report["scale_id"] == (plate.scale.digest if plate.scale else None)
        np.testing.assert_array_equal(engine.measured, plate.served(plate.context_rows(20), recipe))
        well = plate.wells[plate.treated[0]]
        answer = client.post("/batches/P1/predict", files=files_of(index[index["Metadata_Well"] == well]), data=size)
        assert answer.status_code == 200
        expected = plate.served(np.flatnonzero(plate.wells == well), recipe)
        assert sorted(image.tobytes() for image in engine.classified[-len(expected) :]) == sorted(
            image.tobytes() for image in expected
        )


def test_a_simulated_microscopes_shading_goes_by_thirty_two_control_sites():
    plan = SimulationPlan(labs=1, first_lab=26, batches=1, plates=1, seed=3, sites=1, plate_format=384, size_px=512)
    (plate,) = plate_batches(plan)
    wells = [well for well in plate_wells(plan, plate) if well.role == "control"]
    at = well_conditions(plan, plate, wells[0])
    axis = np.linspace(-1, 1, 512)[::2]
    away = (axis[:, None] - at.vignetting_y) ** 2 + (axis[None, :] - at.vignetting_x) ** 2
    light = np.tile((1 - at.vignetting * np.minimum(away / 2, 1.5)).astype(np.float32), (5, 1, 1))
    recipe = ImageRecipe(("DNA", "ER", "RNA", "AGP", "Mito"), 256, scaling="control-scale", illumination="controls")
    scale = measure_scale([prepare_site(render_site(plan, plate, well, 1), recipe) for well in wells], recipe)
    dark = scale_pixels(np.zeros_like(light), recipe, scale)
    left = scale_pixels(light, recipe, scale) - dark

    def unevenness(of):
        return (of.std(axis=(1, 2)) / of.mean(axis=(1, 2))).round(3)

    assert (unevenness(light) > 0.09).all()
    assert (unevenness(left) < 0.025).all()
