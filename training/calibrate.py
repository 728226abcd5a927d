"""What a bundle must know of its training plates: source statistics, how far plates lie, how embeddings vary, how sure.

Thresholds are cross-fitted: the distances that set them are measured, on plates of held-out batches, with a projection that
was fitted without the batch they come from; and a control well is scored against statistics and a centre it is no part of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf

from model.errors import LayoutError
from model.images import ImageRecipe
from model.network import Normaliser, ResNet, Running
from model.predictions import EmbeddingReference, softmax
from model.statistics import BatchNormStatistics, Prior, TrainingStatistics, summarise_training
from training.blending import blend_wells, measure_wells
from training.contexts import control_statistics, given, source_statistics, statistics_of
from training.dataset import NO_LABEL, PlateSites, group_means
from training.methods import Method, classify

CONTROL_WELL_COUNTS = (1, 2, 4, 8, 16, 24)
_BLENDED_BELOW = 4
"""Fewer control wells are measured blended, for so few are not served otherwise."""
_DRAWS = 3
_WELLS_PER_DIMENSION = 20
_CONTROL_COVERAGE, _CLASS_COVERAGE = 0.95, 0.99
_LABS_TO_LEAVE_ONE_OUT = 3

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Training statistics, embedding reference and class temperature of a trained network."""

    training_statistics: TrainingStatistics
    embedding_reference: EmbeddingReference
    temperature: float


@dataclass(frozen=True, eq=False)
class _Wells:
    """One plate's wells under its own controls: embeddings (wells, dim), labels (wells,), whether controls; site logits.

    ``left_out`` holds, of a held-out plate and for several numbers of control wells, the differences (wells, dim) of other
    control wells from the centre of those, under the statistics of those.
    """

    batch: str
    embeddings: Float
    labels: NDArray[np.int64]
    controls: NDArray[np.bool_]
    site_logits: NDArray[np.float32]
    site_wells: NDArray[np.int64]
    left_out: dict[int, Float]

    def of(self, label: int) -> Float:
        """Embeddings of the treated wells of one class."""
        found: Float = self.embeddings[~self.controls & (self.labels == label)]
        return found

    def residuals(self) -> Float:
        """Differences of wells from the mean of equal wells: controls, and each class; unbiased for their number."""
        groups = [self.embeddings[self.controls], *(self.of(label) for label in sorted(set(self.labels[~self.controls])))]
        scaled = [(g - g.mean(0)) * np.sqrt(len(g) / (len(g) - 1)) for g in groups if len(g) > 1]
        return np.concatenate(scaled)


def calibrate(
    network: ResNet, method: Method, recipe: ImageRecipe, train: Sequence[PlateSites], held_out: Sequence[PlateSites]
) -> Calibration:
    """Calibrate on training plates (centres, directions) and on plates of held-out batches (spreads, thresholds)."""
    statistics = [control_statistics(network, plate, recipe) for plate in train]
    held_out_statistics = [control_statistics(network, plate, recipe) for plate in held_out]
    source = source_statistics(network, method, statistics)
    alone = [measure_wells(network, plate, recipe, own) for plate, own in zip(train, statistics, strict=True)]
    wells = blend_wells(alone, [layer.place for layer in network.layers])
    described = summarise_training(statistics, source, held_out_statistics, wells)
    labs = [plate.lab for plate in train], [plate.lab for plate in held_out]
    distances = leave_one_lab_out(statistics, labs[0], held_out_statistics, labs[1])
    trained = [_wells(network, method, p, recipe, own, {}) for p, own in zip(train, statistics, strict=True)]
    left_out = [_left_out_controls(network, method, plate, recipe, described) for plate in held_out]
    unseen = [
        _wells(network, method, plate, recipe, own, differences)
        for plate, own, differences in zip(held_out, held_out_statistics, left_out, strict=True)
    ]
    return Calibration(
        training_statistics=described if distances is None else replace(described, held_out_distances=distances),
        embedding_reference=_embedding_reference(trained, unseen, network.spec.classes),
        temperature=fit_temperature(unseen),
    )


