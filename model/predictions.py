"""Logits of sites → one answer per well, and how far that well lies from its plate's controls and from training.

A well's answer is a function of its own sites and the plate's statistics alone. Its probabilities are the mean over its
sites and the bundle's members of softmax(logits / T), here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class EmbeddingReference:
    """How embeddings of wells vary, measured on held-out training plates.

    ``projection`` (dim, k) turns a difference of well embeddings into units of the spread between equal wells;
    ``class_centres`` (classes, dim) are the mean embeddings of training wells. ``control_distances`` are the distances
    that 95 % of control wells stay within when they are held against a plate of ``control_wells`` other control wells,
    rising; ``class_distance`` is the distance to their class's centre that 99 % of held-out treated wells stay within.
    """

    projection: NDArray[np.float32]
    class_centres: NDArray[np.float32]
    control_wells: NDArray[np.int64]
    control_distances: NDArray[np.float64]
    class_distance: float

    def control_distance(self, wells: int) -> float:
        """Return the distance within which a well resembles controls, on a plate with that many control wells."""
        at = int(np.searchsorted(self.control_wells, wells, side="right")) - 1
        return float(self.control_distances[max(at, 0)])


@dataclass(frozen=True, eq=False)
class ControlCentre:
    """Where a plate's controls lie: the mean embedding (dim,) of that many control wells."""

    embedding: NDArray[np.float32]
    wells: int


@dataclass(frozen=True)
class WellAnswer:
    """One well's class and how sure, how even over sites, and how like its controls or the training wells it is.

    ``spread`` is the standard deviation over sites of the called class's probability, each site's being its members' mean.
    ``distance_to_controls`` is in spreads between equal wells; None where the plate has no adapted controls.
    ``out_of_range`` wells resemble neither the plate's controls nor any class of training.
    """

    well: str
    label: str
    probability: float
    probabilities: tuple[float, ...]
    entropy: float
    sites: int
    spread: float
    distance_to_controls: float | None
    distance_to_class: float
    resembles_controls: bool | None
    out_of_range: bool


def softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities of (…, classes) logits divided by ``temperature``, in float64."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def site_probabilities(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities of sites: the mean over members of (sites, members, classes) logits' softmax → (sites, classes)."""
    probabilities: NDArray[np.float64] = softmax(logits, temperature).mean(axis=1)
    return probabilities


def well_probabilities(
    logits: NDArray[np.float32], wells: NDArray[np.int64], count: int, temperature: float = 1.0
) -> NDArray[np.float64]:
    """Probabilities of wells: the mean over each one's sites → (count, classes).

    Args:
        logits: (sites, members, classes).
        wells: (sites,) the number, below ``count``, of each site's well; every well has a site.
        count: how many wells.
        temperature: the class temperature.
    """
    return group_means(site_probabilities(logits, temperature), wells, count)


def group_means(values: NDArray[np.floating], where: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Mean of rows by group: (rows, dim) → (groups, dim); ``where`` (rows,) numbers each row's group, such as its well."""
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, where, values)
    return sums / np.bincount(where, minlength=groups)[:, None]


def whitened_distance(a: NDArray[np.float32], b: NDArray[np.float32], reference: EmbeddingReference) -> float:
    """Euclidean distance of two (dim,) embeddings in units of the spread between equal wells."""
    return float(np.linalg.norm((a.astype(np.float64) - b.astype(np.float64)) @ reference.projection))


def classify_well(
    well: str,
    logits: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    classes: Sequence[str],
    temperature: float,
    reference: EmbeddingReference,
    controls: ControlCentre | None,
) -> WellAnswer:
    """Average a well's sites into its answer.

    Args:
        well: the well's name.
        logits: (sites, members, classes).
        embeddings: (sites, dim).
        classes: class names in the order of the logits.
        temperature: the bundle's class temperature.
        reference: how embeddings vary.
        controls: where this plate's controls lie; None without adaptation.
    """
    by_site = site_probabilities(logits, temperature)
    probabilities = by_site.mean(axis=0)
    called = int(probabilities.argmax())
    embedding = embeddings.mean(axis=0)
    to_class = min(whitened_distance(embedding, centre, reference) for centre in reference.class_centres)
    to_controls = None if controls is None else whitened_distance(embedding, controls.embedding, reference)
    near = None if controls is None else reference.control_distance(controls.wells)
    resembles = None if to_controls is None or near is None else to_controls <= near
    return WellAnswer(
        well=well,
        label=classes[called],
        probability=float(probabilities[called]),
        probabilities=tuple(float(p) for p in probabilities),
        entropy=float(-(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum()),
        sites=int(logits.shape[0]),
        spread=float(by_site[:, called].std()),
        distance_to_controls=to_controls,
        distance_to_class=to_class,
        resembles_controls=resembles,
        out_of_range=to_class > reference.class_distance and not resembles,
    )


def mean_of_wells(wells: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over wells of the mean over each well's sites: (sites, dim) → (dim,), every well counting once."""
    names = np.asarray(wells)
    centres = [embeddings[names == name].astype(np.float64).mean(axis=0) for name in sorted(set(wells))]
    centre: NDArray[np.float32] = np.mean(centres, axis=0).astype(np.float32)
    return centre
