"""Statistics of a plate's controls, and of the training plates together, for a torch network."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.context import MAX_CONTEXT_SITES
from model.errors import NoControlsError
from model.images import ImageRecipe
from model.network import Given, ResNet
from model.statistics import BatchNormStatistics, Prior
from training.dataset import PlateSites
from training.methods import Method, measured


def context_rows(plate: PlateSites, max_sites: int = MAX_CONTEXT_SITES) -> NDArray[np.int64]:
    """Control rows that enter the statistics, by the rule the service uses."""
    require_controls(plate)
    return plate.context_rows(max_sites)


def require_controls(plate: PlateSites) -> None:
    """Check that a plate has negative controls.

    Raises:
        NoControlsError: it has none; says which contexts remain.
    """
    if not plate.controls.any():
        raise NoControlsError(
            f"plate {plate.plate} has no negative-control wells: of the contexts, treated, source (of erm) and instance "
            f"need none"
        )


def panel_rows(plate: PlateSites, wells_per_class: int) -> NDArray[np.int64]:
    """Rows of a plate's panel: all sites of the first ``wells_per_class`` wells, by name, of every class on it."""
    rows = plate.treated
    wells = {
        well
        for label in np.unique(plate.labels[rows])
        for well in np.unique(plate.wells[rows[plate.labels[rows] == label]])[:wells_per_class]
    }
    return rows[np.isin(plate.wells[rows], sorted(wells))]


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
