"""Plates on disk: opened without being read, as they were fetched, or not at all."""

import fcntl
import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.bundle import recipe_json
from model.errors import RunError
from model.images import ImageRecipe
from training.dataset import NO_LABEL
from training.plates import (
    PlateFiles,
    StoredFiles,
    StoredImages,
    open_plates,
    plate_table,
    plates_recipe,
    require_recipe,
    verify_plates,
    write_recipe,
)
from training.simulate import CHANNELS, CLASSES


@pytest.fixture
def copy(fetched: Path, tmp_path: Path) -> Path:
    shutil.copytree(fetched, tmp_path / "copy")
    return tmp_path / "copy"


def test_plates_open_by_name_with_the_recipe_they_were_fetched_by(fetched: Path) -> None:
    plates = open_plates(fetched, CLASSES)
    assert len(plates) == 8
    assert plates_recipe(fetched) == ImageRecipe(channels=CHANNELS, size=64, pixel_size_um=1.196)
    assert set(plate_table(plates)["Metadata_Source"]) == {"simulated_01", "simulated_02"}
    assert all(plate.plate == name and plate.images.shape[:2] == (25, 5) for name, plate in plates.items())


def test_without_classes_names_are_there_and_labels_are_not(fetched: Path) -> None:
    plate = next(iter(open_plates(fetched).values()))
    assert set(plate.labels) == {NO_LABEL}
    assert set(CLASSES) < set(plate.names)
    again = plate.with_classes(CLASSES)
    assert {CLASSES[number] for number in again.labels[again.treated]} == set(CLASSES)


def test_every_planes_digest_is_known(fetched: Path) -> None:
    plate = next(iter(open_plates(fetched).values()))
    assert plate.digests.shape == (25, 5)
    assert len(np.unique(plate.digests)) == 125
    assert all(len(digest) == 64 for digest in plate.digests.flat)
    again = StoredFiles(PlateFiles(fetched, plate.plate).sites, CHANNELS[1:2]).digests()
    np.testing.assert_array_equal(again[:, 0], plate.digests[:, 1])
    (place,) = plate.files.places([3], [1])
    assert place.startswith("site 1 ")
    assert hashlib.sha256(Path(place.removeprefix("site 1 ")).read_bytes()).hexdigest() == plate.digests[3, 1]


def test_images_are_sent_to_workers_by_path(fetched: Path) -> None:
    images = next(iter(open_plates(fetched).values())).images
    rows = np.array([3, 1])
    assert len(pickle.dumps(images)) < 1_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images))[rows], images[rows])
    np.testing.assert_array_equal(np.asarray(images)[rows], images[rows])


def test_more_plates_may_be_read_than_files_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 100
    for number in range(200):
        np.save(tmp_path / f"{number}.npy", np.full((1, 1, 2, 2), number, np.uint8))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 150, limits[1]))
    try:
        found = [int(StoredImages(tmp_path / f"{number}.npy")[0].max()) for number in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == list(range(200))


@pytest.mark.parametrize("barcode", ["..", "../up", "a/b", ".hidden", "plate 1"])
def test_a_barcode_that_is_no_file_name_stays_in_the_folder(barcode: str, tmp_path: Path) -> None:
    path = PlateFiles(tmp_path, barcode).images
    assert path.parent == tmp_path
    assert path.resolve().parent == tmp_path.resolve()
    assert not path.name.startswith(".")


def test_a_folder_without_plates_says_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="anchorwell-train fetch"):
        open_plates(tmp_path)


def test_files_that_are_not_as_recorded_are_all_named(copy: Path) -> None:
    first, second, *_ = sorted(copy.glob("*.npy"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(RunError, match=rf"fetch them again:\n.*{first.name}\n.*{second.name}$"):
        open_plates(copy)


def test_a_changed_byte_is_found_by_verifying(copy: Path) -> None:
    assert verify_plates(copy) == 8
    images = next(copy.glob("*.npy"))
    data = bytearray(images.read_bytes())
    data[-1] ^= 1
    images.write_bytes(data)
    assert len(open_plates(copy)) == 8
    with pytest.raises(RunError, match=images.name):
        verify_plates(copy)


def changed(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes of a file that stays as long."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize("look", [open_plates, verify_plates])
def test_a_changed_byte_of_a_table_is_found_when_its_plate_is_opened(copy: Path, look: Callable[[Path], object]) -> None:
    table = next(copy.glob("*.parquet"))
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(RunError, match=rf"not as their plates' records say.*fetch them again:\n.*{table.name}$"):
        look(copy)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"(25, 5", b"(24, 5", r"its head says \(24, 5, \d+, \d+\) as uint8"),
        (b"(25, 5", b"(5, 25", r"its head says \(5, 25, \d+, \d+\) as uint8"),
        (b"'|u1'", b"'|i1'", r"its head says \(25, 5, \d+, \d+\) as int8"),
        (b"'|u1'", b"'|O1'", "its head"),
        (b"'shape'", b"'shape ", "its head cannot be read"),
        (b"NUMPY", b"BUMPY", "its head cannot be read"),
    ],
)
@pytest.mark.parametrize("look", [open_plates, verify_plates])
def test_pixels_of_another_shape_or_type_than_their_plates_are_told_when_it_is_opened(
    copy: Path, look: Callable[[Path], object], old: bytes, new: bytes, found: str
) -> None:
    images = next(copy.glob("*.npy"))
    if b"'<u1'" in images.read_bytes()[:128]:
        old, new = old.replace(b"|u1", b"<u1"), new.replace(b"|i1", b"<i1").replace(b"|O1", b"<O1")
    changed(images, old, new)
    with pytest.raises(RunError, match=rf"{images.name} \({found}.*expected are 25 sites of 5 channels as uint8"):
        look(copy)


