"""Splits hold out whole plates, whole batches and whole labs, and nothing tested is seen in training."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.errors import LayoutError, LeakError
from tests.training.plates import made_up_plate
from training.dataset import PlateSites
from training.splits import Split, check_split, read_split, refuse_repeated_images, repeated_images, split_by_batch


def table(labs: int, batches: int, plates: int) -> pd.DataFrame:
    return pd.DataFrame([
        {"Metadata_Source": f"L{lab}", "Metadata_Batch": f"L{lab}B{batch}", "Metadata_Plate": f"L{lab}B{batch}P{plate}"}
        for lab in range(labs) for batch in range(batches) for plate in range(plates)
    ])  # fmt: skip


# --- by rule ---------------------------------------------------------------------------------------------------------


def test_a_lab_held_out_is_in_no_other_part() -> None:
    split = split_by_batch(table(3, 3, 2), test_lab="L2")
    assert set(split.new_lab) == {f"L2B{b}P{p}" for b in range(3) for p in range(2)}
    assert not any(plate.startswith("L2") for plate in split.train + split.validation + split.in_domain + split.new_batch)


def test_validation_and_new_batches_are_whole_batches_that_training_never_sees() -> None:
    split = split_by_batch(table(3, 3, 2), test_lab="L2")
    assert split.validation == ("L0B2P0", "L0B2P1")
    assert split.new_batch == ("L1B2P0", "L1B2P1")
    assert {plate[:4] for plate in split.train} == {"L0B0", "L0B1", "L1B0", "L1B1"}
    assert {plate[:4] for plate in split.in_domain} == {"L0B0", "L0B1", "L1B0", "L1B1"}


def test_one_lab_gives_its_last_two_batches() -> None:
    split = split_by_batch(table(1, 4, 1))
    assert (split.validation, split.new_batch) == (("L0B2P0",), ("L0B3P0",))
    assert split.train == ("L0B0P0", "L0B1P0")


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(LayoutError, match="three experimental batches"):
        split_by_batch(table(1, 2, 2))


def of_batches(**batches: int) -> pd.DataFrame:
    """Labs with so many batches of one plate each."""
    return pd.DataFrame([
        {"Metadata_Source": lab, "Metadata_Batch": f"{lab}{batch}", "Metadata_Plate": f"{lab}{batch}"}
        for lab, count in batches.items() for batch in range(count)
    ])  # fmt: skip


def test_a_lab_of_one_batch_does_not_take_the_turn_that_validation_needs() -> None:
    alone = split_by_batch(of_batches(A=1, B=3))
    assert (alone.train, alone.validation, alone.new_batch) == (("A0", "B0", "B1"), ("B2",), ())
    two = split_by_batch(of_batches(A=1, B=2, C=1, D=2))
    assert (two.train, two.validation, two.new_batch) == (("A0", "B0", "C0", "D0"), ("B1",), ("D1",))


def test_a_lab_of_one_batch_takes_its_turn_where_enough_is_left() -> None:
    split = split_by_batch(of_batches(A=1, B=2, C=2, D=2))
    assert (split.validation, split.new_batch) == (("C1",), ("B1", "D1"))


def test_an_unknown_lab_is_refused() -> None:
    with pytest.raises(LayoutError, match="no lab 'L9' in the index; there are L0, L1"):
        split_by_batch(table(2, 2, 2), test_lab="L9")


def test_plates_with_two_purposes_are_named() -> None:
    with pytest.raises(LeakError, match=r"two purposes in the split: A \(train and validation\), B \(train and new_lab\)"):
        Split(train=("A", "B"), validation=("A",), new_lab=("B",))


@pytest.mark.parametrize(("labs", "test_lab"), [(1, None), (2, None), (3, "L2")])
def test_what_the_rule_makes_leaks_nothing(labs: int, test_lab: str | None) -> None:
    plates = table(labs, 4, 3)
    check_split(split_by_batch(plates, test_lab), plates)


# --- from a file -----------------------------------------------------------------------------------------------------

WRITTEN = {"train": ["L0B0", "L1/L1B0"], "validation": ["L0B1P0", "L0B1P1"], "new_batch": ["L1B1"], "new_lab": ["L2"]}


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_split_names_plates_batches_and_labs(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"split.{ending}"
    path.write_text(json.dumps(WRITTEN) if ending == "json" else "".join(f"{p}: {n}\n" for p, n in WRITTEN.items()))
    split = read_split(path, table(3, 2, 2))
    assert split == Split(
        train=("L0B0P0", "L0B0P1", "L1B0P0", "L1B0P1"),
        validation=("L0B1P0", "L0B1P1"),
        new_batch=("L1B1P0", "L1B1P1"),
        new_lab=("L2B0P0", "L2B0P1", "L2B1P0", "L2B1P1"),
    )
    check_split(split, table(3, 2, 2))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: [", "cannot be read"),
        ("- train\n", "is not a list of names for each purpose of train, validation, in_domain, new_batch, new_lab"),
        (
            "train: [L0B0]\nvalidation: [L0B1]\ntrain: [L1B0]\n",
            "split.yaml cannot be read: train is there twice: give all of its names in one list",
        ),
        ("train: L0B0\n", "is not a list of names for each purpose"),
        (
            "train: [L0B0, nowhere]\nvalidation: [shared]\ntest: [L1B0]\n",
            "no purpose 'test'; .*\ntrain: nowhere is no plate, .*\nvalidation: shared is the name of several things",
        ),
        ("train: [L0B0]\nvalidation: [L0B0P1]\n", r"two purposes in the split: L0B0P1 \(train and validation\)"),
        ("train: [L0B0]\n", "plates of held-out batches to validate on"),
    ],
)
def test_a_split_that_is_none_is_told_all_that_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "split.yaml").write_text(text)
    plates = table(2, 2, 2)
    plates.loc[plates["Metadata_Batch"].isin(["L0B1", "L1B1"]), "Metadata_Batch"] = "shared"
    with pytest.raises((LayoutError, LeakError), match=told):
        read_split(tmp_path / "split.yaml", plates)


def test_a_purpose_that_is_there_twice_in_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text('{"train": ["L0B0"], "validation": ["L0B1"], "train": ["L1B0"]}')
    with pytest.raises(LayoutError, match=r"split.json cannot be read: train is there twice"):
        read_split(tmp_path / "split.json", table(2, 2, 2))


@pytest.mark.parametrize("name", ["0012", "2021_04_26", "1e5", "yes", "null"])
def test_names_in_a_split_are_text_as_it_stands(name: str, tmp_path: Path) -> None:
    (tmp_path / "split.yaml").write_text(f"train: [{name}]\nvalidation: [L0B1]\n")
    plates = table(1, 2, 1)
    plates.loc[0, "Metadata_Plate"] = name
    assert read_split(tmp_path / "split.yaml", plates).train == (name,)


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_batches_and_labs_on_both_sides_are_all_named() -> None:
    split = Split(
        train=("L0B0P0", "L0B1P0", "L1B0P0"),
        validation=("L0B1P1", "L0B2P1"),
        in_domain=("L0B0P1", "L1B1P0"),
        new_batch=("L0B2P0",),
        new_lab=("L1B2P0", "L2B0P0"),
    )
    with pytest.raises(LeakError) as told:
        check_split(split, table(3, 3, 2))
    assert told.value.detail.splitlines()[1:] == [
        "plate L0B1P1 (validation): its batch L0/L0B1 is of train too (L0B1P0)",
        "plate L0B2P0 (new_batch): its batch L0/L0B2 is of validation too (L0B2P1)",
        "plate L1B2P0 (new_lab): its lab L1 is of train too (L1B0P0)",
        "plate L1B2P0 (new_lab): its lab L1 is of in_domain too (L1B1P0)",
        "plate L1B1P0 (in_domain): its batch L1/L1B1 is not trained on, so it is a new one",
    ]


def test_a_new_batch_of_a_lab_that_is_not_trained_on_is_told_to_be_of_a_new_lab() -> None:
    split = Split(train=("L0B0P0",), validation=("L1B1P0",), new_batch=("L0B1P0", "L1B0P0"))
    with pytest.raises(LeakError) as told:
        check_split(split, table(2, 2, 1))
    assert told.value.detail.splitlines()[1:] == [
        "plate L1B0P0 (new_batch): its lab L1 is not trained on, so it is a new one"
    ]


def test_two_labs_may_name_a_batch_alike() -> None:
    plates = table(2, 2, 1).assign(Metadata_Batch=lambda t: t["Metadata_Batch"].str[2:])
    check_split(Split(train=("L0B0P0",), validation=("L0B1P0",), new_lab=("L1B0P0", "L1B1P0")), plates)


def test_a_plate_that_was_not_fetched_is_named() -> None:
    with pytest.raises(LayoutError, match="plates that were not fetched: P9"):
        check_split(Split(train=("L0B0P0",), validation=("P9",)), table(1, 1, 1))


@dataclass(frozen=True)
class WrittenFiles:
    """Digests that are written down."""

    table: np.ndarray

    def digests(self) -> np.ndarray:
        return self.table

    def places(self, rows, channels) -> list[str]:
        return [f"site 1 {row}-{channel}.tif" for row, channel in zip(rows, channels, strict=True)]


def plates(*names: str) -> dict[str, PlateSites]:
    """Plates of which no two planes are the same."""
    found = {}
    for number, name in enumerate(names):
        digests = np.array(
            [[f"{number:08x}{row:04x}{channel:04x}".ljust(64, "a") for channel in range(2)] for row in range(48)]
        )
        found[name] = replace(made_up_plate(name), files=WrittenFiles(digests))
    return found


SPLIT = Split(train=("A", "B"), validation=("C",), new_batch=("D",))


def test_planes_that_differ_are_no_leak_even_where_their_digests_begin_alike() -> None:
    some = plates("A", "B", "C", "D")
    some["D"].digests[3, 1] = some["A"].digests[0, 0][:-1] + "b"
    assert refuse_repeated_images(SPLIT, some) == []


def test_an_image_of_two_purposes_is_refused_and_every_place_named() -> None:
    some = plates("A", "B", "C", "D")
    some["D"].digests[3, 1] = some["A"].digests[0, 0]
    some["C"].digests[5, 0] = some["B"].digests[7, 1]
    with pytest.raises(LeakError) as told:
        refuse_repeated_images(SPLIT, some)
    first, *lines = told.value.detail.splitlines()
    assert first == "2 images have several purposes in the split:"

    def place(plate: str, row: int, channel: int) -> str:
        return f"plate {plate} well {some[plate].wells[row]} channel {'AB'[channel]} site 1 {row}-{channel}.tif"

    assert sorted(lines) == [
        f"new_batch and train: {place('A', 0, 0)} = {place('D', 3, 1)}",
        f"train and validation: {place('B', 7, 1)} = {place('C', 5, 0)}",
    ]


def test_an_image_that_repeats_within_one_purpose_is_reported() -> None:
    some = plates("A", "B", "C", "D")
    some["A"].digests[3, 1] = some["A"].digests[0, 0]
    some["B"].digests[9, 1] = some["A"].digests[0, 0]
    (image,) = refuse_repeated_images(SPLIT, some)
    assert image.plates == ("A", "A", "B")
    assert str(image).count(" = ") == 2


def test_plates_without_files_repeat_nothing() -> None:
    assert list(repeated_images([made_up_plate("A"), made_up_plate("B")])) == []
