"""Statistics of a plate's controls, and of the training plates together, for a torch network."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.context import MAX_CONTEXT_SITES
from model.images import ImageRecipe
from model.network import Given, ResNet
from model.statistics import BatchNormStatistics, Prior
from training.dataset import PlateSites
from training.methods import Method, measured


def context_rows(plate: PlateSites, max_sites: int = MAX_CONTEXT_SITES) -> NDArray[np.int64]:
    """Control rows that enter the statistics, by the rule the service uses."""
    return plate.context_rows(max_sites)


def statistics_of(
    network: ResNet, plate: PlateSites, recipe: ImageRecipe, rows: NDArray[np.int64], prior: Prior | None = None
) -> BatchNormStatistics:
    """Measure rows of a plate as one context; blended with a prior, if any."""
    found = measured(network, plate.served(rows, recipe), prior)
    return BatchNormStatistics(
        mean=found.mean.cpu().numpy(),
        variance=found.variance.cpu().numpy(),
        sites=len(rows),
        wells=len(set(plate.wells[rows])),
    )


def control_statistics(network: ResNet, plate: PlateSites, recipe: ImageRecipe) -> BatchNormStatistics:
    """Measure a plate's controls as the service would."""
    return statistics_of(network, plate, recipe, context_rows(plate))


def given(network: ResNet, statistics: BatchNormStatistics) -> Given:
    """Return a normaliser that gives a network these statistics."""
    weight = network.conv1.weight
    return Given(weight.new_tensor(statistics.mean), weight.new_tensor(statistics.variance))


def source_statistics(network: ResNet, method: Method, controls: Sequence[BatchNormStatistics]) -> BatchNormStatistics:
    """Return what stands in for adaptation: running statistics of ERM, else the training controls' mean moments."""
    if method.context != "source":
        return mean_moments(controls)
    mean, variance = network.running_statistics()
    return BatchNormStatistics(mean.cpu().numpy(), variance.cpu().numpy(), sites=0, wells=0)


def mean_moments(plates: Sequence[BatchNormStatistics]) -> BatchNormStatistics:
    """Mean of E[x] and of E[x²] over plates, every plate counting once: the between-plate spread is kept."""
    means = np.stack([plate.mean for plate in plates]).astype(np.float64)
    variances = np.stack([plate.variance for plate in plates]).astype(np.float64)
    mean: NDArray[np.float64] = means.mean(axis=0)
    square: NDArray[np.float64] = (variances + means**2).mean(axis=0)
    return BatchNormStatistics(
        mean=mean.astype(np.float32),
        variance=np.maximum(square - mean**2, 0).astype(np.float32),
        sites=sum(plate.sites for plate in plates),
        wells=sum(plate.wells for plate in plates),
    )
