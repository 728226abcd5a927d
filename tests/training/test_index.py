"""The index: from LoadData tables and plate maps to one row a site."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from model.errors import LayoutError, MissingChannelError
from training import index as module
from training.index import (
    IndexFile,
    channels_of,
    checked,
    index_plate,
    index_tree,
    read_index,
    write_index,
    write_index_of,
)
from training.simulate import CHANNELS


def test_every_site_of_every_plate_has_a_row_with_a_path_per_channel(index: pd.DataFrame) -> None:
    assert channels_of(index) == CHANNELS
    assert index["Metadata_Plate"].nunique() == 8
    assert len(index) == 8 * (16 + 8 + 1)
    assert all(Path(path).is_file() for path in index["Path_Mito"])
    assert set(index.loc[index["role"] == "control", "label"]) == {"DMSO"}
    assert index["pixel_size_um"].between(0.59, 0.71).all()


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_written_index_reads_back_the_same(index: pd.DataFrame, tmp_path: Path, ending: str) -> None:
    write_index(index, tmp_path / f"index.{ending}")
    pd.testing.assert_frame_equal(read_index(tmp_path / f"index.{ending}"), index, check_dtype=False)


def test_an_index_beside_its_images_can_be_moved_with_them(index: pd.DataFrame, plates_root: Path) -> None:
    write_index(index, plates_root / "moved.csv")
    assert str(plates_root) not in (plates_root / "moved.csv").read_text()


def test_a_site_that_is_there_twice_is_refused(index: pd.DataFrame) -> None:
    with pytest.raises(LayoutError, match="1 sites are there twice"):
        checked(pd.concat([index, index.iloc[:1]]))


def test_an_index_is_read_plate_by_plate(index: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)  # plates lie across batches
    for ending in ("parquet", "csv"):
        write_index(index, tmp_path / f"index.{ending}")
        opened = IndexFile.open(tmp_path / f"index.{ending}")
        assert (opened.channels, opened.sites) == (CHANNELS, len(index))
        plates = list(opened.plates())
        assert [rows["Metadata_Plate"].nunique() for rows in plates] == [1] * 8
        pd.testing.assert_frame_equal(pd.concat(plates, ignore_index=True), index, check_dtype=False)


def test_plates_with_different_columns_make_one_index(index: pd.DataFrame, tmp_path: Path) -> None:
    first, second, *_ = (rows for _, rows in index.groupby("Metadata_Plate"))
    write_index_of([first.assign(Metadata_Depth="1"), second.assign(Metadata_Time="noon")], tmp_path / "index.parquet")
    found = read_index(tmp_path / "index.parquet")
    assert found["Metadata_Depth"].notna().sum() == len(first)
    assert found["Metadata_Time"].notna().sum() == len(second)
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]


def test_remote_places_stay_as_they_are(index: pd.DataFrame, tmp_path: Path) -> None:
    remote = index.assign(Path_DNA=[f"s3://bucket/{number}.tif" for number in range(len(index))])
    write_index(remote, tmp_path / "index.csv")
    pd.testing.assert_frame_equal(read_index(tmp_path / "index.csv"), remote, check_dtype=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop(columns="role"), "lacks the columns role"),
        (lambda t: t[[name for name in t if not name.startswith("Path_")]], "lacks the columns Path_<channel>"),
        (lambda t: t.assign(role=["trt", *t["role"][1:]]), "the role is control or treated, not trt"),
        (
            lambda t: t.assign(Path_ER=[None, *t["Path_ER"][1:]]),
            "1 sites have no Path_ER, the first is simulated_01 SIM01_B01",
        ),
        (
            lambda t: t.assign(Metadata_Batch=["B", *t["Metadata_Batch"][1:]]),
            "plates of one name in several batches: SIM01B01P01",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_an_index_that_is_none_is_told(index: pd.DataFrame, tmp_path: Path, change: Any, told: str, ending: str) -> None:
    path = tmp_path / f"index.{ending}"
    rows = change(index)
    rows.to_parquet(path) if ending == "parquet" else rows.to_csv(path, index=False)
    with pytest.raises(LayoutError, match=told):
        read_index(path)
    with pytest.raises(LayoutError, match=told):
        list(IndexFile.open(path).plates())


def test_a_plates_rows_lie_together(index: pd.DataFrame, tmp_path: Path) -> None:
    index.iloc[[*range(1, len(index)), 0]].to_parquet(tmp_path / "index.parquet")
    with pytest.raises(LayoutError, match="the rows of plate SIM01B01P01 lie apart"):
        list(IndexFile.open(tmp_path / "index.parquet").plates())


def small_plate(folder: Path, *, role: str = "control", platemap: bool = True, image: bool = True) -> Path:
    folder.mkdir()
    names = ",".join(f"FileName_Orig{channel}" for channel in CHANNELS)
    row = ",".join(["L", "B", "P", "A01", "1", *(["a.tif"] * len(CHANNELS))])
    (folder / "load_data.csv").write_text(
        f"Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_Well,Metadata_Site,{names}\n{row}\n"
    )
    if platemap:
        (folder / "platemap.csv").write_text(f"well,role,label\nA01,{role},x\n")
    if image:
        (folder / "a.tif").touch()
    return folder


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"platemap": False}, "has no platemap.csv beside it"),
        ({"image": False}, r"5 of 5 images are not there, the first is .*a\.tif"),
    ],
)
def test_what_training_would_stumble_over_is_told_at_once(fault: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=told):
        index_tree(small_plate(tmp_path / "plate", **fault), CHANNELS)


def test_all_plates_that_cannot_be_indexed_are_told_at_once(tmp_path: Path) -> None:
    small_plate(tmp_path / "a", platemap=False)
    small_plate(tmp_path / "b", image=False)
    with pytest.raises(
        LayoutError, match=r"(?s)a/load_data\.csv has no platemap\.csv.*\n.*5 of 5 images are not there.*b/a\.tif"
    ):
        index_tree(tmp_path, CHANNELS)


def test_a_folder_without_plates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"no load_data\.csv"):
        index_tree(tmp_path, CHANNELS)


def test_a_channel_that_the_table_lacks_is_named(plates_root: Path) -> None:
    table = next(plates_root.rglob("load_data.csv"))
    with pytest.raises(MissingChannelError, match="FileName_OrigBrightfield"):
        index_plate(table, table.parent / "platemap.csv", ("Brightfield",))


def test_a_well_that_the_plate_map_lacks_is_named(plates_root: Path, tmp_path: Path) -> None:
    table = next(plates_root.rglob("load_data.csv"))
    (tmp_path / "platemap.csv").write_text("well,role,label\nA01,control,DMSO\n")
    with pytest.raises(LayoutError, match=r"does not name the wells [A-H]\d\d, "):
        index_plate(table, tmp_path / "platemap.csv", CHANNELS)
