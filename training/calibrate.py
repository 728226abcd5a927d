"""What a bundle must know of its training plates: source statistics, how far plates lie, how embeddings vary, how sure.

Thresholds are cross-fitted: the distances that set them are measured, on plates of held-out batches, with a projection that
was fitted without the batch they come from; and a control well is scored against statistics and a centre it is no part of.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf

from model.errors import LayoutError
from model.images import ImageRecipe
from model.network import Ensemble, Normaliser, Running
from model.predictions import EmbeddingReference, group_means, well_probabilities
from model.statistics import BatchNormStatistics, Prior, TrainingStatistics, summarise_training
from training.blending import blend_wells, measure_wells
from training.contexts import ensemble_source, given, served_statistics, statistics_of, with_panel
from training.dataset import NO_LABEL, PlateSites
from training.methods import Method, classify
from training.metrics import TEMPERATURES

CONTROL_WELL_COUNTS = (1, 2, 4, 8, 16, 24)
_BLENDED_BELOW = 4
"""Fewer control wells are measured blended, for so few are not served otherwise."""
PANEL_WELLS = 1
_DRAWS = 3
_WELLS_PER_DIMENSION = 20
_CONTROL_COVERAGE, _CLASS_COVERAGE = 0.95, 0.99
_GROUPS_TO_LEAVE_ONE_OUT = 3

Float = NDArray[np.float64]
_Plate = TypeVar("_Plate")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Training statistics, embedding reference and class temperature of a trained network."""

    training_statistics: TrainingStatistics
    embedding_reference: EmbeddingReference
    temperature: float


@dataclass(frozen=True, eq=False)
class _Wells:
    """One plate's wells under its own controls: embeddings (wells, dim), labels (wells,), whether controls.

    ``in_context`` (wells,) are those whose images the statistics were measured on: controls, and a panel's wells.
    ``site_logits`` are (sites, members, classes), ``site_wells`` (sites,) number each site's well.
    ``left_out`` holds, of a held-out plate and for several numbers of control wells, the differences (wells, dim) of other
    control wells from the centre of those, under the statistics of those.
    """

    batch: str
    embeddings: Float
    labels: NDArray[np.int64]
    controls: NDArray[np.bool_]
    in_context: NDArray[np.bool_]
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
    network: Ensemble,
    method: Method,
    recipe: ImageRecipe,
    train: Sequence[PlateSites],
    held_out: Sequence[PlateSites],
    trained_on: Sequence[Collection[str]],
    panel_wells: int = PANEL_WELLS,
) -> Calibration:
    """Calibrate on training plates (centres, directions) and on plates of held-out batches (spreads, thresholds).

    Args:
        network: the trained members.
        method: how they were trained.
        recipe: how plates are prepared.
        train: plates that any member was trained on.
        held_out: plates of batches that no member was trained on.
        trained_on: of each member, the names of the training plates that it was trained on.
        panel_wells: wells of every class in a plate's panel, where they were trained with one.
    """
    statistics = [served_statistics(network, method, plate, recipe, panel_wells) for plate in train]
    held_out_statistics = [served_statistics(network, method, plate, recipe, panel_wells) for plate in held_out]
    source = ensemble_source(network, method, [plate.plate for plate in train], statistics, trained_on)
    described = summarise_training(statistics, source, held_out_statistics, _blend_wells(network, recipe, train, statistics))
    labs = [plate.lab for plate in train], [plate.lab for plate in held_out]
    distances = leave_one_group_out(statistics, labs[0], held_out_statistics, labs[1])
    trained = [_wells(network, method, p, recipe, own, {}, panel_wells) for p, own in zip(train, statistics, strict=True)]
    left_out = [_left_out_controls(network, method, plate, recipe, described, panel_wells) for plate in held_out]
    unseen = [
        _wells(network, method, plate, recipe, own, differences, panel_wells)
        for plate, own, differences in zip(held_out, held_out_statistics, left_out, strict=True)
    ]
    return Calibration(
        training_statistics=described if distances is None else replace(described, held_out_distances=distances),
        embedding_reference=_embedding_reference(trained, unseen, network.spec.classes),
        temperature=fit_temperature(unseen),
    )


