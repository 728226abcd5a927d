"""Plates' sites are what the service would prepare; episodes depend on seed and step alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import LayoutError
from model.images import ImageRecipe, decode_plane, prepare_site
from training.contexts import panel_rows
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


def test_the_panel_is_the_first_wells_of_every_class_by_name(plates: list[PlateSites]) -> None:
    plate = plates[0]
    doubled = replace(plate, **{
        name: np.concatenate([getattr(plate, name)] * 2) for name in ("names", "labels", "controls", "images")
    }, wells=np.concatenate([np.char.add("P", np.char.lstrip(plate.wells, "ABCDEFGH")), plate.wells]))  # fmt: skip
    for wells_per_class in (1, 2):
        rows = panel_rows(doubled, wells_per_class)
        for label, name in enumerate(CLASSES):
            of_class = doubled.wells[(doubled.labels == label) & ~doubled.controls]
            chosen = set(doubled.wells[rows[doubled.labels[rows] == label]])
            assert chosen == set(sorted(set(of_class))[:wells_per_class]), name
    with pytest.raises(LayoutError, match="no treated site is left to learn from beside a panel of 8 sites"):
        Episodes([plate], RECIPE, SHAPE, crop=48, seed=1, first=0, steps=1, with_controls=True, panels=[plate.treated])


def test_a_panel_is_drawn_evenly_over_classes_and_its_wells_carry_no_loss(plates: list[PlateSites]) -> None:
    plate = plates[0]
    count = len(CLASSES) - 2
    levels = np.arange(len(plate.wells), dtype=np.uint8)[:, None, None, None]
    marked = replace(plate, images=np.broadcast_to(levels, (len(plate.wells), 5, 64, 64)))  # a site's pixels are its row
    panel = plate.treated[:count]
    raw = replace(RECIPE, mean=(), std=())
    for step in range(4):
        shape = replace(SHAPE, panel=2 * count, plates=1)
        drawn = Episodes([marked], raw, shape, crop=48, seed=1, first=step, steps=1, with_controls=True, panels=[panel])
        (episode,) = drawn[0]
        rows = np.round(episode.images[:, 0, 0, 0].numpy() * 255).astype(int)
        assert marked.controls[rows[: episode.controls]].all()
        assert sorted(rows[episode.controls : episode.controls + episode.panel]) == sorted([*panel, *panel])
        assert set(rows[episode.treated]) == set(plate.treated) - set(panel)
        assert episode.labels.tolist() == plate.labels[rows[episode.treated]].tolist()
        assert len(rows[episode.context]) == episode.controls + episode.panel


def test_methods_without_controls_see_as_many_images(plates: list[PlateSites]) -> None:
    for episode in episodes(plates, with_controls=False)[0]:
        assert episode.controls == 0
        assert len(episode.images) == SHAPE.rows == len(episode.labels)


def test_a_method_without_a_panel_draws_as_many_images(plates: list[PlateSites]) -> None:
    plate = plates[0]
    shape = replace(SHAPE, panel=4, plates=1, controls_min=3, controls_max=3)

    def images(panel: tuple[np.ndarray, ...], *, with_controls: bool) -> int:
        drawn = Episodes(
            [plate], RECIPE, shape, crop=48, seed=1, first=0, steps=1, with_controls=with_controls, panels=panel
        )
        return len(drawn[0][0].images)

    assert images((panel_rows(plate, 1)[:4],), with_controls=True) == shape.rows
    assert images((), with_controls=True) == images((), with_controls=False) == shape.rows
