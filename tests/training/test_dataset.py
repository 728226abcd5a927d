"""Plates' sites are what the service would prepare; episodes depend on seed and step alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.images import ImageRecipe, decode_plane, prepare_site
from training.dataset import NO_LABEL, PlateSites, moments
from training.episodes import Episodes, EpisodeShape, _draw_wells
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


def episodes(plates: list[PlateSites], **kwargs: object) -> Episodes:
    arguments: dict[str, object] = {"crop": 48, "seed": 1, "first": 0, "steps": 4, "with_controls": True} | kwargs
    return Episodes(plates, RECIPE, SHAPE, **arguments)  # type: ignore[arg-type]


def test_a_step_depends_on_its_number_and_the_seed_alone(plates: list[PlateSites]) -> None:
    straight, resumed, other = episodes(plates), episodes(plates, first=2), episodes(plates, seed=2)
    for expected, found in zip(straight[2], resumed[0], strict=True):
        torch.testing.assert_close(found.images, expected.images)
        assert found.controls == expected.controls
    assert not torch.equal(straight[2][0].images[:2], other[2][0].images[:2])


def test_an_episode_holds_controls_first_and_labels_of_the_treated(plates: list[PlateSites]) -> None:
    for episode in episodes(plates)[0]:
        assert 2 <= episode.controls <= 6
        assert episode.images.shape == (episode.controls + 6, 5, 48, 48)
        assert episode.labels.shape == (6,)
        assert (episode.labels >= 0).all()


def test_few_control_images_are_few_wells(plate: PlateSites) -> None:
    twice = replace(plate, **{  # two sites a well
        name: np.concatenate([getattr(plate, name)] * 2) for name in ("wells", "names", "labels", "controls", "images")
    })  # fmt: skip
    rows = _draw_wells(twice, 8, np.random.default_rng(0))
    assert len(set(rows)) == 8
    assert len(set(twice.wells[rows])) == 4
    assert twice.controls[rows].all()
    assert len(_draw_wells(twice, 40, np.random.default_rng(0))) == 40


def test_methods_without_controls_see_as_many_images(plates: list[PlateSites]) -> None:
    for episode in episodes(plates, with_controls=False)[0]:
        assert episode.controls == 0
        assert len(episode.images) == SHAPE.rows == len(episode.labels)
