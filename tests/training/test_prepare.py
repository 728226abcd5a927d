"""What is wrong with plates or their split is told before a step is trained."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from model.errors import LayoutError, LeakError, NoControlsError, RunError
from model.images import ImageRecipe
from tests.training.conftest import RECIPE
from training.fetch import fetch
from training.plates import open_plates
from training.train import Run, TrainingConfig, as_started, prepare_run, train


def refetched(index: pd.DataFrame, folder: Path, config: TrainingConfig, recipe: ImageRecipe = RECIPE) -> TrainingConfig:
    fetch(index, folder, recipe)
    return replace(config, plates=str(folder))


def test_an_image_of_a_training_plate_in_a_test_plate_is_refused(
    index: pd.DataFrame, config: TrainingConfig, run: Run, tmp_path: Path
) -> None:
    trained, tested = run.split.train[0], run.split.new_batch[0]
    rows = index.copy()
    control = rows.index[(rows["Metadata_Plate"] == trained) & (rows["role"] == "control")][1]
    other = rows.index[rows["Metadata_Plate"] == tested][4]
    copied = shutil.copy(rows.loc[control, "Path_DNA"], tmp_path / "copied.tif")
    rows.loc[other, "Path_DNA"] = str(copied)
    with pytest.raises(LeakError) as told:
        prepare_run(refetched(rows, tmp_path / "plates", config), tmp_path / "run")
    for part in (trained, tested, rows.loc[control, "Path_DNA"], str(copied), rows.loc[other, "Metadata_Well"]):
        assert part in told.value.detail


def test_one_image_twice_on_a_plate_is_reported(
    index: pd.DataFrame, config: TrainingConfig, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = index.copy()
    first, second = rows.index[rows["Metadata_Plate"] == run.split.train[0]][[2, 5]]
    rows.loc[second, "Path_ER"] = rows.loc[first, "Path_ER"]
    prepare_run(refetched(rows, tmp_path / "plates", config), tmp_path / "run")
    assert "1 images are there several times" in caplog.text
    assert f"well {rows.loc[second, 'Metadata_Well']} channel ER" in caplog.text


def test_a_given_split_is_used_and_checked(config: TrainingConfig, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "split.yaml"
    given = replace(config, split=str(path))
    path.write_text("train: [simulated_01/SIM01_B01]\nvalidation: [SIM01_B02]\nnew_lab: [simulated_02]\n")
    prepared, _ = prepare_run(given, tmp_path / "run")
    assert prepared.split.train == ("SIM01B01P01", "SIM01B01P02")
    assert len(prepared.split.new_lab) == 4
    assert prepared.recipe.mean != run.recipe.mean
    prepared.save()
    path.write_text("train: [simulated_01/SIM01_B01]\nvalidation: [SIM01B02P01]\nnew_batch: [SIM01B02P02]\n")
    with pytest.raises(LeakError, match=r"SIM01B02P02 \(new_batch\): its batch simulated_01/SIM01_B02 is of validation too"):
        prepare_run(given, tmp_path / "run")
    path.write_text("train: [SIM01B01P01]\nvalidation: [SIM01_B02]\n")
    with pytest.raises(RunError, match="started with other purposes of the plates SIM01B01P02, SIM02B01P01"):
        as_started(prepare_run(given, tmp_path / "run")[0])
    with pytest.raises(RunError, match="leave test_lab out"):
        prepare_run(replace(given, test_lab="simulated_02"), tmp_path / "run")


def test_a_plate_without_controls_stops_what_needs_them_alone(
    index: pd.DataFrame, config: TrainingConfig, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = run.split.train[0]
    rows = index[(index["Metadata_Plate"] != bare) | (index["role"] != "control")]
    own = refetched(rows, tmp_path / "plates", config)
    with pytest.raises(NoControlsError, match=f"plate {bare} has no negative-control wells"):
        train(own, tmp_path / "run", quiet=True)
    prepare_run(replace(own, method="erm"), tmp_path / "erm")
    assert f"no negative controls on {bare}: only methods that need none can use them" in caplog.text


def test_plates_without_a_treated_site_of_the_classes_are_named(
    index: pd.DataFrame, config: TrainingConfig, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*plates: str) -> TrainingConfig:
        rows = index[~index["Metadata_Plate"].isin(plates) | (index["role"] == "control")]
        return refetched(rows, tmp_path / "-".join(plates), config)

    trained, validated, tested = run.split.train[0], run.split.validation[0], run.split.new_batch[0]
    with pytest.raises(LayoutError, match=f"of the classes on {trained}, {validated}, of the plates to train"):
        prepare_run(without(trained, validated, tested), tmp_path / "run")
    prepare_run(without(tested), tmp_path / "run")
    assert f"no treated site of the classes on {tested}: nothing is tested there" in caplog.text


def test_a_class_without_images_is_named(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no training well is labelled typo; the labels are"):
        prepare_run(replace(config, classes=("typo", "antimitotic")), tmp_path / "run")


def test_a_network_larger_than_what_was_fetched_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"plate SIM01B01P01 was fetched with \d+ x \d+ pixels; the network asks for 500"):
        prepare_run(replace(config, size=500), tmp_path / "run")


def test_fields_need_not_be_square(index: pd.DataFrame, config: TrainingConfig, tmp_path: Path) -> None:
    rows = index[index["Metadata_Plate"] == index["Metadata_Plate"].iloc[0]].copy()
    (tmp_path / "images").mkdir()
    for name in [column for column in rows if column.startswith("Path_")]:
        for at, path in rows[name].items():
            own = tmp_path / "images" / f"{at}_{name}.tif"
            Image.open(path).crop((0, 0, 120, 90)).save(own)
            rows.loc[at, name] = str(own)
    recipe = replace(RECIPE, pixel_size_um=None, shrink=1)
    (plate,) = open_plates(Path(refetched(rows, tmp_path / "plates", config, recipe).plates)).values()
    assert plate.images.shape[2:] == (90, 120)
    assert plate.served(plate.control_rows, recipe).shape == (16, 5, 64, 64)