def calibrate_unseen(
    network: Ensemble, method: Method, recipe: ImageRecipe, plates: Sequence[PlateSites], classes: Sequence[str]
) -> Calibration:
    """Calibrate on plates that no member was trained on, where the training plates are not known.

    What is fitted on plates is measured on others: distances of plates, and of wells from centres and in projections, are
    those of each batch under what the other batches gave (of each plate under the others, where batches are too few).

    Raises:
        LayoutError: fewer than three plates, or too few that have a class, to leave one out.
    """
    batches = [plate.batch for plate in plates]
    names = [plate.plate for plate in plates]
    _require_enough(plates, classes)
    statistics = [served_statistics(network, method, plate, recipe, PANEL_WELLS) for plate in plates]
    source = ensemble_source(network, method, names, statistics, [names] * len(network.networks))
    groups = batches if len(set(batches)) >= _GROUPS_TO_LEAVE_ONE_OUT else names
    distances = leave_one_group_out(statistics, groups, [], [])
    assert distances is not None
    described = summarise_training(statistics, source, statistics, _blend_wells(network, recipe, plates, statistics))
    wells = [
        _wells(
            network,
            method,
            plate,
            recipe,
            own,
            _left_out_controls(network, method, plate, recipe, described, PANEL_WELLS),
            PANEL_WELLS,
        )
        for plate, own in zip(plates, statistics, strict=True)
    ]
    return Calibration(
        training_statistics=replace(described, held_out_distances=distances),
        embedding_reference=_embedding_reference(wells, wells, network.spec.classes),
        temperature=fit_temperature(wells),
    )


def _blend_wells(
    network: Ensemble, recipe: ImageRecipe, plates: Sequence[PlateSites], statistics: Sequence[BatchNormStatistics]
) -> NDArray[np.float32]:
    """How many control wells the plates' mean moments are worth, (features,)."""
    alone = [measure_wells(network, plate, recipe, own) for plate, own in zip(plates, statistics, strict=True)]
    return blend_wells(alone, [layer.place for layer in network.layers])


def _require_enough(plates: Sequence[PlateSites], classes: Sequence[str]) -> None:
    """Check that every class is left when one of the folds is left out."""
    if len(plates) < _GROUPS_TO_LEAVE_ONE_OUT:
        raise LayoutError(
            f"{len(plates)} plates; calibration needs {_GROUPS_TO_LEAVE_ONE_OUT} or more, to hold each against the others"
        )
    folds = _folds([(plate.batch, plate) for plate in plates])
    for label, name in enumerate(classes):
        if not all(any((plate.labels[plate.treated] == label).any() for plate in others) for _, others in folds):
            raise LayoutError(
                f"class {name} needs labelled wells in two of the batches {', '.join(sorted({p.batch for p in plates}))} "
                f"(on two plates, where there is one batch): each is held against the others"
            )


def leave_one_group_out(
    train: Sequence[BatchNormStatistics],
    train_groups: Sequence[str],
    held_out: Sequence[BatchNormStatistics],
    held_out_groups: Sequence[str],
) -> Float | None:
    """Distances of each group's plates from the training plates of the others, sorted; None with fewer than three groups.

    A new lab is what a served bundle meets, so where labs are known they are the groups that distances are held against.
    """
    groups = sorted(set(train_groups))
    if len(groups) < _GROUPS_TO_LEAVE_ONE_OUT:
        return None
    found = []
    for group in groups:
        others = [plate for plate, of in zip(train, train_groups, strict=True) if of != group]
        own = [p for p, of in zip([*train, *held_out], [*train_groups, *held_out_groups], strict=True) if of == group]
        found.append(summarise_training(others, others[0], own).held_out_distances)
    return np.sort(np.concatenate(found))


# --- wells -----------------------------------------------------------------------------------------------------------


def _wells(
    network: Ensemble,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    statistics: BatchNormStatistics,
    left_out: dict[int, Float],
    panel_wells: int,
) -> _Wells:
    rows = np.flatnonzero(plate.controls | (plate.labels != NO_LABEL))
    logits, embeddings = classify(network, plate.served(rows, recipe), _normaliser(network, method, statistics))
    names, where = np.unique(plate.wells[rows], return_inverse=True)
    labels, controls = np.zeros(len(names), np.int64), np.zeros(len(names), np.bool_)
    labels[where], controls[where] = plate.labels[rows], plate.controls[rows]
    context = with_panel(plate.control_rows, plate, method, panel_wells)
    return _Wells(
        batch=plate.batch,
        embeddings=group_means(embeddings, where, len(names)),
        labels=labels,
        controls=controls,
        in_context=np.isin(names, plate.wells[context]),
        site_logits=logits,
        site_wells=where.astype(np.int64),
        left_out=left_out,
    )


def _normaliser(network: Ensemble, method: Method, statistics: BatchNormStatistics) -> Normaliser:
    return Running(update=False) if method.context == "source" else given(network, statistics)


def _left_out_controls(
    network: Ensemble,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    described: TrainingStatistics,
    panel_wells: int,
) -> dict[int, Float]:
    """Score control wells against contexts of other control wells, as treated wells are, for several context sizes."""
    rng = np.random.default_rng(0)
    wells = np.unique(plate.wells[plate.control_rows])
    if len(wells) < 2:  # noqa: PLR2004 (one to hold against another)
        raise LayoutError(f"plate {plate.plate} has {len(wells)} control wells; calibration needs two or more")
    found: dict[int, Float] = {}
    for count in [count for count in CONTROL_WELL_COUNTS if count < len(wells)]:
        prior = described.prior(count) if count < _BLENDED_BELOW else None
        found[count] = np.concatenate([
            _scored_others(network, method, plate, recipe, rng.permutation(wells), count, prior, panel_wells)
            for _ in range(_DRAWS)
        ])  # fmt: skip
    return found


