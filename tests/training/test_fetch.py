"""Fetching: planes become plates on disk, once, whole or not at all, whatever stops it."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from model.errors import FetchError, LayoutError, RunError
from model.images import ImageRecipe, prepare_field
from model.layout import parse_layout
from tests.service.s3 import s3
from training.fetch import FetchOptions, _reader, fetch
from training.index import IndexFile, write_index
from training.objects import ObjectAccess
from training.plates import open_plates, plate_records, verify_plates
from training.simulate import CHANNELS, CLASSES

from .conftest import RECIPE

SKIPPING = FetchOptions(skip_bad_sites=True)


@pytest.fixture(scope="module")
def two(index: pd.DataFrame) -> pd.DataFrame:
    """The sites of two plates."""
    return index[index["Metadata_Batch"] == index["Metadata_Batch"].iloc[0]].reset_index(drop=True)


@pytest.fixture(scope="module")
def one(two: pd.DataFrame) -> pd.DataFrame:
    """The sites of one plate."""
    return two[two["Metadata_Plate"] == two["Metadata_Plate"].iloc[0]]


def content(folder: Path) -> dict[str, bytes]:
    """All finished files of a folder; nothing else of a plate is left in it."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".recipe.json.")]
    assert not [path for path in paths if path.suffix not in (".npy", ".parquet", ".json")]
    return {path.name: path.read_bytes() for path in paths}


# --- plates ----------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_fetched_again(one: pd.DataFrame, two: pd.DataFrame, tmp_path: Path) -> None:
    first = fetch(one, tmp_path, RECIPE)
    (name,) = first.written
    stamp = (tmp_path / f"{name}.npy").stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    again = fetch(two, tmp_path, RECIPE, progress=lambda done, total: told.append((done, total)))
    assert (again.there, len(again.written), again.sites) == ((name,), 1, 25)
    assert (tmp_path / f"{name}.npy").stat().st_mtime_ns == stamp
    assert told[0] == (25, 50)
    assert told[-1] == (50, 50)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_an_index_file_and_several_workers_give_the_same_bytes(two: pd.DataFrame, tmp_path: Path, ending: str) -> None:
    write_index(two, tmp_path / f"index.{ending}")
    fetch(two, tmp_path / "frame", RECIPE)
    fetch(IndexFile.open(tmp_path / f"index.{ending}"), tmp_path / "file", RECIPE, FetchOptions(workers=2))
    frame, file = content(tmp_path / "frame"), content(tmp_path / "file")
    assert {name for name in frame if frame[name] == file[name]} == set(frame) == set(file)


def test_a_plate_of_other_rows_or_another_recipe_is_refused(one: pd.DataFrame, tmp_path: Path) -> None:
    fetch(one, tmp_path, RECIPE)
    with pytest.raises(RunError, match="was fetched from another index: label differ"):
        fetch(one.assign(label="other"), tmp_path, RECIPE)
    with pytest.raises(RunError, match="another pixel_size_um"):
        fetch(one, tmp_path, replace(RECIPE, pixel_size_um=2.0))
    with pytest.raises(LayoutError, match="no paths of Brightfield; it has DNA, "):
        fetch(one, tmp_path, replace(RECIPE, channels=("Brightfield",)))


def test_columns_of_the_index_ride_along(one: pd.DataFrame, tmp_path: Path) -> None:
    fetch(one.assign(Metadata_JCP2022="JCP2022_033924"), tmp_path, RECIPE)
    stored = pd.read_parquet(next(tmp_path.glob("*.parquet")))
    assert set(stored["Metadata_JCP2022"]) == {"JCP2022_033924"}
    assert stored["pixel_size_um"].tolist() == one["pixel_size_um"].tolist()


