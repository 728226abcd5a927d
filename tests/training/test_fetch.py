"""Fetching: planes become plates on disk, once, whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.errors import NotATiffError, RunError
from training.fetch import fetch
from training.plates import open_plates
from training.simulate import CLASSES

from .conftest import RECIPE


def one_plate(index: pd.DataFrame) -> pd.DataFrame:
    return index[index["Metadata_Plate"] == index["Metadata_Plate"].iloc[0]]


def test_what_is_there_is_not_fetched_again(index: pd.DataFrame, tmp_path: Path) -> None:
    first = fetch(one_plate(index), tmp_path, RECIPE)
    name = first.written[0]
    stamp = (tmp_path / f"{name}.npy").stat().st_mtime_ns
    again = fetch(index[index["Metadata_Batch"] == index["Metadata_Batch"].iloc[0]], tmp_path, RECIPE)
    assert (again.there, len(again.written), again.sites) == ((name,), 1, 25)
    assert (tmp_path / f"{name}.npy").stat().st_mtime_ns == stamp


def test_several_workers_write_the_same_bytes(index: pd.DataFrame, tmp_path: Path) -> None:
    for workers in (1, 2):
        fetch(one_plate(index), tmp_path / str(workers), RECIPE, workers=workers)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_a_plate_of_other_rows_or_another_recipe_is_refused(index: pd.DataFrame, tmp_path: Path) -> None:
    rows = one_plate(index)
    fetch(rows, tmp_path, RECIPE)
    with pytest.raises(RunError, match="was fetched from another index: label differ"):
        fetch(rows.assign(label="other"), tmp_path, RECIPE)
    with pytest.raises(RunError, match="another pixel_size_um"):
        fetch(rows, tmp_path, replace(RECIPE, pixel_size_um=2.0))


def test_fixed_scaling_keeps_intensity_and_percentile_scaling_does_not(index: pd.DataFrame, tmp_path: Path) -> None:
    fetch(one_plate(index), tmp_path / "fixed", replace(RECIPE, scaling="fixed", full_scale=(65535.0,) * 5))
    (plate,) = open_plates(tmp_path / "fixed", CLASSES).values()
    assert plate.images.dtype == np.uint16
    by_pixels = plate.images[:].mean(axis=(2, 3))
    assert np.corrcoef(by_pixels[:, 0], plate.intensities[:, 0, 0])[0, 1] > 0.9
    fetch(one_plate(index), tmp_path / "percentile", RECIPE)
    (scaled,) = open_plates(tmp_path / "percentile", CLASSES).values()
    assert scaled.images[:].max() == 255


def test_a_file_that_cannot_be_used_is_named(index: pd.DataFrame, tmp_path: Path) -> None:
    broken = index.iloc[:1].copy()
    (tmp_path / "broken.tif").write_bytes(b"not a TIFF")
    broken["Path_ER"] = str(tmp_path / "broken.tif")
    with pytest.raises(NotATiffError, match=r"plate SIM\S+ well A01 site 1 channel ER file \S+broken\.tif: the file is not"):
        fetch(broken, tmp_path / "plates", RECIPE)
