"""How many of a plate's own control wells the training plates' mean statistics are worth: N, layer by layer.

A raw moment (E[x] or E[x²]) of one control well is the plate's true moment and an error that varies by W from well to well;
the plates' true moments vary by B around their mean. K wells miss the truth by W / K, the mean of the training plates misses
it by B, and the mixture that misses it least gives the latter the weight N / (N + K) with N = W / B.

B / W is estimated by the method of moments of a one-way layout. Estimates from a plate's whole controls vary between plates
by B + W / K; that, over W pooled within plates, is B / W + 1 / K times an F-distributed number when effects are Gaussian. So
the median of this ratio over a layer's features and both moments, divided by that distribution's median, estimates
B / W + 1 / K without median bias, however few the plates, and a handful of odd features cannot move it; it is floored only
once, after 1 / K is subtracted. Features whose wells do not vary say nothing.

Every well is measured in a pass of its own, as it would be served if it were the plate's only one: deeper layers then carry
the noise of the layers before them. B is measured around the training plates' own mean; where an ERM network's running
statistics, of treated images too, lie beside it, N is too large.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from model.errors import LayoutError
from model.images import ImageRecipe
from model.network import Network
from model.statistics import BatchNormStatistics
from training.contexts import statistics_of
from training.dataset import PlateSites

FEWEST_WELLS, MOST_WELLS = 0.1, 32.0
"""Bounds of N: one well always counts for something, and a full plate's controls for as much as any prior."""

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ControlWells:
    """Statistics of one plate's controls: of all together, and of each well alone."""

    whole: BatchNormStatistics
    wells: Sequence[BatchNormStatistics]


def measure_wells(network: Network, plate: PlateSites, recipe: ImageRecipe, whole: BatchNormStatistics) -> ControlWells:
    """Measure every control well of a plate by itself, beside the statistics of all of them."""
    names = np.unique(plate.wells[plate.control_rows])
    rows = [np.flatnonzero(plate.controls & (plate.wells == name)) for name in names]
    return ControlWells(whole, [statistics_of(network, plate, recipe, of_well) for of_well in rows])


def blend_wells(plates: Sequence[ControlWells], layers: Sequence[slice]) -> NDArray[np.float32]:
    """N in control wells, the same for all features of a layer: (features,).

    Args:
        plates: the training plates' controls.
        layers: where each BN layer's features lie; together they are all features.

    Raises:
        LayoutError: fewer than two plates, or no plate with two control wells.
    """
    ratio, expected, inverse_wells = _ratios(plates)
    found = np.empty(ratio.shape[1], np.float32)
    for layer in layers:
        of_layer = ratio[:, layer]
        known = of_layer[np.isfinite(of_layer)]
        between = float(np.median(known)) / expected - inverse_wells if known.size else 0.0
        found[layer] = np.clip(1 / max(between, 1 / MOST_WELLS), FEWEST_WELLS, MOST_WELLS)
    return found


def _ratios(plates: Sequence[ControlWells]) -> tuple[Float, float, float]:
    """Variance between plates over variance within, (2 moments, features); the median it has by chance; mean of 1 / K."""
    wells = [np.stack([_raw_moments(well) for well in plate.wells]) for plate in plates]
    between_freedom, within_freedom = len(wells) - 1, sum(len(of_plate) - 1 for of_plate in wells)
    if between_freedom < 1 or within_freedom < 1:
        raise LayoutError(
            f"{len(wells)} training plates with {sum(map(len, wells))} control wells cannot tell how far plates differ and "
            "how far wells do: two plates are needed, and two control wells on one of them"
        )
    within = sum(((of_plate - of_plate.mean(axis=0)) ** 2).sum(axis=0) for of_plate in wells) / within_freedom
    between = np.stack([_raw_moments(plate.whole) for plate in plates]).var(axis=0, ddof=1)
    ratio = np.divide(between, within, out=np.full_like(between, np.nan), where=within > 0)
    expected = float(f_distribution.ppf(0.5, between_freedom, within_freedom))
    return ratio, expected, float(np.mean([1 / len(of_plate) for of_plate in wells]))


def _raw_moments(statistics: BatchNormStatistics) -> Float:
    """E[x] and E[x²]: (2, features)."""
    mean = statistics.mean.astype(np.float64)
    return np.stack([mean, statistics.variance.astype(np.float64) + mean**2])
