"""Evaluation by plate: accuracy per image and per well, in domain, on new batches and on a new lab, beside the nulls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model.images import ImageRecipe
from model.layout import well_position
from model.network import ResNet
from model.predictions import softmax
from model.statistics import BatchNormStatistics
from training.contexts import context_rows, control_statistics, given, source_statistics
from training.dataset import PlateSites, group_means
from training.methods import Context, Method, classify, plate_normaliser
from training.splits import Split


@dataclass(frozen=True)
class PlateScore:
    """How well one plate's treated wells are called."""

    image_accuracy: float
    well_accuracy: float
    image_nll: float
    images: int
    wells: int


def plate_logits(
    network: ResNet,
    method: Method,
    plate: PlateSites,
    recipe: ImageRecipe,
    context: Context,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Logits of a plate's treated rows (all by default), with statistics from ``context``; ``rows`` are sent together."""
    chosen = plate.treated if rows is None else rows
    used = plate.zscore_recipe(recipe) if method.zscore else recipe
    treated = plate.served(chosen, used)
    needs_controls = context in ("controls", "union")
    controls = plate.served(context_rows(plate), used) if needs_controls else treated[:0]
    logits, _ = classify(network, treated, plate_normaliser(network, context, controls, treated))
    return logits


def score_plate(network: ResNet, method: Method, plate: PlateSites, recipe: ImageRecipe, context: Context) -> PlateScore:
    """Score a plate whose treated wells are all sent together."""
    rows = plate.treated
    return score(plate_logits(network, method, plate, recipe, context), plate.labels[rows], plate.wells[rows])


def score(logits: NDArray[np.float32], labels: NDArray[np.int64], wells: NDArray[np.str_]) -> PlateScore:
    """Score logits (images, classes) per image and, averaged over a well's images, per well."""
    probabilities = softmax(logits)
    calls, truth = by_well(probabilities, labels, wells)
    picked = probabilities[np.arange(len(labels)), labels]
    return PlateScore(
        image_accuracy=float((probabilities.argmax(1) == labels).mean()),
        well_accuracy=float((calls == truth).mean()),
        image_nll=float(-np.log(np.maximum(picked, 1e-12)).mean()),
        images=len(labels),
        wells=len(truth),
    )


def by_well(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], wells: NDArray[np.str_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Call each well by its mean probabilities: (calls, true labels), wells sorted."""
    names, where = np.unique(wells, return_inverse=True)
    truth = np.zeros(len(names), np.int64)
    truth[where] = labels
    return group_means(probabilities, where, len(names)).argmax(1), truth


def label_shift(
    network: ResNet, method: Method, plate: PlateSites, recipe: ImageRecipe, context: Context
) -> tuple[float, float]:
    """Well accuracy of small queries: one class's wells at a time, and as many wells of mixed classes.

    Both send equally many wells, so that what differs is the mixture alone. Returns the means over queries (mixed, one
    class).
    """
    labels = dict(zip(plate.wells[plate.treated], plate.labels[plate.treated], strict=True))
    wells = sorted(labels)
    classes = [[well for well in wells if labels[well] == label] for label in sorted(set(labels.values()))]
    size = min(len(members) for members in classes)
    shuffled = np.random.default_rng(0).permutation(wells)
    mixed = [list(shuffled[at : at + size]) for at in range(0, len(wells) - size + 1, size)]

    def accuracy(queries: Sequence[Sequence[str]]) -> float:
        found = []
        for query in queries:
            rows = plate.treated[np.isin(plate.wells[plate.treated], query)]
            logits = plate_logits(network, method, plate, recipe, context, rows)
            found.append(score(logits, plate.labels[rows], plate.wells[rows]).well_accuracy)
        return float(np.mean(found))

    return accuracy(mixed), accuracy([members[:size] for members in classes])


def source_logits(
    network: ResNet, source: BatchNormStatistics, plate: PlateSites, recipe: ImageRecipe
) -> NDArray[np.float32]:
    """Logits of a plate's treated rows on source statistics: without adaptation."""
    return classify(network, plate.served(plate.treated, recipe), given(network, source))[0]


def contexts_of(method: Method) -> tuple[Context, ...]:
    """Return the contexts a method's network is evaluated with: its own first."""
    if method.name == "erm":
        return ("source", "controls")
    if method.name == "cs-arm-bn":
        return (method.context, "union" if method.context == "controls" else "controls")
    return (method.context,)


def evaluate(
    network: ResNet, method: Method, recipe: ImageRecipe, split: Split, plates: Mapping[str, PlateSites]
) -> pd.DataFrame:
    """Score every test plate in every context of the method: one row a plate and context.

    A meta-trained network is scored on its source statistics too: without adaptation.
    """
    rows = []
    source = None
    if method.name == "cs-arm-bn":
        controls = [control_statistics(network, plates[name], recipe) for name in split.train]
        source = source_statistics(network, method, controls)
    for setting, plate in _test_plates(split, plates):
        place = {"setting": setting, "lab": plate.lab, "batch": plate.batch, "plate": plate.plate}
        for context in contexts_of(method):
            scored = score_plate(network, method, plate, recipe, context)
            mixed, one_class = label_shift(network, method, plate, recipe, context)
            shifted = {"mixed_well_accuracy": mixed, "one_class_well_accuracy": one_class}
            rows.append({"method": method.name, "context": context, **place, **asdict(scored), **shifted})
        if source is not None:
            logits = source_logits(network, source, plate, recipe)
            scored = score(logits, plate.labels[plate.treated], plate.wells[plate.treated])
            rows.append({"method": method.name, "context": "source", **place, **asdict(scored)})
    return pd.DataFrame(rows)


def _test_plates(split: Split, plates: Mapping[str, PlateSites]) -> Iterator[tuple[str, PlateSites]]:
    for setting, names in split.tests().items():
        for name in names:
            yield setting, plates[name]


# --- nulls -----------------------------------------------------------------------------------------------------------


def evaluate_nulls(split: Split, plates: Mapping[str, PlateSites]) -> pd.DataFrame:
    """Score what knows nothing of morphology: the commonest class, the well's position, raw intensities.

    ``intensity`` is logistic regression on mean and standard deviation of the raw planes; ``intensity-zscore`` the same
    relative to the plate's controls, so that it too uses them.
    """
    train = [plates[name] for name in split.train]
    labels = np.concatenate([plate.labels[plate.treated] for plate in train])
    majority = int(np.bincount(labels).argmax())
    nulls = {
        "position": _Null(train, labels, _position),
        "intensity": _Null(train, labels, _intensity),
        "intensity-zscore": _Null(train, labels, _relative_intensity),
    }
    rows = []
    for setting, plate in _test_plates(split, plates):
        truth, wells = plate.labels[plate.treated], plate.wells[plate.treated]
        guesses = {name: null.probabilities(plate) for name, null in nulls.items()}
        guesses["majority"] = np.eye(int(labels.max()) + 1)[np.full(len(truth), majority)]
        for name, probabilities in guesses.items():
            scored = score(np.log(np.maximum(probabilities, 1e-12)).astype(np.float32), truth, wells)
            rows.append({"method": f"null: {name}", "context": "-", "setting": setting, "lab": plate.lab,
                         "batch": plate.batch, "plate": plate.plate, **asdict(scored)})  # fmt: skip
    return pd.DataFrame(rows)


_Features = Callable[[PlateSites], NDArray[np.float64]]


class _Null:
    """Logistic regression on a few numbers per image."""

    def __init__(self, train: Sequence[PlateSites], labels: NDArray[np.int64], features: _Features) -> None:
        self.features = features
        self.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        self.model.fit(np.concatenate([features(plate) for plate in train]), labels)

    def probabilities(self, plate: PlateSites) -> NDArray[np.float64]:
        """Return (treated images, classes)."""
        found: NDArray[np.float64] = self.model.predict_proba(self.features(plate))
        return found


def _position(plate: PlateSites) -> NDArray[np.float64]:
    places = np.array([well_position(str(well)) for well in plate.wells[plate.treated]], np.float64)
    edge = np.minimum(places, places.max(0) - places).min(1, keepdims=True)
    return np.concatenate([places, places**2, edge], axis=1)


def _intensity(plate: PlateSites) -> NDArray[np.float64]:
    features = np.log1p(plate.intensities.reshape(len(plate.wells), -1).astype(np.float64))
    return features[plate.treated]


def _relative_intensity(plate: PlateSites) -> NDArray[np.float64]:
    features = np.log1p(plate.intensities.reshape(len(plate.wells), -1).astype(np.float64))
    controls = features[plate.control_rows]
    relative: NDArray[np.float64] = (features[plate.treated] - controls.mean(0)) / (controls.std(0) + 1e-6)
    return relative
