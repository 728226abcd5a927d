"""Plates' sites are what the service would prepare; episodes depend on seed and step alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.images import ImageRecipe, decode_plane, prepare_site
from training.dataset import NO_LABEL, PlateSites, moments
from training.episodes import EpisodeShape
from training.plates import open_plates
from training.simulate import CHANNELS, CLASSES

RECIPE = ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196, mean=(0.2,) * 5, std=(0.1,) * 5)
SHAPE = EpisodeShape(treated=6, controls_min=2, controls_max=6, plates=2)


@pytest.fixture
def plates(fetched: Path) -> list[PlateSites]:
    return list(open_plates(fetched, CLASSES).values())


@pytest.fixture
def plate(plates: list[PlateSites]) -> PlateSites:
    return plates[0]


def test_a_site_equals_what_the_service_prepares_from_its_files(index: pd.DataFrame, fetched: Path) -> None:
    plates = open_plates(fetched, CLASSES)
    row = index.iloc[7]
    plate = plates[row["Metadata_Plate"]]
    at = np.flatnonzero(plate.wells == row["Metadata_Well"])
    planes = [decode_plane(Path(row[f"Path_{channel}"]).read_bytes()) for channel in CHANNELS]
    expected = prepare_site(planes, RECIPE, float(row["pixel_size_um"]))
    np.testing.assert_array_equal(plate.served(at, RECIPE)[0], expected)


def test_wells_without_a_class_have_no_label_and_controls_are_controls(plate: PlateSites) -> None:
    assert set(plate.labels[plate.names == "inactive"]) == {NO_LABEL}
    assert set(plate.names[plate.controls]) == {"DMSO"}
    assert set(plate.names[plate.treated]) == set(CLASSES)


def test_moments_are_those_of_the_pixels_stored_or_counted(plate: PlateSites) -> None:
    pixels = plate.images[:].astype(np.float64) / 255
    for own in (plate, replace(plate, pixel_moments=None), replace(plate, images=plate.unit(np.arange(25)), white=())):
        mean, std = moments([replace(own, pixel_moments=None) if own.images.dtype == np.float32 else own])
        np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-6)
    rows = plate.control_rows
    np.testing.assert_allclose(plate.zscore_recipe(RECIPE).mean, pixels[rows].mean((0, 2, 3)), rtol=1e-6)