def _scored_others(
    network: Ensemble,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    wells: NDArray[np.str_],
    count: int,
    prior: Prior | None,
    panel_wells: int,
) -> Float:
    """Differences of ``wells[count:]`` from the centre of ``wells[:count]``, under the latter's statistics."""
    context = np.flatnonzero(np.isin(plate.wells, wells[:count]))
    others = np.flatnonzero(np.isin(plate.wells, wells[count:]))
    plate = plate.scaled_by(context)
    measured = with_panel(context, plate, method, panel_wells)
    norm = _normaliser(network, method, statistics_of(network, plate, recipe, measured, prior))
    _, embeddings = classify(network, plate.served(np.concatenate([context, others]), recipe), norm)
    names, where = np.unique(plate.wells[np.concatenate([context, others])], return_inverse=True)
    means = group_means(embeddings, where, len(names))
    inside = np.isin(names, wells[:count])
    differences: Float = means[~inside] - means[inside].mean(0)
    return differences


# --- embeddings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Space:
    """Where classes lie (classes, dim), and the directions (dim, k) in which wells differ."""

    centres: Float
    basis: Float

    @classmethod
    def of(cls, plates: Sequence[_Wells], classes: int, wells: int) -> "_Space":
        """Fit on plates; ``wells`` are what spreads in it will be estimated from."""
        centres = np.stack([np.concatenate([plate.of(label) for plate in plates]).mean(0) for label in range(classes)])
        return cls(centres, _directions(plates, wells))


def _embedding_reference(trained: Sequence[_Wells], unseen: Sequence[_Wells], classes: int) -> EmbeddingReference:
    wells = sum(len(plate.residuals()) for plate in unseen)
    whole = _Space.of(trained, classes, wells)
    counts = sorted({count for plate in unseen for count in plate.left_out})
    to_controls: dict[int, list[float]] = {count: [] for count in counts}
    to_class: list[float] = []
    for group, others in _folds([(plate.batch, plate) for plate in unseen]):
        known = [plate for plate in trained if plate not in group]
        space = whole if len(known) == len(trained) else _Space.of(known, classes, wells)
        projection = _projection(space.basis, others)
        for plate in group:
            for count, differences in plate.left_out.items():
                to_controls[count] += list(np.linalg.norm(differences @ projection, axis=1))
            for label in range(classes):
                to_class += list(np.linalg.norm((plate.of(label) - space.centres[label]) @ projection, axis=1))
    return EmbeddingReference(
        projection=_projection(whole.basis, unseen).astype(np.float32),
        class_centres=whole.centres.astype(np.float32),
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


def _folds(plates: Sequence[tuple[str, _Plate]]) -> list[tuple[list[_Plate], list[_Plate]]]:
    """Each batch's plates with all others; each plate with all others where there is one batch; one plate with itself.

    ``plates`` are told as (batch, plate).
    """
    batches = sorted({batch for batch, _ in plates})
    if len(batches) > 1:
        return [([p for of, p in plates if of == batch], [p for of, p in plates if of != batch]) for batch in batches]
    if len(plates) > 1:
        return [([plate], [other for _, other in plates if other is not plate]) for _, plate in plates]
    return [([plate for _, plate in plates],) * 2]


# --- temperature -----------------------------------------------------------------------------------------------------


class CalledWells(Protocol):
    """What of a plate's wells the temperature is fitted to, as ``_Wells`` has it."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def in_context(self) -> NDArray[np.bool_]: ...
    @property
    def site_logits(self) -> NDArray[np.float32]: ...
    @property
    def site_wells(self) -> NDArray[np.int64]: ...


def fit_temperature(plates: Sequence[CalledWells]) -> float:
    """Choose the class temperature that gives held-out wells, but those of a context, the highest likelihood.

    Raises:
        LayoutError: there are no such wells.
    """
    if all(plate.in_context.all() for plate in plates):
        raise LayoutError(
            "the plates of held-out batches have no treated wells of the classes beside those of their contexts: "
            "there is nothing to fit the temperature to; give more wells, or a smaller panel"
        )

    def nll(log_temperature: float) -> float:
        losses = []
        for plate in plates:
            temperature, wells = float(np.exp(log_temperature)), np.flatnonzero(~plate.in_context)
            called = well_probabilities(plate.site_logits, plate.site_wells, len(plate.labels), temperature)[wells]
            losses.append(-np.log(np.maximum(called[np.arange(len(wells)), plate.labels[wells]], 1e-12)))
        return float(np.concatenate(losses).mean())

    found = minimize_scalar(nll, bounds=(np.log(TEMPERATURES[0]), np.log(TEMPERATURES[1])), method="bounded")
    return float(np.exp(found.x))
