"""Which plates train, which stop training, and which test what: whole plates, whole experimental batches, whole labs."""

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from model.errors import LayoutError


@dataclass(frozen=True)
class Split:
    """Plates by purpose; no plate has two.

    ``validation`` holds whole experimental batches that training never sees and stops on. ``in_domain`` are other plates
    of training batches, ``new_batch`` whole other batches of training labs, ``new_lab`` a whole other lab.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    in_domain: tuple[str, ...] = ()
    new_batch: tuple[str, ...] = ()
    new_lab: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plates = [plate for plates in asdict(self).values() for plate in plates]
        if len(plates) != len(set(plates)):
            raise LayoutError("a plate has two purposes in the split")
        if not self.train or not self.validation:
            raise LayoutError("a split needs training plates and plates of held-out batches to validate on")

    def tests(self) -> dict[str, tuple[str, ...]]:
        """Plates of each test setting that has any."""
        settings = {"in_domain": self.in_domain, "new_batch": self.new_batch, "new_lab": self.new_lab}
        return {name: plates for name, plates in settings.items() if plates}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Split":
        """Read what ``dataclasses.asdict`` made."""
        return cls(**{name: tuple(plates) for name, plates in value.items()})


def split_by_batch(index: pd.DataFrame, test_lab: str | None = None) -> Split:
    """Split an index by experimental batch, and one lab apart.

    Of every lab but ``test_lab`` the last batch (by name) is held out: for validation in the first such lab, for the
    new-batch test in the second, and so on in turn. A single lab gives its last batch to the test and the one before to
    validation. In every training batch with two plates or more the last plate is the in-domain test.

    Raises:
        LayoutError: an unknown lab, or too few batches.
    """
    plates = index[["Metadata_Source", "Metadata_Batch", "Metadata_Plate"]].drop_duplicates()
    if test_lab is not None and test_lab not in set(plates["Metadata_Source"]):
        raise LayoutError(f"no lab {test_lab!r} in the index")
    labs = sorted(set(plates["Metadata_Source"]) - {test_lab})
    purposes: dict[str, list[str]] = {"train": [], "validation": [], "in_domain": [], "new_batch": [], "new_lab": []}
    held_out = _held_out_batches(plates, labs)
    for (lab, batch), members in plates.groupby(["Metadata_Source", "Metadata_Batch"], sort=True):
        names = sorted(members["Metadata_Plate"])
        if lab == test_lab:
            purposes["new_lab"] += names
        elif (lab, batch) in held_out:
            purposes[held_out[str(lab), str(batch)]] += names
        else:
            tested = 1 if len(names) > 1 else 0
            purposes["train"] += names[: len(names) - tested]
            purposes["in_domain"] += names[len(names) - tested :]
    return Split(**{name: tuple(members) for name, members in purposes.items()})


def _held_out_batches(plates: pd.DataFrame, labs: list[str]) -> dict[tuple[str, str], str]:
    batches = {lab: sorted(set(plates.loc[plates["Metadata_Source"] == lab, "Metadata_Batch"])) for lab in labs}
    if len(labs) == 1:
        names = batches[labs[0]]
        if len(names) < 3:  # noqa: PLR2004 (train, validate, test)
            raise LayoutError(f"one lab needs three experimental batches or more to split; {labs[0]} has {len(names)}")
        return {(labs[0], names[-1]): "new_batch", (labs[0], names[-2]): "validation"}
    return {
        (lab, batches[lab][-1]): "new_batch" if place % 2 else "validation"
        for place, lab in enumerate(labs)
        if len(batches[lab]) > 1
    }
