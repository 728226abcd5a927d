"""Metrics of calls: accuracy, macro-F1, log loss, calibration error, Brier score, worst batch.

Knows nothing of networks or plates: probabilities and labels in, numbers out. A well's probabilities are the mean of its
images'; all but the accuracy per image are metrics of wells, which is what is called and trusted.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import f1_score

ECE_BINS = 15
TEMPERATURES = (0.05, 100.0)
"""The least and the greatest class temperature that is fitted."""
_LEAST_PROBABILITY = 1e-12

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Calibrated:
    """How good probabilities (wells, classes) of wells are: log loss, expected calibration error, Brier score."""

    nll: float
    ece: float
    brier: float


def calibrated(probabilities: Float, labels: Int) -> Calibrated:
    """Score probabilities (rows, classes) against labels (rows,)."""
    return Calibrated(
        nll(probabilities, labels), expected_calibration_error(probabilities, labels), brier(probabilities, labels)
    )


def accuracy(probabilities: Float, labels: Int) -> float:
    """Share of rows (rows, classes) whose likeliest class is their label."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def macro_f1(probabilities: Float, labels: Int) -> float:
    """Mean F1 over the classes that occur among the labels: a class that was not there cannot be found."""
    present = np.unique(labels)
    return float(f1_score(labels, probabilities.argmax(axis=1), labels=present, average="macro", zero_division=0.0))


def nll(probabilities: Float, labels: Int) -> float:
    """Mean negative log probability of the label, in nats; probabilities are floored at 1e-12."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _LEAST_PROBABILITY)).mean())


def brier(probabilities: Float, labels: Int) -> float:
    """Mean over rows of the squared distance of probabilities from the label's indicator, 0 to 2 (Brier 1950)."""
    return float(np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(axis=1).mean())


def expected_calibration_error(probabilities: Float, labels: Int, bins: int = ECE_BINS) -> float:
    """Mean over rows of |accuracy - confidence| of the row's bin: equal-width bins of the called class's probability.

    Source: Guo et al. 2017, On calibration of modern neural networks.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    where = np.digitize(confidence, inner_edges, right=True)
    gaps = np.bincount(where, correct, minlength=bins) - np.bincount(where, confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def worst_batch(cells: pd.DataFrame, metric: str = "well_accuracy") -> tuple[str, float]:
    """Return the experimental batch that fares worst (lab/batch), and the mean over its plates; one row a plate."""
    means = cells.groupby(["lab", "batch"])[metric].mean()
    lab, batch = means.index.to_list()[int(means.argmin())]
    return f"{lab}/{batch}", float(means.min())