def leave_one_lab_out(
    train: Sequence[BatchNormStatistics],
    train_labs: Sequence[str],
    held_out: Sequence[BatchNormStatistics],
    held_out_labs: Sequence[str],
) -> Float | None:
    """Distances of each lab's plates from the training plates of the other labs, sorted; None with fewer than three labs.

    A new lab is what a served bundle meets, so that is what its plates' distance is held against.
    """
    labs = sorted(set(train_labs))
    if len(labs) < _LABS_TO_LEAVE_ONE_OUT:
        return None
    found = []
    for lab in labs:
        others = [plate for plate, of in zip(train, train_labs, strict=True) if of != lab]
        own = [p for p, of in zip([*train, *held_out], [*train_labs, *held_out_labs], strict=True) if of == lab]
        found.append(summarise_training(others, others[0], own).held_out_distances)
    return np.sort(np.concatenate(found))


# --- wells -----------------------------------------------------------------------------------------------------------


def _wells(
    network: ResNet,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    statistics: BatchNormStatistics,
    left_out: dict[int, Float],
) -> _Wells:
    rows = np.flatnonzero(plate.controls | (plate.labels != NO_LABEL))
    logits, embeddings = classify(network, plate.served(rows, recipe), _normaliser(network, method, statistics))
    names, where = np.unique(plate.wells[rows], return_inverse=True)
    labels, controls = np.zeros(len(names), np.int64), np.zeros(len(names), np.bool_)
    labels[where], controls[where] = plate.labels[rows], plate.controls[rows]
    return _Wells(
        batch=plate.batch,
        embeddings=group_means(embeddings, where, len(names)),
        labels=labels,
        controls=controls,
        site_logits=logits,
        site_wells=where.astype(np.int64),
        left_out=left_out,
    )


def _normaliser(network: ResNet, method: Method, statistics: BatchNormStatistics) -> Normaliser:
    return Running(update=False) if method.context == "source" else given(network, statistics)


def _left_out_controls(
    network: ResNet, method: Method, plate: PlateSites, recipe: ImageRecipe, described: TrainingStatistics
) -> dict[int, Float]:
    """Score control wells against contexts of other control wells, as treated wells are, for several context sizes."""
    rng = np.random.default_rng(0)
    wells = np.unique(plate.wells[plate.control_rows])
    if len(wells) < 2:  # noqa: PLR2004 (one to hold against another)
        raise LayoutError(f"plate {plate.plate} has {len(wells)} control wells; calibration needs two or more")
    found: dict[int, Float] = {}
    for count in [count for count in CONTROL_WELL_COUNTS if count < len(wells)]:
        prior = described.prior(count) if count < _BLENDED_BELOW else None
        draws = [_scored_others(network, method, plate, recipe, rng.permutation(wells), count, prior) for _ in range(_DRAWS)]
        found[count] = np.concatenate(draws)
    return found


def _scored_others(
    network: ResNet,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    wells: NDArray[np.str_],
    count: int,
    prior: Prior | None,
) -> Float:
    """Differences of ``wells[count:]`` from the centre of ``wells[:count]``, under the latter's statistics."""
    context = np.flatnonzero(np.isin(plate.wells, wells[:count]))
    others = np.flatnonzero(np.isin(plate.wells, wells[count:]))
    plate = plate.scaled_by(context)
    norm = _normaliser(network, method, statistics_of(network, plate, recipe, context, prior))
    _, embeddings = classify(network, plate.served(np.concatenate([context, others]), recipe), norm)
    names, where = np.unique(plate.wells[np.concatenate([context, others])], return_inverse=True)
    means = group_means(embeddings, where, len(names))
    inside = np.isin(names, wells[:count])
    differences: Float = means[~inside] - means[inside].mean(0)
    return differences


