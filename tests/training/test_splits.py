"""Splits hold out whole plates, whole batches and whole labs."""

import pandas as pd
import pytest

from model.errors import LayoutError
from training.splits import Split, split_by_batch


def table(labs: int, batches: int, plates: int) -> pd.DataFrame:
    return pd.DataFrame([
        {"Metadata_Source": f"L{lab}", "Metadata_Batch": f"L{lab}B{batch}", "Metadata_Plate": f"L{lab}B{batch}P{plate}"}
        for lab in range(labs) for batch in range(batches) for plate in range(plates)
    ])  # fmt: skip


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


def test_an_unknown_lab_is_refused() -> None:
    with pytest.raises(LayoutError, match="no lab 'L9'"):
        split_by_batch(table(2, 2, 2), test_lab="L9")


def test_a_plate_with_two_purposes_is_refused() -> None:
    with pytest.raises(LayoutError, match="two purposes"):
        Split(train=("A",), validation=("A",))
