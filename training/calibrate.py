"""What a bundle must know of its training plates: source statistics, how far plates lie, how embeddings vary, how sure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf

from model.images import ImageRecipe
from model.network import Given, Normaliser, ResNet, Running
from model.predictions import EmbeddingReference, softmax, whitened_distance
from model.statistics import BatchNormStatistics, TrainingStatistics, summarise_training
from training.dataset import NO_LABEL, PlateSites
from training.evaluate import context_rows
from training.methods import Method, classify, measured


@dataclass(frozen=True, eq=False)
class Calibration:
    """Training statistics, embedding reference and class temperature of a trained network."""

    training_statistics: TrainingStatistics
    embedding_reference: EmbeddingReference
    temperature: float


@dataclass(frozen=True, eq=False)
class _Wells:
    """One plate's wells: embeddings (wells, dim), labels (wells,), whether controls; and its sites' logits."""

    embeddings: NDArray[np.float64]
    labels: NDArray[np.int64]
    controls: NDArray[np.bool_]
    site_logits: NDArray[np.float32]
    site_wells: NDArray[np.int64]


def calibrate(
    network: ResNet, method: Method, recipe: ImageRecipe, train: Sequence[PlateSites], held_out: Sequence[PlateSites]
) -> Calibration:
    """Calibrate on training plates (centres) and on plates of held-out batches (thresholds, temperature)."""
    statistics = [control_statistics(network, plate, recipe) for plate in train]
    source = running_statistics(network) if method.context == "source" else mean_moments(statistics)
    held_out_statistics = [control_statistics(network, plate, recipe) for plate in held_out]
    trained = [_wells(network, method, plate, recipe) for plate in train]
    unseen = [_wells(network, method, plate, recipe) for plate in held_out]
    return Calibration(
        training_statistics=summarise_training(statistics, source, held_out_statistics),
        embedding_reference=_embedding_reference(trained, unseen, network.spec.classes),
        temperature=fit_temperature(unseen),
    )


def control_statistics(network: ResNet, plate: PlateSites, recipe: ImageRecipe) -> BatchNormStatistics:
    """Measure a plate's controls as the service would."""
    rows = context_rows(plate)
    given = measured(network, plate.served(rows, recipe))
    return BatchNormStatistics(
        mean=given.mean.cpu().numpy(),
        variance=given.variance.cpu().numpy(),
        sites=len(rows),
        wells=len(set(plate.wells[rows])),
    )


def running_statistics(network: ResNet) -> BatchNormStatistics:
    """Return an ERM network's running statistics."""
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


def _wells(network: ResNet, method: Method, plate: PlateSites, recipe: ImageRecipe) -> _Wells:
    rows = np.flatnonzero(plate.controls | (plate.labels != NO_LABEL))
    norm: Normaliser = (
        Running(update=False) if method.context == "source" else _given(network, control_statistics(network, plate, recipe))
    )
    logits, embeddings = classify(network, plate.served(rows, recipe), norm)
    names, where = np.unique(plate.wells[rows], return_inverse=True)
    sums = np.zeros((len(names), embeddings.shape[1]))
    np.add.at(sums, where, embeddings)
    labels, controls = np.zeros(len(names), np.int64), np.zeros(len(names), np.bool_)
    labels[where], controls[where] = plate.labels[rows], plate.controls[rows]
    return _Wells(sums / np.bincount(where)[:, None], labels, controls, logits, where.astype(np.int64))


def _given(network: ResNet, statistics: BatchNormStatistics) -> Given:
    weight = network.conv1.weight
    return Given(weight.new_tensor(statistics.mean), weight.new_tensor(statistics.variance))


def _embedding_reference(trained: Sequence[_Wells], unseen: Sequence[_Wells], classes: int) -> EmbeddingReference:
    """Whiten by the spread of equal wells of one held-out plate; take thresholds from held-out plates."""
    residuals = [r for plate in unseen for r in _residuals(plate)]
    covariance = LedoitWolf(assume_centered=True).fit(np.concatenate(residuals)).covariance_
    values, vectors = np.linalg.eigh(covariance)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    centres = np.stack([
        np.concatenate([p.embeddings[~p.controls & (p.labels == label)] for p in trained]).mean(0)
        for label in range(classes)
    ])  # fmt: skip
    reference = EmbeddingReference(whitening.astype(np.float32), centres.astype(np.float32), 0.0, 0.0)
    own_class = [
        whitened_distance(embedding, reference.class_centres[label], reference)
        for plate in unseen
        for embedding, label in zip(plate.embeddings[~plate.controls], plate.labels[~plate.controls], strict=True)
    ]
    left_out = [distance for plate in unseen for distance in _left_out_controls(plate, reference)]
    return EmbeddingReference(
        whitening=reference.whitening,
        class_centres=reference.class_centres,
        control_distance=float(np.quantile(left_out, 0.95)),
        class_distance=float(np.quantile(own_class, 0.99)),
    )


def _residuals(plate: _Wells) -> list[NDArray[np.float64]]:
    """Differences of wells from the mean of equal wells on the plate: controls, and each class."""
    groups = [plate.embeddings[plate.controls]]
    groups += [plate.embeddings[~plate.controls & (plate.labels == label)] for label in set(plate.labels)]
    return [(group - group.mean(0)) * np.sqrt(len(group) / (len(group) - 1)) for group in groups if len(group) > 1]


def _left_out_controls(plate: _Wells, reference: EmbeddingReference) -> list[float]:
    """Distance of each control well from the mean of the plate's other control wells."""
    wells = plate.embeddings[plate.controls]
    others = (wells.sum(0) - wells) / max(1, len(wells) - 1)
    return [whitened_distance(well, other, reference) for well, other in zip(wells, others, strict=True)]


def fit_temperature(plates: Sequence[_Wells]) -> float:
    """Choose the class temperature that gives held-out treated wells the highest likelihood."""

    def nll(log_temperature: float) -> float:
        losses = []
        for plate in plates:
            probabilities = softmax(plate.site_logits, float(np.exp(log_temperature)))
            sums = np.zeros((len(plate.labels), probabilities.shape[1]))
            np.add.at(sums, plate.site_wells, probabilities)
            wells = np.flatnonzero(~plate.controls)
            means = sums[wells] / np.bincount(plate.site_wells)[wells, None]
            losses.append(-np.log(np.maximum(means[np.arange(len(wells)), plate.labels[wells]], 1e-12)))
        return float(np.concatenate(losses).mean())

    found = minimize_scalar(nll, bounds=(np.log(0.2), np.log(5.0)), method="bounded")
    return float(np.exp(found.x))
