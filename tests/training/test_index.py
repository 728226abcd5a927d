"""The index: from LoadData tables and plate maps to one row a site."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from model.errors import LayoutError, WellNameError
from training import index as module
from training.index import (
    IndexFile,
    channels_of,
    checked,
    index_tree,
    read_index,
    require_channels,
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
        (
            lambda t: t.assign(role=["trt", *t["role"][1:]]),
            "the role is control or treated, not trt: first in well A01 of plate SIM01B01P01",
        ),
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
    row = ",".join(["L", "B", "P", "A01", "1", *(f"{channel}.tif" for channel in CHANNELS)])
    (folder / "load_data.csv").write_text(
        f"Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_Well,Metadata_Site,{names}\n{row}\n"
    )
    if platemap:
        (folder / "platemap.csv").write_text(f"well,role,label\nA01,{role},x\n")
    if image:
        for channel in CHANNELS:
            (folder / f"{channel}.tif").touch()
    return folder


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"platemap": False}, "no platemap.csv beside it: which wells are controls"),
        ({"image": False}, r"row 2: 5 of 5 images are not there, the first is .*DNA\.tif"),
    ],
)
def test_what_training_would_stumble_over_is_told_at_once(fault: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=told):
        index_tree(small_plate(tmp_path / "plate", **fault), CHANNELS)


def test_all_plates_that_cannot_be_indexed_are_told_at_once(tmp_path: Path) -> None:
    small_plate(tmp_path / "a", platemap=False)
    small_plate(tmp_path / "b", image=False)
    with pytest.raises(
        LayoutError, match=r"(?s)a/load_data\.csv: no platemap\.csv.*\n.*5 of 5 images are not there.*b/DNA\.tif"
    ):
        index_tree(tmp_path, CHANNELS)


def test_a_folder_without_plates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"no load_data\.csv"):
        index_tree(tmp_path, CHANNELS)


def told(root: Path, channels: tuple[str, ...] = CHANNELS) -> list[str]:
    """What is told of plates that cannot be indexed."""
    with pytest.raises(LayoutError) as error:
        index_tree(root, channels)
    first, *lines = error.value.detail.replace(f"{root}/", "").splitlines()
    assert first == f"{len(lines)} problems in the tables:"
    return lines


def changed(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_a_channel_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    small_plate(tmp_path / "a")
    say = "the LoadData table has no column URL_OrigBrightfield or FileName_OrigBrightfield"
    assert told(tmp_path, ("DNA", "Brightfield")) == [f"a/load_data.csv: {say}"]


def test_a_well_that_the_plate_map_lacks_is_named(tmp_path: Path) -> None:
    changed(small_plate(tmp_path / "a") / "platemap.csv", "A01", "A02")
    assert told(tmp_path) == ["a/load_data.csv row 2: well A01 of plate P is not on platemap.csv"]


@pytest.mark.parametrize("name", ["00117006", "1E05", "NA", "None", "1053601756", "2021_04"])
def test_names_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    changed(small_plate(tmp_path / "a") / "load_data.csv", "L,B,P,", f"{name},{name},{name},")
    changed(tmp_path / "a" / "platemap.csv", ",x", f",{name}")
    index = index_tree(tmp_path, CHANNELS)
    for ending in ("csv", "parquet"):
        write_index(index, tmp_path / f"index.{ending}")
        row = read_index(tmp_path / f"index.{ending}").iloc[0]
        assert row[["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "label"]].tolist() == [name] * 4


def test_an_image_given_for_two_channels_is_told(tmp_path: Path) -> None:
    changed(small_plate(tmp_path / "a") / "load_data.csv", "Mito.tif", "DNA.tif")
    assert told(tmp_path) == [
        "a/load_data.csv row 2: a/DNA.tif is named 2 times: one image for several wells, sites or channels"
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "it cannot be read: 'utf-8' codec can't decode"),
        (b"", "it cannot be read: its first line names no columns"),
        (b"Metadata_Source,Metadata_Batch\n", "no column Metadata_Plate, Metadata_Well, Metadata_Site; it has"),
        (None, "it names no site"),
    ],
)
def test_a_table_that_is_none_is_told_by_its_name(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = small_plate(tmp_path / "a") / "load_data.csv"
    path.write_bytes(path.read_bytes().splitlines()[0] if content is None else content)
    small_plate(tmp_path / "b", image=False)
    first, second = told(tmp_path)
    assert first.startswith(f"a/load_data.csv: {said}")
    assert second.startswith("b/load_data.csv row 2: 5 of 5 images are not there")


def test_a_row_that_was_cut_off_is_told(tmp_path: Path) -> None:
    changed(small_plate(tmp_path / "a") / "load_data.csv", ",RNA.tif,AGP.tif,Mito.tif\n", "")
    assert told(tmp_path) == ["a/load_data.csv row 2: 7 cells in a row, where the header names 10 columns"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("well,role,label\nA01,nothing,x\n", "well A01 has the role 'nothing'"),
        ("well,role,label\nA01,control,x,y\n", "line 2 of the table does not have the header's 3 columns"),
        ("well,role\nA01,control\n", "no label column"),
        ("well,label\nA01,x\n", "a plate map needs a role"),
        ("well,role,label\nA01,control,\udcff\n", "the table is not UTF-8 text"),
    ],
)
def test_a_plate_map_that_is_none_is_told_by_its_name(tmp_path: Path, text: str, said: str) -> None:
    path = small_plate(tmp_path / "a") / "platemap.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    (line,) = told(tmp_path)
    assert line.startswith(f"a/platemap.csv: {said}")


@pytest.mark.parametrize("metres", ["0.65", "abc", "0", "-6.5e-7", "inf", "nan", "6.5e-4"])
def test_a_resolution_that_is_none_is_told(tmp_path: Path, metres: str) -> None:
    with_resolutions(tmp_path, metres, metres)
    assert told(tmp_path) == [
        f"a/load_data.csv rows 2-3: Metadata_ImageResolutionX {metres} of plate P is no pixel size in metres"
    ]


@pytest.mark.parametrize(("metres", "listed"), [("1.3e-6", "0.65, 1.3"), ("", "0.65, none")])
def test_a_plate_has_one_pixel_size(tmp_path: Path, metres: str, listed: str) -> None:
    with_resolutions(tmp_path, "6.5e-7", metres)
    assert told(tmp_path) == [f"a/load_data.csv rows 2-3: plate P has several pixel sizes (µm): {listed}"]


def with_resolutions(root: Path, *metres: str) -> None:
    """A plate with a site for each resolution."""
    path = small_plate(root / "a") / "load_data.csv"
    header, row = path.read_text().splitlines()
    rows = [
        f"{row.replace('A01,1', f'A01,{n}').replace('.tif', f'{n}.tif')},{cell}" for n, cell in enumerate(metres, start=1)
    ]
    path.write_text("\n".join([f"{header},Metadata_ImageResolutionX", *rows]) + "\n")
    for name in [f"{channel}{n}.tif" for channel in CHANNELS for n in range(1, len(metres) + 1)]:
        (root / "a" / name).touch()


def made_by_hand(index: pd.DataFrame, ending: str, folder: Path) -> Path:
    path = folder / f"index.{ending}"
    index.to_parquet(path) if ending == "parquet" else index.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Metadata_Well": "{row} lower"}, "1 sites are there twice"),
        ({"Metadata_Well": "Z99"}, "plate SIM01B01P01: 'Z99' is not a well"),
        ({"Metadata_Site": "one"}, "plate SIM01B01P01: site 'one' is not a whole number"),
        ({"role": "treated", "Metadata_Site": "2"}, "well {well} of plate SIM01B01P01 has several roles or labels: "),
        ({"label": "x", "Metadata_Site": "2"}, "well {well} of plate SIM01B01P01 has several roles or labels: "),
        ({"Metadata_Site": "2", "pixel_size_um": "1.3"}, r"plate SIM01B01P01 has several pixel sizes \(µm\): "),
        ({"Metadata_Site": "2", "pixel_size_um": ""}, r"plate SIM01B01P01 has several pixel sizes \(µm\): .*, none"),
        ({"pixel_size_um": "0.6 um"}, "plate SIM01B01P01 well {well}: '0.6 um' is no pixel size in µm"),
        ({"pixel_size_um": "inf"}, "plate SIM01B01P01 well {well}: 'inf' is no pixel size in µm"),
        ({"pixel_size_um": "-0.6"}, "plate SIM01B01P01 well {well}: '-0.6' is no pixel size in µm"),
        ({"pixel_size_um": "598"}, "plate SIM01B01P01 well {well}: '598' is no pixel size in µm"),
        ({"Metadata_Plate": ""}, "1 sites have no Metadata_Plate"),
    ],
)
def test_an_index_made_by_hand_does_not_contradict_itself(
    index: pd.DataFrame, tmp_path: Path, changes: dict[str, str], said: str, ending: str
) -> None:
    plate = index[index["Metadata_Plate"] == "SIM01B01P01"].astype(str)
    control = plate[plate["role"] == "control"].iloc[[0]]
    well = control["Metadata_Well"].iloc[0]
    row = control.assign(**{name: cell.replace("{row} lower", well.lower()) for name, cell in changes.items()})
    path = made_by_hand(pd.concat([plate, row]), ending, tmp_path)
    with pytest.raises((LayoutError, WellNameError), match=said.replace("{well}", well)):
        read_index(path)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t: t.drop(columns="role"), "the index lacks the columns role"),
        (lambda t: t.iloc[:0], "the index has no rows"),
        (lambda t: t.assign(role="trt"), "the role is control or treated, not trt"),
    ],
)
def test_what_is_wrong_with_an_index_is_told_by_its_file(
    index: pd.DataFrame, tmp_path: Path, wrong: Callable[[pd.DataFrame], pd.DataFrame], said: str, ending: str
) -> None:
    path = made_by_hand(wrong(index), ending, tmp_path)
    with pytest.raises(LayoutError, match=f"^file {path}: {said}"):
        read_index(path)
    with pytest.raises(LayoutError, match=f"^file {path}: {said}"):
        list(IndexFile.open(path).plates())


@pytest.mark.parametrize(
    ("channel", "second"), [("DNA", "well A12 site 1 channel DNA"), ("ER", "well A12 site 1 channel ER")]
)
def test_a_file_that_an_index_gives_for_two_planes_is_told(
    index: pd.DataFrame, tmp_path: Path, channel: str, second: str
) -> None:
    rows = index.copy()
    first, other = rows.index[(rows["Metadata_Plate"] == "SIM01B01P01") & rows["Metadata_Well"].isin(["A01", "A12"])]
    rows.loc[other, f"Path_{channel}"] = rows.loc[first, "Path_DNA"]
    path = made_by_hand(rows, "parquet", tmp_path)
    with pytest.raises(LayoutError, match=f"is given for well A01 site 1 channel DNA and {second}: a plane has a file"):
        list(IndexFile.open(path).plates())


@pytest.mark.parametrize("names", [("DNA", "ER", "DNA"), ("DNA", "")])
def test_channels_are_named_once(names: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError, match="is empty or there twice: name each channel once"):
        require_channels(names)


def test_wells_of_an_index_made_by_hand_are_named_as_all_are(index: pd.DataFrame, tmp_path: Path) -> None:
    lower = index.assign(Metadata_Well=index["Metadata_Well"].str.lower().str.replace(r"^(.)0", r"\1", regex=True))
    for ending in ("csv", "parquet"):
        found = read_index(made_by_hand(lower, ending, tmp_path))
        pd.testing.assert_frame_equal(found, index, check_dtype=False)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_an_index_without_rows_is_refused(index: pd.DataFrame, tmp_path: Path, ending: str) -> None:
    path = made_by_hand(index.iloc[:0], ending, tmp_path)
    for read in (read_index, IndexFile.open):
        with pytest.raises(LayoutError, match="the index has no rows"):
            read(path)  # type: ignore[operator]


@contextmanager
def small_files() -> Iterator[None]:
    """No file may have more than 4 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("write", [write_index, lambda index, path: write_index_of([index], path)])
def test_an_index_is_written_whole_or_not_at_all(
    index: pd.DataFrame, tmp_path: Path, ending: str, write: Callable[[pd.DataFrame, Path], None]
) -> None:
    path = tmp_path / f"index.{ending}"
    path.write_text("before")
    with small_files(), pytest.raises(OSError, match="File too large"):
        write(index, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"
