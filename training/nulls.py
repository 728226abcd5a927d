"""Nulls: what knows nothing of morphology, and stands beside every method.

``majority`` are the class frequencies of the training wells. The others are logistic regressions on a few numbers an image:
``position`` on where the well lies, and on which well it is, so that it knows a layout that plates share; ``intensity`` on
mean and standard deviation of the raw planes; ``intensity-relative`` on how these differ from the plate's controls, so that
it too uses them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, StandardScaler

from model.layout import MAX_COLUMNS, well_position
from training.dataset import PlateSites
from training.queries import Wells

Float = NDArray[np.float64]
_LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True, eq=False)
class Null:
    """A null that was fitted to training plates; it answers as a network does."""

    name: str
    classes: int
    model: Any

    @property
    def uses_controls(self) -> bool:
        """Whether the number of control wells matters."""
        return self.name == "intensity-relative"

    def scored(self, plate: PlateSites, rows: NDArray[np.int64]) -> NDArray[np.bool_]:  # noqa: ARG002 (as a network)
        """All rows of a query count."""
        return np.ones(len(rows), np.bool_)

    def logits(self, plate: PlateSites, rows: NDArray[np.int64], controls: Wells) -> NDArray[np.float32] | None:
        """Log probabilities (rows, classes) of treated rows; None where it needs controls and there are none."""
        if self.uses_controls and not len(controls):
            return None
        found = np.full((len(rows), self.classes), _LEAST_PROBABILITY)
        found[:, self.model.classes_] = self.model.predict_proba(FEATURES[self.name](plate, controls)[rows])
        logits: NDArray[np.float32] = np.log(np.maximum(found, _LEAST_PROBABILITY)).astype(np.float32)
        return logits


def fit_nulls(train: Sequence[PlateSites]) -> tuple[Null, ...]:
    """Fit every null to training plates; those that need controls only where every plate has some."""
    labels = np.concatenate([plate.labels[plate.treated] for plate in train])
    controls = [np.unique(plate.wells[plate.control_rows]) for plate in train]
    found = []
    for name, features in FEATURES.items():
        null = Null(name, int(labels.max()) + 1, _model(name))
        if null.uses_controls and not all(map(len, controls)):
            continue
        null.model.fit(
            np.concatenate([features(plate, own)[plate.treated] for plate, own in zip(train, controls, strict=True)]), labels
        )
        found.append(null)
    return tuple(found)


def _model(name: str) -> Any:
    if name == "majority":
        return _Frequencies()
    if name == "position":
        return position_regression()
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def position_regression() -> Any:
    """A regression, not fitted yet, on ``position_features``: row, column, their squares, and each row, column and well."""
    place, known = [0, 1, 2], OneHotEncoder(handle_unknown="ignore")
    smooth = make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler())
    return make_pipeline(
        ColumnTransformer([("smooth", smooth, place[:2]), ("known", known, place)]), LogisticRegression(max_iter=2000)
    )


def position_features(wells: Sequence[str]) -> Float:
    """Row, column and number of wells: (wells, 3)."""
    places = np.array([well_position(well) for well in wells], np.float64)
    return np.concatenate([places, places[:, :1] * MAX_COLUMNS + places[:, 1:]], axis=1)


class _Frequencies:
    """The training frequencies of the classes, whatever is asked."""

    def fit(self, features: Float, labels: NDArray[np.int64]) -> None:  # noqa: ARG002 (as a regression)
        self.classes_, counts = np.unique(labels, return_counts=True)
        self.shares = counts / counts.sum()

    def predict_proba(self, features: Float) -> Float:
        found: Float = np.tile(self.shares, (len(features), 1))
        return found


def _position(plate: PlateSites, controls: Wells) -> Float:  # noqa: ARG001 (one shape for all)
    return position_features([str(well) for well in plate.wells])


def _intensity(plate: PlateSites, controls: Wells) -> Float:  # noqa: ARG001 (one shape for all)
    return np.log1p(plate.intensities.reshape(len(plate.wells), -1).astype(np.float64))


def _relative_intensity(plate: PlateSites, controls: Wells) -> Float:
    features = _intensity(plate, controls)
    relative: Float = features - features[plate.controls & np.isin(plate.wells, controls)].mean(0)
    return relative


FEATURES: MappingProxyType[str, Callable[[PlateSites, Wells], Float]] = MappingProxyType(
    {
        "majority": _position,
        "position": _position,
        "intensity": _intensity,
        "intensity-relative": _relative_intensity,
    }
)
"""What each null sees of a plate: (sites, numbers)."""
