"""Plates on disk: opened without being read, as they were fetched, or not at all."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.errors import RunError
from model.images import ImageRecipe
from training.dataset import NO_LABEL
from training.plates import open_plates, plate_table, plates_recipe, require_recipe, stored_dtype, to_stored, white_of
from training.simulate import CHANNELS, CLASSES

FIXED = ImageRecipe(channels=("DNA", "ER"), size=8, shrink=1, scaling="fixed", full_scale=(65535.0, 4095.0))


def test_plates_open_by_name_with_the_recipe_they_were_fetched_by(fetched: Path) -> None:
    plates = open_plates(fetched, CLASSES)
    assert len(plates) == 8
    assert plates_recipe(fetched) == ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196)
    table = plate_table(plates)
    assert set(table["Metadata_Source"]) == {"simulated_01", "simulated_02"}
    assert all(
        plate.plate == name and plate.images.shape == (25, 5, *plate.images.shape[2:]) for name, plate in plates.items()
    )


def test_without_classes_names_are_there_and_labels_are_not(fetched: Path) -> None:
    plate = next(iter(open_plates(fetched).values()))
    assert set(plate.labels) == {NO_LABEL}
    assert set(CLASSES) < set(plate.names)
    again = plate.with_classes(CLASSES)
    assert {CLASSES[number] for number in again.labels[again.treated]} == set(CLASSES)


def test_images_are_sent_to_workers_by_path_and_hold_no_file_open(fetched: Path) -> None:
    plates = list(open_plates(fetched, CLASSES).values())
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    images = [plate.images[np.array([3, 1])] for plate in plates]
    assert len(pickle.dumps(plates[0].images)) < 1_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plates[0].images))[np.array([3, 1])], images[0])
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_folder_without_plates_says_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="anchorwell-train fetch"):
        open_plates(tmp_path)


def test_a_plate_whose_files_are_not_as_recorded_is_refused(fetched: Path, tmp_path: Path) -> None:
    for path in fetched.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = next(tmp_path.glob("*.npy"))
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(RunError, match=rf"{images.name} is not as its record says"):
        open_plates(tmp_path)


def test_a_plate_of_another_version_is_refused(fetched: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes((fetched / "recipe.json").read_bytes())
    record = json.loads(next(path for path in fetched.glob("*.json") if path.name != "recipe.json").read_text())
    (tmp_path / "P.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(RunError, match="has format 99"):
        open_plates(tmp_path)


def test_another_recipe_is_told_by_what_differs(fetched: Path) -> None:
    with pytest.raises(RunError, match=r"another shrink \(it is 2, asked for is 3\)"):
        require_recipe(fetched, replace(plates_recipe(fetched), shrink=3))
    require_recipe(fetched, replace(plates_recipe(fetched), size=32, mean=(1.0,) * 5), but=frozenset({"size"}))


@pytest.mark.parametrize("full", [1.0, 255.0, 4095.0, 65535.0])
def test_intensity_is_stored_exactly_as_counts_or_finer(full: float) -> None:
    recipe = replace(FIXED, full_scale=(full, full))
    assert stored_dtype(recipe) == np.uint16
    counts = np.random.default_rng(0).integers(0, int(min(2 * full, 65535)) + 1, (2, 8, 8)).astype(np.float32)
    stored = to_stored(counts / np.float32(full), recipe)
    white = np.asarray(white_of(recipe), np.float32)[:, None, None]
    np.testing.assert_allclose(stored / white * full, counts, atol=full / 16000 if full < 255 else 0, rtol=1e-6)


def test_what_lies_beyond_the_type_is_cut() -> None:
    site = np.array([[[-0.1, 2.0]], [[-0.1, 20.0]]], np.float32)
    assert to_stored(site, FIXED).tolist() == [[[0, 65535]], [[0, 65535]]]