# --- embeddings ------------------------------------------------------------------------------------------------------


def _embedding_reference(trained: Sequence[_Wells], unseen: Sequence[_Wells], classes: int) -> EmbeddingReference:
    centres = np.stack([np.concatenate([p.of(label) for p in trained]).mean(0) for label in range(classes)])
    basis = _directions(trained, sum(len(plate.residuals()) for plate in unseen))
    counts = sorted({count for plate in unseen for count in plate.left_out})
    to_controls: dict[int, list[float]] = {count: [] for count in counts}
    to_class: list[float] = []
    for group, others in _folds(unseen):
        projection = _projection(basis, others)
        for plate in group:
            for count, differences in plate.left_out.items():
                to_controls[count] += list(np.linalg.norm(differences @ projection, axis=1))
            for label in range(classes):
                to_class += list(np.linalg.norm((plate.of(label) - centres[label]) @ projection, axis=1))
    return EmbeddingReference(
        projection=_projection(basis, unseen).astype(np.float32),
        class_centres=centres.astype(np.float32),
        control_wells=np.array(counts, np.int64),
        control_distances=np.array([np.quantile(to_controls[count], _CONTROL_COVERAGE) for count in counts]),
        class_distance=float(np.quantile(to_class, _CLASS_COVERAGE)),
    )


def _directions(trained: Sequence[_Wells], wells: int) -> Float:
    """Principal directions (dim, k) of training wells around their plate's controls, few enough to estimate spreads in."""
    centred = np.concatenate([plate.embeddings - plate.embeddings[plate.controls].mean(0) for plate in trained])
    kept = max(1, min(centred.shape[1], wells // _WELLS_PER_DIMENSION))
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    basis: Float = directions[:kept].T
    return basis


def _projection(basis: Float, plates: Sequence[_Wells]) -> Float:
    """Project on the basis and whiten by the spread of equal wells of one plate: (dim, k)."""
    residuals = np.concatenate([plate.residuals() for plate in plates]) @ basis
    values, vectors = np.linalg.eigh(LedoitWolf(assume_centered=True).fit(residuals).covariance_)
    projection: Float = basis @ (vectors / np.sqrt(np.maximum(values, 1e-12)))
    return projection


def _folds(plates: Sequence[_Wells]) -> list[tuple[list[_Wells], list[_Wells]]]:
    """Each batch's plates with all others; each plate with all others where there is one batch; one plate with itself."""
    batches = sorted({plate.batch for plate in plates})
    if len(batches) > 1:
        return [([p for p in plates if p.batch == b], [p for p in plates if p.batch != b]) for b in batches]
    if len(plates) > 1:
        return [([plate], [other for other in plates if other is not plate]) for plate in plates]
    return [(list(plates), list(plates))]


# --- temperature -----------------------------------------------------------------------------------------------------


class CalledWells(Protocol):
    """What of a plate's wells the temperature is fitted to, as ``_Wells`` has it."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def controls(self) -> NDArray[np.bool_]: ...
    @property
    def site_logits(self) -> NDArray[np.float32]: ...
    @property
    def site_wells(self) -> NDArray[np.int64]: ...


def fit_temperature(plates: Sequence[CalledWells]) -> float:
    """Choose the class temperature that gives held-out treated wells the highest likelihood."""

    def nll(log_temperature: float) -> float:
        losses = []
        for plate in plates:
            probabilities = softmax(plate.site_logits, float(np.exp(log_temperature)))
            wells = np.flatnonzero(~plate.controls)
            means = group_means(probabilities, plate.site_wells, len(plate.labels))[wells]
            losses.append(-np.log(np.maximum(means[np.arange(len(wells)), plate.labels[wells]], 1e-12)))
        return float(np.concatenate(losses).mean())

    found = minimize_scalar(nll, bounds=(np.log(0.2), np.log(5.0)), method="bounded")
    return float(np.exp(found.x))
