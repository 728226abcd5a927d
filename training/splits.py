"""Which plates train, which stop training, and which test what: whole plates, whole experimental batches, whole labs.

A split under which something tested would have been seen in training is refused, whoever made it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from model.errors import LayoutError, LeakError
from training.dataset import PlateSites

LAB, BATCH, PLATE = "Metadata_Source", "Metadata_Batch", "Metadata_Plate"
_DIGEST_BYTES = 8


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
        purposes: dict[str, list[str]] = {}
        for purpose, plates in asdict(self).items():
            for plate in plates:
                purposes.setdefault(plate, []).append(purpose)
        twice = [f"{plate} ({' and '.join(found)})" for plate, found in purposes.items() if len(found) > 1]
        if twice:
            raise LeakError(f"plates with two purposes in the split: {', '.join(twice)}")
        if not self.train or not self.validation:
            raise LayoutError("a split needs training plates and plates of held-out batches to validate on")

    def tests(self) -> dict[str, tuple[str, ...]]:
        """Plates of each test setting that has any."""
        settings = {"in_domain": self.in_domain, "new_batch": self.new_batch, "new_lab": self.new_lab}
        return {name: plates for name, plates in settings.items() if plates}

    def purposes(self) -> dict[str, str]:
        """Return the purpose of every plate that has one."""
        return {plate: purpose for purpose, plates in asdict(self).items() for plate in plates}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Split":
        """Read what ``dataclasses.asdict`` made."""
        return cls(**{name: tuple(plates) for name, plates in value.items()})


# --- made by rule ----------------------------------------------------------------------------------------------------


def split_by_batch(index: pd.DataFrame, test_lab: str | None = None) -> Split:
    """Split an index by experimental batch, and one lab apart.

    Of every lab but ``test_lab`` that has two batches or more the last one (by name) is held out: for validation in the
    first lab, for the new-batch test in the second, and so on in turn. A lab of one batch takes its turn too, but where
    nothing would be left to validate on. A single lab gives its last batch to the test and the one before to validation.
    In every training batch with two plates or more the last plate is the in-domain test.

    Raises:
        LayoutError: an unknown lab, or too few batches.
    """
    plates = index[[LAB, BATCH, PLATE]].drop_duplicates()
    if test_lab is not None and test_lab not in set(plates[LAB]):
        raise LayoutError(f"no lab {test_lab!r} in the index; there are {', '.join(sorted(set(plates[LAB])))}")
    labs = sorted(set(plates[LAB]) - {test_lab})
    purposes: dict[str, list[str]] = {"train": [], "validation": [], "in_domain": [], "new_batch": [], "new_lab": []}
    held_out = _held_out_batches(plates, labs)
    for (lab, batch), members in plates.groupby([LAB, BATCH], sort=True):
        names = sorted(members[PLATE])
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
    batches = {lab: sorted(set(plates.loc[plates[LAB] == lab, BATCH])) for lab in labs}
    if len(labs) == 1:
        names = batches[labs[0]]
        if len(names) < 3:  # noqa: PLR2004 (train, validate, test)
            raise LayoutError(f"one lab needs three experimental batches or more to split; {labs[0]} has {len(names)}")
        return {(labs[0], names[-1]): "new_batch", (labs[0], names[-2]): "validation"}
    several = [lab for lab in labs if len(batches[lab]) > 1]
    turns = labs if any(lab in several for lab in labs[::2]) else several
    return {
        (lab, batches[lab][-1]): "new_batch" if place % 2 else "validation"
        for place, lab in enumerate(turns)
        if lab in several
    }


# --- given in a file -------------------------------------------------------------------------------------------------


def read_split(path: Path, plates: pd.DataFrame) -> Split:
    """Read a split that was written by hand: YAML or JSON, purpose → names of plates, batches or labs.

    A batch may be named with its lab before it (``source_3/Batch1``). Plates that it does not name are not used.

    Raises:
        LayoutError: it is no such file, or a name is no plate's, batch's or lab's, or that of several; tells all of them.
        LeakError: a plate has two purposes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_each_once) if path.suffix == ".json" else _yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise LayoutError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    known = [item.name for item in fields(Split)]
    if not isinstance(content, dict) or not all(isinstance(names, list) for names in content.values()):
        raise LayoutError(f"{path} is not a list of names for each purpose of {', '.join(known)}")
    problems = [f"no purpose {purpose!r}; there are {', '.join(known)}" for purpose in content if purpose not in known]
    named = _names(plates)
    found: dict[str, tuple[str, ...]] = {"train": (), "validation": ()}
    for purpose, names in content.items():
        several = [f"{name} is the name of several things" for name in names if len(named.get(str(name), ())) > 1]
        absent = [f"{name} is no plate, batch or lab that was fetched" for name in names if str(name) not in named]
        problems += [f"{purpose}: {problem}" for problem in (*several, *absent)]
        found[purpose] = tuple(dict.fromkeys(plate for name in names for plate in named.get(str(name), ((),))[0]))
    if problems:
        listed = "\n".join(problems)
        raise LayoutError(f"{path} names what is not there, or not one thing alone:\n{listed}")
    return Split(**found)


