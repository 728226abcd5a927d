"""Ways to do the same thing, timed in turn in one run: what else the machine does strikes all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.bars import Bar

Seconds = NDArray[np.float64]
Way = Callable[[], float | object]
"""Does it once; a number that it returns is how many seconds count, else all that it took."""
_MOST_ROUNDS = [0.025, 0.975]


@dataclass(frozen=True, eq=False)
class Rounds:
    """Seconds that each way took, one a round."""

    taken: Mapping[str, Seconds]

    def ratio(self, name: str, top: str, bottom: str, *, at_least: float | None = None, at_most: float | None = None) -> Bar:
        """Median over rounds of one way's seconds over another's, and where 95 % of rounds lie."""
        ratios = self.taken[top] / self.taken[bottom]
        low, high = np.quantile(ratios, _MOST_ROUNDS)
        return Bar(name, float(np.median(ratios)), "", at_least, at_most, (float(low), float(high)))

    def seconds(self, name: str, way: str) -> Bar:
        """Median of a way's seconds, and where 95 % of rounds lie."""
        low, high = np.quantile(self.taken[way], _MOST_ROUNDS)
        return Bar(name, float(np.median(self.taken[way])), "s", interval=(float(low), float(high)))

    def rate(self, name: str, way: str, count: int, unit: str) -> Bar:
        """Median of how much of something a second, and where 95 % of rounds lie."""
        rates = count / self.taken[way]
        low, high = np.quantile(rates, _MOST_ROUNDS)
        return Bar(name, float(np.median(rates)), unit, interval=(float(low), float(high)))


def interleaved(ways: Mapping[str, Way], rounds: int, warm: int = 1) -> Rounds:
    """Run every way once a round, in an order that turns round each time; the first rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm + rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            begun = time.perf_counter()
            counted = ways[name]()
            passed = time.perf_counter() - begun
            if number >= warm:
                taken[name].append(counted if isinstance(counted, float) else passed)
    return Rounds({name: np.array(seconds) for name, seconds in taken.items()})
