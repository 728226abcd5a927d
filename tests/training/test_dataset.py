"""Plates' sites are what the service would prepare; episodes depend on seed and step alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import ContextError, NoControlsError
from model.images import ImageRecipe, decode_plane, finish_site, measure_scale, normalise, prepare_site
from training.dataset import NO_LABEL, PlateSites, moments
from training.episodes import Episodes, EpisodeShape
from training.fetch import fetch
from training.plates import open_plates
from training.simulate import CHANNELS, CLASSES

RECIPE = ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196, mean=(0.2,) * 5, std=(0.1,) * 5)
FIXED = replace(RECIPE, scaling="fixed-scale", full_scale=(65535.0,) * 5)
BY_CONTROLS = replace(RECIPE, scaling="control-scale")
RECIPES = {
    "percentile-8bit": RECIPE,
    "fixed-scale": FIXED,
    "fixed-scale, lit": replace(FIXED, illumination="controls"),
    "control-scale": BY_CONTROLS,
    "control-scale, lit": replace(BY_CONTROLS, illumination="controls"),
}
LIT = RECIPES["control-scale, lit"]
SHAPE = EpisodeShape(treated=6, controls_min=2, controls_max=6, plates=2)


@pytest.fixture(scope="module")
def one(index: pd.DataFrame) -> pd.DataFrame:
    """The sites of one plate."""
    return index[index["Metadata_Plate"] == index["Metadata_Plate"].iloc[0]]


Fetched = Callable[[ImageRecipe], PlateSites]


@pytest.fixture(scope="module")
def fetched_by(one: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """Fetches one plate by a recipe, once."""

    @lru_cache
    def fetched(recipe: ImageRecipe) -> PlateSites:
        folder = tmp_path_factory.mktemp("fetched")
        fetch(one, folder, recipe)
        (plate,) = open_plates(folder, CLASSES).values()
        return plate

    return fetched


@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_site_equals_what_the_service_prepares_from_its_files(
    recipe: ImageRecipe, halved: bool, one: pd.DataFrame, fetched_by: Fetched
) -> None:
    recipe = replace(recipe, pixel_size_um=None if halved else recipe.pixel_size_um)
    plate = fetched_by(recipe)
    prepared = [
        prepare_site(
            [decode_plane(Path(row[f"Path_{channel}"]).read_bytes()) for channel in CHANNELS],
            recipe,
            float(row["pixel_size_um"]),
        )
        for _, row in one.iterrows()
    ]
    scale = measure_scale([prepared[row] for row in plate.context_rows()], recipe)
    assert (scale is None) == (plate.scale is None) == (not recipe.scaled_by_batch)
    expected = np.stack([finish_site(site, recipe, scale) for site in prepared])
    found = plate.served(np.arange(len(prepared)), recipe)
    if halved or recipe == RECIPE:
        assert plate.scale == scale
        np.testing.assert_array_equal(found, expected)
    else:  # resampled grey levels are kept to the nearest whole one
        levels = np.ptp(found) / np.ptp(plate.images[:].astype(np.float32), axis=(0, 2, 3)).min()
        np.testing.assert_allclose(found, expected, atol=2 * levels)


def test_an_episode_of_a_plate_with_another_gain_and_offset_is_the_same(fetched_by: Fetched) -> None:
    for recipe, same in ((BY_CONTROLS, True), (LIT, True), (FIXED, False)):
        plate = fetched_by(recipe)
        gain, offset = (np.array(values, np.float32)[:, None, None] for values in ([0.5, 2, 3, 1, 1.5], [0, 90, 5, 400, 0]))
        other = replace(plate, images=plate.images[:] * gain + offset)
        other = other.scaled_by()
        seen = [
            Episodes([each], recipe, replace(SHAPE, plates=1), crop=48, seed=1, first=0, steps=1, with_controls=True)[0][0]
            for each in (plate, other)
        ]
        assert torch.allclose(seen[0].images, seen[1].images, atol=2e-3 * float(seen[0].images.abs().max())) == same


def test_a_plate_is_scaled_by_the_controls_that_are_asked_for(fetched_by: Fetched) -> None:
    plate = fetched_by(BY_CONTROLS)
    few = plate.scaled_by(plate.context_rows(4))
    assert few.scale not in (None, plate.scale)
    np.testing.assert_allclose(few.scale.span, plate.scale.span, rtol=0.5)  # type: ignore[union-attr]
    assert fetched_by(RECIPE).scaled_by(plate.context_rows(4)).scale is None


def test_a_plate_that_gives_no_scale_is_named(one: pd.DataFrame, fetched_by: Fetched, tmp_path: Path) -> None:
    plate = fetched_by(BY_CONTROLS)
    blank = replace(plate, images=np.full(plate.images.shape, 5, np.uint16))
    with pytest.raises(ContextError, match=f"plate {plate.plate}: channel DNA"):
        blank.scaled_by()
    with pytest.raises(NoControlsError, match=f"plate {plate.plate}: no control sites"):
        fetch(one[one["role"] != "control"], tmp_path, BY_CONTROLS)


def test_linear_scalings_keep_intensity_and_percentile_scaling_does_not(fetched_by: Fetched) -> None:
    kept = {}
    for name, recipe in RECIPES.items():
        plate = fetched_by(recipe)
        means = plate.unit(np.arange(len(plate.wells))).mean(axis=(2, 3))
        kept[name] = min(np.corrcoef(means[:, channel], plate.intensities[:, channel, 0])[0, 1] for channel in range(5))
    assert kept.pop("percentile-8bit") < 0.9 < min(kept.values())


def test_wells_without_a_class_have_no_label_and_controls_are_controls(plate: PlateSites) -> None:
    assert set(plate.labels[plate.names == "inactive"]) == {NO_LABEL}
    assert set(plate.names[plate.controls]) == {"DMSO"}
    assert set(plate.names[plate.treated]) == set(CLASSES)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_moments_are_those_of_the_scaled_pixels(recipe: ImageRecipe, fetched_by: Fetched) -> None:
    plate = fetched_by(recipe)
    mean, std = moments([plate])
    counted = moments([replace(plate, site_moments=None)])
    np.testing.assert_allclose((mean, std), counted, rtol=1e-5)
    pixels = plate.unit(np.arange(len(plate.wells))).astype(np.float64)
    controls = normalise(plate.unit(plate.control_rows), plate.zscore_recipe(recipe))
    np.testing.assert_allclose(controls.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(controls.std((0, 2, 3)), 1, rtol=1e-3)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-4)