@pytest.mark.parametrize(
    ("dtype", "stored", "steps"), [(np.uint8, "uint16", 256), (np.uint16, "uint16", 1), (np.float32, "float32", 1)]
)
def test_grey_levels_are_kept_as_the_camera_gave_them(
    dtype: type, stored: str, steps: int, one: pd.DataFrame, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    planes = (rng.random((2, 1, 32, 32)) * 250).astype(dtype)
    rows = one.iloc[:2].drop(columns=[f"Path_{channel}" for channel in CHANNELS])
    rows["Path_DNA"] = [str(tmp_path / f"{number}.tif") for number in range(2)]
    for path, plane in zip(rows["Path_DNA"], planes, strict=True):
        tifffile.imwrite(path, plane[0], photometric="minisblack")
    recipe = ImageRecipe(channels=("DNA",), size=8, shrink=2, scaling="fixed-scale", full_scale=(250.0,))
    fetch(rows, tmp_path / "plates", recipe)
    (plate,) = open_plates(tmp_path / "plates", CLASSES).values()
    assert (plate.images.dtype, plate.steps) == (stored, steps)
    np.testing.assert_array_equal(plate.unit(np.arange(2)), planes[..., ::2, ::2].astype(np.float32) / np.float32(250))


def test_a_pixel_size_is_rounded_as_the_service_rounds_it(one: pd.DataFrame, tmp_path: Path) -> None:
    size_um = 0.5039063  # 128 pixels of it are 65 of 1 µm, and 64 when it is rounded
    fetch(one.assign(pixel_size_um=size_um), tmp_path, replace(RECIPE, pixel_size_um=1.0, size=32))
    table = f"Metadata_Well,Metadata_Site,FileName_OrigDNA,Metadata_ImageResolutionX\nA01,1,a.tif,{size_um}e-6\n"
    served = prepare_field([np.arange(128.0 * 128).reshape(128, 128)], replace(RECIPE, pixel_size_um=1.0, size=32),
                           parse_layout(table, ["DNA"]).pixel_size_um)  # fmt: skip
    (plate,) = open_plates(tmp_path).values()
    assert plate.images.shape[2:] == served.shape[1:] == (64, 64)


# --- files that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(one: pd.DataFrame) -> pd.DataFrame:
    """A plate of two sites a well, of the same files."""
    sites = pd.concat([one.assign(Metadata_Site=site) for site in ("1", "2")])
    return sites.sort_values(["Metadata_Well", "Metadata_Site"], ignore_index=True)


@pytest.fixture
def broken(many: pd.DataFrame, tmp_path: Path) -> pd.DataFrame:
    """Three sites of one plate cannot be used: two files are bad, one is missing, one field is smaller."""
    rows = many.copy()
    (tmp_path / "text.tif").write_bytes(b"not a TIFF")
    (tmp_path / "cut.tif").write_bytes(Path(rows["Path_DNA"].iloc[4]).read_bytes()[:-999])
    for number, channel in enumerate(CHANNELS):
        tifffile.imwrite(tmp_path / f"{channel}.tif", np.arange(160 * 160, dtype=np.uint16).reshape(160, 160) + number)
        rows.iloc[9, rows.columns.get_loc(f"Path_{channel}")] = str(tmp_path / f"{channel}.tif")
    rows.iloc[0, rows.columns.get_loc("Path_ER")] = str(tmp_path / "text.tif")
    rows.iloc[0, rows.columns.get_loc("Path_RNA")] = str(tmp_path / "absent.tif")
    rows.iloc[4, rows.columns.get_loc("Path_DNA")] = str(tmp_path / "cut.tif")
    return rows


def test_all_files_of_a_plate_that_cannot_be_used_are_told_at_once(broken: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(FetchError) as told:
        fetch(broken, tmp_path / "plates", RECIPE)
    plate, wells = broken["Metadata_Plate"].iloc[0], broken["Metadata_Well"].tolist()
    lines = told.value.detail.splitlines()
    assert lines[0].startswith(f"plate {plate}: 4 files of 3 sites cannot be used; mend them, or leave those sites out with")
    assert [line.partition(": ")[0] for line in lines[1:4]] == [
        f"plate {plate} well {wells[0]} site 1 channel ER file {tmp_path / 'text.tif'}",
        f"plate {plate} well {wells[0]} site 1 channel RNA file {tmp_path / 'absent.tif'}",
        f"plate {plate} well {wells[4]} site 1 channel DNA file {tmp_path / 'cut.tif'}",
    ]
    assert f"well {wells[9]} site 2 files" in lines[4]
    assert "pixels, the plate's are" in lines[4]
    assert not list((tmp_path / "plates").glob("*.plate.json"))


def test_mended_files_alone_are_read_again(one: pd.DataFrame, tmp_path: Path) -> None:
    rows = elsewhere(one, tmp_path / "elsewhere")
    good = Path(rows["Path_ER"].iloc[3])
    kept = good.read_bytes()
    good.write_bytes(b"")
    with pytest.raises(FetchError, match="an empty file"):
        fetch(rows, tmp_path / "plates", RECIPE)
    good.write_bytes(kept)
    for path in (tmp_path / "elsewhere").iterdir():
        if not path.name.startswith(f"{rows['Metadata_Well'].iloc[3]}_"):
            path.unlink()
    assert fetch(rows, tmp_path / "plates", RECIPE).sites == 25
    fetch(one, tmp_path / "unbroken", RECIPE)
    (images,) = (tmp_path / "plates").glob("*.npy")
    assert images.read_bytes() == (tmp_path / "unbroken" / images.name).read_bytes()


def test_bad_sites_are_left_out_when_asked_for_and_recorded(
    broken: pd.DataFrame, many: pd.DataFrame, tmp_path: Path
) -> None:
    report = fetch(broken, tmp_path / "plates", RECIPE, SKIPPING)
    assert (report.sites, len(report.skipped)) == (47, 4)
    (plate,) = open_plates(tmp_path / "plates", CLASSES).values()
    assert plate_records(tmp_path / "plates")[plate.plate].skipped == report.skipped
    fetch(many, tmp_path / "whole", RECIPE)
    (whole,) = open_plates(tmp_path / "whole", CLASSES).values()
    kept = np.delete(np.arange(50), [0, 4, 9])
    assert plate.wells.tolist() == whole.wells[kept].tolist()
    np.testing.assert_array_equal(plate.images[:], whole.images[:][kept])
    np.testing.assert_array_equal(plate.moments_of(np.arange(47)), whole.moments_of(kept))
    again = fetch(broken, tmp_path / "plates", RECIPE)
    assert (again.there, again.skipped) == ((plate.plate,), report.skipped)


def test_more_than_a_few_sites_are_never_left_out(many: pd.DataFrame, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"not a TIFF")

    def told(wells: pd.Series) -> str:
        rows = many.copy()
        rows.loc[wells, "Path_ER"] = str(bad)
        with pytest.raises(FetchError) as error:
            fetch(rows, tmp_path / "plates", RECIPE, SKIPPING)
        assert not list((tmp_path / "plates").glob("*.plate.json"))
        return error.value.detail.splitlines()[0]

    label, controls = many["label"], many["role"] == "control"
    assert told(label == "antimitotic").endswith(
        "2 files of 2 sites cannot be used; those are all its sites of antimitotic, which are not left out; mend them:"
    )
    assert "6 sites cannot be used; that is more than 10 % of its 50 sites, which" in told(
        many.index.isin(np.flatnonzero(controls)[:6])
    )
    few = pd.concat([many[controls].iloc[:1], *[many[~controls]] * 3]).reset_index(drop=True)
    few["Metadata_Site"] = (few.index + 1).astype(str)
    few.loc[0, "Path_DNA"] = str(bad)
    with pytest.raises(FetchError, match="1 files of 1 sites cannot be used; those are all its controls, which are"):
        fetch(few, tmp_path / "few", RECIPE, SKIPPING)


def test_a_plate_takes_the_form_that_most_of_its_first_sites_have(many: pd.DataFrame, tmp_path: Path) -> None:
    rows = many.copy()
    for channel in CHANNELS:
        path = tmp_path / f"{channel}.tif"
        larger = np.pad(tifffile.imread(rows.loc[0, f"Path_{channel}"]), 16, mode="edge")
        tifffile.imwrite(path, larger, photometric="minisblack")
        rows.loc[0, f"Path_{channel}"] = str(path)
    report = fetch(rows, tmp_path / "plates", RECIPE, SKIPPING)
    assert report.sites == 49
    assert f"well {rows['Metadata_Well'].iloc[0]} site 1 files" in report.skipped[0]
    assert report.skipped[0].endswith(": the field is 80 x 80 pixels, the plate's are 64 x 64")


def test_planes_of_another_type_are_no_sites_of_the_plate(many: pd.DataFrame, tmp_path: Path) -> None:
    types = {np.dtype(kind).name: kind for kind in (np.uint8, np.uint16, np.float32)}
    for first, other in itertools.permutations(types, 2):
        rows = many.iloc[:6].copy()
        for number in range(6):
            for channel in CHANNELS:
                path = tmp_path / f"{number}-{channel}.tif"
                plane = (np.arange(128 * 128).reshape(128, 128) % 251).astype(types[other if number == 5 else first])
                tifffile.imwrite(path, plane, photometric="minisblack")
                rows.loc[number, f"Path_{channel}"] = str(path)
        for scaling in ({}, {"scaling": "fixed-scale", "full_scale": (251.0,) * 5}):
            recipe = replace(RECIPE, pixel_size_um=None, **scaling)  # type: ignore[arg-type]
            with pytest.raises(FetchError, match=f"site 2 files .*: the planes are {other}, the plate's are {first}$"):
                fetch(rows, tmp_path / "plates", recipe)
            shutil.rmtree(tmp_path / "plates")


def test_a_folder_that_is_gone_is_no_bad_file(many: pd.DataFrame, tmp_path: Path) -> None:
    rows = many.copy()
    rows.loc[7, "Path_RNA"] = str(tmp_path / "share" / "7.tif")
    with pytest.raises(FetchError, match=r"site 2 channel RNA file .*7.tif: its folder is not there; run again when"):
        fetch(rows, tmp_path / "plates", RECIPE, SKIPPING)


def test_a_folder_in_place_of_a_plane_is_a_bad_file(many: pd.DataFrame, tmp_path: Path) -> None:
    rows = many.copy()
    rows.iloc[1, rows.columns.get_loc("Path_DNA")] = str(tmp_path)
    with pytest.raises(FetchError, match=rf"site 2 channel DNA file {tmp_path}: it is a folder"):
        fetch(rows, tmp_path / "strict", RECIPE)
    report = fetch(rows, tmp_path / "plates", RECIPE, SKIPPING)
    assert [line.rpartition(": ")[2] for line in report.skipped] == ["it is a folder"]


@pytest.mark.parametrize("place", ["gs://bucket/a.tif", "http://host/a.tif"])
def test_a_place_that_is_not_read_is_told_with_those_that_are(one: pd.DataFrame, tmp_path: Path, place: str) -> None:
    with pytest.raises(FetchError, match=f"channel DNA file {place}: planes are read from s3:// and from disk: copy it"):
        fetch(one.assign(Path_DNA=place), tmp_path, RECIPE, SKIPPING)


def test_plates_that_are_not_resampled_though_the_recipe_asks_for_it_are_told(two: pd.DataFrame, tmp_path: Path) -> None:
    name = str(two["Metadata_Plate"].iloc[0])
    rows = two.assign(pixel_size_um=two["pixel_size_um"].where(two["Metadata_Plate"] != name))
    told = (f"plate {name}: 25 of 25 sites have no pixel size: not resampled to 1.196 µm, every 2-th pixel is taken",)
    assert fetch(rows, tmp_path / "plates", RECIPE).unsized == told
    assert fetch(rows, tmp_path / "plates", RECIPE).unsized == told
    assert fetch(rows, tmp_path / "halved", replace(RECIPE, pixel_size_um=None)).unsized == ()


def test_a_plate_of_which_nothing_can_be_used_is_never_skipped(one: pd.DataFrame, tmp_path: Path) -> None:
    rows = one.assign(**{f"Path_{channel}": str(tmp_path / "absent.tif") for channel in CHANNELS})
    with pytest.raises(FetchError, match="125 files of 25 sites cannot be used; no site of the plate can be used"):
        fetch(rows, tmp_path, RECIPE, SKIPPING)


# --- what stops it ---------------------------------------------------------------------------------------------------


def killed_at(line: int, index: pd.DataFrame, folder: Path) -> bool:
    """Fetch in a process that kills itself at the n-th line it runs of fetching; True where it was killed."""
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame, event, _argument):  # type: ignore[no-untyped-def]
            nonlocal lines
            if not frame.f_code.co_filename.endswith(("fetch.py", "drafts.py", "plates.py")):
                return None
            lines += event == "line"
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            _reader.cache_clear()  # its threads were left behind
            sys.settrace(trace)
            fetch(index, folder, RECIPE)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_line_it_goes_on_and_no_half_plate_looks_whole(two: pd.DataFrame, tmp_path: Path) -> None:
    rows = two.groupby("Metadata_Plate").head(5)
    fetch(rows, tmp_path / "unbroken", RECIPE)
    unbroken = content(tmp_path / "unbroken")
    rng = random.Random(7)
    finished: dict[str, int] = {}
    kills, ends, folder = 0, 0, tmp_path / "killed"
    for _ in range(60):
        killed = killed_at(rng.randrange(1, 3_000), rows, folder)
        if (folder / "recipe.json").is_file():
            verify_plates(folder)
        for name, stamp in finished.items():
            assert (folder / f"{name}.npy").stat().st_mtime_ns == stamp
        finished |= {name: (folder / f"{name}.npy").stat().st_mtime_ns for name in plate_records(folder)}
        if not killed:
            assert content(folder) == unbroken
            shutil.rmtree(folder)
            finished = {}
        kills, ends = kills + killed, ends + (not killed)
    assert min(kills, ends) > 5


def test_a_draft_that_lost_pixels_makes_them_again(one: pd.DataFrame, tmp_path: Path) -> None:
    fetch(one, tmp_path / "unbroken", RECIPE)
    assert killed_at(2_500, one, tmp_path / "killed")
    (draft,) = (tmp_path / "killed").glob("*.npy.partial")
    data = bytearray(draft.read_bytes())
    data[200:90_000] = bytes(89_800)
    draft.write_bytes(data)
    with next((tmp_path / "killed").glob("*.journal")).open("a") as journal:
        journal.write('[3, ["torn')
    fetch(one, tmp_path / "killed", RECIPE)
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")


def elsewhere(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The same planes in a folder of their own."""
    folder.mkdir()
    return rows.assign(**{
        f"Path_{channel}": [shutil.copy(path, folder) for path in rows[f"Path_{channel}"]] for channel in CHANNELS
    })  # fmt: skip


def test_files_that_changed_since_they_were_read_are_read_again(one: pd.DataFrame, tmp_path: Path) -> None:
    rows = elsewhere(one, tmp_path / "images")
    last = Path(rows["Path_Mito"].iloc[-1])
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    with pytest.raises(FetchError, match="1 files of 1 sites cannot be used"):
        fetch(rows, tmp_path / "plates", RECIPE)
    last.write_bytes(whole)
    for path in rows["Path_DNA"].iloc[:20]:
        tifffile.imwrite(path, tifffile.imread(path) // 2, photometric="minisblack")
    told: list[int] = []
    fetch(rows, tmp_path / "plates", RECIPE, progress=lambda done, _: told.append(done))
    assert told[0] == 4, "those whose files are as they were"
    fetch(rows, tmp_path / "unbroken", RECIPE)
    assert content(tmp_path / "plates") == content(tmp_path / "unbroken")


def test_a_draft_whose_files_all_changed_takes_their_form(one: pd.DataFrame, tmp_path: Path) -> None:
    rows = elsewhere(one, tmp_path / "images")
    last = Path(rows["Path_Mito"].iloc[-1])
    last.write_bytes(b"")
    with pytest.raises(FetchError, match="an empty file"):
        fetch(rows, tmp_path / "plates", RECIPE)
    for channel in CHANNELS:
        for path in rows[f"Path_{channel}"]:
            tifffile.imwrite(path, np.arange(140 * 140, dtype=np.float32).reshape(140, 140), photometric="minisblack")
    assert fetch(rows, tmp_path / "plates", RECIPE).sites == 25


def test_workers_end_with_a_killed_parent(two: pd.DataFrame, tmp_path: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system does not tell a process's children")
    write_index(two, tmp_path / "index.parquet")
    code = "from training.cli import main; main()"
    arguments = ["fetch", "index.parquet", "plates", "--size", "64", "--pixel-size-um", "1.196", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 3:  # both workers, and what counts their semaphores
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()  # ends when no worker holds its output any more
    assert not [worker for worker in workers if Path(f"/proc/{worker}/exe").exists()]
    assert len(fetch(two, tmp_path / "plates", RECIPE).written) == 2


def test_a_plate_that_another_process_is_fetching_is_left_to_it(two: pd.DataFrame, tmp_path: Path) -> None:
    from training.drafts import plate_lock
    from training.plates import PlateFiles

    name = str(two["Metadata_Plate"].iloc[0])
    with plate_lock(PlateFiles(tmp_path, name)):
        report = fetch(two, tmp_path, RECIPE)
    assert (report.elsewhere, len(report.written)) == ((name,), 1)
    assert fetch(two, tmp_path, RECIPE).written == (name,)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can make a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_what_was_made_is_kept(workers: int, index: pd.DataFrame, small_disk: Path) -> None:
    options = FetchOptions(workers=workers)
    with pytest.raises(FetchError, match=rf"no space is left in {small_disk}: make room and run again"):
        fetch(index, small_disk, RECIPE, options)
    kept = set(plate_records(small_disk))
    assert kept
    verify_plates(small_disk)
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    report = fetch(index, small_disk, RECIPE, options)
    assert set(report.there) == kept
    assert verify_plates(small_disk) == 8


def test_a_file_that_may_not_grow_is_told_as_a_full_disk(one: pd.DataFrame, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FetchError, match="no space is left in"):
            fetch(one, tmp_path, RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fetch(one, tmp_path, RECIPE).sites == 25


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    with s3(monkeypatch) as server:
        _reader.cache_clear()
        yield server
        _reader.cache_clear()


def uploaded(rows: pd.DataFrame, server) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    """Put a plate's planes into a bucket; return its rows with their URLs."""
    urls = {}
    for channel in CHANNELS:
        for path in rows[f"Path_{channel}"]:
            key = f"/bucket/images/plate 1/{Path(path).name}"
            server.objects[key] = Path(path).read_bytes()
            urls[path] = f"s3:/{key}"
    return rows.assign(**{f"Path_{channel}": rows[f"Path_{channel}"].map(urls) for channel in CHANNELS})


def test_planes_come_from_s3_through_hiccups(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    fetch(one, tmp_path / "disk", RECIPE)
    storage.hiccups = 7
    fetch(rows, tmp_path / "s3", RECIPE)
    assert storage.hiccups == 0
    (images,) = (tmp_path / "s3").glob("*.npy")
    assert images.read_bytes() == (tmp_path / "disk" / images.name).read_bytes()


def test_an_object_that_is_not_there_is_told_by_its_url(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    place = rows["Path_Mito"].iloc[2]
    del storage.objects[place.removeprefix("s3:/")]
    with pytest.raises(
        FetchError, match=rf"well {one['Metadata_Well'].iloc[2]} site 1 channel Mito file {place}: it is not there"
    ):
        fetch(rows, tmp_path, RECIPE)


def test_a_bucket_that_may_not_be_read_is_told_with_the_way_out(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    storage.forbidden = set(storage.objects)
    with pytest.raises(FetchError, match=r"well A01 site 1 channel DNA: s3://bucket/\S.* may not be read: .*--anonymous"):
        fetch(rows, tmp_path, RECIPE)


def test_an_object_that_changed_since_it_was_read_is_read_again(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    first, last = (rows["Path_DNA"].iloc[row].removeprefix("s3:/") for row in (0, -1))
    whole, storage.objects[last] = storage.objects[last], b""
    with pytest.raises(FetchError, match="an empty file"):
        fetch(rows, tmp_path / "plates", RECIPE)
    storage.objects[first] = storage.objects[last] = whole
    told: list[int] = []
    fetch(rows, tmp_path / "plates", RECIPE, progress=lambda done, _: told.append(done))
    assert told[0] == 23
    (plate,) = open_plates(tmp_path / "plates").values()
    assert plate.digests[0, 0] == plate.digests[-1, 0]


def test_a_key_may_hold_what_other_addresses_set_apart(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    storage.objects["/bucket/a?b#c.tif"] = storage.objects[rows["Path_DNA"].iloc[3].removeprefix("s3:/")]
    rows.loc[rows.index[3], "Path_DNA"] = "s3://bucket/a?b#c.tif"
    assert fetch(rows, tmp_path / "plates", RECIPE).sites == 25
    rows.loc[rows.index[3], "Path_DNA"] = "s3://bucket/a//b.tif"
    well = rows["Metadata_Well"].iloc[3]
    with pytest.raises(FetchError, match=f"well {well} site 1 channel DNA: s3://bucket/a//b.tif is no object's address: "):
        fetch(rows, tmp_path / "other", RECIPE)


def test_a_lost_network_is_told_and_fetching_goes_on_when_it_is_back(one: pd.DataFrame, tmp_path: Path, storage) -> None:  # type: ignore[no-untyped-def]
    rows = uploaded(one, storage)
    endpoint = os.environ["AWS_ENDPOINT"]
    away = FetchOptions(access=ObjectAccess(endpoint="http://127.0.0.1:9", retry_for_s=0.5))
    with pytest.raises(FetchError, match=r"plate \S+ well A01 site 1 channel DNA: s3://bucket/.* cannot be read"):
        fetch(rows, tmp_path, RECIPE, away)
    there = FetchOptions(access=ObjectAccess(anonymous=True, endpoint=endpoint))
    assert fetch(rows, tmp_path, RECIPE, there).sites == 25
