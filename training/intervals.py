"""Intervals: plates drawn again within their batches and labs, and seeds beside them, for every figure of a report.

Knows nothing of methods or metrics. All figures are taken from the same draws, so that a difference between two methods is
paired over plates.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

PLACE = ("lab", "batch", "plate")
Place = tuple[str, ...]
DRAWS = 2000
_LEVEL = 0.95
_NOTHING = 1e-9
"""A difference of means that is nothing but rounding."""

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure and the same figure in every draw, ``draws`` (draws,), of ``members`` independent units.

    ``members`` counts what is drawn first where there are several: labs, else batches, else plates; or seeds, if fewer.
    """

    value: float
    draws: Float
    members: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None where one plate or too many undefined draws leave nothing to say.

        Percentiles are widened for few members as in Hesterberg 2015 (expanded percentile interval): plain ones covered
        only 0.85 where four batches were drawn. With three members or fewer these too cover less than they say: 0.65 with
        two seeds, 0.8 with three, where training anew changes more than plates do.
        """
        finite = self.draws[np.isfinite(self.draws)]
        if self.members < 2 or len(finite) < _LEVEL * len(self.draws):  # noqa: PLR2004 (one unit does not vary)
            return None
        low, high = np.quantile(finite, expanded_tails(self.members))
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Difference, paired draw by draw."""
        return Estimate(self.value - other.value, self.draws - other.draws, min(self.members, other.members))

    def share_of(self, whole: "Estimate") -> "Estimate":
        """Ratio, paired draw by draw; undefined where the whole's interval, or too many of its draws, are not above zero."""
        usable = whole.draws > _NOTHING
        draws = np.where(usable, self.draws / np.where(usable, whole.draws, 1.0), np.nan)
        least = whole.interval[0] if whole.interval else whole.value
        defined = min(whole.value, least) > _NOTHING and usable.mean() >= _LEVEL
        value = self.value / whole.value if defined else np.nan
        return Estimate(value, draws, min(self.members, whole.members))


def expanded_tails(members: int) -> tuple[float, float]:
    """Quantiles of a 95 % interval for that many members: 0.025 and 0.975 for very many."""
    quantile = np.sqrt(members / (members - 1)) * stats.t.ppf((1 - _LEVEL) / 2, members - 1)
    tail = float(stats.norm.cdf(quantile))
    return tail, 1 - tail


