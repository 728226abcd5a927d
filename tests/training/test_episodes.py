"""Episodes depend on seed and step alone, and hold what the methods are told they hold."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import LayoutError
from model.images import ImageRecipe, normalise
from training.contexts import panel_rows
from training.dataset import PlateSites
from training.episodes import Episode, Episodes, EpisodeShape, Share, _draw_wells
from training.simulate import CHANNELS, CLASSES

RECIPE = ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196, mean=(0.2,) * 5, std=(0.1,) * 5)
SHAPE = EpisodeShape(treated=6, controls_min=2, controls_max=6, plates=2)


def episodes(plates: list[PlateSites], *, shape: EpisodeShape = SHAPE, **kwargs: Any) -> Episodes:
    arguments = {"crop": 48, "seed": 1, "first": 0, "steps": 4, "with_controls": True} | kwargs
    return Episodes(plates, RECIPE, shape, **arguments)


def assert_equal(found: Episode, expected: Episode) -> None:
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=0)
    assert found.labels.tolist() == expected.labels.tolist()
    assert (found.controls, found.panel) == (expected.controls, expected.panel)


def test_a_step_depends_on_its_number_and_the_seed_alone(plates: list[PlateSites]) -> None:
    straight, resumed, other = episodes(plates), episodes(plates, first=2), episodes(plates, seed=2)
    for expected, found in zip(straight[2], resumed[0], strict=True):
        assert_equal(found, expected)
    assert not torch.equal(straight[2][0].images[:2], other[2][0].images[:2])


def test_an_episode_holds_controls_first_and_labels_of_the_treated(plates: list[PlateSites]) -> None:
    for episode in episodes(plates)[0]:
        assert 2 <= episode.controls <= 6
        assert episode.images.shape == (episode.controls + 6, 5, 48, 48)
        assert episode.labels.shape == (6,)
        assert (episode.labels >= 0).all()


def test_few_control_images_are_few_wells(plate: PlateSites) -> None:
    twice = replace(plate, **{  # two sites a well
        name: np.concatenate([getattr(plate, name)[:]] * 2) for name in ("wells", "names", "labels", "controls", "images")
    })  # fmt: skip
    rows = _draw_wells(twice, 8, np.random.default_rng(0))
    assert len(set(rows)) == 8
    assert len(set(twice.wells[rows])) == 4
    assert twice.controls[rows].all()
    assert len(_draw_wells(twice, 40, np.random.default_rng(0))) == 40


def test_the_panel_has_as_many_wells_of_every_class_and_always_the_same(plate: PlateSites) -> None:
    doubled = replace(plate, **{
        name: np.concatenate([getattr(plate, name)[:]] * 2) for name in ("names", "labels", "controls", "images")
    }, wells=np.concatenate([np.char.add("P", np.char.lstrip(plate.wells, "ABCDEFGH")), plate.wells]))  # fmt: skip
    for wells_per_class in (1, 2):
        rows = panel_rows(doubled, wells_per_class)
        for label, name in enumerate(CLASSES):
            of_class = doubled.wells[(doubled.labels == label) & ~doubled.controls]
            chosen = set(doubled.wells[rows[doubled.labels[rows] == label]])
            assert len(chosen) == wells_per_class, name
            assert chosen <= set(of_class), name
        assert np.array_equal(rows, panel_rows(doubled, wells_per_class))
    with pytest.raises(LayoutError, match="no treated site is left to learn from beside a panel of 8 sites"):
        Episodes([plate], RECIPE, SHAPE, crop=48, seed=1, first=0, steps=1, with_controls=True, panels=[plate.treated])


def test_a_panel_is_drawn_evenly_over_classes_and_its_wells_carry_no_loss(plate: PlateSites) -> None:
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


def test_a_method_without_a_panel_draws_as_many_images(plate: PlateSites) -> None:
    shape = replace(SHAPE, panel=4, plates=1, controls_min=3, controls_max=3)

    def images(panel: tuple[np.ndarray, ...], *, with_controls: bool) -> int:
        return len(episodes([plate], shape=shape, with_controls=with_controls, panels=panel)[0][0].images)

    assert images((panel_rows(plate, 1)[:4],), with_controls=True) == shape.rows
    assert images((), with_controls=True) == images((), with_controls=False) == shape.rows


@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_a_steps_plates_are_the_same_however_they_are_shared(plates: list[PlateSites], ranks: int, parts: int) -> None:
    shape = replace(SHAPE, plates=4)
    whole = episodes(plates, shape=shape)
    shared = [episodes(plates, shape=shape, share=Share(rank, ranks, parts)) for rank in range(ranks)]
    for step in range(2):
        taken = [one for part in range(parts) for mine in shared for one in mine[step * parts + part]]
        assert len(taken) == 4
        for found, expected in zip(taken, whole[step], strict=True):
            assert_equal(found, expected)
    assert {len(mine) for mine in shared} == {4 * parts}


FIXED = ImageRecipe(channels=CHANNELS, size=64, scaling="fixed-scale", full_scale=(255.0, 510.0, 300.0, 255.0, 400.0))
LIT = replace(FIXED, scaling="control-scale", illumination="controls")


@pytest.mark.parametrize(
    ("dtype", "steps", "recipe"),
    [
        (np.uint8, 255.0, RECIPE),
        (np.uint16, 1.0, FIXED),
        (np.uint16, 256.0, FIXED),
        (np.float32, 1.0, FIXED),
        (np.uint16, 1.0, replace(LIT, illumination="none")),
        (np.uint16, 1.0, LIT),
    ],
)
def test_pixels_are_the_crops_turned_and_normalised_by_the_one_rule(
    plate: PlateSites, dtype: type, steps: float, recipe: ImageRecipe
) -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (len(plate.wells), 5, 80, 72)) * (256 if steps == 256 else 1)
    known = replace(plate, images=stored.astype(dtype), recipe=recipe, steps=steps, site_moments=None).scaled_by()
    prepared = np.stack([normalise(site, RECIPE) for site in known.unit(np.arange(len(plate.wells)))])
    (episode, _) = episodes([known, known])[0]
    assert episode.images.is_contiguous(memory_format=torch.channels_last)
    assert episode.images.dtype == torch.float32
    seen = set()
    for image in episode.images.numpy():
        variants = {
            (turns, flip): np.rot90(image[:, :, ::-1] if flip else image, turns, (1, 2))
            for turns in range(4)
            for flip in (0, 1)
        }
        where = [
            (variant, row)
            for variant, turned in variants.items()
            for row in range(len(prepared))
            for top, left in np.argwhere(prepared[row, 0, :33, :25] == turned[0, 0, 0])
            if (prepared[row, :, top : top + 48, left : left + 48] == turned).all()
        ]
        assert len(where) == 1, "the image is exactly one turned crop of one site"
        seen.add(where[0][0])
    assert len(seen) > 3


def test_episodes_can_be_pinned_and_moved_like_tensors(plates: list[PlateSites]) -> None:
    (episode, _) = episodes(plates)[0]
    moved = episode.to(torch.device("meta"), non_blocking=True)
    assert moved.images.is_meta
    assert moved.labels.is_meta
    assert (moved.controls, moved.treated) == (episode.controls, episode.treated)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"treated": 0}, "treated is 0; it is 1 or more"),
        ({"controls_min": -1}, "controls_min is -1; it is 0 or more"),
        ({"controls_min": 9}, "controls_min is 9 and controls_max 6: the fewest are not more than the most"),
        ({"plates": 0}, "plates is 0; it is 1 or more"),
        ({"panel": -1}, "panel is -1; it is 0 or more"),
        ({"panel_wells": 0}, "panel_wells is 0; it is 1 or more"),
    ],
)
def test_a_step_that_cannot_be_drawn_is_told(change: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(SHAPE, **change)
