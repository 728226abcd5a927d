"""Cells of the grid, and the draws that make them: which control wells there are, which treated wells are sent together.

Draws depend on the plate's name and the cell alone, so that every method and every seed of training answers the same
queries, and differences between them are paired. It knows nothing of networks.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.statistics import canonical_json
from training.dataset import PlateSites

ALL = -1
Wells = NDArray[np.str_]


@dataclass(frozen=True, order=True)
class Cell:
    """How a plate is used: K control wells, L treated wells sent together (ALL: as many as there are), the label shift.

    ``alpha`` is the Dirichlet concentration of the query's classes: infinite for the plate's own mixture, 0 for one class.
    """

    controls: int = ALL
    query: int = ALL
    alpha: float = math.inf

    def __post_init__(self) -> None:
        if self.controls < ALL or self.query < ALL or self.query == 0 or not self.alpha >= 0:
            raise ValueError(f"no such cell: {self}")
        if self.shifted and self.query == ALL:
            raise ValueError("label shift (alpha) needs a number of wells: give query_wells beside it")

    @property
    def shifted(self) -> bool:
        """Whether the query's classes are drawn otherwise than the plate's."""
        return math.isfinite(self.alpha)


DEFAULT = Cell()


@dataclass(frozen=True)
class Draws:
    """How often a plate is drawn from: sets of K control wells, and queries of L treated wells."""

    controls: int = 4
    queries: int = 8

    def __post_init__(self) -> None:
        if min(self.controls, self.queries) < 1:
            raise ValueError(f"draws of controls and queries are 1 or more, not {self.controls} and {self.queries}")


def control_draws(plate: PlateSites, count: int, draws: Draws) -> list[Wells]:
    """Sets of ``count`` control wells: none where the plate has fewer, one where these are all there are.

    A draw of more wells holds the same draw of fewer.
    """
    wells = np.unique(plate.wells[plate.control_rows])
    if count in (ALL, len(wells)):
        return [wells]
    if count > len(wells):
        return []
    if count == 0:
        return [wells[:0]]
    return [_rng(plate, "controls", draw).permutation(wells)[:count] for draw in range(draws.controls)]


def query_draws(plate: PlateSites, cell: Cell, draws: Draws) -> list[Wells]:
    """Queries of L treated wells each; a single one of all wells where the cell asks for all or these are all there are.

    Without label shift wells are dealt from a shuffled plate, none twice until all have been sent; a plate with fewer than L
    wells has no query. With label shift L stays what it is: the proportions of the plate's classes are drawn from a
    symmetric Dirichlet(alpha), the L wells' classes from those proportions; alpha 0 is one class a query, classes dealt in
    turn. Wells of a class are drawn without replacement; only where the class has fewer than were drawn are they sent again,
    all equally often but for one, so that the class proportions hold.
    """
    labels = dict(zip(plate.wells[plate.treated].tolist(), plate.labels[plate.treated].tolist(), strict=True))
    wells = np.array(sorted(labels), np.str_)
    if not len(wells):
        return []
    if cell.query == ALL or (cell.query == len(wells) and not cell.shifted):
        return [wells]
    rng = _rng(plate, "query", cell.query, str(cell.alpha))
    if not cell.shifted:
        return _dealt(wells, cell.query, draws.queries, rng)
    classes = [
        np.array([well for well in wells.tolist() if labels[well] == label]) for label in sorted(set(labels.values()))
    ]
    counts = _class_counts(len(classes), cell, draws.queries, rng)
    return [
        np.concatenate([np.resize(rng.permutation(members), n) for members, n in zip(classes, number, strict=True) if n])
        for number in counts
    ]


def _class_counts(classes: int, cell: Cell, draws: int, rng: np.random.Generator) -> list[Sequence[int]]:
    """How many wells of each class every query has."""
    if cell.alpha == 0:
        turns = np.concatenate(_dealt(np.arange(classes), 1, draws, rng))
        return [[cell.query if label == turn else 0 for label in range(classes)] for turn in turns]
    proportions = rng.dirichlet(np.full(classes, cell.alpha), draws)
    return [rng.multinomial(cell.query, share).tolist() for share in proportions]


def _dealt(items: NDArray, size: int, draws: int, rng: np.random.Generator) -> list[NDArray]:  # type: ignore[type-arg]
    """Deal ``draws`` hands of ``size`` from a shuffled deck, shuffled anew when it does not suffice for one more."""
    if size > len(items):
        return []
    hands: list[NDArray] = []  # type: ignore[type-arg]
    while len(hands) < draws:
        deck = rng.permutation(items)
        hands += [deck[at : at + size] for at in range(0, len(deck) - size + 1, size)]
    return hands[:draws]


def _rng(plate: PlateSites, *what: str | int) -> np.random.Generator:
    digest = hashlib.sha256(canonical_json([plate.lab, plate.batch, plate.plate, *what])).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))
