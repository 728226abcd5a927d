"""Plates in memory are what the service would prepare; episodes depend on seed and step alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import ContextError, NoControlsError, NotATiffError
from model.images import ImageRecipe, decode_plane, finish_site, measure_scale, normalise, prepare_site
from training.dataset import NO_LABEL, load_plates, moments
from training.episodes import Episodes, EpisodeShape, _draw_wells
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


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_site_in_memory_equals_what_the_service_prepares_from_its_files(recipe: ImageRecipe, one: pd.DataFrame) -> None:
    (plate,) = load_plates(one, recipe, CLASSES).values()
    prepared = [
        prepare_site(
            [decode_plane(Path(row[f"Path_{channel}"]).read_bytes()) for channel in CHANNELS],
            recipe,
            float(row["pixel_size_um"]),
        )
        for _, row in one.iterrows()
    ]
    scale = measure_scale([prepared[row] for row in plate.context_rows()], recipe)
    assert plate.scale == scale
    assert (scale is None) == (recipe in (RECIPE, FIXED))
    expected = np.stack([finish_site(site, recipe, scale) for site in prepared])
    np.testing.assert_array_equal(plate.served(np.arange(len(prepared)), recipe), expected)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_random_crop_is_scaled_as_its_own_place_in_the_field(recipe: ImageRecipe, one: pd.DataFrame) -> None:
    (plate,) = load_plates(one, recipe, CLASSES).values()
    rows = np.array([3, 9])
    found = plate.augmented(rows, recipe, 40, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    for crop, field in zip(found, plate.unit(rows), strict=True):
        top, left = (int(rng.integers(extent - 40 + 1)) for extent in field.shape[1:])
        cut = np.rot90(field[:, top : top + 40, left : left + 40], int(rng.integers(4)), axes=(1, 2))
        cut = cut[:, :, ::-1] if rng.random() < 0.5 else cut
        np.testing.assert_array_equal(crop, (cut - np.float32(0.2)) / np.float32(0.1))


def test_an_episode_of_a_plate_with_another_gain_and_offset_is_the_same(one: pd.DataFrame) -> None:
    for recipe, same in ((BY_CONTROLS, True), (LIT, True), (FIXED, False)):
        (plate,) = load_plates(one, recipe, CLASSES).values()
        gain, offset = (np.array(values, np.float32)[:, None, None] for values in ([0.5, 2, 3, 1, 1.5], [0, 90, 5, 400, 0]))
        other = replace(plate, images=plate.images * gain + offset)
        other = other.scaled_by()
        seen = [
            Episodes([each], recipe, replace(SHAPE, plates=1), crop=48, seed=1, first=0, steps=1, with_controls=True)[0][0]
            for each in (plate, other)
        ]
        assert torch.allclose(seen[0].images, seen[1].images, atol=2e-3 * float(seen[0].images.abs().max())) == same


def test_a_plate_is_scaled_by_the_controls_that_are_asked_for(one: pd.DataFrame) -> None:
    (plate,) = load_plates(one, BY_CONTROLS, CLASSES).values()
    few = plate.scaled_by(plate.context_rows(4))
    assert few.scale not in (None, plate.scale)
    np.testing.assert_allclose(few.scale.span, plate.scale.span, rtol=0.5)  # type: ignore[union-attr]
    assert load_plates(one, RECIPE, CLASSES)[plate.plate].scaled_by(plate.context_rows(4)).scale is None


def test_a_plate_that_gives_no_scale_is_named(one: pd.DataFrame) -> None:
    (plate,) = load_plates(one, BY_CONTROLS, CLASSES).values()
    blank = replace(plate, images=np.full_like(plate.images, 5))
    with pytest.raises(ContextError, match=f"plate {plate.plate}: channel DNA"):
        blank.scaled_by()
    with pytest.raises(NoControlsError, match=f"plate {plate.plate}: no control sites"):
        load_plates(one[one["role"] != "control"], BY_CONTROLS, CLASSES)


def test_a_cache_gives_the_same_pixels(one: pd.DataFrame, tmp_path: Path) -> None:
    first, again = (load_plates(one, RECIPE, CLASSES, cache=tmp_path) for _ in range(2))
    name = next(iter(first))
    np.testing.assert_array_equal(first[name].images, again[name].images)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_linear_scalings_keep_intensity_and_percentile_scaling_does_not(one: pd.DataFrame) -> None:
    kept = {}
    for name, recipe in RECIPES.items():
        (plate,) = load_plates(one, recipe, CLASSES).values()
        means = plate.unit(np.arange(len(plate.wells))).mean(axis=(2, 3))
        kept[name] = min(np.corrcoef(means[:, channel], plate.intensities[:, channel, 0])[0, 1] for channel in range(5))
    assert kept.pop("percentile-8bit") < 0.9 < min(kept.values())


def test_wells_without_a_class_have_no_label_and_controls_are_controls(index: pd.DataFrame) -> None:
    plate = next(iter(load_plates(index, RECIPE, CLASSES).values()))
    assert set(plate.labels[plate.names == "inactive"]) == {NO_LABEL}
    assert set(plate.names[plate.controls]) == {"DMSO"}
    assert set(plate.names[plate.treated]) == set(CLASSES)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_moments_are_those_of_the_scaled_pixels(recipe: ImageRecipe, one: pd.DataFrame) -> None:
    (plate,) = load_plates(one, recipe, CLASSES).values()
    mean, std = moments([plate])
    pixels = plate.unit(np.arange(len(plate.wells))).astype(np.float64)
    controls = normalise(plate.unit(plate.control_rows), plate.zscore_recipe(recipe))
    np.testing.assert_allclose(controls.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(controls.std((0, 2, 3)), 1, rtol=1e-3)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-4)


def episodes(index: pd.DataFrame, **kwargs: object) -> Episodes:
    plates = list(load_plates(index, RECIPE, CLASSES).values())
    arguments: dict[str, object] = {"crop": 48, "seed": 1, "first": 0, "steps": 4, "with_controls": True} | kwargs
    return Episodes(plates, RECIPE, SHAPE, **arguments)  # type: ignore[arg-type]


def test_a_step_depends_on_its_number_and_the_seed_alone(index: pd.DataFrame) -> None:
    straight, resumed, other = episodes(index), episodes(index, first=2), episodes(index, seed=2)
    for expected, found in zip(straight[2], resumed[0], strict=True):
        torch.testing.assert_close(found.images, expected.images)
        assert found.controls == expected.controls
    assert not torch.equal(straight[2][0].images[:2], other[2][0].images[:2])


def test_an_episode_holds_controls_first_and_labels_of_the_treated(index: pd.DataFrame) -> None:
    for episode in episodes(index)[0]:
        assert 2 <= episode.controls <= 6
        assert episode.images.shape == (episode.controls + 6, 5, 48, 48)
        assert episode.labels.shape == (6,)
        assert (episode.labels >= 0).all()


def test_few_control_images_are_few_wells(index: pd.DataFrame) -> None:
    plate = next(iter(load_plates(index, RECIPE, CLASSES).values()))
    twice = replace(plate, **{  # two sites a well
        name: np.concatenate([getattr(plate, name)] * 2) for name in ("wells", "names", "labels", "controls", "images")
    })  # fmt: skip
    rows = _draw_wells(twice, 8, np.random.default_rng(0))
    assert len(set(rows)) == 8
    assert len(set(twice.wells[rows])) == 4
    assert twice.controls[rows].all()
    assert len(_draw_wells(twice, 40, np.random.default_rng(0))) == 40


def test_methods_without_controls_see_as_many_images(index: pd.DataFrame) -> None:
    for episode in episodes(index, with_controls=False)[0]:
        assert episode.controls == 0
        assert len(episode.images) == SHAPE.rows == len(episode.labels)


def test_a_file_that_cannot_be_used_is_named(index: pd.DataFrame, tmp_path: Path) -> None:
    broken = index.iloc[:1].copy()
    (tmp_path / "broken.tif").write_bytes(b"not a TIFF")
    broken["Path_ER"] = str(tmp_path / "broken.tif")
    with pytest.raises(NotATiffError, match=r"broken\.tif: the file is not a TIFF"):
        load_plates(broken, RECIPE, CLASSES)