@pytest.mark.parametrize("look", [open_plates, verify_plates])
def test_a_record_under_another_plates_name_is_refused(copy: Path, look: Callable[[Path], object]) -> None:
    for path in copy.glob("SIM01B01P01.*"):
        shutil.copy(path, copy / path.name.replace("SIM01B01P01", "COPY"))
    with pytest.raises(RunError, match=r"COPY\.plate\.json says it is of plate SIM01B01P01, whose record is SIM01B01P01"):
        look(copy)


@pytest.mark.parametrize(("name", "column"), [("lab", "Source"), ("batch", "Batch")])
@pytest.mark.parametrize("look", [open_plates, verify_plates])
def test_a_record_that_says_otherwise_than_its_table_is_told(
    copy: Path, look: Callable[[Path], object], name: str, column: str
) -> None:
    record = copy / "SIM01B01P01.plate.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), name: "another"}))
    with pytest.raises(RunError, match=rf"{record.name} \(its Metadata_{column} is another; SIM01B01P01\.parquet has "):
        look(copy)


def test_a_plate_of_another_version_is_refused(copy: Path) -> None:
    path = next(copy.glob("*.plate.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(RunError, match="has format 99"):
        open_plates(copy)


def test_plates_prepared_by_another_recipe_than_their_folders_are_named(copy: Path) -> None:
    linear = replace(plates_recipe(copy), scaling="fixed-scale", full_scale=(4095.0,) * 5)
    (copy / "recipe.json").unlink()
    with pytest.raises(RunError, match=r"recipe.json is not what the plates SIM01B01P01, .*SIM02B02P02 were prepared by"):
        write_recipe(copy, linear)
    assert not (copy / "recipe.json").exists()
    (copy / "recipe.json").write_text(json.dumps(recipe_json(linear)))
    for look in (open_plates, verify_plates):
        with pytest.raises(RunError, match=r"SIM01B01P01, .*SIM02B02P02 were prepared by: name another folder, or delete"):
            look(copy)


def test_of_two_first_calls_one_says_the_recipe(tmp_path: Path) -> None:
    first = ImageRecipe(channels=("DNA",), size=64)
    told: list[BaseException] = []

    def second() -> None:
        try:
            write_recipe(tmp_path, replace(first, shrink=3))
        except RunError as error:
            told.append(error)

    with (tmp_path / ".recipe.json.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        (tmp_path / "recipe.json").write_text(json.dumps(recipe_json(first)))
    thread.join()
    assert "another shrink (it is 2, asked for is 3)" in str(told[0])
    assert plates_recipe(tmp_path) == first


def test_damaged_files_are_named_with_what_to_do(copy: Path) -> None:
    record = next(copy.glob("*.plate.json"))
    content = record.read_bytes()
    for damage in (content[:40], b"[]", b'{"format": 1, "skipped": []}', b"\xff"):
        record.write_bytes(damage)
        with pytest.raises(RunError, match=rf"{record.name} is damaged \(.*\): delete it and fetch the plate again"):
            open_plates(copy)
    record.write_bytes(content)
    for damage in (b'{"x":', b'{"x": 1}', b"null"):
        (copy / "recipe.json").write_bytes(damage)
        with pytest.raises(RunError, match=r"recipe.json is damaged \(.*\): delete it and run the same fetch again"):
            open_plates(copy)


def test_unfinished_plates_are_told(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = sorted(open_plates(copy))
    assert not caplog.messages
    (copy / f"{names[0]}.journal").touch()  # of a plate that is complete
    (copy / "late 1.journal").touch()
    (copy / "late%2F2.npy.partial").touch()
    for look in (open_plates, verify_plates):
        caplog.clear()
        look(copy)
        assert caplog.messages == [
            f"{copy} is not fetched to its end, the plates late 1, late/2 are unfinished: run fetch again"
        ]


def test_verifying_names_plates_of_the_index_that_are_not_there(copy: Path) -> None:
    with pytest.raises(RunError, match="lacks the plates A, B of the index: run fetch again"):
        verify_plates(copy, ("B", "SIM01B01P01", "A"))


def test_another_recipe_is_told_by_what_differs(fetched: Path) -> None:
    with pytest.raises(RunError, match=r"another shrink \(it is 2, asked for is 3\)"):
        require_recipe(fetched, replace(plates_recipe(fetched), shrink=3))
    require_recipe(fetched, replace(plates_recipe(fetched), size=32, mean=(1.0,) * 5))


def test_a_scale_taken_from_the_controls_belongs_to_one_size(tmp_path: Path) -> None:
    recipe = ImageRecipe(channels=("DNA",), size=64, scaling="control-scale")
    write_recipe(tmp_path, recipe)
    with pytest.raises(RunError, match=r"another size \(it is 64, asked for is 32\)"):
        require_recipe(tmp_path, replace(recipe, size=32))
