"""Statistics of a plate's controls, and of the training plates together, for a torch network."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from model.context import MAX_CONTEXT_SITES
from model.errors import NoControlsError
from model.images import ImageRecipe
from model.network import Ensemble, Given, Network
from model.statistics import BatchNormStatistics, Prior, json_sha256
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
    """Rows of a plate's panel: all sites of ``wells_per_class`` wells of every class on it, drawn by their digests."""
    rows = plate.treated
    wells = {
        well
        for label in np.unique(plate.labels[rows])
        for well in sorted(set(plate.wells[rows[plate.labels[rows] == label]]), key=partial(_drawn, plate))[:wells_per_class]
    }
    return rows[np.isin(plate.wells[rows], sorted(wells))]


def _drawn(plate: PlateSites, well: str) -> str:
    return json_sha256([plate.plate, str(well)])


def statistics_of(
    network: Network, plate: PlateSites, recipe: ImageRecipe, rows: NDArray[np.int64], prior: Prior | None = None
) -> BatchNormStatistics:
    """Measure rows of a plate as one context; blended with a prior, if any."""
    found = measured(network, plate.served(rows, recipe), prior)
    return BatchNormStatistics(
        mean=found.mean.cpu().numpy(),
        variance=found.variance.cpu().numpy(),
        sites=len(rows),
        wells=len(set(plate.wells[rows])),
    )


def control_statistics(network: Network, plate: PlateSites, recipe: ImageRecipe) -> BatchNormStatistics:
    """Measure a plate's controls as the service would."""
    return statistics_of(network, plate, recipe, context_rows(plate))


def served_statistics(
    network: Network, method: Method, plate: PlateSites, recipe: ImageRecipe, panel_wells: int
) -> BatchNormStatistics:
    """Measure a plate as the service would: its controls, and its panel where the method was trained with one."""
    return statistics_of(network, plate, recipe, with_panel(context_rows(plate), plate, method, panel_wells))


def with_panel(controls: NDArray[np.int64], plate: PlateSites, method: Method, panel_wells: int) -> NDArray[np.int64]:
    """Rows of a context: controls, and the plate's panel where the method was trained with one."""
    return np.concatenate([controls, panel_rows(plate, panel_wells)]) if method.context == "panel" else controls


def given(network: Network, statistics: BatchNormStatistics) -> Given:
    """Return a normaliser that gives a network these statistics."""
    weight = next(network.parameters())
    return Given(weight.new_tensor(statistics.mean), weight.new_tensor(statistics.variance))


def source_statistics(network: Network, method: Method, controls: Sequence[BatchNormStatistics]) -> BatchNormStatistics:
    """Return what stands in for adaptation: running statistics of ERM, else the training controls' mean moments."""
    if method.context != "source":
        return mean_moments(controls)
    mean, variance = network.running_statistics()
    return BatchNormStatistics(mean.cpu().numpy(), variance.cpu().numpy(), sites=0, wells=0)


def ensemble_source(
    network: Ensemble,
    method: Method,
    plates: Sequence[str],
    controls: Sequence[BatchNormStatistics],
    trained_on: Sequence[Collection[str]],
) -> BatchNormStatistics:
    """Join the members' source statistics, each over its own training plates.

    Args:
        network: the members.
        method: how they were trained.
        plates: names of plates.
        controls: these plates' control statistics, over all members' features.
        trained_on: of each member, the plates that it was trained on.
    """
    sources: list[BatchNormStatistics] = []
    first = 0
    for member, own in zip(network.networks, trained_on, strict=True):
        span = slice(first, first := first + member.features)
        parts = [
            replace(plate, mean=plate.mean[span], variance=plate.variance[span])
            for name, plate in zip(plates, controls, strict=True)
            if name in own
        ]
        sources.append(source_statistics(member, method, parts))
    return BatchNormStatistics(
        mean=np.concatenate([source.mean for source in sources]),
        variance=np.concatenate([source.variance for source in sources]),
        sites=min(source.sites for source in sources),
        wells=min(source.wells for source in sources),
    )


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