class Resamples:
    """Draws of plates and of seeds: the same plates and seeds are drawn alike whoever asks, so that figures are paired.

    In every draw labs, batches of each lab drawn and plates of each batch drawn are drawn with replacement, and beside them
    seeds, once for all plates: a plate counts with those drawn of the seeds that scored it. Where each plate was scored by
    one seed alone, seeds are drawn first and labs below them. What there is one of (lab, batch, seed) is kept, and an
    interval then says nothing of others.
    """

    def __init__(self, draws: int = DRAWS, seed: int = 0) -> None:
        self.draws = draws
        self.seed = seed
        self._kept: dict[tuple[tuple[Place, ...], bytes], Float] = {}

    def mean(self, rows: pd.DataFrame, column: str) -> Estimate:
        """Mean of a column over rows of one setting that have a value, every plate counting once in a seed."""
        known = rows[rows[column].notna()]
        return self.ratio(known, known[column].to_numpy(np.float64), np.ones(len(known)))

    def ratio(self, rows: pd.DataFrame, top: Float, bottom: Float) -> Estimate:
        """Sum of ``top`` over sum of ``bottom``, one entry a row of one setting; a plate may have several rows."""
        if not bottom.sum() > 0:
            return Estimate(np.nan, np.full(self.draws, np.nan), 0)
        of_row = list(zip(*(rows[level] for level in PLACE), strict=True))
        places, seeds = sorted(set(of_row)), sorted(set(rows["seed"]))
        at_place, at_seed = {name: n for n, name in enumerate(places)}, {name: n for n, name in enumerate(seeds)}
        where = [at_place[place] for place in of_row], [at_seed[seed] for seed in rows["seed"]]
        sums, scored = np.zeros((2, len(places), len(seeds))), np.zeros((len(places), len(seeds)), np.bool_)
        np.add.at(sums[0], where, top)
        np.add.at(sums[1], where, bottom)
        scored[where] = True
        totals = self._drawn_sums(sums, scored, places, seeds)
        draws = np.where(totals[1] > 0, totals[0] / np.where(totals[1] > 0, totals[1], 1.0), np.nan)
        return Estimate(float(top.sum() / bottom.sum()), draws, self._members(scored, places))

    def _drawn_sums(self, sums: Float, scored: NDArray[np.bool_], places: Sequence[Place], seeds: Sequence[int]) -> Float:
        """Sums (2, places, seeds) of each draw: (2, draws)."""
        drawn, totals = self._seeds(seeds), np.zeros((2, self.draws))
        for own in np.unique(scored, axis=0):
            alike = (scored == own).all(axis=1)
            if _nested(scored):
                (seed,) = np.flatnonzero(own)
                below = tuple(place for place, same in zip(places, alike, strict=True) if same)
                totals += (self._places(below, drawn[:, seed].astype(np.int64)) * sums[:, alike, seed][:, None]).sum(axis=2)
            else:
                weights = _of_these(drawn[:, own])
                counts = self._places(tuple(places), np.ones(self.draws, np.int64))[:, alike]
                totals += ((counts @ sums[:, alike][:, :, own]) * weights).sum(axis=2)
        return totals

    def _members(self, scored: NDArray[np.bool_], places: Sequence[Place]) -> int:
        """How many independent units there are of what there is least of: seeds, or places where these are beside them."""
        seeds = int(scored.shape[1])
        if seeds == 1:
            return members(places)
        return seeds if _nested(scored) else min(seeds, members(places))

    def _places(self, places: tuple[Place, ...], times: NDArray[np.int64]) -> Float:
        """How often each place is in each draw, all of them drawn anew ``times`` (draws,): (draws, places)."""
        key = places, times.tobytes()
        if key not in self._kept:
            counts = _drawn(places, times, self._rng(places))
            self._kept[key] = np.stack([counts[place] for place in places], axis=1).astype(np.float64)
        return self._kept[key]

    def _seeds(self, names: Sequence[int]) -> Float:
        """How often each seed is in each draw: (draws, seeds)."""
        shares = np.full(len(names), 1 / len(names))
        return self._rng(tuple(names)).multinomial(len(names), shares, size=self.draws).astype(np.float64)

    def _rng(self, key: tuple[object, ...]) -> np.random.Generator:
        return np.random.default_rng([self.seed, *hashlib.sha256(repr(key).encode()).digest()])


def _nested(scored: NDArray[np.bool_]) -> bool:
    """Whether each place (places, seeds) was scored by one of several seeds alone."""
    return scored.shape[1] > 1 and bool((scored.sum(axis=1) == 1).all())


def _of_these(drawn: Float) -> Float:
    """Weights (draws, seeds) of some of the seeds drawn, together their number; equal where none of them was drawn."""
    total = drawn.sum(axis=1, keepdims=True)
    weights: Float = np.where(total > 0, drawn * drawn.shape[1] / np.maximum(total, 1), 1.0)
    return weights


def _drawn(places: Sequence[Place], times: NDArray[np.int64], rng: np.random.Generator) -> dict[Place, NDArray[np.int64]]:
    """Count draws of each place below one that was drawn ``times`` (draws,): every time anew, as many as there are."""
    names = sorted({place[0] for place in places})
    counts = rng.multinomial(times * len(names), np.full(len(names), 1 / len(names))).T
    found: dict[Place, NDArray[np.int64]] = {}
    for name, count in zip(names, counts, strict=True):
        rest = [place[1:] for place in places if place[0] == name]
        below = _drawn(rest, count, rng) if rest[0] else {(): count}
        found |= {(name, *place): value for place, value in below.items()}
    return found


def members(places: Sequence[Place]) -> int:
    """How many labs there are, or batches where there is one lab, or plates where there is one batch."""
    counts = (len({place[:levels] for place in places}) for levels in range(1, len(PLACE) + 1))
    return next((count for count in counts if count > 1), 1)