def _yaml(text: str) -> Any:
    """Read YAML whose every name is text as it stands: 0012 is no number."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (it makes lists, mappings and text alone)


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Refuses a mapping with a key twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _require_once([str(key.value) for key, _ in node.value])
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _require_once([key for key, _ in pairs])
    return dict(pairs)


def _require_once(keys: Sequence[str]) -> None:
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is there twice: give all of its names in one list")


def _names(plates: pd.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """Return every name that a split may use, and the plates of each thing that has it."""
    named: dict[str, list[tuple[str, ...]]] = {}
    for plate in plates[PLATE]:
        named.setdefault(str(plate), []).append((str(plate),))
    for (lab, batch), members in plates.groupby([LAB, BATCH], sort=True):
        own = tuple(sorted(members[PLATE]))
        named.setdefault(str(batch), []).append(own)
        named.setdefault(f"{lab}/{batch}", []).append(own)
    for lab, members in plates.groupby(LAB, sort=True):
        named.setdefault(str(lab), []).append(tuple(sorted(members[PLATE])))
    return {name: list(dict.fromkeys(things)) for name, things in named.items()}


# --- leaks -----------------------------------------------------------------------------------------------------------


def check_split(split: Split, plates: pd.DataFrame) -> None:
    """Check that batches and labs lie on one side of a split.

    No batch of validation or of the new-batch test is trained on, nor validated on and tested; no lab of the new-lab test is
    trained or validated on; in-domain plates are of batches that are trained on, new-batch plates of such labs.

    Raises:
        LeakError: they do not; names every plate, and those it shares a batch or lab with.
    """
    where = {
        str(plate): (f"{lab}/{batch}", str(lab)) for lab, batch, plate in plates[[LAB, BATCH, PLATE]].itertuples(index=False)
    }
    absent = [plate for plate in split.purposes() if plate not in where]
    if absent:
        raise LayoutError(f"the split names plates that were not fetched: {', '.join(absent)}")
    rules = (
        (split.validation, 0, "batch", ("train", "in_domain")),
        (split.new_batch, 0, "batch", ("train", "in_domain", "validation")),
        (split.new_lab, 1, "lab", ("train", "in_domain", "validation", "new_batch")),
    )
    leaks = [
        f"plate {plate} ({purpose}): its {what} {where[plate][level]} is of {other} too ({', '.join(same)})"
        for purpose, (held_out, level, what, others) in zip(("validation", "new_batch", "new_lab"), rules, strict=True)
        for plate in held_out
        for other in others
        if (same := [mate for mate in getattr(split, other) if where[mate][level] == where[plate][level]])
    ]
    trained = {place for plate in split.train for place in enumerate(where[plate])}
    leaks += [
        f"plate {plate} ({purpose}): its {what} {where[plate][level]} is not trained on, so it is a new one"
        for purpose, level, what in (("in_domain", 0, "batch"), ("new_batch", 1, "lab"))
        for plate in getattr(split, purpose)
        if (level, where[plate][level]) not in trained
    ]
    if leaks:
        listed = "\n".join(leaks)
        raise LeakError(f"the split does not hold out whole batches and labs:\n{listed}")


@dataclass(frozen=True)
class RepeatedImage:
    """One file's content in several places: plate, well, channel, and site and path of each."""

    plates: tuple[str, ...]
    places: tuple[str, ...]

    def __str__(self) -> str:
        return " = ".join(self.places)


def refuse_repeated_images(split: Split, plates: Mapping[str, PlateSites]) -> list[RepeatedImage]:
    """Check that no plane of one purpose is, byte for byte, also of another; return those that repeat within one.

    Raises:
        LeakError: there are such planes; names all of them.
    """
    purposes = split.purposes()
    repeated = list(repeated_images([plates[plate] for plate in purposes]))
    leaks = [image for image in repeated if len({purposes[plate] for plate in image.plates}) > 1]
    if leaks:
        listed = "\n".join(
            f"{' and '.join(sorted({purposes[plate] for plate in image.plates}))}: {image}" for image in leaks
        )
        raise LeakError(f"{len(leaks)} images have several purposes in the split:\n{listed}")
    return repeated


def repeated_images(plates: Sequence[PlateSites]) -> Iterator[RepeatedImage]:
    """Find planes of the same content, by their files' sha256.

    Their first eight bytes are gathered, 8 bytes a plane; what they say is looked up in full.
    """
    heads = [_heads(plate.digests) for plate in plates]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *heads]), return_counts=True)
    suspects = values[counts > 1]
    found: dict[str, list[tuple[PlateSites, int, int]]] = {}
    for plate, own in zip(plates, heads, strict=True):
        flat = np.flatnonzero(np.isin(own, suspects))
        digests = plate.digests.reshape(-1)[flat] if len(flat) else ()
        for at, digest in zip(flat, digests, strict=True):
            row, channel = divmod(int(at), len(plate.recipe.channels))
            found.setdefault(str(digest), []).append((plate, row, channel))
    for places in found.values():
        if len(places) > 1:
            yield RepeatedImage(tuple(plate.plate for plate, _, _ in places), tuple(_place(*place) for place in places))


def _heads(digests: NDArray[np.str_]) -> NDArray[np.uint64]:
    data = bytes.fromhex("".join(digest[: 2 * _DIGEST_BYTES] for digest in digests.reshape(-1).tolist()))
    return np.frombuffer(data, np.uint64)


def _place(plate: PlateSites, row: int, channel: int) -> str:
    (place,) = plate.files.places([row], [channel])
    return f"plate {plate.plate} well {plate.wells[row]} channel {plate.recipe.channels[channel]} {place}"
